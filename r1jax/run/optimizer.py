"""From a config's optimizer section to optax, and train states that are created sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from r1jax.settings.optimizer import OptimizerSection
from r1jax.sharding import Layout
from r1jax.train_step import TrainState, init_train_state


def make_schedule(section: OptimizerSection, steps: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up, then constant, cosine or linear to the floor."""
    peak, floor = section.learning_rate, section.learning_rate * section.final_fraction
    rest = max(steps - section.warmup_steps, 1)
    if section.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=section.final_fraction)
    elif section.schedule == "linear":
        main = optax.linear_schedule(peak, floor, rest)
    else:
        main = optax.constant_schedule(peak)
    if section.warmup_steps == 0:
        return main
    # Update n uses the rate at n: start above 0, or the first update would do nothing.
    warmup = optax.linear_schedule(peak / section.warmup_steps, peak, section.warmup_steps)
    return optax.join_schedules([warmup, main], [section.warmup_steps])


def make_optimizer(section: OptimizerSection, steps: int) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm.

    The biases that choose experts have no gradient, and so no update; nor do they decay.
    """
    return optax.chain(
        optax.clip_by_global_norm(section.max_grad_norm),
        optax.adamw(
            make_schedule(section, steps),
            b1=section.beta1,
            b2=section.beta2,
            eps=section.epsilon,
            weight_decay=section.weight_decay,
            mu_dtype=section.moment_dtype,
            mask=_decays,
        ),
    )


def _decays(params: Any) -> Any:
    def decays(path: Any, leaf: Any) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) != "router_bias"

    return jax.tree.map_with_path(decays, params)


def abstract_train_state(
    params: Any, optimizer: optax.GradientTransformation, layout: Layout
) -> TrainState:
    """Shapes, dtypes and shardings of the train state: moments lie like their weights.

    Args:
      params: weights or `jax.ShapeDtypeStruct`s, with shardings.
    """
    shapes = jax.eval_shape(lambda p: init_train_state(p, optimizer), params)

    def like(leaf: Any, source: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=source.sharding)

    def replicated(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.replicated)

    return TrainState(
        step=replicated(shapes.step),
        params=jax.tree.map(like, shapes.params, params),
        opt_state=optax.tree.map_params(
            optimizer, like, shapes.opt_state, params, transform_non_params=replicated
        ),
    )


def shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def jit_update(update: Callable[..., Any], abstract: TrainState) -> Any:
    """`update(state, batch) -> (state, metrics)`, compiled; it consumes the state it is given."""
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings_of(abstract), None))


def create_train_state(
    params: Any, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """The first train state, every array created where it will stay (else the update compiles
    twice). Consumes `params`."""
    create = jax.jit(
        lambda p: init_train_state(p, optimizer),
        out_shardings=shardings_of(abstract),
        donate_argnums=0,
    )
    return create(params)
