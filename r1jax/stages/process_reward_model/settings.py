"""Settings of process reward model training."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from r1jax.settings.stage import (
    DatasetRows,
    Divided,
    EpochStage,
    RewardModelFormat,
    StageDescription,
)
from r1jax.settings.steps import SolutionScore, StepRule, StepScoring

NEUTRAL_LABELS = {"right": 1.0, "wrong": 0.0, "unlabelled": None}


class ProcessRewardModelStage(EpochStage):
    """Train a process reward model: it gives the probability that a step is right at its end.

    `data` has rows of prompt, completions (steps) and labels, or PRM800K's; `rows_per_step` counts
    solutions.
    """

    FUNCTIONS: ClassVar[str] = "r1jax.stages.process_reward_model.stage"
    DESCRIPTION: ClassVar[StageDescription] = StageDescription(
        title="process reward model",
        leaves="reward_model",
        reward_head="token_labels",
        loss_note="Cross-entropy of the labels of steps, nats per step.",
        leading_panels=("loss", "steps"),
        less_memory="more micro_batches",
    )

    kind: str = "process_reward_model"
    step_rule: StepRule = Field(StepRule(), description="Where the steps of a solution end.")
    solution_score: SolutionScore = Field(
        "minimum",
        description="As a reward, the score of a solution: minimum, product or last of its steps'.",
    )
    neutral: Literal["right", "wrong", "unlabelled"] = Field(
        "right", description="What PRM800K's rating 0 is; unlabelled: it is not learnt from."
    )
    rows_per_step: int = Field(256, ge=1)
    max_tokens: int = Field(8192, ge=2, description="Longer rows are left out and counted.")
    length_bucket: int = Field(128, ge=1, description="Rows are padded to a multiple of this.")

    def example_datasets(self) -> list[str]:
        return []  # its rows are labelled solutions

    def dataset_rows_read(self) -> DatasetRows:
        return "step_labels"

    def reward_model_format(self) -> RewardModelFormat:
        scoring = StepScoring(self.step_rule, self.solution_score)
        return RewardModelFormat(self.data, True, "response", self.max_tokens, scoring)

    def divided(self) -> list[Divided]:
        return [*super().divided(), Divided(".length_bucket", self.length_bucket, "time")]
