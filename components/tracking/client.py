"""MLflow clients, and what is asked of a server in the same way everywhere."""

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.errors import TrackingError
from components.process import environment
from components.tracking.database import database_file, make_database
from components.urls import shown_url, without_secrets

MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias that is not there


def make_client(uri: str) -> Any:
    """An MLflow client for `uri`.

    Raises:
        TrackingError: when the server or database does not answer.
        StorageError: when a database file cannot be written.
    """
    if file := database_file(uri):
        make_database(file)
    import mlflow
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise TrackingError(
            f"MLflow does not answer (tracking.uri={shown_url(uri)}): {without_secrets(str(error), uri)[:200]}. "
            "Expected a running server or a database file. Start it, check MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD where it asks for them, or leave tracking.uri out to use a file in the storage "
            "folder."
        ) from error
    return client


def experiment_id(client: Any, name: str, storage: Path) -> str:
    """The experiment's id; it is made where there is none. Without a server, artifacts go beside the database file, or
    into `storage`.

    Raises:
        TrackingError: when it was deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found:
        _check_experiment(client, found)
        return found.experiment_id
    location = None  # a server decides itself where artifacts go
    if not client.tracking_uri.startswith("http"):
        file = database_file(client.tracking_uri)
        folder = (file.parent if file else storage).absolute() / "mlflow-artifacts"
        location = folder.as_uri() if set("%?#") & {*str(folder)} else str(folder)
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:  # another process was first
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id


def check_active(client: Any, run_id: str) -> None:
    """Raise unless MLflow has the run and takes more of it.

    Raises:
        TrackingError: when the run or its experiment was deleted; names it, and what to do.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id).info
    except MlflowException as error:
        if error.error_code not in MISSING:
            raise
        raise TrackingError(
            f"Run is not in MLflow any more (run={run_id}, uri={shown_url(client.tracking_uri)}). Expected the run "
            "that was begun there. Set if_exists=new to run it again; or remove mlflow/sent.json from its folder, and "
            "everything is sent as a new run."
        ) from error
    _check_experiment(client, client.get_experiment(run.experiment_id))
    if run.lifecycle_stage == "deleted":
        raise TrackingError(
            f"Run is deleted in MLflow (run={run_id}). Expected an active one. Restore it, with "
            f"{_command(client, 'runs restore --run-id', run_id)}; or set if_exists=new to run it again."
        )


def _check_experiment(client: Any, experiment: Any) -> None:
    if experiment.lifecycle_stage == "deleted":
        restore = _command(client, "experiments restore --experiment-id", experiment.experiment_id)
        raise TrackingError(
            f"Experiment is deleted in MLflow (experiment={experiment.name}). Expected an active one. Restore it, with "
            f"{restore}; or give tracking.experiment another name, with if_exists=new where the run is finished."
        )


def _command(client: Any, action: str, name: str) -> str:
    """What to type to have MLflow do it."""
    return f"MLFLOW_TRACKING_URI={shlex.quote(shown_url(client.tracking_uri))} mlflow {action} {name}"


@contextmanager
def addressed(client: Any) -> Iterator[None]:
    """Inside, MLflow's parts that ask no client in particular ask this one's server."""
    import mlflow

    with environment(MLFLOW_TRACKING_URI=client.tracking_uri):
        mlflow.set_tracking_uri(client.tracking_uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


@contextmanager
def long_requests() -> Iterator[None]:
    """A server may take long to store a large file before it answers."""
    with environment(MLFLOW_HTTP_REQUEST_TIMEOUT="300"):
        yield
