"""What training changed, problem by problem: lengths by difficulty, reflection, pass@k.

Of two evaluations of the same problems, before and after. Whether reinforcement learning adds to
what its base can do, or makes likelier what it could do already, shows at large k (arXiv
2504.13837): there the base may solve as many problems.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from r1jax.data.reflection import count_reflections
from r1jax.evaluation.metrics import Estimate, mean_over_problems, unbiased_pass_at_k
from r1jax.files import JsonObject

# Upper ends of the classes of difficulty, by the share of right samples before training.
_CLASSES = ((0.0, "never right"), (0.25, "to 25 %"), (0.5, "to 50 %"), (0.75, "to 75 %"))
_EASIEST = "above 75 %"


@dataclass(frozen=True)
class ProblemFigures:
    """Of one problem's samples. scored: those that the verifier did not fail on; right: of these.
    length, reflections: means over all samples; tokens, and `count_reflections`."""

    right: int
    scored: int
    length: float
    reflections: float


class DifficultyClass(NamedTuple):
    """The problems that were equally hard before training, and their figures before and after."""

    label: str
    problems: int
    right: tuple[Estimate, Estimate]
    length: tuple[Estimate, Estimate]
    reflections: tuple[Estimate, Estimate]


class PassAtK(NamedTuple):
    """gain: pass@k after - before, with an interval over problems (paired).
    solved, lost: problems that were solved in one of the samples after and in none before; and the
    other way round."""

    k: int
    gain: Estimate
    solved: int
    lost: int


def figures_by_problem(
    rows: Iterable[JsonObject], patterns: Sequence[re.Pattern[str]]
) -> dict[int, ProblemFigures]:
    """Of the rows of an evaluation's samples.jsonl, read once."""
    samples: dict[int, list[tuple[str, float, int]]] = {}
    for row in rows:
        reflections = count_reflections(str(row.get("completion") or ""), patterns)
        sample = (str(row["outcome"]), float(row["length"]), reflections)
        samples.setdefault(int(row["problem_id"]), []).append(sample)
    return {
        problem: ProblemFigures(
            right=sum(outcome == "right" for outcome, _, _ in each),
            scored=sum(outcome != "verifier_failed" for outcome, _, _ in each),
            length=math.fsum(length for _, length, _ in each) / len(each),
            reflections=sum(count for _, _, count in each) / len(each),
        )
        for problem, each in sorted(samples.items())
    }


def by_difficulty(
    before: Mapping[int, ProblemFigures], after: Mapping[int, ProblemFigures]
) -> list[DifficultyClass]:
    """Classes of problems by their share of right samples before, the hardest first.

    The problems that both sides have, scored; a class without any is left out. The share that
    decides the class is itself an estimate, so that `before` is too extreme in the outer classes.
    """
    labels = [*(label for _, label in _CLASSES), _EASIEST]
    classes: dict[str, list[int]] = {label: [] for label in labels}
    for problem in _common(before, after):
        share = before[problem].right / before[problem].scored
        label = next((label for end, label in _CLASSES if share <= end), _EASIEST)
        classes[label].append(problem)
    return [
        DifficultyClass(
            label,
            len(problems),
            right=_means(before, after, problems, _share_right),
            length=_means(before, after, problems, lambda each: each.length),
            reflections=_means(before, after, problems, lambda each: each.reflections),
        )
        for label, problems in classes.items()
        if problems
    ]


def pass_at_k_gain(
    before: Mapping[int, ProblemFigures], after: Mapping[int, ProblemFigures]
) -> PassAtK | None:
    """At the largest k that every problem has samples for on both sides; None without problems."""
    problems = _common(before, after)
    if not problems:
        return None
    k = min(side[problem].scored for problem in problems for side in (before, after))

    def solved(side: Mapping[int, ProblemFigures], problem: int) -> float:
        return unbiased_pass_at_k(side[problem].scored, side[problem].right, k)

    gains = [solved(after, problem) - solved(before, problem) for problem in problems]
    never_before, never_after = (
        {problem for problem in problems if not side[problem].right} for side in (before, after)
    )
    return PassAtK(
        k,
        mean_over_problems(gains, is_share=False),
        len(never_before - never_after),
        len(never_after - never_before),
    )


def _common(before: Mapping[int, ProblemFigures], after: Mapping[int, ProblemFigures]) -> list[int]:
    both = sorted(before.keys() & after.keys())
    return [problem for problem in both if before[problem].scored and after[problem].scored]


def _share_right(figures: ProblemFigures) -> float:
    return figures.right / figures.scored


def _means(
    before: Mapping[int, ProblemFigures],
    after: Mapping[int, ProblemFigures],
    problems: Sequence[int],
    value: Callable[[ProblemFigures], float],
) -> tuple[Estimate, Estimate]:
    old, new = (
        mean_over_problems([value(side[p]) for p in problems], is_share=value is _share_right)
        for side in (before, after)
    )
    return old, new
