"""Where stop strings end, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from r1jax.sampler import StopSearch
from r1jax.settings.sampling import SamplingSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Finds where stop strings end, in tokens; text is only looked at, ids are never re-encoded."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = tuple(strings)

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Per row [time] the number of tokens up to the end of the first stop string, or -1."""
        ends = [self._end(row[:n]) for row, n in zip(tokens, lengths, strict=True)]
        return np.asarray(ends, np.int32)

    def _end(self, tokens: np.ndarray) -> int:
        if not self._contains(tokens):
            return -1
        low, high = 0, len(tokens)  # a prefix of `high` tokens contains one, of `low` none
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._contains(tokens[:middle]) else (middle, high)
        return high

    def _contains(self, tokens: np.ndarray) -> bool:
        text = decode(self._tokenizer, tokens)
        return any(string in text for string in self._strings)


def stop_search(tokenizer: PreTrainedTokenizerBase, section: SamplingSection) -> StopSearch | None:
    """What the sampler calls to find the section's stop strings; None where it has none."""
    return StopStrings(tokenizer, section.stop) if section.stop else None


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray) -> str:
    """The text of token ids [time]."""
    return str(tokenizer.decode(token_ids.tolist(), clean_up_tokenization_spaces=False))
