"""Sampling G completions per prompt: one prefill per prompt, then a compiled decode loop.

The host only counts: it starts the loop, learns every `sync_every` tokens whether all samples have
ended, and doubles the KV cache when it is full. No token passes through it on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from r1jax.models.config import Decoder
from r1jax.models.decoder import (
    decode,
    last_token,
    logits,
    next_tokens,
    prefill,
    unstack_layers,
)
from r1jax.models.kv_cache import KVCache, PromptCache, empty_cache, grow_cache
from r1jax.models.parameters import Params
from r1jax.sampler.distribution import draw
from r1jax.sampler.samples import (
    Draws,
    Finish,
    GenerateOptions,
    Prompts,
    Samples,
    SampleShape,
    StopSearch,
    cut,
    no_samples,
    sample_keys,
)
from r1jax.sampler.speculative import (
    SpeculativeState,
    decode_speculatively,
    grow_speculation,
    start_speculatively,
)
from r1jax.sharding import Layout, from_process_rows, move_rows, to_process_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key


@struct.dataclass
class _SampleState:
    """Between two steps; `hidden` are the activations that the next token is drawn from."""

    step: Int[Array, ""]
    hidden: Float[Array, "batch samples hidden"]
    keys: Key[Array, "batch samples"]
    running: Bool[Array, "batch samples"]
    samples: Samples
    cache: KVCache


@partial(jax.jit, static_argnames=("model", "shape"))
def start(
    params: Params, prompts: Prompts, draws: Draws, *, model: Decoder, shape: SampleShape
) -> tuple[_SampleState, PromptCache]:
    """Prefill: each prompt once. Gives the state of its samples, and the prompts' cache."""
    batch, count = prompts.tokens.shape[0], shape.samples
    hidden, prompt_cache = prefill(
        params, prompts.tokens, prompts.lengths, model, record_experts=shape.record_experts
    )
    hidden = last_token(hidden, prompts.lengths)
    samples = no_samples(batch, count, shape.max_new_tokens, model.layout)
    state = _SampleState(
        step=jnp.int32(0),
        hidden=jnp.broadcast_to(hidden[:, None], (batch, count, hidden.shape[-1])),
        keys=sample_keys(prompts, draws, count),
        running=model.layout.constrain(jnp.ones((batch, count), bool), ("batch", "sample")),
        samples=samples,
        cache=empty_cache(batch, count, shape.capacity, model, record_experts=shape.record_experts),
    )
    return state, prompt_cache


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def decode_until(
    params: Params,
    state: _SampleState,
    prompts: PromptCache,
    until: Int[Array, ""],
    draws: Draws,
    *,
    model: Decoder,
) -> _SampleState:
    """Decode until step `until`, or until every sample has ended."""
    layers = unstack_layers(params, model)

    def unfinished(state: _SampleState) -> jax.Array:
        return (state.step < until) & jnp.any(state.running)

    def advance(state: _SampleState) -> _SampleState:
        old, step, running = state.samples, state.step, state.running
        next_logits = logits(layers, state.hidden, model)
        tokens, policy, drawn = draw(next_logits, state.keys, step, draws.sampling)
        tokens = jnp.where(running, tokens, 0)

        def put(buffer: jax.Array, column: jax.Array) -> jax.Array:
            column = jnp.where(running, column, 0).astype(buffer.dtype)
            return jax.lax.dynamic_update_slice_in_dim(buffer, column[..., None], step, axis=2)

        ended = running & jnp.any(tokens[..., None] == draws.eos_ids, axis=-1)
        samples = replace(
            old,
            tokens=put(old.tokens, tokens),
            lengths=old.lengths + running,
            finish=jnp.where(ended, Finish.EOS, old.finish),
            policy_log_probs=put(old.policy_log_probs, policy),
            sampling_log_probs=put(old.sampling_log_probs, drawn),
        )
        new = next_tokens(tokens, step, prompts, state.cache, model)
        hidden, cache = decode(layers, new, prompts, state.cache, model)
        return _SampleState(step + 1, hidden[:, :, 0], state.keys, running & ~ended, samples, cache)

    return jax.lax.while_loop(unfinished, advance, state)


@partial(jax.jit, static_argnames=("extra", "model"))
def grow(cache: KVCache, extra: int, model: Decoder) -> KVCache:
    return grow_cache(cache, extra, model)


def generate_chunks(
    params: Params, prompts: Prompts, model: Decoder, options: GenerateOptions
) -> Iterator[tuple[int, Samples]]:
    """As `generate`, yielding (tokens decoded, samples so far) at every synchronisation.

    A speculative sample has at least this number of tokens, unless it has ended.
    """
    options.check(model)
    prompts = replace(prompts, first_samples=jnp.asarray(prompts.first_samples, jnp.int32))
    draws, capacities = options.draws(), options.capacities()
    begin = start_speculatively if options.speculative else start
    state: _SampleState | SpeculativeState
    state, prompt_cache = begin(
        params, prompts, draws, model=model, shape=options.shape(capacities[0])
    )
    done = 0
    for index, capacity in enumerate(capacities):
        while done < capacity:
            done = min(capacity, done + (options.sync_every or capacity))
            rest = (prompt_cache, jnp.int32(done), draws)
            if isinstance(state, SpeculativeState):
                state = decode_speculatively(params, state, *rest, model=model)
            else:
                state = decode_until(params, state, *rest, model=model)
            if options.stop is not None:
                ends = _search(options.stop, state.samples, model.layout)
                shortened, running = cut(state.samples, state.running, ends)
                state = replace(state, samples=shortened, running=running)
            yield (
                done,
                replace(
                    state.samples,
                    experts=state.cache.experts,
                    prompt_experts=prompt_cache.experts,
                ),
            )
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
    tokens, lengths = (to_process_rows(x, layout) for x in (samples.tokens, samples.lengths))
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
