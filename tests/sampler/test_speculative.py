"""Speculative samples: distributed and recorded as those without drafts."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_programs import devices
from models_with_modules import GROUPED, LATENT, VOCAB

from r1jax.models import (
    Decoder,
    Execution,
    ModelConfig,
    TokenRows,
    ahead_log_probs,
    forward,
    init_params,
    logits,
    token_log_probs,
)
from r1jax.models.parameters import Params
from r1jax.sampler import (
    Finish,
    GenerateOptions,
    Prompts,
    Samples,
    Sampling,
    filter_logits,
    generate,
)
from r1jax.sampler.distribution import verify
from r1jax.sampler.speculative import decode_speculatively
from r1jax.sharding import single_device


def decoder(config: ModelConfig = GROUPED, scan: bool = False) -> Decoder:
    execution = Execution(compute_dtype=jnp.float32, remat="none", scan_layers=scan)
    return Decoder(config, execution, single_device())


MODEL = decoder()
PARAMS = init_params(jax.random.key(3), GROUPED, MODEL.layout)


def prompts(lengths: list[int], time: int = 8, first_id: int = 0) -> Prompts:
    rng = np.random.default_rng(1)
    rows = rng.integers(0, VOCAB, (20, 32))[first_id : first_id + len(lengths), :time].copy()
    for row, n in zip(rows, lengths, strict=True):
        row[n:] = 0
    ids = np.arange(first_id, first_id + len(lengths), dtype=np.uint32)
    return Prompts(jnp.asarray(rows, jnp.int32), jnp.asarray(lengths, jnp.int32), jnp.asarray(ids))


# What most tests sample of, so that they share programs.
FOUR = prompts([5, 8, 3, 7])


def sample(p: Prompts, model: Decoder = MODEL, params: Params = PARAMS, **options: Any) -> Samples:
    settings = {"samples": 3, "max_new_tokens": 9, "seed": 0, "speculative": True, **options}
    return jax.device_get(generate(params, p, model, GenerateOptions(**settings)))


# The distribution


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.5, top_p=0.9), Sampling(top_k=4, min_p=0.05)]
)
def test_sequences_have_the_probabilities_of_the_model(sampling: Sampling) -> None:
    """All sequences of up to four tokens, of which one ends them, against the model's own product.

    The probabilities are the model's without a cache and without drafts, filtered.
    """
    draws, eos, longest, prompt = 20_000, 4, 4, prompts([3], time=3, first_id=2)
    start = tuple(np.asarray(prompt.tokens[0]).tolist())
    others = [token for token in range(VOCAB) if token != eos]
    prefixes = [p for n in range(longest) for p in itertools.product(others, repeat=n)]
    rows = np.zeros((len(prefixes), 3 + longest), np.int32)
    for row, prefix in zip(rows, prefixes, strict=True):
        row[: 3 + len(prefix)] = start + prefix

    @jax.jit
    def following(rows: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
        hidden = forward(PARAMS, TokenRows(rows, positions, jnp.ones_like(rows)), MODEL).hidden
        filtered = filter_logits(logits(PARAMS, hidden, MODEL), sampling)
        return jax.nn.softmax(filtered, axis=-1)

    table = np.asarray(following(rows), np.float64)
    after = {p: table[i, 2 + len(p)] for i, p in enumerate(prefixes)}
    expected: dict[tuple[int, ...], float] = {}
    for prefix in prefixes:
        before = np.prod([after[prefix[:n]][prefix[n]] for n in range(len(prefix))])
        last = range(VOCAB) if len(prefix) == longest - 1 else [eos]
        expected |= {(*prefix, token): before * after[prefix][token] for token in last}
    assert sum(expected.values()) == pytest.approx(1)

    options = {"samples": draws, "max_new_tokens": longest, "eos_ids": (eos,)}
    out = sample(prompt, sampling=sampling, **options)
    counts = dict.fromkeys(expected, 0)
    for tokens, length in zip(out.tokens[0].tolist(), out.lengths[0].tolist(), strict=True):
        counts[tuple(tokens[:length])] += 1
    assert all(expected[sequence] > 0 for sequence, count in counts.items() if count)
    # Many drafts stay and many do not: both ways to a token are tried.
    rate = out.accepted.sum() / out.drafted.sum()
    assert 0.3 < rate < 0.7
    means = draws * np.asarray(list(expected.values()))
    observed = np.asarray(list(counts.values()))
    common = means >= 5
    groups = np.append(observed[common], observed[~common].sum())
    means = np.append(means[common], max(means[~common].sum(), 1e-9))
    if means[-1] < 5:
        groups, means = groups[:-1], means[:-1]
    statistic = ((groups - means) ** 2 / means).sum()
    degrees = len(groups) - 1
    # Wilson-Hilferty: the 99.9 % point of chi-square.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3
    assert degrees > 10
    assert statistic < limit


def test_verifying_gives_the_models_distribution_exactly() -> None:
    """Integrated over the uniforms on a grid, for drafts of every token, by their probability."""
    p = np.asarray([0.4, 0.3, 0.2, 0.1, 0.0])
    q = np.asarray([0.1, 0.35, 0.0, 0.15, 0.4])
    points = (np.arange(1200) + 0.5) / 1200
    uniforms = points[None].astype(np.float32)
    # 1200 points fall into each token's part of a block as often as its weight says.
    others = np.stack([points, np.random.default_rng(0).permutation(points)], axis=-1)[None]
    shape = (1, 1200, 5)
    of_p, of_q = (jnp.log(jnp.broadcast_to(x, shape)) for x in (p, q))
    found = np.zeros(5)
    for token in np.flatnonzero(q):
        drafts = jnp.full((1, 1200), token)
        tokens, kept = verify(drafts, of_q, of_p, uniforms, jnp.asarray(others, jnp.float32))
        assert float(jnp.mean(kept)) == pytest.approx(min(1, p[token] / q[token]), abs=1e-3)
        assert (np.asarray(tokens)[np.asarray(kept)] == token).all()
        rest = np.maximum(p - q, 0) / np.maximum(p - q, 0).sum()
        replaced = np.asarray(tokens)[~np.asarray(kept)]
        assert set(replaced) <= {0, 2}  # where the model is likelier than the draft
        stays = min(1, p[token] / q[token])
        found += q[token] * (stays * np.eye(5)[token] + (1 - stays) * rest)
    np.testing.assert_allclose(found, p, atol=1e-12)
    # The draw in place of a draft follows p - q, whatever the draft was.
    drafts = jnp.full((1, 1200), 4)  # never kept
    tokens, kept = verify(drafts, of_q, of_p, uniforms, jnp.asarray(others, jnp.float32))
    assert not kept.any()
    np.testing.assert_allclose(np.bincount(tokens[0], minlength=5) / 1200, rest, atol=0.03)


def test_equal_distributions_always_agree() -> None:
    """Also where rounding says otherwise, and where nothing is left to draw from."""
    scores = jax.random.normal(jax.random.key(0), (1, 500, 7))
    drafts = jnp.argmin(scores, axis=-1)
    ones = jnp.full((1, 500), np.nextafter(np.float32(1), np.float32(0)))
    others = jnp.zeros((1, 500, 2))
    tokens, kept = verify(drafts, scores, scores, ones, others)
    assert kept.all() and (tokens == drafts).all()
    # All weights 0: every token is as likely, for the model and for the module.
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    out = sample(FOUR, params=zeros)
    np.testing.assert_array_equal(out.drafted, 4)  # one token, and four times two
    np.testing.assert_array_equal(out.accepted, 4)
    np.testing.assert_array_equal(out.lengths, 9)
    np.testing.assert_allclose(out.policy_log_probs, -np.log(VOCAB), rtol=1e-6)
    assert (sample(FOUR, params=zeros, max_new_tokens=8).lengths == 8).all()


# As without drafts


@pytest.mark.parametrize(("config", "scan"), [(GROUPED, False), (LATENT, True)])
def test_greedy_samples_are_those_without_drafts(config: ModelConfig, scan: bool) -> None:
    model = decoder(config, scan)
    params = init_params(jax.random.key(5), config, model.layout)
    options = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 24, "samples": 1}
    p = prompts([5, 8, 3, 1, 7, 2], time=8)
    plain = sample(p, model, params, speculative=False, **options)
    out = sample(p, model, params, first_bucket=12, **options)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_allclose(out.policy_log_probs, plain.policy_log_probs, atol=1e-4)
    np.testing.assert_array_equal(out.sampling_log_probs, 0.0)
    np.testing.assert_array_equal(out.lengths, 24)
    assert (out.finish == Finish.LENGTH).all()
    # A greedy draft stays if the module, given all tokens before, agrees with the model.
    rows = np.zeros((6, 32), np.int32)
    for i, row in enumerate(rows):
        n = int(p.lengths[i])
        row[: n + 24] = [*p.tokens[i, :n], *out.tokens[i, 0]]
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), rows.shape)
    score = jax.jit(ahead_log_probs, static_argnums=2)
    all_rows = TokenRows(rows, positions, np.ones_like(rows))
    agrees = np.asarray(score(params, all_rows, model).agrees)
    for i, n in enumerate(np.asarray(p.lengths)):
        length, drafts = 1, []
        while length < 24:
            drafts.append(agrees[i, n + length])
            length += 1 + drafts[-1]
        assert (out.drafted[i, 0], out.accepted[i, 0]) == (len(drafts), sum(drafts))
    # Samples went at different speeds, with drafts kept and replaced.
    assert 0 < out.accepted.sum() < out.drafted.sum()
    assert len(np.unique(out.drafted)) > 1
    assert plain.drafted is None


@pytest.mark.parametrize("config", [GROUPED, LATENT])
def test_log_probs_are_the_models_own(config: ModelConfig) -> None:
    model = decoder(config)
    params = init_params(jax.random.key(4), config, model.layout)
    p, sampling = prompts([5, 8, 3]), Sampling(temperature=0.7, top_k=3)
    out = sample(p, model, params, sampling=sampling, first_bucket=4)
    rows = np.zeros((9, 17), np.int32)
    for row in range(9):
        n = int(p.lengths[row // 3])
        rows[row, : n + 9] = [*p.tokens[row // 3, :n], *out.tokens[row // 3, row % 3]]
    positions = jnp.broadcast_to(jnp.arange(17), rows.shape)

    @jax.jit
    def score(params: Params, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        all_rows = TokenRows(rows, positions, jnp.ones_like(rows))
        policy = token_log_probs(params, all_rows, model, temperature=0.7).log_probs
        hidden = forward(params, all_rows, model).hidden
        filtered = jax.nn.log_softmax(filter_logits(logits(params, hidden, model), sampling))
        at = jnp.take_along_axis(filtered[:, :-1], rows[:, 1:, None], axis=-1)[..., 0]
        return policy, jnp.pad(at, ((0, 0), (1, 0)))

    policy, drawn = score(params, rows)
    for row in range(9):
        n = int(p.lengths[row // 3])
        found = out.policy_log_probs[row // 3, row % 3], out.sampling_log_probs[row // 3, row % 3]
        np.testing.assert_allclose(found[0], policy[row, n : n + 9], atol=1e-4)
        np.testing.assert_allclose(found[1], drawn[row, n : n + 9], atol=1e-4)
    assert 0 < out.accepted.sum() < out.drafted.sum()


def test_a_sample_is_the_same_in_any_batch_bucket_and_split() -> None:
    whole = sample(FOUR)
    alone = sample(replace(prompts([8], first_id=1), first_samples=1), samples=2)
    wider = sample(prompts([5, 8, 3, 7], time=16), first_bucket=4, sync_every=1)
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[1, 1:])
    np.testing.assert_array_equal(wider.tokens, whole.tokens)
    assert len({row.tobytes() for row in whole.tokens.reshape(-1, 9)}) == 12
    assert (sample(FOUR, step=1).tokens != whole.tokens).any()


def test_ends_at_every_eos_and_keeps_it() -> None:
    free = sample(FOUR)
    eos = (1, 3)
    out = sample(FOUR, eos_ids=eos)
    lengths = set()
    for i, j in np.ndindex(4, 3):
        hits = np.flatnonzero(np.isin(free.tokens[i, j], eos))
        n = hits[0] + 1 if len(hits) else 9
        assert out.lengths[i, j] == n
        assert out.finish[i, j] == (Finish.EOS if len(hits) else Finish.LENGTH)
        np.testing.assert_array_equal(out.tokens[i, j, :n], free.tokens[i, j, :n])
        for rows in (out.tokens, out.policy_log_probs, out.sampling_log_probs):
            assert (rows[i, j, n:] == 0).all()
        lengths.add(n)
    assert len(lengths) >= 4


def test_stop_strings_cut_at_the_token_that_completes_them() -> None:
    free = sample(FOUR)
    wanted = free.tokens[1, 0, 3:6]

    def stop(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        def end(row: np.ndarray, n: int) -> int:
            found = [t + 3 for t in range(n - 2) if (row[t : t + 3] == wanted).all()]
            return found[0] if found else -1

        return np.asarray([end(row, n) for row, n in zip(tokens, lengths, strict=True)])

    out = sample(FOUR, stop=stop, sync_every=2)
    assert out.finish[1, 0] == Finish.STOP
    assert out.lengths[1, 0] == stop(free.tokens[1, :1], np.asarray([9]))[0]
    assert (out.tokens[1, 0, out.lengths[1, 0] :] == 0).all()


def test_parameters_change_without_compiling() -> None:
    sample(FOUR, sampling=Sampling(temperature=0.9))
    before = decode_speculatively._cache_size()
    sample(prompts([4, 6, 2, 1]), sampling=Sampling(top_p=0.5, min_p=0.1), seed=5, eos_ids=(3,))
    sample(prompts([4, 6, 2, 1]), sampling=Sampling(temperature=jnp.float32(0), top_k=3), step=9)
    assert decode_speculatively._cache_size() == before


def test_one_token_needs_no_draft() -> None:
    out = sample(FOUR, max_new_tokens=1)
    plain = sample(FOUR, max_new_tokens=1, speculative=False)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.drafted, 0)


def test_a_model_without_the_module_is_refused() -> None:
    config = replace(GROUPED, num_nextn_predict_layers=0)
    params = {name: leaf for name, leaf in PARAMS.items() if name != "prediction"}
    with pytest.raises(ValueError, match="speculative = true, but the model has no module"):
        sample(prompts([4]), decoder(config), params)


@pytest.mark.slow  # a program is compiled for each of many meshes
def test_a_mesh_changes_nothing() -> None:
    """Samples, and an update of both losses, over four devices arranged as one and as others."""
    cases = [
        [{"data": 1}, None, "samples, update"],
        [{"fsdp": 2, "tensor": 2}, None, "update"],
        [{"fsdp": 4}, {"data": 2, "tensor": 2}, "samples"],  # with another arrangement
    ]
    script = Path(__file__).parents[1] / "speculative_on_a_mesh.py"
    done = forked.run(str(script), json.dumps(cases), env=os.environ | devices(4))
    assert done.returncode == 0, done.stderr[-3000:]
    one, updated, sampled = json.loads(done.stdout)
    assert np.sum(one["accepted"]) > 4
    assert (sampled["tokens"], sampled["accepted"]) == (one["tokens"], one["accepted"])
    np.testing.assert_allclose(sampled["log_probs"], one["log_probs"], atol=1e-4)
    for name in ("losses", "weights"):
        np.testing.assert_allclose(updated[name], one[name], atol=1e-4, err_msg=name)
