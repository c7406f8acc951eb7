"""Accuracy and AUC of steps against all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from r1jax.evaluation.step_metrics import roc_auc, step_accuracy


def auc_by_pairs(scores: np.ndarray, right: np.ndarray) -> float:
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[right] for b in scores[~right]]
    return float(np.mean(wins))


@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_auc_is_the_share_of_pairs_in_the_right_order(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for size in (2, 3, 40):
        right = np.arange(size) % 3 == 0
        scores = rng.integers(0, levels, size) / levels
        rng.shuffle(right)
        assert roc_auc(scores, right) == pytest.approx(auc_by_pairs(scores, right), abs=1e-12)


def test_figures_by_hand() -> None:
    scores, labels = [0.9, 0.4, 0.5, 0.2], [1, 0.75, 0, 0.25]  # right, right, wrong, wrong
    assert step_accuracy(scores, labels) == (1 + 0 + 0.5 + 1) / 4
    assert roc_auc(scores, labels) == 3 / 4
    assert roc_auc([1, 2, 3], [0, 1, 1]) == 1 and roc_auc([1, 2, 3], [1, 0, 0]) == 0


def test_one_class_has_no_auc() -> None:
    for label, name in ((1, "right"), (0, "wrong")):
        with pytest.raises(ValueError, match=f"all 2 labelled steps are {name}"):
            roc_auc([0.1, 0.2], [label, label])
    assert step_accuracy([0.1, 0.2], [1, 1]) == 0


@pytest.mark.parametrize(("scores", "labels"), [([], []), ([1], [1, 0]), ([[1]], [[1]])])
def test_other_shapes_are_refused(scores: list[float], labels: list[float]) -> None:
    for figure in (roc_auc, step_accuracy):
        with pytest.raises(ValueError, match="must both be"):
            figure(scores, labels)
    with pytest.raises(ValueError, match="nan"):
        step_accuracy([float("nan")], [1])
