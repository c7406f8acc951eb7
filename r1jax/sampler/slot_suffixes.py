"""Prompts that go on from others: only what follows is read, a page at a time.

A prompt has the full pages of the one that it goes on from as its own first ones. What follows is
padded to whole pages and read by the decoder as slots read new tokens: those of a page attend to
each other as far as they are behind, and to the pages before. Each then goes into the pool.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from r1jax.models.config import Decoder
from r1jax.models.decoder import SlotTokens, decode_slots, unstack_layers
from r1jax.models.kv_cache import StackCache
from r1jax.models.paged_attention import pages_at_once
from r1jax.models.paged_cache import (
    OF_DECODER,
    PagedCache,
    empty_pages,
    keep_current,
    list_pages,
    release,
)
from r1jax.models.parameters import Params
from r1jax.sampler.slot_state import NewSuffixes, SlotShape, SlotState
from r1jax.sampler.slots import laid_out, with_prompts

if TYPE_CHECKING:
    from jaxtyping import Array, Int

SUFFIX_PAGES = "suffix_pages"  # the scope of the loop over them, whose turns the planner is given


@partial(jax.jit, static_argnames=("model", "shape"), donate_argnames=("state",))
def extend_prompts(
    params: Params, state: SlotState, new: NewSuffixes, *, model: Decoder, shape: SlotShape
) -> SlotState:
    """Read what is new of prompts, and queue their samples. There have to be pages for them."""
    shards, page = len(state.running), shape.page
    layers = unstack_layers(params, model)
    new = jax.tree.map(lambda leaf: leaf.reshape(shards, -1, *leaf.shape[1:]), new)
    prompts, rows = new.prompts, new.shared.shape[1]
    present = prompts.entry < shape.prompts
    columns = jnp.arange(shape.prompt_pages)
    tables = jax.vmap(lambda tables, bases: tables.at[bases].get(mode="clip"))(
        state.prompts.tables, new.bases
    )
    shared = present[..., None] & (columns < new.shared[..., None])
    tables = jnp.where(shared, tables, -1)
    counts = jnp.where(present, prompts.lengths - new.shared * page, 0)
    pages = -(-jnp.max(counts) // page)
    # Pages that are filled, one for each row, in place of those of the slots.
    filling = empty_pages(shards, rows, 1, page, model).current
    list_size = suffix_list_size(model, shape, rows)
    causal = jnp.tril(jnp.ones((page, page), bool))
    hidden = jnp.zeros((shards, rows, state.hidden.shape[-1]), state.hidden.dtype)

    def read_page(
        index: jax.Array, carry: tuple[PagedCache, jax.Array, jax.Array]
    ) -> tuple[PagedCache, jax.Array, jax.Array]:
        cache, tables, hidden = carry
        at = index * page + jnp.arange(page, dtype=jnp.int32)
        tokens = SlotTokens(
            jax.lax.dynamic_slice_in_dim(prompts.tokens, index * page, page, axis=2),
            new.shared[..., None] * page + at,
            jnp.int32(0),
            jnp.broadcast_to(causal, (shards, rows, page, page)),
            list_pages(cache, tables, list_size),
        )

        def read_tokens(cache: PagedCache) -> tuple[jax.Array, dict[str, StackCache]]:
            read, written, _ = decode_slots(
                layers, tokens, replace(cache, current=filling), model, record_experts=False
            )
            return read, written.current

        def nothing(cache: PagedCache) -> tuple[jax.Array, dict[str, StackCache]]:
            return jnp.zeros((shards, rows, page, hidden.shape[-1]), hidden.dtype), filling

        # As one operation, which reads the pool before a page of any layer is written: in between,
        # the pool would be copied.
        read, current = jax.lax.cond(index < pages, read_tokens, nothing, cache)
        filled = (at < counts[..., None]) * jnp.uint8(OF_DECODER)
        needed = counts > index * page
        cache, ids = keep_current(replace(cache, current=current, current_filled=filled), needed)
        place = columns == (new.shared + index)[..., None]
        tables = jnp.where(place & needed[..., None], ids[..., None], tables)
        last = counts - 1 - index * page
        of_last = jnp.take_along_axis(read, jnp.clip(last, 0, page - 1)[..., None, None], axis=2)
        is_here = (last >= 0) & (last < page)
        hidden = jnp.where(is_here[..., None], of_last[:, :, 0], hidden)
        return replace(cache, current={}, current_filled=filled), tables, hidden

    slots, slots_filled = state.cache.current, state.cache.current_filled
    cache = replace(
        state.cache, current={}, current_filled=jnp.zeros((shards, rows, page), jnp.uint8)
    )
    with jax.named_scope(SUFFIX_PAGES):
        cache, tables, hidden = jax.lax.fori_loop(0, pages, read_page, (cache, tables, hidden))
    cache = replace(cache, current=slots, current_filled=slots_filled)
    state = with_prompts(replace(state, cache=cache), prompts, tables, hidden, shape)
    return laid_out(state, model)


def suffix_list_size(model: Decoder, shape: SlotShape, rows: int) -> int:
    """Entries of the page list with which so many rows of a shard are read."""
    chunk = pages_at_once(shape.page, model.layout.platform, shape.page)
    return -(-rows * shape.prompt_pages // chunk) * chunk


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def release_pages(
    state: SlotState, first: Int[Array, "shards prompts"], *, model: Decoder
) -> SlotState:
    """The same without the pages of each prompt's table from `first` on.

    The ones before it stay, as those of other prompts or for them.
    """
    tables = state.prompts.tables
    free = jnp.arange(tables.shape[-1]) >= first[..., None]
    state = replace(
        state,
        cache=release(state.cache, jnp.where(free, tables, -1)),
        prompts=replace(state.prompts, tables=jnp.where(free, -1, tables)),
    )
    return laid_out(state, model)
