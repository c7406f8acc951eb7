"""The score of a solution from the scores of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from r1jax.settings.steps import SolutionScore


def solution_score(steps: Sequence[float], how: SolutionScore) -> float:
    """The score of a solution, in 0..1, from those of its steps, each a probability of being right.

    `product` is the probability that all steps are right, if they are independent, and `minimum`
    that of the weakest step (Lightman et al. 2023, arXiv 2305.20050, appendix F, compare the two;
    Wang et al. 2023, arXiv 2312.08935, take the minimum); `last` is the score of the last step.

    Raises ValueError: no step, or a score that is not in 0..1.
    """
    if not steps:
        raise ValueError("a solution without a step has no score")
    for number, score in enumerate(steps, start=1):
        if not 0 <= score <= 1:
            raise ValueError(f"step {number} has the score {score}; needs a probability, 0..1")
    if how == "minimum":
        return min(steps)
    return math.prod(steps) if how == "product" else steps[-1]
