"""Which questions a phase samples, and which of their groups it trains on.

Functions of what was sampled, in the order of the questions; the same in all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

import numpy as np

from r1jax.stages.grpo.settings import DynamicSampling, GRPOStage

Q = TypeVar("Q", bound=Hashable)
T = TypeVar("T")


class Fate(StrEnum):
    """What becomes of a group: `KEPT`, or why it teaches nothing."""

    KEPT = "kept"
    NO_SPREAD = "no_spread"
    OUT_OF_BAND = "out_of_band"


@dataclass(frozen=True)
class GroupResult:
    """What a group's samples earned.

    rewards: of the scored samples. right: how many of these are right.
    """

    rewards: tuple[float, ...]
    right: int

    @property
    def pass_rate(self) -> float:
        """The share of right samples; nan: none was scored."""
        return self.right / len(self.rewards) if self.rewards else float("nan")


def group_fate(result: GroupResult, dynamic: DynamicSampling | None) -> Fate:
    """A group is kept where its rewards differ (in float32, as the advantages are computed) and its
    pass rate is in the band, ends included."""
    if len(set(np.asarray(result.rewards, np.float32).tolist())) < 2:
        return Fate.NO_SPREAD
    low, high = (0.0, 1.0) if dynamic is None else dynamic.pass_rate
    return Fate.KEPT if low <= result.pass_rate <= high else Fate.OUT_OF_BAND


@dataclass
class Choice:
    """The groups of a phase, numbered in the order of their questions, those that were left by the
    phase before first.

    from_surplus: how many were left. fates: of those that were sampled. kept: numbers of the groups
    to train on.
    """

    from_surplus: int
    fates: list[Fate] = field(default_factory=list)
    kept: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = list(range(self.from_surplus))

    def add(self, results: Sequence[GroupResult], dynamic: DynamicSampling | None) -> None:
        """Decide on the next groups; without dynamic sampling all of them are trained on."""
        for result in results:
            fate = group_fate(result, dynamic)
            if fate is Fate.KEPT or dynamic is None:
                self.kept.append(self.from_surplus + len(self.fates))
            self.fates.append(fate)

    def trained(self, stage: GRPOStage) -> list[int]:
        return self.kept[: stage.questions_per_phase]

    def surplus(self, stage: GRPOStage) -> list[int]:
        return self.kept[stage.questions_per_phase :]


def questions_to_sample(stage: GRPOStage, choice: Choice, sampled: int) -> int:
    """How many questions are sampled next; 0: the phase has its groups, or is at its limit.

    Where samples go on from phase to phase, the first questions are sampled in any case, for the
    phases behind, unless enough groups were left.

    Args:
      choice: of the groups so far. sampled: questions of the phase, so far.
    """
    at_once, kept = stage.questions_at_once, len(choice.kept)
    if stage.tokens_per_phase is not None and not sampled:
        kept = choice.from_surplus
    enough = kept >= stage.questions_per_phase
    return 0 if enough or sampled + at_once > stage.max_questions else at_once


def questions_ahead(wanted: int, kept: int, decided: int, under_way: int) -> int:
    """How many questions to sample beyond those under way, which may not give groups enough.

    A phase that waited for the last of its samples before it took more would leave slots idle. How
    many it takes decides only which samples nothing uses: what it trains on, `questions_to_sample`
    says. An eighth of `wanted` counts as kept beside the results, until these are many.

    Args:
      wanted: groups. kept: of those that are `decided`, which have their rewards.
      under_way: questions that have none yet.
    """
    weight = max(1, wanted // 8)
    share = (kept + weight) / (decided + weight)
    # One standard deviation less than is expected.
    likely = kept + share * under_way - math.sqrt(share * (1 - share) * under_way)
    return max(0, math.ceil((wanted - likely) / share))


def shares(items: Sequence[T], count: int) -> list[list[T]]:
    """Items dealt to `count` processes in their order, to each as many or one less."""
    bounds = [len(items) * part // count for part in range(count + 1)]
    return [list(items[bounds[part] : bounds[part + 1]]) for part in range(count)]


@dataclass(frozen=True)
class Draw(Generic[Q]):
    """Questions that are next, and how many were skipped on the way to them."""

    questions: list[Q]
    skipped: int


def draw_questions(
    following: Callable[[], Q], count: int, skip_until: Mapping[Q, int], step: int, passed: set[Q]
) -> Draw[Q]:
    """The next `count` questions of a stream, without those that are not due.

    Args:
      following: gives the stream's next question.
      skip_until: the step from which on a question is due again.
      passed: questions that the phase has skipped, which is added to. None is skipped twice in a
        phase, or a stream in which none is due would have no end.
    """
    questions: list[Q] = []
    skipped = 0
    while len(questions) < count:
        question = following()
        if step < skip_until.get(question, 0) and question not in passed:
            passed.add(question)
            skipped += 1
        else:
            questions.append(question)
    return Draw(questions, skipped)


def note_settled(
    skip_until: dict[Q, int],
    questions: Sequence[Q],
    results: Sequence[GroupResult],
    step: int,
    look_again_after: int,
) -> None:
    """Put questions that the policy solves always, or never, off for so many steps."""
    for question, result in zip(questions, results, strict=True):
        skip_until.pop(question, None)
        if result.pass_rate in (0.0, 1.0):
            skip_until[question] = step + look_again_after
