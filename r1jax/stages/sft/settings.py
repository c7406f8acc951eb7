"""Settings of supervised fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1jax.settings.optimizer import BalanceSection, WeightChange, _mtp_weight
from r1jax.settings.stage import EpochStage, _check_changes


class SFTStage(EpochStage):
    """Supervised fine-tuning on conversations: the assistant's part is trained, in packed rows.

    `rows_per_step` counts packed rows, each of several conversations.
    """

    kind: Literal["sft"] = "sft"
    row_tokens: int = Field(ge=8)
    mtp_weight: Annotated[float, Field(ge=0)] | list[WeightChange] = _mtp_weight()
    balance: BalanceSection = BalanceSection()

    @model_validator(mode="after")
    def _changes(self) -> SFTStage:
        if isinstance(self.mtp_weight, list):
            _check_changes("mtp_weight", self.mtp_weight)
        return self
