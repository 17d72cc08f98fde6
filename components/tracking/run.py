"""One MLflow run for one run folder, always addressed by its id: what is told of it, and how each thing is sent."""

import ast
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from components.config import Recipe, leaves
from components.errors import TrackingError
from components.tracking import registry
from components.tracking.client import MISSING, check_active, experiment_id, make_client
from components.tracking.spool import Entry, Gone, Handler, Known, Spool

LONGEST = 500
"""Characters of a param, which older servers take, too; the artifact config.json has all."""
_LONGEST_KEY, _LONGEST_TAG = 250, 5000  # characters, beyond which MLflow refuses the whole run


class Input(NamedTuple):
    """A data set that a run is made from."""

    name: str
    """Such as forget."""
    digest: str
    """32 hex digits at most."""
    rows: int
    sources: list[str]


def open_spool(folder: Path, uri: str, tell: Callable[[str], None]) -> Spool:
    """The entries of the run in `folder`, for the MLflow server at `uri`; `tell` gets a line when that fails."""
    handlers: dict[str, Handler] = {
        "run": _send_run, "attempt": _send_attempt, "inputs": _send_inputs, "metrics": _send_metrics,
        "model_metrics": _send_metrics, "tags": _send_tags, "artifact": _send_artifact, "model": _send_model,
        "end": _send_end,
    }  # fmt: skip
    told = {kind: _unless_deleted(send) for kind, send in handlers.items()}
    return Spool(folder / "mlflow", uri, lambda: make_client(uri), told, tell)


def _unless_deleted(send: Handler) -> Handler:
    """`send`, where a refusal means that the run was deleted: it waits until the run is restored, and is not lost."""

    def sent(client: Any, known: Known, entry: Entry) -> Known | None:
        from mlflow.exceptions import MlflowException

        try:
            return send(client, known, entry)
        except MlflowException as error:
            if error.error_code in MISSING and "run_id" in known:
                check_active(client, known["run_id"])
            raise

    return sent


def put_run(
    spool: Spool, experiment: str, storage: Path, folder: Path, settings: Mapping[str, Any], tags: Mapping[str, str], *,
    name: str | None = None, files: Sequence[Path] = (), inputs: Sequence[Input] = (),
) -> int:  # fmt: skip
    """The run of `folder` with its settings as params, or one more attempt at it. Returns the attempt's number.

    Settings whose name or value is too long for a param are left out; `name` is the folder's by default.
    """
    attempt = 1 + sum(entry["kind"] in ("run", "attempt") for entry in spool.entries())
    if attempt > 1:
        spool.put("attempt", attempt=attempt)
        return attempt
    params = {key: json.dumps(value) if isinstance(value, list) else str(value) for key, value in settings.items()}
    spool.put(
        "run", experiment=experiment, storage=str(storage), name=name or folder.name,
        tags={**tags, "run_folder": str(folder), "attempts": "1"},
        params={key: value for key, value in params.items() if len(key) <= _LONGEST_KEY and len(value) <= LONGEST},
    )  # fmt: skip
    for file in files:
        spool.put("artifact", path=str(file))
    if inputs:
        spool.put("inputs", inputs=[given._asdict() for given in inputs])
    return attempt


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """A resolved recipe as MLflow's pages show it: by dotted name, without what is not set and texts in filters."""
    return leaves(without_filter_texts(recipe.model_dump(mode="json", exclude_none=True)))


def without_filter_texts(settings: Any) -> Any:
    """Settings in which no filter (`where`) tells the texts that it compares with, such as whose record is meant.

    MLflow lets nobody change a param once it is sent.
    """
    if isinstance(settings, dict):
        return {
            key: _without_texts(value) if key == "where" and isinstance(value, str) else without_filter_texts(value)
            for key, value in settings.items()
        }
    return [without_filter_texts(value) for value in settings] if isinstance(settings, list) else settings


def _without_texts(where: str) -> str:
    class Blanked(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.Constant:
            return ast.Constant("…") if isinstance(node.value, str) else node

    try:
        return ast.unparse(Blanked().visit(ast.parse(where.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return "…"


def put_lines(spool: Spool, lines: list[dict[str, Any]]) -> None:
    """Lines of metrics.jsonl as metric points, with their own times."""
    spool.put("metrics", points=_points(lines), last_step=max(line["step"] for line in lines))


def put_system(spool: Spool, lines: list[dict[str, Any]]) -> None:
    """Lines of how busy the nodes are, which have a count of their own in place of training's steps."""
    if lines:
        spool.put("metrics", points=_points(lines))


def _points(lines: list[dict[str, Any]]) -> list[list[Any]]:
    return [
        [key, value, int(line["time"] * 1000), line["step"]]
        for line in lines
        for key, value in line.items()
        if "/" in key
    ]


def put_metrics(spool: Spool, prefix: str, metrics: Mapping[str, float], step: int, *, of_model: bool = False) -> None:
    """Evaluation metrics as `<prefix>/<name>` at `step`; what another attempt has put already is not put again.

    With `of_model` they are also those of the model that was put before.
    """
    now, kind = int(time.time() * 1000), "model_metrics" if of_model else "metrics"
    alike = [entry for entry in spool.entries() if entry["kind"] == kind]
    told = {(key, value, at) for entry in alike for key, value, _, at in entry["points"]}
    named = [(f"{prefix}/{key}", value) for key, value in metrics.items()]
    if points := [[key, value, now, step] for key, value in named if (key, value, step) not in told]:
        spool.put(kind, points=points)


def last_step(spool: Spool) -> int:
    """The last training step that was put: one that is done again after a stop need not be told again."""
    return max((entry.get("last_step", 0) for entry in spool.entries()), default=0)


def _send_run(client: Any, known: Known, entry: Entry) -> Known:
    from mlflow.entities import Param

    experiment = experiment_id(client, entry["experiment"], Path(entry["storage"]))
    found = client.search_runs([experiment], f"tags.spool_key = '{entry['key']}'", max_results=1)
    run = found[0] if found else client.create_run(
        experiment, start_time=int(entry["time"] * 1000), run_name=entry["name"],
        tags={**_fitting(entry["tags"]), "spool_key": entry["key"]},
    )  # fmt: skip
    params = [Param(key, value) for key, value in entry["params"].items()]
    for i in range(0, len(params), 100):
        client.log_batch(run.info.run_id, params=params[i : i + 100])
    return {"run_id": run.info.run_id, "experiment_id": experiment}


def _fitting(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags with their texts cut to what MLflow takes, such as a long command line."""
    return {key: text if len(text) <= _LONGEST_TAG else f"{text[: _LONGEST_TAG - 2]} …" for key, text in tags.items()}


def _send_attempt(client: Any, known: Known, entry: Entry) -> None:
    client.update_run(known["run_id"], status="RUNNING")
    client.set_tag(known["run_id"], "attempts", str(entry["attempt"]))


def _send_metrics(client: Any, known: Known, entry: Entry) -> None:
    from mlflow.entities import Metric

    model_id = known.get("model_id") if entry["kind"] == "model_metrics" else None
    points = [Metric(key, value, at, step, model_id=model_id) for key, value, at, step in entry["points"]]
    for i in range(0, len(points), 900):
        client.log_batch(known["run_id"], metrics=points[i : i + 900])


def _send_tags(client: Any, known: Known, entry: Entry) -> None:
    for key, value in _fitting(entry["tags"]).items():
        client.set_tag(known["run_id"], key, value)


def _send_inputs(client: Any, known: Known, entry: Entry) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for found in entry["inputs"]:
        given = Input(**found)
        source, profile = json.dumps({"uri": ", ".join(given.sources)[:2000]}), json.dumps({"num_rows": given.rows})
        dataset = Dataset(given.name, given.digest, "local", source, profile=profile)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", given.name)]))
    client.log_inputs(known["run_id"], inputs)


def _send_artifact(client: Any, known: Known, entry: Entry) -> None:
    if not Path(entry["path"]).exists():
        raise Gone(f"{entry['path']} is not there any more")
    if Path(entry["path"]).is_dir():
        client.log_artifacts(known["run_id"], entry["path"], entry.get("into"))
    else:
        client.log_artifact(known["run_id"], entry["path"], entry.get("into"))


def _send_model(client: Any, known: Known, entry: Entry) -> Known:
    folder = Path(entry["folder"])
    if not folder.exists():
        raise Gone(f"{folder} is not there any more")
    try:
        version = registry.register(
            client, known["run_id"], folder, entry["name"], entry["tags"], step=entry["step"],
            trained_at=entry["trained_at"], description=entry["description"],
        )  # fmt: skip
    except TrackingError as error:
        raise Gone(str(error)) from error
    return {"version": str(version.version), "model_id": version.source.removeprefix("models:/")}


def _send_end(client: Any, known: Known, entry: Entry) -> None:
    client.set_terminated(known["run_id"], entry["status"], end_time=int(entry["time"] * 1000))
