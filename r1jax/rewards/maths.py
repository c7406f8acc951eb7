"""Accuracy reward for maths: is the final answer the reference answer?"""

from __future__ import annotations

import re

from r1jax.rewards import symbolic
from r1jax.rewards.exact import numbers_equal, plain, read_choice, read_number, split, tidy
from r1jax.rewards.extraction import final_answer, unboxed
from r1jax.rewards.registry import Answered, Outcome, RewardOptions, Score, refuse_unknown, reward
from r1jax.rewards.symbolic import UnreadableAnswer, UnreadableReference

__all__ = [
    "UnreadableAnswer",
    "UnreadableReference",
    "accuracy",
    "equivalent_key",
    "final_answer",
    "same_answer",
]

_SPACE_THAT_PARTS_NOTHING = re.compile(r"(?<![A-Za-z0-9.])\s+|\s+(?![A-Za-z0-9.])")
_RELATIONS = ("<", ">", r"\le", r"\ge", r"\in", "\u2264", "\u2265")


def same_answer(reference: str, answer: str, *, use_sympy: bool = True) -> bool:
    r"""Whether two final answers (not completions) mean the same.

    Text and exact forms first: integers, decimals, fractions, percentages, choices A-E. Answers of
    several parts are compared part by part, so that a subset is never enough: `1, 2`, `1 or 2` and
    `\{1, 2\}` in any order, `(1, 2)` and intervals in theirs. What is left goes to sympy.

    Raises:
      UnreadableAnswer, UnreadableReference: no way to read one of the two.
    """
    reference, answer = tidy(unboxed(reference)), tidy(unboxed(answer))
    if not reference:
        raise UnreadableReference("the reference answer is empty")
    if not answer:
        raise UnreadableAnswer("the answer is empty")
    if reference == answer or _text_key(reference) == _text_key(answer):
        return True

    choice = read_choice(reference)
    if choice is not None:
        given = read_choice(answer, with_text=True)
        return choice == (given or plain(answer).upper())

    number, given_number = read_number(reference), read_number(answer)
    if number is not None and given_number is not None:
        if numbers_equal(number, given_number):
            return True
        if not ("," in reference and "," in answer):  # 100,200 may be a list after all
            return False

    brackets, parts = split(reference)
    given_brackets, given_parts = split(answer)
    if len(parts) > 1 or len(given_parts) > 1 or brackets or given_brackets:
        if not _interval_and_relation(reference, answer, len(parts), len(given_parts)):
            return _same_parts(brackets, parts, given_brackets, given_parts, use_sympy)
    return use_sympy and symbolic.equal(reference, answer)


def _interval_and_relation(reference: str, answer: str, parts: int, given_parts: int) -> bool:
    r"""`(3, \infty)` and `x > 3` have not the same number of parts, but may be the same."""
    if parts == given_parts:
        return False
    one = reference if parts == 1 else answer
    other = answer if parts == 1 else reference
    return (
        min(parts, given_parts) == 1
        and any(sign in one for sign in _RELATIONS)
        and other[:1] in ("(", "[")
        and not any(sign in other for sign in _RELATIONS if sign != r"\in")
    )


def _same_parts(
    brackets: str,
    parts: list[str],
    given_brackets: str,
    given_parts: list[str],
    use_sympy: bool,
) -> bool:
    ordered = {"()", "[]", "(]", "[)"}
    kinds = {brackets, given_brackets}
    if "{}" in kinds:
        if kinds & ordered:
            return False
        parts = list({equivalent_key(part): part for part in parts}.values())
        given_parts = list({equivalent_key(part): part for part in given_parts}.values())
    elif brackets != given_brackets and not ("" in kinds and kinds & {"()", "[]"}):
        return False
    if len(parts) != len(given_parts):
        return False
    # `1, 2` for `x = 1, y = 2` leaves it to the order which is which.
    named = any("=" in part for part in parts) and not any("=" in part for part in given_parts)
    if kinds & ordered or named:
        return all(
            same_answer(part, given, use_sympy=use_sympy)
            for part, given in zip(parts, given_parts, strict=True)
        )
    # Equal text first, so that sympy sees only what is left.
    left = list(given_parts)
    unmatched = []
    for part in parts:
        key = equivalent_key(part)
        twin = next((given for given in left if equivalent_key(given) == key), None)
        if twin is None:
            unmatched.append(part)
        else:
            left.remove(twin)
    for part in unmatched:
        twin = next((each for each in left if same_answer(part, each, use_sympy=use_sympy)), None)
        if twin is None:
            return False
        left.remove(twin)
    return True


def _text_key(tidied: str) -> str:
    """Words in lower case; else the text without its spaces, but for those inside of `7 2`."""
    text = plain(tidied)
    if len(text) > 1 and all(part.isalpha() for part in text.split()):
        return text.casefold()
    return _SPACE_THAT_PARTS_NOTHING.sub("", text)


def equivalent_key(extracted: str, *, depth: int = 8) -> str:
    r"""A key that is equal for answers of equal exact meaning, for votes: `0.5` and `\frac12`.

    Numbers as reduced fractions (a percent sign, currency or unit dropped), choices as their
    letter, lists and sets sorted, tuples and intervals in order with their brackets, the rest as
    text without spaces. Never calls sympy, so it is safe in the trainer's process; lists in lists
    are text below `depth`.
    """
    text = tidy(unboxed(extracted))
    choice = read_choice(text, with_text=True)
    if choice is not None:
        return choice
    number = read_number(text)
    if number is not None:
        return str(number.value)
    brackets, parts = split(text)
    if len(parts) > 1 and depth > 0:
        keys = [equivalent_key(part, depth=depth - 1) for part in parts]
        if brackets == "{}":
            keys = sorted(set(keys))
        elif not brackets:
            keys = sorted(keys)
        pair = brackets or "{}"
        return f"{pair[0]}{','.join(keys)}{pair[1]}"
    return _text_key(text)


def _check(options: RewardOptions) -> None:
    refuse_unknown("accuracy", options, ("symbolic",))
    if not isinstance(options.get("symbolic", True), bool):
        raise ValueError(
            f"rewards.accuracy.options.symbolic = {options['symbolic']!r}: must be true or false"
        )


def _prepare(options: RewardOptions) -> None:
    if options.get("symbolic", True):
        symbolic.load()


@reward("accuracy", check=_check, prepare=_prepare)
def accuracy(row: Answered, options: RewardOptions) -> Score:
    """1 if the final answer is the reference answer, else 0.

    Options: `symbolic` (default true); false leaves sympy out, and an answer that no exact form
    covers is then right only if its text is the reference's.
    """
    extracted = final_answer(row.completion)
    if extracted is None:
        return Score(0.0, Outcome.UNPARSEABLE)
    try:
        same = same_answer(row.answer, extracted, use_sympy=options.get("symbolic", True))
    except UnreadableAnswer:
        return Score(0.0, Outcome.UNPARSEABLE, extracted)
    return Score.binary(same, extracted)
