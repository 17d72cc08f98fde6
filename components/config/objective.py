"""The terms of the objective."""

from typing import Annotated, Literal

from pydantic import Field

from components.config.section import Section


class GradientAscent(Section):
    """Lower the probability of the forget answers."""

    type: Literal["gradient_ascent"]
    weight: float = Field(0.1, ge=0)
    """ε1 of Yao et al."""


class BoundedAscent(Section):
    """Gradient ascent that lets go of a token whose loss has reached a bound."""

    type: Literal["bounded_ascent"]
    weight: float = Field(0.1, ge=0)
    bound: float = Field(gt=0)
    """Loss of a token, in nats, from which on it is left alone."""


class Npo(Section):
    """Negative preference optimization (arXiv 2404.05868)."""

    type: Literal["npo"]
    weight: float = Field(1.0, ge=0)
    beta: float = Field(0.1, gt=0)
    """How soon forgetting slows down as the answer becomes less likely than to the original; 0 would be ascent."""


class SimNpo(Section):
    """NPO without the original, by the mean log-probability of an answer (arXiv 2410.07163)."""

    type: Literal["simnpo"]
    weight: float = Field(1.0, ge=0)
    beta: float = Field(4.5, gt=0)
    margin: float = 0.0
    """γ of the paper, outside the factor β."""


class Wga(Section):
    """Gradient ascent weighted by the token's own probability (arXiv 2502.19301)."""

    type: Literal["wga"]
    weight: float = Field(1.0, ge=0)
    beta: float = Field(1.0, ge=0)
    """Power of the probability; 0 is gradient ascent."""


class SatImp(Section):
    """Gradient ascent weighted by saturation and importance (arXiv 2505.11953)."""

    type: Literal["satimp"]
    weight: float = Field(1.0, ge=0)
    beta1: float = Field(5.0, ge=0)
    """Power of the token's probability p."""
    beta2: float = Field(1.0, ge=0)
    """Power of 1 - p."""


class CeU(Section):
    """Cross-entropy to the model's own distribution without the answer's token (arXiv 2503.01224)."""

    type: Literal["ce_u"]
    weight: float = Field(1.0, ge=0)


class Undial(Section):
    """Self-distillation from the original's logits, lowered at the answer's token (arXiv 2402.10052)."""

    type: Literal["undial"]
    weight: float = Field(1.0, ge=0)
    beta: float = Field(10.0, ge=0)
    """By how much the logit is lowered."""


ForgetTerm = Annotated[
    GradientAscent | BoundedAscent | Npo | SimNpo | Wga | SatImp | CeU | Undial, Field(discriminator="type")
]


class RandomResponse(Section):
    """Answer forget prompts with unrelated text."""

    type: Literal["random_response"]
    weight: float = Field(1.0, ge=0)
    """ε2 of Yao et al."""
    responses: int = Field(1, ge=1)
    """K, the random responses drawn for each forget prompt and epoch."""


class KlToOriginal(Section):
    """Keep the original model's distributions on normal answers."""

    type: Literal["kl_to_original"]
    weight: float = Field(1.0, ge=0)
    """ε3 of Yao et al."""


class Nll(Section):
    """Next-token loss on normal answers."""

    type: Literal["nll"]
    weight: float = Field(1.0, ge=0)


class ReverseKl(Section):
    """KL(current ‖ original) on normal answers."""

    type: Literal["reverse_kl"]
    weight: float = Field(1.0, ge=0)


class JensenShannon(Section):
    """Jensen-Shannon divergence between original and current on normal answers."""

    type: Literal["jensen_shannon"]
    weight: float = Field(1.0, ge=0)


NormalTerm = Annotated[KlToOriginal | Nll | ReverseKl | JensenShannon, Field(discriminator="type")]


class Objective(Section):
    """ε1·forget + ε2·random + ε3·normal; a term left out is not computed and its rows are not read."""

    forget: ForgetTerm | None = None
    random: RandomResponse | None = None
    normal: NormalTerm | None = None
