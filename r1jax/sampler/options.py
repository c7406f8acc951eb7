"""What a call of the sampler may be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from r1jax.sampler.distribution import Sampling
from r1jax.sampler.samples import StopSearch

FIRST_CAPACITY = 128  # new tokens that the first KV cache has room for


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
