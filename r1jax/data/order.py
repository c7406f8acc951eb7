"""Seeded orders that no library upgrade changes, and streams of indices that can be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

DataCursor: TypeAlias = Mapping[str, Any]
"""The position in a stream of data, as JSON: what a checkpoint keeps to continue it."""


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of 0 .. size - 1 that depends on (size, key) alone; int64 [size].

    It sorts Philox's raw 64-bit stream, which NumPy guarantees, as it does not guarantee
    `Generator.permutation`: a run resumed after an upgrade must continue in its order.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(raw, kind="stable")


class IndexStream:
    """An endless, seeded, resumable stream of the indices 0 .. size - 1, sharded by process.

    Each epoch has every index once, in an order that depends on (seed, epoch) alone. A batch may
    span two epochs, so nothing is dropped. The global order is the same for any number of
    processes, of which each gets a contiguous slice of each batch: a run may be resumed on another
    number. `size` and `fingerprint` are of the data; a state with another one is refused.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        fingerprint: str,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        check_process(process_index, process_count)
        self._size = size
        self._seed = seed
        self._fingerprint = fingerprint
        self._process_index = process_index
        self._process_count = process_count
        self._begin_epoch(0)

    def take(self, n_global: int) -> tuple[list[int], slice]:
        """The next `n_global` indices of the global order, and the slice of this process."""
        local = local_slice(n_global, self._process_index, self._process_count)
        indices: list[int] = []
        while len(indices) < n_global:
            part = self._order[self._position : self._position + n_global - len(indices)]
            indices.extend(part.tolist())
            self._position += len(part)
            if self._position == self._size:
                self._begin_epoch(self._epoch + 1)
        return indices, local

    def state(self) -> DataCursor:
        """The position in the stream, as JSON; the same on every process."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
        }

    def restore(self, state: DataCursor) -> None:
        """Goes to the position of `state`; ValueError if that is of other data or another seed."""
        check_state(state, seed=self._seed, fingerprint=self._fingerprint)
        self._begin_epoch(int(state["epoch"]))
        self._position = int(state["position"])

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = permutation(self._size, self._seed, epoch)


def check_process(index: int, count: int) -> None:
    """Raises ValueError unless 0 <= index < count."""
    if not 0 <= index < count:
        raise ValueError(f"process_index = {index} is not in 0 .. process_count - 1 = {count - 1}")


def local_slice(n_global: int, process_index: int, process_count: int) -> slice:
    """This process's slice of `n_global` items; ValueError unless they divide evenly."""
    if n_global < 1 or n_global % process_count:
        raise ValueError(
            f"cannot take {n_global} items: needs a positive multiple of the {process_count} "
            "processes, or the processes would disagree on shapes"
        )
    n_local = n_global // process_count
    return slice(process_index * n_local, (process_index + 1) * n_local)


def check_state(state: DataCursor, *, seed: int, fingerprint: str) -> None:
    """Raises ValueError unless a saved state fits this data and seed."""
    if state["seed"] != seed:
        raise ValueError(
            f"the checkpoint's data order has seed {state['seed']}, this run has {seed}; resume "
            "with the seed it began with, or start a new run"
        )
    if state["fingerprint"] != fingerprint:
        raise ValueError(
            f"the checkpoint's data (fingerprint {state['fingerprint']}) is not this run's "
            f"({fingerprint}): the data, its template or the tokenizer has changed. Restore them, "
            "or start a new run."
        )


def id_bytes(token_ids: np.ndarray) -> bytes:
    """Token ids as bytes that are the same on every machine."""
    return np.asarray(token_ids, "<i4").tobytes()


def fingerprint(rows: Iterable[tuple[int, Sequence[bytes]]]) -> str:
    """A hash of rows in their order, each an id and the same number of parts."""
    digest = hashlib.blake2b(digest_size=16)
    for number, parts in rows:
        # Lengths first, so that no two lists of rows give the same bytes.
        digest.update(b"%d " % number + b"".join(b"%d " % len(part) for part in parts))
        for part in parts:
            digest.update(part)
    return digest.hexdigest()
