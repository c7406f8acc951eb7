"""The divergence of a student to a teacher at each token, over the vocabulary.

Exact, and so is its gradient by the student's logits; the teacher's are constants. At tokens that
the student has sampled it is on-policy distillation (GKD, Agarwal et al. 2023, arXiv 2306.13649;
MiniLLM, Gu et al. 2023, arXiv 2306.08543), at a dataset's that of logits (Hinton et al. 2015, arXiv
1503.02531). The loss is a weighted sum over tokens, as of `normalisation.token_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from r1jax.objectives.shapes import check_floating, check_log_probs

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from r1jax.settings.distillation import DivergenceKind

_NONE = -1e30  # the log of no probability; finite: times a weight of 0 it is 0


@dataclass(frozen=True)
class Divergence:
    """Of a student p and a teacher q.

    kind: `reverse_kl`, sum p log(p / q); `forward_kl`, sum q log(q / p); `jsd`, the generalised
        Jensen-Shannon divergence, beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q +
        (1 - beta) p (arXiv 2306.13649, section 2).
    beta: of `jsd`.
    top_k: the teacher's K likeliest tokens are told apart, and the others count as one event, with
        their probability together. That is never more than the whole divergence. None: all tokens.
    """

    kind: DivergenceKind = "reverse_kl"
    beta: float = 0.5
    top_k: int | None = None


class Comparison(NamedTuple):
    """Per token, float32. divergence: in nats. agrees: 1 where both have the same likeliest token,
    else 0; it has no gradient."""

    divergence: Float[Array, "*tokens"]
    agrees: Float[Array, "*tokens"]


def compare_logits(
    student: Float[Array, "*tokens vocab"],
    teacher: Float[Array, "*tokens vocab"],
    divergence: Divergence,
    mesh_axes: tuple[str, ...] = (),
) -> Comparison:
    """The divergence at each token, with its gradient by the student's logits.

    Args:
      mesh_axes: over which the vocabulary is split, in a `shard_map`: the arrays are a device's
        part of it, of the same tokens on all of them, and so is the result. Of tokens that do not
        exist the logits are finite and far below all others.

    Raises:
      ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits have shape {student.shape} and the teacher's {teacher.shape}; "
            "both are over one vocabulary"
        )
    check_floating({"student": student, "teacher": teacher})

    def total(x: jax.Array) -> jax.Array:
        """The sum over the vocabulary."""
        x = jnp.sum(x, axis=-1)
        return jax.lax.psum(x, mesh_axes) if mesh_axes else x

    def peak(x: jax.Array) -> jax.Array:
        x = jnp.max(jax.lax.stop_gradient(x), axis=-1)
        return jax.lax.pmax(x, mesh_axes) if mesh_axes else x

    def log_total(x: jax.Array) -> jax.Array:
        """log sum exp x over the vocabulary."""
        highest = peak(x)
        return jnp.log(total(jnp.exp(x - highest[..., None]))) + highest

    p, q = student.astype(jnp.float32), jax.lax.stop_gradient(teacher.astype(jnp.float32))
    agrees = _likeliest(p, mesh_axes) == _likeliest(q, mesh_axes)
    agrees = agrees.astype(jnp.float32)
    kept = None if divergence.top_k is None else _among_top(q, divergence.top_k, mesh_axes)
    p, q = (x - log_total(x)[..., None] for x in (p, q))
    term = _term(divergence)
    if kept is None:
        return Comparison(total(term(p, q)), agrees)
    rest = (log_total(jnp.where(kept, _NONE, x)) for x in (p, q))
    return Comparison(total(jnp.where(kept, term(p, q), 0.0)) + term(*rest), agrees)


def _likeliest(x: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    """The index of the largest value over the vocabulary, the first of equal ones."""
    x = jax.lax.stop_gradient(x)
    index = jnp.argmax(x, axis=-1)
    if not mesh_axes:
        return index
    value = jnp.max(x, axis=-1)
    index += jax.lax.axis_index(mesh_axes) * x.shape[-1]
    no_index = jax.lax.axis_size(mesh_axes) * x.shape[-1]
    best = jnp.where(value == jax.lax.pmax(value, mesh_axes), index, no_index)
    return jax.lax.pmin(best, mesh_axes)


def _among_top(x: jax.Array, k: int, mesh_axes: tuple[str, ...]) -> jax.Array:
    """Which of the values are the k largest over the vocabulary.

    By their indices: a value that is computed twice, here and there, may be rounded in two ways.
    """
    best, index = jax.lax.top_k(x, min(k, x.shape[-1]))
    kept = jnp.ones(best.shape, bool)
    if mesh_axes:
        of_all = jax.lax.all_gather(best, mesh_axes, axis=x.ndim - 1, tiled=True)
        kept = best >= jax.lax.top_k(of_all, min(k, of_all.shape[-1]))[0][..., -1:]
    return jnp.put_along_axis(jnp.zeros(x.shape, bool), index, kept, axis=-1, inplace=False)


def _term(divergence: Divergence) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """What an event adds, of the logs of its probability by student and teacher."""
    if divergence.kind == "reverse_kl":
        return lambda p, q: jnp.exp(p) * (p - q)
    if divergence.kind == "forward_kl":
        return lambda p, q: jnp.exp(q) * (q - p)
    beta = divergence.beta

    def of_mixture(p: jax.Array, q: jax.Array) -> jax.Array:
        m = jnp.logaddexp(math.log(beta) + q, math.log(1 - beta) + p)
        return beta * jnp.exp(q) * (q - m) + (1 - beta) * jnp.exp(p) * (p - m)

    return of_mixture


def sampled_advantages(
    log_probs: Float[Array, "batch time"],
    teacher_log_probs: Float[Array, "batch time"],
    coefficient: float = 1.0,
) -> Float[Array, "batch time"]:
    """-c (log p - log q) of each sampled token, as its advantage (Thinking Machines, "On-Policy
    Distillation", 2025): with A log p as the surrogate, an estimate of the gradient of c KL(p || q)
    at each token, given those before it.

    Args:
      log_probs: of the policy that sampled.

    Raises:
      ValueError: the shapes differ.
    """
    check_log_probs({"log_probs": log_probs, "teacher_log_probs": teacher_log_probs})
    return -coefficient * jax.lax.stop_gradient(log_probs - teacher_log_probs)
