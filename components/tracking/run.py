"""One MLflow run for one run folder, always addressed by its id."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.config import Recipe, Tracking
from components.errors import TrackingError


def tracking_uri(tracking: Tracking, storage: Path) -> str:
    """The recipe's MLflow server, else a database in the storage folder."""
    return tracking.uri or f"sqlite:///{storage / 'mlflow.db'}"


def make_client(uri: str) -> Any:
    """An MLflow client for `uri`.

    Raises:
        TrackingError: when the server or database does not answer.
    """
    import logging

    logging.getLogger("alembic").setLevel(logging.ERROR)  # a new database reports each of its tables
    import mlflow
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    mlflow.set_tracking_uri(uri)  # the registry looks logged models up there, whatever its client was told
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise TrackingError(
            f"MLflow does not answer (tracking.uri={uri}): {str(error)[:200]}. Expected a running server or a "
            "database file. Start it, or leave tracking.uri out to use a file in the storage folder."
        ) from error
    return client


def open_run(client: Any, recipe: Recipe, name: str, folder: Path, tags: Mapping[str, str]) -> str:
    """Create the run with the resolved recipe as params and artifact. Returns its id."""
    experiment = _experiment(client, recipe.tracking.experiment, folder.parent)
    run = client.create_run(experiment, run_name=name, tags={**tags, "run_folder": str(folder)})
    from mlflow.entities import Param

    params = [Param(key, str(value)) for key, value in _scalars(recipe.model_dump(mode="json"))]
    for i in range(0, len(params), 100):
        client.log_batch(run.info.run_id, params=params[i : i + 100])
    client.log_artifact(run.info.run_id, str(folder / "config.json"))
    return run.info.run_id


def log_lines(client: Any, run_id: str, lines: list[dict[str, Any]]) -> None:
    """Lines of metrics.jsonl as metric points. Their timestamps are the lines' own: sending twice adds nothing."""
    from mlflow.entities import Metric

    points = [
        Metric(key, value, int(line["time"] * 1000), line["step"])
        for line in lines
        for key, value in line.items()
        if "/" in key
    ]
    for i in range(0, len(points), 900):
        client.log_batch(run_id, metrics=points[i : i + 900])


def log_metrics(client: Any, run_id: str, prefix: str, metrics: Mapping[str, float], step: int) -> None:
    """Evaluation metrics as `<prefix>/<name>` at `step`."""
    log_lines(client, run_id, [{"time": time.time(), "step": step, **{f"{prefix}/{k}": v for k, v in metrics.items()}}])


def _experiment(client: Any, name: str, storage: Path) -> str:
    found = client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    from mlflow.exceptions import MlflowException

    # A server decides itself where artifacts go; beside a database file they go beside it.
    location = str(storage / "mlflow-artifacts") if client.tracking_uri.startswith("sqlite") else None
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:  # another process was first
        return client.get_experiment_by_name(name).experiment_id


def _scalars(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _scalars(inner, f"{path}.{key}" if path else key)]
    if isinstance(value, list):
        return [(path, json.dumps(value))] if len(json.dumps(value)) < 500 else []
    return [] if value is None else [(path, value)]
