"""Seeded orders that no library upgrade changes."""

from __future__ import annotations

import numpy as np


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of 0 .. size - 1 that depends on (size, key) alone; int64 [size].

    It sorts Philox's raw 64-bit stream. NumPy keeps raw bit streams and `SeedSequence` the same
    for ever, while `Generator.permutation` may change between versions, and a run resumed after
    an upgrade must go on in the order in which it began.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(raw, kind="stable")
