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
from r1jax.models.kv_cache import LayerCache, PromptCache, StackCache, entry_shapes
from r1jax.sharding import Axes

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int


@struct.dataclass
class PagedCache:
    """Keys and values, or latents, of all slots and prompts.

    pages: stack of layers -> per layer [shards, pages, heads, page, width]; [layers, shards, ...]
        where layers are scanned.
    filled: which entries of the pages hold a token.
    used: which pages belong to a slot or to a prompt.
    current: stack of layers -> per layer [shards, slots, heads, page, width], what each slot fills.
    current_filled: which entries of those hold a token.
    """

    pages: dict[str, StackCache]
    filled: Bool[Array, "shards pages page"]
    used: Bool[Array, "shards pages"]
    current: dict[str, StackCache]
    current_filled: Bool[Array, "shards slots page"]


@struct.dataclass
class PageList:
    """The pages that the slots attend to: page `pages[i]` is read for slot `slots[i]`.

    A page of a prompt is listed once for each of its slots. Behind the last one, slots[i] is the
    number of slots.

    filled: which entries of these pages hold a token.
    count: the longest list of all shards.
    """

    pages: Int[Array, "shards list"]
    slots: Int[Array, "shards list"]
    filled: Bool[Array, "shards list page"]
    count: Int[Array, ""]


def page_axes(model: Decoder) -> Axes:
    """Logical axes of a layer's arrays, for pages of the pool and of the slots."""
    heads, width = (None, None) if model.config.latent is not None else ("kv_heads", "head_dim")
    return ("slots", None, heads, None, width)


def page_arrays(
    shards: int, pages: int, page: int, model: Decoder
) -> list[tuple[tuple[int, ...], Axes]]:
    """Shape and logical axes of a layer's arrays."""
    shapes = entry_shapes(model)
    return [((shards, pages, heads, page, width), page_axes(model)) for heads, width in shapes]


def empty_pages(
    shards: int, slots: int, pages: int, page: int, model: Decoder, *, with_module: bool = False
) -> PagedCache:
    """A cache in which nothing is used.

    Args:
      page: tokens of a page.
      with_module: for the layers of the module for multi-token prediction, too.
    """
    config, layout, dtype = model.config, model.layout, model.execution.compute_dtype
    named = config.all_stacks if with_module else config.stacks

    def stacks(count: int) -> dict[str, StackCache]:
        arrays = page_arrays(shards, count, page, model)

        def empty(*layers: int) -> LayerCache:
            names = ("layers",) * len(layers)
            return tuple(
                layout.constrain(jnp.zeros((*layers, *shape), dtype), (*names, *axes))
                for shape, axes in arrays
            )

        return {
            name: empty(len(layers))
            if model.execution.scan_layers
            else tuple(empty() for _ in layers)
            for name, layers in named.items()
        }

    def flags(*shape: int) -> jax.Array:
        axes = ("slots", *(None,) * (len(shape) - 1))
        return layout.constrain(jnp.zeros(shape, bool), axes)

    return PagedCache(
        pages=stacks(pages),
        filled=flags(shards, pages, page),
        used=flags(shards, pages),
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


def free_pages(used: Bool[Array, "shards pages"], count: int) -> Int[Array, "shards count"]:
    """The first `count` pages that are not used; the number of pages where there are fewer."""
    return _first_true(~used, count)


def _first_true(flags: jax.Array, count: int) -> jax.Array:
    """Indices of the first true values along the last axis; its size where there are fewer."""
    size = flags.shape[-1]

    def one(flags: jax.Array) -> jax.Array:
        rank = jnp.where(flags, jnp.cumsum(flags) - 1, count)
        return jnp.full(count, size, jnp.int32).at[rank].set(jnp.arange(size), mode="drop")

    return jax.vmap(one)(flags)


def keep_current(
    cache: PagedCache, needed: Bool[Array, "shards slots"]
) -> tuple[PagedCache, Int[Array, "shards slots"]]:
    """Move the current pages of these slots into the pool, and begin new ones for all.

    There have to be as many free pages as slots that need one.

    Returns:
      The cache, and the page of each slot; -1 where it needs none.
    """
    count = cache.used.shape[1]
    free = free_pages(cache.used, needed.shape[1])
    rank = jnp.cumsum(needed, axis=1) - 1
    ids = jnp.where(needed, jnp.take_along_axis(free, rank, axis=1, mode="clip"), count)

    def put(pages: jax.Array, current: jax.Array) -> jax.Array:
        axis = pages.ndim - 5  # of the shards

        def one(pages: jax.Array, current: jax.Array, ids: jax.Array) -> jax.Array:
            at = (slice(None),) * axis
            return pages.at[(*at, ids)].set(current, mode="drop")

        return jax.vmap(one, in_axes=(axis, axis, 0), out_axes=axis)(pages, current, ids)

    put_row = jax.vmap(lambda rows, ids, new: rows.at[ids].set(new, mode="drop"))
    cache = replace(
        cache,
        pages=jax.tree.map(put, cache.pages, cache.current),
        filled=put_row(cache.filled, ids, cache.current_filled),
        used=put_row(cache.used, ids, jnp.ones_like(ids, bool)),
        current_filled=jnp.zeros_like(cache.current_filled),
    )
    return cache, jnp.where(needed, ids, -1)


def release(cache: PagedCache, tables: Int[Array, "shards *rows pages"]) -> PagedCache:
    """The cache without these pages; -1 stands for none."""
    shards, count = cache.used.shape
    ids = jnp.where(tables < 0, count, tables).reshape(shards, -1)
    free = jax.vmap(lambda used, ids: used.at[ids].set(False, mode="drop"))
    return replace(cache, used=free(cache.used, ids))


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

    def put(pages: jax.Array, new: jax.Array) -> jax.Array:
        axis = pages.ndim - 5
        time, width = new.shape[-2:]
        whole = per_prompt * page
        pad = [(0, 0)] * (new.ndim - 2) + [(0, max(0, whole - time)), (0, 0)]
        new = jnp.pad(new, pad)[..., :whole, :]
        # [shards * rows, heads, pages * page, ...] -> [shards, rows * pages, heads, page, ...]
        heads, before = new.shape[-3], new.shape[:axis]
        new = new.reshape(*before, shards, rows, heads, per_prompt, page, width)
        new = jnp.moveaxis(new, -3, -4).reshape(*before, shards, -1, heads, page, width)

        def one(pages: jax.Array, new: jax.Array, ids: jax.Array) -> jax.Array:
            return pages.at[(*(slice(None),) * axis, ids)].set(new.astype(pages.dtype), mode="drop")

        return jax.vmap(one, in_axes=(axis, axis, 0), out_axes=axis)(pages, new, ids)

    entries = jnp.arange(per_prompt * page).reshape(per_prompt, page)
    filled = (entries < lengths[..., None, None]).reshape(shards, -1, page)
    put_row = jax.vmap(lambda old, ids, new: old.at[ids].set(new, mode="drop"))
    named = {name: prompts.stacks[name] for name in cache.pages}
    return replace(
        cache,
        pages=jax.tree.map(put, cache.pages, named),
        filled=put_row(cache.filled, ids, filled),
        used=put_row(cache.used, ids, jnp.ones_like(ids, bool)),
    )


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
