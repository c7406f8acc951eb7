"""Balancing the load of a mixture of experts: by biases, and by a loss within each sequence.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) has both: the biases keep the experts evenly used over
a batch without a gradient (arXiv 2408.15664), and a very small loss prevents extremes within a
single sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from r1jax.models.parameters import Params

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Sums = tuple[jax.Array, ...]
# Stack of layers -> float32 [layers, experts], by how many tokens each expert was chosen.
Loads = Mapping[str, jax.Array]


def sequence_imbalance(
    scores: Float[Array, "rows time experts"],
    segment_ids: Int[Array, "rows time"],
    chosen: int,
    *,
    segments: int,
    sum_over_devices: Callable[[Sums], Sums] = lambda sums: sums,
) -> Float[Array, " rows"]:
    """Equations 17 to 20 without alpha, summed over the sequences of each row.

    Of a sequence of T tokens it is sum_i f_i P_i over the E experts: f_i is E / (K T) times the
    number of tokens whose K best scores i is among, and P_i the mean of its share of the scores.
    1 where all are even, up to E / K where all tokens choose the same. As in the equations, the
    best scores count, whatever bias or group decides on the choice. Padding is left out.

    Args:
      scores: what the router gives.
      segment_ids: below `segments`; 0 is padding.
      chosen: K, experts of a token.
      sum_over_devices: over those that a row is split over.
    """
    experts = scores.shape[-1]
    best = jax.lax.top_k(jax.lax.stop_gradient(scores), chosen)[1]
    counted = jnp.sum(jax.nn.one_hot(best, experts), axis=-2)
    shares = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)

    def sums(row: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(row, ids, segments)

    count, share, length = sum_over_devices(
        (
            jax.vmap(sums)(counted, segment_ids),
            jax.vmap(sums)(shares, segment_ids),
            jax.vmap(sums)(jnp.ones_like(segment_ids, jnp.float32), segment_ids),
        )
    )
    each = jnp.sum(count * share, axis=-1) * experts / (chosen * jnp.maximum(length, 1) ** 2)
    return jnp.sum(each[:, 1:], axis=-1)


def move_biases(params: Params, loads: Loads, speed: float) -> Params:
    """Weights whose routers' biases moved by `speed` against the load (arXiv 2408.15664, alg. 1).

    Down for experts that are chosen more often than the mean, up for others. Only the choice of
    experts depends on them.

    Args:
      loads: of a whole batch; a stack's `router_bias` has the same shape.
    """
    moved = dict(params)
    for name, load in loads.items():
        bias = params[name]["router_bias"]
        step = jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
        moved[name] = {**params[name], "router_bias": bias + speed * step.astype(bias.dtype)}
    return moved


def load_figures(loads: Loads) -> dict[str, Float[Array, ""]]:
    """How unevenly experts are used, as metrics.

    The load of the busiest expert as a multiple of the mean, of the layer where it is largest and
    on average over the layers; and the part of the experts that no token chose.
    """
    load = jnp.concatenate(list(loads.values()))
    busiest = jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1e-20)
    return {
        "experts/max_load": jnp.max(busiest),
        "experts/max_load_mean": jnp.mean(busiest),
        "experts/unused": jnp.mean((load == 0).astype(jnp.float32)),
    }
