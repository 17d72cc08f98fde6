"""A model folder in MLflow's registry, and the aliases `candidate` and `champion`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.errors import TrackingError
from components.files import sha256, whole_folder


def register(
    client: Any, run_id: str, folder: Path, name: str, metrics: Mapping[str, float], step: int, tags: Mapping[str, str]
) -> str:
    """Upload `folder` as a logged model, make it a version of `name` with alias `candidate`. Returns the version.

    A run has one version: what is there already of an attempt that was cut short is used. The folder is uploaded as it
    is, without loading the model (MLflow's transformers flavour cannot with our transformers version); each weight
    file's sha256 is a tag.
    """
    from mlflow.exceptions import MlflowException

    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    if found:
        version = found[0].version
    else:
        digests = {f"sha256.{file.name}": sha256(file) for file in sorted(folder.glob("*.safetensors"))}
        model_id = _upload(client, run_id, folder, step, {**digests, **tags})
        try:
            client.get_registered_model(name)
        except MlflowException:
            client.create_registered_model(name)
        shown = {f"eval.{key}": f"{value:.6g}" for key, value in metrics.items()}
        version = client.create_model_version(
            name, source=f"models:/{model_id}", run_id=run_id, model_id=model_id, tags={**digests, **tags, **shown},
        ).version  # fmt: skip
    client.set_registered_model_alias(name, "candidate", version)
    return str(version)


def _upload(client: Any, run_id: str, folder: Path, step: int, tags: Mapping[str, str]) -> str:
    """The id of the run's logged model, uploaded unless it is there whole."""
    from mlflow.entities import LoggedModelOutput

    experiment = client.get_run(run_id).info.experiment_id
    begun = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    model = begun[0] if begun else client.create_logged_model(
        experiment, name=folder.parent.name.replace(".", "-"), source_run_id=run_id, model_type="hf-folder",
        tags=dict(tags),
    )  # fmt: skip
    if model.status != "READY":
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])
    return model.model_id


def set_champion(client: Any, name: str, version: str) -> None:
    """Point the alias `champion` at `version`."""
    client.set_registered_model_alias(name, "champion", version)


def candidate(client: Any, name: str) -> Any:
    """The model version with alias `candidate`.

    Raises:
        TrackingError: when the model or the alias does not exist.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, "candidate")
    except MlflowException as error:
        raise TrackingError(
            f"No candidate is registered (model={name}). Expected a version with the alias 'candidate'. "
            "Run pipelines/unlearn.py with this recipe first; with if_exists=new where the run finished under other "
            "tracking settings."
        ) from error


def fetch(client: Any, uri: str, place: Path) -> Path:
    """The folder of `models:/<name>@<alias>` or `models:/<name>/<version>`, copied to `place` once.

    Raises:
        TrackingError: when there is no such version, or its weights are not those that were registered.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    name, at, alias = uri.removeprefix("models:/").partition("@")
    try:
        if at:
            version = client.get_model_version_by_alias(name, alias)
        else:
            name, _, number = name.rpartition("/")
            version = client.get_model_version(name, number)
    except MlflowException as error:
        raise TrackingError(
            f"Model is not registered (model={uri}): {str(error)[:200]}. Expected models:/<name>@<alias> or "
            "models:/<name>/<version>."
        ) from error
    folder = place / f"{name}-{version.version}"
    if not folder.exists():
        with whole_folder(folder) as partial:
            mlflow.artifacts.download_artifacts(f"models:/{name}/{version.version}", dst_path=str(partial))
            for file in partial.glob("*.safetensors"):
                if version.tags.get(f"sha256.{file.name}", "") != sha256(file):
                    raise TrackingError(
                        f"Registered model was altered (model={uri}, file={file.name}). Expected the sha256 in its "
                        "tags. Do not use it; promote another version."
                    )
    return folder
