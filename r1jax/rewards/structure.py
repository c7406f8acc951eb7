"""Accuracy reward for logic puzzles: does the answer have exactly the reference's structure?

A puzzle's solution says who is a knight, which house is red, what is in each cell: an object, a
list or a scalar. It is read as JSON or as lines of `key: value`, by `json` and bounded patterns;
nothing of a model's text is ever evaluated.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from r1jax.rewards.answers.text import plain, without_word_commands
from r1jax.rewards.extraction import final_answer
from r1jax.rewards.registry import (
    Outcome,
    RewardInput,
    RewardOptions,
    Score,
    refuse_unknown,
    reward,
)
from r1jax.rewards.symbolic import UnreadableReference

_FENCE = re.compile(r"\s*```[A-Za-z]*\n(.*?)```\s*", re.DOTALL)
# A key with brackets or quotes would be JSON or code that failed to be read as such.
_ASSIGNMENT = re.compile(r"(?:[-*\u2022]\s++)?([^:=\uff1a{}\[\]\"']+)[:=\uff1a](?!=)\s*+(.+)")
_PARTED = re.compile("[,;\uff0c\uff1b]")
_LINE_END = " .,;\u3002\uff0c\uff1b"


def structure_key(text: str, *, bare_text: bool = False) -> str:
    """Reads JSON or assignments; the key, itself JSON, is equal for equal structures.

    Assignments are `key: value` or `key = value`, one a line or parted by commas or semicolons.
    Bullets, bold and dollar signs and a line's last stop are left out. A value is JSON or text,
    and nothing in between: `[red, blue]` is neither. A fenced block is read as its contents.

    The order of keys does not matter, that of lists does; keys and texts lose case and surplus
    white space. A text that spells a number, `true`, `false` or `null` is taken for it, since the
    values of assignments have no quotes to tell. So 1, 1.0 and "1" are the same, and true is not.

    Args:
      bare_text: a text that is neither is a text without its quotes, instead of an error.

    Raises:
      ValueError: neither form, a key that occurs twice, NaN, a number out of range, or nesting
        too deep.
    """
    fenced = _FENCE.fullmatch(text)
    text = (fenced[1] if fenced else text).strip()
    try:
        value = _read(text, bare_text)
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise ValueError("nested too deep") from None


def _read(text: str, bare_text: bool) -> Any:
    try:
        return _normal(_loads(text))
    except json.JSONDecodeError as error:
        pairs = _assignments(text)
        if pairs is not None:
            return _object([(key, _value(value)) for key, value in pairs])
        if bare_text and text:
            return _scalar(plain(text) or text)
        raise ValueError(f"neither JSON ({error}) nor lines of `key: value`") from None


class _Pairs(list[tuple[str, Any]]):
    """An object as it was written: a dict would hide a key that occurs twice."""


def _loads(text: str) -> Any:
    return json.loads(
        text, object_pairs_hook=_Pairs, parse_constant=_refuse, parse_float=_finite_float
    )


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _finite_float(spelling: str) -> int | float:
    value = float(spelling)
    if not math.isfinite(value):
        raise ValueError(f"the number {spelling[:50]} is out of range")
    return int(value) if value.is_integer() else value


def _normal(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return _object([(key, _normal(each)) for key, each in value])
    if isinstance(value, list):
        return [_normal(each) for each in value]
    return _scalar(value) if isinstance(value, str) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for key, value in pairs:
        key = _folded(key)
        if key in read:
            raise ValueError(f"the key {key[:50]!r} occurs twice")
        read[key] = value
    return read


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _scalar(text: str) -> Any:
    """A text, or the number, truth value or null that it spells."""
    text = _folded(text)
    if text[:1] not in ("", "{", "[", '"'):
        try:
            return _loads(text)
        except ValueError:  # not spelled as JSON has it, or out of range
            pass
    return text


def _value(text: str) -> Any:
    """The right-hand side of an assignment."""
    try:
        return _normal(_loads(text))
    except json.JSONDecodeError:
        if text[0] in '{["':
            raise ValueError(f"the value {text[:50]!r} is not JSON") from None
        return _scalar(text)


def _assignments(text: str) -> list[tuple[str, str]] | None:
    """(key, value) in order, or None if a line is something else."""
    pairs: list[tuple[str, str]] = []
    for line in without_word_commands(text).replace("**", "").replace("$", "").splitlines():
        line = line.rstrip(_LINE_END)
        if not line.strip():
            continue
        matches = [_ASSIGNMENT.fullmatch(part.strip()) for part in _PARTED.split(line)]
        if not all(matches):  # the commas, if any, are part of the value
            matches = [_ASSIGNMENT.fullmatch(line.strip())]
        for match in matches:
            if match is None or not match[1].strip():
                return None
            pairs.append((match[1], match[2]))
    return pairs or None


def _check(options: RewardOptions) -> None:
    refuse_unknown("structure", options, ())


def _unreadable(answer: str, options: RewardOptions) -> str | None:
    try:
        structure_key(answer)
    except ValueError as error:
        return str(error)
    return None


@reward("structure", check=_check, check_reference=_unreadable)
def structure(row: RewardInput, options: RewardOptions) -> Score:
    """1 if the final answer has exactly the structure of the reference answer, else 0.

    Where the reference is a single text, number or truth value, a text needs no quotes.

    Raises:
      UnreadableReference: the reference answer is neither JSON nor assignments.
    """
    try:
        reference = structure_key(row.answer)
    except ValueError as error:
        raise UnreadableReference(f"reference answer {row.answer[:200]!r}: {error}") from None
    extracted = final_answer(row.completion)
    if extracted is None:
        return Score(0.0, Outcome.UNPARSEABLE)
    try:
        key = structure_key(extracted, bare_text=reference[0] not in "{[")
    except ValueError:
        return Score(0.0, Outcome.UNPARSEABLE, extracted)
    return Score.binary(key == reference, key)
