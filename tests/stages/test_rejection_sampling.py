"""Which samples are kept, and why the others are not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from r1jax.data.decontamination import EvaluationNgrams
from r1jax.data.mixing import mixed_id, mixture_counts
from r1jax.data.prompts import Prompt
from r1jax.rewards.filters import load_filters
from r1jax.stages.rejection_sampling.stage import choose, summary_line


def prompt(problem_id: int, question: str) -> Prompt:
    ids = np.asarray([1], np.int32)
    return Prompt(problem_id, f"{question}<think>", "<think>", ids, question, "4", "maths")


def row(problem_id: int, sample: int, completion: str, **changes: Any) -> dict[str, Any]:
    return {
        "problem_id": problem_id,
        "sample": sample,
        "completion": completion,
        "outcome": "right",
        "finish_reason": "eos",
        **changes,
    }


PROMPTS = {
    0: prompt(0, "How much is two and two?"),
    1: prompt(1, "What is asked in the examination of this year?"),
    2: prompt(2, "How much is two and two?"),  # the same question once more
    3: Prompt(3, "Say it.", "", np.asarray([1], np.int32), "Say it.", "", ""),
}
GOOD = "two and two make four</think> It is 4."


def reasons(rows: list[dict[str, Any]], keep: int = 2) -> list[str | None]:
    evaluation = EvaluationNgrams.of(["What is asked in the examination of this year?"], n=5)
    filters = load_filters({"format": {"style": "think"}, "length": {"min_words": 3}})
    chosen = choose(rows, PROMPTS, filters=filters, evaluation=evaluation, keep_per_prompt=keep)
    return [reason for _, reason in chosen]


def test_every_reason_in_its_order() -> None:
    assert reasons(
        [
            row(0, 0, GOOD),
            row(0, 1, "it is", finish_reason="length", outcome="unparseable"),
            row(0, 2, GOOD, outcome="wrong"),
            row(0, 3, GOOD, outcome="verifier_failed"),
            row(0, 4, "two and two make four"),  # never closed, whatever a reward says
            row(0, 5, "four</think>4"),
            row(0, 6, f"{GOOD} "),
            row(0, 7, f"well, {GOOD}"),
            row(0, 8, f"so, {GOOD}"),
            row(1, 0, GOOD),
            row(3, 0, " "),
        ]
    ) == [
        None,
        "truncated",
        "wrong",
        "verifier_failed",
        "filter format",
        "filter length",
        "duplicate",
        None,
        "surplus",
        "contaminated",
        "blank",
    ]


def test_a_question_that_occurs_twice_does_not_give_a_text_twice() -> None:
    assert reasons([row(0, 0, GOOD), row(2, 0, GOOD), row(2, 1, f"well, {GOOD}")]) == [
        None,
        "duplicate",
        None,
    ]


def test_at_most_so_many_of_each_prompt() -> None:
    rows = [row(i, s, f"say {i} {s}: {GOOD}") for i in (0, 2) for s in range(4)]
    assert Counter(reasons(rows, keep=3)) == {None: 6, "surplus": 2}


def test_counts_are_told_with_the_commonest_first() -> None:
    counts = {"kept": 2, "wrong": 3, "filter format": 7, "surplus": 3}
    assert summary_line(counts) == "2 kept of 15: 7 filter format, 3 surplus, 3 wrong"
    assert summary_line({"kept": 4}) == "4 kept of 4"


def test_the_part_that_runs_out_first_sets_the_size_of_a_mixture() -> None:
    # The paper's 800K: all of 600,000 reasoning and 200,000 other rows at 3 : 1.
    assert mixture_counts({"r": 600_000, "o": 200_000}, {"r": 3, "o": 1}) == {
        "r": 600_000,
        "o": 200_000,
    }
    assert mixture_counts({"a": 10, "b": 1000}, {"a": 0.1, "b": 0.3}) == {"a": 10, "b": 30}
    # So many rows in all, at the shares: 7 at 2 : 1 : 1 are 3.5, 1.75 and 1.75.
    many, shares = dict.fromkeys("abc", 100), {"a": 2, "b": 1, "c": 1}
    assert mixture_counts(many, shares, 8) == {"a": 4, "b": 2, "c": 2}
    assert mixture_counts(many, shares, 7) == {"a": 3, "b": 2, "c": 2}
    with pytest.raises(ValueError, match="12 rows need 6 of a, which has 5"):
        mixture_counts({"a": 5, "b": 9, "c": 9}, shares, 12)
    with pytest.raises(ValueError, match="c .* would have no row"):
        mixture_counts(many, shares, 2)
    with pytest.raises(ValueError, match="b .* would have no row"):
        mixture_counts({"a": 5, "b": 5}, {"a": 0.99, "b": 0.01})
    ids = {mixed_id(row, part, 3) for part in range(3) for row in range(50)}
    assert len(ids) == 150
