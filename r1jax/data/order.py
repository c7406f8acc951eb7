"""Seeded orders that no library upgrade changes, and walks along them that can be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of 0 .. size - 1 that depends on (size, key) alone; int64 [size].

    It sorts Philox's raw 64-bit stream. NumPy keeps raw bit streams and `SeedSequence` the same
    for ever, while `Generator.permutation` may change between versions, and a run resumed after
    an upgrade must go on in the order in which it began.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(raw, kind="stable")


class Indices(NamedTuple):
    """What a take visits on all processes, in order, and which slice of it is this process's."""

    everywhere: list[int]
    own: slice


class Walk:
    """An endless, seeded, resumable walk over the indices 0 .. size - 1, sharded by process.

    Each epoch visits every index once in an order that depends on (seed, epoch) alone. A take may
    span two epochs, so nothing is dropped. The global order is the same for any number of
    processes, hence a run may be resumed on another number of machines.
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
        """
        Args:
            size: At least 1, and the same on every process.
            seed: Decides the order; at least 0.
            fingerprint: Of what is walked over; a state of another one is refused.
            process_index, process_count: Which contiguous slice of each take is this process's.
        """
        check_process(process_index, process_count)
        self._size = size
        self._seed = seed
        self._fingerprint = fingerprint
        self._process_index = process_index
        self._process_count = process_count
        self._begin_epoch(0)

    def take(self, n_global: int) -> Indices:
        """The next `n_global` indices of the global order.

        Raises:
            ValueError: `n_global` is not a positive multiple of the process count.
        """
        n_local = share_of_process(n_global, self._process_count)
        first = self._process_index * n_local
        taken: list[int] = []
        while len(taken) < n_global:
            part = self._order[self._position : self._position + n_global - len(taken)]
            taken.extend(part.tolist())
            self._position += len(part)
            if self._position == self._size:
                self._begin_epoch(self._epoch + 1)
        return Indices(taken, slice(first, first + n_local))

    def state(self) -> dict[str, Any]:
        """Where the walk is, as JSON; the same on every process."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
            ValueError: the state belongs to other data or another seed.
        """
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


def share_of_process(n_global: int, process_count: int) -> int:
    """How many of `n_global` items each process gets; ValueError unless they divide evenly."""
    if n_global < 1 or n_global % process_count:
        raise ValueError(
            f"cannot take {n_global} items: needs a positive multiple of the {process_count} "
            "processes, or the processes would disagree on shapes"
        )
    return n_global // process_count


def check_state(state: Mapping[str, Any], *, seed: int, fingerprint: str) -> None:
    """Raises ValueError unless a saved state fits this data and seed."""
    if state["seed"] != seed:
        raise ValueError(
            f"the checkpoint's data order has seed {state['seed']}, this run has {seed}; resume "
            "with the seed it began with, or start a new run"
        )
    if state["fingerprint"] != fingerprint:
        raise ValueError(
            f"the checkpoint's data (fingerprint {state['fingerprint']}) is not this run's "
            f"({fingerprint}): the data, its template or the tokenizer has changed. Put them back "
            "as they were, or start a new run."
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
