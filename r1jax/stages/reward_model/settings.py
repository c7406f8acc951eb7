"""Settings of reward model training."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from r1jax.settings.stage import Divided, EpochStage, RewardModelFormat, StageDescription


class RewardModelStage(EpochStage):
    """Train a reward model: the policy's architecture with a scalar head, on preferences.

    `data` has rows of prompt, chosen, rejected, or of prompt, response, safe; `rows_per_step`
    counts pairs, or labelled responses.
    """

    FUNCTIONS: ClassVar[str] = "r1jax.stages.reward_model.stage"
    DESCRIPTION: ClassVar[StageDescription] = StageDescription(
        title="reward model",
        leaves="reward_model",
        loss_note="Negative log-likelihood of the labels, nats.",
        leading_panels=("loss", "preferences"),
        less_memory="more micro_batches",
    )

    kind: str = "reward_model"
    loss: Literal["pairwise", "pointwise"] = Field(
        description="pairwise (helpful) or pointwise (safety)."
    )
    reads: Literal["summary", "response"] = Field(
        description="summary: what follows the thought (helpful); response: all (safety)."
    )
    rows_per_step: int = Field(256, ge=1)
    max_tokens: int = Field(8192, ge=2, description="Longer rows are left out and counted.")
    length_bucket: int = Field(128, ge=1, description="Rows are padded to a multiple of this.")

    def example_datasets(self) -> list[str]:
        return []  # its rows are preferences

    def reward_model_format(self) -> RewardModelFormat:
        labelled = self.loss == "pointwise"
        return RewardModelFormat(self.data, labelled, self.reads, self.max_tokens)

    def divided(self) -> list[Divided]:
        return [*super().divided(), Divided(".length_bucket", self.length_bucket, "time")]
