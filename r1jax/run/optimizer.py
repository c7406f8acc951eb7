"""From a config's optimizer section to optax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import optax

from r1jax.settings.optimizer import OptimizerSection

if TYPE_CHECKING:
    from jaxtyping import PyTree


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


def _decays(params: PyTree) -> PyTree:
    def decays(path: tuple[jax.tree_util.KeyEntry, ...], _: jax.Array) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) != "router_bias"

    return jax.tree.map_with_path(decays, params)
