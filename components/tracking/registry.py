"""Model folders in MLflow's registry: uploaded as they are, found again, and fetched only if they are unaltered."""

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.errors import TrackingError
from components.files import whole_folder
from components.tracking.client import MISSING, addressed, long_requests
from components.tracking.manifest import NAME, check_folder, manifest_digest, manifest_of


def candidates(name: str) -> str:
    """The registered model whose versions are the candidates for `name`: who trains need not have rights on that."""
    return f"{name}-candidates"


def register(
    client: Any, run_id: str, folder: Path, name: str, tags: Mapping[str, str], *, step: int, trained_at: str,
    description: str = "",
) -> Any:  # fmt: skip
    """Make `folder` a version of the candidates for `name`, with the alias `candidate`. Returns the model version.

    A run has one version: what is there already of an attempt that was cut short is used. The alias stays with a
    version that was trained later, as when this one could not be sent in time.
    """
    from mlflow.exceptions import MlflowException

    model = candidates(name)
    found = client.search_model_versions(f"name = '{model}' and run_id = '{run_id}'")
    if found:
        version = found[0]
    else:
        make_registered_model(client, model)
        version = add_version(client, run_id, folder, model, {**tags, "trained_at": trained_at}, step, description)
    try:
        newest = client.get_model_version_by_alias(model, "candidate").tags.get("trained_at", "")
    except MlflowException as error:
        _only_missing(error)
        newest = ""
    if trained_at >= newest:
        client.set_registered_model_alias(model, "candidate", version.version)
    return version


def make_registered_model(client: Any, name: str, tags: Mapping[str, str] | None = None) -> bool:
    """Make it, unless it is there. Returns whether it was made here: of several at once, one makes it."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, tags=dict(tags or {}))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return False
    return True


def add_version(
    client: Any, run_id: str, folder: Path, name: str, tags: Mapping[str, str], step: int, description: str, *,
    anew: bool = False,
) -> Any:  # fmt: skip
    """Upload `folder`, with its manifest, and make it a new version of `name`, made by the run `run_id`.

    What the run has uploaded of it already is taken, unless it is to be done `anew`.
    """
    from mlflow.entities import LoggedModelOutput

    manifest = manifest_of(folder)
    tags = {"manifest": manifest_digest(manifest), **tags}
    run = client.get_run(run_id).info
    same = f"source_run_id = '{run_id}' AND tags.manifest = '{tags['manifest']}'"
    begun = [] if anew else client.search_logged_models([run.experiment_id], filter_string=same)
    model = begun[0] if begun else client.create_logged_model(
        run.experiment_id, name=re.sub(r"[/:.%\"']", "-", run.run_name), source_run_id=run_id, model_type="hf-folder",
        tags=dict(tags),
    )  # fmt: skip
    if model.status != "READY":
        with long_requests(), tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / NAME).write_text(manifest, encoding="utf-8")
            client.log_model_artifacts(model.model_id, str(folder))
            client.log_model_artifact(model.model_id, str(Path(scratch) / NAME))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])
    with addressed(client):  # the registry looks the logged model up
        return client.create_model_version(
            name, source=f"models:/{model.model_id}", run_id=run_id, model_id=model.model_id, tags=dict(tags),
            description=description[:5000] or None,
        )  # fmt: skip


def candidate(client: Any, name: str, number: str | None = None) -> Any:
    """The candidate version with that number, else the one with the alias `candidate`.

    Raises:
        TrackingError: when there is none.
    """
    from mlflow.exceptions import MlflowException

    model = candidates(name)
    try:
        return client.get_model_version(model, number) if number else client.get_model_version_by_alias(
            model, "candidate"
        )  # fmt: skip
    except MlflowException as error:
        _only_missing(error)
        raise TrackingError(
            f"No candidate is registered (model={model}, version={number or '@candidate'}). Expected a version that "
            "pipelines/unlearn.py registered. Run it with this recipe first; with if_exists=new where the run finished "
            "under other tracking settings."
        ) from error


def find(client: Any, uri: str) -> Any:
    """The model version of `models:/<name>@<alias>` or `models:/<name>/<version>`.

    Raises:
        TrackingError: when there is no such version.
    """
    from mlflow.exceptions import MlflowException

    name, at, alias = uri.removeprefix("models:/").partition("@")
    try:
        if at:
            return client.get_model_version_by_alias(name, alias)
        name, _, number = name.rpartition("/")
        return client.get_model_version(name, number)
    except MlflowException as error:
        raise TrackingError(
            f"Model is not registered (model={uri}): {str(error)[:200]}. Expected models:/<name>@<alias> or "
            "models:/<name>/<version>."
        ) from error


def fetch(client: Any, version: Any, place: Path) -> Path:
    """The folder of a model version, copied to `place` once and looked at file by file.

    Raises:
        TrackingError: when it is gone, or is not what was registered.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    model = f"models:/{version.name}/{version.version}"
    digest = version.tags.get("manifest", "")
    folder = place / f"{version.name}-{version.version}-{digest[:12]}"
    if folder.exists():
        if manifest_digest(manifest_of(folder)) == digest:
            return folder
        shutil.rmtree(folder)  # not what it was when it was fetched
    with whole_folder(folder) as partial:
        try:
            with long_requests(), addressed(client):
                mlflow.artifacts.download_artifacts(version.source, dst_path=str(partial))
            manifest = (partial / NAME).read_text(encoding="utf-8")
        except (MlflowException, OSError) as error:
            raise TrackingError(
                f"Registered model cannot be fetched (model={model}): {str(error)[:200]}. Expected its files and "
                f"{NAME} in the artifact store. Roll back, or promote another version."
            ) from error
        check_folder(partial, manifest, digest, model)
        (partial / NAME).unlink()
    return folder


def check_stored(client: Any, version: Any, place: Path) -> None:
    """Fetch a model version for a moment, to `place`, so that what is looked at are the stored bytes.

    Raises:
        TrackingError: as `fetch` does.
    """
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        fetch(client, version, Path(scratch))


def _only_missing(error: Any) -> None:
    """Let every other refusal through as it is."""
    if error.error_code not in MISSING:
        raise error
