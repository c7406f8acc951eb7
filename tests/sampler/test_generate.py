"""The sampler against a loop without a cache, exact probabilities, and its invariances."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.models import (
    Decoder,
    Execution,
    ModelConfig,
    TokenRows,
    forward,
    init_params,
    logits,
    token_log_probs,
)
from r1jax.sampler import (
    Finish,
    GenerateOptions,
    Prompts,
    Samples,
    Sampling,
    filter_logits,
    generate,
)
from r1jax.sampler.distribution import _inverse_cdf
from r1jax.sampler.generate import decode_until
from r1jax.sharding import single_device

VOCAB = 23
CONFIG = ModelConfig(
    "qwen3", VOCAB, 16, 32, 2, 4, 2, 8, tie_word_embeddings=True, initializer_range=0.5
)


def decoder(scan: bool = True) -> Decoder:
    execution = Execution(compute_dtype=jnp.float32, remat="none", scan_layers=scan)
    return Decoder(CONFIG, execution, single_device())


MODEL = decoder()
PARAMS = init_params(jax.random.key(3), CONFIG, MODEL.layout)


def prompts(lengths: list[int], time: int = 8, first_id: int = 0) -> Prompts:
    rng = np.random.default_rng(1)
    rows = rng.integers(0, VOCAB, (20, 32))[first_id : first_id + len(lengths), :time].copy()
    for row, n in zip(rows, lengths, strict=True):
        row[n:] = 0
    ids = np.arange(first_id, first_id + len(lengths), dtype=np.uint32)
    return Prompts(jnp.asarray(rows, jnp.int32), jnp.asarray(lengths, jnp.int32), jnp.asarray(ids))


@jax.jit
def all_logits(row: jax.Array, length: jax.Array) -> jax.Array:
    positions = jnp.arange(row.shape[1])[None]
    rows = TokenRows(row, positions, (positions < length).astype(jnp.int32))
    return logits(PARAMS, forward(PARAMS, rows, MODEL).hidden, MODEL)[0]


def next_logits(tokens: np.ndarray) -> np.ndarray:
    """The model on one row, from scratch; padded to one length, which compiles once."""
    row = np.zeros((1, 20), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(all_logits(jnp.asarray(row), len(tokens))[len(tokens) - 1])


def sample(p: Prompts, model: Decoder = MODEL, **options: Any) -> Samples:
    settings = GenerateOptions(**{"samples": 2, "max_new_tokens": 8, "seed": 0, **options})
    return jax.device_get(generate(PARAMS, p, model, settings))


@pytest.mark.parametrize("scan", [False, True])
def test_greedy_equals_a_loop_without_a_cache(scan: bool) -> None:
    p = prompts([5, 8, 3])
    out = sample(p, decoder(scan), sampling=Sampling(temperature=0.0), first_bucket=4, samples=1)
    for i in range(3):
        row = list(np.asarray(p.tokens[i, : p.lengths[i]]))
        for t in range(8):
            scores = next_logits(np.asarray(row))
            assert out.tokens[i, 0, t] == scores.argmax()
            log_prob = scores.max() - np.log(np.exp(scores - scores.max()).sum()) - scores.max()
            np.testing.assert_allclose(out.policy_log_probs[i, 0, t], log_prob, atol=1e-4)
            row.append(int(scores.argmax()))
    np.testing.assert_array_equal(out.sampling_log_probs, 0.0)  # greedy is a point mass
    assert (out.finish == Finish.LENGTH).all()


def test_frequencies_match_the_softmax() -> None:
    draws = 4000
    out = sample(prompts([6]), samples=draws, max_new_tokens=1)
    scores = next_logits(np.asarray(prompts([6]).tokens[0, :6]))
    expected = np.exp(scores - scores.max())
    expected = draws * expected / expected.sum()
    observed = np.bincount(out.tokens[0, :, 0], minlength=VOCAB)
    common = expected >= 5
    groups = np.append(observed[common], observed[~common].sum())
    means = np.append(expected[common], max(expected[~common].sum(), 1e-9))
    statistic = ((groups - means) ** 2 / means).sum()
    degrees = len(groups) - 1
    # Wilson-Hilferty: the 99.9 % point of chi-square.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3
    assert common.sum() > 3
    assert statistic < limit


def test_a_sample_is_the_same_in_any_batch_bucket_and_split() -> None:
    whole = sample(prompts([5, 8, 3, 7]), samples=3)
    alone = sample(prompts([8], first_id=1), samples=3)
    wider = sample(prompts([5, 8, 3, 7], time=16), samples=3, first_bucket=4, sync_every=1)
    later = sample(replace(prompts([5, 8, 3, 7]), first_samples=1), samples=2)
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[1])
    np.testing.assert_array_equal(wider.tokens, whole.tokens)
    np.testing.assert_array_equal(later.tokens, whole.tokens[:, 1:])
    assert len({row.tobytes() for row in whole.tokens.reshape(-1, 8)}) > 6  # not all the same
    # One prompt twice in a batch: its second row goes on where the first ended.
    once = prompts([8], first_id=1)
    twice = Prompts(*(jnp.repeat(x, 2, axis=0) for x in (once.tokens, once.lengths, once.ids)))
    more = sample(replace(twice, first_samples=jnp.asarray([0, 2])), samples=2).tokens
    np.testing.assert_array_equal(more.reshape(4, -1)[:3], whole.tokens[1])
    assert not np.array_equal(more[0], more[1])
    other_step = sample(prompts([5, 8, 3, 7]), samples=3, step=1)
    assert (other_step.tokens != whole.tokens).any()


def test_ends_at_every_eos_and_keeps_it() -> None:
    free = sample(prompts([5, 8, 3]), samples=4)
    eos = (int(free.tokens[0, 0, 2]), int(free.tokens[1, 1, 4]))
    out = sample(prompts([5, 8, 3]), samples=4, eos_ids=eos)
    ended = 0
    for i in range(3):
        for j in range(4):
            hits = np.flatnonzero(np.isin(free.tokens[i, j], eos))
            n = hits[0] + 1 if len(hits) else 8
            assert out.lengths[i, j] == n
            assert out.finish[i, j] == (Finish.EOS if len(hits) else Finish.LENGTH)
            np.testing.assert_array_equal(out.tokens[i, j, :n], free.tokens[i, j, :n])
            assert (out.tokens[i, j, n:] == 0).all()
            assert (out.policy_log_probs[i, j, n:] == 0).all()
            ended += len(hits) > 0
    assert 2 <= ended < 12


def test_stop_strings_cut_at_the_token_that_completes_them() -> None:
    free = sample(prompts([5, 8]), samples=2)
    wanted = free.tokens[1, 0, 3:5]

    def stop(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        def end(row: np.ndarray, n: int) -> int:
            found = [t + 2 for t in range(n - 1) if (row[t : t + 2] == wanted).all()]
            return found[0] if found else -1

        return np.asarray([end(row, n) for row, n in zip(tokens, lengths, strict=True)])

    out = sample(prompts([5, 8]), samples=2, stop=stop, sync_every=8)
    assert out.finish[1, 0] == Finish.STOP
    assert out.lengths[1, 0] == 5
    assert (out.tokens[1, 0, 5:] == 0).all()
    np.testing.assert_array_equal(out.tokens[0, 0], free.tokens[0, 0])


def test_sampler_and_trainer_agree_on_log_probs() -> None:
    p = prompts([5, 8, 3])
    filters = Sampling(temperature=0.7, top_p=0.9, top_k=9)
    out = sample(p, sampling=filters)
    lengths = np.asarray(p.lengths)
    rows = np.zeros((3, 16), np.int32)
    for i, n in enumerate(lengths):
        rows[i, : n + 8] = [*p.tokens[i, :n], *out.tokens[i, 1]]
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), rows.shape)
    inside = (positions < lengths[:, None] + 8).astype(np.int32)

    @jax.jit
    def score(inputs: TokenRows) -> jax.Array:
        return token_log_probs(PARAMS, inputs, MODEL, temperature=0.7).log_probs

    trainer = np.asarray(score(TokenRows(rows, positions, inside)))
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(out.policy_log_probs[i, 1], trainer[i, n : n + 8], atol=1e-4)
        # Filtering only removes mass, so what is left is more likely.
        assert (out.sampling_log_probs[i, 1] >= out.policy_log_probs[i, 1] - 1e-6).all()
    assert (out.sampling_log_probs > out.policy_log_probs + 1e-3).any()


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), {0, 1, 2, 3}),
        (Sampling(top_k=2), {0, 1}),
        (Sampling(top_p=0.5), {0}),  # 0.5 is reached by the first alone
        (Sampling(top_p=0.51), {0, 1}),
        (Sampling(min_p=0.3), {0, 1}),  # at least 0.3 x 0.5
        (Sampling(top_k=3, top_p=0.8), {0, 1}),  # renormalised after top-k: 0.56 + 0.28
        (Sampling(temperature=0.0), {0}),
    ],
)
def test_filters_by_hand(sampling: Sampling, kept: set[int]) -> None:
    probs = jnp.asarray([0.5, 0.25, 0.14, 0.11])
    out = np.asarray(filter_logits(jnp.log(probs)[None, None], sampling))[0, 0]
    assert set(np.flatnonzero(out > -1e29)) == kept


def test_parameters_change_without_compiling() -> None:
    sample(prompts([5, 8]), sampling=Sampling(temperature=0.9))
    before = decode_until._cache_size()
    sample(prompts([4, 6]), sampling=Sampling(top_p=0.5, min_p=0.1), seed=5, eos_ids=(3,))
    sample(prompts([4, 6]), sampling=Sampling(temperature=jnp.float32(0), top_k=3), step=9)
    assert decode_until._cache_size() == before


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="max_new_tokens = 0"):
        sample(prompts([4]), max_new_tokens=0)


def test_a_token_without_weight_is_never_drawn() -> None:
    rng = np.random.default_rng(0)
    weights = rng.random((200, VOCAB)).astype(np.float32) * (rng.random((200, VOCAB)) < 0.2)
    weights[:, 0] = 0.0
    weights[np.arange(200), rng.integers(1, VOCAB, 200)] = rng.random(200) + 1e-6
    # 0 and the largest number below 1 are where comparing and rounding go wrong.
    edges = np.asarray([0.0, np.nextafter(np.float32(1), np.float32(0))], np.float32)
    for first in edges:
        for second in edges:
            uniforms = np.broadcast_to(np.asarray([first, second]), (200, 2))
            drawn = np.asarray(_inverse_cdf(jnp.asarray(weights), jnp.asarray(uniforms)))
            assert (np.take_along_axis(weights, drawn[:, None], axis=1) > 0).all()
    # Of equal weights every one has its turn, whether or not the vocabulary fills its blocks.
    for vocab in (1, 2, 9, 23):
        grid = (np.arange(vocab * 40) + 0.5) / (vocab * 40)
        both = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2).astype(np.float32)
        ones = jnp.ones((len(both), vocab))
        counts = np.bincount(np.asarray(_inverse_cdf(ones, jnp.asarray(both))), minlength=vocab)
        np.testing.assert_allclose(counts / len(both), 1 / vocab, rtol=0.05)
