"""Advantages by hand, and groups whose rewards are equal, whatever rounding makes of their mean."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.grpo import Advantages, group_advantages


@pytest.fixture(params=["jit", "eager"])
def advantages(request: pytest.FixtureRequest) -> Callable[..., Advantages]:
    if request.param == "eager":
        return group_advantages
    return jax.jit(group_advantages, static_argnames=("scale", "epsilon"))


def test_by_hand(advantages: Callable[..., Advantages]) -> None:
    rewards = jnp.asarray([[0.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    out = advantages(rewards)
    s = np.sqrt(0.5)  # population std of 0, 1, 1, 2
    np.testing.assert_allclose(out.values, [[-1 / s, 0, 0, 1 / s], [0, 0, 0, 0]], atol=1e-5)
    assert out.zero_variance.tolist() == [False, True]
    centred = advantages(rewards, scale="none")
    np.testing.assert_allclose(centred.values[0], [-1, 0, 0, 1], atol=1e-6)


def test_unscored_samples_take_no_part_in_the_group(advantages: Callable[..., Advantages]) -> None:
    nan = jnp.nan
    rewards = jnp.asarray([[0.0, nan, 2.0], [nan, 0.1, nan], [nan, nan, nan], [0.1, nan, 0.1]])
    out = advantages(rewards)
    np.testing.assert_allclose(out.values[0], [-1, 0, 1], atol=1e-5)
    assert not out.values[1:].any()
    assert out.zero_variance.tolist() == [False, True, True, True]


def test_integer_and_boolean_rewards(advantages: Callable[..., Advantages]) -> None:
    for rewards in (jnp.asarray([[0, 1], [1, 1]]), jnp.asarray([[False, True], [True, True]])):
        out = advantages(rewards)
        np.testing.assert_allclose(out.values, [[-1, 1], [0, 0]], atol=1e-5)


REWARDS = np.concatenate([np.arange(1, 41) / 10, np.arange(1, 21) / 7, [1e-8, -0.3, 1e4, 3e-30]])
SIZES = np.arange(2, 65)


def equal_rewards(dtype: jnp.dtype, *, other: float | None = None) -> jax.Array:
    """Groups [rewards * sizes, 64] of every reward and size, at random among unscored samples."""
    rng = np.random.default_rng(0)
    rewards = np.repeat(REWARDS, len(SIZES))[:, None]
    sizes = np.tile(SIZES, len(REWARDS))[:, None]
    groups = np.where(np.arange(64) < sizes, rewards, np.nan)
    if other is not None:
        groups[:, 0] = other
    return jnp.asarray(rng.permuted(groups, axis=1), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_equal_rewards_teach_exactly_nothing(dtype: jnp.dtype, scale: str) -> None:
    groups = equal_rewards(dtype)
    out = jax.jit(group_advantages, static_argnames="scale")(groups, scale=scale)
    assert out.zero_variance.all()
    assert np.all(np.asarray(out.values) == 0)


@pytest.mark.parametrize(("reward", "size"), [(0.1, 12), (0.3, 64), (0.7, 49), (1.1, 7), (0.1, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_rewards_of_whole_groups(reward: float, size: int, dtype: jnp.dtype) -> None:
    # Not padded with unscored samples: another shape is summed in another order.
    out = jax.jit(group_advantages)(jnp.full((2, size), reward, dtype))
    assert out.zero_variance.all() and np.all(np.asarray(out.values) == 0)


def test_a_real_difference_is_normalised_as_ever() -> None:
    def published(rewards: jax.Array) -> jax.Array:
        scored = jnp.isfinite(rewards)
        kept = jnp.where(scored, rewards.astype(jnp.float32), 0.0)
        count = jnp.maximum(scored.sum(axis=1, keepdims=True), 1)
        centred = jnp.where(scored, kept - kept.sum(axis=1, keepdims=True) / count, 0.0)
        std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True) / count)
        return centred / (std + 1e-6)

    groups = equal_rewards(jnp.float32, other=0.55)
    out = jax.jit(group_advantages)(groups)
    assert not out.zero_variance.any()
    np.testing.assert_array_equal(out.values, jax.jit(published)(groups))
    # However small: the smallest step of a float32 above 0.5.
    near = jnp.asarray([[0.5, np.nextafter(np.float32(0.5), np.float32(1))]])
    assert not jax.jit(group_advantages)(near).zero_variance.any()


@pytest.mark.parametrize("shape", [(), (8,), (2, 4, 1)])
def test_rewards_that_are_not_grouped_are_refused(shape: tuple[int, ...]) -> None:
    for function in (group_advantages, jax.jit(group_advantages)):
        with pytest.raises(ValueError, match=r"rewards has shape .* \[prompts, samples\].*reshape"):
            function(jnp.zeros(shape))
