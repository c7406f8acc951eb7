"""The mixture of experts of DeepSeek-V2 and V3 (arXiv 2412.19437, section 2.1.2), dropless.

A token's experts and its result depend on nothing but the token: prefill, decoding and training
give the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from r1jax.models.config import MixtureOfExperts
from r1jax.models.parameters import Params
from r1jax.models.primitives import swiglu
from r1jax.sharding import Layout


def mixture_of_experts(
    x: jax.Array, w: Params, experts: MixtureOfExperts, layout: Layout
) -> jax.Array:
    """The routed experts' weighted sum plus the shared expert; x [..., hidden], the result, too.

    Args:
      w: a layer's weights in the dtype of x, a `router_bias` in float32.
    """
    tokens = x.reshape(-1, x.shape[-1])
    chosen, weights = route(tokens, w["router"], w.get("router_bias"), experts)
    routed = _run_experts(tokens, chosen, weights, w["gate"], w["up"], w["down"])
    shared = swiglu(x, w["shared_gate"], w["shared_up"], w["shared_down"], layout)
    return routed.reshape(x.shape) + shared


def route(
    tokens: jax.Array, router: jax.Array, bias: jax.Array | None, experts: MixtureOfExperts
) -> tuple[jax.Array, jax.Array]:
    """Which experts a token goes to, and what they weigh; in float32.

    The bias (auxiliary-loss-free load balancing, arXiv 2408.15664) decides the choice and has no
    part in the weights, so no gradient reaches it.

    Experts of the groups that a token leaves out are masked with -inf, as in DeepSeek's inference
    code and in transformers since 5; earlier transformers masked them with 0, and so chose one of
    them over an expert whose score and bias are negative together. The two differ only then.

    Args:
      tokens: [n, hidden].
      router: [hidden, n_routed_experts].
      bias: float32 [n_routed_experts], where `experts.biased`.

    Returns:
      int32 [n, num_experts_per_tok], best first, and float32 weights of the same shape.
    """
    score = jax.nn.sigmoid if experts.scoring_func == "sigmoid" else jax.nn.softmax
    scores = score(tokens.astype(jnp.float32) @ router.astype(jnp.float32))
    ranking = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    if experts.topk_group < experts.n_group:
        groups = ranking.reshape(len(ranking), experts.n_group, -1)
        group_scores = jnp.sum(jax.lax.top_k(groups, experts.experts_of_a_score)[0], axis=-1)
        kept = jax.lax.top_k(group_scores, experts.topk_group)[1]
        inside = jnp.any(kept[:, :, None] == jnp.arange(experts.n_group), axis=1)
        ranking = jnp.where(inside[:, :, None], groups, -jnp.inf).reshape(ranking.shape)
    chosen = jax.lax.top_k(ranking, experts.num_experts_per_tok)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return chosen, weights * experts.routed_scaling_factor


def _run_experts(
    tokens: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    """The weighted sum of each token's experts, [n, hidden].

    Rows are sorted by expert, so that each expert's are neighbours and one grouped product
    multiplies them all, however unevenly they are spread.

    Args:
      chosen, weights: [n, k], from `route`.
      gate, up: [experts, hidden, inner]. down: [experts, inner, hidden].
    """
    count, each = chosen.shape
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=len(gate)).astype(jnp.int32)
    rows = tokens[order // each]
    inner = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes))
    inner = inner * jax.lax.ragged_dot(rows, up, sizes)
    found = jax.lax.ragged_dot(inner, down, sizes)
    # Back in the tokens' order; a token's sum is taken from its best expert on, whoever shares
    # the batch.
    found = found[jnp.argsort(order)].reshape(count, each, -1)
    total = jnp.einsum("nkh,nk->nh", found, weights, preferred_element_type=jnp.float32)
    return total.astype(tokens.dtype)
