"""Attention of new tokens to pages of a KV cache: the cost follows the pages that are live."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from r1jax.models.config import Decoder
from r1jax.models.kv_cache import LayerCache, entry_shapes, head_axes
from r1jax.models.paged_cache import PageList, page_axes
from r1jax.models.paged_kernel import (
    KernelShape,
    PageGroups,
    PartialSoftmax,
    group_pages,
    group_size,
    paged_softmax,
)
from r1jax.models.paged_kernel_gpu import (
    CurrentPages,
    SlotPages,
    pages_of_slots,
    softmax_of_slots,
    tile,
)
from r1jax.sharding import Axes

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

PAGE_CHUNKS = "page_chunks"  # the scope of the loop over pages, whose turns the planner is given

_MASKED = -1e30
_CHUNK_TOKENS = {"cpu": 1024}  # that are read at once: on a CPU, what its caches hold
_OTHER_CHUNK_TOKENS = 32768


def pages_at_once(page: int, platform: str, tokens: int = 1) -> int:
    """How many pages of so many tokens are read together; a page list is a multiple of it.

    tokens: that a slot reads at once. Each page is read with queries of its slot beside it: of many
    tokens, they would take more memory than the pages do.
    """
    pages = max(1, _CHUNK_TOKENS.get(platform, _OTHER_CHUNK_TOKENS) // page)
    return max(1, pages // max(1, tokens // 2))


def paged_attention(
    q: Float[Array, "shards slots tokens heads head_dim"],
    pages: LayerCache,
    current: LayerCache,
    reads: PageList | PageGroups | SlotPages,
    visible: Bool[Array, "shards slots tokens page"],
    model: Decoder,
    *,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "shards slots tokens heads value_dim"]:
    """New tokens of each slot attend to the slot's pages, and to its current page.

    Only pages that are listed are read. What softmax needs of them (peak, sum, weighted values) is
    combined over the pages of a slot as in flash-decoding.

    Args:
      pages: keys and values [shards, pages, kv_heads, page, head_dim]; latents are both, given
        once. With `layer`, those of its stack: its pages are read by index, no layer is copied.
      current: those of the current pages [shards, slots, kv_heads, page, head_dim]; or of a stack.
      reads: from `kernel_reads`; a list is read by XLA, a chunk at a time.
      visible: which entries of the current page each token attends to, one at least.
    """
    shards, slots, tokens, heads, head_dim = q.shape
    kv_heads = current[0].shape[-3]
    q = q.reshape(shards, slots, tokens, kv_heads, -1, head_dim)
    by_key_head = q.transpose(0, 1, 3, 2, 4, 5)
    if isinstance(reads, SlotPages):
        so_far = _by_gpu_kernel(by_key_head, pages, current, reads, visible, model, layer)
    else:
        if layer is not None:
            current = tuple(jax.lax.dynamic_index_in_dim(x, layer, 0, False) for x in current)
        q = by_key_head.reshape(shards, slots, kv_heads, -1, head_dim)
        seen = jnp.repeat(visible, heads // kv_heads, axis=2)
        so_far = jax.vmap(_partial_softmax)(q, current[0], current[-1], seen)
        if isinstance(reads, PageList):
            chunk = pages_at_once(reads.filled.shape[-1], model.layout.platform, tokens)
            so_far = _by_chunks(so_far, q, pages, reads, chunk, layer)
        else:
            so_far = _combine(so_far, _by_tpu_kernel(by_key_head, pages, reads, model, layer))
    out = so_far.out / so_far.total[..., None]
    out = out.reshape(shards, slots, kv_heads, tokens, -1, out.shape[-1])
    out = out.transpose(0, 1, 3, 2, 4, 5).reshape(shards, slots, tokens, heads, -1)
    return out.astype(current[-1].dtype)


def _partial_softmax(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array
) -> PartialSoftmax:
    """q [n, kv_heads, rows, d], keys [n, kv_heads, page, d], seen [n, #rows, page]."""
    logits = jnp.einsum("nhrd,nhkd->nhrk", q, keys, preferred_element_type=jnp.float32)
    logits = jnp.where(seen[:, None], logits * (1 / math.sqrt(q.shape[-1])), _MASKED)
    peak = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - peak[..., None])
    out = jnp.einsum(
        "nhrk,nhkd->nhrd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return PartialSoftmax(peak, jnp.sum(weights, axis=-1), out)


def _combine(one: PartialSoftmax, other: PartialSoftmax) -> PartialSoftmax:
    """Of the same queries and different keys."""
    peak = jnp.maximum(one.peak, other.peak)
    parts = [(each, jnp.exp(each.peak - peak)) for each in (one, other)]
    total, out = (
        sum(getattr(each, name) * scale.reshape(*scale.shape, *extra) for each, scale in parts)
        for name, extra in (("total", ()), ("out", (1,)))
    )
    return PartialSoftmax(peak, total, out)


def _by_chunks(
    so_far: PartialSoftmax,
    q: jax.Array,
    pages: LayerCache,
    reads: PageList,
    chunk: int,
    layer: jax.Array | None,
) -> PartialSoftmax:
    def of_shard(
        so_far: PartialSoftmax,
        q: jax.Array,
        pages: LayerCache,
        listed: jax.Array,
        owners: jax.Array,
        filled: jax.Array,
    ) -> PartialSoftmax:
        def add(index: jax.Array, old: PartialSoftmax) -> PartialSoftmax:
            def part(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk)

            ids, slots = part(listed), part(owners)
            of_layer = (ids,) if layer is None else (layer, ids)
            read = tuple(stored[of_layer] for stored in pages)
            queries = q.at[slots].get(mode="clip")
            new = _partial_softmax(queries, read[0], read[-1], part(filled)[:, None])
            peak = old.peak.at[slots].max(new.peak, mode="drop")
            kept = jnp.exp(old.peak - peak)
            scale = jnp.exp(new.peak - peak.at[slots].get(mode="clip"))
            return PartialSoftmax(
                peak,
                (old.total * kept).at[slots].add(new.total * scale, mode="drop"),
                (old.out * kept[..., None]).at[slots].add(new.out * scale[..., None], mode="drop"),
            )

        with jax.named_scope(PAGE_CHUNKS):
            return jax.lax.fori_loop(0, chunks, add, so_far)

    chunks = -(-reads.count // chunk)
    over_shards = jax.vmap(of_shard, in_axes=(0, 0, 0 if layer is None else 1, 0, 0, 0))
    return over_shards(so_far, q, pages, reads.pages, reads.slots, reads.filled)


def kernel_reads(
    reads: PageList, slots: int, tokens: int, model: Decoder
) -> PageList | PageGroups | SlotPages:
    """As the kernel of the devices reads the pages, for a step of so many tokens a slot.

    XLA reads a list where there is no kernel: on CPUs, and where devices split the keys along their
    width, since the softmax needs sums over them.
    """
    config, layout = model.config, model.layout
    kv_heads, of_key_head, width = (
        1 if axis is None else layout.shards(axis) for axis in _split_axes(model)
    )
    execution = model.execution
    if "xla" in (execution.attention, execution.sampler_attention) or width > 1:
        return reads
    shapes = entry_shapes(model)
    shape = KernelShape(
        shapes[0][0] // kv_heads,
        tokens * config.num_attention_heads // shapes[0][0] // of_key_head,
        tuple(width for _, width in shapes),
        jnp.dtype(execution.compute_dtype).itemsize,
    )
    page = reads.filled.shape[-1]
    if layout.platform == "tpu":
        size = group_size(shape, page, layout.mesh.devices.flat[0].device_kind)
        return reads if size is None else group_pages(reads, slots, size)
    on_gpu = layout.platform == "gpu" and execution.sampler_attention == "kernel"
    if on_gpu and tile(shape, page) is not None:
        return pages_of_slots(reads, slots, shape.rows)
    return reads


def _split_axes(model: Decoder) -> Axes:
    """Logical axes of key heads, of the query heads of a key head, and of a key's width."""
    kv_heads, width = head_axes(model)
    return kv_heads, None if model.config.latent is None else "heads", width


def _by_tpu_kernel(
    q: Float[Array, "shards slots kv_heads tokens group head_dim"],
    pages: LayerCache,
    reads: PageGroups,
    model: Decoder,
    layer: jax.Array | None,
) -> PartialSoftmax:
    """Attention to the listed pages; `group` are the query heads of a key head."""
    interpret = model.layout.platform != "tpu"

    def of_device(rows: jax.Array, pages: LayerCache, reads: PageGroups, layer: jax.Array) -> Any:
        return paged_softmax(rows, pages, layer, reads, interpret=interpret)

    return _over_devices(of_device, q, (pages,), (reads,), model, layer)


def _by_gpu_kernel(
    q: Float[Array, "shards slots kv_heads tokens group head_dim"],
    pages: LayerCache,
    current: LayerCache,
    reads: SlotPages,
    visible: Bool[Array, "shards slots tokens page"],
    model: Decoder,
    layer: jax.Array | None,
) -> PartialSoftmax:
    """Attention to all pages, the current one included."""
    interpret = model.layout.platform != "gpu"
    hidden = jnp.where(visible, 0.0, _MASKED).astype(jnp.float32)

    def of_device(
        rows: jax.Array,
        pages: LayerCache,
        current: LayerCache,
        reads: SlotPages,
        hidden: jax.Array,
        layer: jax.Array,
    ) -> PartialSoftmax:
        filling = CurrentPages(current, hidden[0])
        return softmax_of_slots(rows, pages, filling, layer, reads, interpret=interpret)

    return _over_devices(of_device, q, (pages, current), (reads, hidden), model, layer)


def _over_devices(
    kernel: Callable[..., PartialSoftmax],
    q: Float[Array, "shards slots kv_heads tokens group head_dim"],
    stored: tuple[LayerCache, ...],
    of_slots: tuple[Any, ...],
    model: Decoder,
    layer: jax.Array | None,
) -> PartialSoftmax:
    """Each device reads its shard's pages, for its query heads.

    Args:
      kernel: given the rows of queries [slots, kv_heads, rows, head_dim], `stored` of stacks of
        layers, `of_slots` of a single shard, and the layer.
    """
    layout = model.layout
    if layer is None:
        layer, stored = jnp.int32(0), jax.tree.map(lambda x: x[None], stored)

    def of_device(q: jax.Array, *rest: Any) -> PartialSoftmax:
        rows = q.reshape(*q.shape[1:3], -1, q.shape[-1])
        return PartialSoftmax(
            *(x.reshape(*q.shape[:-1], *x.shape[3:]) for x in kernel(rows, *rest))
        )

    over_devices = of_device
    if layout.mesh.size > 1:
        kv_heads, of_key_head, _ = _split_axes(model)
        of_queries = layout.spec(("slots", None, kv_heads, None, of_key_head))
        over_devices = jax.shard_map(
            of_device,
            mesh=layout.mesh,
            in_specs=(
                of_queries,
                *[layout.spec((None, *page_axes(model)))] * len(stored),
                *[layout.spec(("slots",))] * len(of_slots),
                PartitionSpec(),
            ),
            out_specs=of_queries,
            check_vma=False,
        )
    partial = over_devices(q, *stored, *of_slots, layer)
    return PartialSoftmax(*(x.reshape(*x.shape[:3], -1, *x.shape[5:]) for x in partial))
