"""The queue of a phase that goes on until the phase has its groups.

Questions are sampled ahead of the decisions: slots that are free need not wait for the last sample
of a question, nor for its reward. What a phase trains on, and with which question the next one
begins, follows from the questions in their order all the same: those that were sampled and not
needed are dropped, and come again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from r1jax.data.prompts import Prompt
from r1jax.files import JsonObject
from r1jax.processes import BatchSlice, gather
from r1jax.rewards import RowScore
from r1jax.rollouts.sampling import Completion
from r1jax.rollouts.scoring import PendingRewards, RewardScorer, check_first_rewards
from r1jax.run.record import Clock
from r1jax.sharding import Layout
from r1jax.stages.grpo.groups import Phase, Question, SampledQuestions
from r1jax.stages.grpo.metrics import group_result, sample_facts
from r1jax.stages.grpo.questions import Questions
from r1jax.stages.grpo.selection import Fate, group_fate, questions_ahead, questions_to_sample
from r1jax.stages.grpo.settings import GRPOStage


class QuestionDraw(NamedTuple):
    """A question, and the index of its first sample: it may come twice in a phase."""

    question: Question
    first_sample: int


@dataclass
class QuestionInQueue:
    """A question that was given to the sampler.

    number: in the order of the queue. completions: by index, of the process that samples it, as are
    pending: their rewards, with the completions' indices; and scores.
    facts: of its samples, see `sample_facts`; None: not all rewards are there. kept: whether it is
    one to train on, by these.
    """

    draw: QuestionDraw
    number: int
    completions: dict[int, Completion] = field(default_factory=dict)
    pending: list[tuple[Sequence[int], PendingRewards]] = field(default_factory=list)
    scores: Sequence[RowScore] = ()
    facts: list[JsonObject] | None = None
    kept: bool = False


Record = Callable[[SampledQuestions, Sequence[RowScore], Sequence[JsonObject]], None]


@dataclass
class PhaseQueue:
    """The queue of a phase; all processes make the same calls.

    record: is given the next questions of the phase, with the scores of this process and the facts
        of all. reflections: counted in completions.
    """

    stage: GRPOStage
    questions: Questions
    scorer: RewardScorer
    layout: Layout
    share: BatchSlice
    clock: Clock
    phase: Phase
    record: Record
    reflections: Sequence[re.Pattern[str]] = ()
    _queue: list[QuestionInQueue] = field(default_factory=list)
    _by_question: dict[QuestionDraw, QuestionInQueue] = field(default_factory=dict)
    _next: list[QuestionDraw] = field(default_factory=list)  # questions to decide on
    # Of this process, whose rewards are not read; the first `_due` were whole one call before.
    _whole: list[QuestionInQueue] = field(default_factory=list)
    _due: int = 0
    _checked: bool = False

    def take(self, idle: bool) -> list[list[tuple[Prompt, int]]] | None:
        """The questions to sample next, of each process; None: the phase is complete."""
        self.phase.rollout_seconds += self.clock.lap("rollout")
        self._read(idle)
        self.phase.score_seconds += self.clock.lap("score_wait")
        if self._decide():
            return None
        added = self._add_questions()
        return [
            [
                (self.questions.prompt(each.draw.question), each.draw.first_sample)
                for each in added
                if self._holder(each) == process
            ]
            for process in range(self.share.count)
        ]

    def ended(self, samples: Sequence[tuple[int, Completion]]) -> None:
        """Samples of this process; their rewards are computed from now on."""
        group = self.stage.outputs_per_question
        queue = self._queue[self.share.index :: self.share.count]
        by_question: dict[int, list[int]] = {}
        for i, completion in samples:
            queue[i // group].completions[i % group] = completion
            by_question.setdefault(i // group, []).append(i % group)
        for n, indices in by_question.items():
            completions = [queue[n].completions[i] for i in indices]
            rewards = self.scorer.submit(completions, self.phase.step, self.stage.steps)
            queue[n].pending.append((indices, rewards))
            if len(queue[n].completions) == group:
                self._whole.append(queue[n])

    def dropped(self) -> tuple[int, int]:
        """Questions whose samples nothing uses, and tokens of their samples in this process."""
        unused = self._by_question.values()
        tokens = sum(len(c.token_ids) for each in unused for c in each.completions.values())
        return len(unused), tokens

    def _holder(self, question: QuestionInQueue) -> int:
        return question.number % self.share.count

    def _read(self, idle: bool) -> None:
        """Wait for the rewards of groups that were whole one call before: the devices have decoded
        meanwhile. Once they are idle, for all."""
        group = self.stage.outputs_per_question
        due = self._whole if idle else self._whole[: self._due]
        self._whole = self._whole[len(due) :]
        self._due = len(self._whole)
        completions = [each.completions[i] for each in due for i in range(group)]
        pending = [
            ([n * group + i for i in indices], rewards)
            for n, each in enumerate(due)
            for indices, rewards in each.pending
        ]
        scores = self.scorer.in_order(completions, pending)
        facts = sample_facts(completions, scores, self.reflections)
        rows: list[JsonObject] = []
        for n, each in enumerate(due):
            part = slice(n * group, (n + 1) * group)
            each.scores = scores[part]
            rows.append({"number": each.number, "facts": facts[part]})
        for row in gather(rows, self.layout):
            question, facts = self._queue[row["number"]], row["facts"]
            fate = group_fate(group_result(facts), self.stage.dynamic_sampling)
            question.facts, question.kept = facts, fate is Fate.KEPT

    def _decide(self) -> bool:
        """Decide on questions in their order, as far as it is known; whether that is enough."""
        stage, phase = self.stage, self.phase
        while count := questions_to_sample(stage, phase.choice, phase.sampled):
            if not self._next:
                drawn = self.questions.draw(count, phase.step, phase.passed)
                phase.skipped += drawn.skipped
                draw = self._draws(iter(drawn.questions).__next__, phase.occurrences)
                self._next = [draw() for _ in drawn.questions]
            known = [self._by_question.get(draw) for draw in self._next]
            scored = [each for each in known if each is not None and each.facts is not None]
            if len(scored) < count:
                return False
            self._record(scored)
        return True

    def _record(self, questions: Sequence[QuestionInQueue]) -> None:
        group = self.stage.outputs_per_question
        holders = [self._holder(each) for each in questions]
        held = [each for each in questions if self._holder(each) == self.share.index]
        completions = [each.completions[i] for each in held for i in range(group)]
        self.record(
            SampledQuestions([each.draw.question for each in questions], holders, completions, []),
            [score for each in held for score in each.scores],
            [row for each in questions for row in each.facts or ()],
        )
        self.phase.sampled += len(questions)
        self.phase.tokens += sum(len(each.token_ids) for each in completions)
        for each in questions:
            del self._by_question[each.draw]
        self._next = []

    def _add_questions(self) -> list[QuestionInQueue]:
        """Add the questions that are decided on next, and as many as are likely to be needed."""
        stage, phase = self.stage, self.phase
        added = [self._add(draw) for draw in self._next if draw not in self._by_question]
        known = [each.facts for each in self._queue if each.facts is not None]
        if not self._checked and phase.step == 0 and len(known) >= stage.questions_per_phase:
            self._checked = True
            check_first_rewards([row for rows in known for row in rows], self.scorer.rewards)
        ahead = questions_ahead(
            stage.questions_per_phase - phase.choice.from_surplus,
            sum(each.kept for each in self._queue),
            len(known),
            len(self._queue) - len(known),
        )
        room = stage.max_questions - phase.sampled - len(self._next)
        upcoming = self.questions.upcoming(phase.step, phase.passed)
        following = self._draws(upcoming, Counter(phase.occurrences))
        while ahead > 0 and room > 0:
            draw, room = following(), room - 1
            if draw not in self._by_question:
                added.append(self._add(draw))
                ahead -= 1
        return added

    def _add(self, draw: QuestionDraw) -> QuestionInQueue:
        question = QuestionInQueue(draw, len(self._queue))
        self._queue.append(question)
        self._by_question[draw] = question
        return question

    def _draws(
        self, following: Callable[[], Question], occurrences: Counter[Question]
    ) -> Callable[[], QuestionDraw]:
        """Questions with their first samples: twice in a phase one must not get the same random
        numbers. `occurrences` is added to."""

        def draw() -> QuestionDraw:
            question = following()
            first_sample = occurrences[question] * self.stage.outputs_per_question
            occurrences[question] += 1
            return QuestionDraw(question, first_sample)

        return draw
