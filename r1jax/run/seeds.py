"""Seeds, each for one purpose."""

from __future__ import annotations

import zlib


def seed_of(run_seed: int, *names: object) -> int:
    """A seed for one purpose, 32 bits: a function of the run's seed and the purpose's names."""
    return zlib.crc32("/".join(map(str, (run_seed, *names))).encode())
