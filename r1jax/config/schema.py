"""What a run is: one frozen, typed, validated tree read from one YAML file.

Every class refuses unknown keys. Cross-field rules are checked here, before any compute; checks
that need the model or the data (is the vocabulary large enough, does the file exist) happen when
the run is resolved, still before any compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from r1jax.grpo.losses import GRPOConfig


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def check_axes(axes: dict[str, int], field: str) -> None:
    """Raises ValueError for sizes that no mesh has."""
    if not axes:
        raise ValueError(f"{field}: a mesh has at least one axis, such as fsdp: -1")
    if sum(size == -1 for size in axes.values()) > 1:
        raise ValueError(f"{field}: at most one axis may be -1")
    for name, size in axes.items():
        if size != -1 and size < 1:
            raise ValueError(f"{field}.{name} = {size}: a size is at least 1, or -1")


class ModelSection(Section):
    """Which policy. Either `path` (weights exist) or `config` (from scratch), never both."""

    path: str | None = Field(None, description="Hugging Face directory, gs://... or hub name.")
    config: dict[str, Any] | None = Field(
        None, description="A Hugging Face `config.json` as a mapping: random initial weights."
    )
    tokenizer: str | None = Field(
        None,
        description="Directory or hub name, or `characters:NAME` for the alphabet of a task; "
        "default: the model's path.",
    )
    multi_token_prediction: bool = Field(
        False,
        description="Have the module that predicts the token after the next (DeepSeek-V3's MTP, "
        "num_nextn_predict_layers = 1), for mtp_weight and sampling.speculative. Most runs do "
        "without: its layer is then neither loaded nor exported, and takes no memory.",
    )
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["auto", "xla", "splash", "flash"] = "auto"
    remat: Literal["none", "dots", "full"] = "full"
    scan_layers: bool | Literal["auto"] = "auto"
    log_prob_chunk: int = Field(256, ge=1, description="Time steps whose logits exist at once.")
    expert_chunk: int = Field(
        4096, ge=1, description="Tokens that a device sends to their experts at once."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of model.path and model.config")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("model.config needs model.tokenizer (a directory or characters:NAME)")
        return self


Axes = dict[str, int]
Rules = dict[str, str | list[str] | None]


class RolloutMesh(Section):
    """How the devices of a mesh are arranged while completions are sampled."""

    axes: Axes
    rules: Rules = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sizes(self) -> RolloutMesh:
        check_axes(self.axes, "axes")
        return self


class MeshSection(Section):
    """Named axes with sizes (one may be -1) and overrides of the logical-axis rules.

    In a config a name may stand for it: `mesh: fsdp` is configs/mesh/fsdp.yaml.
    """

    axes: Axes = Field(default_factory=lambda: {"data": 1, "fsdp": -1, "tensor": 1})
    rules: Rules = Field(
        default_factory=dict, description="logical axis -> mesh axis, several, or null."
    )
    rollout: RolloutMesh | None = Field(
        None, description="Another arrangement of the same devices, to sample with."
    )
    cpu_devices: Annotated[int, Field(ge=1)] | Literal["cores"] = Field(
        1, description="Devices that a CPU counts as; `cores`: one per core (a power of two)."
    )

    @model_validator(mode="after")
    def _sizes(self) -> MeshSection:
        check_axes(self.axes, "mesh.axes")
        return self


class DataSection(Section):
    """One named dataset, mapped to `r1jax.data.Example`: a source, or a mixture of others."""

    source: str | None = Field(
        None,
        description="tfds:NAME, jsonl:PATH, hf:NAME, task:NAME, or stage:NAME for the dataset that "
        "a rejection_sampling stage of this run wrote.",
    )
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="dataset -> share, in place of a source. No row is used twice: the part that "
        "runs out first limits the others.",
    )
    benchmark: str | None = Field(
        None,
        description="A name in r1jax.config.benchmarks, which gives what is not set here; with a "
        "source of your own it gives neither split nor options.",
    )
    domain: str = Field(
        "", description="Label of the rows, which rewards may be limited to; default: the row's."
    )
    split: str = Field("train", description="`train` or `held_out`; or the source's own split.")
    fields: dict[str, str] = Field(
        default_factory=dict, description="Example field (prompt, answer, text) -> source column."
    )
    answer_pattern: str | None = Field(
        None, description="Regular expression; group 1 of its last match is the answer."
    )
    wrong_answers: list[str] = Field(
        default_factory=list,
        description="Columns of wrong options: the prompt gets lettered options in an order that "
        "depends on their texts alone, and the answer is the right one's letter.",
    )
    row_format: Literal["livecodebench"] | None = Field(
        None,
        description="livecodebench: prompt and answer (hidden tests) are made of that dataset's "
        "columns; see r1jax.data.livecodebench.",
    )
    template: str = Field(
        "chat", description="chat (the tokenizer's), r1_zero (the paper's), or plain."
    )
    system_prompt: str | None = None
    prompt_suffix: str = ""
    max_prompt_tokens: int = Field(1024, ge=1)
    held_out_fraction: float = Field(
        0.0, ge=0.0, lt=1.0, description="jsonl/hf/tfds: share of rows, by a hash of the prompt."
    )
    limit: int | None = Field(None, ge=1, description="Use only the first N rows of the split.")
    options: dict[str, Any] = Field(default_factory=dict, description="Arguments of a task.")

    @model_validator(mode="after")
    def _source_or_mixture(self) -> DataSection:
        if (self.source is None) == (not self.mixture):
            raise ValueError("give exactly one of source and mixture")
        plain = DataSection.model_construct()
        given = [
            name
            for name in type(self).model_fields
            if name != "mixture" and getattr(self, name) != getattr(plain, name)
        ]
        if self.mixture and given:
            raise ValueError(
                f"{given[0]} has no effect on a mixture; set it in the datasets that it names"
            )
        return self


class RewardSection(Section):
    """One term of the reward, under a name of its own: the sum of weight x value."""

    weight: float = 1.0
    function: str | None = Field(
        None, description="Registered name or package.module:function; default: the section's name."
    )
    model: str | None = Field(
        None,
        description="In place of a function, a reward model: a reward_model stage of this run, or "
        "a Hugging Face sequence-classification directory.",
    )
    reads: Literal["summary", "response"] | None = Field(
        None, description="What a model from a directory reads; a stage's is known."
    )
    template: str | None = Field(
        None, description="The template of a model from a directory; a stage's is known."
    )
    domains: list[str] | None = Field(
        None, min_length=1, description="Rows of these domains only; default: all rows."
    )
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _function_or_model(self) -> RewardSection:
        if self.model is not None and (self.function is not None or self.options):
            raise ValueError("a reward model has neither function nor options; remove them")
        if self.model is None and (self.reads is not None or self.template is not None):
            raise ValueError("reads and template belong to a reward model; give model, too")
        return self


class VerifierSection(Section):
    """The worker processes in which rule rewards run."""

    workers: int = Field(1, ge=1)
    deadline_seconds: float = Field(5.0, gt=0)
    memory_mb: int = Field(2048, ge=64)
    tasks_per_worker: int = Field(10_000, ge=1, description="A worker is recycled after so many.")


class OptimizerSection(Section):
    """AdamW with a schedule, built with optax."""

    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    final_fraction: float = Field(
        0.0, ge=0, le=1, description="Floor of cosine/linear as a share of learning_rate."
    )
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    moment_dtype: Literal["float32", "bfloat16"] = "float32"


class SamplingSection(Section):
    """How completions are drawn. Temperature 0 is greedy."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: off.")
    min_p: float = Field(0.0, ge=0, lt=1)
    stop: list[str] = Field(default_factory=list)
    speculative: bool = Field(
        False,
        description="Let the module for multi-token prediction draft: samples of the same "
        "distribution, sooner where it drafts well. The model needs multi_token_prediction.",
    )


class EvaluationSampling(SamplingSection):
    """The paper's evaluation protocol, unless said otherwise: temperature 0.6, top-p 0.95."""

    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)


class LengthChange(Section):
    """From optimizer step `step` on, completions may have `tokens` tokens."""

    step: int = Field(ge=0)
    tokens: int = Field(ge=1)


class DataChange(Section):
    """From optimizer step `step` on, questions come from the dataset `data`."""

    step: int = Field(ge=0)
    data: str


class WeightChange(Section):
    """From optimizer step `step` on, a term of the loss has the weight `weight`."""

    step: int = Field(ge=0)
    weight: float = Field(ge=0)


class BalanceSection(Section):
    """How the experts of a mixture are kept evenly used. Both are off at 0.

    DeepSeek-V3 was pre-trained with 0.001 and 0.0001, and with a bias_speed of 0 in the end; it
    does not say what fine-tuning and RL did. In RL biases that move choose other experts than those
    that sampled.
    """

    bias_speed: float = Field(
        0.0,
        ge=0,
        description="How far each update moves the bias of an expert: down if it was chosen more "
        "often than the mean, else up.",
    )
    sequence_loss: float = Field(
        0.0, ge=0, description="Weight of the loss on the imbalance within each sequence."
    )


def _mtp_weight() -> Any:
    return Field(
        0.0,
        description="Weight of the loss of multi-token prediction, which trains the module and, "
        "through it, the model; or which one from which step on (paper: 0.3, later 0.1). The model "
        "needs multi_token_prediction. 0: only the next token is trained.",
    )


def _check_changes(name: str, changes: Sequence[LengthChange | DataChange | WeightChange]) -> None:
    """Raises ValueError unless the steps at which a setting changes start at 0 and increase."""
    steps = [change.step for change in changes]
    if not steps or steps[0] != 0 or steps != sorted(set(steps)):
        raise ValueError(f"{name}: steps must start at 0 and increase")


class StageBase(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_\-]*$")
    weights: str | None = Field(
        None,
        description="Where the stage's weights come from: an earlier train stage, `model`, or a "
        "name in `models`; default: the train stage before it, or `model`.",
    )


class TrainStage(StageBase):
    """What every train loop has: checkpoints, and a limit to updates that were skipped."""

    kind: str
    checkpoint_every: int = Field(100, ge=1, description="Optimizer steps.")
    keep_checkpoints: int = Field(2, ge=1)
    max_bad_steps: int = Field(5, ge=1, description="Non-finite updates in a row before stopping.")


class PretrainStage(TrainStage):
    """Next-token prediction on packed rows of a dataset's `text`."""

    kind: Literal["pretrain"] = "pretrain"
    data: str
    steps: int = Field(ge=1)
    rows_per_step: int = Field(ge=1)
    row_tokens: int = Field(ge=8)
    micro_batches: int = Field(1, ge=1)
    log_every: int = Field(10, ge=1)
    mtp_weight: Annotated[float, Field(ge=0)] | list[WeightChange] = _mtp_weight()
    balance: BalanceSection = BalanceSection()
    optimizer: OptimizerSection

    @model_validator(mode="after")
    def _divisible(self) -> PretrainStage:
        if isinstance(self.mtp_weight, list):
            _check_changes("mtp_weight", self.mtp_weight)
        if self.rows_per_step % self.micro_batches:
            raise ValueError(
                f"rows_per_step = {self.rows_per_step} is not a multiple of "
                f"micro_batches = {self.micro_batches}"
            )
        return self


class GRPOStage(TrainStage):
    """Reinforcement learning with group-relative advantages.

    A step is one policy update. A rollout phase samples `questions_per_step *
    mini_batches_per_rollout` questions and feeds that many steps (paper: 32 x 16 = 512).
    """

    kind: Literal["grpo"] = "grpo"
    data: str | list[DataChange] = Field(description="A dataset, or which one from which step on.")
    rewards: list[str] | None = Field(
        None, min_length=1, description="The rewards to add up; default: all of the config."
    )
    steps: int = Field(ge=1)
    questions_per_step: int = Field(32, ge=1)
    outputs_per_question: int = Field(16, ge=2)
    mini_batches_per_rollout: int = Field(1, ge=1)
    micro_batches: int = Field(1, ge=1)
    rollout_batches: int = Field(
        1, ge=1, description="A phase is sampled in so many parts; one is scored as the next runs."
    )
    max_new_tokens: int | list[LengthChange] = 1024
    length_bucket: int = Field(128, ge=1, description="Rows are padded to a multiple of this.")
    sampling: SamplingSection = SamplingSection()
    loss: GRPOConfig = GRPOConfig()
    balance: BalanceSection = BalanceSection()
    replay_experts: bool = Field(
        False,
        description="Of a mixture of experts: updates send each token to the experts that it went "
        "to when it was sampled, and only weigh them anew. The reference chooses for itself.",
    )
    mask_truncated: bool = Field(False, description="Leave truncated completions out of the loss.")
    reference_refresh_every: int | None = Field(400, ge=1)
    optimizer: OptimizerSection
    samples_every: int = Field(10, ge=1, description="Steps between stored sample completions.")
    held_out: str | None = Field(
        None, description="A dataset on which the policy is evaluated as it trains."
    )
    held_out_every: int = Field(
        100, ge=1, description="Steps between two held-out evaluations; there is one at each end."
    )
    held_out_samples: int = Field(16, ge=1, description="Samples of each held-out problem.")
    held_out_sampling: EvaluationSampling = EvaluationSampling()

    @model_validator(mode="after")
    def _divisible(self) -> GRPOStage:
        rows = self.questions_per_step * self.outputs_per_question
        if rows % self.micro_batches:
            raise ValueError(
                f"questions_per_step x outputs_per_question = {rows} is not a multiple of "
                f"micro_batches = {self.micro_batches}"
            )
        questions = self.questions_per_step * self.mini_batches_per_rollout
        if questions % self.rollout_batches:
            raise ValueError(
                f"questions_per_step x mini_batches_per_rollout = {questions} is not a multiple "
                f"of rollout_batches = {self.rollout_batches}"
            )
        if self.steps % self.mini_batches_per_rollout:
            raise ValueError(
                f"steps = {self.steps} is not a multiple of "
                f"mini_batches_per_rollout = {self.mini_batches_per_rollout}"
            )
        if self.checkpoint_every % self.mini_batches_per_rollout:
            raise ValueError(
                f"checkpoint_every = {self.checkpoint_every} is not a multiple of "
                f"mini_batches_per_rollout = {self.mini_batches_per_rollout}: checkpoints are "
                "taken between rollout phases"
            )
        if self.held_out is not None and self.held_out_every % self.mini_batches_per_rollout:
            raise ValueError(
                f"held_out_every = {self.held_out_every} is not a multiple of "
                f"mini_batches_per_rollout = {self.mini_batches_per_rollout}: evaluations take "
                "place between rollout phases"
            )
        if self.replay_experts and self.sampling.speculative:
            raise ValueError(
                "replay_experts = true with sampling.speculative = true: drafts that did not stay "
                "were routed, too, and are not told apart; set one of them to false"
            )
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature = 0: greedy samples of a group are all equal")
        for name, changes in (("max_new_tokens", self.max_new_tokens), ("data", self.data)):
            if isinstance(changes, list):
                _check_changes(name, changes)
                steps = [change.step for change in changes]
                odd = [step for step in steps if step % self.mini_batches_per_rollout]
                if odd:
                    raise ValueError(
                        f"{name}: step {odd[0]} is not a multiple of mini_batches_per_rollout = "
                        f"{self.mini_batches_per_rollout}; changes take place between phases"
                    )
        return self

    def data_at(self, step: int) -> str:
        """The dataset that is in force at a step."""
        if isinstance(self.data, str):
            return self.data
        return [change.data for change in self.data if change.step <= step][-1]


class EpochStage(TrainStage):
    """A train loop that goes through a dataset: so many epochs, or steps."""

    data: str
    epochs: float | None = Field(None, gt=0, description="Passes over the data; or give steps.")
    steps: int | None = Field(None, ge=1)
    rows_per_step: int = Field(ge=1)
    micro_batches: int = Field(1, ge=1)
    log_every: int = Field(10, ge=1)
    held_out: str | None = Field(None, description="A dataset whose loss is measured.")
    held_out_every: int = Field(100, ge=1, description="Steps between two held-out losses.")
    optimizer: OptimizerSection

    @model_validator(mode="after")
    def _consistent(self) -> EpochStage:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        if self.rows_per_step % self.micro_batches:
            raise ValueError(
                f"rows_per_step = {self.rows_per_step} is not a multiple of "
                f"micro_batches = {self.micro_batches}"
            )
        return self

    def steps_for(self, rows_per_epoch: int) -> int:
        """The number of steps, given the rows of an epoch."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return math.ceil(self.epochs * rows_per_epoch / self.rows_per_step)


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


class RewardModelStage(EpochStage):
    """Train a reward model: the policy's architecture with a scalar head, on preferences.

    `data` has rows of prompt, chosen, rejected, or of prompt, response, safe; `rows_per_step`
    counts pairs, or labelled responses.
    """

    kind: Literal["reward_model"] = "reward_model"
    loss: Literal["pairwise", "pointwise"] = Field(
        description="pairwise (helpful) or pointwise (safety)."
    )
    reads: Literal["summary", "response"] = Field(
        description="summary: what follows the thought (helpful); response: all (safety)."
    )
    rows_per_step: int = Field(256, ge=1)
    max_tokens: int = Field(8192, ge=2, description="Longer rows are left out and counted.")
    length_bucket: int = Field(128, ge=1, description="Rows are padded to a multiple of this.")


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


class RejectionSamplingStage(StageBase):
    """Sample, keep what is right and readable, and write it as a dataset (`source: stage:NAME`)."""

    kind: Literal["rejection_sampling"] = "rejection_sampling"
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
    filters: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Text filters by name, each with its options."
    )
    decontaminate: list[str] = Field(
        default_factory=list, description="Datasets whose questions must not be in the result."
    )
    rewrite: Rewrite | None = Field(
        None, description="What turns a kept completion into the text to train on (cold start)."
    )


class EvaluateStage(StageBase):
    """pass@1, pass@k and cons@k on a dataset, every sample stored."""

    kind: Literal["evaluate"] = "evaluate"
    benchmark: str | None = Field(
        None,
        description="A name in r1jax.config.benchmarks, which gives data, rewards and settings "
        "that are not set here.",
    )
    data: str
    rewards: (
        Annotated[list[str], Field(min_length=1)]
        | Annotated[dict[str, RewardSection], Field(min_length=1)]
        | None
    ) = Field(
        None,
        description="What samples are judged by: names of the config's rewards, or rewards of this "
        "stage alone; default: all of the config.",
    )
    problems: int | None = Field(None, ge=1, description="Default: the whole dataset.")
    samples_per_problem: int = Field(16, ge=1)
    problems_per_batch: int = Field(32, ge=1)
    samples_per_batch: int | None = Field(
        None,
        ge=1,
        description="Samples of a problem at once; default: all. Fewer take less memory, each part "
        "has a place in problems_per_batch, and the samples are the same.",
    )
    max_new_tokens: int = Field(1024, ge=1)
    sampling: EvaluationSampling = EvaluationSampling()

    @model_validator(mode="after")
    def _divisible(self) -> EvaluateStage:
        part = self.samples_per_batch
        if part is not None and self.samples_per_problem % part:
            raise ValueError(
                f"samples_per_problem = {self.samples_per_problem} is not a multiple of "
                f"samples_per_batch = {part}"
            )
        return self


Stage = Annotated[
    PretrainStage
    | SFTStage
    | GRPOStage
    | RejectionSamplingStage
    | RewardModelStage
    | EvaluateStage,
    Field(discriminator="kind"),
]
TRAIN_KINDS = ("pretrain", "sft", "grpo")
MODEL = "model"
"""The name of the section `model`, beside the names in `models`."""


class ComparisonSection(Section):
    """Checkpoints that the report puts side by side, such as a run with a reward and one without.

    Each row is an evaluation, with what its weights took to train since what all rows share.
    """

    title: str
    evaluations: list[str] = Field(min_length=2, description="Names of evaluate stages.")
    note: str = Field("", description="Shown below the table: what it says, and what it does not.")


class WatchdogSection(Section):
    """What a process says when it stands still: what it was doing, and the stacks of its threads.

    The time is longer than the first compilation of a large model takes.
    """

    seconds: float = Field(1800.0, gt=0, description="Without any progress, after which it speaks.")
    abort: bool = Field(
        False,
        description="Then end the process with status 134, after which tpu_scripts/ start again.",
    )


class RunConfig(Section):
    """A whole run: model, mesh, data, rewards, and an ordered list of stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")
    seed: int = Field(0, ge=0)
    output: str = Field(
        "runs", description="The run lives in OUTPUT/NAME-sSEED; gs://... is a bucket."
    )
    title: str = ""
    notes: str = Field("", description="Shown in the report: choices, deviations from the paper.")
    model: ModelSection
    models: dict[str, ModelSection] = Field(
        default_factory=dict, description="Further models, such as a student to distil into."
    )
    mesh: MeshSection = MeshSection()
    data: dict[str, DataSection]
    rewards: dict[str, RewardSection] = Field(default_factory=dict)
    verifier: VerifierSection = VerifierSection()
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    stages: list[Stage] = Field(min_length=1)
    comparisons: list[ComparisonSection] = Field(
        default_factory=list, description="Tables of the report beside the one of all stages."
    )
    watchdog: WatchdogSection | None = Field(
        WatchdogSection(), description="null: a process that stands still says nothing."
    )
    compilation_cache: str | None = Field(
        "auto",
        description="Where compiled programs are kept for later runs: a directory, which may be "
        "gs://..., or null for nowhere. `auto`: see r1jax.compilation_cache.",
    )

    @model_validator(mode="after")
    def _references(self) -> RunConfig:
        if MODEL in self.models:
            raise ValueError(f"models.{MODEL}: the name of the section model; choose another")
        for name, section in self.data.items():
            for part in section.mixture:
                if part not in self.data:
                    raise ValueError(
                        f"data.{name}.mixture.{part}: not one of the datasets {sorted(self.data)}"
                    )
                if self.data[part].mixture:
                    raise ValueError(
                        f"data.{name}.mixture.{part} is itself a mixture; name its parts"
                    )
        names = [stage.name for stage in self.stages]
        for index, stage in enumerate(self.stages):
            where = f"stages.{stage.name}"
            if names.count(stage.name) > 1 or stage.name in (MODEL, *self.models):
                raise ValueError(f"{where}: the name {stage.name!r} is used twice")
            for key, data in datasets_of(stage):
                if data not in self.data:
                    raise ValueError(
                        f"{where}.{key} = {data!r}: not one of the datasets {sorted(self.data)}"
                    )
                for source in self.source_stages(data):
                    self._check_source(where, key, data, source, index)
            trained = [s.name for s in self.stages[:index] if s.kind in TRAIN_KINDS]
            known = [*trained, MODEL, *self.models]
            if stage.weights is not None:
                _check_weights(f"{where}.weights", stage.weights, known)
            if isinstance(stage, RejectionSamplingStage) and isinstance(
                stage.rewrite, ModelRewrite
            ):
                _check_weights(f"{where}.rewrite.weights", stage.rewrite.weights, known)
            self._check_module(where, stage)
            if isinstance(stage, GRPOStage | EvaluateStage | RejectionSamplingStage):
                if not isinstance(stage.rewards, dict) and not self.rewards:
                    raise ValueError(f"{where} needs at least one entry in rewards")
                for reward in stage.rewards or ():
                    if reward not in self.rewards_of(stage.rewards):
                        raise ValueError(
                            f"{where}.rewards: {reward!r} is not one of {sorted(self.rewards)}"
                        )
                for name, reward_model in self.reward_stages(stage.rewards).items():
                    if reward_model not in names[:index]:
                        raise ValueError(
                            f"{where} is rewarded by rewards.{name}, whose model is the stage "
                            f"{reward_model}: that must come before, or {where}.rewards must "
                            "leave the reward out"
                        )
        self._check_comparisons()
        return self

    def _check_module(self, where: str, stage: Stage) -> None:
        """What needs a module for multi-token prediction is asked of a model that has one."""
        if isinstance(stage, PretrainStage | SFTStage) and stage.mtp_weight:
            self._needs_module(f"{where}.mtp_weight", stage.name)
        sampled: list[tuple[str, SamplingSection, str]] = []
        if isinstance(stage, GRPOStage | EvaluateStage | RejectionSamplingStage):
            sampled.append(("sampling", stage.sampling, stage.name))
        if isinstance(stage, GRPOStage):
            sampled.append(("held_out_sampling", stage.held_out_sampling, stage.name))
        if isinstance(stage, RejectionSamplingStage) and isinstance(stage.rewrite, ModelRewrite):
            sampled.append(("rewrite.sampling", stage.rewrite.sampling, stage.rewrite.weights))
        for key, section, weights in sampled:
            if section.speculative:
                self._needs_module(f"{where}.{key}.speculative", weights)

    def _needs_module(self, key: str, weights: str) -> None:
        model = self.model_of(weights)
        section = self.model if model == MODEL else self.models[model]
        if not section.multi_token_prediction:
            where = MODEL if model == MODEL else f"models.{model}"
            raise ValueError(
                f"{key} needs the module for multi-token prediction, which this run's model does "
                f"without; set {where}.multi_token_prediction to true, or leave {key} out"
            )

    def _check_comparisons(self) -> None:
        known = [stage.name for stage in self.stages if stage.kind == "evaluate"]
        for index, section in enumerate(self.comparisons):
            where = f"comparisons.{index}.evaluations"
            for name in section.evaluations:
                if name not in known:
                    raise ValueError(f"{where}: {name!r} is not one of the evaluate stages {known}")
                if section.evaluations.count(name) > 1:
                    raise ValueError(f"{where}: {name!r} is named twice; a row is enough")

    def _check_source(self, where: str, key: str, data: str, source: str, index: int) -> None:
        before = {s.name: s.kind for s in self.stages[:index]}
        if before.get(source) != "rejection_sampling":
            written = [name for name, kind in before.items() if kind == "rejection_sampling"]
            raise ValueError(
                f"{where}.{key}: data.{data} comes from stage:{source}, which is not a "
                f"rejection_sampling stage before {where}; there are {written}"
            )

    def source_stages(self, data: str) -> list[str]:
        """The rejection sampling stages that a dataset comes from."""
        section = self.data[data]
        if section.mixture:
            return [
                s for part in section.mixture if part in self.data for s in self.source_stages(part)
            ]
        kind, _, name = str(section.source).partition(":")
        return [name] if kind == "stage" else []

    def reward_stages(self, names: list[str] | dict[str, RewardSection] | None) -> dict[str, str]:
        """Reward -> reward_model stage, of those rewards that such a stage of this run gives."""
        trained = {stage.name for stage in self.stages if stage.kind == "reward_model"}
        found = {name: reward.model for name, reward in self.rewards_of(names).items()}
        return {name: model for name, model in found.items() if model in trained}

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def weights_of(self, name: str) -> str:
        """Where a stage's weights come from: the name of a train stage, or of a model."""
        before = MODEL
        for stage in self.stages:
            if stage.name == name:
                return stage.weights or before
            if stage.kind in TRAIN_KINDS:
                before = stage.name
        raise KeyError(name)

    def model_of(self, name: str) -> str:
        """The model (`model`, or a name in `models`) that a stage's weights are of.

        Args:
          name: of a stage or of a model.
        """
        while name != MODEL and name not in self.models:
            name = self.weights_of(name)
        return name

    def rewards_of(
        self, names: list[str] | dict[str, RewardSection] | None
    ) -> dict[str, RewardSection]:
        """A stage's rewards: its own, or those of these names in the config's order, or all."""
        if isinstance(names, dict):
            return names
        return {name: r for name, r in self.rewards.items() if names is None or name in names}


def _check_weights(where: str, weights: str, known: list[str]) -> None:
    if weights not in known:
        raise ValueError(
            f"{where} = {weights!r}: neither an earlier train stage nor a model; there are {known}"
        )


def datasets_of(stage: Stage) -> list[tuple[str, str]]:
    """(key, dataset) of all datasets that a stage reads."""
    found: list[tuple[str, str]] = []
    if isinstance(stage.data, str):
        found.append(("data", stage.data))
    else:
        found += [(f"data.{i}.data", change.data) for i, change in enumerate(stage.data)]
    if isinstance(stage, GRPOStage | EpochStage) and stage.held_out is not None:
        found.append(("held_out", stage.held_out))
    if isinstance(stage, RejectionSamplingStage):
        found += [("decontaminate", data) for data in stage.decontaminate]
    return found
