"""The scalar that a reward model gives to a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from r1jax.models.config import Decoder
from r1jax.models.decoder import TokenRows, forward
from r1jax.models.parameters import Params

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def reward_scores(
    params: Params,
    tokens: Int[Array, "*rows time"],
    positions: Int[Array, "*rows time"],
    segment_ids: Int[Array, "*rows time"],
    ends: Int[Array, "*ends"],
    model: Decoder,
) -> Float[Array, "*ends"]:
    """Score texts at their last tokens, the only ones that have read the whole of a text.

    A reward model is the policy's architecture with a head that gives one number (R1 paper, arXiv
    2501.12948 v2, its reward models; InstructGPT, 2203.02155, section 3.5).

    Args:
      tokens, positions, segment_ids: [..., time], as `forward` takes them; any leading dimensions,
        so that a batch may be pairs of rows [pairs, 2, time].
      ends: index of a text's last token in its row. [...] for one text a row, whatever the
        padding; [..., texts] for packed rows. An entry for no text may be any index in the row:
        give its score no weight.

    Raises:
      ValueError: the model has another head, or `ends` has another shape.
    """
    if model.config.head != "scalar":
        raise ValueError(
            f"a model with head = {model.config.head!r} gives no rewards; replace(config, "
            "head='scalar') declares a reward model"
        )
    if ends.shape not in (tokens.shape[:-1], (*tokens.shape[:-1], *ends.shape[-1:])):
        raise ValueError(
            f"ends has shape {ends.shape} for tokens {tokens.shape}: needs {tokens.shape[:-1]}, or "
            "that and the number of texts in a row"
        )
    row = (-1, tokens.shape[-1])
    rows = TokenRows(tokens.reshape(row), positions.reshape(row), segment_ids.reshape(row))
    hidden = forward(params, rows, model).hidden
    indices = ends.reshape(len(hidden), -1, 1)
    last = jnp.take_along_axis(hidden, indices, axis=1, mode="clip")
    # In float32, head and sum: a loss sees differences of scores, and bfloat16 has 8 bits.
    scores = jnp.sum(last.astype(jnp.float32) * params["score"][:, 0].astype(jnp.float32), axis=-1)
    return scores.reshape(ends.shape)
