"""What the settings of every stage have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from r1jax.files import JsonObject
from r1jax.settings.optimizer import OptimizerSection
from r1jax.settings.rewards import RewardSection
from r1jax.settings.search import DatasetSearch, critic_of_search
from r1jax.settings.section import Section
from r1jax.settings.steps import StepScoring


class LengthChange(Section):
    """From optimizer step `step` on, completions may have `tokens` tokens."""

    step: int = Field(ge=0, description="The first one with this limit.")
    tokens: int = Field(ge=1, description="Of a completion, at most.")


class DataChange(Section):
    """From optimizer step `step` on, questions come from the dataset `data`."""

    step: int = Field(ge=0, description="The first one with this dataset.")
    data: str = Field(description="A name in data.")


Leaves = Literal["weights", "reward_model", "dataset", "evaluation"]
RewardHead = Literal["scalar", "token_labels"]
"""What a reward model gives: one number for a text, or labels of each token."""
DatasetRows = Literal["responses", "step_labels"]
"""Rows of a dataset that a stage writes: prompts with responses, or solutions whose steps are
labelled."""
RewardSelection = list[str] | dict[str, RewardSection] | None
"""Names of the config's rewards, rewards of the stage alone, or None for all of the config."""


@dataclass(frozen=True)
class StageDescription:
    """What others need to know of a kind of stage, so that none of them knows it by name.

    title: the kind in words. leaves: its result; the first two are train loops with checkpoints.
    makes_base: its weights are the base model that later stages are compared with.
    loss_note: what the report says below the curve of the loss.
    leading_panels: the report's panels to draw first: `loss`, `reward`, `preferences`, or a metric.
    shows_samples: samples.jsonl holds samples of training, which the report shows by step.
    less_memory: which settings to lower, for the planner's advice.
    reward_head: of a reward model. dataset_rows: of a dataset.
    dataset_columns: those that all of its rows have; () where they are not known before.
    """

    title: str
    leaves: Leaves
    makes_base: bool = False
    loss_note: str = ""
    leading_panels: tuple[str, ...] = ("loss",)
    shows_samples: bool = False
    less_memory: str = "smaller batches"
    reward_head: RewardHead = "scalar"
    dataset_rows: DatasetRows = "responses"
    dataset_columns: tuple[str, ...] = ()

    @property
    def head(self) -> RewardHead | None:
        """What the stage's model has in place of the next token, of a reward model."""
        return self.reward_head if self.leaves == "reward_model" else None

    @property
    def trains(self) -> bool:
        return self.leaves in ("weights", "reward_model")


DividedBy = Literal["batch", "time", "rollout_batch", "processes"]


@dataclass(frozen=True)
class Divided:
    """A number of a stage that the mesh must divide.

    key: behind `stages.NAME`, as in `.row_tokens`, or `: rows x samples`.
    by: axis of a training row, the batch axis while sampling, or processes, which share prompts.
    divisor: the setting by which the value was divided, and what it is; such as micro_batches.
    factors: settings whose product is the value (times the divisor), and what they are.
    """

    key: str
    value: int
    by: DividedBy
    divisor: tuple[str, int] | None = None
    factors: tuple[tuple[str, int], ...] = ()

    def remedy(self, parts: int) -> str:
        """A setting with which `parts` divide the number; "" where none is known."""
        name, divisor = self.divisor or ("", 1)
        whole = self.value * divisor
        fit = [n for n in range(1, divisor) if whole % n == 0 and whole // n % parts == 0]
        if fit:
            return f"{name}={fit[-1]}"
        factors = self.factors
        if not factors and self.divisor is None and self.key[:1] == ".":
            factors = ((self.key[1:], self.value),)
        return larger_factor(factors, parts * divisor) if factors else ""


@dataclass(frozen=True)
class WeightsUse:
    """Weights that a stage reads beside those that it starts from: the setting that names them, and
    what they are to the stage.

    rewards: they may be those of a reward model of whole texts, too.
    """

    key: str
    source: str
    gives: str
    rewards: bool = False


TEACHER = "teacher"
"""`WeightsUse.gives` of a model whose distribution is learned: a train loop loads its weights."""
REFERENCE = "reference policy"
"""`WeightsUse.gives` of the reference policy's first weights, of the stage's model."""


@dataclass(frozen=True)
class RewardModelFormat:
    """What the reward model that a stage leaves was trained on, and reads.

    data: the dataset whose template renders a prompt with its response. labelled: its rows say
    whether a response is safe, and the reward is the probability of that; else they are pairs, and
    it is the model's output. reads: of a response. max_tokens: of a text to train on. steps: how a
    process reward model, which reads all of it, scores a solution; None: it is none.
    """

    data: str
    labelled: bool
    reads: Literal["summary", "response"]
    max_tokens: int
    steps: StepScoring | None = None


class Stage(Section):
    """Settings of one stage of a run. A kind of stage is a subclass with its functions.

    `FUNCTIONS` is the module with the kind's `check`, `programs` and `run` (see `r1jax.stages`);
    empty for the module that defines the class. The built-in kinds keep them apart so that reading
    a config imports no JAX. A kind overrides those methods below where it has something to say.
    """

    FUNCTIONS: ClassVar[str] = ""
    DESCRIPTION: ClassVar[StageDescription]

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_\-]*$", description="By which others refer to this stage."
    )
    weights: str | None = Field(
        None,
        description="Where the stage's weights come from: an earlier train stage, `model`, or a "
        "name in `models`; default: the train stage before it, or `model`.",
    )
    kind: str = Field(
        description="pretrain, sft, grpo, rejection_sampling, reward_model, step_labels, "
        "process_reward_model or evaluate; or one of yours, package.module:Class."
    )

    def datasets(self) -> list[tuple[str, str]]:
        """(key, dataset) of all datasets that the stage reads."""
        return []

    def example_datasets(self) -> list[str]:
        """The datasets that are read as examples, which must be there and not empty."""
        return [data for _, data in self.datasets()]

    def dataset_rows_read(self) -> DatasetRows:
        """The rows of datasets that the stage reads, where another stage of the run writes them."""
        return "responses"

    def prompt_datasets(self) -> list[str]:
        """The datasets whose prompts are sampled."""
        return []

    def dataset_search(self) -> DatasetSearch | None:
        """The searches of the stage; None: it samples solutions at once, or none at all."""
        return None

    def reward_selection(self) -> RewardSelection:
        """The rewards that score the stage's samples."""
        return []

    def longest_sample(self) -> int:
        """Tokens that a completion of the stage may have at any time; 0: it samples none."""
        return 0

    def needs_reward(self) -> bool:
        """Whether it would train on nothing if all of its rewards had weight 0."""
        return self.DESCRIPTION.trains

    def other_weights(self) -> list[WeightsUse]:
        """Weights that are read beside those that the stage starts from."""
        wanted = self.dataset_search()
        source = None if wanted is None else critic_of_search(wanted.search)
        return [] if source is None else [WeightsUse("search.valued_by", source, "critic")]

    def may_leave_critic(self) -> bool:
        """Whether a critic may be left beside the weights."""
        return False

    def prediction_module_uses(self) -> list[tuple[str, str]]:
        """(key, stage or model) of settings that need the module for multi-token prediction."""
        return []

    def divided(self) -> list[Divided]:
        """Numbers that the mesh must divide."""
        return []

    def samples_ahead(self) -> bool | None:
        """Whether it samples its next phase before it trains on one; None: it has no phases."""
        return None

    def planned_steps(self) -> int | None:
        """Optimizer steps; None where there are none, or the data must be counted first."""
        return None

    def reward_model_format(self) -> RewardModelFormat | None:
        """How the reward model that the stage leaves reads texts; None: it leaves none."""
        return None

    def planning_key(self, reward_models: Sequence[str]) -> str | None:
        """Stages with the same key compile the same programs; None: this one has its own."""
        return None

    @classmethod
    def fill_in(cls, stage: JsonObject, data: JsonObject) -> dict[str, str]:
        """Put what a setting implies into a stage and the config's `data`, as read from YAML.

        Returns key -> problem, for values that are wrong.
        """
        return {}


class TrainStage(Stage):
    """What every train loop has: checkpoints, and a limit to updates that were skipped."""

    FREE: ClassVar[frozenset[str]] = frozenset(
        (
            *("checkpoint_every", "keep_checkpoints", "max_bad_steps", "log_every"),
            *("samples_every", "lengths"),
        )
    )

    checkpoint_every: int = Field(
        100, ge=1, description="Optimizer steps between two checkpoints; there is one at the end."
    )
    keep_checkpoints: int = Field(2, ge=1, description="The newest ones that are kept.")
    max_bad_steps: int = Field(5, ge=1, description="Non-finite updates in a row before stopping.")


EXTENDABLE = ("steps", "epochs")
"""How long a train stage is: more may follow where the learning rate does not depend on it."""


def larger_factor(factors: Sequence[tuple[str, int]], divisor: int) -> str:
    """The first of several settings with the next value at which `divisor` divides the product."""
    (name, value), *others = factors
    step = divisor // math.gcd(divisor, math.prod(other for _, other in others))
    return f"{name}={max(1, -(-value // step)) * step}"


def check_multiple(
    name: str,
    value: int,
    of: str,
    divisor: int,
    why: str = "",
    *,
    factors: Sequence[tuple[str, int]] = (),
) -> None:
    """Raises ValueError, with the names of both and a value that works, unless `value` is a
    multiple of `divisor`.

    factors: the settings, and what they are, whose product is the value; default: it is one.
    """
    if value % divisor:
        fit = max(n for n in range(1, min(value, divisor) + 1) if value % n == 0)
        raised = larger_factor(factors or [(name, value)], divisor)
        raise ValueError(
            f"{name} = {value} is not a multiple of {of} = {divisor}{why}; change one of the two, "
            f"such as {of}={fit} or {raised}"
        )


def divided_rows(rows_per_step: int, micro_batches: int) -> Divided:
    """The rows of a micro-batch, which the mesh must divide."""
    divisor = ("micro_batches", micro_batches)
    key, rows = ".rows_per_step / micro_batches", ("rows_per_step", rows_per_step)
    return Divided(key, rows_per_step // micro_batches, "batch", divisor, (rows,))


class EpochStage(TrainStage):
    """A train loop that goes through a dataset, for a number of epochs or steps."""

    data: str = Field(description="The dataset to learn from, a name in data.")
    epochs: float | None = Field(None, gt=0, description="Passes over the data; or give steps.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps; or give epochs.")
    rows_per_step: int = Field(ge=1, description="Rows of one update, over all devices.")
    micro_batches: int = Field(
        1, ge=1, description="Parts that an update's rows are computed in; more take less memory."
    )
    log_every: int = Field(10, ge=1, description="Steps between two lines of metrics.")
    held_out: str | None = Field(None, description="A dataset whose loss is measured.")
    held_out_every: int = Field(100, ge=1, description="Steps between two held-out losses.")
    optimizer: OptimizerSection

    @model_validator(mode="after")
    def _consistent(self) -> EpochStage:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        check_multiple("rows_per_step", self.rows_per_step, "micro_batches", self.micro_batches)
        return self

    def datasets(self) -> list[tuple[str, str]]:
        held_out = [] if self.held_out is None else [("held_out", self.held_out)]
        return [("data", self.data), *held_out]

    def divided(self) -> list[Divided]:
        return [divided_rows(self.rows_per_step, self.micro_batches)]

    def planned_steps(self) -> int | None:
        return self.steps

    def steps_for(self, rows_per_epoch: int) -> int:
        """The number of steps, given the rows of an epoch."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return math.ceil(self.epochs * rows_per_epoch / self.rows_per_step)
