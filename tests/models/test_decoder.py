"""One function, however it is computed: padding, packing, scan, remat, chunks and kernels."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import decode_one, jit, random_params, whole_rows

from r1jax.models import (
    Decoder,
    Execution,
    Llama3RopeScaling,
    ModelConfig,
    TokenRows,
    attention,
    flash_attention_gpu,
    forward,
    logits,
    prefill,
    token_log_probs,
)
from r1jax.models.chunked_log_probs import Chunks, chunked_log_probs
from r1jax.models.decoder import unstack_layers
from r1jax.models.kv_cache import empty_cache
from r1jax.models.parameters import Params
from r1jax.models.primitives import project
from r1jax.sharding import single_device

QWEN2 = ModelConfig(
    architecture="qwen2",
    vocab_size=41,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
    initializer_range=0.3,
)
QWEN3 = replace(QWEN2, architecture="qwen3", tie_word_embeddings=False)
LLAMA = replace(
    QWEN2,
    architecture="llama",
    rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, original_max_position_embeddings=16),
)
PLAIN = Execution(compute_dtype=jnp.float32, remat="none", scan_layers=True)


def decoder(config: ModelConfig = QWEN2, **execution: Any) -> Decoder:
    return Decoder(config, replace(PLAIN, **execution), single_device())


def random_tokens(*shape: int, seed: int = 0, vocab: int = 41) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, shape, np.int32)


def random_floats(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


@functools.partial(jit, static_argnums=2)
def whole_logits(params: Params, rows: TokenRows, model: Decoder) -> jax.Array:
    return logits(params, forward(params, rows, model).hidden, model)


score = jit(token_log_probs, static_argnums=2)


def assert_trees_close(actual: Any, expected: Any, **tolerance: float) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **tolerance)


@pytest.mark.parametrize("config", [QWEN2, QWEN3, LLAMA], ids=lambda c: c.architecture)
def test_scores_do_not_depend_on_where_a_sequence_lies(config: ModelConfig) -> None:
    model = decoder(config)
    words, other = random_tokens(7), random_tokens(5, seed=1)
    time = 14
    tokens = random_tokens(4, time, seed=2)  # padding holds real token ids, not zeros
    positions, segments = np.zeros((2, 4, time), np.int32)
    # (row, start, segment, document): right- and left-padded, packed before and behind another.
    mine = [(0, 0, 1), (1, time - 7, 1), (2, 0, 1), (3, 6, 2)]
    places = [(*place, words) for place in mine] + [(2, 8, 2, other), (3, 0, 1, other)]
    for row, start, segment, document in places:
        span = slice(start, start + len(document))
        tokens[row, span], segments[row, span] = document, segment
        positions[row, span] = np.arange(len(document))

    rows = TokenRows(tokens, positions, segments)
    scores = score(random_params(model.config), rows, model)
    for kind in (scores.log_probs, scores.entropy):
        found = np.stack([kind[row, start : start + 7] for row, start, _ in mine])
        np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), atol=1e-5)
        assert np.all(found[:, 0] == 0)  # nothing precedes the first token
        assert np.all(np.asarray(kind)[np.asarray(segments) == 0] == 0)
        assert np.abs(found[:, 1:]).min() > 1e-3
    np.testing.assert_allclose(scores.log_probs[2, 8:13], scores.log_probs[3, :5], atol=1e-5)


def test_scores_are_the_log_softmax_of_the_token_before() -> None:
    model = decoder(log_prob_chunk=4)
    params, rows = random_params(model.config), whole_rows(random_tokens(2, 10))
    scores = score(params, rows, model, temperature=0.7)
    table = np.asarray(jax.nn.log_softmax(whole_logits(params, rows, model) / 0.7))
    for row in range(2):
        for t in range(1, 10):
            expected = table[row, t - 1, rows.tokens[row, t]]
            np.testing.assert_allclose(scores.log_probs[row, t], expected, atol=1e-5)
            entropy = -np.sum(np.exp(table[row, t - 1]) * table[row, t - 1])
            np.testing.assert_allclose(scores.entropy[row, t], entropy, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 5, 64])
def test_chunked_scores_and_gradients_equal_the_plain_ones(chunk: int) -> None:
    hidden, matrix, weights = random_floats((2, 10, 6), (6, 13), (2, 10))
    targets = random_tokens(2, 10, vocab=13)

    def chunked(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        scores = chunked_log_probs(hidden, matrix, targets, chunks=Chunks(chunk), temperature=0.5)
        return jnp.sum(scores.log_probs * weights) + jnp.sum(scores.entropy)  # no gradient

    def plain(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        table = jax.nn.log_softmax(hidden @ matrix / 0.5)
        chosen = jnp.take_along_axis(table, targets[..., None], -1)[..., 0]
        entropy = jax.lax.stop_gradient(-jnp.sum(jnp.exp(table) * table))
        return jnp.sum(chosen * weights) + entropy

    actual, expected = (
        jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, matrix) for f in (chunked, plain)
    )
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-4)


def weighted_score(params: Params, model: Decoder) -> jax.Array:
    rows = whole_rows(random_tokens(2, 12))
    (weights,) = random_floats((2, 12))
    return jnp.sum(token_log_probs(params, rows, model).log_probs * weights)


value_and_grad = jit(jax.value_and_grad(weighted_score), static_argnums=1)


def test_scan_and_remat_change_neither_values_nor_gradients() -> None:
    reference = decoder(QWEN3, scan_layers=True, remat="none")
    params = random_params(reference.config)
    expected = value_and_grad(params, reference)
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected[1])) > 1e-3
    for scan_layers, remat in ((True, "full"), (True, "dots"), (False, "none")):
        model = decoder(QWEN3, scan_layers=scan_layers, remat=remat)
        assert_trees_close(value_and_grad(params, model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_prefill_and_decode_give_the_logits_of_whole_rows(
    scan_layers: bool, cache_of_platform: str
) -> None:
    model = decoder(LLAMA, scan_layers=scan_layers)
    params = random_params(model.config)
    tokens = random_tokens(2, 9)
    lengths = np.asarray([6, 4], np.int32)  # prompts; two samples each go on for three tokens
    expected = whole_logits(params, whole_rows(tokens), model)

    hidden, prompts = jit(prefill, static_argnums=3)(params, tokens[:, :6], lengths, model)
    for row, length in enumerate([6, 4]):
        found = logits(params, hidden[row, length - 1], model)
        np.testing.assert_allclose(found, expected[row, length - 1], atol=1e-4)

    weights, cache = unstack_layers(params, model), empty_cache(2, 2, 4, model)
    run, output = jit(decode_one, static_argnums=5), jit(logits, static_argnums=2)
    for step in range(3):
        following = np.stack([tokens[0, 6 + step], tokens[1, 4 + step]])
        new = np.broadcast_to(following[:, None], (2, 2))
        hidden, cache = run(weights, new, np.int32(step), prompts, cache, model)
        found = output(params, hidden, model)
        for row, length in enumerate([6, 4]):
            for sample in range(2):
                np.testing.assert_allclose(
                    found[row, sample], expected[row, length + step], atol=1e-4
                )


# Attention


def attention_inputs(time: int, value_dim: int = 16) -> tuple[np.ndarray, ...]:
    """q, k, v with grouped heads, segments with padding on both sides, cotangents."""
    segments = np.zeros((2, time), np.int32)
    segments[0, : time // 2], segments[0, time // 2 : time - 5] = 1, 2
    segments[1, time // 4 :] = 1
    heads, kv_heads = (2, time, 4), (2, time, 2)
    shapes = (*heads, 16), (*heads, value_dim), (*kv_heads, 16), (*kv_heads, value_dim)
    q, weights, k, v = random_floats(*shapes)
    # What comes out at padding is undefined, so nothing may depend on it.
    return q, k, v, segments, weights * (segments != 0)[..., None, None]


def attention_and_gradients(attend: Callable[..., jax.Array], inputs: Any) -> Any:
    *qkv, segments, weights = inputs

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v, segments)
        return jnp.sum(out * weights), jnp.where(segments[..., None, None] != 0, out, 0.0)

    return jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*qkv)


def test_attention_in_blocks_of_queries_equals_attention_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = attention_inputs(21)
    expected = attention_and_gradients(attention._xla, inputs)
    blocks = []
    block = attention._attend_block
    monkeypatch.setattr(attention, "_QUERY_CHUNK", 8)
    monkeypatch.setattr(
        attention, "_attend_block", lambda *args: blocks.append(args[0].shape[1]) or block(*args)
    )
    actual = attention_and_gradients(lambda *args: attention._xla(*args), inputs)
    assert set(blocks) == {8}
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value_dim", [16, 9])
@pytest.mark.parametrize("kernel", ["splash", "flash", "flash_packed"])
def test_kernels_equal_the_xla_path(
    kernel: str, value_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Pallas' interpreter: the kernels' own arithmetic, padding and layout, on any machine."""
    from jax.experimental.pallas.ops.gpu import attention as flash
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    for module, name in (
        *((splash, "make_splash_mha_single_device"), (flash, "mha")),
        (flash_attention_gpu, "flash_attention"),
    ):
        interpreted = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setattr(module, name, interpreted)
    inputs = attention_inputs(130, value_dim)  # not a multiple of the kernels' tiles
    execution = Execution(attention=kernel)  # type: ignore[arg-type]
    attend = functools.partial(attention.row_attention, execution=execution, layout=single_device())
    actual = attention_and_gradients(attend, inputs)
    expected = attention_and_gradients(attention._xla, inputs)
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_splash_attention_are_the_fewest_blocks_that_are_not_larger_than_needed() -> None:
    assert [
        attention.splash_blocks(t) for t in (1, 128, 300, 512, 640, 2048, 2176, 2304, 8192)
    ] == [
        *((128, 128), (128, 128), (384, 384), (512, 512), (384, 768)),
        *((512, 2048), (512, 2560), (512, 2560), (512, 8192)),
    ]
    for time in range(1, 3000, 7):
        block, padded = attention.splash_blocks(time)
        assert block <= 512 and block % 128 == 0 and padded % block == 0
        # Less would need more blocks: neither fewer of them nor smaller ones hold the row.
        assert padded >= time > max(padded - 512, (padded // block) * (block - 128))


def test_attention_is_chosen_by_backend() -> None:
    assert [attention.choose_attention("auto", b) for b in ("cpu", "gpu", "tpu")] == [
        "xla",
        "flash",
        "splash",
    ]
    assert attention.choose_attention("xla", "tpu") == "xla"
    with pytest.raises(ValueError, match="'splash' needs a tpu, this is a cpu"):
        attention.choose_attention("splash", "cpu")


# Memory


def largest_array(compiled_text: str) -> int:
    """Elements of the largest array that a compiled program mentions, fused ones included."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", compiled_text)
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def grpo_gradient_text(chunk: int, **execution: Any) -> tuple[str, int]:
    """The compiled gradient of a clipped objective with KL, and batch * time * vocabulary."""
    batch, time, vocab = 2, 48, 203
    model = decoder(replace(QWEN2, vocab_size=vocab), log_prob_chunk=chunk, **execution)

    def loss(params: Params, rows: Any, old: jax.Array, advantage: jax.Array) -> jax.Array:
        scores = token_log_probs(params, rows, model)
        ratio = jnp.exp(scores.log_probs - old)
        clipped = jnp.clip(ratio, 0.8, 1.2)
        kl = jnp.exp(old - scores.log_probs) - (old - scores.log_probs) - 1
        gain = jnp.minimum(ratio * advantage, clipped * advantage) - 0.01 * kl
        return -jnp.mean(gain) + 0.001 * jnp.mean(scores.entropy)

    params = random_params(model.config)
    rows = whole_rows(random_tokens(batch, time, vocab=vocab))
    numbers = np.ones((batch, time), np.float32)
    program = jit(jax.value_and_grad(loss)).lower(params, rows, numbers, numbers).compile()
    return program.as_text(), batch * (time - 1) * vocab  # the last token has no successor


@pytest.mark.parametrize("scan_layers", [True, False])
def test_no_array_of_a_train_step_spans_batch_time_and_vocabulary(scan_layers: bool) -> None:
    text, forbidden = grpo_gradient_text(chunk=8, scan_layers=scan_layers, remat="full")
    # The attention matrices are the largest: 2 * 4 * 48 * 48. A chunk's logits are 2 * 8 * 203.
    assert largest_array(text) < forbidden


def test_the_memory_test_would_notice_whole_logits() -> None:
    text, forbidden = grpo_gradient_text(chunk=48)
    assert largest_array(text) >= forbidden


@pytest.mark.parametrize("inputs", [1, 2])
def test_a_product_is_the_same_where_time_is_split(inputs: int) -> None:
    class Split:
        def shards(self, axis: str) -> int:
            return 2 if axis == "time" else 1

    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5)[: 2 + inputs])
    weight = jax.random.normal(jax.random.key(1), (*x.shape[2:], 6, 7))
    whole = project(x, weight, single_device(), inputs=inputs)
    split = project(x, weight, Split(), inputs=inputs)  # type: ignore[arg-type]
    letters = "de"[:inputs]
    expected = np.einsum(f"bt{letters},{letters}xy->btxy", x, weight)
    assert whole.shape == split.shape == (2, 3, 6, 7)
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    np.testing.assert_allclose(split, expected, atol=1e-5)
