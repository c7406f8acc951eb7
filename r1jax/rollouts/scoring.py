"""All rewards of a stage: rule rewards in worker processes, reward models on the devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax
import numpy as np

from r1jax.config.run_config import RunConfig
from r1jax.config.yaml_file import ConfigError
from r1jax.data.padded_rows import pad_texts
from r1jax.data.preferences import Reads, encode_responses
from r1jax.data.step_labels import encode_solutions, solution_tokens
from r1jax.data.steps import TokenSteps
from r1jax.files import JsonObject
from r1jax.metrics.heartbeat import span
from r1jax.models import Decoder
from r1jax.models.parameters import Params
from r1jax.models.reward_head import reward_scores, token_label_logits
from r1jax.objectives.step_loss import right_logits
from r1jax.processes import gather, max_over_processes, min_over_processes, process_batch_slice
from r1jax.rewards import Outcome, Pending, RowScore, Score, Verifier
from r1jax.rewards.process import solution_score
from r1jax.rewards.verifier import combine
from r1jax.rollouts.sampling import Completion
from r1jax.run.models import LanguageModel
from r1jax.run.resolve import ResolvedRun
from r1jax.run.stop import RunError
from r1jax.settings.data import DataSection
from r1jax.settings.model import ModelSection
from r1jax.settings.rewards import RewardSection
from r1jax.settings.stage import Stage
from r1jax.settings.steps import SolutionScore, StepScoring
from r1jax.sharding import Layout, from_process_rows, slices_within, to_process_rows
from r1jax.weights import hugging_face

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# (weights, rows of `pad_texts`) -> rewards, float32 [rows]; of a process reward model [rows, time].
ScoreRows = Callable[[Params, Mapping[str, jax.Array]], jax.Array]

_ROWS = 16  # texts that a reward model reads at once on each part of the batch
_BUCKET = 64  # their lengths are rounded up to a multiple, so that few programs are compiled


def check_domains(stage: Stage, domains: Mapping[str, str], config: RunConfig) -> None:
    """Raises ConfigError for a domain (given with its dataset) that no reward is for."""
    rewards = config.rewards_of(stage)
    limits = {name: reward.domains for name, reward in rewards.items()}
    for domain, data in domains.items():
        if not any(only is None or domain in only for only in limits.values()):
            place = config.place(("stages", stage.name))
            raise ConfigError(
                [
                    f"{place}stages.{stage.name}: no reward is for the domain {domain!r} of "
                    f"data.{data}; add it to the domains of one; there are {limits}"
                ]
            )


def check_example_domains(stage: Stage, run: ResolvedRun, limit: int | None = None) -> None:
    """As `check_domains`, before any compute: of the datasets that no stage of the run writes.

    Of each the first `limit` examples are used, or all.
    """
    rewards = run.config.rewards_of(stage)
    for data in stage.prompt_datasets():
        if limit is not None and not run.config.source_stages(data):
            with run.config.blaming("data", data, reader=stage.name):
                run.datasets.check_limit(data, limit)
    if any(reward.domains is None for reward in rewards.values()):
        return  # it is for every domain
    for data in stage.prompt_datasets():
        if not run.config.source_stages(data):
            domains = run.datasets.domains(data, limit)
            check_domains(stage, dict.fromkeys(domains, data), run.config)


@contextmanager
def reward_scorer(rewards: Mapping[str, RewardSection], run: ResolvedRun) -> Iterator[RewardScorer]:
    """Loads the reward models and starts the workers of rule rewards, which end with the block."""
    rules = {name: reward for name, reward in rewards.items() if reward.model is None}
    models = [
        _load_reward_model(name, reward.model, reward, run)
        for name, reward in rewards.items()
        if reward.model is not None
    ]
    with ExitStack() as stack:
        verifier = None
        if rules:
            verifier = Verifier(rules, run.config.verifier, run.config.folder)
            stack.enter_context(verifier)
        yield RewardScorer(rewards, verifier, models)


@dataclass(frozen=True)
class RewardScorer:
    """Scores completions with every reward of a stage that is for their domain.

    Rules run in the workers while the next batch is generated; reward models take the devices when
    the result is read.
    """

    rewards: Mapping[str, RewardSection]
    verifier: Verifier | None
    models: Sequence[RewardModel | ProcessRewardModel]

    def submit(
        self, completions: Sequence[Completion], step: int = 0, max_steps: int = 0
    ) -> PendingRewards:
        """Starts the rule rewards; returns at once. `step` of `max_steps` are done."""
        pending = None
        if self.verifier is not None:
            rows = [each.reward_input(step, max_steps) for each in completions]
            pending = self.verifier.submit(rows)
        return PendingRewards(self, list(completions), pending)

    @span("reward")
    def with_models(
        self, completions: Sequence[Completion], rule_rows: Sequence[RowScore] | None
    ) -> list[RowScore]:
        """Rows of rewards: what the rules gave, and the reward models.

        These read all completions together: one that they cannot read gets the lowest score among
        them. All processes call it equally often.
        """
        if rule_rows is not None and not self.models:
            return list(rule_rows)
        parts = [dict(row.parts) for row in rule_rows or ()] or [
            dict[str, Score]() for _ in completions
        ]
        for model in self.models:
            for part, score in zip(parts, model.score(completions), strict=True):
                if score is not None:
                    part[model.name] = score
        weights = {name: reward.weight for name, reward in self.rewards.items()}
        # In the config's order, which is that of the sum.
        ordered = [{name: part[name] for name in self.rewards if name in part} for part in parts]
        return [combine(part, weights) for part in ordered]

    def in_order(
        self,
        completions: Sequence[Completion],
        pending: Sequence[tuple[Sequence[int], PendingRewards]],
    ) -> list[RowScore]:
        """The results of several submissions, as of one of all these completions.

        Args:
          pending: with the indices of their completions.
        """
        rows: dict[int, RowScore] = {}
        for indices, each in pending:
            rows |= dict(zip(indices, each.rule_rows() or (), strict=False))
        rule_rows = [rows[i] for i in range(len(completions))] if rows else None
        return self.with_models(completions, rule_rows)


def check_first_rewards(
    samples: Sequence[JsonObject], rewards: Mapping[str, RewardSection]
) -> None:
    """Raises RunError where a reward failed on all samples of a first batch, or none was scored.

    A reference answer that cannot be read is the row's fault, and counts only where no sample is
    scored. A reward without weight may fail.

    Args:
      samples: of all processes; `parts` are the rewards (nan: failed) and `details` the reasons.
      rewards: none: then none of them can fail.
    """
    if not rewards:
        return
    for name, reward in rewards.items():
        of_reward = [sample for sample in samples if name in sample["parts"]]
        failed = [sample for sample in of_reward if math.isnan(float(sample["parts"][name]))]
        details = [sample.get("details", {}).get(name) or "" for sample in failed]
        bad_rows = all(detail.startswith("UnreadableReference") for detail in details)
        if reward.weight and failed and len(failed) == len(of_reward) and not bad_rows:
            raise RunError(
                f"rewards.{name} failed on all {len(failed)} samples of the first batch that it is "
                f"for; the first time: {details[0]}"
            )
    if not any(is_scored(sample, rewards) for sample in samples):
        raise RunError(
            f"none of the {len(samples)} samples of the first batch is scored: "
            f"{first_failure(samples)}"
        )


def first_failure(samples: Sequence[JsonObject]) -> str:
    """The first reward that failed, and why; see `check_first_rewards`."""
    for sample in samples:
        for name, value in sample["parts"].items():
            if math.isnan(float(value)):
                return f"rewards.{name}: {sample.get('details', {}).get(name)}"
    return "the rewards gave None for all of them"


def is_scored(sample: JsonObject, rewards: Mapping[str, RewardSection]) -> bool:
    """Whether a sample has a reward, and none with a weight failed; see `check_first_rewards`."""
    parts = {name: float(value) for name, value in sample["parts"].items()}
    return bool(parts) and not any(
        math.isnan(value) for name, value in parts.items() if rewards[name].weight
    )


@dataclass(frozen=True)
class PendingRewards:
    """Completions whose rewards are computed; `rules` are those in the workers."""

    scorer: RewardScorer
    completions: list[Completion]
    rules: Pending | None

    def rule_rows(self) -> list[RowScore] | None:
        """Waits for the rule rewards; None where the stage has none."""
        return None if self.rules is None else self.rules.result()

    def result(self) -> list[RowScore]:
        """Waits, and returns one row of rewards for each completion, in order."""
        return self.scorer.with_models(self.completions, self.rule_rows())


def directory_section(directory: str, policy: ModelSection) -> ModelSection:
    """The model of a directory, executed as the policy is."""
    like = {key: getattr(policy, key) for key in ("compute_dtype", "attention")}
    return ModelSection(path=directory).model_copy(update=like)


def rows_at_once(layout: Layout) -> int:
    """Texts that a reward model reads at once, over all devices."""
    return _ROWS * layout.shards("batch")


def row_tokens(longest: int) -> int:
    """How long the rows of a batch are whose longest text has this many tokens."""
    return -(-longest // _BUCKET) * _BUCKET


def make_score(model: Decoder, as_probability: bool) -> ScoreRows:
    """`score(params, rows)`: float32, split along the batch; rows of `pad_texts`.

    Of a process reward model, the probability that a step which ends at a token is right.
    """

    def score_tokens(params: Params, rows: Mapping[str, jax.Array]) -> Float[Array, "rows time"]:
        inputs = {name: rows[name] for name in ("tokens", "positions", "segment_ids")}
        scores = jax.nn.sigmoid(right_logits(token_label_logits(params, **inputs, model=model)))
        return jax.lax.with_sharding_constraint(scores, model.layout.sharding(("batch", None)))

    def score(params: Params, rows: Mapping[str, jax.Array]) -> Float[Array, " rows"]:
        scores = reward_scores(params, **rows, model=model)
        scores = jax.nn.sigmoid(scores) if as_probability else scores
        return jax.lax.with_sharding_constraint(scores, model.layout.sharding(("batch",)))

    return score_tokens if model.config.head == "token_labels" else score


def _load_reward_model(
    name: str, source: str, reward: RewardSection, run: ResolvedRun
) -> RewardModel | ProcessRewardModel:
    """The model that the stage `source` trained, or that of the directory `source`."""
    formats = {stage.name: stage.reward_model_format() for stage in run.config.stages}
    steps: StepScoring | None = None
    if (trained := formats.get(source)) is not None:
        model, directory = run.models.of(source), run.files.trained(source)
        section, reads = run.config.data[trained.data], trained.reads
        as_probability, steps = trained.labelled, trained.steps
    elif reward.reads is not None or reward.step_rule is not None:
        directory = hugging_face.resolve(source)
        policy = directory_section(str(directory), run.config.model)
        model = LanguageModel.resolve(policy, run.layouts.training)
        section = DataSection(source="jsonl:-", template=reward.template or "chat")
        reads, as_probability = reward.reads or "response", False
        if reward.step_rule is not None:
            steps = StepScoring(reward.step_rule, reward.solution_score or "minimum")
    else:
        raise ValueError(
            f"rewards.{name}.model = {source!r} is no reward_model stage of this run: a directory "
            "needs reads (summary or response), or step_rule of a process reward model, too"
        )
    score = jax.jit(make_score(model.decoder, as_probability))
    loaded = _Loaded(model, model.load(directory), score, run.layouts.rollout)
    if steps is None:
        return RewardModel(name, reward.domains, section, reads, as_probability, loaded)
    how = reward.solution_score or steps.solution_score
    cutter = TokenSteps(model.tokenizer, steps.rule)
    return ProcessRewardModel(
        name, reward.domains, section, cutter, how, loaded, per_step=reward.per_step
    )


@dataclass(frozen=True)
class _Loaded:
    """A reward model on the devices, and what it computes.

    sampling: the layout whose slices of the batch the processes' texts are.
    """

    model: LanguageModel
    params: Params
    score_rows: ScoreRows
    sampling: Layout

    @property
    def layout(self) -> Layout:
        return self.model.decoder.layout

    def outputs(self, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs for this process's token rows; every process makes as many calls."""
        if slices_within(self.layout, self.sampling):
            return self._outputs(texts, self.layout)
        # Processes that read the same rows here have sampled others: all read the texts of all.
        slices = gather([[text.tolist() for text in texts]], self.sampling)
        first = sum(map(len, slices[: process_batch_slice(self.sampling).index]))
        everywhere = [np.asarray(text, np.int32) for of_slice in slices for text in of_slice]
        outputs = self._outputs(everywhere, replace(self.layout, one_slice=True))
        return outputs[first : first + len(texts)]

    def _outputs(self, texts: Sequence[np.ndarray], layout: Layout) -> list[np.ndarray]:
        """In batches of one size."""
        count = rows_at_once(layout) // process_batch_slice(layout).count
        outputs = [np.zeros(0)] * len(texts)
        # Of similar length together: a short text beside a long one is mostly padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, max_over_processes(len(texts), layout), count):
            batch = order[start : start + count]
            longest = max_over_processes(max((len(texts[i]) for i in batch), default=1), layout)
            padding = [np.zeros(1, np.int32)] * (count - len(batch))
            arrays = pad_texts([*(texts[i] for i in batch), *padding], row_tokens(longest))
            rows = {key: from_process_rows(leaf, layout) for key, leaf in arrays.items()}
            scored = to_process_rows(self.score_rows(self.params, rows), layout)
            for i, value in zip(batch, scored, strict=False):
                outputs[i] = value
        return outputs


def _of_domains(
    completions: Sequence[Completion], domains: Sequence[str] | None
) -> tuple[list[int], list[str], list[str]]:
    """Indices of the completions of some domains (None: all), their questions, their responses."""
    chosen = [
        i for i, each in enumerate(completions) if domains is None or each.prompt.domain in domains
    ]
    questions = [completions[i].prompt.question for i in chosen]
    return chosen, questions, [completions[i].prompt.prefill + completions[i].text for i in chosen]


def _with_lowest(rewards: Sequence[float], good: float, layout: Layout) -> list[Score]:
    """The scores of rewards, of which one above `good` counts as right.

    nan is a reward of what has nothing to read. It becomes the lowest of all processes, or 0.
    """
    lowest = min((x for x in rewards if not math.isnan(x)), default=math.inf)
    lowest = min_over_processes(lowest, layout)
    lowest = 0.0 if lowest == math.inf else lowest
    return [
        Score(lowest, Outcome.UNPARSEABLE)
        if math.isnan(value)
        else Score(value, Outcome.RIGHT if value > good else Outcome.WRONG)
        for value in rewards
    ]


@dataclass(frozen=True)
class RewardModel:
    """A trained reward model, for completions of its domains (None: all).

    section: whose template renders a prompt with its response.
    as_probability: trained on labels, its output is a logit, and the reward its probability.
    """

    name: str
    domains: Sequence[str] | None
    section: DataSection
    reads: Reads
    as_probability: bool
    loaded: _Loaded

    @span("reward model")
    def score(self, completions: Sequence[Completion]) -> list[Score | None]:
        """The model's reward of each completion, None for those of other domains.

        From pairs it is the output itself; from labels the probability of "safe", in 0..1.
        What has nothing to read (a thought without an end has no summary) gets the lowest reward
        of the batch, of all processes: never more than what was answered.
        """
        chosen, questions, responses = _of_domains(completions, self.domains)
        rewards = self.rewards(questions, responses)
        scores: list[Score | None] = [None] * len(completions)
        of_chosen = _with_lowest(rewards, 0.5 if self.as_probability else 0.0, self.loaded.layout)
        for i, score in zip(chosen, of_chosen, strict=True):
            scores[i] = score
        return scores

    def rewards(self, questions: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The reward of each response, nan where there is nothing to read.

        All processes call it equally often.
        """
        texts = encode_responses(
            questions, responses, self.section, self.loaded.model.tokenizer, reads=self.reads
        )
        outputs = iter(self.loaded.outputs([text for text in texts if text is not None]))
        return [math.nan if text is None else float(next(outputs)) for text in texts]


@dataclass(frozen=True)
class ProcessRewardModel:
    """A trained process reward model, for completions of its domains (None: all).

    section: whose template renders a prompt with its solution. steps: finds the ends of its steps.
    per_step: scores say where the steps end.
    """

    name: str
    domains: Sequence[str] | None
    section: DataSection
    steps: TokenSteps
    how: SolutionScore
    loaded: _Loaded
    per_step: bool = False

    @span("reward model")
    def score(self, completions: Sequence[Completion]) -> list[Score | None]:
        """The score of each solution, in 0..1, None for those of other domains.

        The detail has the scores of its steps. What has no step gets the lowest reward of the
        batch, of all processes.
        """
        chosen, questions, responses = _of_domains(completions, self.domains)
        steps = self.step_scores(questions, responses)
        rewards = [solution_score(each, self.how) if each else math.nan for each in steps]
        scores: list[Score | None] = [None] * len(completions)
        of_chosen = _with_lowest(rewards, 0.5, self.loaded.layout)
        ends = self._character_ends(responses) if self.per_step else [[]] * len(chosen)
        for i, score, of_steps, at in zip(chosen, of_chosen, steps, ends, strict=True):
            detail = " ".join(f"{x:.3f}" for x in of_steps) or None
            pairs = tuple(zip(at, of_steps or [score.reward], strict=False))
            scores[i] = replace(score, detail=detail, steps=pairs)
        return scores

    def step_scores(self, questions: Sequence[str], responses: Sequence[str]) -> list[list[float]]:
        """The scores of the steps of each response, or of its beginning; [] without a step.

        All processes call it equally often.
        """
        rows = encode_solutions(questions, responses, self.section, self.steps)
        outputs = iter(self.loaded.outputs([tokens for tokens, ends in rows if len(ends)]))
        return [next(outputs)[ends].tolist() if len(ends) else [] for _, ends in rows]

    def _character_ends(self, responses: Sequence[str]) -> list[list[int]]:
        """Where the steps of each response end; what has no step ends as one, behind its text."""
        tokens = solution_tokens(responses, self.steps.tokenizer)
        ends = [self.steps.character_ends(ids) for ids in tokens]
        return [e or [len(text) + 1] for e, text in zip(ends, responses, strict=True)]


@dataclass(frozen=True)
class ValueModel:
    """A critic, as the values of beginnings of solutions."""

    loaded: _Loaded

    @staticmethod
    def load(source: str, run: ResolvedRun) -> ValueModel:
        """The critic that a stage left, or that a name in `models` has."""
        model = run.models.critic_of(source)
        params = run.models.trained_critic(source)
        score = jax.jit(make_score(model.decoder, False))
        return ValueModel(_Loaded(model, params, score, run.layouts.rollout))

    @span("reward model")
    def values(self, texts: Sequence[np.ndarray]) -> list[float]:
        """V behind the last token of each text, token ids [length], as the critic gives it.

        All processes call it equally often.
        """
        return [float(value) for value in self.loaded.outputs(texts)]
