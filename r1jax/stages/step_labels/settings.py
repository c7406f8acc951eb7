"""Settings of labelling steps by rollouts."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from r1jax.settings.sampling import DatasetSampling, PlannedLengths, SamplingSection
from r1jax.settings.search import DatasetSearch, Search, search_of_each
from r1jax.settings.stage import Divided, RewardSelection, Stage, StageDescription
from r1jax.settings.steps import StepRule

_ALL = 1_000_000  # solutions of a search, all of which are scored


class StepLabelsStage(Stage):
    """Label the steps of solutions by how their continuations come out, and write them as a dataset
    (`source: stage:NAME`) for process_reward_model stages."""

    FUNCTIONS: ClassVar[str] = "r1jax.stages.step_labels.stage"
    DESCRIPTION: ClassVar[StageDescription] = StageDescription(
        title="step labels",
        leaves="dataset",
        dataset_rows="step_labels",
        dataset_columns=(
            *("prompt", "completions", "labels", "response", "answer", "domain", "tokens"),
            *("outcome", "right", "scored", "provenance"),
        ),
        less_memory="a smaller prompts_per_batch or beginnings_per_batch",
    )

    kind: str = "step_labels"
    data: str = Field(description="The dataset whose prompts are used, a name in data.")
    prompts: int | None = Field(None, ge=1, description="Default: the whole dataset.")
    solutions: Literal["sampled", "given"] = Field(
        "sampled",
        description="sampled: by the stage's weights; given: the responses of data, one a row.",
    )
    solutions_per_prompt: int = Field(
        4,
        ge=1,
        description="Solutions that are sampled; with search, at most so many of those that it has "
        "completed are labelled, the best first.",
    )
    step_rule: StepRule = Field(StepRule(), description="Where the steps of a solution end.")
    continuations: int = Field(
        8, ge=1, description="Samples that go on behind each step but the last."
    )
    label: Literal["soft", "hard"] = Field(
        "soft",
        description="Of a step, the share of its continuations that come out right, or whether any "
        "does.",
    )
    prompts_per_batch: int = Field(
        32, ge=1, description="Prompts whose solutions are sampled at once, over all processes."
    )
    beginnings_per_batch: int = Field(
        32, ge=1, description="Beginnings of solutions that are continued at once, likewise."
    )
    max_new_tokens: int = Field(
        1024, ge=1, description="Tokens at most: of a solution, and of a continuation."
    )
    sampling: SamplingSection = SamplingSection.model_construct()
    search: Search | None = Field(
        None,
        description="Search each prompt once: the label of a step is then that of the solutions "
        "that the search has completed behind it, and nothing else is sampled.",
    )
    lengths: PlannedLengths = None
    rewards: list[str] | None = Field(
        None, min_length=1, description="What decides whether an answer is right; default: all."
    )

    @model_validator(mode="after")
    def _searches_what_it_samples(self) -> StepLabelsStage:
        if self.search is not None and self.solutions == "given":
            raise ValueError("solutions = 'given' with search, which makes its own; remove one")
        return self

    def dataset_search(self) -> DatasetSearch | None:
        return search_of_each(self.dataset_sampling(), self.search, _ALL)

    def dataset_sampling(self) -> DatasetSampling:
        """The sampling of solutions."""
        return DatasetSampling(
            self.data,
            self.prompts,
            self.solutions_per_prompt,
            self.solutions_per_prompt,
            self.prompts_per_batch,
            self.max_new_tokens,
            self.sampling,
            self.lengths,
        )

    def datasets(self) -> list[tuple[str, str]]:
        return [("data", self.data)]

    def prompt_datasets(self) -> list[str]:
        return [self.data]

    def longest_sample(self) -> int:
        # A continuation follows a solution's beginning.
        return self.max_new_tokens * (2 if self.search is None else 1)

    def reward_selection(self) -> RewardSelection:
        return self.rewards

    def prediction_module_uses(self) -> list[tuple[str, str]]:
        return [("sampling.speculative", self.name)] if self.sampling.speculative else []

    def divided(self) -> list[Divided]:
        return [
            Divided(".prompts_per_batch", self.prompts_per_batch, "processes"),
            Divided(".beginnings_per_batch", self.beginnings_per_batch, "processes"),
        ]
