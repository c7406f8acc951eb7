"""Rollouts: a compiled sampler over any decoder of `r1jax.models`."""

from r1jax.sampler.distribution import Sampling, draw, filter_logits, sample_keys
from r1jax.sampler.generate import (
    Finish,
    Prompts,
    Samples,
    StopSearch,
    generate,
    generate_chunks,
)

__all__ = [
    "Finish",
    "Prompts",
    "Samples",
    "Sampling",
    "StopSearch",
    "draw",
    "filter_logits",
    "generate",
    "generate_chunks",
    "sample_keys",
]
