"""Sampling G completions per prompt: one prefill per prompt, then a compiled decode loop.

The host only counts: it starts the loop, is told every `sync_every` tokens whether all samples
have ended, and doubles the cache when it is full. No token passes through it on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import IntEnum
from functools import partial
from typing import Any

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
from r1jax.sampler.distribution import Sampling, draw, sample_keys
from r1jax.sharding import Layout, from_process_rows, move_rows, to_process_rows


class Finish(IntEnum):
    """Why a sample ended: `LENGTH` means truncated."""

    LENGTH = 0
    EOS = 1
    STOP = 2


@struct.dataclass
class Prompts:
    """Right-padded prompts.

    tokens: int32 [batch, time]. lengths: int32 [batch]. ids: uint32 [batch], part of the keys.
    first_samples: int32 [batch] or a scalar, the index of a prompt's first sample, part of the
        keys: more samples of a prompt, later or in the same batch, go on where the others ended.
    """

    tokens: Any
    lengths: Any
    ids: Any
    first_samples: Any = 0


@struct.dataclass
class Samples:
    """Completions, [batch, samples, ...], right-padded with 0 beyond their lengths.

    tokens: int32 [..., max_new_tokens]; a final EOS is included.
    lengths: int32, sampled tokens, the EOS included.
    finish: int32, see `Finish`.
    policy_log_probs: float32, of each token under softmax(logits / temperature).
    sampling_log_probs: float32, under the filtered distribution that was drawn from.
    """

    tokens: Any
    lengths: Any
    finish: Any
    policy_log_probs: Any
    sampling_log_probs: Any


# Given the tokens so far [N, t] and their lengths [N], the lengths at which stop strings end
# (-1: none occurs).
StopSearch = Callable[[np.ndarray, np.ndarray], np.ndarray]


UNFILTERED = Sampling()
FIRST_CAPACITY = 128  # new tokens that the first cache has room for


@struct.dataclass
class _State:
    step: jax.Array
    hidden: jax.Array
    keys: jax.Array
    running: jax.Array
    samples: Samples
    cache: Cache


@partial(jax.jit, static_argnames=("model", "count", "capacity", "max_new_tokens"))
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
) -> tuple[_State, Cache]:
    """Prefill: each prompt once. Gives the state of `count` samples of each, and their cache."""
    batch = prompts.tokens.shape[0]
    hidden, prompt_cache = prefill(params, prompts.tokens, prompts.lengths, model)
    shape = (batch, count)
    firsts = jnp.broadcast_to(prompts.first_samples, (batch,))
    indices = firsts[:, None] + jnp.arange(count, dtype=jnp.int32)
    row = (*shape, max_new_tokens)

    def over_batch(leaf: jax.Array) -> jax.Array:
        axes = ("batch", "sample", *(None,) * (leaf.ndim - 2))
        return model.layout.constrain(leaf, axes)

    state = _State(
        step=jnp.int32(0),
        hidden=jnp.broadcast_to(hidden[:, None], (*shape, hidden.shape[-1])),
        keys=sample_keys(seed, rollout, prompts.ids, indices),
        running=over_batch(jnp.ones(shape, bool)),
        samples=Samples(
            tokens=over_batch(jnp.zeros(row, jnp.int32)),
            lengths=over_batch(jnp.zeros(shape, jnp.int32)),
            finish=over_batch(jnp.full(shape, Finish.LENGTH, jnp.int32)),
            policy_log_probs=over_batch(jnp.zeros(row, jnp.float32)),
            sampling_log_probs=over_batch(jnp.zeros(row, jnp.float32)),
        ),
        cache=empty_cache(batch, count, capacity, model),
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
        samples = Samples(
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


@partial(jax.jit, static_argnames=("extra",))
def grow(cache: Cache, extra: int) -> Cache:
    return grow_cache(cache, extra)


def capacities_of(max_new_tokens: int, first: int) -> Iterator[int]:
    """Cache capacities: `first`, doubling, the last one max_new_tokens."""
    capacity = first
    while capacity < max_new_tokens:
        yield capacity
        capacity *= 2
    yield max_new_tokens


@jax.jit
def _cut(samples: Samples, running: jax.Array, ends: jax.Array) -> tuple[Samples, jax.Array]:
    """End the samples in which a stop string was found (ends >= 0) after `ends` tokens."""
    found = (ends >= 0) & (ends <= samples.lengths)
    lengths = jnp.where(found, ends, samples.lengths)
    inside = jnp.arange(samples.tokens.shape[-1]) < lengths[..., None]
    cut = Samples(
        tokens=jnp.where(inside, samples.tokens, 0),
        lengths=lengths,
        finish=jnp.where(found, Finish.STOP, samples.finish),
        policy_log_probs=jnp.where(inside, samples.policy_log_probs, 0.0),
        sampling_log_probs=jnp.where(inside, samples.sampling_log_probs, 0.0),
    )
    return cut, running & ~found


def generate_chunks(
    params: Params,
    prompts: Prompts,
    model: Decoder,
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    step: int = 0,
    sampling: Sampling = UNFILTERED,
    eos_ids: tuple[int, ...] = (),
    stop: StopSearch | None = None,
    first_bucket: int = FIRST_CAPACITY,
    sync_every: int | None = None,
) -> Iterator[tuple[int, Samples]]:
    """As `generate`, yielding (tokens decoded, samples so far) at every synchronisation."""
    if max_new_tokens < 1 or samples < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}, samples = {samples}: at least 1 each")
    prompts = replace(prompts, first_samples=jnp.asarray(prompts.first_samples, jnp.int32))
    eos = jnp.asarray(eos_ids or (-1,), jnp.int32)
    # The same dtypes whatever the caller passes: a Python float and an array compile alike.
    sampling = Sampling(
        jnp.asarray(sampling.temperature, jnp.float32),
        jnp.asarray(sampling.top_p, jnp.float32),
        jnp.asarray(sampling.top_k, jnp.int32),
        jnp.asarray(sampling.min_p, jnp.float32),
    )
    capacities = list(capacities_of(max_new_tokens, min(first_bucket, max_new_tokens)))
    state, prompt_cache = start(
        params,
        prompts,
        jnp.uint32(seed & 0xFFFFFFFF),
        jnp.uint32(step),
        model=model,
        count=samples,
        capacity=capacities[0],
        max_new_tokens=max_new_tokens,
    )
    done = 0
    for index, capacity in enumerate(capacities):
        while done < capacity:
            until = capacity if sync_every is None else min(capacity, done + sync_every)
            state = decode_until(
                params,
                state,
                prompt_cache,
                prompts.lengths,
                jnp.int32(until),
                sampling,
                eos,
                model=model,
            )
            if stop is not None:
                ends = _search(stop, state, model.layout)
                cut, running = _cut(state.samples, state.running, ends)
                state = state.replace(samples=cut, running=running)
            done = until
            yield done, state.samples
            if not bool(jnp.any(state.running)):
                return
        if index + 1 < len(capacities):
            cache = grow(state.cache, capacities[index + 1] - capacity)
            state = state.replace(cache=cache)


def _search(stop: StopSearch, state: _State, layout: Layout) -> jax.Array:
    samples = state.samples
    if layout.shards("sample") > 1:
        samples = move_rows(samples, layout)
    tokens, lengths = to_process_rows(samples.tokens), to_process_rows(samples.lengths)
    ends = stop(tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1))
    return from_process_rows(np.asarray(ends, np.int32).reshape(lengths.shape), layout)


def generate(
    params: Params,
    prompts: Prompts,
    model: Decoder,
    **options: Any,
) -> Samples:
    """Sample completions.

    Args:
      params: weights, sharded as `model.layout` says.
      prompts: right-padded prompts; pad their time to few distinct sizes, each compiles once.
      model: what to run.
      samples: completions per prompt.
      max_new_tokens: per completion.
      seed, step: with the prompt's id and the sample's index they determine every sample.
      sampling: see `Sampling`; changes compile nothing.
      eos_ids: every token id that ends a sample; it is part of the sample.
      stop: finds stop strings on the host (see `StopSearch`), asked every `sync_every` tokens. A
        sample keeps the tokens up to the one that completes the string.
      first_bucket: initial capacity of the cache in tokens; it doubles as needed.
      sync_every: tokens between synchronisations with the host; default: a bucket.

    Returns:
      `Samples` on the device.
    """
    if options.get("stop") is not None:
        options.setdefault("sync_every", 32)
    result: Samples | None = None
    for _, so_far in generate_chunks(params, prompts, model, **options):
        result = so_far
    assert result is not None  # there is at least one token to decode
    return result
