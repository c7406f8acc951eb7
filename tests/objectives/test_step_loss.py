"""The loss of process reward models by hand and against optax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.objectives.normalisation import token_weights
from r1jax.objectives.step_loss import step_loss


def test_step_loss_by_hand() -> None:
    # Probabilities of "right": 3/4, 1/5, 1/2, 4/5; the third token ends no labelled step.
    right = jnp.log(jnp.asarray([[3.0, 0.25], [1.0, 4.0]]))
    logits = jnp.stack([jnp.full((2, 2), 7.0), right + 7.0], axis=-1)
    labels = jnp.asarray([[1.0, 0.25], [jnp.nan, 0.0]])
    weights = token_weights(jnp.asarray([[1, 1], [0, 1]]), "token_mean")
    soft = 0.25 * np.log(1 / 5) + 0.75 * np.log(4 / 5)
    expected = -(np.log(3 / 4) + soft + np.log(1 / 5)) / 3
    for function in (step_loss, jax.jit(step_loss)):
        loss, metrics = function(logits, labels, weights)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], 2 / 3, rtol=1e-6)
        np.testing.assert_allclose(metrics["right"], 1 / 3, rtol=1e-6)


def test_step_loss_is_the_cross_entropy_of_both_labels() -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 5, 2)), jnp.float32)
    labels = jnp.asarray(rng.uniform(size=(3, 5)), jnp.float32)
    mask = jnp.asarray(rng.integers(0, 2, (3, 5)))
    weights = token_weights(mask, "token_mean")

    def reference(logits: jax.Array) -> jax.Array:
        both = jnp.stack([1 - labels, labels], axis=-1)
        return jnp.sum(optax.softmax_cross_entropy(logits, both) * mask) / mask.sum()

    (loss, _), gradient = jax.value_and_grad(step_loss, has_aux=True)(logits, labels, weights)
    expected, expected_gradient = jax.value_and_grad(reference)(logits)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def test_tokens_that_end_no_step_have_no_part() -> None:
    weights = jnp.asarray([[1.0, 0.0]])
    logits = jnp.asarray([[[0.0, 1000.0], [jnp.nan, jnp.inf]]])

    def loss(logits: jax.Array) -> jax.Array:
        return step_loss(logits, jnp.asarray([[0.0, jnp.nan]]), weights)[0]

    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, 1000, rtol=1e-6)  # where a probability is 0
    assert np.all(gradient[0, 1] == 0) and np.all(np.isfinite(gradient))


def test_shapes_that_do_not_fit_are_refused() -> None:
    one = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"expected \[batch, time, 2\]"):
        step_loss(jnp.ones((2, 3)), one, one)
    with pytest.raises(ValueError, match="labels has shape"):
        step_loss(jnp.ones((2, 3, 2)), jnp.ones((2, 1)), one)
