"""DAPO's soft penalty, worked out by hand from equation 13 of arXiv 2503.14476."""

from __future__ import annotations

import pytest

from r1jax.rewards import REWARDS, Outcome, RewardInput, Score, check_reward, score

OPTIONS = {"max_tokens": 20480, "cache_tokens": 4096}  # the paper's; without penalty: 16384


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (17408, -0.25), (18432, -0.5),
     (20479, -4095 / 4096), (20480, -1.0), (20481, -1.0), (10**9, -1.0)],
)  # fmt: skip
def test_by_hand(length: int, penalty: float) -> None:
    result = REWARDS["overlong"].function(RewardInput("p", "c", "", length=length), OPTIONS)
    assert result == Score(penalty, Outcome.RIGHT if penalty == 0 else Outcome.WRONG)


def test_without_a_cache_it_is_a_step() -> None:
    options = {"max_tokens": 4, "cache_tokens": 0}
    lengths = ([7] * n for n in (4, 5))
    assert [score("c", "", "overlong", options=options, columns={"token_ids": x}).reward
            for x in lengths] == [0.0, -1.0]  # fmt: skip


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="max_tokens = None: must be a whole number of tokens"):
        check_reward("overlong", {})
    with pytest.raises(ValueError, match="cache_tokens = 9 is more than max_tokens = 8"):
        check_reward("overlong", {"max_tokens": 8, "cache_tokens": 9})
    with pytest.raises(ValueError, match="the row has no length"):
        score("c", "", "overlong", options=OPTIONS)
