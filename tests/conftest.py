"""Settings of all tests: the CPU, and one compilation cache for the processes they start."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(params=["cpu", "tpu"])
def cache_of_platform(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """What is remembered lies in memory as this platform wants it, wherever the test runs."""
    import jax

    from r1jax.sharding import Layout

    monkeypatch.setattr(Layout, "platform", request.param)
    jax.clear_caches()  # in which models are alike whatever is pretended
    yield request.param
    jax.clear_caches()
