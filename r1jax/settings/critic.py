"""Settings of the critic of PPO."""

from __future__ import annotations

from pydantic import Field

from r1jax.settings.optimizer import OptimizerSection
from r1jax.settings.section import Section


class CriticSection(Section):
    """The value model of objective kind ppo: a decoder of its own, with a head for one number.

    As in verl, and in R1's comparison, it shares no weights with the policy: one as large as that.
    """

    weights: str | None = Field(
        None,
        description="Where its first weights come from: an earlier train stage, of which a critic "
        "is taken before the policy; a reward_model stage, with its head; `model` or a name in "
        "`models`, which reads the same tokens. Default: those that the stage starts from. A new "
        "head is 0, and so are all values at first.",
    )
    optimizer: OptimizerSection | None = Field(
        None, description="Its own; default: as the stage's optimizer."
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Steps at the start that train the critic alone; the policy's schedule begins "
        "behind them.",
    )
