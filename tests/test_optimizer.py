"""Learning rates and clipping, worked out by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.settings.optimizer import OptimizerSection
from r1jax.train_step import make_optimizer, make_schedule


def test_schedules_by_hand() -> None:
    section = OptimizerSection(
        learning_rate=1.0, schedule="cosine", warmup_steps=4, final_fraction=0.1
    )
    rates = [float(make_schedule(section, 24)(step)) for step in range(25)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.4375, 0.625, 0.8125, 1.0], atol=1e-6)
    assert rates[14] == pytest.approx(0.55)  # half-way between 1 and the floor
    assert rates[24] == pytest.approx(0.1)
    flat = make_schedule(OptimizerSection(learning_rate=2.0), 10)
    assert float(flat(0)) == float(flat(9)) == 2.0


def test_gradients_are_clipped_by_their_global_norm() -> None:
    section = OptimizerSection(learning_rate=1.0, max_grad_norm=1.0)
    clip = make_optimizer(section, 10)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = clip.init(params)
    _, state = clip.update(
        {"a": jnp.asarray([30.0, 0]), "b": jnp.asarray([0, 40.0])}, state, params
    )
    first_moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(first_moment["a"], [0.1 * 0.6, 0], rtol=1e-5)
    np.testing.assert_allclose(first_moment["b"], [0, 0.1 * 0.8], rtol=1e-5)
