"""How well the scores of steps fit their labels. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def step_accuracy(scores: ArrayLike, labels: ArrayLike) -> float:
    """The share of steps whose score is on the right side of one half; one half counts a half.

    Args:
      scores: [steps], probabilities of being right.
      labels: [steps] in 0..1; one half or more is right.

    Raises ValueError: no step, or arrays of other shapes.
    """
    probabilities, right = _steps(scores, labels)
    agrees = np.where(probabilities == 0.5, 0.5, (probabilities > 0.5) == right)
    return float(agrees.mean())


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """The probability that a right step scores higher than a wrong one; a tie counts a half.

    The area under the ROC curve, from the ranks of the scores (Mann and Whitney 1947).

    Args:
      scores, labels: as of `step_accuracy`; any scores that are not nan.

    Raises ValueError: as `step_accuracy`; or the labels are of one class, where it has no value.
    """
    values, right = _steps(scores, labels)
    positives = int(right.sum())
    negatives = len(right) - positives
    if not positives or not negatives:
        label = "right" if positives else "wrong"
        raise ValueError(
            f"all {len(right)} labelled steps are {label}: the AUC compares right steps with wrong "
            "ones, and needs both"
        )
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    # Equal scores share the mean of their ranks, which begin with 1.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    wins = float(ranks[right].sum()) - positives * (positives + 1) / 2
    return wins / (positives * negatives)


def _steps(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values, marks = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    if values.ndim != 1 or values.shape != marks.shape or not len(values):
        raise ValueError(
            f"scores {values.shape} and labels {marks.shape} must both be [steps], of one or more"
        )
    if np.isnan(values).any() or np.isnan(marks).any():
        raise ValueError("a score or a label is nan")
    return values, marks >= 0.5
