"""The critic's step and its advantages: packed rows change nothing, and the formula in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_grpo import QUICK, VOCAB, packing

from r1jax.critic_step import CriticBatch, critic_advantages, make_critic_step
from r1jax.grpo import init_train_state
from r1jax.objectives.objective import Objective, make_objective, ppo
from r1jax.policy_step import GRPOBatch
from r1jax.settings.objective import GRPO, PPO

ROWS = [[5, 6], [2, 3, 4], [6], [4]]  # of `packing`


def value_fn(params: Any, inputs: Any) -> jax.Array:
    """A value for the token before; NaN at the first one of a sequence, where none is trained."""
    tokens, starts = inputs
    values = jnp.pad(params["table"][tokens[:, :-1]], ((0, 0), (1, 0)))
    return jnp.where(starts > 0, jnp.nan, values)


def params(seed: int = 5) -> dict[str, jax.Array]:
    return {"table": jnp.asarray(np.random.default_rng(seed).normal(size=VOCAB), jnp.float32)}


def with_rewards(batch: GRPOBatch) -> GRPOBatch:
    """Rewards of tokens in place of advantages, and the segments of packed rows."""
    tokens, starts = batch.inputs
    ids = None
    if batch.lengths is not None:
        ids = jnp.cumsum(starts > 0, axis=1, dtype=jnp.int32)
    return replace(batch, advantages=jnp.sin(3.0 * tokens), segment_ids=ids)


def trained(
    objective: Objective, batch: GRPOBatch, micro_batches: int = 1, used: int | None = None
) -> Any:
    """Advantages, the gradient (read off an SGD step with rate 1) and metrics."""
    assert objective.critic is not None
    optimizer, start = optax.sgd(1.0), params()
    step = make_critic_step(
        value_fn, optimizer, clip=objective.critic.value_clip, micro_batches=micro_batches
    )

    def run(state: Any, batch: GRPOBatch) -> Any:
        before = value_fn(params(6), batch.inputs)
        (batch,), (learnt,) = critic_advantages(objective, [batch], [before])
        if used is not None:
            learnt = learnt._replace(used_micro_batches=jnp.int32(used))
        return batch.advantages, learnt, step(state, learnt)

    advantages, learnt, (state, metrics) = jax.jit(run, compiler_options=QUICK)(
        init_train_state(start, optimizer), batch
    )
    return advantages, learnt, start["table"] - state.params["table"], metrics


OBJECTIVE = PPO(kl_coefficient=0.2, gae_lambda=0.9, discount=0.95, value_clip=0.4)


def test_packed_rows_and_micro_batches_change_nothing() -> None:
    objective = make_objective(OBJECTIVE)
    unpacked, packed = map(with_rewards, packing())
    expected = trained(objective, unpacked)
    for micro_batches in (1, 2, 4):
        got = trained(objective, packed, micro_batches)
        n = 0
        for row, lengths in enumerate(ROWS):
            start = 0
            for length in lengths:
                part = got[0][row, start : start + length]
                np.testing.assert_allclose(part, expected[0][n, :length], atol=2e-6)
                start, n = start + length, n + 1
        np.testing.assert_allclose(got[2], expected[2], atol=2e-6)
        for name, value in expected[3].items():
            np.testing.assert_allclose(got[3][name], value, rtol=1e-4, err_msg=name)
    assert np.abs(expected[2]).max() > 1e-3
    assert 0 < expected[3]["critic/clip_fraction"] < 1 and expected[3]["critic/finite"] == 1


def test_against_the_formula_in_float64() -> None:
    batch = with_rewards(packing().unpacked)
    advantages, learnt, gradient, metrics = trained(make_objective(OBJECTIVE), batch)
    tokens = np.asarray(batch.inputs[0])
    mask = np.asarray(batch.mask) > 0
    old, new = (np.asarray(params(seed)["table"], np.float64) for seed in (6, 5))
    kl = np.asarray(batch.old_log_probs) - np.asarray(batch.reference_log_probs)  # k1
    rewards = np.sin(3.0 * tokens) - 0.2 * kl
    expected, returns = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for row in range(len(tokens)):
        after = advantage = 0.0
        for t in np.flatnonzero(mask[row])[::-1]:
            value = old[tokens[row, t - 1]]
            advantage = rewards[row, t] + 0.95 * after - value + 0.95 * 0.9 * advantage
            expected[row, t], returns[row, t], after = advantage, advantage + value, value
    of_all = expected[mask]
    whitened = np.where(mask, (expected - of_all.mean()) / of_all.std(), 0)
    np.testing.assert_allclose(advantages, whitened, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(learnt.returns, returns, rtol=1e-5, atol=1e-6)

    before = np.roll(tokens, 1, axis=1)[mask]

    def loss(table: np.ndarray) -> float:
        near = old[before] + np.clip(table[before] - old[before], -0.4, 0.4)
        squares = [(each - returns[mask]) ** 2 for each in (table[before], near)]
        return float(np.maximum(*squares).mean() / 2)

    np.testing.assert_allclose(metrics["critic/loss"], loss(new), rtol=1e-5)
    steps = 1e-6 * np.eye(VOCAB)
    differences = [(loss(new + step) - loss(new - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(gradient, differences, atol=1e-5)
    np.testing.assert_allclose(metrics["critic/value_mean"], old[before].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["critic/return_mean"], returns[mask].mean(), rtol=1e-5)
    explained = 1 - np.var(returns[mask] - old[before]) / np.var(returns[mask])
    np.testing.assert_allclose(metrics["critic/explained_variance"], explained, rtol=1e-4)


def test_a_critic_learns_the_returns_it_is_given() -> None:
    batch = with_rewards(packing().unpacked)
    _, learnt, _, _ = trained(ppo(PPO(whiten=False)), batch)
    optimizer = optax.adam(0.1)
    step = jax.jit(make_critic_step(value_fn, optimizer), compiler_options=QUICK)
    state = init_train_state(params(), optimizer)
    losses = []
    for _ in range(100):
        state, metrics = step(state, learnt)
        losses.append(float(metrics["critic/loss"]))
    assert losses[-1] < losses[0] / 2 and losses[-1] < 1.001 * min(losses)


def test_what_is_not_used_costs_nothing_and_what_does_not_fit_is_refused() -> None:
    objective = ppo()
    packed = with_rewards(packing().packed)
    # Row n is in micro-batch n % 4: of two, the rows 0 and 1 count.
    two = replace(packed, mask=packed.mask * (jnp.arange(4) < 2)[:, None])
    got, expected = trained(objective, two, 4, used=2), trained(objective, two)
    np.testing.assert_allclose(got[2], expected[2], atol=2e-6)
    values = jnp.zeros(packed.mask.shape)
    with pytest.raises(ValueError, match="objective grpo has no critic"):
        critic_advantages(make_objective(GRPO()), [packed], [values])
    with pytest.raises(ValueError, match=r"rewards has shape|values has shape"):
        critic_advantages(objective, [replace(packed, advantages=jnp.zeros(4))], [values])
    with pytest.raises(ValueError, match="needs old_log_probs and reference_log_probs"):
        lacking = replace(packed, old_log_probs=None)
        critic_advantages(make_objective(OBJECTIVE), [lacking], [values])
    step = make_critic_step(
        lambda params, inputs: params["table"][inputs[0]][:, 1:], optax.sgd(1.0)
    )
    learnt = CriticBatch(packed.inputs, packed.mask, values, values)
    with pytest.raises(ValueError, match=r"values returned by value_fn has shape \(4, 11\)"):
        step(init_train_state(params(), optax.sgd(1.0)), learnt)
