"""Compiled programs are kept where all processes find them, and not where they do harm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from r1jax.compilation_cache import _cache_directory, cache_in_use, use_compilation_cache


@pytest.fixture
def settings() -> Iterator[None]:
    """JAX's settings are put back."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("known", "backend", "processes", "environment", "expected"),
    [
        # JAX's own variable is obeyed everywhere.
        ("/fast/jax", "tpu", 4, {}, "/fast/jax"),
        ("gs://bucket/jax", "cpu", 1, {}, "gs://bucket/jax"),
        (None, "cpu", 1, {"XDG_CACHE_HOME": "/caches"}, None),
        (None, "cpu", 4, {}, None),
        (None, "gpu", 1, {"XDG_CACHE_HOME": "/caches"}, "/caches/r1jax/compiled"),
        (None, "tpu", 1, {}, f"{Path.home()}/.cache/r1jax/compiled"),
        (None, "tpu", 1, {"XDG_CACHE_HOME": ""}, f"{Path.home()}/.cache/r1jax/compiled"),
        # Process 0 writes: the others must see it.
        (None, "tpu", 2, {"XDG_CACHE_HOME": "/caches"}, "gs://bucket/runs/compilation_cache"),
    ],
)
def test_where_auto_keeps_them(
    known: str | None,
    backend: str,
    processes: int,
    environment: dict[str, str],
    expected: str | None,
) -> None:
    found = _cache_directory(known, backend, processes, "gs://bucket/runs/", environment)
    assert found == expected


def test_a_directory_is_used_at_once_and_null_is_none(settings: None, tmp_path: Path) -> None:
    jax.jit(lambda x: x * 3)(jnp.ones(3))  # JAX has looked already, and found no cache
    kept = str(tmp_path / "kept")
    assert use_compilation_cache(kept, "runs") == kept == cache_in_use()
    jax.jit(lambda x: x * 5)(jnp.ones(3))
    written = list(Path(kept).iterdir())
    assert written
    assert use_compilation_cache("auto", "runs") == kept
    assert use_compilation_cache(None, "runs") is None is cache_in_use()
    jax.jit(lambda x: x * 7)(jnp.ones(3))
    assert list(Path(kept).iterdir()) == written
    assert use_compilation_cache("auto", "runs") is None  # this is a CPU
