"""Settings of pretraining."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1jax.settings.optimizer import BalanceSection, OptimizerSection, WeightChange, _mtp_weight
from r1jax.settings.stage import TrainStage, _check_changes


class PretrainStage(TrainStage):
    """Next-token prediction on packed rows of a dataset's `text`."""

    kind: Literal["pretrain"] = "pretrain"
    data: str
    steps: int = Field(ge=1)
    rows_per_step: int = Field(ge=1)
    row_tokens: int = Field(ge=8)
    micro_batches: int = Field(1, ge=1)
    log_every: int = Field(10, ge=1)
    mtp_weight: Annotated[float, Field(ge=0)] | list[WeightChange] = _mtp_weight()
    balance: BalanceSection = BalanceSection()
    optimizer: OptimizerSection

    @model_validator(mode="after")
    def _divisible(self) -> PretrainStage:
        if isinstance(self.mtp_weight, list):
            _check_changes("mtp_weight", self.mtp_weight)
        if self.rows_per_step % self.micro_batches:
            raise ValueError(
                f"rows_per_step = {self.rows_per_step} is not a multiple of "
                f"micro_batches = {self.micro_batches}"
            )
        return self
