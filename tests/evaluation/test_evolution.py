"""What training changed, problem by problem, on numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from r1jax.config.load import load_config
from r1jax.config.run_config import RunConfig
from r1jax.data.reflection import count_reflections
from r1jax.evaluation.evolution import by_difficulty, figures_by_problem, pass_at_k_gain
from r1jax.settings.reflection import compile_patterns
from r1jax.settings.section import SettingError


def rows(*problems: str, length: int = 10, text: str = "") -> list[dict[str, Any]]:
    """Samples of each problem: r right, w wrong, f verifier failed."""
    outcomes = {"r": "right", "w": "wrong", "f": "verifier_failed"}
    return [
        {"problem_id": problem, "sample": sample, "outcome": outcomes[letter]}
        | {"length": length + sample, "completion": text * sample}
        for problem, letters in enumerate(problems)
        for sample, letter in enumerate(letters)
    ]


def test_the_papers_words_are_counted_as_words() -> None:
    words = compile_patterns(RunConfig.model_fields["reflections"].default)
    text = "Wait, wait! await; but waiting. HOWEVER, I re-check this error; checked, unmistaken"
    assert count_reflections(text, words) == 6
    both = compile_patterns([r"\b(wait|but)\b", "aha"])
    assert count_reflections("Wait, but await. AHA, ahaha", both) == 2 + 2


def test_a_pattern_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1jax.data.limits.PATTERN_SECONDS", 0.2)
    with pytest.raises(SettingError, match=r"reflections: takes longer than 0.2 s .* 61 char"):
        count_reflections("a" * 60 + "b", compile_patterns([r"(?:a+)+$"]))


def test_a_step_that_is_worked_again_is_reflection_in_the_miniature() -> None:
    patterns = compile_patterns(load_config("tiny/r1_zero").reflections)
    once = "<think>7+5=12 12-3=9 9+9=18</think><answer>18</answer>"
    assert count_reflections(once, patterns) == 0
    assert count_reflections("<think>7+5=11 7+5=12 12-3=9</think>", patterns) == 1
    assert count_reflections("<think>7+5=11 7+5=12 7+5=12</think>", patterns) == 2
    assert count_reflections("<think>17+5=22 7+5=12</think>", patterns) == 0
    assert count_reflections("<think>7+5=12 17+5=22</think>", patterns) == 0


@pytest.mark.parametrize(
    ("pattern", "problem"), [("(", "not a regular expression"), ("a*", "matches the empty text")]
)
def test_a_pattern_that_counts_nothing_is_refused_with_the_config(
    pattern: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=f"reflections.*{problem}"):
        load_config("tiny/r1_zero", [f"reflections=['{pattern}']"])


def test_classes_of_difficulty_by_hand() -> None:
    patterns = compile_patterns(["x"])
    before = figures_by_problem(rows("wwww", "wwff", "rwww", "rrww", "rrrr", "ffff"), patterns)
    after = figures_by_problem(
        rows("rrww", "wwww", "rrrr", "rrrw", "rrrr", "rrrr", length=20, text="x"), patterns
    )
    classes = by_difficulty(before, after)
    assert [(each.label, each.problems) for each in classes] == [
        ("never right", 2),
        ("to 25 %", 1),
        ("to 50 %", 1),
        ("above 75 %", 1),
    ]
    hardest = classes[0]
    assert [each.value for each in hardest.right] == [0.0, 0.25]  # means of 0, 0 and of 1/2, 0
    assert [each.value for each in hardest.length] == [11.5, 21.5]
    assert [each.value for each in hardest.reflections] == [0.0, 1.5]
    assert math.isnan(classes[1].length[0].low)  # of one problem


def test_more_samples_of_the_start_against_those_after_training() -> None:
    before = figures_by_problem(rows("wwww", "rwww", "rrww"), [])
    after = figures_by_problem(rows("rwww", "wwww", "rrrr"), [])
    gain = pass_at_k_gain(before, after)
    assert gain is not None
    assert (gain.k, gain.solved, gain.lost) == (4, 1, 1)
    assert gain.gain.value == 0.0 and gain.gain.low < 0 < gain.gain.high
    # Of three scored samples: pass@3 of one right in four is 3/4.
    after = figures_by_problem(rows("rwwf", "wwww", "rrrr"), [])
    gain = pass_at_k_gain(before, after)
    assert gain is not None and gain.k == 3
    assert gain.gain.value == pytest.approx(((1 - 0) + (0 - 3 / 4) + (1 - 1)) / 3)
    assert pass_at_k_gain(before, {}) is None
