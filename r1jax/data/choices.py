"""Multiple choice from questions that come with right and wrong answers and no letters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from r1jax.rewards.choice import LETTERS

MOST_WRONG_ANSWERS = len(LETTERS) - 1


def lettered(question: str, right: str, wrong: Sequence[str]) -> tuple[str, str]:
    """The question with its options, one a line as `A) ...`, and the letter of the right one.

    Options are sorted by a hash of the question and the option, so the order is the same in every
    run, and independent of where the dataset has the right answer. Raises ValueError for no wrong
    answers, or more options than letters.
    """
    if not 1 <= len(wrong) <= MOST_WRONG_ANSWERS:
        raise ValueError(f"{len(wrong)} wrong answers: needs 1 to {MOST_WRONG_ANSWERS}")
    question, right = question.strip(), right.strip()
    options = sorted([right, *(text.strip() for text in wrong)], key=lambda o: _digest(question, o))
    lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, "", *lines]), LETTERS[options.index(right)]


def _digest(question: str, option: str) -> bytes:
    return hashlib.blake2b(json.dumps([question, option]).encode()).digest()
