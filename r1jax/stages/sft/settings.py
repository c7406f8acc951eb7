"""Settings of supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from r1jax.settings.distillation import LogitDistillation
from r1jax.settings.optimizer import BalanceSection, MTPWeight
from r1jax.settings.stage import Divided, EpochStage, StageDescription, WeightsUse


class SFTStage(EpochStage):
    """Supervised fine-tuning on conversations: the assistant's part is trained, in packed rows.

    `rows_per_step` counts packed rows, each of several conversations.
    """

    FUNCTIONS: ClassVar[str] = "r1jax.stages.supervised"
    DESCRIPTION: ClassVar[StageDescription] = StageDescription(
        title="supervised fine-tuning",
        leaves="weights",
        loss_note="Cross-entropy of the assistant's tokens, nats.",
        less_memory="more micro_batches",
    )

    kind: str = "sft"
    row_tokens: int = Field(
        ge=8, description="Tokens of a row, which conversations are packed into."
    )
    mtp_weight: MTPWeight = 0.0
    balance: BalanceSection = BalanceSection.model_construct()
    distillation: LogitDistillation | None = Field(
        None,
        description="Learn a teacher's distribution at the assistant's tokens, alone or beside "
        "their cross-entropy, which stays the metric `loss`.",
    )

    @model_validator(mode="after")
    def _one_target(self) -> SFTStage:
        if self.distillation is not None and self.mtp_weight:
            raise ValueError(
                "mtp_weight with distillation: the module for multi-token prediction has no "
                "teacher; leave one of them out"
            )
        return self

    def other_weights(self) -> list[WeightsUse]:
        return [] if self.distillation is None else [self.distillation.weights_use()]

    def divided(self) -> list[Divided]:
        return [*super().divided(), Divided(".row_tokens", self.row_tokens, "time")]

    def prediction_module_uses(self) -> list[tuple[str, str]]:
        return [("mtp_weight", self.name)] if self.mtp_weight else []
