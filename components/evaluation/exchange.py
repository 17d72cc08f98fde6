"""Evaluations as others write them: read the retain-only model's, write our own in open-unlearning's shape."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from components.errors import DataError
from components.evaluation.evaluate import Evaluated, Reference
from components.evaluation.membership import ATTACKS
from components.evaluation.metrics import ROW_METRICS, Row, log_truth_ratios, truth_ratio_score


def read_reference(file: Path) -> Reference:
    """From a published log: open-unlearning's `TOFU_EVAL.json`, or TOFU's aggregated `eval_log_aggregated.json`.

    Raises:
        DataError: when the file is neither.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if "forget_truth_ratio" in found:
            return _from_open_unlearning(found)
        if "eval_log_forget.json" in found:
            return _from_tofu(found["eval_log_forget.json"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"Log of the retain-only model cannot be read (path={file}): {type(error).__name__} {error}. Expected "
            "open-unlearning's TOFU_EVAL.json or TOFU's eval_log_aggregated.json."
        ) from error
    raise DataError(
        f"Log of the retain-only model is of an unknown kind (path={file}). Expected open-unlearning's TOFU_EVAL.json, "
        "with forget_truth_ratio, or TOFU's eval_log_aggregated.json, with eval_log_forget.json."
    )


def _from_open_unlearning(found: dict[str, Any]) -> Reference:
    rows = found["forget_truth_ratio"]["value_by_index"]
    in_order = [rows[key]["score"] for key in sorted(rows, key=int)]
    ratios = [math.log(score) if score > 0 else -700.0 for score in in_order]
    return Reference(ratios, found.get("mia_min_k", {}).get("agg_value"))


def _from_tofu(found: dict[str, Any]) -> Reference:
    right, wrong = found["avg_paraphrased_loss"], found["average_perturb_loss"]
    ratios = [right[key] - sum(wrong[key]) / len(wrong[key]) for key in sorted(right, key=int)]
    return Reference(ratios, None)


_THEIR_NAMES = {
    "forget_Q_A_Prob": ("forget", "probability"), "forget_Q_A_ROUGE": ("forget", "rouge"),
    "extraction_strength": ("forget", "extraction_strength"), "exact_memorization": ("forget", "exact_memorization"),
    "retain_Q_A_Prob": ("retain", "probability"), "retain_Q_A_ROUGE": ("retain", "rouge"),
    "retain_Truth_Ratio": ("retain", "truth_ratio"), "ra_Q_A_Prob_normalised": ("real_authors", "probability"),
    "ra_Q_A_ROUGE": ("real_authors", "rouge"), "ra_Truth_Ratio": ("real_authors", "truth_ratio"),
    "wf_Q_A_Prob_normalised": ("world_facts", "probability"), "wf_Q_A_ROUGE": ("world_facts", "rouge"),
    "wf_Truth_Ratio": ("world_facts", "truth_ratio"),
}  # fmt: skip
_WHOLE = ("forget_quality", "model_utility", "privleak", *(f"mia_{name}" for name in ATTACKS))


def open_unlearning_log(evaluated: Evaluated, rows: Sequence[Row]) -> tuple[dict[str, Any], dict[str, float]]:
    """(TOFU_EVAL.json, TOFU_SUMMARY.json) of one model, as far as its sets have TOFU's names."""
    log: dict[str, Any] = {}
    forget = [row for row in rows if row["set"] == "forget"]
    if ratios := log_truth_ratios(forget):
        scores = {str(i): {"score": math.exp(ratio)} for i, ratio in enumerate(ratios)}
        whole = float(np.mean([truth_ratio_score(row) for row in forget]))
        log["forget_truth_ratio"] = {"value_by_index": scores, "agg_value": whole}
    for theirs, (set_name, metric) in _THEIR_NAMES.items():
        if f"{set_name}_{metric}" in evaluated.values:
            log[theirs] = {"agg_value": evaluated.values[f"{set_name}_{metric}"]}
    for theirs in ("extraction_strength", "exact_memorization"):
        if theirs in log:
            scores = {str(i): {"score": ROW_METRICS[theirs].of(row)} for i, row in enumerate(forget)}
            log[theirs]["value_by_index"] = scores
    for name in _WHOLE:
        if name in evaluated.values:
            log[name] = {"agg_value": evaluated.values[name]}
    return log, {name: about["agg_value"] for name, about in log.items()}
