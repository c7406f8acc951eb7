"""Documents packed into rows of fixed length, as pretraining and fine-tuning consume them."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from r1jax.data.example import Example
from r1jax.data.order import permutation
from r1jax.data.prompts import check_process, check_state, share_of_process
from r1jax.data.tokenizers import begins_with_bos, encode_texts, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WINDOW = 2048
"""Documents that are packed together. More fill the rows better; fewer are made again on resume.
Changing it changes the order of every run."""

_PROBES = 64  # Documents that the fingerprint reads: reading all would end laziness.


class PackedRows:
    """An endless, seeded, resumable stream of packed rows, sharded by process.

    Every epoch shuffles the documents by (seed, epoch) and cuts the order into windows. A window
    is read, encoded and packed best-fit decreasing when its first row is asked for; its rows then
    come in a shuffled order (packing puts long documents first). A window depends only on
    (documents, seed, epoch, window index), so a few integers restore the stream mid-window.

    A document is BOS (if the tokenizer's models use one), its text, and EOS. A document that does
    not fit into a row is left out and counted in `dropped`, never cut: a cut solution would teach
    the model to stop nowhere.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        row_tokens: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """
        Args:
            examples: Documents (`Example.text`), read by index when needed.
            tokenizer: Must have an EOS token.
            row_tokens: T, the length of a row.
            seed: Decides the order; at least 0.
            process_index, process_count: Which contiguous slice of each take is this process's.

        Raises:
            ValueError: no documents, or no EOS token.
        """
        if not len(examples):
            raise ValueError("PackedRows needs at least one document")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, so documents could not be told apart")
        check_process(process_index, process_count)
        self._examples = examples
        self._tokenizer = tokenizer
        self._bos = str(tokenizer.bos_token) if begins_with_bos(tokenizer) else ""
        self._eos = str(tokenizer.eos_token)
        # Padding is told by segment id 0, never by token id, so any id will do.
        self._pad_id = tokenizer.eos_token_id
        if tokenizer.pad_token_id is not None:
            self._pad_id = tokenizer.pad_token_id
        self._row_tokens = row_tokens
        self._seed = seed
        self._process_index = process_index
        self._process_count = process_count
        self._fingerprint = self._make_fingerprint()
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
        """How often the documents have been gone through."""
        return self._epoch

    def take(self, n_rows: int) -> dict[str, np.ndarray]:
        """The next `n_rows` rows of the global order; returns this process's slice of them.

        Returns:
            `tokens`, `segment_ids` and `positions`, each int32 [n_rows / processes, T]. Segment
            ids count documents in a row from 1; 0 is padding. Positions start at 0 in each.

        Raises:
            ValueError: `n_rows` is not a positive multiple of the process count, or no document
                of a whole epoch fits into a row.
        """
        n_local = share_of_process(n_rows, self._process_count)
        first = self._process_index * n_local
        rows: list[list[list[int]]] = []
        while len(rows) < n_rows:
            part = self._rows[self._position : self._position + n_rows - len(rows)]
            rows.extend(part)
            self._position += len(part)
            if self._position == len(self._rows):
                self._next_window()
        return self._to_arrays(rows[first : first + n_local])

    def state(self) -> dict[str, Any]:
        """Where the stream is, as JSON; the same on every process."""
        return {
            "epoch": self._epoch,
            "window": self._window,
            "position": self._position,
            "rows_this_epoch": self._rows_this_epoch,
            "dropped": self._dropped,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken, reading at most one window of documents.

        Raises:
            ValueError: the state belongs to other documents, tokenizer, row length or seed.
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
            raise ValueError(
                f"none of the {len(self._examples)} documents fits into row_tokens = "
                f"{self._row_tokens}; use longer rows"
            )
        self._rows_this_epoch = 0
        self._begin_window(self._epoch + 1, 0)

    def _begin_window(self, epoch: int, window: int) -> None:
        if epoch != self._epoch:
            self._order = permutation(len(self._examples), self._seed, epoch)
        indices = self._order[window * _WINDOW : (window + 1) * _WINDOW].tolist()
        ids = encode_texts([self._document(i) for i in indices], self._tokenizer)
        fitting = [document for document in ids if len(document) <= self._row_tokens]
        bins = best_fit_decreasing([len(document) for document in fitting], self._row_tokens)
        shuffle = permutation(len(bins), self._seed, epoch, window)
        self._rows = [[fitting[i] for i in bins[b]] for b in shuffle.tolist()]
        self._window_dropped = len(ids) - len(fitting)
        self._epoch, self._window, self._position = epoch, window, 0

    def _document(self, index: int) -> str:
        example = self._examples[index]
        if example.text is None:
            raise ValueError(
                f"row {example.id} has no text to train on; name the column in data.fields.text"
            )
        bos = "" if example.text.startswith(self._bos) else self._bos
        eos = "" if example.text.endswith(self._eos) else self._eos
        return f"{bos}{example.text}{eos}"

    def _to_arrays(self, rows: Sequence[Sequence[Sequence[int]]]) -> dict[str, np.ndarray]:
        shape = (len(rows), self._row_tokens)
        tokens = np.full(shape, self._pad_id, np.int32)
        segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        steps = np.arange(self._row_tokens, dtype=np.int32)
        for r, row in enumerate(rows):
            start = 0
            for segment, document in enumerate(row, start=1):
                end = start + len(document)
                tokens[r, start:end] = document
                segment_ids[r, start:end] = segment
                positions[r, start:end] = steps[: end - start]
                start = end
        return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}

    def _make_fingerprint(self) -> str:
        """Of the number of documents, a spread of them, the vocabulary and the row length."""
        digest = hashlib.blake2b(digest_size=16)
        header = (len(self._examples), self._row_tokens, tokenizer_fingerprint(self._tokenizer))
        digest.update(repr(header).encode())
        last = len(self._examples) - 1
        for index in sorted({last * probe // (_PROBES - 1) for probe in range(_PROBES)}):
            digest.update(repr(self._document(index)).encode())
        return digest.hexdigest()


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items into bins: longest first, each into the fullest bin that has room.

    Best-fit packing is what DeepSeek-R1's training used (arXiv 2501.12948 v2, infrastructure).

    Args:
        lengths: Of the items, each at most `capacity`.
        capacity: Of every bin.

    Returns:
        For each bin the indices of its items. Equal lengths keep their order, so the result
        depends on the arguments alone.
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
