"""The value loss of PPO2 against its formula in float64, and its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.objectives.value_loss import explained_variance, value_loss


def formula(values: np.ndarray, returns: np.ndarray, old: np.ndarray, clip: float) -> np.ndarray:
    near = np.where(np.abs(values - old) < clip, values, old + clip * np.sign(values - old))
    return np.maximum((values - returns) ** 2, (near - returns) ** 2) / 2


def test_by_hand() -> None:
    values, returns = jnp.asarray([[0.0, 2.0, 2.0, -1.0]]), jnp.asarray([[1.0, 1.0, 3.0, 3.0]])
    plain = value_loss(values, returns)
    np.testing.assert_array_equal(plain.loss, [[0.5, 0.5, 0.5, 8.0]])
    assert not plain.clipped.any()
    # Old values of 1, clip 0.5: V_c = 0.5, 1.5, 1.5, 0.5. The third has moved towards its return by
    # more than 0.5, and is held back.
    clipped = value_loss(values, returns, jnp.ones((1, 4)), clip=0.5)
    np.testing.assert_array_equal(clipped.loss, [[0.5, 0.5, 1.125, 8.0]])
    np.testing.assert_array_equal(clipped.clipped, [[False, False, True, False]])


def test_against_the_formula_with_finite_differences() -> None:
    rng = np.random.default_rng(0)
    values, returns, old = rng.normal(size=(3, 5, 40))
    with jax.enable_x64(True):
        found = value_loss(values, returns, old, clip=0.4)
        np.testing.assert_allclose(found.loss, formula(values, returns, old, 0.4), rtol=1e-13)
        assert 0.05 < found.clipped.mean() < 0.5

        def total(values: jax.Array) -> jax.Array:
            return value_loss(values, returns, old, clip=0.4).loss.sum()

        step = 1e-6
        ahead, back = (formula(values + s, returns, old, 0.4) for s in (step, -step))
        expected = (ahead - back) / (2 * step)
        np.testing.assert_allclose(jax.grad(total)(values), expected, atol=1e-8)
        held = np.asarray(found.clipped)
        np.testing.assert_allclose(expected, np.where(held, 0, values - returns), atol=1e-8)


def test_explained_variance_counts_trained_tokens() -> None:
    rng = np.random.default_rng(1)
    returns, noise = rng.normal(size=(2, 6, 9))
    mask = rng.random((6, 9)) < 0.7
    values = returns + 0.5 * noise
    expected = 1 - np.var((returns - values)[mask]) / np.var(returns[mask])
    given = [np.where(mask, x, np.nan) for x in (values, returns)]
    np.testing.assert_allclose(explained_variance(*given, mask), expected, rtol=1e-5)
    assert explained_variance(returns, returns, mask) == 1
    assert abs(explained_variance(jnp.full((6, 9), 7.0), returns, mask)) < 1e-5
    for x in (0.1, 0.0):  # equal returns have no variance to explain
        assert explained_variance(returns, jnp.full((6, 9), x), mask) == 0
    assert explained_variance(returns, returns, jnp.zeros((6, 9))) == 0


def test_what_does_not_fit_is_refused() -> None:
    zeros = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="clip = 0.2 needs old_values"):
        value_loss(zeros, zeros, clip=0.2)
    with pytest.raises(ValueError, match=r"returns has shape \(2, 1\)"):
        value_loss(zeros, zeros[:, :1])
    with pytest.raises(ValueError, match="values has dtype int32"):
        value_loss(zeros.astype(int), zeros)
