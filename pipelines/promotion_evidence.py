"""The evidence of promotions, stored beside the ledger: evaluations, gates, deletion requests and certificate."""

import hashlib
import json
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.errors import TrackingError
from components.evidence import evidence_files, read_evidence
from components.files import sha256, write_whole
from components.tracking.certificate import certificate_of, certificate_page
from components.tracking.gates import GateResult, Suites
from components.tracking.ledger import Entry, Ledger

_GATES, _REQUESTS, _CERTIFICATE = "gates.json", "requests.json", "certificate"


@contextmanager
def evidence_of_run(client: Any, run_id: str, folder: str = "") -> Iterator[Path]:
    """Inside, a local copy of evaluations, gates, requests and certificate among a run's artifacts."""
    with tempfile.TemporaryDirectory() as scratch:
        for item in client.list_artifacts(run_id, folder or None):
            name = Path(item.path).name
            evaluation = name.startswith("metrics") and name.endswith((".json", ".npz"))
            if evaluation or name in (_GATES, _REQUESTS, f"{_CERTIFICATE}.json"):
                client.download_artifacts(run_id, item.path, scratch)
        yield Path(scratch)


@contextmanager
def evidence_of_entry(ledger: Ledger, entry: Entry) -> Iterator[Path]:
    """The same for an entry of the ledger, checked against the digests in it.

    Raises:
        TrackingError: when a file is missing or was altered.
    """
    with evidence_of_run(ledger.client, ledger.run_id, entry.evidence) as folder:
        gates = folder / _GATES
        wanted = {_GATES: entry.gates}
        if gates.exists() and sha256(gates) == entry.gates:
            wanted |= json.loads(gates.read_text(encoding="utf-8"))["evidence"]
        found = {name: sha256(folder / name) for name in wanted if (folder / name).exists()}
        if bad := [name for name, digest in wanted.items() if found.get(name) != digest]:
            raise TrackingError(
                f"Evidence of ledger entry {entry.seq} was altered (model={ledger.name}, files={', '.join(bad)}). "
                f"Expected what the ledger has the digests of, in run {ledger.run_id}, {entry.evidence}. Find out who "
                "may write there."
            )
        yield folder


def settings_of_run(client: Any, run_id: str) -> dict[str, Any]:
    """A training run's resolved recipe, and the digests of its data and original model."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = json.loads(
            Path(client.download_artifacts(run_id, "config.json", scratch)).read_text(encoding="utf-8")
        )
    tags = client.get_run(run_id).data.tags
    return {**settings, **{key: text for key, text in tags.items() if key.startswith(("data.", "original_model"))}}


def suites_in(folder: Path) -> Suites:
    """The evaluations in a folder, by suite."""
    stems = [file.stem for file in folder.glob("metrics*.json")]
    suites = [stem.removeprefix("metrics").removeprefix("-") or None for stem in stems]
    return {suite: evidence for suite in suites if (evidence := read_evidence(folder, suite))}


def suites_of(ledger: Ledger, entry: Entry) -> Suites:
    """What was found of a champion when it was promoted."""
    with evidence_of_entry(ledger, entry) as folder:
        return suites_in(folder)


def with_evidence(ledger: Ledger, entry: Entry, evidence: Path, model: str, results: Sequence[GateResult]) -> Entry:
    """The entry with its evidence, which is stored beside the ledger before anything depends on it."""
    names = [name for suite in suites_in(evidence) for name in evidence_files(suite)]
    files = [file for name in (*names, _REQUESTS) if (file := evidence / name).exists()]
    report = {
        "candidate": entry.candidate, "model": model, "champion": entry.replaces,
        "gates": [result._asdict() for result in results], "evidence": {file.name: sha256(file) for file in files},
    }  # fmt: skip
    text = json.dumps(report, indent=2)
    write_whole(evidence / _GATES, text)
    place = f"{entry.seq:08d}-{uuid.uuid4().hex[:8]}"
    for file in [*files, evidence / _GATES]:
        ledger.client.log_artifact(ledger.run_id, str(file), place)
    return entry._replace(evidence=place, gates=hashlib.sha256(text.encode()).hexdigest())


def gates_and_requests(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(the report on the gates, what became of deletion requests where the run had any)."""
    requests = folder / _REQUESTS
    found = json.loads(requests.read_text(encoding="utf-8")) if requests.exists() else None
    return json.loads((folder / _GATES).read_text(encoding="utf-8")), found


def certify(ledger: Ledger, entry: Entry, storage: Path, purged: dict[str, list[str]] | None = None) -> Path | None:
    """Write the certificate of a version whose run answered deletion requests, and store it beside the ledger.

    Returns the page; None where there were no requests. What was `purged` before stays said.
    """
    with evidence_of_entry(ledger, entry) as folder:
        gates, requests = gates_and_requests(folder)
        if not requests:
            return None
        earlier = folder / f"{_CERTIFICATE}.json"
        if purged is None and earlier.exists():
            purged = json.loads(earlier.read_text(encoding="utf-8"))["purged"]
    about = certificate_of(ledger.name, entry._asdict(), gates, requests, purged)
    place = storage / "certificates" / f"{ledger.name}-{entry.version}"
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / f"{_CERTIFICATE}.json", json.dumps(about, indent=2, ensure_ascii=False))
    write_whole(place / f"{_CERTIFICATE}.html", certificate_page(about))
    for file in sorted(place.iterdir()):
        ledger.client.log_artifact(ledger.run_id, str(file), entry.evidence)
    return place / f"{_CERTIFICATE}.html"
