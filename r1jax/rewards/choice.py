"""Accuracy reward for multiple choice: is the chosen option the reference's?"""

from __future__ import annotations

import re
import unicodedata

from r1jax.rewards.answers.text import plain, read_choice
from r1jax.rewards.extraction import final_answer, unboxed
from r1jax.rewards.registry import (
    Outcome,
    RewardInput,
    RewardOptions,
    Score,
    refuse_unknown,
    reward,
)
from r1jax.rewards.symbolic import UnreadableReference

LETTERS = "ABCDEFGHIJ"
"""Names of the options; some question sets have ten to a question."""


def chosen(answer: str) -> str | None:
    r"""The letter A-J of a final answer, or None if it is not one choice.

    `B`, `b`, `(B)`, `B.`, `option B`, `\text{B}`, and each with the option's text: `B. 12 cm`,
    `(B) 12 cm`. Two choices are none (`(B)(A)`, `B: also A`), and so is a text without its letter;
    an option's text may name others: `B. Both (A) and (C)`.
    """
    text = unicodedata.normalize("NFKC", unboxed(answer))  # full-width letters and brackets
    alone = read_choice(text, letters=LETTERS) or read_choice(plain(text).upper(), letters=LETTERS)
    if alone is not None:
        return alone
    letter = read_choice(text, letters=LETTERS, with_text=True)
    return None if letter is not None and _names_another(plain(text), letter) else letter


# A letter with a small word after it is a word itself: `I think`, `A dog`.
_WORDS_BEHIND = r"(?:too|also|as|or|and|instead|maybe|perhaps|only)\b"
_ANY = (
    rf"(?:\(\s*[{LETTERS}{LETTERS.lower()}]\s*\)"
    rf"|\b[{LETTERS}]\b(?!['\u2019])(?!\s+(?!{_WORDS_BEHIND})[a-z]))"
)
_FIRST = re.compile(rf"\s*(?:(?i:option|choice)\s+)?{_ANY}[\s.:)]*")
# Options whose text is about other options.
_ABOUT_OPTIONS = re.compile(
    r"(?i:both|neither|either|all|none|any|only|one|two|some)\b|.*\bonly\W*$"
)
_JOINED = re.compile(
    r"\b(?i:also|or|maybe|perhaps|possibly|probably|alternatively|too|well|not|instead|otherwise"
    rf"|wait|actually|but|plus|then)\b|[/|&+;]|^[\W\d_]*(?:(?i:and)\b|{_ANY}\s*\S|\()"
    rf"|\b[{LETTERS}][.:)]\s+\S"  # the next option of a list
)


def _names_another(text: str, letter: str) -> bool:
    """Whether what follows a choice with its text chooses again."""
    first = _FIRST.match(text)
    if first is None or _ABOUT_OPTIONS.match(text, first.end()):
        return False
    rest = text[first.end() :]
    others = [match for match in re.findall(_ANY, rest) if match.strip("() ").upper() != letter]
    same_form = "(" in first[0] and any(other[0] == "(" for other in others)
    return bool(others) and (same_form or _JOINED.search(rest) is not None)


def _check(options: RewardOptions) -> None:
    refuse_unknown("choice", options, ())


def _unreadable(answer: str, options: RewardOptions) -> str | None:
    return "no choice: give a letter A to J" if chosen(answer) is None else None


@reward("choice", check=_check, check_reference=_unreadable)
def choice(row: RewardInput, options: RewardOptions) -> Score:
    """1 if the final answer names the reference's option, else 0.

    Raises:
      UnreadableReference: the reference answer is no choice: the row cannot be scored.
    """
    reference = chosen(row.answer)
    if reference is None:
        why = _unreadable(row.answer, options)
        raise UnreadableReference(f"reference answer {row.answer[:200]!r} is {why}")
    extracted = final_answer(row.completion)
    letter = None if extracted is None else chosen(extracted)
    if letter is None:
        return Score(0.0, Outcome.UNPARSEABLE, extracted)
    return Score.binary(letter == reference, letter)
