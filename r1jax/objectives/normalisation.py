"""How much each token counts in a loss.

The loss is a weighted sum over tokens, with weights that are computed once from the masks of the
whole batch. Micro-batches then simply add up, to exactly the full batch's loss and gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from r1jax.settings.objective import Normalisation


def token_weights(
    mask: jax.Array,
    normalisation: Normalisation,
    *,
    constant_length: int | None = None,
    lengths: jax.Array | None = None,
    sequences: jax.Array | None = None,
) -> jax.Array:
    """How much each token counts; the loss is the weighted *sum* of the tokens' terms.

    Args:
      mask: bool or float [batch, time], 1 where a token is trained. A sequence whose row is all 0
        (truncated, unscored) counts neither above nor below the fraction bar.
      normalisation: see `GRPOConfig`.
      lengths: [batch, time] trained tokens of the sequence a token belongs to; default: the row's
        sum (one sequence a row). Give it, and `sequences`, for packed rows.
      sequences: scalar number of trained sequences; default: rows with a trained token.

    Returns:
      float32 [batch, time].
    """
    mask = mask.astype(jnp.float32)
    rows = mask.sum(axis=1, keepdims=True)
    lengths = rows if lengths is None else lengths
    count = (rows > 0).sum() if sequences is None else sequences
    count = jnp.maximum(count, 1).astype(jnp.float32)
    if normalisation == "sequence_mean":
        return mask / jnp.maximum(lengths, 1) / count
    if normalisation == "token_mean":
        return mask / jnp.maximum(mask.sum(), 1)
    if constant_length is None:
        raise ValueError("normalisation 'constant' needs constant_length")
    return mask / (count * constant_length)
