"""A step of slots in which the module for multi-token prediction drafts.

As in `r1jax.sampler.speculative`: the module drafts, the decoder reads a token and the draft at
once, and gives two tokens or one. All slots write the same two entries of their current pages; the
second of them holds a token where the draft was accepted. What the module writes is a step behind:
its second entry holds a token where the step before accepted one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from r1jax.models.config import Decoder
from r1jax.models.decoder import SlotTokens, decode_slots, logits
from r1jax.models.kv_cache import StackCache
from r1jax.models.multi_token_prediction import draft_slots
from r1jax.models.paged_cache import OF_DECODER, OF_MODULE
from r1jax.models.parameters import Params
from r1jax.sampler.distribution import (
    draft_and_verify_uniforms,
    draw_filtered,
    drawn_log_probs,
    filter_logits,
    verify,
)
from r1jax.sampler.samples import Draws
from r1jax.sampler.slot_state import Drafting, SlotLog, SlotShape, SlotState, of_prompt

if TYPE_CHECKING:
    from jaxtyping import Array, Bool


def with_first_tokens(
    state: SlotState, takes: Bool[Array, "shards slots"], shape: SlotShape
) -> SlotState:
    """The state with the first token of the samples that slots have just taken."""
    old = state.drafting
    assert old is not None
    (tokens, _, _) = _first_tokens(state, shape)
    hidden = jnp.repeat(state.hidden[:, :, None], 2, axis=2)
    drafting = Drafting(
        tokens=jnp.where(takes[..., None], jnp.stack([tokens, tokens], axis=-1), old.tokens),
        hidden=jnp.where(takes[..., None, None], hidden, old.hidden),
        accepted=old.accepted & ~takes,
        started=old.started | takes,
    )
    return replace(state, drafting=drafting, lengths=jnp.where(takes, 1, state.lengths))


def _first_tokens(state: SlotState, shape: SlotShape) -> tuple[jax.Array, ...]:
    """Token and log-probs [shards, slots] of each slot's sample."""
    first, sample = state.prompts.first_tokens, jnp.maximum(state.request, 0) % shape.samples
    assert first is not None
    return tuple(
        jnp.take_along_axis(of_prompt(leaf, state, shape), sample[..., None], axis=-1)[..., 0]
        for leaf in (first.tokens, first.policy_log_probs, first.sampling_log_probs)
    )


def draft_and_verify(
    layers: Params,
    state: SlotState,
    pages: dict[str, StackCache],
    draws: Draws,
    *,
    model: Decoder,
    shape: SlotShape,
) -> tuple[SlotState, SlotLog, Bool[Array, "shards slots"]]:
    """One token or two of every slot; see `draw_and_read`."""
    before = state.drafting
    assert before is not None
    pair, running, page = jnp.arange(2, dtype=jnp.int32), state.running, shape.page
    first = _first_tokens(state, shape)

    def is_eos(tokens: jax.Array) -> jax.Array:
        return jnp.any(tokens[..., None] == draws.eos_ids, axis=-1)

    started = running & before.started
    first_eos = started & is_eos(first[0])
    active = running & ~first_eos & (state.lengths < shape.max_new_tokens)
    unread = state.lengths - 1  # index of the token that the decoder has not read
    starts = (of_prompt(state.prompts.lengths, state, shape) + unread)[..., None]
    entry = 2 * state.step % page
    at = jnp.arange(page) - entry  # of the entries, counted from the first of this step
    within = (at >= 0) & (at <= pair[:, None])  # [token, entry]: itself and what is before
    both = (at >= 0) & (at < 2)

    def put(filled: jax.Array, bit: int, accepted: jax.Array) -> jax.Array:
        held = active[..., None] & ((at == 0) | ((at == 1) & accepted[..., None]))
        return filled | jnp.where(held, jnp.uint8(bit), jnp.uint8(0))

    def new_tokens(
        tokens: jax.Array, positions: jax.Array, filled: jax.Array, bit: int
    ) -> SlotTokens:
        visible = (((filled & bit) > 0) & ~both)[:, :, None] | within
        return SlotTokens(tokens, positions, entry, visible, state.reads)

    # 1. The module reads what the last step gave, and drafts.
    filled = state.cache.current_filled
    cache = replace(state.cache, pages=pages)
    new = new_tokens(
        before.tokens, starts - 1 - before.accepted[..., None] + pair, filled, OF_MODULE
    )
    drafting, cache = draft_slots(layers, before.hidden, new, cache, model)
    filled = put(filled, OF_MODULE, before.accepted)
    last = before.accepted[..., None].astype(jnp.int32)
    drafting = jnp.take_along_axis(drafting, last[..., None], axis=2)[:, :, 0]
    draft_filtered = filter_logits(logits(layers, drafting, model), draws.sampling)
    index = state.lengths  # of the drafted token in the sample
    for_draft, for_accepting, for_replacing = draft_and_verify_uniforms(state.keys, index)
    drafts = draw_filtered(draft_filtered, for_draft)

    # 2. The decoder reads the token that it has not read, and the draft.
    token = jnp.take_along_axis(before.tokens, last, axis=2)
    new = new_tokens(
        jnp.concatenate([token, drafts[..., None]], axis=-1), starts + pair, filled, OF_DECODER
    )
    hidden, cache, _ = decode_slots(layers, new, cache, model, record_experts=False)
    shards, slots = running.shape
    all_logits = logits(layers, hidden.reshape(shards, 2 * slots, -1), model)
    all_filtered = filter_logits(all_logits, draws.sampling)
    (after_first, after_draft), (filtered_first, filtered_draft) = (
        tuple(leaf.reshape(shards, slots, 2, -1)[:, :, i] for i in range(2))
        for leaf in (all_logits, all_filtered)
    )

    # 3. The draft is accepted, and another token follows it; or a token takes its place.
    tokens, accepted = verify(drafts, draft_filtered, filtered_first, for_accepting, for_replacing)
    accepted &= active
    _, _, for_further = draft_and_verify_uniforms(state.keys, index + 1)
    further = draw_filtered(filtered_draft, for_further)
    eos = active & is_eos(tokens)
    follows = accepted & ~eos & (index + 1 < shape.max_new_tokens)
    follows_eos = follows & is_eos(further)
    lengths = state.lengths + active + follows

    given = (started, active, follows)
    of_two = (
        drawn_log_probs(tokens, after_first, filtered_first, draws.sampling),
        drawn_log_probs(further, after_draft, filtered_draft, draws.sampling),
    )
    no_draft = jnp.zeros_like(index)
    columns = SlotLog(
        request=jnp.stack([jnp.where(each, state.request, -1) for each in given], axis=-1),
        index=jnp.stack([no_draft, index, index + 1], axis=-1),
        tokens=jnp.stack([first[0], tokens, further], axis=-1),
        policy_log_probs=jnp.stack([first[1], of_two[0][0], of_two[1][0]], axis=-1),
        sampling_log_probs=jnp.stack([first[2], of_two[0][1], of_two[1][1]], axis=-1),
        ended=jnp.stack([first_eos, eos, follows_eos], axis=-1),
        drafts=jnp.stack([no_draft, jnp.where(active, 1 + accepted, 0), no_draft], axis=-1),
    )
    state = replace(
        state,
        lengths=lengths,
        cache=replace(cache, pages={}, current_filled=put(filled, OF_DECODER, accepted)),
        drafting=Drafting(
            tokens=jnp.stack([tokens, further], axis=-1),
            hidden=hidden,
            accepted=accepted,
            started=before.started & ~running,
        ),
    )
    ended = first_eos | eos | follows_eos | (running & (lengths >= shape.max_new_tokens))
    return state, columns, ended
