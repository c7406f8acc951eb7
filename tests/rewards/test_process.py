"""A solution's score from its steps', by hand."""

from __future__ import annotations

import pytest

from r1jax.rewards.process import solution_score


def test_scores_by_hand() -> None:
    steps = [0.9, 0.5, 0.8]
    assert solution_score(steps, "minimum") == 0.5
    assert solution_score(steps, "product") == pytest.approx(0.36)
    assert solution_score(steps, "last") == 0.8
    for how in ("minimum", "product", "last"):
        assert solution_score([0.25], how) == 0.25


def test_what_is_no_probability_is_refused() -> None:
    with pytest.raises(ValueError, match="without a step"):
        solution_score([], "last")
    for bad in (float("nan"), 1.5, -0.1):
        with pytest.raises(ValueError, match="step 2 has the score"):
            solution_score([0.5, bad], "minimum")
