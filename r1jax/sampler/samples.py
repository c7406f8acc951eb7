"""The sampler's input and output: prompts, options, samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from r1jax.models.config import Decoder
from r1jax.models.kv_cache import FIRST_CAPACITY, capacities
from r1jax.sampler.distribution import Sampling
from r1jax.sharding import Layout

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key, UInt32


class Finish(IntEnum):
    """Why a sample ended: `LENGTH` means truncated."""

    LENGTH = 0
    EOS = 1
    STOP = 2


@struct.dataclass
class Prompts:
    """Right-padded prompts.

    ids: part of the keys.
    first_samples: the index of a prompt's first sample, part of the keys: further samples of a
        prompt, later or in the same batch, go on where the others ended.
    """

    tokens: Int[Array, "batch time"]
    lengths: Int[Array, " batch"]
    ids: UInt32[Array, " batch"]
    first_samples: Int[Array, " batch"] | int = 0


@struct.dataclass
class Samples:
    """Completions, right-padded with 0 beyond their lengths; `time` is max_new_tokens.

    tokens: a final EOS is included.
    lengths: sampled tokens, the EOS included.
    finish: see `Finish`.
    policy_log_probs: of each token under softmax(logits / temperature).
    sampling_log_probs: under the filtered distribution that was drawn from.
    drafted, accepted: tokens that the module for multi-token prediction drafted, and those of them
        that were accepted; None without it.
    experts, prompt_experts: the experts of each token of completions (`time` may be less) and
        prompts, for `TokenRows` to replay. None where they were not recorded.
    """

    tokens: Int[Array, "batch samples time"]
    lengths: Int[Array, "batch samples"]
    finish: Int[Array, "batch samples"]
    policy_log_probs: Float[Array, "batch samples time"]
    sampling_log_probs: Float[Array, "batch samples time"]
    drafted: Int[Array, "batch samples"] | None = None
    accepted: Int[Array, "batch samples"] | None = None
    experts: Int[Array, "batch samples time layers_k"] | None = None
    prompt_experts: Int[Array, "batch prompt_time layers_k"] | None = None


@jax.jit
def cut(
    samples: Samples, running: Bool[Array, "batch samples"], ends: Int[Array, "batch samples"]
) -> tuple[Samples, Bool[Array, "batch samples"]]:
    """End the samples that have a stop string (ends >= 0) after `ends` tokens."""
    stopped = (ends >= 0) & (ends <= samples.lengths)
    lengths = jnp.where(stopped, ends, samples.lengths)
    inside = jnp.arange(samples.tokens.shape[-1]) < lengths[..., None]
    shortened = replace(
        samples,
        tokens=jnp.where(inside, samples.tokens, 0),
        lengths=lengths,
        finish=jnp.where(stopped, Finish.STOP, samples.finish),
        policy_log_probs=jnp.where(inside, samples.policy_log_probs, 0.0),
        sampling_log_probs=jnp.where(inside, samples.sampling_log_probs, 0.0),
    )
    return shortened, running & ~stopped


def no_samples(batch: int, count: int, max_new_tokens: int, layout: Layout) -> Samples:
    """`count` samples of length 0 of each prompt, split over devices."""
    shape = (batch, count)
    row = (*shape, max_new_tokens)

    def over_batch(leaf: jax.Array) -> jax.Array:
        return layout.constrain(leaf, ("batch", "sample", *(None,) * (leaf.ndim - 2)))

    return Samples(
        tokens=over_batch(jnp.zeros(row, jnp.int32)),
        lengths=over_batch(jnp.zeros(shape, jnp.int32)),
        finish=over_batch(jnp.full(shape, Finish.LENGTH, jnp.int32)),
        policy_log_probs=over_batch(jnp.zeros(row, jnp.float32)),
        sampling_log_probs=over_batch(jnp.zeros(row, jnp.float32)),
    )


def sample_keys(prompts: Prompts, draws: Draws, samples: int) -> Key[Array, "batch samples"]:
    """One key per (prompt, sample), a function of (seed, step, prompt id, sample index) alone.

    So sample i of a prompt is the same in any batch and on any mesh.
    """
    firsts = jnp.broadcast_to(prompts.first_samples, (prompts.tokens.shape[0],))
    indices = firsts[:, None] + jnp.arange(samples, dtype=jnp.int32)
    return keys_of(draws, jnp.broadcast_to(prompts.ids[:, None], indices.shape), indices)


def keys_of(
    draws: Draws, ids: UInt32[Array, "rows samples"], indices: Int[Array, "rows samples"]
) -> Key[Array, "rows samples"]:
    """The keys of samples: functions of seed, step, prompt id and index of the sample."""
    run = jax.random.fold_in(jax.random.key(draws.seed), draws.step)

    def key(prompt: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(run, prompt), index)

    return jax.vmap(jax.vmap(key))(ids, indices)


# Given the tokens so far [N, t] and their lengths [N], the lengths at which stop strings end
# (-1: none occurs).
StopSearch = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class GenerateOptions:
    """Options of `generate` and `generate_chunks`.

    samples: completions per prompt.
    max_new_tokens: per completion.
    seed, step: with the prompt's id and the sample's index they determine every sample.
    sampling: see `Sampling`; changes compile nothing.
    eos_ids: every token id that ends a sample; it is part of the sample.
    stop: finds stop strings on the host (see `StopSearch`), every `sync_every` tokens. A sample
        keeps the tokens up to the one that completes the string.
    first_bucket: initial capacity of the KV cache in tokens; it doubles as needed.
    sync_every: tokens between synchronisations with the host; default: 32 with `stop`, else the
        capacity. A speculative sample may have twice as many.
    speculative: the model's module for multi-token prediction drafts, see
        `r1jax.sampler.speculative`; other samples of the same distribution.
    record_experts: return the experts of each token, of prompts and completions.
    slots: of `sample_queue`: samples that decode at once, over all devices; default: 64 for each
        part of the devices that has slots of its own. See `default_slots`.
    cache_tokens: of `sample_queue`: tokens that the KV cache has room for, over all devices;
        default: as many as all slots might need.
    page: of `sample_queue`: tokens in a page of the KV cache; default: 16 on a CPU, else 64.
    fixed_shape: of `sample_queue`: a short queue has the slots of a long one, so that queues of all
        lengths share their programs.
    extended_by: of `sample_queue`: the pages of prompts are kept for prompts that extend them by at
        most so many tokens (`QueuedPrompt.extends`); 0: they are not. Neither are they with
        `speculative` or `record_experts`, which need more of a prompt than its pages.

    Raises:
      ValueError: a count below 1, or `speculative` with `record_experts`.
    """

    samples: int
    max_new_tokens: int
    seed: int
    step: int = 0
    sampling: Sampling = Sampling()
    eos_ids: tuple[int, ...] = ()
    stop: StopSearch | None = None
    first_bucket: int = FIRST_CAPACITY
    sync_every: int | None = None
    speculative: bool = False
    record_experts: bool = False
    slots: int | None = None
    cache_tokens: int | None = None
    page: int | None = None
    fixed_shape: bool = False
    extended_by: int = 0

    def __post_init__(self) -> None:
        if self.speculative and self.record_experts:
            raise ValueError(
                "speculative = true with record_experts = true: the experts of rejected drafts "
                "would be among those recorded; set one of them to false"
            )
        if self.max_new_tokens < 1 or self.samples < 1:
            raise ValueError(
                f"max_new_tokens = {self.max_new_tokens}, samples = {self.samples}: at least 1 each"
            )
        if self.stop is not None and self.sync_every is None:
            object.__setattr__(self, "sync_every", 32)

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the model cannot draft, and has to."""
        if self.speculative and not model.config.num_nextn_predict_layers:
            raise ValueError(
                "speculative = true, but the model has no module for multi-token prediction that "
                "could draft; set model.multi_token_prediction to true, or speculative to false"
            )

    def capacities(self) -> list[int]:
        """Steps of decoding that the KV cache has room for, as it grows."""
        # A speculative sample's first token comes of the prompt; each step gives one or two.
        new = self.max_new_tokens
        return capacities(max(1, new - 1) if self.speculative else new, self.first_bucket)

    def shape(self, capacity: int) -> SampleShape:
        return SampleShape(self.samples, self.max_new_tokens, capacity, self.record_experts)

    def draws(self) -> Draws:
        """As arrays of the same dtypes whatever they are here: they compile alike."""
        return Draws(
            seed=jnp.uint32(self.seed & 0xFFFFFFFF),
            step=jnp.uint32(self.step),
            sampling=Sampling(
                jnp.asarray(self.sampling.temperature, jnp.float32),
                jnp.asarray(self.sampling.top_p, jnp.float32),
                jnp.asarray(self.sampling.top_k, jnp.int32),
                jnp.asarray(self.sampling.min_p, jnp.float32),
            ),
            eos_ids=jnp.asarray(self.eos_ids or (-1,), jnp.int32),
        )


@dataclass(frozen=True)
class SampleShape:
    """The options that are static in the sampler's programs: each value compiles one.

    capacity: steps that the KV cache has room for.
    """

    samples: int
    max_new_tokens: int
    capacity: int
    record_experts: bool = False


@struct.dataclass
class Draws:
    """The options that the sampler's programs read as arrays: changes compile nothing."""

    seed: UInt32[Array, ""]
    step: UInt32[Array, ""]
    sampling: Sampling
    eos_ids: Int[Array, " ids"]
