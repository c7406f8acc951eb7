"""Advantages that are not a group's std scores, and those of tokens: by hand and in float64.

Those of groups are in tests/test_advantages.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.objectives.advantages import (
    generalised_advantages,
    leave_one_out_advantages,
    penalise_advantages,
    rewards_as_advantages,
    whiten_advantages,
)

NAN = jnp.nan


def both(function: Any) -> list[Any]:
    return [function, jax.jit(function)]


def test_leave_one_out_by_hand() -> None:
    rewards = jnp.asarray([[0.0, 1, 1, 4], [NAN, 2, NAN, 6], [NAN, 3, NAN, NAN], [0.1] * 4])
    for function in both(leave_one_out_advantages):
        out = function(rewards)
        np.testing.assert_allclose(out.values[0], [-2, -2 / 3, -2 / 3, 10 / 3], rtol=1e-6)
        np.testing.assert_array_equal(out.values[1], [0, -4, 0, 4])
        np.testing.assert_array_equal(out.values[2:], np.zeros((2, 4)))
        assert out.zero_variance.tolist() == [False, False, True, True]


def test_rewards_as_advantages_by_hand() -> None:
    for function in both(rewards_as_advantages):
        out = function(jnp.asarray([[0.5, NAN], [1, 1]]))
        np.testing.assert_array_equal(out.values, [[0.5, 0], [1, 1]])
        assert out.zero_variance.tolist() == [True, True]


def test_whitening_is_over_all_tokens_of_all_batches() -> None:
    rng = np.random.default_rng(0)
    values = [rng.normal(3, 2, (4, 7)), rng.normal(-1, 1, (2, 5))]
    masks = [rng.random(x.shape) < 0.6 for x in values]
    kept = np.concatenate([x[m] for x, m in zip(values, masks, strict=True)])
    junk = [np.where(m, x, np.nan) for x, m in zip(values, masks, strict=True)]
    for function in both(whiten_advantages):
        out = function([jnp.asarray(x, jnp.float32) for x in junk], masks)
        for got, x, mask in zip(out, values, masks, strict=True):
            expected = np.where(mask, (x - kept.mean()) / kept.std(), 0)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    for x in (0.1, 0.7, 1e4):  # equal advantages teach exactly nothing, as nothing trained does
        assert not whiten_advantages([jnp.full((3, 7), x)], [jnp.ones((3, 7))])[0].any()
    assert not whiten_advantages([jnp.ones((3, 7))], [jnp.zeros((3, 7))])[0].any()


def test_a_token_answers_for_the_kl_behind_it() -> None:
    kl, mask = jnp.asarray([[9.0, 1, 2, 9, 3]]), jnp.asarray([[0, 1, 1, 0, 1]])
    ids = jnp.asarray([[1, 1, 1, 2, 2]])
    for function in both(penalise_advantages):
        out = function(jnp.asarray([5.0]), kl, 0.5, mask, ids)
        np.testing.assert_array_equal(out[0, [1, 2, 4]], [3.5, 4, 3.5])
        alone = function(jnp.asarray([5.0]), kl, 0.5, mask)
        np.testing.assert_array_equal(alone[0, [1, 2, 4]], [2, 2.5, 3.5])
    assert not jax.grad(lambda x: penalise_advantages(kl, x, 0.5, mask).sum())(kl).any()


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.9, 0.0)])
def test_generalised_advantages_against_loops(discount: float, decay: float) -> None:
    rng = np.random.default_rng(0)
    ids = np.asarray([[1] * 5 + [2] * 4 + [0] * 2, [1] * 3 + [2] * 3 + [3] * 5])
    # Between the turns of a sample tokens may be untrained: they are passed over.
    mask = np.asarray([[0, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 0]]) > 0
    rewards, values = rng.normal(size=(2, *ids.shape))
    expected = np.zeros(ids.shape)
    for r, segment in {(row, each) for row in range(2) for each in ids[row]}:
        advantage = after = 0.0
        for t in np.flatnonzero((ids[r] == segment) & mask[r])[::-1]:
            error = rewards[r, t] + discount * after - values[r, t]
            advantage = error + discount * decay * advantage
            expected[r, t], after = advantage, values[r, t]
    junk = [np.where(mask, x, np.nan) for x in (rewards, values)]
    with jax.enable_x64(True):
        for function in both(partial(generalised_advantages, discount=discount, decay=decay)):
            np.testing.assert_allclose(function(*junk, mask, ids), expected, rtol=1e-12)


def test_with_a_decay_of_1_they_are_the_return_less_the_value() -> None:
    rewards, values = jnp.asarray([[0.0, 0, 1]]), jnp.asarray([[0.2, 0.5, 0.9]])
    out = generalised_advantages(rewards, values, jnp.ones((1, 3)))
    np.testing.assert_allclose(out, [[0.8, 0.5, 0.1]], rtol=1e-5)
    with pytest.raises(ValueError, match=r"values has shape \(1, 2\)"):
        generalised_advantages(rewards, values[:, :2], jnp.ones((1, 3)))


def test_what_does_not_fit_is_refused() -> None:
    for function in (leave_one_out_advantages, rewards_as_advantages):
        with pytest.raises(ValueError, match=r"rewards has shape \(4,\).*\[prompts, samples\]"):
            function(jnp.zeros(4))
    with pytest.raises(ValueError, match=r"mask has shape \(3, 1\)"):
        whiten_advantages([jnp.zeros((3, 7))], [jnp.zeros((3, 1))])
    with pytest.raises(ValueError, match=r"advantages has shape \(3, 1\)"):
        penalise_advantages(jnp.zeros((3, 1)), jnp.zeros((3, 7)), 0.1, jnp.zeros((3, 7)))
