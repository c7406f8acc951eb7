"""Drawing where no filter is on, against softmax in float64, and against the way with filters."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.sampler import Sampling
from r1jax.sampler.distribution import (
    _draw_unfiltered,
    draw,
    draw_filtered,
    drawn_log_probs,
    filter_logits,
)

KEYS = jax.random.split(jax.random.key(0), (2, 200))
draw_ = jax.jit(draw)


def log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """In float64, of logits that are float32 when they are divided."""
    scaled = logits.astype(np.float64) / (temperature or 1.0)
    scaled -= scaled.max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_probs: np.ndarray = scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    return log_probs


def logits_of(kind: str, vocab: int) -> np.ndarray:
    """[2, 200, vocab]."""
    logits = np.random.default_rng(vocab).normal(size=(*KEYS.shape, vocab)).astype(np.float32)
    if kind == "high":
        return logits + np.float32(1e4)
    if kind == "far apart":
        return logits * np.float32(1e4)
    if kind == "ties":
        return np.round(logits)
    if kind == "some impossible":
        logits[..., 1::3] = -np.inf
    return logits


@pytest.mark.parametrize("kind", ["plain", "high", "far apart", "ties", "some impossible"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1e-4, 0.0])
def test_log_probs_are_those_of_softmax_in_float64(kind: str, temperature: float) -> None:
    logits = logits_of(kind, 97)
    tokens, policy, drawn = (
        np.asarray(x) for x in draw_(logits, KEYS, jnp.int32(3), Sampling(temperature))
    )
    wanted = np.take_along_axis(log_softmax(logits, temperature), tokens[..., None], -1)[..., 0]
    # Of a token that is drawn. Scaled logits are rounded in float32.
    scale = np.abs(logits[np.isfinite(logits)]).max() / (temperature or 1.0)
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(policy, wanted, atol=2e-6 + 2e-7 * scale, rtol=1e-6)
    if temperature == 0:
        np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))  # the first of equal ones
        np.testing.assert_array_equal(drawn, 0.0)
    else:
        np.testing.assert_array_equal(drawn, policy)


@pytest.mark.parametrize("vocab", [1, 2, 9, 23, 200])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_have_their_probabilities(vocab: int, temperature: float) -> None:
    """Over a grid of the two numbers that draw a token."""
    logits = np.random.default_rng(vocab).normal(size=vocab).astype(np.float32)
    points = (np.arange(150) + 0.5) / 150
    grid = np.stack(np.meshgrid(points, points), axis=-1).reshape(1, -1, 2).astype(np.float32)
    rows = jnp.broadcast_to(logits, (1, grid.shape[1], vocab))
    tokens, *_ = jax.jit(_draw_unfiltered)(rows, grid, Sampling(temperature))
    rates = np.bincount(np.asarray(tokens[0]), minlength=vocab) / grid.shape[1]
    # A block has as many points of 150 as its sum says, to one; and a token of its block's.
    probs = np.exp(log_softmax(logits, temperature))
    np.testing.assert_allclose(rates, probs, atol=2 / 150)


@pytest.mark.parametrize("kind", ["plain", "ties", "some impossible"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_filters_that_keep_all_change_no_token(kind: str, temperature: float) -> None:
    logits, position = jnp.asarray(logits_of(kind, 97)), jnp.int32(3)
    without = draw_(logits, KEYS, position, Sampling(temperature))
    with_filters = draw_(logits, KEYS, position, Sampling(temperature, min_p=1e-30))
    np.testing.assert_array_equal(without[0], with_filters[0])
    # As the pieces do that drafts are drawn and verified with.
    uniforms = jnp.asarray(np.random.default_rng(0).random((*KEYS.shape, 2)), jnp.float32)
    sampling = Sampling(temperature)
    filtered = filter_logits(logits, sampling)
    tokens = draw_filtered(filtered, uniforms)
    found = jax.jit(partial(_draw_unfiltered, sampling=sampling))(logits, uniforms)
    np.testing.assert_array_equal(tokens, found[0])
    wanted = drawn_log_probs(tokens, logits, filtered, sampling)
    for pair in ((without[1:], with_filters[1:]), (wanted, found[1:])):
        np.testing.assert_allclose(*pair, atol=3e-6)


def test_each_row_has_its_own_temperature() -> None:
    logits, position = jnp.asarray(logits_of("plain", 97)), jnp.int32(0)
    together = draw_(logits, KEYS, position, Sampling(jnp.asarray([0.0, 0.7])))
    for row, temperature in enumerate((0.0, 0.7)):
        alone = draw_(logits, KEYS, position, Sampling(temperature))
        for found, wanted in zip(together, alone, strict=True):
            np.testing.assert_array_equal(found[row], wanted[row])
    # A filter of one row changes nothing in the other.
    filtered = draw_(logits, KEYS, position, Sampling(0.7, top_k=jnp.asarray([2, 0])))
    kept = np.sort(np.asarray(logits[0]), axis=-1)[:, -2:]
    assert all(logits[0, i, token] in kept[i] for i, token in enumerate(filtered[0][0]))
    np.testing.assert_array_equal(filtered[0][1], together[0][1])
