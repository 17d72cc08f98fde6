"""Champions: versions that the ledger names, with bytes of their own, copied from candidates and checked when used."""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from components.errors import TrackingError
from components.tracking.client import addressed, experiment_id, long_requests
from components.tracking.ledger import EXPERIMENT, Entry, Ledger, find_ledger
from components.tracking.registry import add_version, check_stored, fetch, find

_SERVES = ("mlflow", "torch", "transformers", "safetensors")
COPIED = ("fingerprint", "objective", "optimizer", "recipe", "config_hash", "original_model", "trained_at")


def copy_in(ledger: Ledger, candidate: Any, folder: Path, description: str, place: Path) -> str:
    """Make a candidate's `folder` a version of the ledger's model, with files of its own. Returns the version.

    The files belong to the ledger's run, so that who may only train cannot touch them. They are fetched again, to
    `place`, and looked at. A copy that is there already, as of a promotion that was cut short, is taken if it is sound.
    """
    source, wanted = f"{candidate.name}/{candidate.version}", candidate.tags["manifest"]
    spoilt = False
    for version in ledger.client.search_model_versions(f"name = '{ledger.name}'"):
        if (version.tags.get("candidate"), version.tags.get("manifest")) == (source, wanted):
            try:
                check_stored(ledger.client, version, place)
                return str(version.version)
            except TrackingError:
                spoilt = True
    kept = {key: text for key, text in candidate.tags.items() if key in COPIED or key.startswith(("data.", "eval."))}
    tags = {**kept, "candidate": source, "trained_by": candidate.run_id}
    copy = add_version(ledger.client, ledger.run_id, folder, ledger.name, tags, 0, description, anew=spoilt)
    check_stored(ledger.client, copy, place)
    return str(copy.version)


def fetch_registered(client: Any, uri: str, place: Path) -> Path:
    """The folder of `models:/…`, checked against its manifest, and a champion's against the ledger.

    Raises:
        TrackingError: when it was altered, or the alias `champion` is not where the ledger says.
    """
    version = find(client, uri)
    if not client.get_registered_model(version.name).tags.get("ledger_run"):
        return fetch(client, version, place)
    ledger = find_ledger(client, version.name)
    entries = ledger.entries() if ledger else []
    if uri.endswith("@champion") and entries and entries[-1].version != str(version.version):
        raise TrackingError(
            f"Alias is not where the ledger says (model={uri}, version={version.version}, "
            f"ledger={entries[-1].version}). Expected the same. Run pipelines/promote.py RECIPE verify --repair."
        )
    check_tag(version, entries)
    return fetch(client, version, place)


def check_tag(version: Any, entries: list[Entry]) -> None:
    """Refuse a version whose recorded manifest is not the one in the ledger.

    Raises:
        TrackingError: naming both.
    """
    told = {entry.version: entry.manifest for entry in entries}
    digest = told.get(str(version.version))
    if digest and version.tags.get("manifest") != digest:
        raise TrackingError(
            f"Registered model was altered (model=models:/{version.name}/{version.version}): its tag manifest is "
            f"{version.tags.get('manifest')}, in the ledger {digest}. Expected the same. Do not use it."
        )


def sound(ledger: Ledger, place: Path) -> Mapping[str, str]:
    """What is wrong with each version that the ledger names, by version; empty where all is well.

    Each is fetched anew, so that what is looked at are the stored bytes.
    """
    entries = ledger.entries()
    found = {}
    for number in dict.fromkeys(entry.version for entry in entries):
        try:
            version = find(ledger.client, f"models:/{ledger.name}/{number}")
            check_tag(version, entries)
            check_stored(ledger.client, version, place)
        except TrackingError as error:
            found[number] = str(error)
    return found


def add_pyfunc(ledger: Ledger, version: str, folder: Path, storage: Path, max_new_tokens: int) -> str:
    """Make the champion's `folder` a pyfunc, as a version of `<name>-serving`. Returns that version.

    Apart from the champion itself, since a pyfunc brings code with it, which is run where it is loaded.
    """
    import mlflow

    import components

    package = Path(next(iter(components.__path__)))
    name = f"{ledger.name}-serving"
    experiment = experiment_id(ledger.client, EXPERIMENT, storage)
    with addressed(ledger.client), long_requests():
        with mlflow.start_run(experiment_id=experiment, run_name=f"{name} of version {version}"):
            made = mlflow.pyfunc.log_model(
                name=name, python_model=str(package / "tracking" / "serving.py"), artifacts={"model": str(folder)},
                code_paths=[str(package)],  # which serving.py imports
                pip_requirements=[f"{library}=={metadata.version(library)}" for library in _SERVES],
                model_config={"max_new_tokens": max_new_tokens},
            )  # fmt: skip
        found = mlflow.register_model(made.model_uri, name, tags={"version": version})
    return str(found.version)
