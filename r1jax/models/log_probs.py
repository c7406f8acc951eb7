"""Log-probs and entropies of the tokens of rows, each by the tokens before it in its segment."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from r1jax.models.chunked_log_probs import (
    Chunks,
    TargetLogProbs,
    TeacherTokens,
    chunked_log_probs,
    wanted_log_probs,
)
from r1jax.models.config import Decoder
from r1jax.models.decoder import Routings, TokenRows, forward, unembedding
from r1jax.models.parameters import Params

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

    Temperature = Float[Array, ""] | float


class TokenLogProbs(NamedTuple):
    """Per token, float32; 0 for the first token of a segment and for padding.

    entropy: of the distribution that the token is drawn from; of `wanted` tokens it carries its
        gradient, else none.
    routings: of the routers; empty without experts.
    """

    log_probs: Float[Array, "batch time"]
    entropy: Float[Array, "batch time"]
    routings: Routings


def token_log_probs(
    params: Params,
    rows: TokenRows,
    model: Decoder,
    *,
    temperature: Temperature = 1.0,
    balance: bool = False,
    wanted: Bool[Array, "batch time"] | None = None,
) -> TokenLogProbs:
    """The log-prob of each token given the tokens before it in its segment.

    Args:
      temperature: the policy is softmax(logits / temperature).
      balance: as of `forward`.
      wanted: of these tokens alone; the others' values are 0, and cost no logits.
    """
    output = forward(params, rows, model, balance=balance)
    if wanted is None and rows.prompt_of is None:
        targets = log_probs_ahead(params, output.hidden, rows, model, temperature=temperature)
    else:
        targets = log_probs_of_wanted(
            params, output.hidden, rows, wanted, model, temperature=temperature
        )
    return TokenLogProbs(targets.log_probs, targets.entropy, output.routings)


def log_probs_of_wanted(
    params: Params,
    hidden: Float[Array, "batch time hidden"],
    rows: TokenRows,
    wanted: Bool[Array, "batch time"] | None,
    model: Decoder,
    *,
    temperature: Temperature,
    teacher: TeacherTokens | None = None,
) -> TargetLogProbs:
    """Of wanted tokens (None: all), each by the activations, normalised, of the token before it.

    teacher: with a comparison with its logits.
    """
    if rows.prompt_of is not None:
        return _after_shared_prompts(params, hidden, rows, wanted, model, temperature, teacher)
    predicted = follows(rows.segment_ids)
    wanted = predicted if wanted is None else wanted & predicted
    targets = wanted_log_probs(
        hidden,
        unembedding(params, model),
        jnp.roll(rows.tokens, -1, axis=1),
        jnp.roll(wanted, -1, axis=1),
        chunks=_chunks(model, hidden),
        temperature=temperature,
        teacher=teacher,
    )
    return jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), targets)


def _chunks(model: Decoder, hidden: jax.Array) -> Chunks:
    rows = max(1, hidden.shape[0] // model.layout.shards("batch"))
    return Chunks(model.execution.logit_steps(rows, hidden.shape[1]), model.layout)


def _after_shared_prompts(
    params: Params,
    hidden: jax.Array,
    rows: TokenRows,
    wanted: jax.Array | None,
    model: Decoder,
    temperature: Temperature,
    teacher: TeacherTokens | None,
) -> TargetLogProbs:
    """Of rows with `prompt_of`: the first token of a sample follows the prompt's last one."""
    assert rows.prompt_of is not None
    start, ids = rows.prompt_of.shape[2], rows.segment_ids
    steps = jnp.arange(ids.shape[1], dtype=jnp.int32)
    begins = (ids != 0) & ~follows(ids)
    last = jnp.sum(ids[:, :start] != 0, axis=1) - 1

    def before(hidden: jax.Array) -> jax.Array:
        of_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return jnp.where(begins[..., None], of_last, jnp.roll(hidden, 1, axis=1))

    predicted = (ids != 0) & ~(begins & (steps < start))
    return wanted_log_probs(
        before(hidden),
        unembedding(params, model),
        rows.tokens,
        predicted if wanted is None else predicted & wanted,
        chunks=_chunks(model, hidden),
        temperature=temperature,
        teacher=None if teacher is None else replace(teacher, hidden=before(teacher.hidden)),
    )


def log_probs_ahead(
    params: Params,
    hidden: Float[Array, "batch time hidden"],
    rows: TokenRows,
    model: Decoder,
    *,
    ahead: int = 1,
    temperature: Temperature = 1.0,
    most_likely: bool = False,
) -> TargetLogProbs:
    """The log-prob of each token by the activations of the token `ahead` places before it.

    Args:
      hidden: normalised.

    Returns:
      Entry t is about token t, and 0 where `follows` is false.
    """
    # The last steps' targets are any tokens: rows keep their length, which divides over devices.
    targets = chunked_log_probs(
        hidden,
        unembedding(params, model),
        jnp.roll(rows.tokens, -ahead, axis=1),
        chunks=_chunks(model, hidden),
        temperature=temperature,
        most_likely=most_likely,
    )
    predicted = follows(rows.segment_ids, ahead)
    return jax.tree.map(lambda x: jnp.where(predicted, jnp.roll(x, ahead, axis=1), 0), targets)


def follows(segment_ids: Int[Array, "batch time"], ahead: int = 1) -> Bool[Array, "batch time"]:
    """Whether a token has `ahead` others before it in its segment."""
    same = (segment_ids[:, ahead:] == segment_ids[:, :-ahead]) & (segment_ids[:, ahead:] != 0)
    return jnp.pad(same, ((0, 0), (ahead, 0)))
