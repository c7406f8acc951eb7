"""The train step that all stages share: state, micro-batches, guard against non-finite updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """Weights, optimizer state and the number of updates so far."""

    step: Any
    params: Any
    opt_state: Any


def init_train_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


Metrics = dict[str, jax.Array]

# (weights after the optimizer, counts of the batch) -> weights, and figures for the metrics.
AfterUpdate = Callable[[Any, Any], tuple[Any, Metrics]]


def _deal(rows: Any, parts: int) -> Any:
    """Leaves [N, ...] as [parts, N / parts, ...]: row n goes to part n % parts.

    Dealing in turn, not by neighbours, keeps the rows of every part spread over the mesh, where
    they are.

    Raises:
      ValueError: N is no multiple of `parts`.
    """

    def deal(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] % parts:
            raise ValueError(
                f"a batch of {leaf.shape[0]} rows does not split into {parts} micro-batches"
            )
        return leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(deal, rows)


def map_micro_batches(function: Callable[[Any], Any], rows: Any, micro_batches: int) -> Any:
    """`function` of all rows, a micro-batch at a time, to bound activation memory.

    Args:
      function: leaves [n, ...] -> leaves [n, ...], each row for itself.
      rows: leaves [N, ...].

    Returns:
      What `function` gives for all N rows, in their order.
    """
    if micro_batches == 1:
        return function(rows)
    parts = jax.lax.map(function, _deal(rows, micro_batches))
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), parts)


def accumulate_gradients(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, Any]],
    params: Any,
    batch: Any,
    micro_batches: int,
) -> tuple[jax.Array, Any, Any]:
    """Sum of losses and gradients over `micro_batches` equal parts of the rows.

    Exact when loss_fn is a weighted sum over rows, as all losses here are. Rows are dealt out by
    `_deal`.

    Returns:
      Loss, gradients, and loss_fn's auxiliary values of each part, stacked [micro_batches, ...].
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if micro_batches == 1:
        (loss, aux), gradients = value_and_grad(params, batch)
        return loss, gradients, jax.tree.map(lambda leaf: leaf[None], aux)

    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        (loss, aux), gradients = value_and_grad(params, part)
        return jax.tree.map(jnp.add, total, (loss, gradients)), aux

    (loss, gradients), aux = jax.lax.scan(add, zeros, _deal(batch, micro_batches))
    return loss, gradients, aux


def apply_if_finite(
    state: TrainState,
    loss: jax.Array,
    gradients: Any,
    optimizer: optax.GradientTransformation,
    *,
    counts: Any = None,
    after_update: AfterUpdate | None = None,
) -> tuple[TrainState, Metrics]:
    """The optimizer's update; a non-finite loss or gradient leaves weights and moments alone.

    The step counter advances either way: it counts batches.

    Args:
      counts, after_update: what else is done to the weights, see `make_grpo_step`.
    """
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    figures: Metrics = {}
    if after_update is not None:
        params, figures = after_update(params, counts)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(finite, new, old)

    new_state = TrainState(
        state.step + 1,
        jax.tree.map(keep, params, state.params),
        jax.tree.map(keep, opt_state, state.opt_state),
    )
    metrics = {
        "loss": loss,
        "optimizer/grad_norm": norm,
        "optimizer/finite": finite.astype(jnp.float32),
        **figures,
    }
    return new_state, metrics
