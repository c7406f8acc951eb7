"""A KV cache in pages of a fixed number of tokens: memory for what is live, and nothing else.

Slots decode side by side, and a slot takes one sample after the other. What a slot has sampled, and
what each prompt consists of, is a list of pages of one pool. All slots write the entries of a step
at the same index of the page that each of them is filling, `current`; when it is full, every slot
takes a page of the pool for it. So no step scatters single tokens (a TPU does that row by row), and
a sample that begins within a page leaves the entries before its first token empty (`filled` says
which hold a token).

The first dimension of every array is the shard: devices share neither slots nor pages.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.models.config import Decoder
from r1jax.models.kv_cache import LayerCache, PromptCache, StackCache, entry_shapes, head_axes
from r1jax.sharding import Axes

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Bool, Int, Shaped, UInt8


# Bits of an entry: it holds a token of the decoder's layers, and of the module's for multi-token
# prediction, which reads what the decoder gave a step before.
OF_DECODER, OF_MODULE = 1, 2


@struct.dataclass
class PagedCache:
    """Keys and values, or latents, of all slots and prompts.

    pages: stack of layers -> per layer [shards, pages, heads, page, width]; [layers, shards, ...]
        where layers are scanned.
    filled: what the entries of the pages hold a token of, see `OF_DECODER` and `OF_MODULE`.
    used: which pages belong to a slot or to a prompt.
    current: stack of layers -> per layer [shards, slots, heads, page, width], what each slot fills.
    current_filled: as `filled`, of those.
    """

    pages: dict[str, StackCache]
    filled: UInt8[Array, "shards pages page"]
    used: Bool[Array, "shards pages"]
    current: dict[str, StackCache]
    current_filled: UInt8[Array, "shards slots page"]


@struct.dataclass
class PageList:
    """The pages that the slots attend to: page `pages[i]` is read for slot `slots[i]`.

    A page of a prompt is listed once for each of its slots. Behind the last one, slots[i] is the
    number of slots.

    filled: as of `PagedCache`, of these pages. For attention: which entries it reads.
    count: the longest list of all shards.
    """

    pages: Int[Array, "shards list"]
    slots: Int[Array, "shards list"]
    filled: UInt8[Array, "shards list page"]
    count: Int[Array, ""]


def page_axes(model: Decoder) -> Axes:
    """Logical axes of a layer's arrays, for pages of the pool and of the slots."""
    heads, width = head_axes(model)
    return ("slots", None, heads, None, width)


def empty_pages(
    shards: int, slots: int, pages: int, page: int, model: Decoder, *, with_module: bool = False
) -> PagedCache:
    """A cache in which nothing is used.

    Args:
      page: tokens of a page.
      with_module: for the layers of the module for multi-token prediction, too.
    """
    layout, axes = model.layout, page_axes(model)

    def stacks(count: int) -> dict[str, StackCache]:
        def empty(*layers: int) -> LayerCache:
            shapes = [(*layers, shards, count, n, page, width) for n, width in entry_shapes(model)]
            names = ("layers",) * len(layers) + axes
            dtype = model.execution.compute_dtype
            return tuple(layout.constrain(jnp.zeros(shape, dtype), names) for shape in shapes)

        return {
            name: empty(len(layers))
            if model.execution.scan_layers
            else tuple(empty() for _ in layers)
            for name, layers in stacks_of_layers.items()
        }

    stacks_of_layers = model.config.all_stacks if with_module else model.config.stacks

    def flags(*shape: int, dtype: DTypeLike = jnp.uint8) -> jax.Array:
        axes = ("slots", *(None,) * (len(shape) - 1))
        return layout.constrain(jnp.zeros(shape, dtype), axes)

    return PagedCache(
        pages=stacks(pages),
        filled=flags(shards, pages, page),
        used=flags(shards, pages, dtype=bool),
        current=stacks(slots),
        current_filled=flags(shards, slots, page),
    )


def write_current(
    current: LayerCache,
    new: LayerCache,
    entry: Int[Array, ""],
    layer: Int[Array, ""] | None = None,
) -> LayerCache:
    """A layer's current pages with `new` in the entries from `entry` on.

    Args:
      current: a layer's arrays, or with `layer` those of its stack.
      new: [shards, slots, tokens, heads, width] each.
      layer: index in the stack.
    """
    zero = jnp.int32(0)
    start = [zero, zero, zero, entry, zero]
    new = tuple(x.swapaxes(-3, -2) for x in new)
    if layer is not None:
        start, new = [layer, *start], tuple(x[None] for x in new)
    put = jax.lax.dynamic_update_slice
    return tuple(put(old, x, start) for old, x in zip(current, new, strict=True))


def put_rows(
    rows: Shaped[Array, "shards size *row"],
    at: Int[Array, "shards count"],
    new: Shaped[Array, "shards count *row"],
) -> Shaped[Array, "shards size *row"]:
    """Each shard's rows with others in these places; what lies outside is dropped."""
    return jax.vmap(lambda rows, at, new: rows.at[at].set(new.astype(rows.dtype), mode="drop"))(
        rows, at, new
    )


def free_pages(
    cache: PagedCache, needed: Bool[Array, "shards wanted"]
) -> Int[Array, "shards wanted"]:
    """A page that is free for each place that needs one; the number of pages for the others.

    There have to be as many free pages.
    """
    count, most = cache.used.shape[1], needed.shape[1]
    free = jnp.where(cache.used, most, jnp.cumsum(~cache.used, axis=1) - 1)
    pages = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), cache.used.shape)
    in_order = put_rows(jnp.full((len(free), most), count, jnp.int32), free, pages)
    rank = jnp.cumsum(needed, axis=1) - 1
    return jnp.where(needed, jnp.take_along_axis(in_order, rank, axis=1, mode="clip"), count)


def _put_pages(
    cache: PagedCache, ids: jax.Array, new: dict[str, StackCache], filled: jax.Array
) -> PagedCache:
    """The cache with new pages [shards, pages, heads, page, width] of all layers in these places.

    Args:
      ids: [shards, pages]; a page outside of the pool is dropped.
      filled: what the entries of the new pages hold a token of.
    """

    def put(pages: jax.Array, new: jax.Array) -> jax.Array:
        if pages.ndim == 5:
            return put_rows(pages, ids, new)
        return jax.vmap(put_rows, in_axes=(0, None, 0))(pages, ids, new)

    return replace(
        cache,
        pages=jax.tree.map(put, cache.pages, new),
        filled=put_rows(cache.filled, ids, filled),
        used=put_rows(cache.used, ids, jnp.ones_like(ids, bool)),
    )


def keep_current(
    cache: PagedCache, needed: Bool[Array, "shards slots"]
) -> tuple[PagedCache, Int[Array, "shards slots"]]:
    """Copy the current pages of these slots into the pool.

    There have to be as many free pages as slots that need one.

    Returns:
      The cache, and the page of each slot; -1 where it needs none.
    """
    ids = free_pages(cache, needed)
    cache = _put_pages(cache, ids, cache.current, cache.current_filled)
    return cache, jnp.where(needed, ids, -1)


def release(cache: PagedCache, tables: Int[Array, "shards *rows pages"]) -> PagedCache:
    """The cache without these pages; -1 stands for none."""
    shards, count = cache.used.shape
    ids = jnp.where(tables < 0, count, tables).reshape(shards, -1)
    return replace(cache, used=put_rows(cache.used, ids, jnp.zeros_like(ids, bool)))


def store_prompts(
    cache: PagedCache,
    prompts: PromptCache,
    tables: Int[Array, "shards rows pages"],
    lengths: Int[Array, "shards rows"],
) -> PagedCache:
    """Write the KV cache of prompts into free pages.

    Args:
      prompts: from `prefill`, [shards * rows, ...].
      tables: the pages of each prompt; -1 behind them.
    """
    shards, rows, per_prompt = tables.shape
    count, page = cache.filled.shape[1:]
    ids = jnp.where(tables < 0, count, tables).reshape(shards, -1)

    def in_pages(new: jax.Array) -> jax.Array:
        """[shards * rows, heads, time, width] -> [shards, rows * pages, heads, page, width]."""
        *layers, _, heads, time, width = new.shape
        whole = per_prompt * page
        pad = [(0, 0)] * (new.ndim - 2) + [(0, max(0, whole - time)), (0, 0)]
        new = jnp.pad(new, pad)[..., :whole, :]
        new = new.reshape(*layers, shards, rows, heads, per_prompt, page, width)
        return jnp.moveaxis(new, -3, -4).reshape(*layers, shards, -1, heads, page, width)

    entries = jnp.arange(per_prompt * page).reshape(per_prompt, page)
    lengths = lengths[..., None, None]
    filled = OF_DECODER * (entries < lengths) + OF_MODULE * (entries < lengths - 1)
    filled = filled.astype(jnp.uint8).reshape(shards, -1, page)
    new = {name: jax.tree.map(in_pages, prompts.stacks[name]) for name in cache.pages}
    return _put_pages(cache, ids, new, filled)


def list_pages(cache: PagedCache, tables: Int[Array, "shards slots pages"], size: int) -> PageList:
    """The pages of all slots' tables (-1 stands for none), which are at most `size`."""
    shards, slots, width = tables.shape

    def one(table: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        flat = table.reshape(-1)
        live = flat >= 0
        at = jnp.where(live, jnp.cumsum(live) - 1, size)
        owner = jnp.repeat(jnp.arange(slots, dtype=jnp.int32), width)
        pages = jnp.zeros(size, jnp.int32).at[at].set(flat, mode="drop")
        return pages, jnp.full(size, slots, jnp.int32).at[at].set(owner, mode="drop"), live.sum()

    pages, owners, counts = jax.vmap(one)(tables)
    filled = jax.vmap(lambda filled, pages: filled[pages])(cache.filled, pages)
    return PageList(pages, owners, filled, jnp.max(counts).astype(jnp.int32))
