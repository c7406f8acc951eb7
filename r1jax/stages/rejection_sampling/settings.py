"""Settings of rejection sampling."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from r1jax.files import JsonObject
from r1jax.settings.rewriting import ModelRewrite, Rewrite
from r1jax.settings.sampling import DatasetSampling, PlannedLengths, SamplingSection
from r1jax.settings.search import DatasetSearch, Search, search_of_each
from r1jax.settings.stage import (
    Divided,
    RewardSelection,
    Stage,
    StageDescription,
    WeightsUse,
)


class RejectionSamplingStage(Stage):
    """Sample, keep what is right and readable, and write it as a dataset (`source: stage:NAME`)."""

    FUNCTIONS: ClassVar[str] = "r1jax.stages.rejection_sampling.stage"
    DESCRIPTION: ClassVar[StageDescription] = StageDescription(
        title="rejection sampling",
        leaves="dataset",
        dataset_columns=(
            *("prompt", "response", "answer", "domain", "tokens", "reward", "provenance"),
        ),
        less_memory="a smaller prompts_per_batch",
    )

    kind: str = "rejection_sampling"
    data: str = Field(description="The dataset whose prompts are sampled, a name in data.")
    prompts: int | None = Field(None, ge=1, description="Default: the whole dataset.")
    samples_per_prompt: int = Field(
        16,
        ge=1,
        description="Completions of each prompt; with search, of the solutions that a search has "
        "completed, at most so many, the best first.",
    )
    prompts_per_batch: int = Field(
        32, ge=1, description="Prompts that are sampled at once, over all processes."
    )
    max_new_tokens: int = Field(1024, ge=1, description="Tokens of a completion at most.")
    sampling: SamplingSection = SamplingSection.model_construct()
    search: Search | None = Field(
        None, description="Search the steps of solutions, in place of sampling them at once."
    )
    lengths: PlannedLengths = None
    rewards: list[str] | None = Field(
        None, min_length=1, description="What decides whether it is right; default: all."
    )
    keep_per_prompt: int = Field(1, ge=1, description="At most so many completions of a prompt.")
    filters: dict[str, JsonObject] = Field(
        default_factory=dict, description="Text filters by name, each with its options."
    )
    decontaminate: list[str] = Field(
        default_factory=list, description="Datasets whose questions must not be in the result."
    )
    rewrite: Rewrite | None = Field(
        None, description="What turns a kept completion into the text to train on (cold start)."
    )

    @property
    def model_rewrite(self) -> ModelRewrite | None:
        """The rewriting by a model of this run, where that is what is asked for."""
        return self.rewrite if isinstance(self.rewrite, ModelRewrite) else None

    def dataset_sampling(self) -> DatasetSampling:
        return DatasetSampling(
            self.data,
            self.prompts,
            self.samples_per_prompt,
            self.samples_per_prompt,
            self.prompts_per_batch,
            self.max_new_tokens,
            self.sampling,
            self.lengths,
        )

    def dataset_search(self) -> DatasetSearch | None:
        return search_of_each(self.dataset_sampling(), self.search, self.samples_per_prompt)

    def datasets(self) -> list[tuple[str, str]]:
        return [("data", self.data), *(("decontaminate", data) for data in self.decontaminate)]

    def prompt_datasets(self) -> list[str]:
        return [self.data]

    def longest_sample(self) -> int:
        return self.max_new_tokens

    def reward_selection(self) -> RewardSelection:
        return self.rewards

    def other_weights(self) -> list[WeightsUse]:
        uses, rewrite = super().other_weights(), self.model_rewrite
        if rewrite is not None:
            uses.append(WeightsUse("rewrite.weights", rewrite.weights, "rewriter"))
        return uses

    def prediction_module_uses(self) -> list[tuple[str, str]]:
        uses = [("sampling.speculative", self.name)] if self.sampling.speculative else []
        if self.model_rewrite is not None and self.model_rewrite.sampling.speculative:
            uses.append(("rewrite.sampling.speculative", self.model_rewrite.weights))
        return uses

    def divided(self) -> list[Divided]:
        numbers = [Divided(".prompts_per_batch", self.prompts_per_batch, "processes")]
        if self.model_rewrite is not None:
            drafts = self.model_rewrite.drafts_per_batch
            numbers.append(Divided(".rewrite.drafts_per_batch", drafts, "processes"))
        return numbers
