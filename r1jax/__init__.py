"""r1jax: the DeepSeek-R1 recipe as pure JAX functions.

The names below are loaded on first use, so that tools which need no accelerator (the reward
workers, the command line's help) do not import jax.
"""

from __future__ import annotations

import importlib
from typing import Any

_SUBPACKAGES = ("grpo", "models", "sampler", "sharding", "rewards", "data", "evaluation")

__all__ = list(_SUBPACKAGES)


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"r1jax.{name}")
    raise AttributeError(f"module 'r1jax' has no attribute {name!r}")
