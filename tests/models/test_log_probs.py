"""Log-probs of the tokens that are wanted, beside those of all tokens."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import jit, random_params

from r1jax.models import (
    Decoder,
    Execution,
    LatentAttention,
    ModelConfig,
    TokenRows,
    token_log_probs,
)
from r1jax.models.chunked_log_probs import (
    Chunks,
    TargetLogProbs,
    chunked_log_probs,
    wanted_log_probs,
)
from r1jax.sharding import single_device

ROWS, TIME, WIDTH, VOCAB = 3, 10, 6, 11


def wanted_tokens(kind: str) -> np.ndarray:
    wanted = np.zeros((ROWS, TIME), bool)
    if kind == "some":
        wanted = np.random.default_rng(1).random((ROWS, TIME)) < 0.4
    elif kind == "one":
        wanted[2, 9] = True
    elif kind == "all":
        wanted[:] = True
    return wanted


@pytest.mark.parametrize("kind", ["none", "one", "some", "all"])
def test_wanted_log_probs_and_their_gradients_are_those_of_all_tokens(kind: str) -> None:
    rng = np.random.default_rng(0)
    hidden, matrix, weights = (
        rng.standard_normal(shape, np.float32)
        for shape in ((ROWS, TIME, WIDTH), (WIDTH, VOCAB), (ROWS, TIME))
    )
    targets = rng.integers(0, VOCAB, (ROWS, TIME)).astype(np.int32)
    wanted = wanted_tokens(kind)
    junk = np.where(wanted[..., None], hidden, np.nan)  # what is not wanted is not read
    some = np.where(wanted, targets, -7)

    def plain(hidden: Any, matrix: Any, targets: Any) -> TargetLogProbs:
        """All logits at once, with the gradients of log-probs and entropy."""
        logs = jax.nn.log_softmax(hidden @ matrix / 0.7)
        log_probs = jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
        return TargetLogProbs(log_probs, -jnp.sum(jnp.exp(logs) * logs, axis=-1), None)

    def value(hidden: Any, matrix: Any, targets: Any, chunk: int | None, bonus: float) -> Any:
        values = plain(hidden, matrix, targets)
        if chunk is not None:
            options: Any = {"chunks": Chunks(chunk), "temperature": 0.7}
            values = wanted_log_probs(hidden, matrix, targets, wanted, **options)
        terms = values.log_probs * weights + (bonus * values.entropy if bonus else 0)
        return jnp.sum(jnp.where(wanted, terms, 0.0)), values

    both = jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), static_argnums=(3, 4))
    # Where the entropy is only shown it has no gradient to compute, and where it counts, it has.
    for chunk, bonus in ((1, 0.5), (3, 0.0), (3, 0.5), (64, 0.5)):
        (loss, full), gradients = both(hidden, matrix, targets, None, bonus)
        (got, values), got_gradients = both(junk, matrix, some, chunk, bonus)
        assert isinstance(values, TargetLogProbs) and values.most_likely is None
        np.testing.assert_allclose(got, loss, rtol=1e-5)
        for name in ("log_probs", "entropy"):
            expected = np.where(wanted, getattr(full, name), 0.0)
            np.testing.assert_allclose(getattr(values, name), expected, atol=2e-5)
        for a, b in zip(got_gradients, gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("wanted", [False, True])
def test_no_product_of_log_probs_in_bfloat16_is_one_of_float32(wanted: bool) -> None:
    """Which a GPU computes at half the speed, and a gradient of float32 logits asks for."""
    hidden = jnp.zeros((ROWS, TIME, WIDTH), jnp.bfloat16)
    matrix = jnp.zeros((WIDTH, VOCAB), jnp.bfloat16)
    targets = jnp.zeros((ROWS, TIME), jnp.int32)

    def loss(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        if wanted:
            chunks = Chunks(4)
            values = wanted_log_probs(hidden, matrix, targets, targets == 0, chunks=chunks)
        else:
            values = chunked_log_probs(hidden, matrix, targets, chunks=Chunks(4))
        return jnp.sum(values.log_probs)

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    program = both.lower(hidden, matrix).as_text()
    products = re.findall(r"stablehlo.dot_general.* : \((.*?)\) -> ", program)
    assert len(products) == 4  # logits, those again, and two gradients
    assert not any("f32" in operands.replace("bf16", "") for operands in products)


def test_few_rows_have_more_time_steps_at_once() -> None:
    def steps(rows: int, time: int) -> int:
        return Execution(log_prob_chunk=256, log_prob_tokens=2048).logit_steps(rows, time)

    assert [steps(1, 8192), steps(3, 8192), steps(8, 8192)] == [2048, 683, 256]
    assert [steps(1, 100), steps(32, 8192)] == [100, 256]
    config = ModelConfig("qwen2", VOCAB, 16, 24, 1, 4, 2, 4, tie_word_embeddings=True)
    params, rows = random_params(config), single_rows()

    def largest(tokens: int) -> tuple[jax.Array, int]:
        execution = Execution(compute_dtype=jnp.float32, log_prob_chunk=1, log_prob_tokens=tokens)
        model = Decoder(config, execution, single_device())
        both = jit(lambda params: token_log_probs(params, rows, model).log_probs)
        text = both.lower(params).as_text()
        chunks = [int(n) for n in re.findall(rf"tensor<9x(\d+)x{VOCAB}xf32>", text)]
        return both(params), max(chunks)

    (one, few), (same, more) = largest(1), largest(27)
    assert (few, more) == (1, 3)
    np.testing.assert_allclose(one, same, atol=1e-6)


PROMPTS, SAMPLES = [[5, 3, 8], [4], [6, 6, 1, 2]], [[[7, 2, 9], [1], [3, 3]]] * 3
PROMPT_TIME, TIME_OF_SAMPLE = 5, 4


def shared_rows() -> TokenRows:
    """By hand: a prompt, padded to 5, and its three samples, padded to 4 each."""
    shape = len(PROMPTS), PROMPT_TIME + 3 * TIME_OF_SAMPLE
    tokens, positions, ids = np.full(shape, 7, np.int32), *np.zeros((2, *shape), np.int32)
    sees = np.zeros((len(PROMPTS), 3, PROMPT_TIME), bool)
    for r, (prompt, samples) in enumerate(zip(PROMPTS, SAMPLES, strict=True)):
        n = len(prompt)
        tokens[r, :n], positions[r, :n], ids[r, :n], sees[r, :, :n] = prompt, np.arange(n), 1, True
        for s, sample in enumerate(samples):
            at = slice(start := PROMPT_TIME + s * TIME_OF_SAMPLE, start + len(sample))
            tokens[r, at], ids[r, at] = sample, s + 2
            positions[r, at] = n + np.arange(len(sample))
    return TokenRows(tokens, positions, ids, prompt_of=sees)


def single_rows() -> TokenRows:
    """A prompt and a sample to a row."""
    shape = 3 * len(PROMPTS), PROMPT_TIME + TIME_OF_SAMPLE
    tokens, positions, ids = np.full(shape, 7, np.int32), *np.zeros((2, *shape), np.int32)
    for r in range(len(tokens)):
        text = PROMPTS[r // 3] + SAMPLES[r // 3][r % 3]
        n = len(text)
        tokens[r, :n], positions[r, :n], ids[r, :n] = text, np.arange(n), 1
    return TokenRows(tokens, positions, ids)


@pytest.mark.parametrize("latent", [False, True])
def test_a_prompt_computed_once_gives_its_samples_the_same(latent: bool) -> None:
    config = ModelConfig("qwen2", 11, 16, 24, 2, 4, 2, 4, tie_word_embeddings=True)
    if latent:
        attention = LatentAttention(None, 8, 4, 4, 6)
        config = ModelConfig("deepseek_v3", 11, 16, 24, 2, 2, 2, 8, latent=attention)
    execution = Execution(
        compute_dtype=jnp.float32, remat="none", scan_layers=False, log_prob_chunk=4
    )
    model, params = Decoder(config, execution, single_device()), random_params(config)
    weights = np.random.default_rng(0).standard_normal((3, 3, TIME_OF_SAMPLE), np.float32)

    def shared(params: Any) -> Any:
        values = token_log_probs(params, shared_rows(), model)
        return [x[:, PROMPT_TIME:].reshape(3, 3, -1) for x in values[:2]]

    def alone(params: Any) -> Any:
        values = token_log_probs(params, single_rows(), model)
        rows = [np.arange(TIME_OF_SAMPLE) + len(prompt) for prompt in PROMPTS for _ in range(3)]
        at = np.minimum(np.stack(rows), PROMPT_TIME + TIME_OF_SAMPLE - 1)
        real = single_rows().segment_ids[np.arange(9)[:, None], at] * (np.stack(rows) == at)
        return [(jnp.take_along_axis(x, at, 1) * real).reshape(3, 3, -1) for x in values[:2]]

    def loss(values: Any, params: Any) -> Any:
        log_probs, entropy = values(params)
        return jnp.sum(log_probs * weights), (log_probs, entropy)

    (_, got), gradients = jit(jax.value_and_grad(lambda p: loss(shared, p), has_aux=True))(params)
    (_, expected), others = jit(jax.value_and_grad(lambda p: loss(alone, p), has_aux=True))(params)
    for a, b in zip(got, expected, strict=True):
        assert np.count_nonzero(b) == 18
        np.testing.assert_allclose(a, b, atol=2e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)
    # The prompt's tokens have the log-probs that they have in a row of the prompt and a sample.
    log_probs = jit(lambda p, rows: token_log_probs(p, rows, model).log_probs[:, :PROMPT_TIME])
    of_prompt, single = log_probs(params, shared_rows()), log_probs(params, single_rows())[::3]
    real = shared_rows().segment_ids[:, :PROMPT_TIME]
    np.testing.assert_allclose(of_prompt, single * real, atol=2e-5)
