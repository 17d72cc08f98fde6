"""MLflow clients, and what is asked of a server in the same way everywhere."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from components.errors import TrackingError
from components.process import environment

MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias that is not there


def make_client(uri: str) -> Any:
    """An MLflow client for `uri`.

    Raises:
        TrackingError: when the server or database does not answer.
    """
    logging.getLogger("alembic").setLevel(logging.ERROR)  # a new database reports each of its tables
    import mlflow
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise TrackingError(
            f"MLflow does not answer (tracking.uri={shown_uri(uri)}): {hidden(str(error), uri)[:200]}. Expected a "
            "running server or a database file. Start it, check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
            "where it asks for them, or leave tracking.uri out to use a file in the storage folder."
        ) from error
    return client


def shown_uri(uri: str) -> str:
    """The URI as it may stand in logs, without user, password or token."""
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        parts = parts._replace(netloc=f"***@{parts.netloc.rpartition('@')[2]}")
    if "password" in parts.query:
        parts = parts._replace(query="***")
    return uri if parts == urlsplit(uri) else urlunsplit(parts)


def hidden(text: str, uri: str) -> str:
    """A text of others about `uri`, without its password."""
    password = urlsplit(uri).password
    return text.replace(password, "***") if password else text


def experiment_id(client: Any, name: str, storage: Path) -> str:
    """The experiment's id; it is made where there is none. Without a server, artifacts go beside the database file, or
    into `storage`."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    location = None  # a server decides itself where artifacts go
    if not client.tracking_uri.startswith("http"):
        file = client.tracking_uri.removeprefix("sqlite:///")
        location = str((Path(file).parent if file != client.tracking_uri else storage) / "mlflow-artifacts")
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:  # another process was first
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id


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
