"""Compilations are counted once per program, and memory is positive."""

from __future__ import annotations

import jax
import numpy as np

from r1jax.metrics import CompilationCounter, memory


def test_counts_new_programs_only() -> None:
    step = jax.jit(lambda x: x * 2 + 1)
    with CompilationCounter() as compilations:
        assert compilations.count == 0
        step(np.ones(3))
        assert compilations.count == 1 and compilations.seconds > 0
        step(np.zeros(3))
        assert compilations.count == 1
        step(np.ones(4))  # another shape: another program
        assert compilations.count == 2
    step(np.ones(5))
    assert compilations.count == 2


def test_memory_is_of_this_process_or_its_devices() -> None:
    figures = memory()
    assert set(figures) == {"memory_bytes", "memory_peak_bytes"}
    assert 0 < figures["memory_bytes"] <= figures["memory_peak_bytes"]
