"""Self-speculative decoding: the module for multi-token prediction drafts, the model verifies.

A step of a sample: the module drafts the token after the next, the model reads both at once, and
its distribution after the first decides whether the draft stays (`verify`; arXiv 2211.17192). If it
does, the distribution after the draft gives one more token: a step gives two tokens or one, for
one reading of the weights, and they are distributed as without drafts, filters included. The
log-probs of the tokens are the model's own.

Samples so progress at different speeds, and what each remembers would lie at other places of its
cache. Written there, every layer and step would scatter one row per sample, which a TPU does row by
row. Here all samples write to the same two places instead, side by side, and a mask says which of
a sample's places hold a draft that did not stay. That costs memory: two places for each 1 + a
tokens of the slowest sample, where a is the rate of acceptance: 8 % more than a token's at 0.85.

Nothing passes through the host but what it is told every `sync_every` steps, as without drafts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.models.decoder import (
    Cache,
    Decoder,
    all_stacks,
    decode_several,
    empty_cache,
    grow_cache,
    logits,
    unstack_layers,
)
from r1jax.models.multi_token_prediction import draft, prefill_with_module
from r1jax.models.parameters import Params
from r1jax.sampler.distribution import (
    Sampling,
    draft_and_verify_uniforms,
    draw,
    draw_filtered,
    filter_logits,
    token_log_probs,
    verify,
)
from r1jax.sampler.samples import Finish, Prompts, Samples, keys_of, no_samples


@struct.dataclass
class SpeculativeState:
    """Between two steps. Of each sample, one token is not yet read by the model.

    step: steps so far, a scalar.
    read: int32 [batch, samples], sampled tokens that the model has read.
    tokens: int32 [batch, samples, 2], what the last step gave. The second counts if `accepted`; the
        last that counts is the token not yet read.
    hidden: [batch, samples, 2, hidden], the model's activations before each of `tokens`.
    accepted: bool [batch, samples], whether the last step's draft stayed.
    kept: bool [batch, samples, steps], whether each step's did.
    cache: of the model and of the module; a step has two entries.
    """

    step: jax.Array
    read: jax.Array
    tokens: jax.Array
    hidden: jax.Array
    accepted: jax.Array
    kept: jax.Array
    keys: jax.Array
    running: jax.Array
    samples: Samples
    cache: Cache


@partial(jax.jit, static_argnames=("model", "count", "capacity", "max_new_tokens"))
def start_speculatively(
    params: Params,
    prompts: Prompts,
    seed: jax.Array,
    rollout: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    *,
    model: Decoder,
    count: int,
    capacity: int,
    max_new_tokens: int,
) -> tuple[SpeculativeState, Cache]:
    """Prefill and the first token; room for `capacity` steps."""
    batch, shape, layout = len(prompts.tokens), (len(prompts.tokens), count), model.layout
    hidden, prompt_cache, module_cache = prefill_with_module(
        params, prompts.tokens, prompts.lengths, model
    )
    keys = keys_of(prompts, seed, rollout, count)
    hidden = jnp.broadcast_to(hidden[:, None], (*shape, hidden.shape[-1]))
    tokens, policy, drawn = draw(logits(params, hidden, model), keys, jnp.int32(0), sampling)

    def over_batch(leaf: jax.Array) -> jax.Array:
        return layout.constrain(leaf, ("batch", "sample", *(None,) * (leaf.ndim - 2)))

    none = over_batch(jnp.zeros(shape, jnp.int32))
    samples = no_samples(batch, count, max_new_tokens, layout)
    samples = replace(samples, drafted=none, accepted=none)
    everyone, nobody = over_batch(jnp.ones(shape, bool)), over_batch(jnp.zeros(shape, bool))
    samples, running = _append(samples, everyone, tokens, policy, drawn, eos_ids)
    state = SpeculativeState(
        step=jnp.int32(0),
        read=none,
        tokens=jnp.stack([tokens, none], axis=-1),
        hidden=jnp.stack([hidden, hidden], axis=2),
        accepted=nobody,
        kept=over_batch(jnp.zeros((*shape, capacity), bool)),
        keys=keys,
        running=running,
        samples=samples,
        cache=empty_cache(batch, count, 2 * capacity, model, tuple(all_stacks(model.config))),
    )
    return state, prompt_cache | module_cache


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def decode_speculatively(
    params: Params,
    state: SpeculativeState,
    prompt_cache: Cache,
    prompt_lengths: jax.Array,
    until: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    *,
    model: Decoder,
) -> SpeculativeState:
    """Decode until step `until`, or until every sample has ended."""
    layers = unstack_layers(params, model)
    pair = jnp.arange(2, dtype=jnp.int32)

    def more(state: SpeculativeState) -> jax.Array:
        return (state.step < until) & jnp.any(state.running)

    def advance(state: SpeculativeState) -> SpeculativeState:
        batch, count = state.read.shape
        starts = prompt_lengths[:, None, None] + state.read[..., None]
        place = 2 * state.step

        # 1. The module reads what the last step gave, and drafts. It is a step behind the model:
        # whether its second entry counts is what the step before has decided.
        late = jnp.pad(state.kept, ((0, 0), (0, 0), (1, 0)))[..., :-1]
        drafting, cache = draft(
            layers,
            state.hidden,
            state.tokens,
            starts - 1 - state.accepted[..., None] + pair,
            prompt_cache,
            prompt_lengths,
            state.cache,
            place,
            _visible(late, state.step),
            model,
        )
        last = state.accepted[..., None].astype(jnp.int32)
        drafting = jnp.take_along_axis(drafting, last[..., None], axis=2)[:, :, 0]
        draft_filtered = filter_logits(logits(layers, drafting, model), sampling)
        index = state.read + 1  # of the drafted token in the sample
        for_draft, for_keeping, for_another = draft_and_verify_uniforms(state.keys, index)
        drafts = draw_filtered(draft_filtered, for_draft)

        # 2. The model reads the token that it has not read, and the draft.
        unread = jnp.take_along_axis(state.tokens, last, axis=2)
        hidden, of_model = decode_several(
            layers,
            jnp.concatenate([unread, drafts[..., None]], axis=-1),
            starts + pair,
            prompt_cache,
            prompt_lengths,
            state.cache,
            place,
            _visible(state.kept, state.step),
            model,
        )
        scores = logits(layers, hidden.reshape(batch, 2 * count, -1), model)
        filtered = filter_logits(scores, sampling)
        (scores, following), (filtered, beyond) = (
            tuple(leaf.reshape(batch, count, 2, -1)[:, :, i] for i in range(2))
            for leaf in (scores, filtered)
        )

        # 3. The draft stays, and a further token comes of what follows it; or another replaces it.
        tokens, accepted = verify(drafts, draft_filtered, filtered, for_keeping, for_another)
        accepted &= state.running
        _, _, for_further = draft_and_verify_uniforms(state.keys, index + 1)
        further = draw_filtered(beyond, for_further)
        drafted = replace(
            state.samples,
            drafted=state.samples.drafted + state.running,
            accepted=state.samples.accepted + accepted,
        )
        policy, drawn = token_log_probs(tokens, scores, filtered, sampling)
        samples, running = _append(drafted, state.running, tokens, policy, drawn, eos_ids)
        policy, drawn = token_log_probs(further, following, beyond, sampling)
        more_of = running & accepted
        both, going_on = _append(samples, more_of, further, policy, drawn, eos_ids)
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
            running=jnp.where(accepted, going_on, running),
            samples=both,
            cache=of_model | cache,
        )

    return jax.lax.while_loop(more, advance, state)


@partial(jax.jit, static_argnames=("extra", "model"))
def grow_speculation(state: SpeculativeState, extra: int, model: Decoder) -> SpeculativeState:
    """The same with room for `extra` more steps."""
    kept = jnp.pad(state.kept, ((0, 0), (0, 0), (0, extra)))
    return replace(state, kept=kept, cache=grow_cache(state.cache, 2 * extra, model))


def _visible(kept: jax.Array, step: jax.Array) -> jax.Array:
    """What the two tokens of a step attend to, bool [batch, samples, 2, 2 * steps].

    Of each step before, its first entry, and its second if that was kept; of this one, the first
    token sees itself, and the second both.

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
    to: jax.Array,
    tokens: jax.Array,
    policy: jax.Array,
    drawn: jax.Array,
    eos_ids: jax.Array,
) -> tuple[Samples, jax.Array]:
    """The samples with one more token where `to` is true; and which of those go on."""
    room = samples.tokens.shape[-1]
    index = jnp.where(to, samples.lengths, room)  # beyond the row: dropped

    def put(buffer: jax.Array, values: jax.Array) -> jax.Array:
        def one(row: jax.Array, at: jax.Array, value: jax.Array) -> jax.Array:
            return row.at[at].set(value, mode="drop")

        return jax.vmap(jax.vmap(one))(buffer, index, values.astype(buffer.dtype))

    ended = to & jnp.any(tokens[..., None] == eos_ids, axis=-1)
    longer = replace(
        samples,
        tokens=put(samples.tokens, tokens),
        lengths=samples.lengths + to,
        finish=jnp.where(ended, Finish.EOS, samples.finish),
        policy_log_probs=put(samples.policy_log_probs, policy),
        sampling_log_probs=put(samples.sampling_log_probs, drawn),
    )
    return longer, to & ~ended & (longer.lengths < room)
