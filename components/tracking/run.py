"""One MLflow run for one run folder, always addressed by its id: what is told of it, and how each thing is sent."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.config import Recipe, Tracking, leaves
from components.errors import TrackingError
from components.tracking import registry
from components.tracking.spool import Entry, Gone, Handler, Known, Spool

_LONGEST = 500  # characters of a param, which older servers take; the artifact config.json has all


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


def open_spool(folder: Path, tracking: Tracking, storage: Path, tell: Callable[[str], None]) -> Spool:
    """The entries of the run in `folder`, for the recipe's MLflow server; `tell` gets a line when that fails."""
    uri = tracking_uri(tracking, storage)
    handlers: dict[str, Handler] = {
        "run": _send_run, "attempt": _send_attempt, "metrics": _send_metrics, "tags": _send_tags,
        "artifact": _send_artifact, "model": _send_model, "end": _send_end,
    }  # fmt: skip
    return Spool(folder / "mlflow", uri, lambda: make_client(uri), handlers, tell)


def put_run(spool: Spool, recipe: Recipe, name: str, folder: Path, tags: Mapping[str, str]) -> int:
    """The run with the resolved recipe as params and artifact, or one more attempt at it. Returns its number."""
    attempt = 1 + sum(entry["kind"] in ("run", "attempt") for entry in spool.entries())
    if attempt > 1:
        spool.put("attempt", attempt=attempt)
        return attempt
    settings = leaves(recipe.model_dump(mode="json", exclude_none=True))
    params = {key: json.dumps(value) if isinstance(value, list) else str(value) for key, value in settings.items()}
    spool.put(
        "run", experiment=recipe.tracking.experiment, storage=str(folder.parent), name=name,
        tags={**tags, "run_folder": str(folder), "attempts": "1"},
        params={key: value for key, value in params.items() if len(value) < _LONGEST},
    )  # fmt: skip
    spool.put("artifact", path=str(folder / "config.json"))
    return attempt


def put_lines(spool: Spool, lines: list[dict[str, Any]]) -> None:
    """Lines of metrics.jsonl as metric points, with their own times."""
    points = [
        [key, value, int(line["time"] * 1000), line["step"]]
        for line in lines
        for key, value in line.items()
        if "/" in key
    ]
    spool.put("metrics", points=points, last_step=max(line["step"] for line in lines))


def put_metrics(spool: Spool, prefix: str, metrics: Mapping[str, float], step: int) -> None:
    """Evaluation metrics as `<prefix>/<name>` at `step`; what another attempt has put already is not put again."""
    now = int(time.time() * 1000)
    told = {(key, value, at) for entry in spool.entries() for key, value, _, at in entry.get("points", ())}
    named = [(f"{prefix}/{key}", value) for key, value in metrics.items()]
    if points := [[key, value, now, step] for key, value in named if (key, value, step) not in told]:
        spool.put("metrics", points=points)


def last_step(spool: Spool) -> int:
    """The last training step that was put: one that is done again after a stop need not be told again."""
    return max((entry.get("last_step", 0) for entry in spool.entries()), default=0)


def _send_run(client: Any, known: Known, entry: Entry) -> Known:
    from mlflow.entities import Param

    experiment = _experiment(client, entry["experiment"], Path(entry["storage"]))
    found = client.search_runs([experiment], f"tags.spool_key = '{entry['key']}'", max_results=1)
    run = found[0] if found else client.create_run(
        experiment, start_time=int(entry["time"] * 1000), run_name=entry["name"],
        tags={**entry["tags"], "spool_key": entry["key"]},
    )  # fmt: skip
    params = [Param(key, value) for key, value in entry["params"].items()]
    for i in range(0, len(params), 100):
        client.log_batch(run.info.run_id, params=params[i : i + 100])
    return {"run_id": run.info.run_id}


def _send_attempt(client: Any, known: Known, entry: Entry) -> None:
    client.update_run(known["run_id"], status="RUNNING")
    client.set_tag(known["run_id"], "attempts", str(entry["attempt"]))


def _send_metrics(client: Any, known: Known, entry: Entry) -> None:
    from mlflow.entities import Metric

    points = [Metric(*point) for point in entry["points"]]
    for i in range(0, len(points), 900):
        client.log_batch(known["run_id"], metrics=points[i : i + 900])


def _send_tags(client: Any, known: Known, entry: Entry) -> None:
    for key, value in entry["tags"].items():
        client.set_tag(known["run_id"], key, value)


def _send_artifact(client: Any, known: Known, entry: Entry) -> None:
    if not Path(entry["path"]).exists():
        raise Gone(f"{entry['path']} is not there any more")
    client.log_artifact(known["run_id"], entry["path"])


def _send_model(client: Any, known: Known, entry: Entry) -> Known:
    folder, name = Path(entry["folder"]), entry["name"]
    if not folder.exists():
        raise Gone(f"{folder} is not there any more")
    with _long_requests():
        version = registry.register(
            client, known["run_id"], folder, name, entry["metrics"], entry["step"], entry["tags"]
        )
    if entry["champion"]:
        registry.set_champion(client, name, version)
    return {"version": version}


@contextmanager
def _long_requests() -> Iterator[None]:
    """A server may take long to store a large file before it answers."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = "300"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _send_end(client: Any, known: Known, entry: Entry) -> None:
    client.set_terminated(known["run_id"], entry["status"], end_time=int(entry["time"] * 1000))


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
