"""Settings of supervised fine-tuning."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from r1jax.settings.optimizer import BalanceSection, WeightChange, mtp_weight_field
from r1jax.settings.stage import Divided, EpochStage, StageDescription, check_changes


class SFTStage(EpochStage):
    """Supervised fine-tuning on conversations: the assistant's part is trained, in packed rows.

    `rows_per_step` counts packed rows, each of several conversations.
    """

    FUNCTIONS: ClassVar[str] = "r1jax.stages.sft.stage"
    DESCRIPTION: ClassVar[StageDescription] = StageDescription(
        title="supervised fine-tuning",
        leaves="weights",
        loss_note="Cross-entropy of the assistant's tokens, nats.",
        less_memory="more micro_batches",
    )

    kind: str = "sft"
    row_tokens: int = Field(ge=8)
    mtp_weight: Annotated[float, Field(ge=0)] | list[WeightChange] = mtp_weight_field()
    balance: BalanceSection = BalanceSection()

    @model_validator(mode="after")
    def _changes(self) -> SFTStage:
        if isinstance(self.mtp_weight, list):
            check_changes("mtp_weight", self.mtp_weight)
        return self

    def divided(self) -> list[Divided]:
        return [*super().divided(), Divided(".row_tokens", self.row_tokens, "time")]

    def prediction_module_uses(self) -> list[tuple[str, str]]:
        return [("mtp_weight", self.name)] if self.mtp_weight else []
