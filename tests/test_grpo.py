"""Losses against hand-worked numbers, the gradient against finite differences, and reuse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from r1jax.grpo import GRPOBatch, make_grpo_step
from r1jax.objectives.advantages import group_advantages
from r1jax.objectives.kl import k3_divergence
from r1jax.objectives.normalisation import token_weights
from r1jax.objectives.policy_loss import token_terms
from r1jax.settings.objective import GRPOConfig
from r1jax.train_step import init_train_state, map_micro_batches

ON_POLICY = GRPOConfig(kl_coefficient=0.0, importance_cap=None)


def test_advantages_by_hand() -> None:
    rewards = jnp.asarray([[0.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    out = group_advantages(rewards)
    s = np.sqrt(0.5)  # population std of 0, 1, 1, 2
    np.testing.assert_allclose(out.values, [[-1 / s, 0, 0, 1 / s], [0, 0, 0, 0]], atol=1e-5)
    assert out.zero_variance.tolist() == [False, True]
    centred = group_advantages(rewards, scale="none")
    np.testing.assert_allclose(centred.values[0], [-1, 0, 0, 1], atol=1e-6)


def test_unscored_samples_take_no_part_in_the_group() -> None:
    out = group_advantages(jnp.asarray([[0.0, jnp.nan, 2.0], [jnp.nan, jnp.nan, jnp.nan]]))
    np.testing.assert_allclose(out.values, [[-1, 0, 1], [0, 0, 0]], atol=1e-5)
    assert out.zero_variance.tolist() == [False, True]


@pytest.mark.parametrize(
    ("normalisation", "length", "expected"),
    [
        ("sequence_mean", None, [[1 / 4, 1 / 4, 0], [1 / 2, 0, 0], [0, 0, 0]]),
        ("token_mean", None, [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0], [0, 0, 0]]),
        ("constant", 5, [[0.1, 0.1, 0], [0.1, 0, 0], [0, 0, 0]]),
    ],
)
def test_token_weights_by_hand(normalisation: Any, length: int | None, expected: Any) -> None:
    mask = jnp.asarray([[1, 1, 0], [1, 0, 0], [0, 0, 0]])  # the last sample is masked out
    out = token_weights(mask, normalisation, constant_length=length)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.5, 1.0, -1.3, 1.0),  # above 1 + high: clipped
        (0.5, 1.0, -0.5, 0.0),  # the minimum keeps the lower, unclipped term
        (0.5, -1.0, 0.8, 1.0),  # below 1 - low: clipped
        (1.5, -1.0, 1.5, 0.0),
        (9.0, -1.0, 3.0, 1.0),  # dual clip: at most 3 |A|
    ],
)
def test_clipped_objective_by_hand(
    ratio: float, advantage: float, expected: float, clipped: float
) -> None:
    config = GRPOConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0, kl_coefficient=0.0)
    old = jnp.asarray([[-1.0]])
    terms = token_terms(
        old + jnp.log(ratio), jnp.asarray([advantage]), config=config, old_log_probs=old
    )
    np.testing.assert_allclose(terms.loss, [[expected]], rtol=1e-5)
    assert terms.clipped.item() == clipped


def test_k3_and_importance_weights_by_hand() -> None:
    log_probs, reference = jnp.log(jnp.asarray([[0.5]])), jnp.log(jnp.asarray([[0.25]]))
    np.testing.assert_allclose(
        k3_divergence(log_probs, reference), 0.5 - np.log(0.5) - 1, rtol=1e-6
    )
    config = GRPOConfig(kl_coefficient=0.1, importance_cap=1.5)
    for sampler, weight in ((0.4, 1.25), (0.1, 1.5)):  # the second is truncated
        terms = token_terms(
            log_probs,
            jnp.asarray([2.0]),
            config=config,
            reference_log_probs=reference,
            sampler_log_probs=jnp.log(jnp.asarray([[sampler]])),
        )
        expected = -2 * weight + 0.1 * (0.5 - np.log(0.5) - 1)
        np.testing.assert_allclose(terms.loss, [[expected]], rtol=1e-5)
    with pytest.raises(ValueError, match="kl_coefficient = 0.1 needs reference_log_probs"):
        token_terms(log_probs, jnp.asarray([2.0]), config=config)


# A plain pytree model: a bigram table.
ROWS, TIME, VOCAB = 8, 6, 7


def table_log_probs(params: dict[str, jax.Array], batch: GRPOBatch) -> jax.Array:
    tokens = batch.inputs
    scores = jax.nn.log_softmax(params["table"][tokens[:, :-1]])
    chosen = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(chosen, ((0, 0), (1, 0)))


def make_batch(seed: int = 0) -> GRPOBatch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, TIME + 1, ROWS)
    mask = (np.arange(TIME) >= 2) & (np.arange(TIME) < lengths[:, None])
    mask[3] = False  # one truncated sample

    def near() -> jax.Array:
        return jnp.asarray(rng.normal(-2, 0.3, (ROWS, TIME)), jnp.float32)

    return GRPOBatch(
        inputs=jnp.asarray(rng.integers(0, VOCAB, (ROWS, TIME))),
        mask=jnp.asarray(mask, jnp.float32),
        advantages=jnp.asarray(rng.normal(size=ROWS), jnp.float32),
        old_log_probs=near(),
        reference_log_probs=near(),
        sampler_log_probs=near(),
    )


def table() -> dict[str, jax.Array]:
    return {"table": jnp.asarray(np.random.default_rng(5).normal(size=(VOCAB, VOCAB)), jnp.float32)}


def gradient(batch: GRPOBatch, config: GRPOConfig, micro_batches: int = 1) -> Any:
    """The gradient, read off an SGD step with rate 1."""
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_grpo_step(table_log_probs, optimizer, config, micro_batches=micro_batches))
    params = table()
    state, metrics = step(init_train_state(params, optimizer), batch)
    return jax.tree.map(lambda a, b: a - b, params, state.params), metrics


@pytest.mark.parametrize("normalisation", ["sequence_mean", "token_mean", "constant"])
def test_micro_batches_give_the_full_gradient(normalisation: Any) -> None:
    length = 9 if normalisation == "constant" else None
    config = GRPOConfig(normalisation=normalisation, constant_length=length)
    whole, metrics = gradient(make_batch(), config)
    parts, part_metrics = gradient(make_batch(), config, micro_batches=4)
    assert np.abs(whole["table"]).max() > 1e-3
    np.testing.assert_allclose(parts["table"], whole["table"], atol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-4, err_msg=name)


def test_gradient_matches_finite_differences() -> None:
    config = GRPOConfig(clip_low=0.5, clip_high=0.5, kl_coefficient=0.1)
    batch = make_batch()
    got, _ = gradient(batch, config)

    def loss(flat: np.ndarray) -> float:
        log_probs = table_log_probs({"table": jnp.asarray(flat.reshape(VOCAB, VOCAB))}, batch)
        terms = token_terms(
            log_probs,
            batch.advantages,
            config=config,
            old_log_probs=batch.old_log_probs,
            reference_log_probs=batch.reference_log_probs,
            sampler_log_probs=batch.sampler_log_probs,
        )
        return float(jnp.sum(terms.loss * token_weights(batch.mask, "sequence_mean")))

    with jax.enable_x64(True):
        start = np.asarray(table()["table"], np.float64).ravel()
        steps = 1e-5 * np.eye(VOCAB * VOCAB)[:20]
        numeric = [(loss(start + d) - loss(start - d)) / 2e-5 for d in steps]
    np.testing.assert_allclose(np.ravel(got["table"])[:20], numeric, atol=2e-4)
    assert np.abs(numeric).max() > 1e-2


def test_only_the_masked_in_tokens_are_trained_eos_included() -> None:
    # Prompt (1, 2), completion (3, EOS = 0): rows 2 and 3 of the table predict the two tokens.
    batch = GRPOBatch(
        inputs=jnp.asarray([[1, 2, 3, 0, 5]]),
        mask=jnp.asarray([[0, 0, 1, 1, 0]]),
        advantages=jnp.asarray([1.0]),
    )
    got, _ = gradient(batch, ON_POLICY)
    assert np.flatnonzero(np.abs(got["table"]).sum(1)).tolist() == [2, 3]
    probs = jax.nn.softmax(table()["table"][3])
    expected = 0.5 * (probs - jax.nn.one_hot(0, VOCAB))  # -A/|o| d log p(EOS | 3)
    np.testing.assert_allclose(got["table"][3], expected, atol=1e-6)


def test_values_outside_the_mask_do_not_matter() -> None:
    batch = make_batch()
    config = GRPOConfig()
    junk = jnp.where(batch.mask > 0, batch.old_log_probs, jnp.nan)
    got, _ = gradient(batch.replace(old_log_probs=junk), config)
    whole, _ = gradient(batch, config)
    np.testing.assert_array_equal(got["table"], whole["table"])


def test_a_non_finite_step_changes_nothing_but_the_counter() -> None:
    optimizer = optax.adam(0.1)
    step = jax.jit(make_grpo_step(table_log_probs, optimizer, ON_POLICY))
    state = init_train_state(table(), optimizer)
    batch = make_batch()
    bad = batch.replace(advantages=batch.advantages.at[0].set(jnp.inf))
    after, metrics = step(state, bad)
    assert metrics["optimizer/finite"] == 0
    assert after.step == 1
    for a, b in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_micro_batches_are_dealt_in_turn_and_come_back_in_order() -> None:
    rows = {"a": jnp.arange(6.0), "b": jnp.arange(12.0).reshape(6, 2)}

    def function(part: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return part["a"][:, None] + part["b"], jnp.broadcast_to(part["a"].sum(), part["a"].shape)

    sums, together = map_micro_batches(function, rows, 2)
    np.testing.assert_array_equal(sums, rows["a"][:, None] + rows["b"])
    # Rows 0, 2, 4 went together, and 1, 3, 5.
    np.testing.assert_array_equal(together, [6, 9, 6, 9, 6, 9])
    sums, together = map_micro_batches(function, rows, 1)
    np.testing.assert_array_equal(sums, rows["a"][:, None] + rows["b"])
    np.testing.assert_array_equal(together, [15] * 6)
    with pytest.raises(ValueError, match="6 rows does not split into 4"):
        map_micro_batches(function, rows, 4)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="dual_clip = 1"):
        GRPOConfig(dual_clip=1.0)
    with pytest.raises(ValueError, match="constant_length"):
        GRPOConfig(normalisation="constant")
    with pytest.raises(ValueError, match="8 rows does not split into 3"):
        gradient(make_batch(), ON_POLICY, micro_batches=3)


def learn(params: Any, log_prob_fn: Any, sample: Any) -> Any:
    """Reward: how often token 3 is said. The whole of a user's train loop."""
    optimizer = optax.adam(0.1)
    step = jax.jit(make_grpo_step(log_prob_fn, optimizer, ON_POLICY), donate_argnums=0)
    state = init_train_state(params, optimizer)
    for i in range(80):
        tokens = sample(state.params, jax.random.key(i))
        rewards = (tokens[:, 1:] == 3).mean(axis=1).reshape(2, -1)
        mask = jnp.ones(tokens.shape).at[:, 0].set(0)
        batch = GRPOBatch(tokens, mask, group_advantages(rewards).values.ravel())
        state, _ = step(state, batch)
    return state.params, float(rewards.mean())


def test_a_plain_pytree_model_learns() -> None:
    @jax.jit  # a scan outside of jit would be compiled at every call
    def sample(params: Any, key: jax.Array) -> jax.Array:
        def next_token(token: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            new = jax.random.categorical(key, params["table"][token])
            return new, new

        first = jnp.zeros(16, jnp.int32)
        _, rest = jax.lax.scan(next_token, first, jax.random.split(key, TIME - 1))
        return jnp.concatenate([first[:, None], rest.T], axis=1)

    _, reward = learn(table(), table_log_probs, sample)
    assert reward > 0.8


def test_a_flax_nnx_module_learns() -> None:
    class Bigram(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed = nnx.Embed(VOCAB, 8, rngs=rngs)
            self.head = nnx.Linear(8, VOCAB, rngs=rngs)

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return self.head(self.embed(tokens))

    graph, params = nnx.split(Bigram(nnx.Rngs(0)))

    def log_prob_fn(params: Any, batch: GRPOBatch) -> jax.Array:
        tokens = batch.inputs
        scores = jax.nn.log_softmax(nnx.merge(graph, params)(tokens[:, :-1]))
        chosen = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.pad(chosen, ((0, 0), (1, 0)))

    def sample(params: Any, key: jax.Array) -> jax.Array:
        model, tokens = nnx.merge(graph, params), [jnp.zeros(16, jnp.int32)]
        for part in jax.random.split(key, TIME - 1):
            tokens.append(jax.random.categorical(part, model(tokens[-1])))
        return jnp.stack(tokens, axis=1)

    _, reward = learn(params, log_prob_fn, sample)
    assert reward > 0.8
