"""Multi-head latent attention (arXiv 2405.04434, section 2.1), for whole rows and for a KV cache.

A head's key is W_k c joined with a rotated key r that all heads share, and its value is W_v c: of a
token, the KV cache holds the latent c and r alone. Whole rows expand them to keys and values, which
are then attended to as any others. A decoded token instead projects its query, (W_k^T q) . c =
q . (W_k c), and so reads the KV cache as it is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax.numpy as jnp

from r1jax.models.config import LatentAttention, ModelConfig, YarnRopeScaling
from r1jax.models.parameters import Params
from r1jax.models.primitives import project, rms_norm
from r1jax.models.rope import rotate
from r1jax.sharding import Layout

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_EPS = 1e-6  # of the latents' norms: DeepSeek's code does not give them the config's


def queries_and_latents(
    y: Float[Array, "*shape hidden"],
    w: Params,
    cos: Float[Array, "*shape pairs"],
    sin: Float[Array, "*shape pairs"],
    config: ModelConfig,
    layout: Layout,
) -> tuple[Float[Array, "*shape heads head_dim"], Float[Array, "*shape 1 width"]]:
    """Project activations.

    Returns:
      Queries, their rotated part last, scaled as YaRN wants it: products with the keys are then
      divided by sqrt(head_dim), as in all models. And what is cached, of width kv_lora_rank +
      qk_rope_head_dim: the normalised latent, and the rotated key.
    """
    latent = config.latent
    assert latent is not None
    if latent.q_lora_rank is None:
        q = project(y, w["q"], layout)
    else:
        down = rms_norm(project(y, w["q_down"], layout), w["q_norm"], _EPS)
        q = project(down, w["q_up"], layout)
    plain, to_rotate = jnp.split(q, [latent.qk_nope_head_dim], axis=-1)
    q = jnp.concatenate([plain, rotate(to_rotate, cos, sin, interleaved=True)], axis=-1)
    if isinstance(config.rope_scaling, YarnRopeScaling):
        # The square: once for the queries, once for the keys.
        sharpening = config.rope_scaling.sharpening(config.rope_scaling.mscale_all_dim) ** 2
        q = (q.astype(jnp.float32) * sharpening).astype(q.dtype)
    compressed, shared = jnp.split(project(y, w["kv_down"], layout), [latent.kv_lora_rank], axis=-1)
    compressed = rms_norm(compressed, w["kv_norm"], _EPS)
    shared = rotate(shared[..., None, :], cos, sin, interleaved=True)
    return q, jnp.concatenate([compressed[..., None, :], shared], axis=-1)


def expand(
    cached: Float[Array, "*shape 1 width"],
    up: Float[Array, "rank heads nope_and_value_dim"],
    latent: LatentAttention,
) -> tuple[Float[Array, "*shape heads head_dim"], Float[Array, "*shape heads value_dim"]]:
    """Keys and values of all heads, from what `queries_and_latents` gives to the cache."""
    compressed, shared = jnp.split(cached[..., 0, :], [latent.kv_lora_rank], axis=-1)
    k, v = jnp.split(jnp.tensordot(compressed, up, 1), [latent.qk_nope_head_dim], axis=-1)
    shared = jnp.broadcast_to(shared[..., None, :], (*k.shape[:-1], latent.qk_rope_head_dim))
    return jnp.concatenate([k, shared], axis=-1), v


def absorbed_queries(
    q: Float[Array, "*shape heads head_dim"],
    up: Float[Array, "rank heads nope_and_value_dim"],
    latent: LatentAttention,
    width: int,
) -> Float[Array, "*shape heads width"]:
    """Queries whose products with latents are those of `q` with the expanded keys.

    Args:
      q: from `queries_and_latents`.
      width: of the latents in the cache; zeros may follow their kv_lora_rank + qk_rope_head_dim
        values.
    """
    plain, rotated = jnp.split(q, [latent.qk_nope_head_dim], axis=-1)
    up_k, _ = jnp.split(up, [latent.qk_nope_head_dim], axis=-1)
    wide = jnp.einsum("...hd,rhd->...hr", plain, up_k, preferred_element_type=jnp.float32)
    wide = jnp.concatenate([wide, rotated.astype(jnp.float32)], axis=-1)
    wide = jnp.pad(wide, [(0, 0)] * (wide.ndim - 1) + [(0, width - wide.shape[-1])])
    # Products are divided by the root of the width that they are summed over, which differs here.
    return (wide * math.sqrt(width / q.shape[-1])).astype(q.dtype)


def values_of_latents(
    latents: Float[Array, "*shape heads width"],
    up: Float[Array, "rank heads nope_and_value_dim"],
    latent: LatentAttention,
) -> Float[Array, "*shape heads value_dim"]:
    """What attention with expanded values gives, of attention with latents as keys and values."""
    _, up_v = jnp.split(up, [latent.qk_nope_head_dim], axis=-1)
    # Cutting the rotated keys off before attention would copy the cache.
    return jnp.einsum("...hr,rhd->...hd", latents[..., : latent.kv_lora_rank], up_v)
