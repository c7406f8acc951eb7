"""What the settings of every stage have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field, model_validator

from r1jax.settings.optimizer import OptimizerSection, WeightChange
from r1jax.settings.section import Section


class LengthChange(Section):
    """From optimizer step `step` on, completions may have `tokens` tokens."""

    step: int = Field(ge=0)
    tokens: int = Field(ge=1)


class DataChange(Section):
    """From optimizer step `step` on, questions come from the dataset `data`."""

    step: int = Field(ge=0)
    data: str


def _check_changes(name: str, changes: Sequence[LengthChange | DataChange | WeightChange]) -> None:
    """Raises ValueError unless the steps at which a setting changes start at 0 and increase."""
    steps = [change.step for change in changes]
    if not steps or steps[0] != 0 or steps != sorted(set(steps)):
        raise ValueError(f"{name}: steps must start at 0 and increase")


class StageBase(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_\-]*$")
    weights: str | None = Field(
        None,
        description="Where the stage's weights come from: an earlier train stage, `model`, or a "
        "name in `models`; default: the train stage before it, or `model`.",
    )


class TrainStage(StageBase):
    """What every train loop has: checkpoints, and a limit to updates that were skipped."""

    kind: str
    checkpoint_every: int = Field(100, ge=1, description="Optimizer steps.")
    keep_checkpoints: int = Field(2, ge=1)
    max_bad_steps: int = Field(5, ge=1, description="Non-finite updates in a row before stopping.")


class EpochStage(TrainStage):
    """A train loop that goes through a dataset: so many epochs, or steps."""

    data: str
    epochs: float | None = Field(None, gt=0, description="Passes over the data; or give steps.")
    steps: int | None = Field(None, ge=1)
    rows_per_step: int = Field(ge=1)
    micro_batches: int = Field(1, ge=1)
    log_every: int = Field(10, ge=1)
    held_out: str | None = Field(None, description="A dataset whose loss is measured.")
    held_out_every: int = Field(100, ge=1, description="Steps between two held-out losses.")
    optimizer: OptimizerSection

    @model_validator(mode="after")
    def _consistent(self) -> EpochStage:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        if self.rows_per_step % self.micro_batches:
            raise ValueError(
                f"rows_per_step = {self.rows_per_step} is not a multiple of "
                f"micro_batches = {self.micro_batches}"
            )
        return self

    def steps_for(self, rows_per_epoch: int) -> int:
        """The number of steps, given the rows of an epoch."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return math.ceil(self.epochs * rows_per_epoch / self.rows_per_step)
