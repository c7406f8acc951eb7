"""Running what was planned, on devices that are there, with arguments that mean nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.stages import Compiled

if TYPE_CHECKING:
    from jaxtyping import PyTree

_CALLS = 3


def seconds(compiled: Compiled, prepare: Callable[[PyTree], PyTree]) -> float:
    """Median seconds of a call; a first one, which warms up, does not count.

    The arguments are reals as small as weights, zeros and truths, each where the program reads it.
    They are not random: no program here is faster for it.

    Args:
      prepare: positional arguments, made without knowing what they are for -> those to call it
        with.
    """

    def fill(leaf: jax.stages.ArgInfo) -> jax.Array:
        value = 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype == jnp.bool_
        return jnp.full(leaf.shape, value, leaf.dtype)

    make = jax.jit(
        lambda: jax.tree.map(fill, compiled.args_info), out_shardings=compiled.input_shardings
    )
    taken = []
    for _ in range(1 + _CALLS):
        positional, named = make()  # new ones for each call, which may consume them
        positional = jax.block_until_ready(prepare(positional))
        began = time.perf_counter()
        jax.block_until_ready(compiled(*positional, **named))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])
