"""Accuracy reward for multiple choice: is the chosen option the reference's?"""

from __future__ import annotations

import unicodedata

from r1jax.rewards.answers.text import plain, read_choice
from r1jax.rewards.extraction import final_answer, unboxed
from r1jax.rewards.registry import Answered, Outcome, RewardOptions, Score, refuse_unknown, reward
from r1jax.rewards.symbolic import UnreadableReference

LETTERS = "ABCDEFGHIJ"
"""Names of the options; some question sets have ten to a question."""


def chosen(answer: str) -> str | None:
    r"""The letter A-J of a final answer, or None if it is not one choice.

    `B`, `b`, `(B)`, `B.`, `option B`, `\text{B}`, and each with the option's text: `B. 12 cm`,
    `(B) 12 cm`. Two choices are none, and so is a text without its letter.
    """
    text = unicodedata.normalize("NFKC", unboxed(answer))  # full-width letters and brackets
    letter = read_choice(text, letters=LETTERS, with_text=True)
    return letter or read_choice(plain(text).upper(), letters=LETTERS)


def _check(options: RewardOptions) -> None:
    refuse_unknown("choice", options, ())


@reward("choice", check=_check)
def choice(row: Answered, options: RewardOptions) -> Score:
    """1 if the final answer names the reference's option, else 0.

    Raises:
      UnreadableReference: the reference answer is no choice: the row cannot be scored.
    """
    reference = chosen(row.answer)
    if reference is None:
        raise UnreadableReference(
            f"reference answer {row.answer[:200]!r} is no choice: give a letter A to J"
        )
    extracted = final_answer(row.completion)
    letter = None if extracted is None else chosen(extracted)
    if letter is None:
        return Score(0.0, Outcome.UNPARSEABLE, extracted)
    return Score.binary(letter == reference, letter)
