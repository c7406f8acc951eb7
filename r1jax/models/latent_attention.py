"""Multi-head latent attention (arXiv 2405.04434, section 2.1), for whole rows and for a cache.

A head's key is W_k c joined with a rotated key r that all heads share, and its value is W_v c: of a
token, the latent c and r are all that has to be remembered. Whole rows expand them to keys and
values, which are then attended to as any others. A decoded token instead takes the projections to
its own side, (W_k^T q) . c = q . (W_k c), and so reads the cache as it is.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from r1jax.models.attention import cached_attention
from r1jax.models.config import LatentAttention, ModelConfig, YarnRopeScaling
from r1jax.models.parameters import Params
from r1jax.models.primitives import project, rms_norm
from r1jax.models.rope import rotate
from r1jax.sharding import Layout

_EPS = 1e-6  # of the latents' norms: DeepSeek's code does not give them the config's


def queries_and_latents(
    y: jax.Array, w: Params, cos: jax.Array, sin: jax.Array, config: ModelConfig, layout: Layout
) -> tuple[jax.Array, jax.Array]:
    """Project y [..., hidden].

    Returns:
      Queries [..., heads, head_dim], their rotated part last, sharpened as YaRN wants it: products
      with the keys are then divided by sqrt(head_dim), as everywhere. And what is remembered,
      [..., 1, kv_lora_rank + qk_rope_head_dim]: the normalised latent, and the rotated key.
    """
    latent = config.latent
    assert latent is not None
    if latent.q_lora_rank is None:
        q = project(y, w["q"], layout)
    else:
        down = rms_norm(project(y, w["q_down"], layout), w["q_norm"], _EPS)
        q = project(down, w["q_up"], layout)
    plain, turning = jnp.split(q, [latent.qk_nope_head_dim], axis=-1)
    q = jnp.concatenate([plain, rotate(turning, cos, sin, interleaved=True)], axis=-1)
    if isinstance(config.rope_scaling, YarnRopeScaling):
        # The square: once for the queries, once for the keys.
        sharpening = config.rope_scaling.sharpening(config.rope_scaling.mscale_all_dim) ** 2
        q = (q.astype(jnp.float32) * sharpening).astype(q.dtype)
    compressed, shared = jnp.split(project(y, w["kv_down"], layout), [latent.kv_lora_rank], axis=-1)
    compressed = rms_norm(compressed, w["kv_norm"], _EPS)
    shared = rotate(shared[..., None, :], cos, sin, interleaved=True)
    return q, jnp.concatenate([compressed[..., None, :], shared], axis=-1)


def expand(
    remembered: jax.Array, up: jax.Array, latent: LatentAttention
) -> tuple[jax.Array, jax.Array]:
    """Keys [..., heads, head_dim] and values [..., heads, v_head_dim] of all heads.

    Args:
      remembered: [..., 1, kv_lora_rank + qk_rope_head_dim], from `queries_and_latents`.
      up: [kv_lora_rank, heads, qk_nope_head_dim + v_head_dim].
    """
    compressed, shared = jnp.split(remembered[..., 0, :], [latent.kv_lora_rank], axis=-1)
    k, v = jnp.split(jnp.tensordot(compressed, up, 1), [latent.qk_nope_head_dim], axis=-1)
    shared = jnp.broadcast_to(shared[..., None, :], (*k.shape[:-1], latent.qk_rope_head_dim))
    return jnp.concatenate([k, shared], axis=-1), v


def absorbed_attention(
    q: jax.Array,
    prompt: jax.Array,
    prompt_lengths: jax.Array,
    new: jax.Array,
    visible: jax.Array,
    up: jax.Array,
    latent: LatentAttention,
) -> jax.Array:
    """As `cached_attention` of expanded keys and values, without expanding them.

    Args:
      q: [batch, samples, tokens, heads, head_dim], from `queries_and_latents`.
      prompt: [batch, 1, prompt_time, kv_lora_rank + qk_rope_head_dim].
      prompt_lengths: int32 [batch].
      new: [batch, samples, 1, capacity, kv_lora_rank + qk_rope_head_dim].
      visible: bool [batch or 1, samples or 1, tokens, capacity], which of `new` are seen.
      up: [kv_lora_rank, heads, qk_nope_head_dim + v_head_dim].

    Returns:
      [batch, samples, tokens, heads, v_head_dim].
    """
    plain, turned = jnp.split(q, [latent.qk_nope_head_dim], axis=-1)
    up_k, up_v = jnp.split(up, [latent.qk_nope_head_dim], axis=-1)
    wide = jnp.einsum("...hd,rhd->...hr", plain, up_k, preferred_element_type=jnp.float32)
    wide = jnp.concatenate([wide, turned.astype(jnp.float32)], axis=-1)
    # Scores are divided by the root of the width that they are taken over, which is another here.
    wide = (wide * math.sqrt(wide.shape[-1] / q.shape[-1])).astype(q.dtype)
    # The cache is both keys and values. Cutting the rotated keys off first would copy it; what
    # they add to the sums is cut off afterwards.
    found = cached_attention(wide, (prompt, new), (prompt, new), prompt_lengths, visible)
    return jnp.einsum("...hr,rhd->...hd", found[..., : latent.kv_lora_rank], up_v)
