"""Documents packed into rows of fixed length, for pretraining and fine-tuning."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from r1jax.data.documents import Document
from r1jax.data.order import DataCursor, check_process, check_state, local_slice, permutation
from r1jax.data.tokenizers import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WINDOW = 2048
"""Documents that are packed together. More fill the rows better; fewer are made again on resume.
Changing it changes the order of every run."""

_PROBES = 64  # Documents that the fingerprint reads: reading all would end laziness.

Item = TypeVar("Item")
"""The rows that `encode` makes documents of: `Example`, or another type."""


class PackedRows(Generic[Item]):
    """An endless, seeded, resumable stream of packed rows, sharded by process.

    Every epoch shuffles the documents by (seed, epoch) and cuts the order into windows. A window
    is read, encoded and packed best-fit decreasing when its first row is asked for; its rows then
    come in a shuffled order (packing puts long documents first). A window depends only on
    (documents, seed, epoch, window index), so a few integers restore the stream mid-window.

    A document that does not fit into a row is left out and counted in `dropped`, never cut: a cut
    solution would teach the model to stop nowhere.

    Args:
        examples: Read by index when needed.
        encode: Makes one document of each: `encode_documents` or `encode_conversations`, with their
            other arguments bound; in ids of `tokenizer`.
        row_tokens: T, the length of a row.
        process_index, process_count: Which contiguous slice of each batch is this process's.
    """

    def __init__(
        self,
        examples: Sequence[Item],
        encode: Callable[[Sequence[Item]], Sequence[Document]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        row_tokens: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        _check_any(examples)
        check_process(process_index, process_count)
        self._examples = examples
        self._encode = encode
        self._pad_id = _padding_id(tokenizer)
        self._row_tokens = row_tokens
        self._seed = seed
        self._process_index = process_index
        self._process_count = process_count
        self._fingerprint = self._make_fingerprint(tokenizer)
        self._dropped = 0  # In windows before the current one.
        self._rows_this_epoch = 0
        self._epoch = 0
        self._order = permutation(len(examples), seed, 0)
        self._begin_window(0, 0)

    @property
    def dropped(self) -> int:
        """Documents left out so far for being longer than a row, repeats in later epochs too."""
        return self._dropped + self._window_dropped

    @property
    def epoch(self) -> int:
        """Number of complete passes over the documents."""
        return self._epoch

    def rows_per_epoch(self) -> int:
        """Number of rows in the first epoch; does not move the stream.

        Reads and encodes every document. Other epochs may have some rows more or fewer. Raises
        ValueError if no document fits into a row.
        """
        order = permutation(len(self._examples), self._seed, 0)
        windows = -(-len(order) // _WINDOW)
        count = sum(len(self._pack(order, window)[0]) for window in range(windows))
        if not count:
            raise _none_fits(len(self._examples), self._row_tokens)
        return count

    def take(self, n_rows: int) -> dict[str, np.ndarray]:
        """The next `n_rows` rows of the global order; returns this process's slice of them.

        Those are `tokens`, `segment_ids` (of documents in a row, from 1; 0 is padding), `positions`
        (from 0 in each), int32 [n_rows / processes, T], and `trained`, bool of the same shape: the
        token is a target of the loss (`Document.trained`). Raises ValueError: `n_rows` is not a
        positive multiple of the process count, or no document of a whole epoch fits into a row.
        """
        local = local_slice(n_rows, self._process_index, self._process_count)
        rows: list[list[Document]] = []
        while len(rows) < n_rows:
            part = self._rows[self._position : self._position + n_rows - len(rows)]
            rows.extend(part)
            self._position += len(part)
            if self._position == len(self._rows):
                self._next_window()
        return _to_arrays(rows[local], self._row_tokens, self._pad_id)

    def state(self) -> DataCursor:
        """The position in the stream, as JSON; the same on every process."""
        return {
            "epoch": self._epoch,
            "window": self._window,
            "position": self._position,
            "rows_this_epoch": self._rows_this_epoch,
            "dropped": self._dropped,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
        }

    def restore(self, state: DataCursor) -> None:
        """Goes to the position of `state`, reading at most one window of documents.

        Raises ValueError for the state of other documents, tokenizer, row length or seed.
        """
        check_state(state, seed=self._seed, fingerprint=self._fingerprint)
        self._dropped = int(state["dropped"])
        self._rows_this_epoch = int(state["rows_this_epoch"])
        self._begin_window(int(state["epoch"]), int(state["window"]))
        self._position = int(state["position"])

    def _next_window(self) -> None:
        self._dropped += self._window_dropped
        self._rows_this_epoch += len(self._rows)
        if (self._window + 1) * _WINDOW < len(self._examples):
            self._begin_window(self._epoch, self._window + 1)
            return
        if not self._rows_this_epoch:
            raise _none_fits(len(self._examples), self._row_tokens)
        self._rows_this_epoch = 0
        self._begin_window(self._epoch + 1, 0)

    def _begin_window(self, epoch: int, window: int) -> None:
        if epoch != self._epoch:
            self._order = permutation(len(self._examples), self._seed, epoch)
        rows, self._window_dropped = self._pack(self._order, window)
        shuffle = permutation(len(rows), self._seed, epoch, window)
        self._rows = [rows[r] for r in shuffle.tolist()]
        self._epoch, self._window, self._position = epoch, window, 0

    def _pack(self, order: np.ndarray, window: int) -> tuple[list[list[Document]], int]:
        indices = order[window * _WINDOW : (window + 1) * _WINDOW].tolist()
        return _pack(self._encode([self._examples[i] for i in indices]), self._row_tokens)

    def _make_fingerprint(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Of the number of documents, a spread of them, the vocabulary and the row length."""
        digest = hashlib.blake2b(digest_size=16)
        header = (len(self._examples), self._row_tokens, tokenizer_fingerprint(tokenizer))
        digest.update(repr(header).encode())
        last = len(self._examples) - 1
        probes = sorted({last * probe // (_PROBES - 1) for probe in range(_PROBES)})
        for document in self._encode([self._examples[i] for i in probes]):
            # The length first, so that no two lists of documents give the same bytes.
            digest.update(b"%d " % len(document.tokens))
            digest.update(document.tokens.astype("<i4").tobytes())
            digest.update(document.trained.tobytes())
        return digest.hexdigest()


def packed_once(
    examples: Sequence[Item],
    encode: Callable[[Sequence[Item]], Sequence[Document]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    row_tokens: int,
    rows_per_batch: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Every document exactly once, in the order of `examples`: for a loss over a whole dataset.

    Packed window by window as in `PackedRows`, but not shuffled. Documents longer than a row are
    left out; `segment_ids.max(axis=1).sum()` is the number of those that a batch holds. Yields this
    process's slice of each batch of `rows_per_batch` (of all processes) as `PackedRows.take`. The
    last one is filled up with empty rows (segment id 0, nothing trained), so that all have the same
    shape, on every process.
    """
    _check_any(examples)
    check_process(process_index, process_count)
    local = local_slice(rows_per_batch, process_index, process_count)
    pad_id = _padding_id(tokenizer)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        rows: list[list[Document]] = []
        empty = True
        for start in range(0, len(examples), _WINDOW):
            window = range(start, min(start + _WINDOW, len(examples)))
            rows += _pack(encode([examples[i] for i in window]), row_tokens)[0]
            empty = empty and not rows
            while len(rows) >= rows_per_batch:
                batch, rows = rows[:rows_per_batch], rows[rows_per_batch:]
                yield _to_arrays(batch[local], row_tokens, pad_id)
        if empty:
            raise _none_fits(len(examples), row_tokens)
        if rows:
            rows += [[]] * (rows_per_batch - len(rows))
            yield _to_arrays(rows[local], row_tokens, pad_id)

    return batches()


def _check_any(examples: Sequence[object]) -> None:
    if not len(examples):
        raise ValueError("packing needs at least one document")


def _none_fits(count: int, row_tokens: int) -> ValueError:
    return ValueError(
        f"none of the {count} documents fits into row_tokens = {row_tokens}; use longer rows"
    )


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Segment id 0 marks padding, never a token id, so any id may be used."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token_id) for token_id in ids if token_id is not None)


def _pack(documents: Sequence[Document], row_tokens: int) -> tuple[list[list[Document]], int]:
    """The documents of each row, and how many fit into none."""
    fitting = [document for document in documents if len(document.tokens) <= row_tokens]
    bins = best_fit_decreasing([len(document.tokens) for document in fitting], row_tokens)
    return [[fitting[i] for i in items] for items in bins], len(documents) - len(fitting)


def _to_arrays(
    rows: Sequence[Sequence[Document]], row_tokens: int, pad_id: int
) -> dict[str, np.ndarray]:
    shape = (len(rows), row_tokens)
    tokens = np.full(shape, pad_id, np.int32)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    trained = np.zeros(shape, np.bool_)
    steps = np.arange(row_tokens, dtype=np.int32)
    for r, row in enumerate(rows):
        start = 0
        for segment, document in enumerate(row, start=1):
            end = start + len(document.tokens)
            tokens[r, start:end] = document.tokens
            segment_ids[r, start:end] = segment
            positions[r, start:end] = steps[: end - start]
            trained[r, start:end] = document.trained
            start = end
    ids = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
    return {**ids, "trained": trained}


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items into bins: longest first, each into the fullest bin that has room.

    Best-fit packing is what DeepSeek-R1's training used (arXiv 2501.12948 v2, infrastructure).
    For each bin the indices of its items; equal lengths (at most `capacity`) keep their order.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), sorted: bisect finds the tightest fit.
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            free, chosen = capacity, len(bins)
            bins.append([])
        else:
            free, chosen = room.pop(at)
        bins[chosen].append(item)
        bisect.insort(room, (free - length, chosen))
    return bins
