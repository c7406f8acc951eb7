"""What reward models and critics give: a number for a text or for each token, or labels' logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
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


def token_values(params: Params, rows: TokenRows, model: Decoder) -> Float[Array, "rows time"]:
    """V of a critic before each token: what its scalar head gives at the token before.

    A value is that of the state in which a token is chosen: it has not read the token. What stands
    at the first token of a segment means nothing; there nothing is trained.

    Raises:
      ValueError: the model has another head, or rows share prompts.
    """
    if model.config.head != "scalar":
        raise ValueError(
            f"a model with head = {model.config.head!r} gives no values; replace(config, "
            "head='scalar') declares a critic"
        )
    if rows.prompt_of is not None:
        raise ValueError("rows with prompt_of: a critic reads rows in which no prompt is shared")
    hidden = forward(params, rows, model).hidden.astype(jnp.float32)
    # In float32, as the score of a text.
    head = params["score"][:, 0].astype(jnp.float32)
    values = jnp.einsum("bth,h->bt", hidden, head, precision=jax.lax.Precision.HIGHEST)
    return jnp.roll(values, 1, axis=1)


def token_label_logits(
    params: Params,
    tokens: Int[Array, "rows time"],
    positions: Int[Array, "rows time"],
    segment_ids: Int[Array, "rows time"],
    model: Decoder,
) -> Float[Array, "rows time 2"]:
    """The logits of "wrong" and "right" at each token, of what has been read up to there.

    A process reward model is asked at the last token of each step (Lightman et al. 2023, arXiv
    2305.20050, section 2.6); here it is the policy's architecture with a linear layer for each
    token, as transformers' token classification.

    Args:
      tokens, positions, segment_ids: as `forward` takes them.

    Raises:
      ValueError: the model has another head.
    """
    if model.config.head != "token_labels":
        raise ValueError(
            f"a model with head = {model.config.head!r} has no labels for tokens; replace(config, "
            "head='token_labels') declares a process reward model"
        )
    hidden = forward(params, TokenRows(tokens, positions, segment_ids), model).hidden
    weights, bias = (params[name].astype(jnp.float32) for name in ("score", "score_bias"))
    # In float32, as the sum of a scalar head.
    products = jnp.einsum(
        "bth,hl->btl", hidden.astype(jnp.float32), weights, precision=jax.lax.Precision.HIGHEST
    )
    return products + bias
