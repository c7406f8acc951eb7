"""The step of any objective: packed rows and micro-batches change nothing, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_grpo import QUICK, VOCAB, packing, table, table_log_probs

from r1jax.grpo import init_train_state
from r1jax.objectives.objective import NAMED, Objective, Penalty, grpo, make_objective
from r1jax.objectives.policy_loss import Surrogate
from r1jax.policy_step import GRPOBatch, PolicyOutputs, batch_advantages, make_policy_step
from r1jax.settings.objective import (
    CISPO,
    DAPO,
    GMPO,
    GRPO,
    GSPO,
    PPO,
    RLOO,
    SAPO,
    DrGRPO,
    ReinforcePlusPlus,
)

KINDS = {
    "grpo": GRPO(kl_coefficient=0.1, clip_high=0.1),
    "dr_grpo": DrGRPO(constant_length=9),
    "dapo": DAPO(dual_clip=3.0),
    "gspo": GSPO(clip_low=0.1, clip_high=0.1, importance_level="sequence"),
    "gspo token": GSPO(form="token", clip_low=0.1, clip_high=0.1),
    "cispo": CISPO(clip_high=0.2),
    "sapo": SAPO(kl_coefficient=0.1, kl_estimator="k2", kl_weighted=True),
    "gmpo": GMPO(clip_low=0.2, clip_high=0.2),
    "rloo": RLOO(kl_coefficient=0.3),
    "reinforce_plus_plus": ReinforcePlusPlus(kl_coefficient=0.3),
    "with baseline": ReinforcePlusPlus(baseline=True),
    "ppo": PPO(entropy_coefficient=0.2, importance_correction="masked", importance_floor=0.5),
}


def log_prob_fn(params: Any, batch: GRPOBatch) -> PolicyOutputs:
    """A bigram's log-probs and entropies; the first token of a sequence has none."""
    tokens, starts = batch.inputs
    assert batch.lengths is None and batch.sequences is None  # of the whole batch, not of a part
    chosen = table_log_probs(params, replace(batch, inputs=tokens))
    logits = jax.nn.log_softmax(params["table"][tokens[:, :-1]])
    entropy = jnp.pad(-jnp.sum(jnp.exp(logits) * logits, axis=-1), ((0, 0), (1, 0)))
    return PolicyOutputs(jnp.where(starts > 0, 0.0, chosen), jnp.where(starts > 0, 0.0, entropy))


def with_segments(batch: GRPOBatch) -> GRPOBatch:
    return replace(batch, segment_ids=jnp.cumsum(batch.inputs[1] > 0, axis=1, dtype=jnp.int32))


def update(objective: Objective, batch: GRPOBatch, micro_batches: int = 1) -> Any:
    """The gradient, read off an SGD step with rate 1, and the metrics."""
    optimizer, params = optax.sgd(1.0), table()
    step = make_policy_step(log_prob_fn, optimizer, objective, micro_batches=micro_batches)

    def run(state: Any, batch: GRPOBatch) -> Any:
        (batch,) = batch_advantages(objective, [batch])
        return step(state, batch)

    state, metrics = jax.jit(run, compiler_options=QUICK)(
        init_train_state(params, optimizer), batch
    )
    return params["table"] - state.params["table"], metrics


def test_every_kind_is_here() -> None:
    assert {settings.kind for settings in KINDS.values()} == set(NAMED)


@pytest.mark.parametrize("name", KINDS)
def test_packed_rows_and_micro_batches_train_like_rows_of_one_sequence(name: str) -> None:
    objective = make_objective(KINDS[name])
    unpacked, packed = packing()
    expected, expected_metrics = update(objective, unpacked)
    assert np.abs(expected).max() > 1e-3
    for micro_batches in (1, 2, 4):
        got, metrics = update(objective, with_segments(packed), micro_batches)
        np.testing.assert_allclose(got, expected, atol=2e-6)
        assert metrics.keys() == expected_metrics.keys()
        for metric, value in expected_metrics.items():
            np.testing.assert_allclose(metrics[metric], value, rtol=1e-4, err_msg=metric)


@pytest.mark.parametrize("name", ["gspo", "gmpo", "rloo"])
def test_packed_rows_without_segment_ids_are_refused(name: str) -> None:
    packed = packing().packed
    with pytest.raises(ValueError, match="needs segment_ids in the batch: rows hold several seq"):
        update(make_objective(KINDS[name]), packed)
    wrong = replace(packed, segment_ids=jnp.zeros((4, 1), jnp.int32))
    with pytest.raises(ValueError, match=r"segment_ids has shape \(4, 1\)"):
        update(make_objective(KINDS[name]), wrong)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("grpo", "reference_log_probs"),
        ("grpo", "sampler_log_probs"),
        ("rloo", "old_log_probs"),
        ("reinforce_plus_plus", "reference_log_probs"),
    ],
)
def test_a_batch_that_lacks_what_an_objective_needs_is_refused_by_name(
    name: str, field: str
) -> None:
    objective = make_objective(KINDS[name])
    batch = replace(packing().unpacked, **{field: None})
    with pytest.raises(ValueError, match=f"objective {objective.name} needs {field} in the batch"):
        update(objective, batch)


def test_a_bonus_without_entropy_is_refused() -> None:
    step = make_policy_step(
        lambda params, batch: log_prob_fn(params, batch).log_probs,
        optax.sgd(1.0),
        make_objective(KINDS["ppo"]),
    )
    with pytest.raises(ValueError, match="entropy_coefficient = 0.2 needs entropy"):
        step(init_train_state(table(), optax.sgd(1.0)), packing().unpacked)


def test_the_bonus_has_the_gradient_of_the_entropy() -> None:
    batch = replace(packing().unpacked, advantages=jnp.zeros(8))
    objective = make_objective(DAPO(entropy_coefficient=0.5, importance_cap=None))
    got, metrics = update(objective, batch)

    def mean_entropy(params: Any) -> jax.Array:
        entropy = log_prob_fn(params, batch).entropy
        assert entropy is not None
        return jnp.sum(entropy * batch.mask) / batch.mask.sum()

    np.testing.assert_allclose(metrics["policy/entropy"], mean_entropy(table()), rtol=1e-6)
    np.testing.assert_allclose(got, -0.5 * jax.grad(mean_entropy)(table())["table"], atol=1e-6)
    assert np.abs(got).max() > 1e-2


def test_an_objective_of_ones_own() -> None:
    """The likelihood, and no advantage: the gradient of supervised learning."""

    def likelihood(ratio: Any, tokens: Any) -> Surrogate:
        return Surrogate(tokens.log_probs, jnp.zeros(tokens.log_probs.shape, bool))

    mine = Objective("mine", likelihood, normalisation="token_mean")
    batch = packing().unpacked
    got, metrics = update(mine, batch)

    def loss(params: Any) -> jax.Array:
        log_probs = log_prob_fn(params, batch).log_probs
        return -jnp.sum(log_probs * batch.mask) / batch.mask.sum()

    np.testing.assert_allclose(got, jax.grad(loss)(table())["table"], atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss(table()), rtol=1e-6)
    other, _ = update(replace(grpo(), penalty=Penalty(2.0), needs=()), batch)
    assert other.shape == (VOCAB, VOCAB)


def test_a_sequence_counts_once_in_its_share_of_clipped() -> None:
    packed = with_segments(packing().packed)
    _, metrics = update(make_objective(GSPO(importance_cap=None)), packed)  # a narrow clip
    assert 0 < metrics["policy/sequence_clip_fraction"] <= 1
    assert metrics["policy/sequence_clip_fraction"] != metrics["policy/clip_fraction"]
