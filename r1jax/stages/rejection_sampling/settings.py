"""Settings of rejection sampling."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from r1jax.files import JsonObject
from r1jax.settings.sampling import DatasetSampling, SamplingSection
from r1jax.settings.section import Section
from r1jax.settings.stage import (
    Divided,
    RewardSelection,
    Stage,
    StageDescription,
    WeightsUse,
)


class RuleRewrite(Section):
    """Rewriting by rule: thought and answer put into a template (`r1jax.data.rewriting`)."""

    kind: Literal["rule"] = "rule"
    template: str = "<think>{thought}</think>\n\n{summary}"
    summary: str = r"The final answer is \boxed{{answer}}."
    program_summary: str = Field(
        "```\n{program}```", description="The summary where the answer is a program."
    )
    replacements: dict[str, str] = Field(
        default_factory=dict, description="Words of the thought -> what to say instead."
    )
    style: Literal["think", "tags", "boxed"] = Field("think", description="Shape of the result.")


class EndpointRewrite(Section):
    """Rewriting by a model behind an OpenAI-compatible server."""

    kind: Literal["endpoint"] = "endpoint"
    url: str = Field(description="Up to the version, such as http://localhost:8000/v1.")
    model: str = Field(description="Its name on the server.")
    instruction: str | None = Field(None, description="What to do; default: the built-in one.")
    max_new_tokens: int = Field(8192, ge=1)
    temperature: float = Field(0.6, ge=0, le=2)
    api_key_env: str = "OPENAI_API_KEY"
    retries: int = Field(6, ge=0)
    timeout_seconds: float = Field(600.0, gt=0)
    concurrency: int = Field(8, ge=1)
    style: Literal["think", "tags", "boxed"] = "think"


class ModelRewrite(Section):
    """Rewriting by a model of this run: an earlier train stage, or a name in `models`."""

    kind: Literal["model"] = "model"
    weights: str
    instruction: str | None = Field(None, description="What to do; default: the built-in one.")
    template: Literal["chat", "r1_zero", "plain"] = "chat"
    max_new_tokens: int = Field(8192, ge=1)
    drafts_per_batch: int = Field(32, ge=1)
    sampling: SamplingSection = SamplingSection(temperature=0.6)
    style: Literal["think", "tags", "boxed"] = "think"


Rewrite = Annotated[RuleRewrite | EndpointRewrite | ModelRewrite, Field(discriminator="kind")]


class RejectionSamplingStage(Stage):
    """Sample, keep what is right and readable, and write it as a dataset (`source: stage:NAME`)."""

    FUNCTIONS: ClassVar[str] = "r1jax.stages.rejection_sampling.stage"
    DESCRIPTION: ClassVar[StageDescription] = StageDescription(
        title="rejection sampling",
        leaves="dataset",
        less_memory="a smaller prompts_per_batch",
    )

    kind: str = "rejection_sampling"
    data: str
    prompts: int | None = Field(None, ge=1, description="Default: the whole dataset.")
    samples_per_prompt: int = Field(16, ge=1)
    prompts_per_batch: int = Field(32, ge=1)
    max_new_tokens: int = Field(1024, ge=1)
    sampling: SamplingSection = SamplingSection()
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
        )

    def datasets(self) -> list[tuple[str, str]]:
        return [("data", self.data), *(("decontaminate", data) for data in self.decontaminate)]

    def prompt_datasets(self) -> list[str]:
        return [self.data]

    def reward_selection(self) -> RewardSelection:
        return self.rewards

    def other_weights(self) -> list[WeightsUse]:
        rewrite = self.model_rewrite
        return (
            [] if rewrite is None else [WeightsUse("rewrite.weights", rewrite.weights, "rewriter")]
        )

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
