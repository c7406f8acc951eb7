"""Accuracy reward for maths: is the final answer the reference answer? See docs/answers.md."""

from __future__ import annotations

import re

from r1jax.rewards import symbolic
from r1jax.rewards.answers.compare import key, same_value
from r1jax.rewards.answers.reader import read
from r1jax.rewards.answers.text import TooLarge, Unreadable, plain, read_choice, tidy
from r1jax.rewards.extraction import final_answer, unboxed
from r1jax.rewards.registry import (
    Outcome,
    RewardInput,
    RewardOptions,
    Score,
    refuse_unknown,
    reward,
)
from r1jax.rewards.symbolic import UnreadableAnswer, UnreadableReference

__all__ = [
    "UnreadableAnswer",
    "UnreadableReference",
    "accuracy",
    "equivalent_key",
    "final_answer",
    "readable_reference",
    "same_answer",
]

_LONGEST = 8000  # characters of an answer that is read
_SPACE_THAT_PARTS_NOTHING = re.compile(r"(?<![A-Za-z0-9.,])\s+|\s+(?![A-Za-z0-9.])")


def same_answer(reference: str, answer: str, *, use_sympy: bool = True) -> bool:
    r"""Whether two final answers (not completions) mean the same.

    Both are read into values, which are compared by their kind; docs/answers.md has the rules.
    A reference that is not read has math-verify as its last opinion, unless it is a number.

    Raises:
      UnreadableAnswer, UnreadableReference: no way to read one of the two.
    """
    reference, answer = unboxed(reference), unboxed(answer)
    if len(answer) > max(_LONGEST, 2 * len(reference)):
        raise UnreadableAnswer(f"the answer has {len(answer)} characters")
    if not tidy(reference):
        raise UnreadableReference("the reference answer is empty")
    if not tidy(answer):
        raise UnreadableAnswer("the answer is empty")
    if _text_key(reference) == _text_key(answer):
        return True
    choice = read_choice(reference)
    if choice is not None:
        given = read_choice(answer, with_text=True)
        return choice == (given or plain(answer).upper())
    lettered = read_choice(reference, with_text=True)
    if lettered is not None and read_choice(answer) is not None:
        return lettered == read_choice(answer)
    unreadable: Unreadable | None = None
    try:
        gold = read(reference, trusted=True)
    except Unreadable as error:
        unreadable = error
    try:
        value = read(answer)
    except Unreadable as error:
        if unreadable is None or isinstance(error, TooLarge):
            raise UnreadableAnswer(f"answer {answer[:200]!r}: {error}") from None
    else:
        if unreadable is None:
            try:
                return same_value(gold, value)
            except (ArithmeticError, RecursionError):  # what cannot be computed is not equal
                return False
    if not use_sympy:
        return False
    if isinstance(unreadable, TooLarge):
        raise UnreadableReference(f"reference answer {reference[:200]!r}: {unreadable}")
    return symbolic.equal(tidy(reference), tidy(answer))


def readable_reference(text: str) -> str | None:
    """None if a reference answer can be read, else why not. Cheap: no sympy."""
    text = unboxed(text)
    if not tidy(text):
        return "it is empty"
    if read_choice(text) is not None:
        return None
    try:
        read(text, trusted=True)
    except Unreadable as error:
        return str(error)
    return None


def _text_key(text: str) -> str:
    """The text without the spaces that part nothing; words in lower case."""
    text = plain(text)
    if len(text) > 3 and " " not in text and text.isalpha() and not text.isupper():
        return text.casefold()
    return _SPACE_THAT_PARTS_NOTHING.sub("", text)


def equivalent_key(extracted: str) -> str:
    r"""A key that is equal for answers of equal meaning, for votes: `0.5`, `\frac12`, `x = 0.5`.

    Numbers as reduced fractions (a currency or unit dropped), other expressions by their value at
    a fixed point, choices as their letter, lists and sets sorted, tuples and intervals in order
    with their brackets, the rest as text. No sympy and bounded, so it is safe in the trainer's
    process.
    """
    text = unboxed(extracted)
    if len(text) > _LONGEST:
        return "".join(text.replace("$", "").split())
    choice = read_choice(text, with_text=True)
    if choice is not None:
        return choice
    try:
        return key(read(text))
    except Unreadable:
        return _text_key(text).replace("\\$", "")


def _check(options: RewardOptions) -> None:
    refuse_unknown("accuracy", options, ("symbolic",))
    if not isinstance(options.get("symbolic", True), bool):
        raise ValueError(
            f"rewards.accuracy.options.symbolic = {options['symbolic']!r}: must be true or false"
        )


def _prepare(options: RewardOptions) -> None:
    if options.get("symbolic", True):
        symbolic.load()


def _unreadable(answer: str, options: RewardOptions) -> str | None:
    return readable_reference(answer) if options.get("symbolic", True) else None


@reward("accuracy", check=_check, prepare=_prepare, check_reference=_unreadable)
def accuracy(row: RewardInput, options: RewardOptions) -> Score:
    """1 if the final answer is the reference answer, else 0.

    Options: `symbolic` (default true); false leaves sympy out, and an answer to a reference that
    is not read is then right only if its text is the same.
    """
    extracted = final_answer(row.completion)
    if extracted is None:
        return Score(0.0, Outcome.UNPARSEABLE)
    try:
        same = same_answer(row.answer, extracted, use_sympy=options.get("symbolic", True))
    except UnreadableAnswer:
        return Score(0.0, Outcome.UNPARSEABLE, extracted)
    return Score.binary(same, extracted)
