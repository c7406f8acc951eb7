"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): the token after the next.

A module of one layer reads, at position t, the decoder's activation h of token t, which has seen
the tokens up to t, together with the embedding of token t + 1, and predicts token t + 2:

    x_t = M [norm(embedding of token t + 1); norm(h_t)]        (equation 21)
    x'  = decoder layer(x_1 ... x_T), causally                 (equation 22)
    P(token t + 2) = softmax(head(norm(x'_t)))                 (equation 23)

The embedding and the head are the decoder's own. Two things the paper leaves open are as in vLLM,
SGLang and transformers, which run the released weights: h is taken after the decoder's final norm,
and M reads the embedding first (the paper writes it second). x_t is rotated as position t; some
count from t + 1, which is the same, since only differences of positions matter.

It is trained beside the next token's prediction, and drafts tokens for `r1jax.sampler`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from r1jax.models.decoder import (
    Cache,
    Decoder,
    Routings,
    embed,
    forward_routed,
    prefill_rows,
    run_new,
    run_rows,
)
from r1jax.models.log_probs import follows, scores_ahead
from r1jax.models.parameters import Params
from r1jax.models.primitives import project, rms_norm

_STACK = ("prediction",)


class AheadScores(NamedTuple):
    """What decoder and module say about each token [batch, time]; entry t is about token t.

    log_probs: float32, of the token given those before it; 0 for the first of a segment.
    ahead: float32, the module's log-probs, given those before it but the last; 0 for the first two.
    agrees: bool, whether the module's most likely token is the decoder's: a greedy draft would be
        accepted. False for the first two.
    routings: what the routers of decoder and module did; empty without experts.
    """

    log_probs: jax.Array
    ahead: jax.Array
    agrees: jax.Array
    routings: Routings


def ahead_scores(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    model: Decoder,
    *,
    balance: bool = False,
) -> AheadScores:
    """Score whole rows, as `token_scores`, with the decoder and with the module.

    Args:
      tokens, positions, segment_ids: int32 [batch, time].
      balance: see `forward_routed`.
    """
    hidden, routings = forward_routed(
        params, tokens, positions, segment_ids, model, balance=balance
    )
    following = jnp.roll(tokens, -1, axis=1)
    x = join(params, hidden, following, model)
    # Behind the last token of a segment comes one of another: what is said there is about no token
    # of the segment, and nothing in the segment attends to it.
    x, _, own_routings = run_rows(
        params, x, positions, segment_ids, model, _STACK, keep_cache=False, balance=balance
    )
    x = output_norm(params, x, model)
    own = scores_ahead(params, hidden, tokens, segment_ids, model, best=True)
    module = scores_ahead(params, x, tokens, segment_ids, model, ahead=2, best=True)
    agrees = follows(segment_ids, 2) & (own.best == module.best)
    return AheadScores(own.log_probs, module.log_probs, agrees, routings | own_routings)


def prefill_with_module(
    params: Params, tokens: jax.Array, lengths: jax.Array, model: Decoder
) -> tuple[jax.Array, Cache, Cache]:
    """As `prefill`, with what the module remembers of the prompts.

    Returns:
      Activations of each prompt's last token [batch, hidden], the decoder's cache, and the
      module's. That one has an entry less, `lengths - 1`: the last token waits for the next one.
    """
    hidden, cache = prefill_rows(params, tokens, lengths, model)
    steps = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    segment_ids = (steps < lengths[:, None] - 1).astype(jnp.int32)
    x = join(params, hidden, jnp.roll(tokens, -1, axis=1), model)
    _, module, _ = run_rows(params, x, steps, segment_ids, model, _STACK, keep_cache=True)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last, cache, module


def draft(
    params: Params,
    hidden: jax.Array,
    following: jax.Array,
    positions: jax.Array,
    prompt_cache: Cache,
    prompt_lengths: jax.Array,
    cache: Cache,
    step: jax.Array,
    visible: jax.Array,
    model: Decoder,
) -> tuple[jax.Array, Cache]:
    """The module on a few new tokens of every sample; for what is not said here, see `run_new`.

    Args:
      hidden: [batch, samples, tokens, hidden], the decoder's activations.
      following: int32 [batch, samples, tokens], the token after each of them.
      prompt_cache: from `prefill_with_module`, of `prompt_lengths - 1` entries.

    Returns:
      Activations [batch, samples, tokens, hidden] that the head reads, and the cache.
    """
    x = join(params, hidden, following, model, many=False)
    prompts = (prompt_cache, prompt_lengths - 1)
    x, cache = run_new(params, x, positions, *prompts, cache, step, visible, model, _STACK)
    return output_norm(params, x, model), cache


def join(
    params: Params, hidden: jax.Array, following: jax.Array, model: Decoder, *, many: bool = True
) -> jax.Array:
    """Equation 21: activations [..., hidden] and the tokens that follow [...] -> [..., hidden].

    Args:
      many: as of `embed`.
    """
    eps = model.config.rms_norm_eps
    tokens = embed(params, following, model, many=many)
    parts = (
        rms_norm(tokens, _own(params, "token_norm"), eps),
        rms_norm(hidden, _own(params, "activation_norm"), eps),
    )
    matrix = _own(params, "join").astype(hidden.dtype)
    return project(jnp.concatenate(parts, axis=-1), matrix, model.layout)


def output_norm(params: Params, x: jax.Array, model: Decoder) -> jax.Array:
    """The norm between the module's layer and the shared head."""
    return rms_norm(x, _own(params, "output_norm"), model.config.rms_norm_eps)


def _own(params: Params, name: str) -> jax.Array:
    """A weight of the module, whether or not `unstack_layers` took its layer off the stack."""
    module = params["prediction"]
    return module[0][name] if isinstance(module, tuple) else module[name][0]
