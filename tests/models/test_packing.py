"""Packing is a matter of layout: loss and gradients are those of each document in its own row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import jit, random_params

from r1jax.data.documents import Document
from r1jax.data.packing import packed_once
from r1jax.data.tokenizers import load_tokenizer
from r1jax.models import (
    Decoder,
    Execution,
    ModelConfig,
    TokenRows,
    forward,
    logits,
    token_log_probs,
)
from r1jax.sharding import single_device
from r1jax.train_step import accumulate_gradients

CONFIG = ModelConfig(
    architecture="qwen2",
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    tie_word_embeddings=True,
    initializer_range=0.3,
)
MODEL = Decoder(
    CONFIG,
    Execution(compute_dtype=jnp.float32, remat="none", scan_layers=True, log_prob_chunk=5),
    single_device(),
)
ROWS, TIME = 8, 16


def documents() -> list[Document]:
    """Eight of 2 .. 11 tokens, their prompts untrained; one is untrained but for its end."""
    rng = np.random.default_rng(1)
    lengths, prompts = [5, 11, 2, 7, 8, 3, 9, 4], [2, 4, 1, 6, 1, 1, 5, 3]
    return [
        Document(rng.integers(0, 23, n, np.int32), np.arange(n) >= prompt)
        for n, prompt in zip(lengths, prompts, strict=True)
    ]


def packed_rows() -> dict[str, np.ndarray]:
    tokenizer = load_tokenizer("characters:running_total")
    (batch,) = packed_once(
        documents(), lambda items: items, tokenizer, row_tokens=TIME, rows_per_batch=ROWS
    )
    return batch


def unpacked_rows() -> dict[str, np.ndarray]:
    """By hand: a document to a row, padded with a token that documents have too."""
    rows = {name: np.zeros((ROWS, TIME), np.int32) for name in ("segment_ids", "positions")}
    rows |= {"tokens": np.full((ROWS, TIME), 7, np.int32), "trained": np.zeros((ROWS, TIME), bool)}
    for r, document in enumerate(documents()):
        n = len(document.tokens)
        rows["tokens"][r, :n], rows["segment_ids"][r, :n] = document.tokens, 1
        rows["positions"][r, :n], rows["trained"][r, :n] = np.arange(n), document.trained
    return rows


@functools.cache
def compiled(micro_batches: int) -> Any:
    """(parameters, rows) -> loss and gradients; the denominator counts the whole batch."""

    def loss_fn(params: Any, part: Any) -> tuple[jax.Array, None]:
        inputs, weights = part
        return -jnp.sum(
            token_log_probs(params, TokenRows(**inputs), MODEL).log_probs * weights
        ), None

    def loss_and_gradients(params: Any, rows: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        inputs = {name: array for name, array in rows.items() if name != "trained"}
        weights = rows["trained"] / rows["trained"].sum()
        return accumulate_gradients(loss_fn, params, (inputs, weights), micro_batches)[:2]

    return jit(loss_and_gradients)


def reference_loss(params: Any, items: Sequence[Document]) -> float:
    """Token by token, from whole logits: one row per document, no chunk, no mask."""
    arrays = unpacked_rows()
    rows = TokenRows(arrays["tokens"], arrays["positions"], arrays["segment_ids"])
    hidden = jit(forward, static_argnums=2)(params, rows, MODEL).hidden
    log_probs = np.asarray(jax.nn.log_softmax(logits(params, hidden, MODEL)))
    terms = [
        -log_probs[r, t - 1, document.tokens[t]]
        for r, document in enumerate(items)
        for t in range(len(document.tokens))
        if document.trained[t]
    ]
    return float(np.mean(terms))


def test_the_packed_rows_are_packed_and_some_are_empty() -> None:
    """The tests below would prove nothing on rows of one document."""
    counts = packed_rows()["segment_ids"].max(axis=1)
    assert counts.sum() == len(documents()) and counts.max() >= 2
    assert counts.min() == 0


def test_the_loss_is_the_mean_over_the_trained_tokens_alone() -> None:
    params = random_params(CONFIG)
    expected = reference_loss(params, documents())
    for rows in (packed_rows(), unpacked_rows()):
        loss, _ = compiled(1)(params, rows)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_packed_and_unpacked_rows_have_the_same_gradients(micro_batches: int) -> None:
    """With micro-batches, some of which hold little or nothing, too."""
    params = random_params(CONFIG)
    loss, gradients = compiled(micro_batches)(params, packed_rows())
    alone, expected = compiled(1)(params, unpacked_rows())
    np.testing.assert_allclose(loss, alone, rtol=1e-5)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        assert np.abs(b).max() > 1e-4, jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path))
