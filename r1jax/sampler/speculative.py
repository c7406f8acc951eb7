"""Self-speculative decoding: the module for multi-token prediction drafts, the model verifies.

A step of a sample: the module drafts the token after the next, the model reads both at once, and
its distribution after the first decides whether the draft is accepted (`verify`; arXiv 2211.17192).
If so, the distribution after the draft gives one more token: a step gives two tokens or one, for
one reading of the weights, and they are distributed as without drafts, filters included. The
log-probs of the tokens are the model's.

So samples progress at different speeds, and would fill different entries of the KV cache. Writing
them there, every layer and step would scatter one row per sample, which a TPU does row by row. Here
all samples write to the same two entries instead, and a mask says which of a sample's entries hold
a rejected draft. That costs memory: two entries for each 1 + a tokens of the slowest sample, where
a is the rate of acceptance: 8 % more than one entry per token at 0.85.

As without drafts, the host only learns every `sync_every` steps whether all samples have ended.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.models.config import Decoder
from r1jax.models.decoder import NewTokens, decode, last_token, logits, unstack_layers
from r1jax.models.kv_cache import KVCache, PromptCache, empty_cache, grow_cache
from r1jax.models.multi_token_prediction import draft, prefill_with_module
from r1jax.models.parameters import Params
from r1jax.sampler.distribution import (
    draft_and_verify_uniforms,
    draw,
    draw_filtered,
    drawn_log_probs,
    filter_logits,
    verify,
)
from r1jax.sampler.samples import (
    Draws,
    Finish,
    Prompts,
    Samples,
    SampleShape,
    no_samples,
    sample_keys,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key


@struct.dataclass
class SpeculativeState:
    """Between two steps. Of each sample, one token is not yet read by the model.

    step: steps so far.
    read: how many sampled tokens the model has read.
    tokens: what the last step gave. The second counts if `accepted`; the last that counts is the
        token not yet read.
    hidden: the model's activations before each of `tokens`.
    accepted: whether the last step's draft was accepted.
    kept: whether each step's was.
    cache: of the model and of the module; a step has two entries.
    """

    step: Int[Array, ""]
    read: Int[Array, "batch samples"]
    tokens: Int[Array, "batch samples 2"]
    hidden: Float[Array, "batch samples 2 hidden"]
    accepted: Bool[Array, "batch samples"]
    kept: Bool[Array, "batch samples steps"]
    keys: Key[Array, "batch samples"]
    running: Bool[Array, "batch samples"]
    samples: Samples
    cache: KVCache


@partial(jax.jit, static_argnames=("model", "shape"))
def start_speculatively(
    params: Params, prompts: Prompts, draws: Draws, *, model: Decoder, shape: SampleShape
) -> tuple[SpeculativeState, PromptCache]:
    """Prefill and the first token; room for `shape.capacity` steps."""
    batch, count, layout = len(prompts.tokens), shape.samples, model.layout
    hidden, prompt_cache = prefill_with_module(params, prompts.tokens, prompts.lengths, model)
    hidden = last_token(hidden, prompts.lengths)
    keys = sample_keys(prompts, draws, count)
    hidden = jnp.broadcast_to(hidden[:, None], (batch, count, hidden.shape[-1]))
    first_logits = logits(params, hidden, model)
    tokens, policy, drawn = draw(first_logits, keys, jnp.int32(0), draws.sampling)

    def over_batch(leaf: jax.Array) -> jax.Array:
        return layout.constrain(leaf, ("batch", "sample", *(None,) * (leaf.ndim - 2)))

    zeros = over_batch(jnp.zeros((batch, count), jnp.int32))
    samples = no_samples(batch, count, shape.max_new_tokens, layout)
    samples = replace(samples, drafted=zeros, accepted=zeros)
    true, false = (over_batch(jnp.full((batch, count), value)) for value in (True, False))
    samples, running = _append(samples, true, tokens, policy, drawn, draws.eos_ids)
    state = SpeculativeState(
        step=jnp.int32(0),
        read=zeros,
        tokens=jnp.stack([tokens, zeros], axis=-1),
        hidden=jnp.stack([hidden, hidden], axis=2),
        accepted=false,
        kept=over_batch(jnp.zeros((batch, count, shape.capacity), bool)),
        keys=keys,
        running=running,
        samples=samples,
        cache=empty_cache(batch, count, 2 * shape.capacity, model, with_module=True),
    )
    return state, prompt_cache


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def decode_speculatively(
    params: Params,
    state: SpeculativeState,
    prompts: PromptCache,
    until: Int[Array, ""],
    draws: Draws,
    *,
    model: Decoder,
) -> SpeculativeState:
    """Decode until step `until`, or until every sample has ended."""
    layers = unstack_layers(params, model)
    pair = jnp.arange(2, dtype=jnp.int32)

    def unfinished(state: SpeculativeState) -> jax.Array:
        return (state.step < until) & jnp.any(state.running)

    def advance(state: SpeculativeState) -> SpeculativeState:
        batch, count = state.read.shape
        starts = prompts.lengths[:, None, None] + state.read[..., None]
        entry = 2 * state.step

        # 1. The module reads what the last step gave, and drafts. It is a step behind the model:
        # whether its second entry counts is what the step before has decided.
        late = jnp.pad(state.kept, ((0, 0), (0, 0), (1, 0)))[..., :-1]
        positions = starts - 1 - state.accepted[..., None] + pair
        new = NewTokens(state.tokens, positions, entry, _visible(late, state.step))
        drafting, cache = draft(layers, state.hidden, new, prompts, state.cache, model)
        last = state.accepted[..., None].astype(jnp.int32)
        drafting = jnp.take_along_axis(drafting, last[..., None], axis=2)[:, :, 0]
        draft_filtered = filter_logits(logits(layers, drafting, model), draws.sampling)
        index = state.read + 1  # of the drafted token in the sample
        for_draft, for_accepting, for_replacing = draft_and_verify_uniforms(state.keys, index)
        drafts = draw_filtered(draft_filtered, for_draft)

        # 2. The model reads the token that it has not read, and the draft.
        unread = jnp.take_along_axis(state.tokens, last, axis=2)
        both = jnp.concatenate([unread, drafts[..., None]], axis=-1)
        new = NewTokens(both, starts + pair, entry, _visible(state.kept, state.step))
        hidden, cache = decode(layers, new, prompts, cache, model)
        all_logits = logits(layers, hidden.reshape(batch, 2 * count, -1), model)
        filtered = filter_logits(all_logits, draws.sampling)
        (after_first, after_draft), (filtered_first, filtered_draft) = (
            tuple(leaf.reshape(batch, count, 2, -1)[:, :, i] for i in range(2))
            for leaf in (all_logits, filtered)
        )

        # 3. The draft is accepted, and another token follows it; or a token takes its place.
        tokens, accepted = verify(
            drafts, draft_filtered, filtered_first, for_accepting, for_replacing
        )
        accepted &= state.running
        assert state.samples.drafted is not None and state.samples.accepted is not None
        _, _, for_further = draft_and_verify_uniforms(state.keys, index + 1)
        further = draw_filtered(filtered_draft, for_further)
        drafted = replace(
            state.samples,
            drafted=state.samples.drafted + state.running,
            accepted=state.samples.accepted + accepted,
        )
        eos_ids = draws.eos_ids
        policy, drawn = drawn_log_probs(tokens, after_first, filtered_first, draws.sampling)
        samples, running = _append(drafted, state.running, tokens, policy, drawn, eos_ids)
        policy, drawn = drawn_log_probs(further, after_draft, filtered_draft, draws.sampling)
        samples, still_running = _append(
            samples, running & accepted, further, policy, drawn, eos_ids
        )
        return SpeculativeState(
            step=state.step + 1,
            read=state.read + jnp.where(state.running, 1 + accepted, 0),
            tokens=jnp.stack([tokens, further], axis=-1),
            hidden=hidden,
            accepted=accepted,
            kept=jax.lax.dynamic_update_slice_in_dim(
                state.kept, accepted[..., None], state.step, axis=2
            ),
            keys=state.keys,
            running=jnp.where(accepted, still_running, running),
            samples=samples,
            cache=cache,
        )

    return jax.lax.while_loop(unfinished, advance, state)


@partial(jax.jit, static_argnames=("extra", "model"))
def grow_speculation(state: SpeculativeState, extra: int, model: Decoder) -> SpeculativeState:
    """The same with room for `extra` more steps."""
    kept = jnp.pad(state.kept, ((0, 0), (0, 0), (0, extra)))
    return replace(state, kept=kept, cache=grow_cache(state.cache, 2 * extra, model))


def _visible(kept: jax.Array, step: jax.Array) -> jax.Array:
    """The entries that a step's two tokens attend to, bool [batch, samples, 2, 2 * steps].

    Of each step before, its first entry, and its second if that was kept; of this one, the first
    token attends to itself, and the second to both.

    Args:
      kept: bool [batch, samples, steps].
    """
    steps = jnp.arange(kept.shape[-1])
    before = jnp.stack([jnp.ones_like(kept), kept], axis=-1) & (steps < step)[:, None]
    now = (steps == step)[:, None, None] & jnp.tri(2, dtype=bool)  # [steps, token, entry]
    seen = before[:, :, None] | now.swapaxes(0, 1)
    return seen.reshape(*kept.shape[:2], 2, -1)


def _append(
    samples: Samples,
    where: jax.Array,
    tokens: jax.Array,
    policy: jax.Array,
    drawn: jax.Array,
    eos_ids: jax.Array,
) -> tuple[Samples, jax.Array]:
    """The samples with one more token where `where` is true; and which of those are running."""
    room = samples.tokens.shape[-1]
    index = jnp.where(where, samples.lengths, room)  # beyond the row: dropped

    def put(buffer: jax.Array, values: jax.Array) -> jax.Array:
        def one(row: jax.Array, at: jax.Array, value: jax.Array) -> jax.Array:
            return row.at[at].set(value, mode="drop")

        return jax.vmap(jax.vmap(one))(buffer, index, values.astype(buffer.dtype))

    ended = where & jnp.any(tokens[..., None] == eos_ids, axis=-1)
    longer = replace(
        samples,
        tokens=put(samples.tokens, tokens),
        lengths=samples.lengths + where,
        finish=jnp.where(ended, Finish.EOS, samples.finish),
        policy_log_probs=put(samples.policy_log_probs, policy),
        sampling_log_probs=put(samples.sampling_log_probs, drawn),
    )
    return longer, where & ~ended & (longer.lengths < room)
