"""Attention of new tokens to pages of a KV cache: the cost follows the pages that are live."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from r1jax.models.kv_cache import LayerCache
from r1jax.models.paged_cache import PageList

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

PAGE_CHUNKS = "page_chunks"  # the scope of the loop over pages, whose turns the planner is given

_MASKED = -1e30
_CHUNK_TOKENS = {"cpu": 1024}  # that are read at once: on a CPU, what its caches hold
_OTHER_CHUNK_TOKENS = 32768


def pages_at_once(page: int, platform: str) -> int:
    """How many pages of so many tokens are read together; a page list is a multiple of it."""
    return max(1, _CHUNK_TOKENS.get(platform, _OTHER_CHUNK_TOKENS) // page)


def paged_attention(
    q: Float[Array, "shards slots tokens heads head_dim"],
    pages: LayerCache,
    current: LayerCache,
    reads: PageList,
    visible: Bool[Array, "shards slots tokens page"],
    *,
    layer: Int[Array, ""] | None = None,
    chunk: int,
) -> Float[Array, "shards slots tokens heads value_dim"]:
    """New tokens of each slot attend to the slot's pages, and to its current page.

    The pages are read a chunk at a time, only as many as are listed. What softmax needs of them
    (peak, sum, weighted values) is combined over the pages of a slot as in flash-decoding.

    Args:
      pages: keys and values [shards, pages, kv_heads, page, head_dim]; latents are both, given
        once. With `layer`, those of its stack: its pages are read by index, no layer is copied.
      current: those of the current pages [shards, slots, kv_heads, page, head_dim], of the layer.
      visible: which entries of the current page each token attends to, one at least.
      chunk: pages that are read at once.
    """
    shards, slots, tokens, heads, head_dim = q.shape
    kv_heads = current[0].shape[2]
    scale = 1 / math.sqrt(head_dim)
    q = q.reshape(shards, slots, tokens, kv_heads, -1, head_dim)
    q = q.transpose(0, 1, 3, 2, 4, 5).reshape(shards, slots, kv_heads, -1, head_dim)

    def partial_softmax(
        q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [n, kv_heads, rows, d], keys [n, kv_heads, page, d], seen [n, #rows, page]."""
        logits = jnp.einsum("nhrd,nhkd->nhrk", q, keys, preferred_element_type=jnp.float32)
        logits = jnp.where(seen[:, None], logits * scale, _MASKED)
        peak = jnp.max(logits, axis=-1)
        weights = jnp.exp(logits - peak[..., None])
        out = jnp.einsum(
            "nhrk,nhkd->nhrd",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return peak, jnp.sum(weights, axis=-1), out

    def of_shard(
        q: jax.Array,
        pages: LayerCache,
        current: LayerCache,
        listed: jax.Array,
        owners: jax.Array,
        filled: jax.Array,
        visible: jax.Array,
    ) -> jax.Array:
        seen = jnp.repeat(visible, heads // kv_heads, axis=1)
        start = partial_softmax(q, current[0], current[-1], seen)

        def add(index: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            def part(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk)

            ids, slots = part(listed), part(owners)
            of_layer = (ids,) if layer is None else (layer, ids)
            read = tuple(stored[of_layer] for stored in pages)
            queries = q.at[slots].get(mode="clip")
            peak, total, out = partial_softmax(queries, read[0], read[-1], part(filled)[:, None])
            old_peak, old_total, old_out = so_far
            new_peak = old_peak.at[slots].max(peak, mode="drop")
            old = jnp.exp(old_peak - new_peak)
            new = jnp.exp(peak - new_peak.at[slots].get(mode="clip"))
            return (
                new_peak,
                (old_total * old).at[slots].add(total * new, mode="drop"),
                (old_out * old[..., None]).at[slots].add(out * new[..., None], mode="drop"),
            )

        with jax.named_scope(PAGE_CHUNKS):
            _, total, out = jax.lax.fori_loop(0, chunks, add, start)
        return out / total[..., None]

    chunks = -(-reads.count // chunk)
    shard_axis = 0 if layer is None else 1
    over_shards = jax.vmap(of_shard, in_axes=(0, shard_axis, 0, 0, 0, 0, 0))
    out = over_shards(q, pages, current, reads.pages, reads.slots, reads.filled, visible)
    out = out.reshape(shards, slots, kv_heads, tokens, -1, out.shape[-1])
    out = out.transpose(0, 1, 3, 2, 4, 5).reshape(shards, slots, tokens, heads, -1)
    return out.astype(current[-1].dtype)
