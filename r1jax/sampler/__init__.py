"""Rollouts: a compiled sampler over any decoder of `r1jax.models`."""

from r1jax.sampler.distribution import Sampling, filter_logits
from r1jax.sampler.generate import generate, generate_chunks
from r1jax.sampler.rollout_weights import make_rollout_weights, reads_as_is, to_sample
from r1jax.sampler.samples import Finish, GenerateOptions, Prompts, Samples, StopSearch

__all__ = [
    "Finish",
    "GenerateOptions",
    "Prompts",
    "Samples",
    "Sampling",
    "StopSearch",
    "filter_logits",
    "generate",
    "generate_chunks",
    "make_rollout_weights",
    "reads_as_is",
    "to_sample",
]
