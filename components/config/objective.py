"""The terms of the objective and their weights."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from components.config.section import Section

# --- weights ----------------------------------------------------------------------------------------------------------


class Ramp(Section):
    """Linear from `start` towards `end` over the run."""

    type: Literal["ramp"]
    start: float = Field(0.0, ge=0)
    end: float = Field(ge=0)
    every: Literal["epoch", "step"] = "epoch"
    """epoch: the e-th of E epochs, from 0, has the share e/E, as SOUL's `_epoch` variants; step: the same by steps."""


class Balanced(Section):
    """Keep the norm of this term's gradient, weight included, at `ratio` times that of the forget term's."""

    type: Literal["balanced"]
    ratio: float = Field(1.0, gt=0)
    every: int = Field(10, ge=1)
    """Steps between two measurements; each costs a pass for the forget term and one for this."""
    largest: float = Field(10.0, gt=0)
    """Bound of the weight: a KL to the original starts with a gradient of 0."""


class Dual(Section):
    """Dual variable λ of the constraint term ≤ bound (PDU, arXiv 2506.05314): λ ← max(0, λ + rate·(term − bound))."""

    type: Literal["dual"]
    bound: float = Field(ge=0)
    """ε: largest value of the term that is allowed."""
    rate: float = Field(1.0, gt=0)
    """η, for one update an optimizer step."""
    start: float = Field(1.0, ge=0)
    warmup_epochs: int = Field(0, ge=0)
    """Epochs at the start in which λ stays as it is."""


def _kind_of_weight(value: Any) -> str | None:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", "number")


Weight = Annotated[
    Annotated[float, Field(ge=0), Tag("number")]
    | Annotated[Ramp, Tag("ramp")]
    | Annotated[Balanced, Tag("balanced")]
    | Annotated[Dual, Tag("dual")],
    Discriminator(_kind_of_weight),
]

# --- forget -----------------------------------------------------------------------------------------------------------


class GradientAscent(Section):
    """Lower the probability of the forget answers."""

    type: Literal["gradient_ascent"]
    weight: Weight = 0.1
    """ε1 of Yao et al."""


class BoundedAscent(Section):
    """Gradient ascent that lets go of a token whose loss has reached a bound."""

    type: Literal["bounded_ascent"]
    weight: Weight = 0.1
    bound: float = Field(gt=0)
    """Loss of a token, in nats, from which on it is left alone."""


class KlAscent(Section):
    """Move the distributions on forget answers away from the original's (the KL method of SOUL, arXiv 2404.18239)."""

    type: Literal["kl_ascent"]
    weight: Weight = 0.1


class MaxEntropy(Section):
    """Bring the distributions on forget answers to the uniform one (ME, arXiv 2410.08109)."""

    type: Literal["max_entropy"]
    weight: Weight = 0.1


class Npo(Section):
    """Negative preference optimization (arXiv 2404.05868)."""

    type: Literal["npo"]
    weight: Weight = 1.0
    beta: float = Field(0.1, gt=0)
    """How soon forgetting slows down as the answer becomes less likely than to the original; 0 would be ascent."""


class SimNpo(Section):
    """NPO without the original, by the mean log-probability of an answer (arXiv 2410.07163)."""

    type: Literal["simnpo"]
    weight: Weight = 1.0
    beta: float = Field(4.5, gt=0)
    margin: float = 0.0
    """γ of the paper, outside the factor β."""


class Dpo(Section):
    """Prefer the random responses (refusals or alternate answers) to the forget answers (arXiv 2305.18290)."""

    type: Literal["dpo"]
    weight: Weight = 1.0
    beta: float = Field(0.1, gt=0)


class Wga(Section):
    """Gradient ascent weighted by the token's own probability (arXiv 2502.19301)."""

    type: Literal["wga"]
    weight: Weight = 1.0
    beta: float = Field(1.0, ge=0)
    """Power of the probability; 0 is gradient ascent."""


class SatImp(Section):
    """Gradient ascent weighted by saturation and importance (arXiv 2505.11953)."""

    type: Literal["satimp"]
    weight: Weight = 1.0
    beta1: float = Field(5.0, ge=0)
    """Power of the token's probability p."""
    beta2: float = Field(1.0, ge=0)
    """Power of 1 - p."""


class CeU(Section):
    """Cross-entropy to the model's own distribution without the answer's token (arXiv 2503.01224)."""

    type: Literal["ce_u"]
    weight: Weight = 1.0


class Undial(Section):
    """Self-distillation from the original's logits, lowered at the answer's token (arXiv 2402.10052)."""

    type: Literal["undial"]
    weight: Weight = 1.0
    beta: float = Field(10.0, ge=0)
    """By how much the logit is lowered."""


class Rmu(Section):
    """Steer a layer's activations on forget answers towards a random direction (arXiv 2403.03218)."""

    type: Literal["rmu"]
    weight: Weight = 1.0
    layer: int = Field(ge=0)
    """Decoder layer, from 0, whose output is steered; the paper takes 7 in a 7B model."""
    coefficient: float = Field(6.5, gt=0)
    """c, the norm of what is steered towards; it should exceed that of the activations."""


class LogitFlattening(Section):
    """Flatten the logits on forget answers: (max − mean)² (PDU, arXiv 2506.05314)."""

    type: Literal["logit_flattening"]
    weight: Weight = 1.0


class Nll(Section):
    """Next-token loss: learn the answers. On forget answers for `objective.negate` only."""

    type: Literal["nll"]
    weight: Weight = 1.0


class Custom(Section):
    """A function of yours, like those in `components/objectives/`: returns (sum, metrics)."""

    type: Literal["custom"]
    weight: Weight = 1.0
    import_path: str = Field(pattern=r"^[\w.]+\.\w+$")
    """Such as `my_package.my_module.my_term`; importable on every worker. Its parameters are named after the inputs
    it takes (see `components/objectives/terms.py`); the others are filled from `settings`."""
    per: Literal["token", "row"] = "token"
    """What its sum is divided by the global count of."""
    layer: int | None = Field(None, ge=0)
    """Decoder layer whose activations it takes (`states`, `original_states`)."""
    chosen: bool = False
    """Whether it takes the random responses too (`chosen_logp` and the like), as DPO does."""
    settings: dict[str, Any] = {}


ForgetTerm = Annotated[
    GradientAscent
    | BoundedAscent
    | KlAscent
    | MaxEntropy
    | Npo
    | SimNpo
    | Dpo
    | Wga
    | SatImp
    | CeU
    | Undial
    | Rmu
    | LogitFlattening
    | Nll
    | Custom,
    Field(discriminator="type"),
]

# --- random and normal ------------------------------------------------------------------------------------------------


class RandomResponse(Section):
    """Answer forget prompts with unrelated text."""

    type: Literal["random_response"]
    weight: Weight = 1.0
    """ε2 of Yao et al."""
    responses: int = Field(1, ge=1)
    """K, the random responses drawn for each forget prompt and epoch."""


class KlToOriginal(Section):
    """Keep the original model's distributions on normal answers."""

    type: Literal["kl_to_original"]
    weight: Weight = 1.0
    """ε3 of Yao et al."""


class ReverseKl(Section):
    """KL(current ‖ original) on normal answers."""

    type: Literal["reverse_kl"]
    weight: Weight = 1.0


class JensenShannon(Section):
    """Jensen-Shannon divergence between original and current on normal answers."""

    type: Literal["jensen_shannon"]
    weight: Weight = 1.0


class EmbeddingDifference(Section):
    """Keep a layer's activations on normal answers where the original has them (RMU's retain term)."""

    type: Literal["embedding_difference"]
    weight: Weight = 1.0
    layer: int = Field(ge=0)
    """Decoder layer, from 0; the same as that of `rmu`."""


NormalTerm = Annotated[
    KlToOriginal | Nll | ReverseKl | JensenShannon | EmbeddingDifference | Custom, Field(discriminator="type")
]


class Objective(Section):
    """ε1·forget + ε2·random + ε3·normal; a term left out is not computed and its rows are not read."""

    forget: ForgetTerm | None = None
    random: RandomResponse | None = None
    normal: NormalTerm | None = None
    negate: float | None = Field(None, gt=0)
    """α of task-vector negation (arXiv 2212.04089), after training: original − α·(trained − original). The forget term
    is then one that learns: nll."""

    def terms(self) -> dict[str, Any]:
        """The terms that there are, by group."""
        found = {"forget": self.forget, "random": self.random, "normal": self.normal}
        return {group: term for group, term in found.items() if term is not None}

    def groups(self, terms: Collection[str] | None = None) -> tuple[str, ...]:
        """The groups whose rows the terms of `terms` (left out, all groups) need, in their order in a micro-batch."""
        used = {*(self.terms() if terms is None else terms)}
        if "forget" in used and self.prefers_responses:
            used.add("random")
        return tuple(group for group in ("forget", "random", "normal") if group in used)

    @property
    def responses(self) -> int:
        """K, also where the random responses serve DPO alone."""
        return self.random.responses if self.random else int(self.prefers_responses)

    @property
    def prefers_responses(self) -> bool:
        """Whether the forget term takes the random responses."""
        return isinstance(self.forget, Dpo) or (isinstance(self.forget, Custom) and self.forget.chosen)

    @property
    def layer(self) -> int | None:
        """The layer whose activations a term takes."""
        layers = [getattr(term, "layer", None) for term in self.terms().values()]
        return next((layer for layer in layers if layer is not None), None)
