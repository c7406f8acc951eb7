"""The best of several samples, and votes weighted by scores. Pure numpy.

Scores are those of an outcome or a process reward model, or of any reward: Cobbe et al. 2021 (arXiv
2110.14168) take the best of N, Li et al. 2023 (arXiv 2206.02336) weigh votes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def expected_best(scores: ArrayLike, correct: ArrayLike, k: int) -> float:
    """Expected correctness, in [0, 1], of the sample with the highest score among k of n.

    Over draws without replacement, exactly: with ascending scores, sample i (from 0) is the best of
    C(i, k - 1) of the C(n, k) draws. Samples with equal scores share their draws equally. A sample
    without a score (nan) is chosen only where no other is.

    Args:
      scores: [n]. correct: [n] booleans.

    Raises ValueError: other shapes, or k is not in 1..n.
    """
    values, right = _samples(scores, correct)
    n = len(values)
    if not 1 <= k <= n:
        raise ValueError(f"the best of k = {k} of n = {n} samples: k must lie in 1..n")
    values = np.where(np.isnan(values), -math.inf, values)
    total, below = 0.0, 0
    draws = math.comb(n, k)
    for value in np.unique(values):
        tied = values == value
        upto = below + int(tied.sum())
        share = (math.comb(upto, k) - math.comb(below, k)) / draws
        total += share * float(right[tied].mean())
        below = upto
    return total


def weighted_vote(classes: ArrayLike, correct: ArrayLike, weights: ArrayLike) -> float:
    """Correctness, in [0, 1], of the answer whose samples have the greatest weight together.

    Answers that tie share the win equally; a sample without an answer, or without a weight (nan),
    does not vote, and without any vote the result is wrong. An answer with right and wrong samples
    counts with its share of right ones. With equal weights it is the majority vote.

    Args:
      classes: [n] integers, equal for equal answers; negative: no answer.
      correct: [n] booleans. weights: [n], 0 or more.

    Raises ValueError: other shapes, or a weight below 0, as of rewards that are no probabilities.
    """
    values, right = _samples(weights, correct)
    labels = np.asarray(classes)
    if labels.shape != values.shape:
        raise ValueError(f"classes {labels.shape} and weights {values.shape} differ in shape")
    if (values < 0).any():
        raise ValueError(f"weight = {np.nanmin(values)}: votes are weighted by 0 or more")
    votes = (labels >= 0) & ~np.isnan(values)
    answers = np.unique(labels[votes])
    if not len(answers):
        return 0.0
    sums = np.array([math.fsum(values[votes & (labels == answer)]) for answer in answers])
    best = answers[np.isclose(sums, sums.max(), rtol=1e-12, atol=0)]
    return float(np.mean([right[labels == answer].mean() for answer in best]))


def _samples(scores: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values, right = np.asarray(scores, np.float64), np.asarray(correct, np.float64)
    if values.ndim != 1 or values.shape != right.shape or not len(values):
        raise ValueError(
            f"scores {values.shape} and correct {right.shape} must both be [samples], of one or "
            "more"
        )
    return values, right
