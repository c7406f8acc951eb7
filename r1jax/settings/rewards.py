"""Settings of rewards, and of the worker processes that compute them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from r1jax.files import JsonObject
from r1jax.settings.section import Section
from r1jax.settings.steps import SolutionScore, StepRule


class RewardSection(Section):
    """One term of the reward, under a name of its own: the sum of weight x value."""

    weight: float = Field(1.0, description="Of this term in the sum.")
    function: str | None = Field(
        None,
        description="Registered name, package.module:function or, beside the config, "
        "file.py:function; default: the section's name.",
    )
    model: str | None = Field(
        None,
        description="In place of a function, a reward model: a reward_model or "
        "process_reward_model stage of this run, or a Hugging Face directory, of a sequence "
        "classification or, with step_rule, of a token classification with two labels.",
    )
    reads: Literal["summary", "response"] | None = Field(
        None, description="What a model from a directory reads; a stage's is known."
    )
    template: str | None = Field(
        None, description="The template of a model from a directory; a stage's is known."
    )
    step_rule: StepRule | None = Field(
        None,
        description="How a process reward model from a directory finds the steps of a "
        "solution, each of which it scores; a stage's is known.",
    )
    solution_score: SolutionScore | None = Field(
        None,
        description="Of a process reward model: minimum, product or last of the steps' scores; "
        "default: the stage's, or minimum.",
    )
    per_step: bool = Field(
        False,
        description="Of a process reward model, in RL: the score of each step is the reward of its "
        "tokens, in place of the solution's score.",
    )
    domains: list[str] | None = Field(
        None, min_length=1, description="Rows of these domains only; default: all rows."
    )
    options: JsonObject = Field(
        default_factory=dict, description="What the function gets as its options."
    )

    @model_validator(mode="after")
    def _function_or_model(self) -> RewardSection:
        if self.model is not None and (self.function is not None or self.options):
            raise ValueError("a reward model has neither function nor options; remove them")
        if self.model is None and (self.reads is not None or self.template is not None):
            raise ValueError("reads and template belong to a reward model; give model, too")
        if self.model is None and (self.step_rule is not None or self.solution_score is not None):
            raise ValueError(
                "step_rule and solution_score belong to a process reward model; give model, too"
            )
        if self.per_step and (self.model is None or self.reads is not None):
            raise ValueError("per_step belongs to a process reward model; give model and step_rule")
        if self.reads is not None and (self.step_rule or self.solution_score):
            raise ValueError(
                "a process reward model reads whole responses: remove reads, or step_rule and "
                "solution_score"
            )
        return self


class VerifierSection(Section):
    """The worker processes in which rule rewards run."""

    workers: int = Field(1, ge=1, description="Processes on each host.")
    deadline_seconds: float = Field(5.0, gt=0, description="For one reward of one sample.")
    memory_mb: int = Field(2048, ge=64, description="That one worker may use.")
    tasks_per_worker: int = Field(
        10_000, ge=1, description="A worker is replaced by a new one after this many rows."
    )
    max_unreadable_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Of a dataset's rows, how many may have a reference answer that their reward "
        "cannot read, or a blank prompt, or lack a column that it needs; more refuse the run.",
    )
