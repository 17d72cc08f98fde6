"""The evidence of promotions, stored beside the ledger: evaluations, gates, deletion requests and certificate."""

import hashlib
import json
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def evidence_of_entry(ledger: Ledger, entry: Entry) -> Any:
    """The same for an entry of the ledger."""
    return evidence_of_run(ledger.client, ledger.run_id, entry.evidence)


def suites_in(folder: Path) -> Suites:
    """The evaluations in a folder, by suite."""
    stems = [file.stem for file in folder.glob("metrics*.json")]
    suites = [stem.removeprefix("metrics").removeprefix("-") or None for stem in stems]
    return {suite: evidence for suite in suites if (evidence := read_evidence(folder, suite))}


def suites_of_champion(ledger: Ledger, head: Entry | None) -> Suites | None:
    """What was found of the champion when it was promoted; None where there is none."""
    if head is None:
        return None
    with evidence_of_entry(ledger, head) as folder:
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
    found = json.loads(requests.read_text()) if requests.exists() else None
    return json.loads((folder / _GATES).read_text()), found


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
            purged = json.loads(earlier.read_text())["purged"]
    about = certificate_of(ledger.name, entry._asdict(), gates, requests, purged)
    place = storage / "certificates" / f"{ledger.name}-{entry.version}"
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / f"{_CERTIFICATE}.json", json.dumps(about, indent=2, ensure_ascii=False))
    write_whole(place / f"{_CERTIFICATE}.html", certificate_page(about))
    for file in sorted(place.iterdir()):
        ledger.client.log_artifact(ledger.run_id, str(file), entry.evidence)
    return place / f"{_CERTIFICATE}.html"
