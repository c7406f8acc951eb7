"""All rewards of a stage: rule rewards in worker processes, reward models on the devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np

from r1jax.data.preferences import Reads, encode_responses, pad_texts
from r1jax.metrics import span
from r1jax.models import Decoder
from r1jax.models.reward_head import reward_scores
from r1jax.processes import max_over_processes, min_over_processes, process_batch_slice
from r1jax.rewards import Outcome, Pending, RowScore, Score, Verifier
from r1jax.rewards.verifier import combine
from r1jax.rollouts.sampling import Completion
from r1jax.run.context import Context, LanguageModel
from r1jax.settings.data import DataSection
from r1jax.settings.model import ModelSection
from r1jax.settings.rewards import RewardSection
from r1jax.sharding import Layout, from_process_rows, to_process_rows
from r1jax.stages.reward_model.settings import RewardModelStage
from r1jax.weights import hugging_face

_ROWS = 16  # texts that a reward model reads at once on each part of the batch
_BUCKET = 64  # their lengths are rounded up to a multiple, so that few programs are compiled


class Judge:
    """Scores completions with every reward of a stage that is for their domain.

    Rule rewards begin when a batch is submitted, and run while the next one is generated. Reward
    models take the devices when the scores are asked for.
    """

    def __init__(self, rewards: Mapping[str, RewardSection], context: Context) -> None:
        rules = {name: reward for name, reward in rewards.items() if reward.model is None}
        self._order = list(rewards)
        self._weights = {name: reward.weight for name, reward in rewards.items()}
        self._models = [
            RewardModel(name, reward, context)
            for name, reward in rewards.items()
            if reward.model is not None
        ]
        self._verifier = Verifier(rules, context.config.verifier) if rules else None

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._verifier is not None:
            self._verifier.close()

    def submit(self, completions: Sequence[Completion]) -> Judged:
        """Starts the rule rewards; returns at once."""
        pending = None
        if self._verifier is not None:
            pending = self._verifier.submit([each.answered() for each in completions])
        return Judged(self, list(completions), pending)

    def _scores(self, completions: Sequence[Completion], pending: Pending | None) -> list[RowScore]:
        parts: list[dict[str, Score]] = [{} for _ in completions]
        if pending is not None:
            judged = pending.result()
            if not self._models:
                return judged
            parts = [dict(row.parts) for row in judged]
        for model in self._models:
            for own, score in zip(parts, model.score(completions), strict=True):
                if score is not None:
                    own[model.name] = score
        ordered = [{name: own[name] for name in self._order if name in own} for own in parts]
        return [combine(own, self._weights) for own in ordered]


class Judged:
    """Completions on their way through a `Judge`."""

    def __init__(
        self, judge: Judge, completions: list[Completion], pending: Pending | None
    ) -> None:
        self._judge, self._completions, self._pending = judge, completions, pending

    @span("reward")
    def result(self) -> list[RowScore]:
        """Waits, and returns one score for each completion, in order."""
        return self._judge._scores(self._completions, self._pending)


def directory_section(directory: str, policy: ModelSection) -> ModelSection:
    """The model of a directory, executed as the policy is."""
    like = {key: getattr(policy, key) for key in ("compute_dtype", "attention")}
    return ModelSection(path=directory).model_copy(update=like)


def rows_at_once(layout: Layout) -> int:
    """Texts that a reward model reads at once, over all devices."""
    return _ROWS * layout.shards("batch")


def row_tokens(longest: int) -> int:
    """How long the rows of a batch are whose longest text has so many tokens."""
    return -(-longest // _BUCKET) * _BUCKET


def make_score(model: Decoder, as_probability: bool) -> Callable[..., jax.Array]:
    """`score(params, rows)`: float32 [rows], split along the batch; rows of `pad_texts`."""

    def score(params: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        scores = reward_scores(params, **rows, model=model)
        scores = jax.nn.sigmoid(scores) if as_probability else scores
        return jax.lax.with_sharding_constraint(scores, model.layout.sharding(("batch",)))

    return score


class RewardModel:
    """A trained reward model, as a compiled function of completions."""

    def __init__(self, name: str, reward: RewardSection, context: Context) -> None:
        assert reward.model is not None
        self.name = name
        self._domains = reward.domains
        stages = {stage.name: stage for stage in context.config.stages}
        stage = stages.get(reward.model)
        self._as_probability = False
        self._reads: Reads
        self._model: LanguageModel
        if isinstance(stage, RewardModelStage):
            self._model = context.model_of(stage.name)
            self._section = context.config.data[stage.data]
            self._reads = stage.reads
            # Trained on labels, its score is a logit: rewards are the probability of "safe".
            self._as_probability = stage.loss == "pointwise"
            directory = context.trained(stage.name)
        else:
            if reward.reads is None:
                raise ValueError(
                    f"rewards.{name}.model = {reward.model!r} is no reward_model stage of this "
                    "run: a directory needs reads (summary or response), too"
                )
            directory = hugging_face.resolve(reward.model)
            section = directory_section(str(directory), context.config.model)
            self._model = LanguageModel.resolve(section, context.layout)
            self._section = DataSection(source="jsonl:-", template=reward.template or "chat")
            self._reads = reward.reads
        self._params = self._model.load(directory)
        self._layout = context.layout
        share = process_batch_slice(context.layout)
        self._rows = rows_at_once(context.layout) // share.count
        self._score = jax.jit(make_score(self._model.decoder, self._as_probability))

    @span("reward model")
    def score(self, completions: Sequence[Completion]) -> list[Score | None]:
        """The model's score of each completion, None for those of other domains.

        From pairs it is the score itself; from labels the probability of "safe", in 0..1.
        What has nothing to read (a thought without an end has no summary) gets the lowest score of
        the batch, of all processes: never more than what was answered.
        """
        own = [
            i
            for i, each in enumerate(completions)
            if self._domains is None or each.prompt.domain in self._domains
        ]
        texts = encode_responses(
            [completions[i].prompt.question for i in own],
            [completions[i].prompt.prefill + completions[i].text for i in own],
            self._section,
            self._model.tokenizer,
            reads=self._reads,
        )
        readable = [text for text in texts if text is not None]
        values = iter(self._values(readable))
        scores = [math.nan if text is None else next(values) for text in texts]
        lowest = min_over_processes(min((x for x in scores if not math.isnan(x)), default=math.inf))
        lowest = 0.0 if lowest == math.inf else lowest
        found: list[Score | None] = [None] * len(completions)
        for i, value in zip(own, scores, strict=True):
            read = not math.isnan(value)
            good = value > (0.5 if self._as_probability else 0.0)
            outcome = Outcome.RIGHT if good else Outcome.WRONG
            found[i] = Score(value if read else lowest, outcome if read else Outcome.UNPARSEABLE)
        return found

    def _values(self, texts: Sequence[np.ndarray]) -> list[float]:
        """Scores of token rows, in batches of one size; every process makes as many calls."""
        values: list[float] = []
        # Of similar length together: a short text beside a long one is mostly padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, max_over_processes(len(texts)), self._rows):
            batch = [texts[i] for i in order[start : start + self._rows]]
            longest = max_over_processes(max((len(text) for text in batch), default=1))
            filled = [*batch, *[np.zeros(1, np.int32)] * (self._rows - len(batch))]
            arrays = pad_texts(filled, row_tokens(longest))
            rows = {key: from_process_rows(leaf, self._layout) for key, leaf in arrays.items()}
            scored = to_process_rows(self._score(self._params, rows))[: len(batch)]
            values += [float(value) for value in scored]
        placed = dict(zip(order, values, strict=True))
        return [placed[i] for i in range(len(texts))]
