"""Settings of pretraining."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from r1jax.settings.optimizer import BalanceSection, MTPWeight, OptimizerSection
from r1jax.settings.stage import (
    Divided,
    StageDescription,
    TrainStage,
    check_multiple,
    divided_rows,
)


class PretrainStage(TrainStage):
    """Next-token prediction on packed rows of a dataset's `text`."""

    FUNCTIONS: ClassVar[str] = "r1jax.stages.supervised"
    DESCRIPTION: ClassVar[StageDescription] = StageDescription(
        title="pretraining",
        leaves="weights",
        makes_base=True,
        loss_note="Next-token cross-entropy, nats.",
        less_memory="more micro_batches",
    )

    kind: str = "pretrain"
    data: str = Field(description="The dataset whose texts are learned, a name in data.")
    steps: int = Field(ge=1, description="Optimizer steps.")
    rows_per_step: int = Field(ge=1, description="Rows of one update, over all devices.")
    row_tokens: int = Field(ge=8, description="Tokens of a row, which texts are packed into.")
    micro_batches: int = Field(
        1, ge=1, description="Parts that an update's rows are computed in; more take less memory."
    )
    log_every: int = Field(10, ge=1, description="Steps between two lines of metrics.")
    mtp_weight: MTPWeight = 0.0
    balance: BalanceSection = BalanceSection.model_construct()
    optimizer: OptimizerSection

    @model_validator(mode="after")
    def _divisible(self) -> PretrainStage:
        check_multiple("rows_per_step", self.rows_per_step, "micro_batches", self.micro_batches)
        return self

    def datasets(self) -> list[tuple[str, str]]:
        return [("data", self.data)]

    def divided(self) -> list[Divided]:
        rows = divided_rows(self.rows_per_step, self.micro_batches)
        return [rows, Divided(".row_tokens", self.row_tokens, "time")]

    def prediction_module_uses(self) -> list[tuple[str, str]]:
        return [("mtp_weight", self.name)] if self.mtp_weight else []

    def planned_steps(self) -> int | None:
        return self.steps
