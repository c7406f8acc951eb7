"""Sums over sequences by hand, and against loops."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.objectives.sequences import sequence_mean, sequence_sum, sum_to_end

VALUES = jnp.asarray([[1.0, 2, 3, 4, 5, 6]])
MASK = jnp.asarray([[0, 1, 1, 0, 1, 1]])
IDS = jnp.asarray([[1, 1, 1, 2, 2, 0]])


def both(function: Any) -> list[Any]:
    return [function, jax.jit(function)]


def test_by_hand() -> None:
    for function in both(sequence_sum):
        np.testing.assert_array_equal(function(VALUES, MASK, IDS), [[5, 5, 5, 5, 5, 6]])
        np.testing.assert_array_equal(function(VALUES, MASK), [[16] * 6])
    for function in both(sequence_mean):
        np.testing.assert_array_equal(function(VALUES, MASK, IDS), [[2.5, 2.5, 2.5, 5, 5, 6]])
        np.testing.assert_array_equal(function(VALUES, 0 * MASK, IDS), [[0] * 6])
    for function in both(sum_to_end):
        np.testing.assert_array_equal(function(VALUES, MASK, IDS), [[5, 5, 3, 5, 5, 6]])
        np.testing.assert_array_equal(function(VALUES, MASK), [[16, 16, 14, 11, 11, 6]])


def test_against_loops_with_gradients() -> None:
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 6, (4, 33)), axis=1)
    values, mask = rng.normal(size=ids.shape), rng.random(ids.shape) < 0.7
    weights = rng.normal(size=ids.shape)
    same = (ids[:, :, None] == ids[:, None, :]) & mask[:, None, :]  # [row, at, counted]
    later = np.arange(33)[None, :] >= np.arange(33)[:, None]
    with jax.enable_x64(True):
        for function, pairs in ((sequence_sum, same), (sum_to_end, same & later)):
            expected = np.einsum("rac,rc->ra", pairs, values)
            junk = np.where(mask, values, np.nan)
            np.testing.assert_allclose(jax.jit(function)(junk, mask, ids), expected, rtol=1e-12)
            total = jax.grad(lambda x, f=function: jnp.sum(weights * f(x, mask, ids)))
            gradient = jax.jit(total)(values)
            expected = np.einsum("rac,ra->rc", pairs, weights)
            np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-12)


def test_the_sequences_before_round_nothing() -> None:
    """A sum by differences of running sums over the row would be off by 1e-2 here."""
    values = jnp.asarray([[1e5, 1e-3, 2e-3]], jnp.float32)
    out = sequence_sum(values, jnp.ones((1, 3)), jnp.asarray([[1, 2, 2]]))
    np.testing.assert_allclose(out[0, 1:], 3e-3, rtol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    for function in (sequence_sum, sequence_mean, sum_to_end):
        with pytest.raises(ValueError, match=r"mask has shape \(1, 5\)"):
            function(VALUES, MASK[:, :5], IDS)
        with pytest.raises(ValueError, match=r"segment_ids has shape \(6,\)"):
            function(VALUES, MASK, IDS[0])
