"""Settings of reinforcement learning with GRPO."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from r1jax.files import JsonObject
from r1jax.settings.critic import CriticSection
from r1jax.settings.distillation import OnPolicyDistillation
from r1jax.settings.names import nearest
from r1jax.settings.objective import (
    CISPO,
    DAPO,
    GMPO,
    GRPO,
    GSPO,
    PPO,
    RLOO,
    SAPO,
    DrGRPO,
    GRPOConfig,
    ObjectiveSettings,
    OutsideObjective,
    ReinforcePlusPlus,
)
from r1jax.settings.optimizer import BalanceSection, OptimizerSection, check_changes
from r1jax.settings.sampling import EvaluationSampling, PlannedLengths, SamplingSection
from r1jax.settings.section import Section, SettingError
from r1jax.settings.stage import (
    REFERENCE,
    DataChange,
    Divided,
    LengthChange,
    RewardSelection,
    StageDescription,
    TrainStage,
    WeightsUse,
    check_multiple,
)
from r1jax.settings.turns import (
    TrainedTurn,
    attempt_limits,
    check_order,
    check_supported,
    tokens_of_turns,
)


def _not_carried(
    key: str, value: object, objective: Mapping[str, object], known: Sequence[str]
) -> str:
    """Why a key of `loss` cannot be one of the objective's; empty: it can."""
    if not known:
        return "one of yours has its settings in objective.options; leave it out"
    if key not in known:
        return (
            f"kind {objective.get('kind')} has no such setting; leave it out ({nearest(key, known)}"
            f"it has {', '.join(known)})"
        )
    if key in objective and objective[key] != value:
        return f"objective.{key} = {objective[key]} says another value; leave one of them out"
    return ""


_OBJECTIVES: dict[str, type] = {
    each.kind: each
    for each in (GRPO, DrGRPO, DAPO, GSPO, CISPO, SAPO, GMPO, RLOO, ReinforcePlusPlus, PPO)
}


def _kind(objective: object) -> str | None:
    """The tag of an objective: its kind; `outside` for one of the user's."""
    kind = (
        objective.get("kind") if isinstance(objective, dict) else getattr(objective, "kind", None)
    )
    return "outside" if isinstance(kind, str) and ":" in kind else kind


_Objective = Annotated[
    Annotated[GRPO, Tag("grpo")]
    | Annotated[DrGRPO, Tag("dr_grpo")]
    | Annotated[DAPO, Tag("dapo")]
    | Annotated[GSPO, Tag("gspo")]
    | Annotated[CISPO, Tag("cispo")]
    | Annotated[SAPO, Tag("sapo")]
    | Annotated[GMPO, Tag("gmpo")]
    | Annotated[RLOO, Tag("rloo")]
    | Annotated[ReinforcePlusPlus, Tag("reinforce_plus_plus")]
    | Annotated[PPO, Tag("ppo")]
    | Annotated[OutsideObjective, Tag("outside")],
    Discriminator(_kind),
]


def _without_reference(stage: JsonObject) -> None:
    """Of a stage without rewards: no penalty on KL to the reference unless one is given."""
    loss, objective = stage.get("loss"), stage.get("objective")
    if objective is None and isinstance(loss, dict | None):
        stage["loss"] = {"kl_coefficient": 0.0, **(loss or {})}
    if isinstance(objective, dict) and objective.get("kind") == "grpo":
        given = loss if isinstance(loss, dict) else {}
        objective.setdefault("kl_coefficient", given.get("kl_coefficient", 0.0))


class DynamicSampling(Section):
    """Sample until a phase has groups enough whose rewards differ (DAPO, arXiv 2503.14476, section
    3.2): the others have advantages of 0.

    What is decided follows the order of the questions, never the time at which a reward arrives.
    """

    max_questions: int | None = Field(
        None,
        ge=1,
        description="Questions that a phase samples at most; it then trains on the groups that it "
        "has. Default: four times as many as it trains on.",
    )
    questions_at_once: int | None = Field(
        None,
        ge=1,
        description="A phase samples a multiple of this. Default: 1; with tokens_per_phase, where "
        "it is what is sampled between two decisions, as many as a phase trains on.",
    )
    surplus: Literal["drop", "keep"] = Field(
        "drop",
        description="What becomes of groups beyond those that the phase trains on, where "
        "questions_at_once is above 1: keep them for the next phase, where loss.importance_cap "
        "corrects for the weights that sampled them. Those beyond the decision come again.",
    )
    pass_rate: tuple[float, float] = Field(
        (0.0, 1.0),
        description="The least and the highest share of right samples in a group to train on.",
    )
    look_again_after: int | None = Field(
        None,
        ge=1,
        description="Steps for which a question is skipped once all of its samples, or none, were "
        "right. Default: no question is skipped.",
    )

    @field_validator("pass_rate")
    @classmethod
    def _is_band(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError("give [low, high] with 0 <= low < high <= 1")
        return value


class GRPOStage(TrainStage):
    """Reinforcement learning with group-relative advantages.

    A step is one policy update. A rollout phase samples `questions_per_step *
    mini_batches_per_rollout` questions and feeds that many steps (paper: 32 x 16 = 512).
    """

    FUNCTIONS: ClassVar[str] = "r1jax.stages.grpo.stage"
    DESCRIPTION: ClassVar[StageDescription] = StageDescription(
        title="reinforcement learning",
        leaves="weights",
        loss_note="Its level says nothing about progress: most objectives compare the samples of a "
        "question, so that gains and losses cancel. Read reward and gradient norm in its place.",
        leading_panels=("reward",),
        shows_samples=True,
        less_memory="fewer sampling.slots, more micro_batches, fewer max_new_tokens",
    )

    kind: str = "grpo"
    data: Annotated[str | list[DataChange], AfterValidator(check_changes)] = Field(
        description="A dataset, or which one from which step on."
    )
    rewards: list[str] | None = Field(
        None,
        description="The rewards to add up; default: all of the config. []: none, for distillation "
        "alone, whose loss has a penalty on KL to the reference only where kl_coefficient is "
        "given.",
    )
    steps: int = Field(ge=1, description="Optimizer steps.")
    questions_per_step: int = Field(32, ge=1, description="Questions of one update.")
    outputs_per_question: int = Field(
        16,
        ge=1,
        description="Samples of a question: the group in which rewards are compared. At least 2, "
        "or 1 without rewards, or with an objective that compares none: ppo, reinforce_plus_plus "
        "without baseline.",
    )
    mini_batches_per_rollout: int = Field(
        1, ge=1, description="Updates from the samples of one rollout phase (paper: 16)."
    )
    micro_batches: int = Field(
        1,
        ge=1,
        description="No more rows at once than an update's samples divided by this. Packed rows "
        "are fewer, and come in smaller parts where the devices stay busy.",
    )
    rollout_batches: int = Field(
        1,
        ge=1,
        description="Without sampling.slots: no more samples at once than those of a phase divided "
        "by this. Not needed: samples are scored as they end.",
    )
    max_new_tokens: Annotated[int | list[LengthChange], AfterValidator(check_changes)] = Field(
        1024, description="Tokens of a completion at most; or which limit from which step on."
    )
    length_bucket: int = Field(
        128, ge=1, description="The length of the packed rows is a multiple of this."
    )
    sampling: SamplingSection = SamplingSection.model_construct()
    lengths: PlannedLengths = None
    objective: _Objective | None = Field(
        None,
        description="What is optimised: a kind with its settings, those of its paper where none is "
        "given; or package.module:name, an Objective or a function that returns one. Default: kind "
        "grpo with the settings of loss.",
    )
    loss: GRPOConfig | None = Field(
        GRPOConfig(),
        description="Settings of kind grpo. With an objective, its kind takes the keys that it "
        "knows.",
    )
    critic: CriticSection | None = Field(
        None, description="The value model of objective kind ppo; default: all its defaults."
    )
    distillation: OnPolicyDistillation | None = Field(
        None, description="Learn a teacher's distribution at the tokens of the samples."
    )
    balance: BalanceSection = BalanceSection.model_construct()
    replay_experts: bool = Field(
        False,
        description="Of a mixture of experts: updates send each token to the experts that it went "
        "to when it was sampled, and only weigh them anew. The reference chooses for itself.",
    )
    dynamic_sampling: DynamicSampling | None = Field(
        None, description="Sample until there are groups enough that teach something."
    )
    phases_of_lag: Literal[0, 1] = Field(
        0,
        description="1: the next phase is sampled before the update of this one, whose rewards are "
        "computed meanwhile, or with mesh.rollout.devices during it; loss.importance_cap corrects "
        "for the weights that sampled it.",
    )
    tokens_per_phase: int | None = Field(
        None,
        ge=1,
        description="Tokens that a sample gets in one phase at most (partial rollouts, Kimi k1.5, "
        "arXiv 2501.12599): it goes on in the next phase, with the weights of then. Divides "
        "max_new_tokens. Default: every sample ends in its phase.",
    )
    turns: list[TrainedTurn] | None = Field(
        None,
        description="Several attempts at each question, with texts of the user between them; each "
        "attempt is a sequence of the loss with a return of its own. Here and held out.",
    )
    mask_truncated: bool = Field(False, description="Leave truncated completions out of the loss.")
    reference: str | None = Field(
        None,
        description="An earlier train stage of the same model, or `model`: whose weights the "
        "reference policy has at first. Default: those that the stage starts from.",
    )
    reference_refresh_every: int | None = Field(
        400, ge=1, description="Steps after which the policy becomes the reference; null: never."
    )
    optimizer: OptimizerSection
    samples_every: int = Field(10, ge=1, description="Steps between stored sample completions.")
    held_out: str | None = Field(
        None, description="A dataset on which the policy is evaluated as it trains."
    )
    held_out_every: int = Field(
        100, ge=1, description="Steps between two held-out evaluations; there is one at each end."
    )
    held_out_samples: int = Field(16, ge=1, description="Samples of each held-out problem.")
    held_out_sampling: EvaluationSampling = EvaluationSampling.model_construct()

    @classmethod
    def fill_in(cls, stage: JsonObject, data: JsonObject) -> dict[str, str]:
        """Make settings of `loss` those of the objective, if one is given; `loss` is then null."""
        objective, loss = stage.get("objective"), stage.get("loss")
        if stage.get("distillation") and stage.get("rewards") == []:
            _without_reference(stage)
        if not isinstance(objective, dict) or not isinstance(loss, dict | None):
            return {}
        settings = _OBJECTIVES.get(_kind(objective) or "")
        if settings is None and _kind(objective) != "outside":  # refused where it is validated
            return {}
        known = [] if settings is None else [each.name for each in fields(settings)]
        problems = {}
        for key, value in (loss or {}).items():
            if problem := _not_carried(key, value, objective, known):
                problems[f"loss.{key}"] = problem
            else:
                objective.setdefault(key, value)
        if not problems:
            stage["loss"] = None
        return problems

    @model_validator(mode="after")
    def _divisible(self) -> GRPOStage:
        per_rollout, mini_batches = "mini_batches_per_rollout", self.mini_batches_per_rollout
        for of, divisor, factors in (
            ("micro_batches", self.micro_batches, self._factors_of_rows),
            ("rollout_batches", self.rollout_batches, self._factors_of_questions),
        ):
            product, value = " x ".join(dict(factors)), math.prod(dict(factors).values())
            check_multiple(product, value, of, divisor, factors=factors)
        check_multiple("steps", self.steps, per_rollout, mini_batches)
        why = ": checkpoints are taken between rollout phases"
        check_multiple("checkpoint_every", self.checkpoint_every, per_rollout, mini_batches, why)
        if self.held_out is not None:
            why = ": evaluations take place between rollout phases"
            check_multiple("held_out_every", self.held_out_every, per_rollout, mini_batches, why)
        if self.replay_experts and self.sampling.speculative:
            raise ValueError(
                "replay_experts = true with sampling.speculative = true: drafts that did not stay "
                "were routed, too, and are not told apart; set one of them to false"
            )
        self._check_critic()
        if self.dynamic_sampling is not None:
            self._check_dynamic_sampling(self.dynamic_sampling)
        if not self.rewarded:
            self._check_without_rewards()
        settings = self.objective or self.loss
        if self.importance_needed and getattr(settings, "importance_cap", 1.0) is None:
            section = "objective" if self.objective else "loss"
            raise ValueError(
                f"{self.importance_needed} with {section}.importance_cap = null: nothing would "
                "correct for the weights that sampled, which are older than the trained ones; "
                f"set a cap, or leave out {self.importance_needed.partition(' ')[0]}"
            )
        if self.tokens_per_phase is not None:
            self._check_tokens_per_phase(self.tokens_per_phase)
        if self.turns is not None:
            self._check_turns(self.turns)
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature = 0: greedy samples of a group are all equal")
        for name, changes in (("max_new_tokens", self.max_new_tokens), ("data", self.data)):
            for change in changes if isinstance(changes, list) else ():
                why = "; changes take place between phases"
                check_multiple(f"{name}: step", change.step, per_rollout, mini_batches, why)
        return self

    def _check_critic(self) -> None:
        settings = self.objective_settings
        kind, with_critic = settings.kind, isinstance(settings, PPO | OutsideObjective)
        if self.critic is not None and not with_critic:
            raise ValueError(f"critic belongs to objective.kind ppo, and this is {kind}: remove it")
        if self.critic is not None and self.critic.warmup_steps >= self.steps:
            raise ValueError(
                f"critic.warmup_steps = {self.critic.warmup_steps} of steps = {self.steps}: the "
                "policy would never be trained; lower it"
            )
        alone = with_critic or (isinstance(settings, ReinforcePlusPlus) and not settings.baseline)
        if self.rewarded and self.outputs_per_question == 1 and not alone:
            raise ValueError(
                "outputs_per_question = 1: rewards are compared among the samples of a question by "
                f"kind {kind}; should be greater than or equal to 2, or the objective ppo"
            )
        if self.rewarded and self.outputs_per_question == 1 and self.dynamic_sampling is not None:
            raise ValueError(
                "outputs_per_question = 1 with dynamic_sampling: the rewards of one sample do not "
                "differ, and no group would be kept; leave one of them out"
            )

    def _check_dynamic_sampling(self, dynamic: DynamicSampling) -> None:
        phase, group = self.questions_per_phase, self.outputs_per_question
        at_once, most = self.questions_at_once, self.max_questions
        if at_once > phase:
            raise ValueError(
                f"dynamic_sampling.questions_at_once = {at_once} is more than questions_per_step x "
                f"mini_batches_per_rollout = {phase}, the questions of a phase; lower it"
            )
        if most < phase:
            raise ValueError(
                f"dynamic_sampling.max_questions = {most} is less than questions_per_step x "
                f"mini_batches_per_rollout = {phase}, the questions of a phase; raise it"
            )
        check_multiple(
            "dynamic_sampling.max_questions",
            most,
            "dynamic_sampling.questions_at_once",
            at_once,
        )
        low, high = dynamic.pass_rate
        if not any(low <= right / group <= high for right in range(group + 1)):
            raise ValueError(
                f"dynamic_sampling.pass_rate = [{low:g}, {high:g}]: no group of "
                f"outputs_per_question = {group} samples has such a share of right ones; widen it"
            )

    def _check_turns(self, turns: Sequence[TrainedTurn]) -> None:
        check_order(turns)
        check_supported(
            "turns",
            {
                "tokens_per_phase": self.tokens_per_phase,
                "dynamic_sampling": self.dynamic_sampling,
                "phases_of_lag": self.phases_of_lag,
                "replay_experts": self.replay_experts,
                "critic": self.critic,
                "distillation": self.distillation,
                "sampling.speculative": self.sampling.speculative,
                "held_out_sampling.speculative": self.held_out_sampling.speculative,
                "lengths": self.lengths,
            },
        )
        attempts = [turn for turn in turns if turn.role == "assistant"]
        if not any(turn.trained for turn in attempts):
            raise SettingError("turns", "no attempt is trained; leave out trained: false")
        if attempts[0].improvement:
            raise SettingError(
                "turns.0.improvement",
                "no attempt stands before the first one; leave it out",
            )
        if not any(turn.weight or turn.improvement for turn in attempts):
            raise SettingError("turns", "no attempt has a reward: raise weight or improvement")
        settings = self.objective or self.loss
        coefficients = [each.kl_coefficient for each in attempts]
        if not getattr(settings, "kl_coefficient", 1.0) and any(coefficients):
            section = "objective" if self.objective else "loss"
            raise SettingError(
                "turns",
                f"kl_coefficient of a turn with {section}.kl_coefficient = 0: there is no "
                f"reference policy; set {section}.kl_coefficient above 0",
            )
        if isinstance(self.objective, ReinforcePlusPlus) and any(
            each.trained and not (each.weight or each.improvement or each.discount)
            for each in attempts
        ):
            raise SettingError(
                "turns",
                "objective.kind = reinforce_plus_plus compares all trained tokens of a phase, and "
                "an attempt without a return would get advantages; choose another kind, or "
                "trained: false",
            )

    def _check_without_rewards(self) -> None:
        if self.distillation is None:
            raise ValueError(
                "rewards = []: the stage would train on nothing; name a reward, or a teacher in "
                "distillation"
            )
        for key in ("dynamic_sampling", "held_out", "turns"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key} with rewards = []: it needs rewards, by which samples are right or "
                    "wrong; leave it out, or name a reward, which may have weight 0"
                )

    def _check_tokens_per_phase(self, tokens: int) -> None:
        limits = self.max_new_tokens
        for limit in [limits] if isinstance(limits, int) else [each.tokens for each in limits]:
            check_multiple("max_new_tokens", limit, "tokens_per_phase", tokens)
        if self.sampling.speculative:
            raise ValueError(
                f"tokens_per_phase = {tokens} with sampling.speculative = true: samples that go on "
                "are decoded in slots, and drafts are not; set one only"
            )

    @property
    def objective_settings(self) -> ObjectiveSettings | OutsideObjective:
        """Those of the objective in force; a constant length that is not given is the longest
        completion's."""
        settings = self.objective or GRPO(**asdict(self.loss or GRPOConfig()))
        if isinstance(settings, OutsideObjective) or settings.normalisation != "constant":
            return settings
        return replace(
            settings, constant_length=settings.constant_length or self.longest_completion
        )

    @property
    def critic_settings(self) -> CriticSection:
        """Those of the critic, where the objective has one."""
        return self.critic or CriticSection()

    @property
    def rewarded(self) -> bool:
        """Whether there are rewards; else a teacher's distribution is all that is learned."""
        return self.rewards != []

    @property
    def samples_divergence(self) -> bool:
        """Whether the divergence to a teacher is estimated by sampled tokens, as advantages."""
        return self.distillation is not None and self.distillation.form == "advantage"

    @property
    def importance_needed(self) -> str:
        """The setting for which a phase may train on samples of older weights; empty: none."""
        if self.dynamic_sampling is not None and self.dynamic_sampling.surplus == "keep":
            return "dynamic_sampling.surplus = 'keep'"
        if self.tokens_per_phase is not None:
            return f"tokens_per_phase = {self.tokens_per_phase}"
        return "phases_of_lag = 1" if self.phases_of_lag else ""

    @property
    def keeps_surplus(self) -> bool:
        """Whether groups that a phase has no room for are left to the next one."""
        if self.dynamic_sampling is None:
            return self.tokens_per_phase is not None
        return self.dynamic_sampling.surplus == "keep"

    @property
    def questions_per_phase(self) -> int:
        """Questions whose groups a phase trains on."""
        return self.questions_per_step * self.mini_batches_per_rollout

    @property
    def decides(self) -> bool:
        """Whether the samples of a phase decide how it goes on."""
        return self.dynamic_sampling is not None or self.tokens_per_phase is not None

    @property
    def questions_at_once(self) -> int:
        """Questions that are sampled before the next decision how to go on."""
        given = self.dynamic_sampling and self.dynamic_sampling.questions_at_once
        return given or (1 if self.goes_on else self.questions_per_phase)

    @property
    def goes_on(self) -> bool:
        """Whether a phase is one queue, which goes on until there are groups enough."""
        return self.dynamic_sampling is not None and self.tokens_per_phase is None

    @property
    def _factors_of_rows(self) -> tuple[tuple[str, int], ...]:
        """The settings that make up the rows of an update."""
        questions = ("questions_per_step", self.questions_per_step)
        return (questions, ("outputs_per_question", self.outputs_per_question))

    @property
    def _factors_of_questions(self) -> tuple[tuple[str, int], ...]:
        """The settings that make up the questions of a phase."""
        questions = ("questions_per_step", self.questions_per_step)
        return (questions, ("mini_batches_per_rollout", self.mini_batches_per_rollout))

    @property
    def max_questions(self) -> int:
        """Questions that a phase samples at most."""
        if self.dynamic_sampling is None:
            return self.questions_per_phase
        return self.dynamic_sampling.max_questions or 4 * self.questions_per_phase

    def datasets(self) -> list[tuple[str, str]]:
        held_out = [] if self.held_out is None else [("held_out", self.held_out)]
        return [*self.training_datasets(), *held_out]

    def training_datasets(self) -> list[tuple[str, str]]:
        """(key, dataset) of those whose questions are trained on."""
        if isinstance(self.data, str):
            return [("data", self.data)]
        return [(f"data.{i}.data", change.data) for i, change in enumerate(self.data)]

    def prompt_datasets(self) -> list[str]:
        return [data for _, data in self.datasets()]

    def reward_selection(self) -> RewardSelection:
        return self.rewards

    def needs_reward(self) -> bool:
        return self.distillation is None

    def other_weights(self) -> list[WeightsUse]:
        uses = [] if self.distillation is None else [self.distillation.weights_use()]
        if self.reference is not None:
            uses.append(WeightsUse("reference", self.reference, REFERENCE))
        if (source := self.critic_settings.weights) is not None:
            uses.append(WeightsUse("critic.weights", source, "critic", rewards=True))
        return uses

    def may_leave_critic(self) -> bool:
        return isinstance(self.objective_settings, PPO | OutsideObjective)

    def prediction_module_uses(self) -> list[tuple[str, str]]:
        sections = {"sampling": self.sampling, "held_out_sampling": self.held_out_sampling}
        return [(f"{key}.speculative", self.name) for key, s in sections.items() if s.speculative]

    def divided(self) -> list[Divided]:
        rows = self.questions_per_step * self.outputs_per_question
        product = ": questions_per_step x outputs_per_question"
        divided = [
            Divided(
                f"{product} / micro_batches",
                rows // self.micro_batches,
                "batch",
                ("micro_batches", self.micro_batches),
                self._factors_of_rows,
            ),
            Divided(product, rows, "rollout_batch", factors=self._factors_of_rows),
            Divided(".length_bucket", self.length_bucket, "time"),
            Divided(
                ": questions_per_step x mini_batches_per_rollout / rollout_batches",
                self.questions_per_phase // self.rollout_batches,
                "processes",
                ("rollout_batches", self.rollout_batches),
                self._factors_of_questions,
            ),
        ]
        if self.dynamic_sampling is not None and not self.goes_on:
            key = ".dynamic_sampling.questions_at_once"
            divided.append(Divided(key, self.questions_at_once, "processes"))
        return divided

    def samples_ahead(self) -> bool:
        return self.phases_of_lag == 1

    def planned_steps(self) -> int | None:
        return self.steps

    def longest_sample(self) -> int:
        if self.turns is not None:
            return tokens_of_turns(self.turns, self.longest_limit)
        return self.longest_completion

    def sample_tokens_at(self, step: int) -> int:
        """Tokens behind a prompt at most, by the limit that is in force at a step."""
        limit = self.max_new_tokens_at(step)
        return limit if self.turns is None else tokens_of_turns(self.turns, limit)

    def attempt_limits_at(self, step: int) -> tuple[int, ...]:
        """Tokens of each attempt at a question at most; without turns there is one."""
        limit = self.max_new_tokens_at(step)
        return (limit,) if self.turns is None else attempt_limits(self.turns, limit)

    @property
    def attempts(self) -> int:
        """Attempts at a question in each sample."""
        return 1 if self.turns is None else len(self.turns) // 2 + 1

    def max_new_tokens_at(self, step: int) -> int:
        """The limit of a completion that is in force at a step."""
        if isinstance(self.max_new_tokens, int):
            return self.max_new_tokens
        return [change.tokens for change in self.max_new_tokens if change.step <= step][-1]

    @property
    def longest_completion(self) -> int:
        """Tokens that a completion, or each attempt, may have at any step."""
        longest = self.longest_limit
        return longest if self.turns is None else max(attempt_limits(self.turns, longest))

    @property
    def longest_limit(self) -> int:
        """The highest max_new_tokens of all steps."""
        if isinstance(self.max_new_tokens, int):
            return self.max_new_tokens
        return max(change.tokens for change in self.max_new_tokens)

    def data_at(self, step: int) -> str:
        """The dataset that is in force at a step."""
        if isinstance(self.data, str):
            return self.data
        return [change.data for change in self.data if change.step <= step][-1]
