"""What became of each deletion request's own rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from components.data.requests import Request
from components.evaluation.metrics import ROW_METRICS, Row, by_set, has

_TOLD = ("probability", "rouge", "exact_match", "extraction_strength")


def by_request(
    requests: Sequence[Request], forget: pa.Table, questions: pa.Table | None, records: Mapping[str, pa.Table]
) -> list[dict[str, Any]]:
    """For each request its rows, as hashes, and the means of some metrics over its questions, by model.

    `forget` are the prepared rows that were unlearned, `questions` those that were asked (both with `row_id` and
    `requests`), `records` what each model said of the questions. No text is in the result.
    """
    unlearned, asked = _ids_by_request(forget), _ids_by_request(questions) if questions is not None else {}
    said = {name: {row["row_id"]: row for row in by_set(table).get("forget", [])} for name, table in records.items()}
    told = []
    for request in requests:
        ids = asked.get(request.request_id, [])
        metrics = {name: _means([rows[i] for i in ids if i in rows]) for name, rows in said.items()}
        about = request.model_dump(include={"request_id", "received", "legal_basis"})
        told.append({**about, "rows": unlearned.get(request.request_id, []), "asked_rows": ids, "metrics": metrics})
    return told


def _means(rows: Sequence[Row]) -> dict[str, float]:
    return {
        metric: float(np.mean([ROW_METRICS[metric].of(row) for row in rows]))
        for metric in _TOLD
        if rows and has(rows, ROW_METRICS[metric].needs)
    }


def _ids_by_request(rows: pa.Table) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row_id, requests in zip(rows["row_id"].to_pylist(), rows["requests"].to_pylist(), strict=True):
        for name in requests or ():
            found.setdefault(name, []).append(row_id)
    return found
