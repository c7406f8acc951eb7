"""What every part of a layer is made of: normalisation, products, and the SwiGLU MLP."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from r1jax.sharding import Layout


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis, in float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


def project(x: jax.Array, weight: jax.Array, layout: Layout, *, inputs: int = 1) -> jax.Array:
    """x [..., *in] times weight [*in, *out] -> [..., *out]; `inputs` counts the dimensions *in*.

    Computed as one product of two plain matrices: in the backward pass of a product with several
    leading dimensions, XLA's CPU backend transposes whole activations element by element, which
    takes longer than the products themselves. Where time is split over devices the dimensions
    stay apart, because merging two split ones would gather them.
    """
    if layout.shards("time") > 1:
        return jnp.tensordot(x, weight, inputs)
    rows = x.reshape(-1, math.prod(weight.shape[:inputs]))
    out = rows @ weight.reshape(rows.shape[1], -1)
    return out.reshape(*x.shape[: x.ndim - inputs], *weight.shape[inputs:])


def swiglu(
    x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, layout: Layout
) -> jax.Array:
    """(silu(x gate) * (x up)) down (arXiv 2002.05202); x [..., hidden], the result, too."""
    inner = jax.nn.silu(project(x, gate, layout)) * project(x, up, layout)
    return project(inner, down, layout)
