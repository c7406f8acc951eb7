"""Settings of the optimizer, and of what the update does beside it."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, Field

from r1jax.settings.section import Section

T = TypeVar("T")


class OptimizerSection(Section):
    """AdamW with a schedule, built with optax."""

    learning_rate: float = Field(gt=0, description="Its highest value.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="How it falls after the warm-up, to the stage's last step."
    )
    warmup_steps: int = Field(0, ge=0, description="Updates over which it rises linearly.")
    final_fraction: float = Field(
        0.0, ge=0, le=1, description="Floor of cosine/linear as a share of learning_rate."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of Adam's first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of Adam's second moment.")
    epsilon: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled, as in AdamW.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="A gradient with a larger global norm is scaled down to it."
    )
    moment_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the first moment; bfloat16 takes less memory."
    )


class _WeightChange(Section):
    """From optimizer step `step` on, a term of the loss has the weight `weight`."""

    step: int = Field(ge=0, description="The first one with this weight.")
    weight: float = Field(ge=0, description="Of the loss of multi-token prediction.")


class BalanceSection(Section):
    """How the experts of a mixture are kept evenly used. Both are off at 0.

    DeepSeek-V3 was pre-trained with 0.001 and 0.0001, in the end with a bias_speed of 0. In RL
    biases that move choose other experts than those that sampled.
    """

    bias_speed: float = Field(
        0.0,
        ge=0,
        description="How far each update moves the bias of an expert: down if it was chosen more "
        "often than the mean, else up.",
    )
    sequence_loss: float = Field(
        0.0, ge=0, description="Weight of the loss on the imbalance within each sequence."
    )


def check_changes(value: T) -> T:
    """Raises ValueError unless the steps at which a setting changes start at 0 and increase."""
    if isinstance(value, list):
        steps = [change.step for change in value]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError("steps must start at 0 and increase")
    return value


MTPWeight: TypeAlias = Annotated[
    Annotated[float, Field(ge=0)] | list[_WeightChange],
    AfterValidator(check_changes),
    Field(
        description="Weight of the loss of multi-token prediction, which trains the module and, "
        "through it, the model; or which one from which step on (paper: 0.3, later 0.1). The model "
        "needs multi_token_prediction. 0: only the next token is trained.",
    ),
]
