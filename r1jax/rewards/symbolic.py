"""The last opinion on forms that we do not read: math-verify over sympy. Worker processes only.

sympy can run for ever, fill the memory and recurse without end on a short answer; the caller has to
survive that (`r1jax.rewards.verifier`). math-verify's own timeouts are switched off: they
are signals, which work only in a main thread and cannot interrupt a long operation in C.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any


class UnreadableAnswer(ValueError):
    """The model's answer is not an expression."""


class UnreadableReference(ValueError):
    """The reference answer is not an expression: the row cannot be scored."""


@cache
def load() -> ModuleType:
    """Imports math-verify (about a second, 60 MB), once."""
    import math_verify

    # It warns about the missing timeouts at the first call of each function.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


def _parse(text: str) -> list[Any]:
    library = load()
    # The box makes math-verify read all of the text as one expression, instead of looking for
    # numbers in it. Only LaTeX: the reader of plain expressions goes through `eval`.
    parsed: list[Any] = library.parse(
        rf"\boxed{{{text}}}",
        extraction_config=[library.LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )
    return parsed


def equal(reference: str, answer: str) -> bool:
    """Whether `answer` is the same expression as `reference`. Not symmetric; never for numbers.

    Raises:
      UnreadableAnswer, UnreadableReference: one of the texts is no expression, or a number, on
        which math-verify's rounding has no say.
      Exception: whatever sympy raises on the way.
    """
    gold = _parse(reference)
    if not gold or _is_number(gold[0]):
        raise UnreadableReference(f"reference answer {reference[:200]!r} is not readable")
    given = _parse(answer)
    if not given:
        raise UnreadableAnswer(f"answer {answer[:200]!r} is not readable")
    # The reference goes first: math-verify unpacks `x = 5` and relations after its form.
    same: bool = load().verify(
        gold,
        given,
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )
    return same


def _is_number(value: Any) -> bool:
    import sympy

    return isinstance(value, sympy.Expr) and not value.free_symbols
