"""Settings of all tests: the CPU, quick compilation, one cache of programs for all processes."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import compiled_programs
import forked
import pytest
import undrawn

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_FLAGS", compiled_programs.QUICK)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers get the variables of the process above them
        os.environ.update(compiled_programs.cache())


# Files that take long, which begin first, so that no worker is left alone with one.
LONGEST_FIRST = (
    "rewards/test_hostile.py",
    "processes/test_failure.py",
    "recipe/",
    "stages/test_process_reward_model.py",
    "processes/",
    "test_bucket.py",
    "rewards/test_sandbox.py",
    "sampler/test_speculative.py",
    "stages/",
    "evaluation/test_benchmarks.py",
    "config/test_distill.py",
    "sampler/",
    "test_sharding.py",
    "models/",
    "docs/",
    "config/test_packaged.py",
    "run/",
    "planner/",
    "evaluation/",
    "weights/",
    "test_checkpoints.py",
    "report/",
    "tpu_scripts/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        path = str(item.path)
        ranks = [i for i, name in enumerate(LONGEST_FIRST) if f"tests/{name}" in path]
        return ranks[0] if ranks else len(LONGEST_FIRST)

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what was imported stays: no need to look through it again and again
    forked.collect_rarely()


# Files with a test that looks at the figures of a report, and runs of every kind of stage.
DRAWN = (
    "report/",
    "docs/",
    "recipe/test_schedule.py",
    "stages/test_turns.py",
    "stages/test_search.py",
    "stages/test_outside_kind.py",
    "test_cli.py",
)


@pytest.fixture(scope="module", autouse=True)
def figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reports have figures where a test looks at them, and nowhere else."""
    if any(f"tests/{name}" in str(request.path) for name in DRAWN):
        yield
    else:
        with undrawn.undrawn():
            yield


@pytest.fixture(params=["cpu", "tpu"])
def cache_of_platform(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The KV cache has the memory order of this platform, wherever the test runs."""
    import jax

    from r1jax.sharding import Layout

    monkeypatch.setattr(Layout, "platform", request.param)
    jax.clear_caches()  # in which models are alike whatever is pretended
    yield request.param
    jax.clear_caches()
