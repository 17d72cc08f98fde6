"""Make a candidate champion, if the recipe's gates hold for it, and tell of all that were: the ledger.

    python pipelines/promote.py RECIPE.yaml [promote] [VERSION] [--reason TEXT] [--purge-traces]
    python pipelines/promote.py RECIPE.yaml rollback [VERSION] [--reason TEXT]
    python pipelines/promote.py RECIPE.yaml history | verify [--repair] | diff VERSION VERSION
    python pipelines/promote.py RECIPE.yaml certificate [VERSION] | serving [VERSION]

`promote` judges the candidate (that with the alias, or VERSION of <name>-candidates) by its stored evaluations, copies
its bytes, and writes the ledger: from then on it is champion. Exit code 1 when a gate does not hold or something is
wrong.
"""

import argparse
import getpass
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from components.config import Recipe, differences, registered_name
from components.console import number, table, utc
from components.errors import ConfigError, TrackingError
from components.evidence import read_evidence
from components.models import fingerprint
from components.tracking import registry
from components.tracking.client import make_client
from components.tracking.gates import CANDIDATE, GateResult, gate_table, judge
from components.tracking.ledger import Entry, Ledger, Lost, champion_of, find_ledger, make_ledger
from components.tracking.promotion import add_pyfunc, copy_in, fetch_registered, sound
from components.urls import shown_url, without_secrets
from pipelines.cli import Command, leave, run_cli, say, storage_folder, tracking_uri
from pipelines.promotion_evidence import (
    certify,
    evidence_of_entry,
    evidence_of_run,
    gates_and_requests,
    settings_of_run,
    suites_in,
    suites_of,
    with_evidence,
)
from pipelines.purge import purge_traces


class Registry(NamedTuple):
    """Where candidates are and where champions go: two servers, or twice the same."""

    name: str
    recipe: Recipe
    source: Any
    target: Any
    storage: Path

    @property
    def mirror(self) -> Path:
        """A copy of the ledger outside the server."""
        return self.storage / "ledger" / f"{self.name}.jsonl"

    def champion(self) -> tuple[Ledger, Entry]:
        """The ledger and its last entry."""
        return champion_of(find_ledger(self.target, self.name))


def run(command: Command) -> None:
    """Do what the first word says."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    action, words = _asked(command)
    recipe, options = command.recipe, command.options
    uri = tracking_uri(recipe)
    source = make_client(uri)
    target = make_client(recipe.tracking.production) if recipe.tracking.production else source
    where = Registry(registered_name(recipe), recipe, source, target, storage_folder(recipe))
    try:
        _ACTIONS[action](where, words, options)
    except (MlflowException, RequestException) as error:
        uris = ", ".join(dict.fromkeys(shown_url(u) for u in (uri, recipe.tracking.production or uri)))
        raise TrackingError(
            f"MLflow refused (uri={uris}, action={action}): {without_secrets(str(error), uri)[:300]} Expected a server "
            "that answers, and the right to do this. Nothing is half promoted: give the same command again."
        ) from error


def plan(command: Command) -> str:
    """What would be done, for --dry-run."""
    action, words = _asked(command)
    name, gates = registered_name(command.recipe), [gate.metric for gate in command.recipe.gates]
    if action == "promote":
        return f"\nPlan: judge {registry.candidates(name)} by gates: {', '.join(gates) or 'none'}"
    return f"\nPlan: {' '.join([action, *words])} of {name}"


def _asked(command: Command) -> tuple[str, list[str]]:
    words = command.words
    action = words[0] if words and not words[0].isdigit() else "promote"
    words = words[1:] if words and not words[0].isdigit() else words
    counts = {"promote": (0, 1), "rollback": (0, 1), "certificate": (0, 1), "serving": (0, 1), "diff": (2, 2)}
    least, most = counts.get(action, (0, 0))
    if action not in _ACTIONS or not least <= len(words) <= most or not all(word.isdigit() for word in words):
        raise ConfigError(
            f"Argument not understood ({' '.join(command.words)}). Expected promote [VERSION], rollback [VERSION], "
            "history, verify, diff VERSION VERSION, certificate [VERSION] or serving [VERSION]."
        )
    if action == "promote" and not command.recipe.gates:
        raise ConfigError("Nothing to judge by: gates is empty. Give at least one gate.")
    return action, list(words)


def _promote(where: Registry, words: Sequence[str], options: argparse.Namespace) -> None:
    candidate = registry.candidate(where.source, where.name, words[0] if words else None)
    entry = _champion_from(where, candidate)
    if not entry:
        place = where.storage / "registered"
        place.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="promoting-", dir=place) as scratch,
            evidence_of_run(where.source, candidate.run_id) as evidence,
        ):
            folder = registry.fetch(where.source, candidate, Path(scratch))
            while not (entry := _champion_from(where, candidate)):
                _try(where, candidate, folder, evidence, options)
    ledger, _ = where.champion()
    _settle(where, ledger)
    say(f"champion: {where.name} version {entry.version} from {entry.candidate}, entry {entry.seq}")
    purged = purge_traces(where.recipe, where.source, entry.run) if options.purge_traces else None
    _tell_certificate(certify(ledger, entry, where.storage, purged))


def _champion_from(where: Registry, candidate: Any) -> Entry | None:
    """The last entry, if it made this candidate champion, and that version is still there."""
    ledger = find_ledger(where.target, where.name)
    head = ledger.head()[0] if ledger else None
    if not head or head.candidate != f"{candidate.name}/{candidate.version}":
        return None
    there = where.target.search_model_versions(f"name = '{where.name}'")
    return head if head.version in {str(version.version) for version in there} else None


def _try(where: Registry, candidate: Any, folder: Path, evidence: Path, options: argparse.Namespace) -> None:
    """Judge the candidate beside the present champion and write the ledger, unless somebody else is first."""
    ledger = find_ledger(where.target, where.name)
    head, before = ledger.head() if ledger else (None, "")
    copied_from, model = f"{candidate.name}/{candidate.version}", fingerprint(folder)
    champion = suites_of(ledger, head) if ledger and head else None
    results = judge(where.recipe.gates, suites_in(evidence), model, champion)
    say(f"{copied_from}, run {candidate.run_id}\n\n{gate_table(results)}\n")
    if not all(result.passed for result in results):
        raise TrackingError(
            f"Candidate is not promoted (model={where.name}, version={candidate.version}). Expected every gate to "
            "hold. Unlearn again with other settings, measure what is missing, or change the gates."
        )
    ledger = make_ledger(where.target, where.name, where.storage)
    version = copy_in(ledger, candidate, folder, _description(copied_from, options, results), folder.parent)
    entry = Entry(
        seq=head.seq + 1 if head else 1, action="promote", version=version, replaces=head.version if head else None,
        candidate=copied_from, run=candidate.run_id, manifest=candidate.tags["manifest"], gates="", evidence="",
        actor=_actor(options), reason=options.reason, time=utc(), before=before,
    )  # fmt: skip
    try:
        ledger.append(with_evidence(ledger, entry, evidence, model, results))
    except Lost:
        say("another promotion came first; judging again, by the champion that is now\n")


def _rollback(where: Registry, words: Sequence[str], options: argparse.Namespace) -> None:
    ledger, _ = where.champion()
    head, before = ledger.head()
    assert head is not None
    entries = {entry.version: entry for entry in ledger.entries() if entry.action == "promote"}
    version = words[0] if words else entries[head.version].replaces
    if version is None or version not in entries:
        raise TrackingError(
            f"There is nothing to go back to (model={where.name}, version={version}). Expected a version that was "
            f"champion: {', '.join(entries) or 'none'}."
        )
    if head.version != version:
        found = registry.find(ledger.client, f"models:/{where.name}/{version}")
        registry.check_stored(ledger.client, found, where.storage / "registered")  # unaltered, or it stays
        entry = entries[version]._replace(
            seq=head.seq + 1, action="rollback", replaces=head.version, actor=_actor(options), reason=options.reason,
            time=utc(), before=before,
        )  # fmt: skip
        try:
            ledger.append(entry)
        except Lost:
            raise TrackingError(
                f"Champion was changed by somebody else just now (model={where.name}). Expected version "
                f"{head.version}. Look at the history, and decide again."
            ) from None
    _settle(where, ledger)
    say(f"champion: {where.name} version {version}")


def _settle(where: Registry, ledger: Ledger) -> None:
    """What follows of the ledger: the alias, and the copy outside the server."""
    ledger.project()
    ledger.copy_to(where.mirror)


def _history(where: Registry, words: Sequence[str], options: argparse.Namespace) -> None:
    ledger, head = where.champion()
    entries = ledger.entries()
    rows = [
        [str(e.seq), e.time, e.action, e.version, e.replaces or "-", e.candidate, e.actor, e.reason or "-"]
        for e in entries
    ]
    say(table(["#", "time", "action", "version", "replaces", "candidate", "actor", "reason"], rows))
    earlier = next(e.replaces for e in reversed(entries) if e.action == "promote" and e.version == head.version)
    with evidence_of_entry(ledger, head) as folder:
        report, requests = gates_and_requests(folder)
    gates, asked = report["gates"], requests["requests"] if requests else []
    rows_removed = sum(len(request["rows"]) for request in asked)
    ids = ", ".join(request["request_id"] for request in asked)
    facts = {
        "champion": f"version {head.version}, trained by run {head.run}, manifest {head.manifest[:12]}",
        "removed": f"{rows_removed} rows of requests {ids}" if ids else "no deletion requests named",
        "gates": f"{sum(gate['passed'] for gate in gates)} of {len(gates)} held",
        "evidence": f"MLflow run {ledger.run_id}, artifacts {head.evidence}",
        "go back": f"rollback, to version {earlier}" if earlier else "nothing before it",
    }
    say("\n" + "\n".join(f"{key:<9} {value}" for key, value in facts.items()))


def _verify(where: Registry, words: Sequence[str], options: argparse.Namespace) -> None:
    ledger, head = where.champion()
    entries = ledger.entries()
    problems = [*ledger.problems(where.mirror), *sound(ledger, where.storage / "registered").values()]
    for entry in entries:
        try:
            with evidence_of_entry(ledger, entry):
                pass
        except TrackingError as error:
            problems.append(str(error))
    at = where.target.get_registered_model(where.name).aliases.get("champion")
    if str(at) != head.version:
        problem = f"alias champion is at version {at or 'none'}, the ledger's is {head.version}"
        if options.repair and not problems:
            _settle(where, ledger)
            say(f"repaired: {problem}")
        else:
            problems.append(problem + ("" if problems else "; verify --repair mends that"))
    if problems:
        raise TrackingError(f"Registry is not sound (model={where.name}):\n- " + "\n- ".join(problems))
    versions = len({entry.version for entry in entries})
    say(f"{where.name}: {len(entries)} ledger entries, {versions} versions and the alias are sound")


def _diff(where: Registry, words: Sequence[str], options: argparse.Namespace) -> None:
    ledger, _ = where.champion()
    entries = [_entry(ledger, version) for version in words]
    settings, metrics, questions = [], [], []
    for entry in entries:
        settings.append(settings_of_run(where.source, entry.run))
        with evidence_of_entry(ledger, entry) as folder:
            evidence = read_evidence(folder)
        found = evidence.evaluated.get(CANDIDATE) if evidence else None
        metrics.append(found.values if found else {})
        questions.append(evidence.questions if evidence else {})
    changed = differences(*settings)
    say("settings and data: " + ("the same" if not changed else ""))
    for line in changed:
        say(f"  {line}")
    first, second = metrics
    rows = [
        [name, number(first.get(name)), number(second.get(name))] for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name)
    ]  # fmt: skip
    say("\n" + table(["metric", *(f"version {version}" for version in words)], rows))
    if questions[0] != questions[1]:
        say("measured on different questions: do not compare the figures")


def _certificate(where: Registry, words: Sequence[str], options: argparse.Namespace) -> None:
    ledger, head = where.champion()
    entry = _entry(ledger, words[0] if words else head.version)
    page = certify(ledger, entry, where.storage)
    if page is None:
        raise TrackingError(
            f"There is nothing to certify (model={where.name}, version={entry.version}). Expected a run that was given "
            "deletion requests: set data.requests."
        )
    _tell_certificate(page)


def _tell_certificate(page: Path | None) -> None:
    if page:
        say(f"certificate: {page}")


def _serving(where: Registry, words: Sequence[str], options: argparse.Namespace) -> None:
    ledger, head = where.champion()
    version = words[0] if words else head.version
    folder = fetch_registered(where.target, f"models:/{where.name}/{version}", where.storage / "registered")
    made = add_pyfunc(ledger, version, folder, where.storage, where.recipe.evaluation.max_new_tokens)
    say(f"pyfunc of {where.name} version {version}: models:/{where.name}-serving/{made}")


_ACTIONS = {
    "promote": _promote, "rollback": _rollback, "history": _history, "verify": _verify, "diff": _diff,
    "certificate": _certificate, "serving": _serving,
}  # fmt: skip


def _entry(ledger: Ledger, version: str) -> Entry:
    found = {entry.version: entry for entry in ledger.entries() if entry.action == "promote"}
    if version not in found:
        raise TrackingError(
            f"Version was never champion (model={ledger.name}, version={version}). Expected one of {', '.join(found)}."
        )
    return found[version]


def _description(copied_from: str, options: argparse.Namespace, results: list[GateResult]) -> str:
    """What MLflow shows of the version, in Markdown."""
    lines = [f"| {r.metric} | {number(r.value)} | {r.condition} {number(r.bound)} |" for r in results]
    head = f"Promoted from {copied_from} by {_actor(options)}. {options.reason}".strip()
    return "\n".join([head, "", "| gate | value | condition |", "|---|---:|---|", *lines])


def _actor(options: argparse.Namespace) -> str:
    return options.actor or os.environ.get("MLFLOW_TRACKING_USERNAME") or f"{getpass.getuser()}@{socket.gethostname()}"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", default="", metavar="TEXT", help="why, for the ledger")
    parser.add_argument("--actor", default="", metavar="NAME", help="who (default: MLflow's user, else user@machine)")
    parser.add_argument("--repair", action="store_true", help="verify: put the alias where the ledger says")
    parser.add_argument("--purge-traces", action="store_true", help="promote: remove what still holds forgotten rows")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run_cli(str(__doc__), run, plan, words="what to do", add_options=_options, argv=argv)


if __name__ == "__main__":
    leave(main())
