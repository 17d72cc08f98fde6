"""What became of each deletion request's own rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from components.data.requests import Request
from components.evaluation.metrics import ROW_METRICS, by_set, has

_TOLD = ("probability", "rouge", "exact_match", "extraction_strength")


def by_request(
    requests: Sequence[Request], forget: pa.Table, questions: pa.Table | None, records: Mapping[str, pa.Table]
) -> list[dict[str, Any]]:
    """For each request its rows, as hashes, and the means of some metrics over its questions, by model.

    `forget` are the prepared rows that were unlearned, `questions` those that were asked (both with `row_id` and
    `request`), `records` what each model said of the questions. No text is in the result.
    """
    rows_of = {name: by_set(table).get("forget", []) for name, table in records.items()}
    told = []
    for request in requests:
        asked = _ids(questions, request.request_id) if questions is not None else []
        chosen = {name: [row for row in rows if row["row_id"] in {*asked}] for name, rows in rows_of.items()}
        metrics = {
            name: {
                metric: float(np.mean([ROW_METRICS[metric].of(row) for row in rows]))
                for metric in _TOLD
                if rows and has(rows, ROW_METRICS[metric].needs)
            }
            for name, rows in chosen.items()
        }
        about = request.model_dump(include={"request_id", "received", "legal_basis"})
        told.append({**about, "rows": _ids(forget, request.request_id), "asked_rows": asked, "metrics": metrics})
    return told


def _ids(rows: pa.Table, request_id: str) -> list[str]:
    return [
        i for i, its in zip(rows["row_id"].to_pylist(), rows["request"].to_pylist(), strict=True) if its == request_id
    ]
