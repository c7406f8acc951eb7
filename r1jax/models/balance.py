"""Balancing the load of a mixture of experts: by biases, and by a loss within each sequence.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) has both: the biases keep the experts evenly used over
a batch without a gradient (arXiv 2408.15664), and a very small loss prevents extremes within a
single sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from r1jax.models.parameters import Params

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PyTree

    from r1jax.models.config import ModelConfig
    from r1jax.models.experts import Routing
    from r1jax.settings.optimizer import BalanceSection
    from r1jax.train_step import AfterUpdate, Metrics

# Stack of layers -> float32 [layers, experts], by how many tokens each expert was chosen.
Loads = Mapping[str, jax.Array]


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


def loads_of(routings: Mapping[str, Routing]) -> Loads:
    """Stack of layers -> how many tokens chose each expert, [layers, experts]."""
    return {name: routing.load for name, routing in routings.items()}


def imbalance_of(routings: Mapping[str, Routing]) -> Float[Array, " rows"]:
    """Of each row, summed over its sequences and the layers."""
    return jnp.sum(jnp.concatenate([each.imbalance for each in routings.values()]), axis=0)


def make_after_update(balance: BalanceSection, config: ModelConfig) -> AfterUpdate | None:
    """What follows the optimizer: the biases move, and the experts' loads become metrics.

    None for a dense model. The counts that the update is given are those of `loads_of`.
    """
    if config.experts is None:
        return None

    def after_update(params: PyTree, loads: Loads) -> tuple[PyTree, Metrics]:
        if balance.bias_speed:
            params = move_biases(params, loads, balance.bias_speed)
        return params, load_figures(loads)

    return after_update
