"""Evaluation figures against brute force over all subsets, and the cases that bite."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from r1jax.evaluation import metrics


def subsets(n: int, k: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(n), k))


def vote_by_hand(classes: list[int], correct: list[bool]) -> float:
    counts = Counter(c for c in classes if c >= 0)
    if not counts:
        return 0.0
    winners = [c for c, votes in counts.items() if votes == max(counts.values())]
    shares = []
    for winner in winners:
        members = [correct[i] for i, c in enumerate(classes) if c == winner]
        shares.append(sum(members) / len(members))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            expected = np.mean([min(chosen) < c for chosen in subsets(n, k)])
            assert metrics.unbiased_pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_does_not_overflow() -> None:
    assert metrics.unbiased_pass_at_k(5000, 1, 2500) == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(12))
def test_cons_at_k_is_the_mean_over_all_subsets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 9))
    classes = [int(c) for c in rng.integers(-1, 4, n)]
    # Correct by class for even seeds; mixed inside a class for odd ones.
    correct = [c == 0 for c in classes] if seed % 2 == 0 else [bool(b) for b in rng.random(n) < 0.5]
    correct = [b and c >= 0 for b, c in zip(correct, classes, strict=True)]
    for k in range(1, n + 1):
        draws = [
            vote_by_hand([classes[i] for i in s], [correct[i] for i in s]) for s in subsets(n, k)
        ]
        got = metrics.expected_vote(classes, correct, k)
        assert got == pytest.approx(np.mean(draws), abs=1e-10), (classes, correct, k)


def test_vote_cases() -> None:
    # A majority of wrong votes beats the right ones; silence never wins, however common.
    assert metrics.expected_vote([0, 1, 1], [True, False, False], 3) == 0
    assert metrics.expected_vote([-1, -1, -1, 0], [False, False, False, True], 4) == 1
    assert metrics.expected_vote([-1, -1], [False, False], 2) == 0
    # A tie of a right and two wrong classes is right one time in three.
    assert metrics.expected_vote([0, 1, 2], [True, False, False], 3) == pytest.approx(1 / 3)
    # 1000 of 2000 with two equal classes: even odds, and nothing overflows.
    halves = np.repeat([0, 1], 1000)
    assert metrics.expected_vote(halves, halves == 0, 16) == pytest.approx(0.5, abs=1e-9)


def test_one_vote_is_pass_at_1() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 4, (20, 8))
    one = metrics.cons_at_k(classes, classes == 0, 1)
    assert one.value == pytest.approx(metrics.pass_at_k(classes == 0, 1).value)


def test_interval_is_clustered_on_problems() -> None:
    # 50 problems, each all right or all wrong: 64 samples must not narrow the interval.
    correct = np.repeat(np.arange(50)[:, None] < 20, 64, axis=1)
    estimate = metrics.pass_at_k(correct, 1)
    standard_error = math.sqrt(0.4 * 0.6 / 50)
    assert estimate.value == pytest.approx(0.4)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * standard_error, rel=0.08)
    assert metrics.pass_at_k(correct, 1) == estimate  # a fixed seed
    # The same share with every problem at 0.4 within itself is far better known.
    rng = np.random.default_rng(1)
    spread = metrics.pass_at_k(rng.random((50, 64)) < 0.4, 1)
    assert spread.high - spread.low < 0.25 * (estimate.high - estimate.low)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(60):
        rates = rng.beta(1.0, 1.5, 80)
        estimate = metrics.pass_at_k(rng.random((80, 8)) < rates[:, None], 1)
        hits += estimate.low <= 0.4 <= estimate.high
    assert 52 <= hits <= 60


def test_where_the_bootstrap_is_degenerate() -> None:
    sure = metrics.pass_at_k(np.ones((30, 16), bool), 1)
    assert sure.value == sure.high == 1
    assert sure.low == pytest.approx(0.8865, abs=1e-4)  # Wilson, 30 of 30
    never = metrics.pass_at_k(np.zeros((30, 16), bool), 1)
    assert (never.value, never.low) == (0, 0)
    assert never.high == pytest.approx(1 - 0.8865, abs=1e-4)
    # One problem: half its samples right says next to nothing about problems.
    single = metrics.pass_at_k([[True, False]], 1)
    assert single.low < 0.1 and single.high > 0.9
    constant = metrics.mean_over_problems([7.0, 7.0], is_share=False)
    assert constant == metrics.Estimate(7.0, 7.0, 7.0)
    lone = metrics.mean_over_problems([7.0], is_share=False)
    assert lone.to_json() == {"value": 7.0, "low": None, "high": None}


def test_unscored_samples_are_left_out() -> None:
    correct = np.array([[True, True, False, False], [True, False, False, False]])
    scored = np.array([[True, True, False, False], [True, True, True, True]])
    assert metrics.pass_at_k(correct, 1, scored).value == pytest.approx((1 + 0.25) / 2)
    # The first problem has two scored samples: its pass@4 is its pass@2.
    assert metrics.pass_at_k(correct, 4, scored).value == 1
    gone = np.array([[False] * 4, [True] * 4])
    assert metrics.pass_at_k(correct, 1, gone).value == 0.25
    with pytest.raises(ValueError, match="failed on every one"):
        metrics.pass_at_k(correct, 1, np.zeros_like(correct))


def row(problem: int, sample: int, outcome: str, extracted: str | None, length: int = 5) -> Any:
    return {
        "problem_id": problem,
        "sample": sample,
        "outcome": outcome,
        "extracted": extracted,
        "length": length,
        "finish_reason": "length" if length == 99 else "stop",
    }


ROWS = [
    # Two spellings of the right answer outvote "3" only when they are counted together, and
    # the two without an answer must not shift the samples after them.
    row(7, 0, "unparseable", None, 99),
    row(7, 1, "right", "1/2"),
    row(7, 2, "wrong", "3"),
    row(7, 3, "right", "0.5"),
    row(4, 0, "wrong", "1"),
    row(4, 1, "wrong", "1"),
    row(4, 2, "right", "2"),
    row(4, 3, "verifier_failed", "9^9^9"),
]


def same(text: str) -> str:
    return {"0.5": "1/2"}.get(text, text)


def test_summarise() -> None:
    summary = metrics.summarise(ROWS, same_answer=same)
    assert summary["pass_at_1"]["value"] == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert summary["cons_at_4"]["value"] == pytest.approx((1 + 0) / 2)
    assert summary["pass_at_4"]["value"] == 1
    assert summary["mean_length"]["value"] == pytest.approx((99 + 7 * 5) / 8)
    counts = {name: value for name, value in summary.items() if not isinstance(value, dict)}
    assert counts == {
        "problems": 2,
        "samples": 4,
        "unscored_samples": 1,
        "unscored_problems": 0,
        "unanswered_samples": 1,
        "truncated_samples": 1,
    }
    assert summary["outcomes"] == {"right": 3, "unparseable": 1, "verifier_failed": 1, "wrong": 3}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    # Not by whole texts: taken as written, three answers tie with one vote each.
    as_written = metrics.summarise(ROWS[:4], same_answer=str, ks=[4])
    assert as_written["cons_at_4"]["value"] == pytest.approx(2 / 3)


def test_a_reward_that_names_no_answers_gives_no_votes() -> None:
    """As one that returns a number; a model that gives no answers is wrong by its votes."""
    numbers = [
        row(problem, sample, outcome, None)
        for problem in (1, 2)
        for sample, outcome in enumerate(("right", "wrong", "right"))
    ]
    parts = [each | {"parts": {"mine": 0.5}} for each in numbers]
    summary = metrics.summarise(parts, same_answer=same, chosen_by=["mine"])
    assert summary["pass_at_1"]["value"] == pytest.approx(2 / 3)
    assert summary["cons_at_2"] == {"value": None, "low": None, "high": None}
    assert summary["unanswered_samples"] is None
    assert set(summary["chosen_by"]["mine"]) == {"best_of_2", "best_of_3"}
    silent = [row(1, sample, "unparseable", None) for sample in range(3)]
    summary = metrics.summarise(silent, same_answer=same)
    assert summary["cons_at_3"]["value"] == 0 and summary["unanswered_samples"] == 3


def test_figures_by_domain_are_those_of_its_rows_alone() -> None:
    rows = [each | {"domain": "code" if each["problem_id"] == 7 else "maths"} for each in ROWS]
    summary = metrics.summarise(rows, same_answer=same)
    parts = summary.pop("by_domain")
    assert summary == metrics.summarise(ROWS, same_answer=same)
    for domain, problem in (("code", 7), ("maths", 4)):
        alone = [each for each in rows if each["problem_id"] == problem]
        assert parts[domain] == metrics.summarise(alone, same_answer=same)
    assert list(parts) == ["code", "maths"]
    one = [each | {"domain": "maths"} for each in ROWS]
    assert "by_domain" not in metrics.summarise(one, same_answer=same)


def test_mean_of_each_reward() -> None:
    # A failed reward is no zero, and a reward of another domain is no reward of this one.
    parts = [
        {"format": 1.0, "helpful": -2.5},
        {"format": 0.0, "helpful": "nan"},
        {"format": 1.0, "helpful": None},
        {"format": 1.0, "helpful": 0.5},
        *[{"format": 0.5, "helpful": math.nan}] * 4,
    ]
    rows = [each | {"parts": part} for each, part in zip(ROWS, parts, strict=True)]
    found = metrics.summarise(rows, same_answer=same)["parts"]
    assert found["format"]["value"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["helpful"] == {"value": -1.0, "low": None, "high": None}  # one problem has it
    # All right is no certainty for a share, but a score may well be the same everywhere.
    for value, low in ((1.0, 0.34), (3.0, 3.0)):
        rows = [each | {"parts": {"reward": value}} for each in ROWS]
        figure = metrics.summarise(rows, same_answer=same)["parts"]["reward"]
        assert figure["value"] == value and figure["low"] == pytest.approx(low, abs=0.01)
    assert "parts" not in metrics.summarise(ROWS, same_answer=same)


def test_summarise_does_not_depend_on_the_order_of_rows() -> None:
    assert metrics.summarise(ROWS[::-1], same_answer=same) == metrics.summarise(
        ROWS, same_answer=same
    )


def test_summarise_where_nothing_was_scored() -> None:
    rows = [row(p, 0, "verifier_failed", None) for p in range(3)]
    summary = metrics.summarise(rows, same_answer=str)
    assert summary["pass_at_1"] == {"value": None, "low": None, "high": None}
    assert summary["unscored_problems"] == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no samples"),
        ([*ROWS, ROWS[0]], "problem_id = 7 has sample = 0 twice"),
        (ROWS[:-1], "has 3 samples|has 4 samples"),
    ],
)
def test_summarise_refuses(rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.summarise(rows, same_answer=same)


def test_figures_of_several_attempts_by_hand() -> None:
    """Two problems of two samples: mended, spoilt; right twice, and one that was not scored."""
    problems = [
        [("wrong", "right"), ("right", "unparseable")],
        [("right", "right"), ("verifier_failed", "right")],
    ]
    figures = metrics.attempt_figures(problems)
    assert {name: each["value"] for name, each in figures.items()} == {
        **{"right_1": 0.75, "right_2": 0.75, "difference": 0, "mended": 0.25, "spoilt": 0.25}
    }
    assert metrics.attempt_figures([[("right",)], [("wrong",)]]) == {}
    assert metrics.attempt_figures([[("verifier_failed", "right")]]) == {}


def test_a_summary_has_the_attempts_of_its_rows() -> None:
    rows = [
        {
            **{"problem_id": p, "sample": 0, "outcome": last, "extracted": None, "length": 2},
            "turns": [
                {"role": "assistant", "outcome": first},
                {"role": "user", "text": "Again."},
                {"role": "assistant", "outcome": last},
            ],
        }
        for p, (first, last) in enumerate([("wrong", "right"), ("right", "right")])
    ]
    summary = metrics.summarise(rows, same_answer=str)
    figures = summary["attempts"]
    assert (figures["right_1"]["value"], figures["right_2"]["value"]) == (0.5, 1.0)
    assert summary["pass_at_1"]["value"] == 1.0
    without = [{k: v for k, v in row.items() if k != "turns"} for row in rows]
    assert "attempts" not in metrics.summarise(without, same_answer=str)
