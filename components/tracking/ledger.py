"""The ledger of a registered model: which version is champion since when, by whom and why; it can only grow.

It is an MLflow run whose params, which MLflow lets nobody change, are the entries. Writing an entry is the one moment
in which a version becomes champion; the alias `champion` follows. Each entry bears the sha256 of the one before.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from components.errors import TrackingError
from components.files import append_line, read_lines
from components.tracking.client import check_active, experiment_id
from components.tracking.registry import make_registered_model

EXPERIMENT = "promotion"
_TAG, _LONGEST = "ledger_run", 6000  # characters of a param, beyond which MLflow cuts it


class Entry(NamedTuple):
    """One change of champion."""

    seq: int
    """From 1, without gap."""
    action: Literal["promote", "rollback"]
    version: str
    """The version that is champion from now on."""
    replaces: str | None
    """The one that was."""
    candidate: str
    """Where its bytes came from: `<candidates>/<version>`."""
    run: str
    """The MLflow run that trained it."""
    manifest: str
    """sha256 of the manifest of its files."""
    evidence: str
    """Folder of the ledger's artifacts with its evaluation, gates and certificate."""
    gates: str
    """sha256 of gates.json there."""
    actor: str
    reason: str
    time: str
    """UTC."""
    before: str
    """sha256 of the entry before; empty for the first."""


class Lost(Exception):
    """Somebody else's entry came first."""


class Ledger(NamedTuple):
    """The ledger of the registered model `name`."""

    client: Any
    name: str
    run_id: str

    def texts(self) -> list[str]:
        """The entries as they are stored, in order of their keys."""
        params = self.client.get_run(self.run_id).data.params
        return [params[key] for key in sorted(params) if key.startswith("entry/")]

    def entries(self) -> list[Entry]:
        """All entries; the last one says who is champion."""
        return [_parsed(text) for text in self.texts()]

    def head(self) -> tuple[Entry | None, str]:
        """(the last entry, the sha256 that the next one must bear)."""
        texts = self.texts()
        return (_parsed(texts[-1]), _sha(texts[-1])) if texts else (None, "")

    def append(self, entry: Entry) -> None:
        """Make it so.

        Raises:
            Lost: when another entry has this number; nothing has changed then.
            TrackingError: when the entry is too long to be stored whole.
        """
        from mlflow.exceptions import MlflowException

        text = json.dumps(entry._asdict(), ensure_ascii=False)
        if len(text) > _LONGEST:
            raise TrackingError(
                f"Ledger entry is too long (characters={len(text)}). Expected at most {_LONGEST}. Shorten the reason."
            )
        try:
            self.client.log_param(self.run_id, _key(entry.seq), text)
        except MlflowException as error:
            if "Changing param values" not in str(error):
                raise
            raise Lost from error

    def project(self) -> Entry | None:
        """Let the alias `champion` follow the last entry. Returns that."""
        while True:
            head, _ = self.head()
            if head is None:
                return None
            self.client.set_registered_model_alias(self.name, "champion", head.version)
            if self.head()[0] == head:
                return head

    def problems(self, mirror: Path) -> list[str]:
        """What is wrong with the chain of entries, and where it differs from the copy in `mirror`."""
        keys = sorted(key for key in self.client.get_run(self.run_id).data.params if key.startswith("entry/"))
        found = [f"entry {i} is missing" for i, key in enumerate(keys, start=1) if key != _key(i)][:1]
        texts, before, version = self.texts(), "", None
        for i, text in enumerate(texts, start=1):
            entry = _parsed(text)
            if entry.before != before:
                found.append(f"entry {i} does not follow from the one before it")
            if entry.replaces != version:
                found.append(f"entry {i} replaces {entry.replaces}, but {version} was champion")
            before, version = _sha(text), entry.version
        for i, line in enumerate(read_lines(mirror), start=1):
            if line["ledger"] != self.run_id:
                found.append(
                    f"line {i} of {mirror.name} is of another ledger, {line['ledger']}: this one was made anew"
                )
            elif line["seq"] > len(texts) or texts[line["seq"] - 1] != line["text"]:
                found.append(f"entry {line['seq']} is not what {mirror.name} has in line {i}")
        return found

    def copy_to(self, mirror: Path) -> None:
        """Add the entries that `mirror` has not got: whoever rewrites the server's ledger must find this file too."""
        mirror.parent.mkdir(parents=True, exist_ok=True)
        known = {line["seq"] for line in read_lines(mirror) if line["ledger"] == self.run_id}
        for seq, text in enumerate(self.texts(), start=1):
            if seq not in known:
                append_line(mirror, {"ledger": self.run_id, "seq": seq, "text": text})


def find_ledger(client: Any, name: str) -> Ledger | None:
    """The ledger of `name`; None where there is no such model.

    Raises:
        TrackingError: when the model has none, or its ledger was deleted.
    """
    found = client.search_registered_models(f"name = '{name}'")
    if not found:
        return None
    if run_id := found[0].tags.get(_TAG):
        check_active(client, run_id)
        return Ledger(client, name, run_id)
    raise TrackingError(
        f"Registered model has no ledger (model={name}). Expected one that pipelines/promote.py made. Give "
        "tracking.registered_model another name."
    )


def make_ledger(client: Any, name: str, storage: Path) -> Ledger:
    """The ledger of `name`, new where the model does not exist yet."""
    if found := find_ledger(client, name):
        return found
    experiment = experiment_id(client, EXPERIMENT, storage)
    run = client.create_run(experiment, run_name=f"ledger of {name}", tags={"stage": "ledger", "model": name})
    client.set_terminated(run.info.run_id)  # it stays open for params
    if not make_registered_model(client, name, {_TAG: run.info.run_id}):
        client.delete_run(run.info.run_id)  # whoever made the model has made its ledger
    made = find_ledger(client, name)
    assert made is not None
    return made


def champion_of(ledger: Ledger | None) -> tuple[Ledger, Entry]:
    """(the ledger, its last entry).

    Raises:
        TrackingError: when nothing was ever promoted.
    """
    head = ledger.head()[0] if ledger else None
    if ledger is None or head is None:
        raise TrackingError(
            "No champion was ever promoted. Expected a ledger with an entry. Run pipelines/promote.py RECIPE first."
        )
    return ledger, head


def _parsed(text: str) -> Entry:
    try:
        return Entry(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise TrackingError(
            f"Ledger entry cannot be read (entry={text[:80]}): {error}. Expected one that pipelines/promote.py wrote. "
            "Compare with the copy under <storage>/ledger, and find out who changed the server's database."
        ) from error


def _key(seq: int) -> str:
    return f"entry/{seq:08d}"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
