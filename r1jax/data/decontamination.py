"""Evaluation questions and duplicates, which must not be trained on.

DeepSeek-R1 (arXiv 2501.12948v2) drops training data that shares a 10-gram with an evaluation set.
How it cuts texts into words is not reported; here they are those of `r1jax.rewards.words`.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from r1jax.rewards.words import words

# Of a sentence; a point between digits is not.
_PUNCTUATION = re.compile(r"[,;:?!\"'\u3001\u3002]|\.(?![0-9])")
_AROUND_SIGNS = re.compile(r"\s+(?=[^\w\s])|(?<=[^\w\s])\s+")


@dataclass(frozen=True, slots=True)
class EvaluationNgrams:
    """Every run of `n` words in a collection of evaluation questions; shorter questions whole."""

    n: int
    keys: frozenset[str]

    @classmethod
    def of(cls, questions: Iterable[str], *, n: int = 10) -> Self:
        """Collects the n-grams of bare questions: no template, no `put your answer in a box`.

        Raises ValueError: n < 1, or a question has nothing but punctuation.
        """
        if n < 1:
            raise ValueError(f"n = {n}: an n-gram has at least one word")
        keys: set[str] = set()
        for question in questions:
            question_keys = set(_keys(question, n))
            if question_keys == {""}:
                raise ValueError(f"the question {question!r} has no words; leave it out")
            keys |= question_keys
        return cls(n=n, keys=frozenset(keys))

    def overlaps(self, text: str) -> bool:
        """Whether `text` shares a run of n words with a question, or is a short question.

        A question below n words is compared as a whole, with its signs: `2+2` is not `2-2`.
        """
        return any(key in self.keys for key in _keys(text, self.n))


def _keys(text: str, n: int) -> Iterator[str]:
    folded = _folded(text)
    tokens = [word for _, word in words(folded)]
    if len(tokens) < n:  # never equal to an n-gram, which has more words
        yield " ".join(_AROUND_SIGNS.sub("", _PUNCTUATION.sub(" ", folded)).split())
    for start in range(len(tokens) - n + 1):
        yield " ".join(tokens[start : start + n])


def duplicate_key(text: str) -> str:
    """A hash that is equal for texts that differ only in case, white space or character width."""
    normal = " ".join(_folded(text).split())
    return hashlib.blake2b(normal.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _folded(text: str) -> str:
    # Compatibility forms first: they turn full-width punctuation and digits into plain ones.
    return unicodedata.normalize("NFKC", text).casefold()
