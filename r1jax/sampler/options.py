"""What a call of the sampler is given beside the weights, the prompts and the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import struct

from r1jax.models.kv_cache import FIRST_CAPACITY, capacities
from r1jax.sampler.distribution import Sampling
from r1jax.sampler.samples import StopSearch

if TYPE_CHECKING:
    from jaxtyping import Array, Int, UInt32


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
