"""Compilations are counted once per program, and memory is positive."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from r1jax.metrics.compilations import CompilationCounter, memory


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


def test_what_the_persistent_cache_had_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The events of JAX: it asks for every program, also where there is no cache."""
    asked, hit = (
        f"/jax/compilation_cache/{n}" for n in ("compile_requests_use_cache", "cache_hits")
    )
    with CompilationCounter() as compilations:
        monkeypatch.setattr("r1jax.metrics.compilations.cache_in_use", lambda: None)
        jax.monitoring.record_event(asked)
        assert compilations.figures()["cache_misses"] == 0
        monkeypatch.setattr("r1jax.metrics.compilations.cache_in_use", lambda: "/kept")
        for event in (asked, asked, hit, "/jax/compilation_cache/cache_misses", asked, hit):
            jax.monitoring.record_event(event)
        figures = compilations.figures()
        assert (figures["cache_hits"], figures["cache_misses"]) == (2, 1)
    jax.monitoring.record_event(hit)
    assert compilations.figures() == figures


def test_functions_that_are_compiled_again_are_named_once() -> None:
    def measure(x: np.ndarray) -> np.ndarray:
        return x + 1

    step = jax.jit(measure)
    with CompilationCounter() as compilations:
        step(np.ones(3))
        assert compilations.recompiled() == {}
        step(np.ones(4))
        step(np.ones(5))
        (again,) = compilations.recompiled().items()
        assert again[0] == "measure" and again[1] > 0
        assert compilations.recompiled() == {}
        step(np.ones(5))
        assert compilations.recompiled() == {}


def test_the_fullest_device_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = [
        {"bytes_in_use": 5, "peak_bytes_in_use": 9, "bytes_limit": 16},
        {"bytes_in_use": 7, "peak_bytes_in_use": 8, "bytes_limit": 15},
    ]
    devices = [SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory() == {"memory_bytes": 7, "memory_peak_bytes": 9, "memory_limit_bytes": 15}
    del stats[0]["peak_bytes_in_use"], stats[0]["bytes_limit"], stats[1]["bytes_limit"]
    assert memory() == {"memory_bytes": 7, "memory_peak_bytes": 8}
