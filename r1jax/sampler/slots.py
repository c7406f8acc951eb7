"""Slots that are refilled inside the compiled loop: a finished sample makes room for the next one.

A request is one sample of one prompt. Requests wait in a queue on the devices; a slot that has
ended its sample takes the next one before the next token is drawn, without leaving the program.
After some steps the program returns to the host (`r1jax.sampler.queue`) with a log of what every
slot drew in each step, from which the host puts the completions together, and which lets it prefill
more prompts.

When pages of the KV cache run short, the samples that have come least far give theirs back and go
to the front of the queue, from where they begin again. Keys are functions of prompt, sample and
position, so they draw the same tokens as before, and nothing is lost but time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from r1jax.models.config import Decoder
from r1jax.models.decoder import (
    SlotTokens,
    decode_slots,
    last_token,
    logits,
    prefill,
    unstack_layers_of_slots,
)
from r1jax.models.kv_cache import StackCache
from r1jax.models.multi_token_prediction import prefill_with_module
from r1jax.models.paged_attention import pages_at_once
from r1jax.models.paged_cache import (
    OF_DECODER,
    PageList,
    empty_pages,
    free_pages,
    keep_current,
    list_pages,
    page_axes,
    put_rows,
    release,
    store_prompts,
)
from r1jax.models.parameters import Params
from r1jax.sampler.distribution import draw
from r1jax.sampler.samples import Draws, keys_of
from r1jax.sampler.slot_drafts import draft_and_verify, with_first_tokens
from r1jax.sampler.slot_state import (
    Drafting,
    DrawnTokens,
    NewPrompts,
    PromptEntries,
    SlotLog,
    SlotShape,
    SlotState,
    Status,
    of_prompt,
)
from r1jax.sharding import constrain_to_read

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Bool, Float, Int

# Scopes, by which the planner is given how often conditionals are taken, and a loop's turns.
TAKE, END = "take_samples", "end_samples"
WITHIN_PAGE = "within_page"  # of the loop over steps that fill a page


@partial(jax.jit, static_argnames=("model", "shape"))
def empty_slots(*, model: Decoder, shape: SlotShape) -> SlotState:
    """No prompts, and no slot running."""
    shards, hidden = model.layout.shards("slots"), model.config.hidden_size
    dtype = model.execution.compute_dtype

    def full(value: int, *rest: int, dtype: DTypeLike = jnp.int32) -> jax.Array:
        leaf = jnp.full((shards, *rest), value, dtype)
        return _over_shards(leaf, model)

    def drawn(*size: int) -> DrawnTokens:
        real = full(0, *size, dtype=jnp.float32)
        return DrawnTokens(full(0, *size), real, real)

    return SlotState(
        step=jnp.int32(0),
        hidden=full(0, shape.slots, hidden, dtype=dtype),
        keys=_over_shards(jax.random.split(jax.random.key(0), (shards, shape.slots)), model),
        running=full(0, shape.slots, dtype=bool),
        request=full(-1, shape.slots),
        lengths=full(0, shape.slots),
        tables=full(-1, shape.slots, shape.sample_pages),
        reads=PageList(
            full(0, _list_size(model, shape)),
            full(shape.slots, _list_size(model, shape)),
            full(0, _list_size(model, shape), shape.page, dtype=jnp.uint8),
            jnp.int32(0),
        ),
        cache=empty_pages(
            shards,
            shape.slots,
            shape.pages,
            shape.page,
            model,
            with_module=shape.speculative,
        ),
        prompts=PromptEntries(
            tables=full(-1, shape.prompts, shape.prompt_pages),
            lengths=full(1, shape.prompts),
            hidden=full(0, shape.prompts, hidden, dtype=dtype),
            ids=full(0, shape.prompts, dtype=jnp.uint32),
            first_samples=full(0, shape.prompts),
            done=full(0, shape.prompts),
            first_tokens=drawn(shape.prompts, shape.samples) if shape.speculative else None,
        ),
        queue=full(0, shape.prompts * shape.samples),
        head=full(0),
        queued=full(0),
        drafting=Drafting(
            tokens=full(0, shape.slots, 2),
            hidden=full(0, shape.slots, 2, hidden, dtype=dtype),
            accepted=full(0, shape.slots, dtype=bool),
            started=full(0, shape.slots, dtype=bool),
        )
        if shape.speculative
        else None,
    )


@partial(jax.jit, static_argnames=("model", "shape"), donate_argnames=("state",))
def add_prompts(
    params: Params,
    state: SlotState,
    new: NewPrompts,
    draws: Draws,
    *,
    model: Decoder,
    shape: SlotShape,
) -> tuple[SlotState, Int[Array, "rows time layers_k"] | None]:
    """Prefill prompts, and queue their samples. There have to be pages for them.

    Returns:
      The state, and the experts of the prompts' tokens, where they are recorded.
    """
    shards = len(state.running)
    if shape.speculative:
        hidden, cached = prefill_with_module(params, new.tokens, new.lengths, model)
    else:
        hidden, cached = prefill(
            params, new.tokens, new.lengths, model, record_experts=shape.record_experts
        )
    hidden = last_token(hidden, new.lengths).reshape(shards, -1, hidden.shape[-1])
    new = jax.tree.map(lambda leaf: leaf.reshape(shards, -1, *leaf.shape[1:]), new)

    present = new.entry < shape.prompts
    index = jnp.arange(shape.prompt_pages)
    wanted = present[..., None] & (index * shape.page < new.lengths[..., None])
    ids = free_pages(state.cache, wanted.reshape(shards, -1)).reshape(wanted.shape)
    tables = jnp.where(wanted, ids, -1)

    first_tokens = _first_tokens(params, hidden, new, draws, model, shape)
    cache = store_prompts(state.cache, cached, tables, new.lengths)
    state = with_prompts(replace(state, cache=cache), new, tables, hidden, shape, first_tokens)
    return laid_out(state, model), cached.experts


def with_prompts(
    state: SlotState,
    new: NewPrompts,
    tables: Int[Array, "shards rows pages"],
    hidden: Float[Array, "shards rows hidden"],
    shape: SlotShape,
    first_tokens: DrawnTokens | None = None,
) -> SlotState:
    """The state with prompts [shards, rows] in their entries, and their samples in the queue.

    Args:
      tables: their pages, which the cache has.
      hidden, first_tokens: as of `PromptEntries`.
    """
    shards, entries, present = len(state.running), state.prompts, new.entry < shape.prompts

    def put(old: jax.Array, rows: jax.Array) -> jax.Array:
        return put_rows(old, new.entry, rows)

    sample = jnp.arange(shape.samples, dtype=jnp.int32)
    requests = new.entry[..., None] * shape.samples + sample
    order = jnp.cumsum(present, axis=1) - 1
    at = state.head[:, None, None] + state.queued[:, None, None]
    at = (at + order[..., None] * shape.samples + sample) % state.queue.shape[1]
    at = jnp.where(present[..., None], at, state.queue.shape[1])
    queue = put_rows(state.queue, at.reshape(shards, -1), requests.reshape(shards, -1))
    return replace(
        state,
        prompts=PromptEntries(
            tables=put(entries.tables, tables),
            lengths=put(entries.lengths, new.lengths),
            hidden=put(entries.hidden, hidden),
            ids=put(entries.ids, new.ids),
            first_samples=put(entries.first_samples, new.first_samples),
            done=put(entries.done, jnp.zeros_like(new.entry)),
            first_tokens=jax.tree.map(put, entries.first_tokens, first_tokens),
        ),
        queue=queue,
        queued=state.queued + present.sum(axis=1) * shape.samples,
    )


def _first_tokens(
    params: Params,
    hidden: Float[Array, "shards rows hidden"],
    new: NewPrompts,
    draws: Draws,
    model: Decoder,
    shape: SlotShape,
) -> DrawnTokens | None:
    """Of each sample of new prompts [shards, rows, samples], where drafts follow it."""
    if not shape.speculative:
        return None
    rows = (*hidden.shape[:2], shape.samples)
    indices = new.first_samples[..., None] + jnp.arange(shape.samples, dtype=jnp.int32)
    keys = keys_of(
        draws,
        jnp.broadcast_to(new.ids[..., None], rows).reshape(rows[0], -1),
        indices.reshape(rows[0], -1),
    )
    of_prompts = logits(params, hidden, model)
    of_samples = jnp.repeat(of_prompts, shape.samples, axis=1)
    drawn = draw(of_samples, keys, jnp.int32(0), draws.sampling)
    return DrawnTokens(*(leaf.reshape(rows) for leaf in drawn))


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def drop_prompts(
    state: SlotState, ended: Bool[Array, "shards prompts"], *, model: Decoder
) -> SlotState:
    """The same without the prompts of which all samples have ended."""
    tables, ended = state.prompts.tables, ended[..., None]
    state = replace(
        state,
        cache=release(state.cache, jnp.where(ended, tables, -1)),
        prompts=replace(state.prompts, tables=jnp.where(ended, -1, tables)),
    )
    return laid_out(state, model)


@partial(jax.jit, static_argnames=("model", "shape"), donate_argnames=("state",))
def decode_and_refill(
    params: Params,
    state: SlotState,
    stop: Bool[Array, "batch_shards sample_shards slots"],
    more: Bool[Array, ""],
    draws: Draws,
    *,
    model: Decoder,
    shape: SlotShape,
) -> tuple[SlotState, SlotLog, Status]:
    """Decode `shape.steps` steps, or until nothing is left to do.

    Args:
      stop: slots whose sample ends here, with a stop string.
      free: prompt entries of which all samples have ended.
      more: the host has more prompts: return after a step in which a slot found no sample.

    Returns:
      The state; the log, split over the batch alone; and the status, replicated.
    """
    layers = unstack_layers_of_slots(params, model)
    state = _end(state, stop.reshape(state.running.shape) & state.running, shape)
    first = state.step
    log = empty_log(model, shape)

    def unfinished(carry: tuple[SlotState, SlotLog, jax.Array]) -> jax.Array:
        state = carry[0]
        waiting = jnp.any(state.queued > 0)
        starved = jnp.any((state.queued == 0)[:, None] & ~state.running)
        return (
            (state.step - first < shape.steps)
            & (jnp.any(state.running) | waiting)
            & ((state.step == first) | ~(more & starved))
        )

    def advance(
        pages: dict[str, StackCache], carry: tuple[SlotState, SlotLog, jax.Array]
    ) -> tuple[SlotState, SlotLog, jax.Array]:
        state, log, busy = carry
        can_take = jnp.any((state.queued > 0)[:, None] & ~state.running)
        with jax.named_scope(TAKE):
            state = jax.lax.cond(can_take, partial(_take, draws=draws, shape=shape), _same, state)
        running = state.running
        step = draft_and_verify if shape.speculative else draw_and_read
        state, columns, ended = step(layers, state, pages, draws, model=model, shape=shape)

        def put(buffer: jax.Array, column: jax.Array) -> jax.Array:
            at = (state.step - first) * shape.columns
            column = column.astype(buffer.dtype)
            return jax.lax.dynamic_update_slice_in_dim(buffer, column, at, axis=2)

        log = jax.tree.map(put, log, columns)
        state = replace(state, step=state.step + 1)
        with jax.named_scope(END):
            state = jax.lax.cond(jnp.any(ended), lambda s: _end(s, ended, shape), _same, state)
        return state, log, busy + running.sum()

    def fill_page(
        carry: tuple[SlotState, SlotLog, jax.Array],
    ) -> tuple[SlotState, SlotLog, jax.Array]:
        """Steps until the current pages are full, which then go into the pool.

        In between, the pool is only read: it is no part of what the steps carry, where conditionals
        would copy it.
        """
        state, log, busy = carry
        begin = state.step

        def within(carry: tuple[SlotState, SlotLog, jax.Array]) -> jax.Array:
            step = carry[0].step
            return ((step == begin) | ~_fills_pages(step, shape)) & unfinished(carry)

        with jax.named_scope(WITHIN_PAGE):
            state, log, busy = jax.lax.while_loop(
                within,
                partial(advance, state.cache.pages),
                (replace(state, cache=replace(state.cache, pages={})), log, busy),
            )
        state = replace(state, cache=replace(state.cache, pages=carry[0].cache.pages))
        return _keep_pages(state, _fills_pages(state.step, shape), shape), log, busy

    carry = (state, log, jnp.int32(0))
    state, log, busy = jax.lax.while_loop(unfinished, fill_page, carry)

    def whole(leaf: jax.Array) -> jax.Array:
        return model.layout.constrain(leaf, (None,) * leaf.ndim)

    live = (state.cache.filled & OF_DECODER > 0) & state.cache.used[..., None]
    current = (state.cache.current_filled & OF_DECODER > 0) & state.running[..., None]
    status = Status(
        steps=state.step - first,
        busy=busy,
        done=whole(state.prompts.done),
        running=whole(state.running.sum(axis=1)),
        queued=whole(state.queued),
        free=whole((~state.cache.used).sum(axis=1)),
        live=whole(live.sum(axis=(1, 2)) + current.sum(axis=(1, 2))),
    )
    log = jax.tree.map(lambda leaf: constrain_to_read(leaf, model.layout), log)
    return laid_out(state, model), log, status


# --- Parts of a step -----------------------------------------------------------------------------


def draw_and_read(
    layers: Params,
    state: SlotState,
    pages: dict[str, StackCache],
    draws: Draws,
    *,
    model: Decoder,
    shape: SlotShape,
) -> tuple[SlotState, SlotLog, Bool[Array, "shards slots"]]:
    """One token of every slot.

    Args:
      layers: weights, as `unstack_layers_of_slots` returns them.
      pages: the pool's, which the state's cache is without.

    Returns:
      The state, in which the step is not yet counted; what the step adds to the log; and the slots
      whose sample is complete.
    """
    running = state.running

    # 1. Draw a token of every slot.
    next_logits = logits(layers, state.hidden, model)
    tokens, policy, drawn = draw(next_logits, state.keys, state.lengths, draws.sampling)
    tokens = jnp.where(running, tokens, 0)
    eos = running & jnp.any(tokens[..., None] == draws.eos_ids, axis=-1)

    # 2. Read it.
    entry = state.step % shape.page
    now = jnp.arange(shape.page) == entry
    filled = state.cache.current_filled
    new = SlotTokens(
        tokens[..., None],
        (of_prompt(state.prompts.lengths, state, shape) + state.lengths)[..., None],
        entry,
        ((filled > 0) | now)[:, :, None],
        state.reads,
    )
    hidden, cache, experts = decode_slots(
        layers,
        new,
        replace(state.cache, pages=pages),
        model,
        record_experts=shape.record_experts,
    )
    filled = jnp.where(now & running[..., None], jnp.uint8(OF_DECODER), filled)
    columns = SlotLog(
        request=jnp.where(running, state.request, -1)[..., None],
        index=state.lengths[..., None],
        tokens=tokens[..., None],
        policy_log_probs=policy[..., None],
        sampling_log_probs=drawn[..., None],
        ended=eos[..., None],
        experts=experts,
    )
    state = replace(
        state,
        hidden=hidden[:, :, 0],
        lengths=state.lengths + running,
        cache=replace(cache, pages={}, current_filled=filled),
    )
    return state, columns, eos | (running & (state.lengths == shape.max_new_tokens))


def _fills_pages(step: Int[Array, ""], shape: SlotShape) -> Bool[Array, ""]:
    """Whether the current pages are full when so many steps are made."""
    return step * shape.entries % shape.page == 0


def _same(state: SlotState) -> SlotState:
    return state


def _over_shards(leaf: jax.Array, model: Decoder) -> jax.Array:
    return model.layout.constrain(leaf, ("slots", *(None,) * (leaf.ndim - 1)))


def laid_out(state: SlotState, model: Decoder) -> SlotState:
    """The state as `empty_slots` lays it out: another layout would compile the programs again."""
    axes = page_axes(model)

    def of_layers(leaf: jax.Array) -> jax.Array:
        return model.layout.constrain(leaf, ("layers",) * (leaf.ndim - len(axes)) + axes)

    pages, current = (
        jax.tree.map(of_layers, stacks) for stacks in (state.cache.pages, state.cache.current)
    )
    cache = replace(state.cache, pages={}, current={})
    state = jax.tree.map(
        lambda leaf: _over_shards(leaf, model) if leaf.ndim else leaf, replace(state, cache=cache)
    )
    return replace(state, cache=replace(state.cache, pages=pages, current=current))


def _list_size(model: Decoder, shape: SlotShape) -> int:
    """Entries of the page list: pages of samples have one slot each, those of prompts several."""
    chunk = pages_at_once(shape.page, model.layout.platform)
    most = min(
        shape.slots * (shape.sample_pages + shape.prompt_pages),
        shape.pages + shape.slots * shape.prompt_pages,
    )
    return -(-most // chunk) * chunk


def empty_log(model: Decoder, shape: SlotShape) -> SlotLog:
    """That nothing is written in yet."""
    size = (model.layout.shards("slots"), shape.slots, shape.steps * shape.columns)

    def full(value: float, dtype: DTypeLike, *rest: int) -> jax.Array:
        return _over_shards(jnp.full((*size, *rest), value, dtype), model)

    integer, real = jnp.int32, jnp.float32
    experts, config = None, model.config
    if shape.record_experts and config.experts is not None:
        width = len(config.stacks["layers"]) * config.experts.num_experts_per_tok
        experts = full(0, config.experts.index_dtype, width)
    return SlotLog(
        full(-1, integer),
        full(0, integer),
        full(0, integer),
        full(0, real),
        full(0, real),
        full(0, bool),
        experts,
        full(0, integer) if shape.speculative else None,
    )


def _relist(state: SlotState, shape: SlotShape) -> SlotState:
    """The list of pages that the running slots read, anew."""
    tables = jnp.concatenate([of_prompt(state.prompts.tables, state, shape), state.tables], axis=-1)
    tables = jnp.where(state.running[..., None], tables, -1)
    return replace(state, reads=list_pages(state.cache, tables, state.reads.pages.shape[1]))


def _take(state: SlotState, draws: Draws, shape: SlotShape) -> SlotState:
    """Slots without a sample take the next ones of their queue, as far as there are pages.

    A running slot needs one more page sooner or later, and so does each that is added. Without a
    running slot, one is added in any case.
    """
    free = (~state.cache.used).sum(axis=1)
    running = state.running.sum(axis=1)
    room = jnp.maximum(free - running, (running == 0).astype(jnp.int32))
    rank = jnp.cumsum(~state.running, axis=1) - 1
    takes = ~state.running & (rank < jnp.minimum(state.queued, room)[:, None])
    at = (state.head[:, None] + jnp.maximum(rank, 0)) % state.queue.shape[1]
    requests = jnp.take_along_axis(state.queue, at, axis=1)
    request = jnp.where(takes, requests, state.request)
    taken = takes.sum(axis=1)
    state = replace(
        state,
        running=state.running | takes,
        request=request,
        lengths=jnp.where(takes, 0, state.lengths),
        tables=jnp.where(takes[..., None], -1, state.tables),
        head=(state.head + taken) % state.queue.shape[1],
        queued=state.queued - taken,
        cache=replace(
            state.cache,
            current_filled=jnp.where(takes[..., None], 0, state.cache.current_filled),
        ),
    )
    prompts = state.prompts
    sample = of_prompt(prompts.first_samples, state, shape) + request % shape.samples
    keys = keys_of(draws, of_prompt(prompts.ids, state, shape), sample)
    hidden = of_prompt(prompts.hidden, state, shape)
    state = replace(
        state,
        hidden=jnp.where(takes[..., None], hidden, state.hidden),
        keys=jnp.where(takes, keys, state.keys),
    )
    if state.drafting is not None:
        state = with_first_tokens(state, takes, shape)
    return _relist(state, shape)


def _end(state: SlotState, ended: jax.Array, shape: SlotShape) -> SlotState:
    """These samples are complete: their slots and pages are free."""
    entry = jnp.where(ended, jnp.maximum(state.request, 0) // shape.samples, shape.prompts)
    done = jax.vmap(lambda done, at: done.at[at].add(1, mode="drop"))(state.prompts.done, entry)
    return replace(
        state,
        running=state.running & ~ended,
        cache=release(state.cache, jnp.where(ended[..., None], state.tables, -1)),
        tables=jnp.where(ended[..., None], -1, state.tables),
        prompts=replace(state.prompts, done=done),
    )


def _keep_pages(state: SlotState, full: Bool[Array, ""], shape: SlotShape) -> SlotState:
    """Move the current pages into the pool if they are full; first make room for them."""
    state = _make_room(state, full, shape)
    needed = full & state.running & jnp.any(state.cache.current_filled, axis=-1)
    cache, ids = keep_current(state.cache, needed)
    cache = replace(cache, current_filled=jnp.where(full, 0, cache.current_filled))
    kept = (state.tables >= 0).sum(axis=-1)
    at = jnp.arange(shape.sample_pages) == kept[..., None]
    tables = jnp.where(at & needed[..., None], ids[..., None], state.tables)
    return _relist(replace(state, cache=cache, tables=tables), shape)


def _make_room(state: SlotState, full: Bool[Array, ""], shape: SlotShape) -> SlotState:
    """Where pages are short, the shortest samples go back to the front of the queue."""
    needed = full & state.running & jnp.any(state.cache.current_filled, axis=-1)
    short = needed.sum(axis=1) - (~state.cache.used).sum(axis=1)
    gives = (state.tables >= 0).sum(axis=-1) + needed
    order = jnp.argsort(jnp.where(state.running, state.lengths, shape.max_new_tokens + 1), axis=1)
    given = jnp.take_along_axis(jnp.where(state.running, gives, 0), order, axis=1)
    before = jnp.cumsum(given, axis=1) - given
    back = put_rows(state.running, order, before < short[:, None]) & state.running
    rank = jnp.cumsum(back, axis=1)
    size = state.queue.shape[1]
    at = jnp.where(back, (state.head[:, None] - rank) % size, size)
    count = back.sum(axis=1)
    return replace(
        state,
        running=state.running & ~back,
        cache=release(state.cache, jnp.where(back[..., None], state.tables, -1)),
        tables=jnp.where(back[..., None], -1, state.tables),
        queue=put_rows(state.queue, at, state.request),
        head=(state.head - count) % size,
        queued=state.queued + count,
    )
