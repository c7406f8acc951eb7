"""How much each token, or row, counts in a loss: one place for all stages.

A loss is a weighted sum, with weights that are computed once from the masks of the whole batch.
Micro-batches, and the shares of processes, then simply add up, to exactly the full batch's loss
and gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from r1jax.objectives.shapes import PER_ROW, PER_TOKEN, check_alike
from r1jax.settings.objective import Normalisation

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Num


def token_weights(
    mask: Num[Array, "batch time"] | Bool[Array, "batch time"],
    normalisation: Normalisation,
    *,
    constant_length: int | None = None,
    lengths: Num[Array, "batch time"] | None = None,
    sequences: Num[Array, ""] | int | None = None,
) -> Float[Array, "batch time"]:
    """The weight of each token in a policy loss.

    Args:
      mask: 1 where a token is trained. A sequence whose mask is all 0 (truncated, unscored) counts
        neither above nor below the fraction bar.
      normalisation: see `GRPOConfig`.
      lengths: trained tokens of the sequence a token belongs to; default: the row's sum (one
        sequence a row). Give it, and `sequences`, for packed rows.
      sequences: number of trained sequences; default: rows with a trained token.

    Raises:
      ValueError: arrays of other shapes; constant_length is missing; or one of `lengths` and
        `sequences` is, so that rows would count as sequences.
    """
    check_alike(PER_TOKEN, {"mask": mask, "lengths": lengths})
    if sequences is not None and jnp.ndim(sequences) != 0:
        raise ValueError(
            f"sequences has shape {jnp.shape(sequences)}; expected a scalar, (): the number of "
            "trained sequences of the whole batch"
        )
    if normalisation != "token_mean" and lengths is not None and sequences is None:
        raise ValueError(
            f"lengths without sequences: {normalisation!r} would divide by the number of rows; "
            "give the number of trained sequences of the batch, too"
        )
    if normalisation == "sequence_mean" and sequences is not None and lengths is None:
        raise ValueError(
            "sequences without lengths: 'sequence_mean' would divide by the trained tokens of a "
            "row; give those of each token's sequence, [batch, time], too"
        )
    mask = mask.astype(jnp.float32)
    rows = mask.sum(axis=1, keepdims=True)
    lengths = rows if lengths is None else lengths
    count = (rows > 0).sum() if sequences is None else sequences
    count = jnp.maximum(count, 1).astype(jnp.float32)
    if normalisation == "sequence_mean":
        return mask / jnp.maximum(lengths, 1) / count
    if normalisation == "token_mean":
        return mask / jnp.maximum(mask.sum(), 1)
    if normalisation == "sequence_sum":
        return mask / count
    if constant_length is None:
        raise ValueError("normalisation 'constant' needs constant_length")
    return mask / (count * constant_length)


def row_weights(mask: Num[Array, " rows"] | Bool[Array, " rows"]) -> Float[Array, " rows"]:
    """The weight of each row in a mean over the rows of mask > 0: sum 1 (or all 0).

    Args:
      mask: 0 for a row that only fills the batch.
    """
    check_alike(PER_ROW, {"mask": mask})
    mask = (mask > 0).astype(jnp.float32)
    return mask / jnp.maximum(mask.sum(), 1)


def mean_weights(
    rows: int, count: Num[Array, ""] | int, scale: Float[Array, ""] | float = 1
) -> Float[Array, " rows"]:
    """scale / count, once for each row: the weight of a sum in a mean over `count` of the batch.

    For losses that are summed over a row before they are weighed; all entries are equal.
    """
    return jnp.full((rows,), scale / jnp.maximum(count, 1), jnp.float32)
