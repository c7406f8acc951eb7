"""Losses of reward models by hand and by finite differences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.objectives.normalisation import row_weights
from r1jax.objectives.preference_loss import pairwise_loss, pointwise_loss


def test_pairwise_loss_by_hand() -> None:
    # Win probabilities of the chosen one: 1/2, 3/4, 1/5.
    margin = jnp.log(jnp.asarray([1.0, 3.0, 0.25]))
    for function in (pairwise_loss, jax.jit(pairwise_loss)):
        loss, metrics = function(margin + 7, jnp.full(3, 7.0), row_weights(jnp.ones(3)))
        np.testing.assert_allclose(loss, (np.log(2) + np.log(4 / 3) + np.log(5)) / 3, rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], (0.5 + 1 + 0) / 3, rtol=1e-6)
        np.testing.assert_allclose(metrics["margin"], np.log(0.75) / 3, rtol=1e-4)


def test_pointwise_loss_by_hand() -> None:
    # Probabilities of safe: 3/4 and 1/5 for safe ones, 1/5 and 1/2 for unsafe ones.
    scores = jnp.log(jnp.asarray([3.0, 0.25, 0.25, 1.0]))
    safe = jnp.asarray([True, True, False, False])
    expected = -np.log([3 / 4, 1 / 5, 4 / 5, 1 / 2]).mean()
    for function in (pointwise_loss, jax.jit(pointwise_loss)):
        loss, metrics = function(scores, safe, row_weights(jnp.ones(4)))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], (1 + 0 + 1 + 0.5) / 4, rtol=1e-6)
        np.testing.assert_allclose(metrics["safe"], 0.5, rtol=1e-6)
    reference = optax.sigmoid_binary_cross_entropy(scores, safe.astype(jnp.float32)).mean()
    np.testing.assert_allclose(loss, reference, rtol=1e-6)


def test_losses_stay_finite_where_a_probability_is_zero() -> None:
    one = jnp.ones(1)
    for loss, _ in (
        pairwise_loss(-500 * one, 500 * one, one),
        pointwise_loss(1000 * one, 0 * one, one),
    ):
        np.testing.assert_allclose(loss, 1000, rtol=1e-6)


def test_rows_that_fill_a_batch_count_neither_above_nor_below_the_fraction_bar() -> None:
    weights = row_weights(jnp.asarray([1, 1, 0]))
    junk = jnp.asarray([1.0, -1.0, jnp.nan])
    for loss in (
        lambda scores: pairwise_loss(scores, jnp.zeros(3), weights)[0],
        lambda scores: pointwise_loss(scores, jnp.asarray([1.0, 1.0, jnp.nan]), weights)[0],
    ):
        value, gradient = jax.value_and_grad(loss)(junk)
        np.testing.assert_allclose(value, np.log1p(np.exp([-1.0, 1.0])).mean(), rtol=1e-5)
        assert gradient[2] == 0 and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_gradients_match_finite_differences(kind: str) -> None:
    rng = np.random.default_rng(3)
    chosen, rejected = rng.normal(size=(2, 5))
    safe = np.asarray([1, 0, 1, 1, 0])
    weights = row_weights(jnp.asarray([1, 1, 0, 1, 1]))

    def loss(scores: Any) -> jax.Array:
        if kind == "pairwise":
            return pairwise_loss(scores[:5], scores[5:], weights)[0]
        return pointwise_loss(scores[:5], safe, weights)[0]

    with jax.enable_x64(True):
        at = np.concatenate([chosen, rejected])
        exact = jax.grad(loss)(jnp.asarray(at))
        steps = 1e-5 * np.eye(10)
        numeric = [(float(loss(at + d)) - float(loss(at - d))) / 2e-5 for d in steps]
    np.testing.assert_allclose(exact, numeric, atol=1e-8)
    assert np.abs(numeric).max() > 0.05


@pytest.mark.parametrize("shape", [(4, 1), (1,), (3,), (), (4, 4)])
def test_arrays_that_are_not_per_row_are_refused(shape: tuple[int, ...]) -> None:
    row, odd = jnp.zeros(4), jnp.zeros(shape)
    for loss in (pairwise_loss, jax.jit(pairwise_loss)):
        with pytest.raises(ValueError, match=r"rejected has shape .*\[batch\] = \(4,\)") as error:
            loss(row, odd, row)
        assert shape != (4, 1) or "drop its last axis" in str(error.value)
        with pytest.raises(ValueError, match="weights has shape"):
            loss(row, row, odd)
    for loss in (pointwise_loss, jax.jit(pointwise_loss)):
        with pytest.raises(ValueError, match="safe has shape"):
            loss(row, odd, row)
        with pytest.raises(ValueError, match="weights has shape"):
            loss(row, row, odd)
    with pytest.raises(ValueError, match="scores has dtype int32"):
        pointwise_loss(jnp.zeros(4, jnp.int32), row, row)
