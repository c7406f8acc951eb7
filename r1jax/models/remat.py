"""Rematerialisation: which activations of a layer the backward pass keeps or recomputes."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

from r1jax.models.config import RematPolicy

P = ParamSpec("P")
R = TypeVar("R")


def remat(layer: Callable[P, R], policy: RematPolicy) -> Callable[P, R]:
    """The same function under `jax.checkpoint`.

    Args:
      policy: `none` recomputes nothing, `dots` keeps the matrix products, `full` keeps the inputs.
    """
    if policy == "none":
        return layer
    if policy == "dots":
        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(layer, policy=saved)
    return jax.checkpoint(layer)
