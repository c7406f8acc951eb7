"""Rows that are padded, not packed: what a model with a head reads, one text or several a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from r1jax.data.order import IndexStream, fingerprint, local_slice

HostArrays = dict[str, np.ndarray]


class EncodedRow(Protocol):
    """One or more texts as token ids, and their labels."""

    @property
    def id(self) -> int: ...

    @property
    def longest(self) -> int:
        """Tokens of its longest text."""
        ...

    def parts(self) -> Sequence[bytes]:
        """All that it holds, as many parts as the other rows of its dataset."""
        ...


R = TypeVar("R", bound=EncodedRow)


def pad_texts(texts: Sequence[np.ndarray], row_tokens: int) -> HostArrays:
    """Right-padded rows, one text each, as `r1jax.models.reward_head.reward_scores` takes them.

    Returns `tokens`, `positions` and `segment_ids` (0: padding), int32 [texts, row_tokens], and
    `ends`, int32 [texts], the index of each last token. Raises ValueError for a longer text.
    """
    lengths = np.asarray([len(text) for text in texts], np.int32)
    if lengths.max() > row_tokens:
        raise ValueError(f"a text of {lengths.max()} tokens does not fit into {row_tokens}")
    steps = np.arange(row_tokens, dtype=np.int32)
    filled = steps < lengths[:, None]
    tokens = np.zeros(filled.shape, np.int32)
    tokens[filled] = np.concatenate(texts)
    return {
        "tokens": tokens,
        "positions": np.where(filled, steps, 0),
        "segment_ids": filled.astype(np.int32),
        "ends": lengths - 1,
    }


class PaddedRows(Generic[R]):
    """An endless, seeded, resumable stream of batches of rows, sharded by process (`IndexStream`).

    Args:
        rows: The same on every process.
        to_arrays: The arrays of rows that are padded to this many tokens.
        length_bucket: Rows are padded to the smallest multiple of it that holds the longest text of
            a batch: the fewer lengths, the fewer compilations.
    """

    def __init__(
        self,
        rows: Sequence[R],
        to_arrays: Callable[[Sequence[R], int], HostArrays],
        *,
        seed: int,
        length_bucket: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        if not rows:
            raise ValueError("PaddedRows needs at least one row")
        self._rows = rows
        self._to_arrays = to_arrays
        self._length_bucket = length_bucket
        self._indices = IndexStream(
            len(rows),
            seed=seed,
            fingerprint=fingerprint((row.id, row.parts()) for row in rows),
            process_index=process_index,
            process_count=process_count,
        )
        self.state, self.restore = self._indices.state, self._indices.restore

    def take(self, n_global: int) -> HostArrays:
        """The next `n_global` rows of the global order; this process's slice of them, as arrays.

        Their row length is the same on every process.
        """
        indices, local = self._indices.take(n_global)
        row_tokens = round_up(max(self._rows[i].longest for i in indices), self._length_bucket)
        return self._to_arrays([self._rows[i] for i in indices[local]], row_tokens)


def padded_once(
    rows: Sequence[R],
    to_arrays: Callable[[Sequence[R], int], HostArrays],
    *,
    rows_per_batch: int,
    length_bucket: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[HostArrays, np.ndarray]]:
    """Every row once, in batches of one shape; this process's slice of each.

    With the arrays comes a float32 [rows of the slice]: 1, and 0 for a row that only fills the last
    batch.
    """
    local = local_slice(rows_per_batch, process_index, process_count)
    row_tokens = round_up(max(row.longest for row in rows), length_bucket)
    for start in range(0, len(rows), rows_per_batch):
        batch = rows[start : start + rows_per_batch]
        filled = [*batch, *[batch[-1]] * (rows_per_batch - len(batch))]
        real = (np.arange(rows_per_batch) < len(batch)).astype(np.float32)
        yield to_arrays(filled[local], row_tokens), real[local]


def bucket(length: int, smallest: int = 16) -> int:
    """The next power of two: few distinct sizes, each of which compiles once."""
    size = smallest
    while size < length:
        size *= 2
    return size


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below `number`."""
    return -(-number // multiple) * multiple
