"""Packed updates: nothing lost, nothing mixed, and the update is that of a sample a row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import jit, random_params

from r1jax.data.prompts import Prompt
from r1jax.grpo import GRPOBatch, PolicyOutputs, init_train_state, make_grpo_step
from r1jax.models import (
    Decoder,
    Execution,
    LatentAttention,
    MixtureOfExperts,
    ModelConfig,
    TokenRows,
    token_log_probs,
)
from r1jax.models.balance import imbalance_of, loads_of, make_after_update
from r1jax.models.parameters import Params
from r1jax.objectives.objective import make_objective
from r1jax.policy_step import make_policy_step
from r1jax.rollouts.sampling import Completion
from r1jax.sampler import Finish
from r1jax.settings.objective import GSPO, GRPOConfig
from r1jax.settings.optimizer import BalanceSection, OptimizerSection
from r1jax.settings.stage import LengthChange
from r1jax.sharding import single_device
from r1jax.stages.grpo import rows as packing
from r1jax.stages.grpo.groups import Group, Question
from r1jax.stages.grpo.log_probs import log_prob_rows, make_log_probs
from r1jax.stages.grpo.policy_update import make_update
from r1jax.stages.grpo.rows import (
    PackedShape,
    TrainingSample,
    expected_micro_batches,
    filling_order,
    pack_samples,
    pack_updates,
    packed_shape,
    split_evenly,
    training_samples,
)
from r1jax.stages.grpo.settings import GRPOStage

DENSE = ModelConfig("qwen2", 20, 16, 32, 2, 2, 1, 8, tie_word_embeddings=True)
EXPERTS = ModelConfig(
    "deepseek_v3",
    *(20, 16, 32, 2, 2, 2, 8),
    latent=LatentAttention(None, 8, 4, 4, 6),
    experts=MixtureOfExperts(6, 1, 2, 8, first_k_dense_replace=1),
)
EXECUTION = Execution(compute_dtype=jnp.float32, remat="none", scan_layers=False, log_prob_chunk=5)


def stage(**changes: Any) -> GRPOStage:
    settings = {"data": "x", "steps": 2, "questions_per_step": 4, "outputs_per_question": 6}
    settings |= {"length_bucket": 4, "max_new_tokens": 24} | changes
    return GRPOStage(name="rl", optimizer=OptimizerSection(learning_rate=1e-2), **settings)


def sample(prompt: Sequence[int], new: Sequence[int], finish: Finish = Finish.EOS) -> Completion:
    question = Prompt(
        id=1,
        text="?",
        prefill="",
        token_ids=np.asarray(prompt, np.int32),
        question="?",
        answer="1",
        domain="",
    )
    log_probs = -np.asarray(new, np.float32) / 8 - 1
    return Completion(question, 0, np.asarray(new, np.int32), log_probs, finish, "x")


def groups(
    completions: Sequence[Completion], rewards: Sequence[float | None], size: int
) -> list[Group]:
    """None: the sample is not scored."""
    values = np.asarray([np.nan if each is None else each for each in rewards], np.float32)
    return [
        Group(Question("x", i), completions[i : i + size], values[i : i + size])
        for i in range(0, len(completions), size)
    ]


def phase(rl: GRPOStage, with_experts: bool = False) -> list[TrainingSample]:
    """24 samples, a long tail of lengths, four of them truncated and three unscored."""
    rng = np.random.default_rng(0)
    completions = []
    for i in range(24):
        prompt, new = rng.integers(1, 7), min(1 + int(rng.exponential(6)), 24)
        finish = Finish.LENGTH if i % 6 == 0 else Finish.EOS
        each = sample(rng.integers(0, 20, prompt), rng.integers(0, 20, new), finish)
        if with_experts:  # of one layer, two of six
            chosen = np.argsort(rng.random((prompt + new, 6)))[:, :2].astype(np.uint8)
            each = replace(each, experts=chosen)
        completions.append(each)
    rewards = [None if i % 8 == 7 else float(i % 3) for i in range(24)]
    return training_samples(rl, groups(completions, rewards, 6), rng.standard_normal((4, 6)))


def single_rows(samples: Sequence[TrainingSample], time: int) -> GRPOBatch:
    """By hand: a sample to a row, padded with a token that samples have too."""
    shape = len(samples), time
    arrays = {name: np.zeros(shape, np.float32) for name in ("mask", "sampler_log_probs")}
    inputs = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids")}
    inputs["tokens"][:] = 7
    if samples[0].completion.experts is not None:
        inputs["experts"] = np.zeros((*shape, 2), np.uint8)
    for r, each in enumerate(samples):
        prompt, new = each.completion.prompt.token_ids, each.completion.token_ids
        n, end = len(prompt), len(prompt) + len(new)
        inputs["tokens"][r, :end] = [*prompt, *new]
        inputs["positions"][r, :end], inputs["segment_ids"][r, :end] = np.arange(end), 1
        arrays["sampler_log_probs"][r, n:end] = each.completion.sampler_log_probs
        arrays["mask"][r, n:end] = each.trained
        if "experts" in inputs:
            inputs["experts"][r, :end] = each.completion.experts
    advantages = np.asarray([each.advantage for each in samples], np.float32)
    return GRPOBatch(inputs=inputs, advantages=advantages, **arrays)


def test_rows_by_hand() -> None:
    rl = stage(questions_per_step=1, outputs_per_question=3)
    completions = [
        sample([8, 9], [4, 5, 1]),
        sample([8, 9], [4, 4], Finish.LENGTH),
        sample([8, 9], [6]),  # nobody knows whether it is right
    ]
    of_question, advantages = (
        groups(completions, [1.0, 0.0, None], 3),
        np.asarray([[0.5, -0.5, 0.0]]),
    )
    shape = PackedShape(samples=3, rows=1, micro_batches=3, time=8)
    for keep in (True, False):
        samples = training_samples(rl, of_question, advantages)
        packed = pack_updates([samples], shape, single_device(), keep_untrained=keep)
        (batch,) = packed.batches
        last = [8, 9, 6] if keep else [0, 0, 0]
        assert batch.inputs["tokens"].tolist() == [
            [8, 9, 4, 5, 1, *last],
            [8, 9, 4, 4, 0, 0, 0, 0],
            [0] * 8,
        ]
        ids = [2, 2, 2] if keep else [0, 0, 0]
        assert batch.inputs["segment_ids"].tolist()[0] == [1, 1, 1, 1, 1, *ids]
        positions = batch.inputs["positions"].tolist()
        assert positions[0] == [0, 1, 2, 3, 4, *([0, 1, 2] if keep else [0, 0, 0])]
        assert batch.mask.tolist() == [[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0], [0] * 8]
        assert batch.lengths is not None and batch.sampler_log_probs is not None
        assert batch.lengths[0].tolist() == [0, 0, 3, 3, 3, 0, 0, 0]
        assert batch.advantages[0].tolist() == [0, 0, 0.5, 0.5, 0.5, 0, 0, 0]
        expected = [0, 0, -1.5, -1.625, -1.125]
        assert batch.sampler_log_probs[0].tolist()[:5] == expected
        assert (batch.sequences, batch.samples, batch.used_micro_batches) == (2, 2 + keep, 2)
        assert packed.rows_filled == (12 if keep else 9) / 16
    masked = training_samples(replaced(rl, mask_truncated=True), of_question, advantages)
    assert [each.trained for each in masked] == [True, False, False]
    nothing = pack_updates([masked[1:]], shape, single_device())
    assert nothing.batches[0].used_micro_batches == 1 and nothing.rows_filled == 0
    with pytest.raises(ValueError, match="a sample of 5 tokens does not fit into rows of 4"):
        pack_samples(samples, 4)


def replaced(rl: GRPOStage, **changes: Any) -> GRPOStage:
    return rl.model_copy(update=changes)


def long_tail(count: int, seed: int) -> list[TrainingSample]:
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / 64, count), 512)
    return [
        TrainingSample(sample(rng.integers(0, 512, 32), rng.integers(0, 512, n)), 0.0, True)
        for n in lengths
    ]


def layout_of(parts: int) -> Any:
    class Shards:
        platform = "cpu"

        def shards(self, axis: str) -> int:
            return parts

    return Shards()


@pytest.mark.parametrize("training, rollout", [(1, 1), (8, 8), (4, 16), (8, 2)])
def test_every_token_is_in_a_row_once_and_rows_are_filled(
    training: int, rollout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workload of the paper's kind: 4,096 samples, geometric lengths of mean 64."""
    monkeypatch.setattr(packing, "process_batch_parts", lambda layout: list(range(rollout)))
    rl = stage(questions_per_step=512, outputs_per_question=8, max_new_tokens=512, micro_batches=8)
    shape = packed_shape(rl, 32, layout_of(training), layout_of(rollout), step=0)
    assert shape.time == 544 and shape.rows % training == 0 == shape.all_rows % rollout
    assert shape.rows <= 4096 / 8 and shape.all_rows >= 4096
    samples = long_tail(4096, seed=training)
    packed = pack_updates([samples], shape, layout_of(rollout))
    (batch,), again = packed.batches, pack_updates([samples], shape, layout_of(rollout))
    assert packed.rows_filled >= 0.95
    jax.tree.map(np.testing.assert_array_equal, batch, again.batches[0])
    ids, tokens = batch.inputs["segment_ids"], batch.inputs["tokens"]
    found = [
        tuple(tokens[r, ids[r] == segment].tolist())
        for r in range(len(ids))
        for segment in range(1, ids[r].max() + 1)
    ]
    expected = [(*s.completion.prompt.token_ids, *s.completion.token_ids) for s in samples]
    assert sorted(found) == sorted(expected)
    # A micro-batch's devices have the same rows, nearly as many trained tokens, and none is missed.
    trained = batch.mask.sum(1).reshape(training, -1, shape.micro_batches).sum(1)
    used = int(batch.used_micro_batches)
    assert trained[:, used:].sum() == 0 and (trained[:, : used - 1] > 0).all()
    assert np.ptp(trained[:, : used - 1], axis=0).mean() <= 0.05 * 544 * shape.rows / training


def test_a_micro_batch_is_bounded_by_the_config_and_shapes_stay_as_limits_grow() -> None:
    changes = [LengthChange(step=0, tokens=100), LengthChange(step=2, tokens=4000)]
    rl = stage(questions_per_step=32, outputs_per_question=16, max_new_tokens=changes, steps=4)
    one = layout_of(2)
    shapes = [packed_shape(rl, 30, one, one, step=step) for step in (0, 2, None)]
    assert [shape.time for shape in shapes] == [132, 4032, 4032]
    assert {(shape.rows, shape.micro_batches) for shape in shapes} == {(4, 128)}
    for micro_batches, rows in ((64, 4), (128, 4), (256, 2)):
        bounded = replaced(rl, micro_batches=micro_batches)
        assert packed_shape(bounded, 30, one, one, step=None).rows == rows
    # Short rows come in larger micro-batches: 2,048 tokens a device.
    short = replaced(rl, max_new_tokens=34, micro_batches=2)
    assert packed_shape(short, 30, one, one, step=None).rows == 64


def test_rows_are_filled_micro_batch_by_micro_batch_in_every_device() -> None:
    shape = PackedShape(samples=8, rows=4, micro_batches=3, time=4)
    order, micro_batch = filling_order(shape, single_device())
    assert sorted(order.tolist()) == list(range(12))
    assert micro_batch.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    np.testing.assert_array_equal(order % 3, micro_batch)


@functools.cache
def decoder(config: ModelConfig) -> Decoder:
    return Decoder(config, EXECUTION, single_device())


@functools.cache
def reference_metrics(config: ModelConfig, loss: GRPOConfig, replay: bool, balance: float) -> Any:
    """A sample a row, no micro-batches, all log-probs: gradients as the change of the weights."""
    rl = stage(mask_truncated=True)
    samples, model = phase(rl, replay), decoder(config)

    def log_prob_fn(params: Any, batch: GRPOBatch) -> PolicyOutputs:
        values = token_log_probs(params, TokenRows(**batch.inputs), model, balance=balance > 0)
        penalty = balance * imbalance_of(values.routings) if balance else None
        return PolicyOutputs(values.log_probs, values.entropy, penalty, loads_of(values.routings))

    section = BalanceSection(bias_speed=0.1 if replay else 0.0, sequence_loss=balance)
    after = make_after_update(section, config)
    step = make_grpo_step(log_prob_fn, optax.sgd(1.0), loss, after_update=after)
    return run_update(step, single_rows(samples, 32), config, model)


@functools.cache
def row_log_probs(model: Decoder) -> Callable[[Params, Mapping[str, np.ndarray]], jax.Array]:
    """Traced once for all updates of a model."""
    return jit(lambda params, rows: token_log_probs(params, TokenRows(**rows), model).log_probs)


def run_update(step: Any, batch: GRPOBatch, config: ModelConfig, model: Decoder) -> Any:
    params = random_params(config)
    trained = batch.mask > 0
    log_probs = row_log_probs(model)
    old = log_probs(jax.tree.map(lambda x: 1.02 * x, params), batch.inputs)
    reference = log_probs(jax.tree.map(lambda x: 0.9 * x, params), batch.inputs)
    batch = replace(
        batch,
        old_log_probs=jnp.where(trained, old, jnp.nan),
        reference_log_probs=jnp.where(trained, reference, jnp.nan),
    )
    state, metrics = jit(step)(init_train_state(params, optax.sgd(1.0)), batch)
    return state.params, metrics


LOSSES = [
    GRPOConfig(kl_coefficient=0.1, importance_cap=2.0, clip_high=0.02, **changes)
    for changes in (
        {"normalisation": "sequence_mean"},
        {"normalisation": "token_mean"},
        {"normalisation": "constant", "constant_length": 24},
    )
]


@pytest.mark.parametrize(
    "loss, micro_batches, experts",
    [
        *((loss, 1, False) for loss in LOSSES),
        (LOSSES[0], 4, False),
        (LOSSES[1], 12, False),
        (LOSSES[0], 3, True),
        (LOSSES[2], 12, True),
    ],
)
def test_an_update_of_packed_rows_is_that_of_a_sample_a_row(
    loss: GRPOConfig, micro_batches: int, experts: bool
) -> None:
    config, model = (EXPERTS, decoder(EXPERTS)) if experts else (DENSE, decoder(DENSE))
    balance = BalanceSection(bias_speed=0.1, sequence_loss=0.2) if experts else BalanceSection()
    rl = stage(mask_truncated=True, loss=loss, balance=balance, replay_experts=experts)
    samples = phase(rl, experts)
    shape = PackedShape(24, 24 // micro_batches, micro_batches, 32)
    packed = pack_updates(
        [samples],
        shape,
        single_device(),
        keep_untrained=experts,
        experts=jax.ShapeDtypeStruct((2,), np.uint8) if experts else None,
    )
    (batch,) = packed.batches
    assert micro_batches == 1 or batch.used_micro_batches < micro_batches
    assert packed.rows_filled > 0.5 or micro_batches == 1
    update = make_update(rl, model, optax.sgd(1.0), micro_batches)
    params, metrics = run_update(update, batch, config, model)
    expected, figures = reference_metrics(config, loss, experts, balance.sequence_loss)
    assert metrics.keys() == figures.keys()
    for name, value in figures.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    start = random_params(config)
    for (path, a), b, c in zip(
        jax.tree.leaves_with_path(params), *map(jax.tree.leaves, (expected, start)), strict=True
    ):
        assert np.abs(b - c).max() > 1e-4 or "router" in jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_an_update_by_sequence_ratios_in_packed_rows_is_that_of_a_sample_a_row() -> None:
    settings = GSPO(clip_low=0.01, clip_high=0.01, kl_coefficient=0.1, entropy_coefficient=0.1)
    rl, model = stage(mask_truncated=True, objective=settings), decoder(DENSE)
    samples = phase(rl)

    def log_prob_fn(params: Any, batch: GRPOBatch) -> PolicyOutputs:
        wanted = batch.mask > 0
        values = token_log_probs(params, TokenRows(**batch.inputs), model, wanted=wanted)
        return PolicyOutputs(values.log_probs, values.entropy)

    single = make_policy_step(log_prob_fn, optax.sgd(1.0), make_objective(settings))
    expected, figures = run_update(single, single_rows(samples, 32), DENSE, model)
    (batch,) = pack_updates([samples], PackedShape(24, 6, 4, 32), single_device()).batches
    batch = replace(batch, segment_ids=batch.inputs["segment_ids"])
    assert batch.used_micro_batches is not None and 1 < batch.used_micro_batches < 4
    params, metrics = run_update(make_update(rl, model, optax.sgd(1.0), 4), batch, DENSE, model)
    for name, value in figures.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    assert 0 < metrics["policy/sequence_clip_fraction"] < 1
    for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


def test_log_probs_of_packed_rows_are_those_of_a_sample_a_row() -> None:
    rl, model, params = stage(mask_truncated=True), decoder(DENSE), random_params(DENSE)
    samples = phase(rl)
    single, found = single_rows(samples, 32), {}
    expected = row_log_probs(model)(params, single.inputs)
    by_sample = [
        tuple(np.asarray(x[mask > 0]).round(4))
        for x, mask in zip(expected, single.mask, strict=True)
    ]
    for micro_batches in (1, 6):
        shape = PackedShape(24, 24 // micro_batches, micro_batches, 32)
        (batch,) = pack_updates([samples], shape, single_device()).batches
        log_probs = jit(make_log_probs(rl, model, micro_batches))(params, log_prob_rows(batch))
        ids = np.where(batch.mask > 0, batch.inputs["segment_ids"], 0)
        found = [
            tuple(np.asarray(log_probs[r][ids[r] == segment]).round(4))
            for r in range(len(ids))
            for segment in set(ids[r].tolist()) - {0}
        ]
        wanted = sorted((each for each in by_sample if each), key=len)
        got = sorted(found, key=len)
        assert list(map(len, got)) == list(map(len, wanted))
        np.testing.assert_allclose(
            np.sort(np.concatenate(got)), np.sort(np.concatenate(wanted)), atol=2e-4
        )
        assert (np.asarray(log_probs)[ids == 0] == 0).all()


def test_samples_are_dealt_at_random_with_even_lengths() -> None:
    generator = np.random.default_rng(0)
    lengths = np.random.default_rng(1).geometric(1 / 50, 60)
    counts = np.zeros((4, 60))
    for _ in range(400):
        parts = split_evenly(lengths, 4, generator)
        assert sorted(np.concatenate(parts).tolist()) == list(range(60))
        assert {len(part) for part in parts} == {15}
        totals = [lengths[part].sum() for part in parts]
        # Neighbours differ by so much in all, from the longest to the shortest.
        assert max(totals) - min(totals) <= lengths.max() - lengths.min()
        for part, index in enumerate(parts):
            counts[part, index] += 1
    assert abs(counts / 400 - 1 / 4).max() < 0.1  # 4.6 standard deviations
    # What does not divide: no part has two more than another.
    sizes = [len(part) for part in split_evenly([5, 5, 5, 5, 5, 5, 5], 3, generator)]
    assert sorted(sizes) == [2, 2, 3]
    assert [part.tolist() for part in split_evenly([], 2, generator)] == [[], []]


def test_a_plan_counts_the_micro_batches_that_hold_something() -> None:
    shape = PackedShape(samples=16, rows=4, micro_batches=4, time=10)
    # Two samples of 5 fill a row: 8 of 16 rows, for one process or for two with 4 of 8 each.
    for slices in (1, 2):
        assert expected_micro_batches(shape, [5] * 16, slices) == 2
    assert expected_micro_batches(shape, [10] * 16, 2) == 4
    assert expected_micro_batches(shape, [6] * 4 + [2] * 12, 1) == 2  # 48 tokens in 5 rows
    # Dealt unevenly, the process with most decides.
    assert 2 < expected_micro_batches(shape, [10] * 8 + [1] * 8, 4) <= 4
    # Over the updates of a phase long samples are spread: each has 8 of 16.
    assert expected_micro_batches(shape, ([10] * 8 + [5] * 8) * 4, 1, updates=4) == 3
