"""The GRPO step: its gradient by finite differences, packed rows, what it refuses, and reuse."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from r1jax.grpo import (
    GRPOBatch,
    GRPOConfig,
    PolicyOutputs,
    group_advantages,
    init_train_state,
    make_grpo_step,
)
from r1jax.objectives.normalisation import token_weights
from r1jax.objectives.objective import PolicyTokens, grpo_of_config, token_terms

# Each program runs a few times: spend no time on LLVM's optimisations.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)

ON_POLICY = GRPOConfig(kl_coefficient=0.0, importance_cap=None)


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


def gradient(
    batch: GRPOBatch,
    config: GRPOConfig,
    micro_batches: int = 1,
    log_prob_fn: Any = table_log_probs,
) -> Any:
    """The gradient, read off an SGD step with rate 1."""
    optimizer = optax.sgd(1.0)
    step = jit(make_grpo_step(log_prob_fn, optimizer, config, micro_batches=micro_batches))
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
        tokens = PolicyTokens(
            log_probs,
            batch.advantages,
            batch.mask,
            batch.old_log_probs,
            batch.reference_log_probs,
            batch.sampler_log_probs,
        )
        terms = token_terms(grpo_of_config(config), tokens)
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
    step = jit(make_grpo_step(table_log_probs, optimizer, ON_POLICY))
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


# Packed rows


class Packing(NamedTuple):
    """The same sequences in rows of their own, and several to a row."""

    unpacked: GRPOBatch
    packed: GRPOBatch


def packing() -> Packing:
    """Seven sequences of 2 to 6 tokens in eight rows of six, and in four rows of twelve."""
    rng = np.random.default_rng(2)
    rows = [[5, 6], [2, 3, 4], [6], [4]]  # lengths of the sequences of each packed row
    leaves = ("tokens", "starts", "mask", "advantages", "old", "reference", "sampler", "lengths")
    single, packed = (
        {name: np.zeros(shape, np.float32) for name in leaves} for shape in ((8, 6), (4, 12))
    )
    trained_sequences, n = 0, 0
    for row, sequences in enumerate(rows):
        start = 0
        for length in sequences:
            mask = np.arange(length) >= min(2, length - 1)
            mask &= n != 3  # one sequence is left out
            values = {
                "tokens": rng.integers(0, VOCAB, length),
                "starts": np.arange(length) == 0,
                "mask": mask,
                "advantages": np.full(length, rng.normal()),
                "lengths": np.full(length, mask.sum()),
            }
            for name in ("old", "reference", "sampler"):
                values[name] = rng.normal(-2, 0.3, length)
            for name in leaves:
                single[name][n, :length] = values[name]
                packed[name][row, start : start + length] = values[name]
            trained_sequences += mask.any()
            start, n = start + length, n + 1

    def batch(leaf: dict[str, np.ndarray], **more: Any) -> GRPOBatch:
        return GRPOBatch(
            (jnp.asarray(leaf["tokens"], jnp.int32), jnp.asarray(leaf["starts"])),
            jnp.asarray(leaf["mask"]),
            old_log_probs=jnp.asarray(leaf["old"]),
            reference_log_probs=jnp.asarray(leaf["reference"]),
            sampler_log_probs=jnp.asarray(leaf["sampler"]),
            **more,
        )

    # Outside of the mask a packed row's advantages do not matter either.
    advantages = jnp.where(packed["mask"] > 0, packed["advantages"], jnp.nan)
    return Packing(
        batch(single, advantages=jnp.asarray(single["advantages"][:, 0])),
        batch(
            packed,
            advantages=advantages,
            lengths=jnp.asarray(packed["lengths"]),
            sequences=jnp.int32(trained_sequences),
        ),
    )


def segment_log_probs(params: dict[str, jax.Array], batch: GRPOBatch) -> jax.Array:
    tokens, starts = batch.inputs
    assert batch.lengths is None and batch.sequences is None  # of the whole batch, not of a part
    log_probs = table_log_probs(params, batch.replace(inputs=tokens))
    return jnp.where(starts > 0, 0.0, log_probs)


@pytest.mark.parametrize("normalisation", ["sequence_mean", "token_mean", "constant"])
def test_packed_rows_train_like_rows_of_one_sequence(normalisation: Any) -> None:
    length = 9 if normalisation == "constant" else None
    config = GRPOConfig(normalisation=normalisation, constant_length=length, clip_high=0.1)
    unpacked, packed = packing()
    expected, expected_metrics = gradient(unpacked, config, log_prob_fn=segment_log_probs)
    assert np.abs(expected["table"]).max() > 1e-3
    for micro_batches in (1, 4):
        got, metrics = gradient(packed, config, micro_batches, log_prob_fn=segment_log_probs)
        np.testing.assert_allclose(got["table"], expected["table"], atol=1e-6)
        for name, value in expected_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_half_of_what_packed_rows_need_is_refused() -> None:
    packed = packing().packed
    for left_out, message in (("lengths", "sequences without"), ("sequences", "lengths without")):
        with pytest.raises(ValueError, match=message):
            refuse(packed.replace(**{left_out: None}), segment_log_probs)


# What is refused, as the step is traced and outside of jit


SQUARE = 6  # as many rows as tokens: [6] would broadcast


def square_batch() -> GRPOBatch:
    tokens = jnp.zeros((SQUARE, SQUARE))
    return GRPOBatch(
        inputs=tokens.astype(jnp.int32),
        mask=tokens + 1,
        advantages=jnp.zeros(SQUARE),
        old_log_probs=tokens,
        reference_log_probs=tokens,
        sampler_log_probs=tokens,
        lengths=tokens + 6,
        sequences=jnp.int32(6),
    )


def refuse(batch: GRPOBatch, log_prob_fn: Any = table_log_probs, micro_batches: int = 1) -> None:
    """Takes a step outside of jit; raises only if a trace of it raises the same."""
    optimizer = optax.sgd(1.0)
    step = make_grpo_step(log_prob_fn, optimizer, micro_batches=micro_batches)
    state = init_train_state(table(), optimizer)
    with pytest.raises(ValueError) as traced:
        jax.jit(step).trace(state, batch)
    try:
        step(state, batch)
    except ValueError as error:
        assert str(error) == str(traced.value)
        raise


@pytest.mark.parametrize(
    "shape", [(SQUARE,), (SQUARE, 1), (1, SQUARE), (SQUARE, 5), (5, SQUARE), (), (6, 6, 1)], ids=str
)
@pytest.mark.parametrize(
    "name",
    ["mask", "old_log_probs", "reference_log_probs", "sampler_log_probs", "lengths", "advantages"],
)
def test_arrays_of_another_shape_are_refused_by_name(name: str, shape: tuple[int, ...]) -> None:
    batch = square_batch().replace(**{name: jnp.ones(shape)})
    if name == "advantages" and shape == (SQUARE,):
        return
    with pytest.raises(ValueError, match=f"^{name} has shape") as error:
        refuse(batch)
    assert str(shape) in str(error.value) and "(6, 6)" in str(error.value)


def test_a_mask_alone_of_another_shape_is_refused_by_name() -> None:
    alone = GRPOBatch(square_batch().inputs, jnp.ones((SQUARE, 1)), jnp.zeros(SQUARE))
    with pytest.raises(ValueError, match=r"^mask has shape \(6, 1\).*\(6, 6\).*log_prob_fn"):
        refuse(alone)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("shape", ["[N]", "[N, 1]", "[N, T - 1]", "[1, T]", "[N, T, 1]", "[]"])
def test_returned_log_probs_of_another_shape_are_refused(shape: str, micro_batches: int) -> None:
    changes = {
        "[N]": lambda x: x.sum(axis=1),
        "[N, 1]": lambda x: x[:, :1],
        "[N, T - 1]": lambda x: x[:, 1:],
        "[1, T]": lambda x: x[:1],
        "[N, T, 1]": lambda x: x[..., None],
        "[]": lambda x: x.sum(),
    }

    def log_prob_fn(params: Any, batch: GRPOBatch) -> jax.Array:
        return changes[shape](table_log_probs(params, batch))

    with pytest.raises(ValueError, match="^log_probs returned by log_prob_fn has shape") as e:
        refuse(square_batch(), log_prob_fn, micro_batches)
    assert f"({SQUARE // micro_batches}, 6), the shape of mask" in str(e.value)
    assert shape != "[N, T - 1]" or "jnp.pad" in str(e.value)


def test_other_things_that_log_prob_fn_returns_are_refused() -> None:
    def returning(change: Any) -> Any:
        return lambda params, batch: change(table_log_probs(params, batch))

    for message, change in (
        ("a tuple; return .* PolicyOutputs", lambda x: (x, x)),
        ("returned by log_prob_fn has dtype int32", lambda x: x.astype(jnp.int32)),
        (r"entropy returned by .* has shape \(6, 1\)", lambda x: PolicyOutputs(x, x[:, :1])),
        (r"penalty returned by .* has shape \(6, 1\)", lambda x: PolicyOutputs(x, x, x[:, :1])),
        (r"penalty returned by .* has shape \(\)", lambda x: PolicyOutputs(x, x, x.sum())),
    ):
        with pytest.raises(ValueError, match=message):
            refuse(square_batch(), returning(change))


def test_other_misfits_of_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sequences has shape \(6,\); expected a scalar"):
        refuse(square_batch().replace(sequences=jnp.zeros(6)))
    for name in ("old_log_probs", "reference_log_probs", "sampler_log_probs"):
        with pytest.raises(ValueError, match=f"{name} has dtype int32"):
            refuse(square_batch().replace(**{name: jnp.zeros((6, 6), jnp.int32)}))
    with pytest.raises(ValueError, match=r"inputs.* has shape \(3, 6\)"):
        refuse(square_batch().replace(inputs=jnp.zeros((3, 6), jnp.int32)), micro_batches=2)


def test_a_mask_may_be_boolean_or_whole_numbers() -> None:
    batch = make_batch()
    whole, _ = gradient(batch, GRPOConfig())
    for dtype in (bool, jnp.int32):
        got, _ = gradient(batch.replace(mask=batch.mask.astype(dtype)), GRPOConfig())
        np.testing.assert_array_equal(got["table"], whole["table"])


def test_what_log_prob_fn_returns_beside_log_probs() -> None:
    def log_prob_fn(params: dict[str, jax.Array], batch: GRPOBatch) -> PolicyOutputs:
        log_probs = table_log_probs(params, batch)
        entropy = jnp.where(batch.mask > 0, 2.0, jnp.nan)
        return PolicyOutputs(log_probs, entropy, batch.mask.sum(axis=1), batch.mask.sum(axis=1))

    def after_update(params: Any, counts: jax.Array) -> Any:
        return params, {"counted": counts.sum()}

    batch, optimizer = make_batch(), optax.sgd(1.0)
    state = init_train_state(table(), optimizer)
    for micro_batches in (1, 2):
        step = make_grpo_step(
            log_prob_fn,
            optimizer,
            ON_POLICY,
            micro_batches=micro_batches,
            after_update=after_update,
        )
        _, metrics = jit(step)(state, batch)
        tokens = float(batch.mask.sum())
        assert metrics["policy/entropy"] == 2.0
        assert metrics["counted"] == tokens
        assert metrics["penalty"] == tokens / ROWS
        _, plain = jit(make_grpo_step(table_log_probs, optimizer, ON_POLICY))(state, batch)
        np.testing.assert_allclose(metrics["loss"], plain["loss"] + tokens / ROWS, rtol=1e-6)


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
    step = jit(make_grpo_step(log_prob_fn, optimizer, ON_POLICY), donate_argnums=0)
    state = init_train_state(params, optimizer)
    for i in range(80):
        tokens = sample(state.params, jax.random.key(i))
        rewards = (tokens[:, 1:] == 3).mean(axis=1).reshape(2, -1)
        mask = jnp.ones(tokens.shape).at[:, 0].set(0)
        batch = GRPOBatch(tokens, mask, group_advantages(rewards).values.ravel())
        state, _ = step(state, batch)
    return state.params, float(rewards.mean())


def test_a_plain_pytree_model_learns() -> None:
    @jit  # a scan outside of jit would be compiled at every call
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
