"""Sampling G completions per prompt: one prefill per prompt, then a compiled decode loop.

The host only counts: it starts the loop, is told every `sync_every` tokens whether all samples
have ended, and doubles the cache when it is full. No token passes through it on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from r1jax.models.decoder import (
    Cache,
    Decoder,
    decode,
    empty_cache,
    grow_cache,
    logits,
    prefill,
    unstack_layers,
)
from r1jax.models.parameters import Params
from r1jax.sampler.distribution import Sampling, draw
from r1jax.sampler.options import GenerateOptions
from r1jax.sampler.samples import Finish, Prompts, Samples, StopSearch, cut, keys_of, no_samples
from r1jax.sampler.speculative import (
    SpeculativeState,
    decode_speculatively,
    grow_speculation,
    start_speculatively,
)
from r1jax.sharding import Layout, from_process_rows, move_rows, to_process_rows


@struct.dataclass
class _State:
    step: jax.Array
    hidden: jax.Array
    keys: jax.Array
    running: jax.Array
    samples: Samples
    cache: Cache


@partial(
    jax.jit, static_argnames=("model", "count", "capacity", "max_new_tokens", "record_experts")
)
def start(
    params: Params,
    prompts: Prompts,
    seed: jax.Array,
    rollout: jax.Array,
    *,
    model: Decoder,
    count: int,
    capacity: int,
    max_new_tokens: int,
    record_experts: bool = False,
) -> tuple[_State, Cache]:
    """Prefill: each prompt once. Gives the state of `count` samples of each, and their cache."""
    batch = prompts.tokens.shape[0]
    hidden, prompt_cache = prefill(
        params, prompts.tokens, prompts.lengths, model, record_experts=record_experts
    )
    samples = no_samples(batch, count, max_new_tokens, model.layout)
    state = _State(
        step=jnp.int32(0),
        hidden=jnp.broadcast_to(hidden[:, None], (batch, count, hidden.shape[-1])),
        keys=keys_of(prompts, seed, rollout, count),
        running=model.layout.constrain(jnp.ones((batch, count), bool), ("batch", "sample")),
        samples=samples,
        cache=empty_cache(batch, count, capacity, model, record_experts=record_experts),
    )
    return state, prompt_cache


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def decode_until(
    params: Params,
    state: _State,
    prompt_cache: Cache,
    prompt_lengths: jax.Array,
    until: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    *,
    model: Decoder,
) -> _State:
    """Decode until step `until`, or until every sample has ended."""
    layers = unstack_layers(params, model)

    def more(state: _State) -> jax.Array:
        return (state.step < until) & jnp.any(state.running)

    def advance(state: _State) -> _State:
        old, step, running = state.samples, state.step, state.running
        scores = logits(layers, state.hidden, model)
        tokens, policy, drawn = draw(scores, state.keys, step, sampling)
        tokens = jnp.where(running, tokens, 0)

        def put(buffer: jax.Array, column: jax.Array) -> jax.Array:
            column = jnp.where(running, column, 0).astype(buffer.dtype)
            return jax.lax.dynamic_update_slice_in_dim(buffer, column[..., None], step, axis=2)

        ended = running & jnp.any(tokens[..., None] == eos_ids, axis=-1)
        samples = replace(
            old,
            tokens=put(old.tokens, tokens),
            lengths=old.lengths + running,
            finish=jnp.where(ended, Finish.EOS, old.finish),
            policy_log_probs=put(old.policy_log_probs, policy),
            sampling_log_probs=put(old.sampling_log_probs, drawn),
        )
        hidden, cache = decode(
            layers, tokens, prompt_cache, prompt_lengths, state.cache, step, model
        )
        return _State(step + 1, hidden, state.keys, running & ~ended, samples, cache)

    return jax.lax.while_loop(more, advance, state)


@partial(jax.jit, static_argnames=("extra", "model"))
def grow(cache: Cache, extra: int, model: Decoder) -> Cache:
    return grow_cache(cache, extra, model)


def capacities_of(max_new_tokens: int, first: int) -> Iterator[int]:
    """Cache capacities: `first`, doubling, the last one max_new_tokens."""
    capacity = first
    while capacity < max_new_tokens:
        yield capacity
        capacity *= 2
    yield max_new_tokens


def generate_chunks(
    params: Params, prompts: Prompts, model: Decoder, options: GenerateOptions
) -> Iterator[tuple[int, Samples]]:
    """As `generate`, yielding (tokens decoded, samples so far) at every synchronisation.

    A speculative sample has at least this number of tokens, unless it has ended.
    """
    speculative = options.speculative
    if speculative and not model.config.num_nextn_predict_layers:
        raise ValueError(
            "speculative = true, but the model has no module for multi-token prediction that could "
            "draft; set model.multi_token_prediction to true, or speculative to false"
        )
    prompts = replace(prompts, first_samples=jnp.asarray(prompts.first_samples, jnp.int32))
    eos = jnp.asarray(options.eos_ids or (-1,), jnp.int32)
    # The same dtypes whatever the caller passes: a Python float and an array compile alike.
    sampling = options.sampling
    sampling = Sampling(
        jnp.asarray(sampling.temperature, jnp.float32),
        jnp.asarray(sampling.top_p, jnp.float32),
        jnp.asarray(sampling.top_k, jnp.int32),
        jnp.asarray(sampling.min_p, jnp.float32),
    )
    # Of a speculative sample, the first token comes of the prompt, and each step gives one or two.
    new = options.max_new_tokens
    steps = max(1, new - 1) if speculative else new
    capacities = list(capacities_of(steps, min(options.first_bucket, steps)))
    seeds = (jnp.uint32(options.seed & 0xFFFFFFFF), jnp.uint32(options.step))
    sizes = {"count": options.samples, "max_new_tokens": new, "capacity": capacities[0]}
    state: _State | SpeculativeState
    if speculative:
        state, prompt_cache = start_speculatively(
            params, prompts, *seeds, sampling, eos, model=model, **sizes
        )
    else:
        state, prompt_cache = start(
            params, prompts, *seeds, model=model, record_experts=options.record_experts, **sizes
        )
    done = 0
    for index, capacity in enumerate(capacities):
        while done < capacity:
            until = min(capacity, done + (options.sync_every or capacity))
            rest = (prompt_cache, prompts.lengths, jnp.int32(until), sampling, eos)
            if isinstance(state, SpeculativeState):
                state = decode_speculatively(params, state, *rest, model=model)
            else:
                state = decode_until(params, state, *rest, model=model)
            if options.stop is not None:
                ends = _search(options.stop, state.samples, model.layout)
                shortened, running = cut(state.samples, state.running, ends)
                state = replace(state, samples=shortened, running=running)
            done = until
            if options.record_experts:
                experts = {"experts": state.cache, "prompt_experts": prompt_cache}
                found = {name: cache["experts"] for name, cache in experts.items()}
                yield done, replace(state.samples, **found)
            else:
                yield done, state.samples
            if not bool(jnp.any(state.running)):
                return
        if index + 1 < len(capacities):
            extra = capacities[index + 1] - capacity
            if isinstance(state, SpeculativeState):
                state = grow_speculation(state, extra, model)
            else:
                state = replace(state, cache=grow(state.cache, extra, model))


def _search(stop: StopSearch, samples: Samples, layout: Layout) -> jax.Array:
    if layout.shards("sample") > 1:
        samples = move_rows(samples, layout)
    tokens, lengths = to_process_rows(samples.tokens), to_process_rows(samples.lengths)
    ends = stop(tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1))
    return from_process_rows(np.asarray(ends, np.int32).reshape(lengths.shape), layout)


def generate(params: Params, prompts: Prompts, model: Decoder, options: GenerateOptions) -> Samples:
    """Sample completions.

    Args:
      params: weights, sharded as `model.layout` says.
      prompts: right-padded prompts; pad their time to few distinct sizes, each compiles once.

    Returns:
      `Samples` on the device.

    Raises:
      ValueError: `options.speculative`, and the model has no module for multi-token prediction.
    """
    result: Samples | None = None
    for _, so_far in generate_chunks(params, prompts, model, options):
        result = so_far
    assert result is not None  # there is at least one token to decode
    return result
