"""Terms as a user would bring them."""

import json
import os
import time
from typing import Any

from torch import Tensor


def ascent(logp: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, dict[str, Any]]:
    return (scale * logp * mask).sum(), {"token_probability": (logp.detach().exp() * mask).sum()}


def two_originals(original_logp: Tensor, original_logits: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return original_logp.sum() + original_logits.sum(), {}


_bad: dict[int, str] = json.loads(os.environ.get("BAD_STEPS", "{}"), object_hook=lambda d: {int(k): d[k] for k in d})
_calls = {"made": 0, "in_a_step": 1}


def begin(bad: dict[int, str], micro_batches: int) -> None:
    """Count steps from here: `bad` says in which of them `bad_at_times` gives what that is not a number."""
    _bad.clear()
    _bad.update(bad)
    _calls.update(made=0, in_a_step=micro_batches)


def bad_at_times(logp: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
    step = _calls["made"] // _calls["in_a_step"] + 1
    _calls["made"] += 1
    loss = (0.3 * logp * mask).sum()
    if _bad.get(step) == "loss":
        return loss * float("nan"), {}
    if _bad.get(step) == "gradient":
        return loss + (loss * 0).sqrt(), {}
    return loss, {}


def patient_ascent(logp: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Gradient ascent that takes its time: PATIENCE seconds a call."""
    time.sleep(float(os.environ.get("PATIENCE", "0")))
    return 0.3 * (logp * mask).sum(), {}
