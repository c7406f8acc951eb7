"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): the token after the next.

A module of one layer reads, at position t, the decoder's activation h of token t, which has seen
the tokens up to t, together with the embedding of token t + 1, and predicts token t + 2:

    x_t = M [norm(embedding of token t + 1); norm(h_t)]        (equation 21)
    x'  = decoder layer(x_1 ... x_T), causally                 (equation 22)
    P(token t + 2) = softmax(head(norm(x'_t)))                 (equation 23)

The embedding and the head are the decoder's. Two things the paper leaves open are as in vLLM,
SGLang and transformers, which run the released weights: h is taken after the decoder's final norm,
and M reads the embedding first (the paper writes it second). x_t is rotated as position t; some
count from t + 1, which is the same, since only differences of positions matter.

It is trained beside the next token's prediction, and drafts tokens for `r1jax.sampler`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from r1jax.models.config import Decoder
from r1jax.models.decoder import (
    NewTokens,
    Routings,
    SlotTokens,
    TokenRows,
    embed,
    forward,
    prefill,
    right_padded,
    run_new_tokens,
    run_rows,
    run_slot_tokens,
)
from r1jax.models.kv_cache import KVCache, PromptCache
from r1jax.models.log_probs import follows, log_probs_ahead
from r1jax.models.paged_cache import OF_MODULE, PagedCache
from r1jax.models.parameters import Params
from r1jax.models.primitives import project, rms_norm

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

_STACK = ("prediction",)


class AheadLogProbs(NamedTuple):
    """Of each token, by the decoder and by the module; entry t is about token t.

    log_probs: given the tokens before it; 0 for the first of a segment.
    ahead: the module's, given the tokens before it but the last; 0 for the first two.
    agrees: whether the module's most likely token is the decoder's: a greedy draft would be
        accepted. False for the first two.
    routings: of the routers of decoder and module; empty without experts.
    """

    log_probs: Float[Array, "batch time"]
    ahead: Float[Array, "batch time"]
    agrees: Bool[Array, "batch time"]
    routings: Routings


def ahead_log_probs(
    params: Params, rows: TokenRows, model: Decoder, *, balance: bool = False
) -> AheadLogProbs:
    """Log-probs of whole rows, as `token_log_probs`, by the decoder and by the module.

    Args:
      balance: as of `forward`.
    """
    decoder = forward(params, rows, model, balance=balance)
    x = _join(params, decoder.hidden, jnp.roll(rows.tokens, -1, axis=1), model)
    # After the last token of a segment comes one of another segment: the module's prediction there
    # is about no token of the segment, and nothing in the segment attends to it.
    module = run_rows(params, x, rows, model, _STACK, balance=balance)
    x = _output_norm(params, module.hidden, model)
    following = log_probs_ahead(params, decoder.hidden, rows, model, most_likely=True)
    ahead = log_probs_ahead(params, x, rows, model, ahead=2, most_likely=True)
    agrees = follows(rows.segment_ids, 2) & (following.most_likely == ahead.most_likely)
    routings = decoder.routings | module.routings
    return AheadLogProbs(following.log_probs, ahead.log_probs, agrees, routings)


def prefill_with_module(
    params: Params,
    tokens: Int[Array, "batch prompt_time"],
    lengths: Int[Array, " batch"],
    model: Decoder,
) -> tuple[Float[Array, "batch prompt_time hidden"], PromptCache]:
    """As `prefill`, with the module's layer in the cache.

    That one has an entry less, `lengths - 1`: the last token waits for the next one.
    """
    hidden, cache = prefill(params, tokens, lengths, model)
    rows = right_padded(tokens, lengths - 1)
    x = _join(params, hidden, jnp.roll(tokens, -1, axis=1), model)
    module = run_rows(params, x, rows, model, _STACK, keep_cache=True)
    return hidden, replace(cache, stacks=cache.stacks | module.stacks)


def draft(
    params: Params,
    hidden: Float[Array, "batch samples tokens hidden"],
    new: NewTokens,
    prompts: PromptCache,
    cache: KVCache,
    model: Decoder,
) -> tuple[Float[Array, "batch samples tokens hidden"], KVCache]:
    """Run the module on a few new tokens of every sample; see `decode`.

    Args:
      hidden: the decoder's activations.
      new: `tokens` are those that follow each of them; positions are the activations'.
      prompts: from `prefill_with_module`.

    Returns:
      Activations that the head reads, and the cache.
    """
    x = _join(params, hidden, new.tokens, model, gather_table=False)
    prompts = replace(prompts, lengths=prompts.lengths - 1)
    x, cache = run_new_tokens(params, x, new, prompts, cache, model, _STACK)
    return _output_norm(params, x, model), cache


def draft_slots(
    params: Params,
    hidden: Float[Array, "shards slots tokens hidden"],
    new: SlotTokens,
    cache: PagedCache,
    model: Decoder,
) -> tuple[Float[Array, "shards slots tokens hidden"], PagedCache]:
    """Run the module on a few new tokens of every slot; see `draft` and `decode_slots`."""
    x = _join(params, hidden, new.tokens, model, gather_table=False)
    x, cache, _ = run_slot_tokens(params, x, new, cache, model, _STACK, OF_MODULE)
    return _output_norm(params, x, model), cache


def _join(
    params: Params,
    hidden: Float[Array, "*shape hidden"],
    following: Int[Array, "*shape"],
    model: Decoder,
    *,
    gather_table: bool = True,
) -> Float[Array, "*shape hidden"]:
    """Equation 21: activations and the embeddings of the tokens that follow, as the layer's input.

    Args:
      gather_table: as of `embed`.
    """
    eps = model.config.rms_norm_eps
    tokens = embed(params, following, model, gather_table=gather_table)
    parts = (
        rms_norm(tokens, _weight(params, "token_norm"), eps),
        rms_norm(hidden, _weight(params, "activation_norm"), eps),
    )
    matrix = _weight(params, "join").astype(hidden.dtype)
    return project(jnp.concatenate(parts, axis=-1), matrix, model.layout)


def _output_norm(
    params: Params, x: Float[Array, "*shape hidden"], model: Decoder
) -> Float[Array, "*shape hidden"]:
    """The norm between the module's layer and the shared head."""
    return rms_norm(x, _weight(params, "output_norm"), model.config.rms_norm_eps)


def _weight(params: Params, name: str) -> Float[Array, "*shape"]:
    """A weight of the module, whether or not `unstack_layers` took its layer off the stack."""
    module = params["prediction"]
    return module[0][name] if isinstance(module, tuple) else module[name][0]
