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
from components.tracking.client import experiment_id

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
            if line.get("ledger") == self.run_id and (
                line["seq"] > len(texts) or texts[line["seq"] - 1] != line["text"]
            ):
                found.append(f"entry {line['seq']} is not what {mirror.name} has in line {i}")
        return found

    def copy_to(self, mirror: Path) -> None:
        """Add the entries that `mirror` has not got: whoever rewrites the server's ledger must find this file too."""
        mirror.parent.mkdir(parents=True, exist_ok=True)
        known = {line["seq"] for line in read_lines(mirror) if line["ledger"] == self.run_id}
        for seq, text in enumerate(self.texts(), start=1):
            if seq not in known:
                append_line(mirror, {"ledger": self.run_id, "seq": seq, "text": text})


def open_ledger(client: Any, name: str, storage: Path, *, create: bool = False) -> Ledger:
    """The ledger of `name`, with `create` a new one where the model does not exist yet.

    Raises:
        TrackingError: when there is no such model, or one that has no ledger.
    """
    from mlflow.exceptions import MlflowException

    for _ in range(2):
        found = client.search_registered_models(f"name = '{name}'")
        if found:
            run_id = found[0].tags.get(_TAG)
            if not run_id:
                raise TrackingError(
                    f"Registered model has no ledger (model={name}). Expected one that pipelines/promote.py made. Give "
                    "tracking.registered_model another name."
                )
            return Ledger(client, name, run_id)
        if not create:
            break
        experiment = experiment_id(client, EXPERIMENT, storage)
        run = client.create_run(experiment, run_name=f"ledger of {name}", tags={"stage": "ledger", "model": name})
        client.set_terminated(run.info.run_id)  # it stays open for params
        try:  # whoever makes the model has made its ledger; the others take that one
            client.create_registered_model(name, tags={_TAG: run.info.run_id})
        except MlflowException:
            client.delete_run(run.info.run_id)
    raise TrackingError(
        f"No champion was ever promoted (model={name}). Expected a registered model with a ledger. Run "
        "pipelines/promote.py RECIPE first."
    )


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
