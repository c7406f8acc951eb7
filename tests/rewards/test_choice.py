"""Multiple choice: which letter an answer names, if one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.rewards import REWARDS, Outcome, RewardInput, Score, check_reward, same_answer
from r1jax.rewards.choice import LETTERS, chosen
from r1jax.rewards.symbolic import UnreadableReference


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("( b )", "B"),
        ("J", "J"),
        ("(j)", "J"),
        ("B. 12 cm", "B"),
        ("B) 12 cm", "B"),
        ("B: the mitochondrion", "B"),
        ("(H) both of them", "H"),
        ("(B)\n12 cm", "B"),
        ("B. Both (A) and (C)", "B"),  # what the option says
        ("C. D", "C"),
        ("B. A dog", "B"),
        ("D. Neither A nor B", "D"),
        ("D. A and B only", "D"),
        ("B. Plan A", "B"),
        ("B. Vitamin A.", "B"),
        ("(B), I think", "B"),
        ("option B", "B"),
        ("Choice (b)", "B"),
        ("The answer is B.", "B"),
        ("**B**", "B"),
        ("$B$", "B"),
        ("\\text{B}", "B"),
        ("\\textbf{(B) } 12", "B"),
        ("\\boxed{B}", "B"),
        ("Ｂ", "B"),
        ("（B）", "B"),
        # Not one choice.
        ("A, B", None),
        ("A or B", None),
        ("(A) or (B)", None),
        ("(A), (B)", None),
        ("(A) / B", None),
        ("A. or B.", None),
        ("(B)(A)", None),
        ("(B) 12 (A) 13", None),
        ("B. 12 cm A. 13 cm", None),
        ("(B) (A)", None),
        ("B: also A", None),
        ("B; A", None),
        ("B: A too", None),
        ("B, maybe (C)", None),
        ("(B) 12 or D", None),
        ("B: and A", None),
        ("AB", None),
        ("K", None),
        ("(k)", None),
        ("Both", None),
        ("12 cm", None),
        ("B 12", None),
        ("I think so", None),
        ("", None),
    ],
)
def test_chosen(answer: str, letter: str | None) -> None:
    assert chosen(answer) == letter


def test_maths_reads_no_letter_beyond_e_and_not_two_choices() -> None:
    assert same_answer("F", "F. 12", use_sympy=False) is False  # F may be a force
    assert same_answer("B", "B. 12", use_sympy=False)
    assert not same_answer("A", "(A) or (B)", use_sympy=False)


def score(completion: str, answer: str = "B") -> Score:
    return REWARDS["choice"].function(RewardInput("p", completion, answer), {})


def test_reward() -> None:
    assert score("<think>A?</think><answer>(b) 12</answer>") == Score(1.0, Outcome.RIGHT, "B")
    assert score("<think>B?</think>So \\boxed{\\text{C}}.") == Score(0.0, Outcome.WRONG, "C")
    assert score("<think>B?</think>B") == Score(0.0, Outcome.UNPARSEABLE)
    assert score("<think>\\boxed{B}") == Score(0.0, Outcome.UNPARSEABLE)
    assert score("\\boxed{A or B}") == Score(0.0, Outcome.UNPARSEABLE, "A or B")
    assert score("\\boxed{B}", "(B) 12 cm").outcome is Outcome.RIGHT


@given(
    st.sampled_from(LETTERS),
    st.sampled_from(LETTERS),
    st.sampled_from(["{}", "({})", "{}.", "({}) one of them", "{}: x"]),
)
def test_right_exactly_for_the_same_letter(reference: str, given: str, form: str) -> None:
    got = score(f"<answer>{form.format(given)}</answer>", reference)
    assert got == Score(float(given == reference), got.outcome, given)
    assert (got.outcome is Outcome.RIGHT) == (given == reference)


@pytest.mark.parametrize("reference", ["", "12 cm", "K", "A, B"])
def test_a_reference_that_is_no_choice_fails_the_row_and_not_the_model(reference: str) -> None:
    with pytest.raises(UnreadableReference, match="is no choice: give a letter A to J"):
        score("\\boxed{B}", reference)


def test_no_options() -> None:
    with pytest.raises(ValueError, match="rewards.choice.options.letters: no such option"):
        check_reward("choice", {"letters": "AB"})
