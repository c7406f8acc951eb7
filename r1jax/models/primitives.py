"""The parts of a layer: normalisation, matrix products, and the SwiGLU MLP."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from r1jax.sharding import Layout

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*shape hidden"], weight: Float[Array, " hidden"], eps: float
) -> Float[Array, "*shape hidden"]:
    """Root-mean-square normalisation over the last axis, in float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


def project(
    x: Float[Array, "*shape_in"],
    weight: Float[Array, "*in_out"],
    layout: Layout,
    *,
    inputs: int = 1,
) -> Float[Array, "*shape_out"]:
    """x [..., *in] times weight [*in, *out] -> [..., *out]; `inputs` counts the dimensions *in*.

    Computed as one product of two plain matrices: in the backward pass of a product with several
    leading dimensions, XLA's CPU backend transposes whole activations element by element, which
    takes longer than the products themselves. Where time is split over devices the dimensions
    are not merged, because merging two split ones would gather them.
    """
    if layout.shards("time") > 1:
        return jnp.tensordot(x, weight, inputs)
    rows = x.reshape(-1, math.prod(weight.shape[:inputs]))
    out = rows @ weight.reshape(rows.shape[1], -1)
    return out.reshape(*x.shape[: x.ndim - inputs], *weight.shape[inputs:])


def swiglu(
    x: Float[Array, "*shape hidden"],
    gate: Float[Array, "hidden inner"],
    up: Float[Array, "hidden inner"],
    down: Float[Array, "inner hidden"],
    layout: Layout,
) -> Float[Array, "*shape hidden"]:
    """(silu(x gate) * (x up)) down (arXiv 2002.05202)."""
    inner = jax.nn.silu(project(x, gate, layout)) * project(x, up, layout)
    return project(inner, down, layout)
