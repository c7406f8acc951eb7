"""Multiple choice from questions that come with right and wrong answers and no letters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from r1jax.rewards.choice import LETTERS

MOST_WRONG_ANSWERS = len(LETTERS) - 1


def lettered(question: str, right: str, wrong: Sequence[str]) -> tuple[str, str]:
    """The question with its options, one a line as `A) ...`, and the letter of the right one.

    The order depends on the texts alone: options are sorted by a hash of the question and the
    option. So it is the same in every run and on every machine, whatever the seed, the split or the
    row's position, and independent of where the dataset has the right answer.

    Raises:
        ValueError: there are no wrong answers, or more options than letters.
    """
    if not 1 <= len(wrong) <= MOST_WRONG_ANSWERS:
        raise ValueError(f"{len(wrong)} wrong answers: needs 1 to {MOST_WRONG_ANSWERS}")
    question, right = question.strip(), right.strip()
    options = sorted([right, *(text.strip() for text in wrong)], key=lambda o: _digest(question, o))
    lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, "", *lines]), LETTERS[options.index(right)]


def _digest(question: str, option: str) -> bytes:
    return hashlib.blake2b(json.dumps([question, option]).encode()).digest()
