"""The reference policy of the KL term: a copy of the policy, renewed every so many steps.

`TrainLoop.reference` holds it, and every checkpoint does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from r1jax.models.parameters import Params
from r1jax.run.train_loop import TrainLoop


def copy_policy(params: Params) -> Params:
    """Arrays of its own: the update donates the policy's."""
    copy: Params = jax.tree.map(jnp.copy, params)
    return copy


def refresh_reference(loop: TrainLoop, every: int | None) -> None:
    """Renews the reference policy after every `every`-th step; None: never."""
    if loop.reference is not None and every and loop.step % every == 0:
        loop.reference = copy_policy(loop.state.params)
