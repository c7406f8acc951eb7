"""Scores that do not depend on where a text lies, and updates on pairs."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.models import Decoder, Execution, ModelConfig, declare
from r1jax.models.parameters import Params, is_spec
from r1jax.models.reward_head import reward_scores
from r1jax.objectives.normalisation import row_weights
from r1jax.objectives.preference_loss import pairwise_loss
from r1jax.sharding import single_device
from r1jax.train_step import accumulate_gradients

CONFIG = ModelConfig(
    architecture="qwen2",
    vocab_size=41,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
    head="scalar",
)
MODEL = Decoder(CONFIG, Execution(compute_dtype=jnp.float32, remat="none"), single_device())
# Each program runs once: spend no time on LLVM's optimisations.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)
score = jit(reward_scores, static_argnames="model")


def random_params() -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda spec: (
            jnp.asarray(0.3 * rng.standard_normal(spec.shape, np.float32))
            + (1 if spec.init == "ones" else 0)
        ),
        declare(CONFIG),
        is_leaf=is_spec,
    )


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 41, shape, np.int32)


def test_a_text_has_one_score_wherever_it_lies() -> None:
    words, other = random_tokens(7), random_tokens(5, seed=1)
    time = 14
    tokens = random_tokens(4, time, seed=2)  # padding holds real token ids, not zeros
    positions, segments = np.zeros((2, 4, time), np.int32)
    # (row, start, segment, text): right- and left-padded, packed before and behind another.
    mine = [(0, 0, 1), (1, time - 7, 1), (2, 0, 1), (3, 6, 2)]
    for row, start, segment, text in [
        *((*place, words) for place in mine),
        (2, 8, 2, other),
        (3, 0, 1, other),
    ]:
        span = slice(start, start + len(text))
        tokens[row, span], segments[row, span] = text, segment
        positions[row, span] = np.arange(len(text))
    rows = (tokens, positions, segments)
    params = random_params()

    alone = np.asarray([6, 13, 6, 12], np.int32)
    found = score(params, *rows, alone, model=MODEL)
    assert found.dtype == jnp.float32 and abs(found[0]) > 0.1
    np.testing.assert_allclose(found, np.broadcast_to(found[0], 4), atol=1e-5)

    # Several ends a row; where there is no second text, any place does.
    packed = np.asarray([[6, 0], [13, 0], [6, 12], [4, 12]], np.int32)
    both = score(params, *rows, packed, model=MODEL)
    np.testing.assert_allclose([both[2, 0], both[3, 1]], found[2:], atol=1e-5)
    np.testing.assert_allclose(both[2, 1], both[3, 0], atol=1e-5)
    assert abs(both[2, 1] - both[2, 0]) > 0.1

    # Pairs of rows.
    paired = score(
        params, *(leaf.reshape(2, 2, time) for leaf in rows), alone.reshape(2, 2), model=MODEL
    )
    np.testing.assert_allclose(paired, np.reshape(found, (2, 2)), atol=1e-5)


def test_what_cannot_be_scored_is_refused() -> None:
    rows = (random_tokens(2, 5),) * 3
    params = random_params()
    with pytest.raises(ValueError, match=r"ends has shape \(3,\) for tokens \(2, 5\)"):
        reward_scores(params, *rows, np.zeros(3, np.int32), MODEL)
    policy = replace(MODEL, config=replace(CONFIG, head="language"))
    with pytest.raises(ValueError, match="head = 'language' gives no rewards"):
        reward_scores(params, *rows, np.zeros(2, np.int32), policy)


def test_scores_of_half_precision_activations_are_not_rounded_to_half_precision() -> None:
    model = replace(MODEL, execution=replace(MODEL.execution, compute_dtype=jnp.bfloat16))
    tokens = random_tokens(8, 6)
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), tokens.shape)
    rows = (tokens, positions, np.ones_like(tokens))
    found = score(random_params(), *rows, np.full(8, 5, np.int32), model=model)
    assert np.any(found != found.astype(jnp.bfloat16).astype(jnp.float32))


# The update


def pairs_of_rows() -> dict[str, np.ndarray]:
    tokens = random_tokens(8, 2, 9)
    lengths = np.random.default_rng(4).integers(3, 10, (8, 2)).astype(np.int32)
    steps = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
    segments = (steps < lengths[..., None]).astype(np.int32)
    return {
        "tokens": tokens,
        "positions": steps * segments,
        "segment_ids": segments,
        "ends": lengths - 1,
    }


def loss_of_pairs(params: Params, part: Any) -> Any:
    batch, weights = part
    scores = reward_scores(params, **batch, model=MODEL)
    return pairwise_loss(scores[:, 0], scores[:, 1], weights)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    # Unequal parts: a mean of means would weigh the pairs of the fuller part less.
    part = (pairs_of_rows(), row_weights(jnp.asarray([1, 0, 1, 0, 1, 0, 1, 1])))
    run = jit(accumulate_gradients, static_argnums=(0, 3))
    loss, gradients, metrics = run(loss_of_pairs, random_params(), part, 1)
    parts_loss, parts_gradients, parts_metrics = run(loss_of_pairs, random_params(), part, 2)
    np.testing.assert_allclose(parts_loss, loss, rtol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(parts_metrics[name].sum(), metrics[name].sum(), rtol=1e-5)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(parts_gradients), jax.tree.leaves(gradients), strict=True
    ):
        assert np.abs(b).max() > 1e-4, jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_a_reward_model_learns_its_pairs() -> None:
    optimizer = optax.adam(1e-2)
    params = random_params()
    part = (pairs_of_rows(), row_weights(jnp.ones(8)))

    @jit
    def step(params: Params, state: Any) -> Any:
        gradients, metrics = jax.grad(loss_of_pairs, has_aux=True)(params, part)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, metrics

    state = optimizer.init(params)
    for _ in range(20):
        params, state, metrics = step(params, state)
    assert metrics["accuracy"] == 1 and metrics["margin"] > 1
