"""Sums and means over the trained tokens of each sequence, in rows of one or of several.

In packed rows the tokens of a sequence stand together and have one segment id. Sums are segmented
scans: no scatter, whose gradient is slow, and no rounding by the sequences before in the row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from r1jax.objectives.shapes import PER_TOKEN, check_alike

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Num

    Tokens = Float[Array, "batch time"]
    Mask = Num[Array, "batch time"] | Bool[Array, "batch time"]
    SegmentIds = Int[Array, "batch time"]


def sequence_sum(values: Tokens, mask: Mask, segment_ids: SegmentIds | None = None) -> Tokens:
    """At each token the sum over the trained tokens of its sequence.

    Args:
      mask: above 0 where a token is trained; values elsewhere count nothing, whatever they are.
      segment_ids: equal for the tokens of a sequence, which are neighbours. None: a row is one.

    Raises:
      ValueError: the arrays have other shapes.
    """
    values = _trained(values, mask, segment_ids)
    if segment_ids is None:
        return jnp.broadcast_to(values.sum(axis=1, keepdims=True), values.shape)
    before = _segmented_sum(values, segment_ids, reverse=False)
    return before + _segmented_sum(values, segment_ids, reverse=True) - values


def sequence_mean(values: Tokens, mask: Mask, segment_ids: SegmentIds | None = None) -> Tokens:
    """At each token the mean over the trained tokens of its sequence; 0 where none is trained.

    Arguments and errors are those of `sequence_sum`.
    """
    ones = jnp.ones_like(values)
    count = sequence_sum(ones, mask, segment_ids)
    return sequence_sum(values, mask, segment_ids) / jnp.maximum(count, 1)


def sum_to_end(values: Tokens, mask: Mask, segment_ids: SegmentIds | None = None) -> Tokens:
    """At each token the sum over the trained tokens from it to the end of its sequence.

    Arguments and errors are those of `sequence_sum`.
    """
    values = _trained(values, mask, segment_ids)
    if segment_ids is None:
        segment_ids = jnp.zeros(values.shape, jnp.int32)
    return _segmented_sum(values, segment_ids, reverse=True)


def _trained(values: Tokens, mask: Mask, segment_ids: SegmentIds | None) -> Tokens:
    check_alike(PER_TOKEN, {"values": values, "mask": mask, "segment_ids": segment_ids})
    return jnp.where(mask > 0, values, 0)


def _segmented_sum(values: Tokens, segment_ids: SegmentIds, *, reverse: bool) -> Tokens:
    """The sum from where a segment begins, in the direction of the scan, to each token."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.pad(changes, ((0, 0), (0, 1) if reverse else (1, 0)), constant_values=True)

    def add(
        first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (a, before), (b, begins) = first, second
        return jnp.where(begins, b, a + b), before | begins

    return jax.lax.associative_scan(add, (values, begins), reverse=reverse, axis=1)[0]
