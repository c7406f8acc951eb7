"""Best of N and weighted votes against all subsets, and by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from r1jax.evaluation.metrics import expected_vote, summarise, unbiased_pass_at_k
from r1jax.evaluation.selection import expected_best, weighted_vote


@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_the_best_of_k_is_the_mean_over_all_subsets(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for n in (1, 2, 6):
        scores, correct = rng.integers(0, levels, n) / levels, rng.integers(0, 2, n)
        for k in range(1, n + 1):
            means = [
                correct[[i for i in chosen if scores[i] == max(scores[list(chosen)])]].mean()
                for chosen in map(list, itertools.combinations(range(n), k))
            ]
            assert expected_best(scores, correct, k) == pytest.approx(np.mean(means), abs=1e-12)


def test_the_best_by_a_score_that_knows_is_pass_at_k() -> None:
    correct = np.array([1, 0, 0, 1, 0])
    for k in range(1, 6):
        assert expected_best(correct, correct, k) == pytest.approx(unbiased_pass_at_k(5, 2, k))
    # And a constant one is a random choice.
    assert expected_best(np.ones(5), correct, 3) == pytest.approx(0.4)


def test_a_sample_without_a_score_is_the_last_choice() -> None:
    assert expected_best([np.nan, -5.0], [1, 0], 2) == 0
    assert expected_best([np.nan, np.nan], [1, 0], 2) == 0.5


def test_weighted_votes_by_hand() -> None:
    classes, correct = [0, 0, 1, -1], [0, 0, 1, 0]
    assert weighted_vote(classes, correct, [0.2, 0.2, 0.5, 9]) == 1
    assert weighted_vote(classes, correct, [0.3, 0.3, 0.5, 0]) == 0
    assert weighted_vote(classes, correct, [0.1, 0.2, 0.3, 0]) == 0.5  # a tie, but for rounding
    assert weighted_vote(classes, correct, [np.nan, 0.1, 0.2, 0]) == 1
    assert weighted_vote([-1, -1], [0, 0], [1, 1]) == 0
    assert weighted_vote([0, 0], [1, 0], [1, 1]) == 0.5


def test_equal_weights_are_the_majority_vote() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        classes = rng.integers(-1, 3, 6)
        correct = (classes == 1) & (rng.random(6) < 0.9)
        expected = expected_vote(classes, correct, 6)
        assert weighted_vote(classes, correct, np.full(6, 0.7)) == pytest.approx(expected)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="k must lie in 1..n"):
        expected_best([1.0], [1], 2)
    with pytest.raises(ValueError, match="0 or more"):
        weighted_vote([0], [1], [-0.1])
    with pytest.raises(ValueError, match="differ in shape"):
        weighted_vote([0, 1], [1], [1])


def test_a_summary_by_hand() -> None:
    # Two problems of three samples: (outcome, answer, score).
    samples = [
        [("right", "4", 0.9), ("wrong", "5", 0.2), ("wrong", "5", 0.3)],
        [("wrong", "7", 0.8), ("right", "8", 0.4), ("verifier_failed", None, 0.99)],
    ]
    rows = [
        {
            "problem_id": problem,
            "sample": sample,
            "outcome": outcome,
            "extracted": answer,
            "length": 1,
            "parts": {"process": score, "margin": -score},
        }
        for problem, of_problem in enumerate(samples)
        for sample, (outcome, answer, score) in enumerate(of_problem)
    ]
    summary = summarise(rows, same_answer=str, chosen_by=["process", "margin"])
    process = summary["chosen_by"]["process"]
    # The best of two: of the first problem in two of three pairs right; of the second, of whose
    # samples two are scored, the wrong one.
    assert process["best_of_2"]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert process["best_of_3"]["value"] == 0.5
    assert process["weighted_vote"]["value"] == 0.5 and summary["cons_at_3"]["value"] == 0.25
    assert "weighted_vote" not in summary["chosen_by"]["margin"]  # scores below 0 weigh nothing
    assert summary["chosen_by"]["margin"]["best_of_3"]["value"] == 0.5
    assert "chosen_by" not in summarise(rows, same_answer=str)
