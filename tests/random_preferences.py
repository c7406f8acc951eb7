"""Encoded preferences of random tokens."""

from __future__ import annotations

import numpy as np

from r1jax.data.preferences import EncodedPreference


def random_rows(count: int, safe: bool | None = None, start: int = 0) -> list[EncodedPreference]:
    """Row i has texts that begin with the token i."""
    rng = np.random.default_rng(0)
    return [
        EncodedPreference(
            id=i,
            texts=tuple(
                np.asarray([i, side, *rng.integers(0, 9, rng.integers(1, 12))], np.int32)
                for side in range(1 if safe is not None else 2)
            ),
            safe=None if safe is None else i % 2 == 0,
        )
        for i in range(start, start + count)
    ]
