"""The divergence to a teacher in chunks of wanted tokens, beside that of all logits at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import jit, random_params

from r1jax.models import (
    Decoder,
    Execution,
    ModelConfig,
    Teacher,
    TokenRows,
    distilled_log_probs,
    forward,
    logits,
    token_log_probs,
)
from r1jax.objectives.distillation import Comparison, Divergence, compare_logits
from r1jax.sharding import single_device

EXECUTION = Execution(compute_dtype=jnp.float32, remat="none", scan_layers=False, log_prob_chunk=3)


def model(vocab: int, width: int, layers: int) -> Decoder:
    config = ModelConfig("qwen2", vocab, width, 24, layers, 4, 2, 4, tie_word_embeddings=True)
    return Decoder(config, EXECUTION, single_device())


STUDENT = model(11, 16, 1)
TEACHERS = {"same": model(11, 24, 2), "wider": model(13, 24, 2), "narrower": model(10, 24, 2)}


def packed() -> TokenRows:
    """Two documents and one, and padding."""
    rng = np.random.default_rng(0)
    ids = np.asarray([[1] * 5 + [2] * 4 + [0], [1] * 7 + [0] * 3], np.int32)
    positions = np.asarray([[*range(5), *range(4), 0], [*range(7), 0, 0, 0]], np.int32)
    return TokenRows(rng.integers(0, 10, ids.shape).astype(np.int32), positions, ids)


def alone() -> TokenRows:
    """The same documents, each in its row."""
    rows = packed()
    parts = [(0, 0, 5), (0, 5, 9), (1, 0, 7)]
    tokens, positions, ids = np.zeros((3, 3, 7), np.int32)
    for i, (r, start, end) in enumerate(parts):
        tokens[i, : end - start] = rows.tokens[r, start:end]
        positions[i, : end - start], ids[i, : end - start] = np.arange(end - start), 1
    return TokenRows(tokens, positions, ids)


WANTED = np.asarray([[0, 1, 1, 0, 1, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 0, 0, 0]], bool)
DIVERGENCES = [Divergence(), Divergence("forward_kl", top_k=4), Divergence("jsd", beta=0.3)]


def plainly(params: Any, teacher: Any, rows: TokenRows, kept: int, temperature: float) -> Any:
    """The comparison at each token, of all logits."""
    of_student, of_teacher = (
        logits(weights, forward(weights, rows, decoder).hidden, decoder)[..., :kept] / temperature
        for weights, decoder in ((params, STUDENT), (teacher.params, teacher.model))
    )
    compared = compare_logits(of_student, of_teacher, teacher.divergence)
    return jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), compared)


@pytest.mark.parametrize(
    ("which", "divergence"), list(zip(TEACHERS, DIVERGENCES, strict=True)), ids=str
)
def test_it_is_that_of_all_logits_with_its_gradient(which: str, divergence: Divergence) -> None:
    decoder = TEACHERS[which]
    teacher = Teacher(random_params(decoder.config), decoder, divergence, temperature=0.8)
    params, kept = random_params(STUDENT.config), min(11, decoder.config.vocab_size)
    weights = np.random.default_rng(2).uniform(size=WANTED.shape).astype(np.float32)

    def loss(compared: Comparison, log_probs: Any) -> Any:
        terms = compared.divergence * weights + 0.5 * log_probs
        return jnp.sum(jnp.where(WANTED, terms, 0.0))

    def expected(params: Any) -> Any:
        log_probs = token_log_probs(params, packed(), STUDENT, temperature=0.6).log_probs
        compared = plainly(params, teacher, packed(), kept, 0.8)
        return loss(compared, log_probs), (compared, log_probs)

    def in_chunks(params: Any, chunk: int) -> Any:
        student = replace(STUDENT, execution=replace(EXECUTION, log_prob_chunk=chunk))
        got = distilled_log_probs(
            params, packed(), student, teacher, wanted=WANTED, temperature=0.6
        )
        return loss(got.comparison, got.log_probs), (got.comparison, got.log_probs)

    (total, full), gradients = jit(jax.value_and_grad(expected, has_aux=True))(params)
    compiled = jit(jax.value_and_grad(in_chunks, has_aux=True), static_argnums=1)
    for chunk in (1, 4, 64) if which == "same" else (4,):
        (got_total, got), got_gradients = compiled(params, chunk)
        np.testing.assert_allclose(got_total, total, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(full), strict=True):
            np.testing.assert_allclose(a, np.where(WANTED, b, 0.0), atol=2e-5)
        for a, b in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(gradients), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-5)


def test_documents_have_it_whatever_they_are_packed_with() -> None:
    decoder = TEACHERS["same"]
    teacher = Teacher(random_params(decoder.config), decoder, Divergence())
    params = random_params(STUDENT.config)

    @jit
    def compared(rows: TokenRows) -> Any:
        wanted = jnp.ones(rows.tokens.shape, bool)
        return distilled_log_probs(params, rows, STUDENT, teacher, wanted=wanted).comparison

    together, apart = compared(packed()).divergence, compared(alone()).divergence
    expected = np.zeros_like(together)
    for i, (r, start, end) in enumerate([(0, 0, 5), (0, 5, 9), (1, 0, 7)]):
        expected[r, start:end] = apart[i, : end - start]
    np.testing.assert_allclose(together, expected, atol=2e-5)
    assert np.count_nonzero(expected) == 4 + 3 + 6  # none of a document's first token


def test_no_array_has_a_vocabulary_for_each_token() -> None:
    rows, wanted = packed(), jnp.asarray(WANTED)
    decoder = TEACHERS["same"]
    teacher = Teacher(random_params(decoder.config), decoder, Divergence(top_k=3))

    def loss(params: Any) -> Any:
        values = distilled_log_probs(params, rows, STUDENT, teacher, wanted=wanted)
        return values.comparison.divergence.sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(random_params(STUDENT.config)))
    assert "f32[1,6,11]" in text  # two rows by a chunk of three
    assert "2,10,11]" not in text and "[20,11]" not in text


def test_a_prompt_computed_once_gives_its_samples_the_same() -> None:
    """A prompt of three tokens, padded to four, and two samples, padded to three each."""
    tokens = np.asarray([[5, 3, 8, 0, 7, 2, 9, 6, 4, 0]], np.int32)
    positions = np.asarray([[0, 1, 2, 0, 3, 4, 5, 3, 4, 0]], np.int32)
    ids = np.asarray([[1, 1, 1, 0, 2, 2, 2, 3, 3, 0]], np.int32)
    sees = np.asarray([[[1, 1, 1, 0]] * 2], bool)
    whole = np.asarray([[5, 3, 8, 7, 2, 9], [5, 3, 8, 6, 4, 0]], np.int32)
    single = TokenRows(
        whole, np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6)), (whole > 0).astype(np.int32)
    )
    decoder, params = TEACHERS["same"], random_params(STUDENT.config)
    teacher = Teacher(random_params(decoder.config), decoder, Divergence())

    @jit
    def divergence(rows: TokenRows) -> Any:
        wanted = jnp.ones(rows.tokens.shape, bool)
        got = distilled_log_probs(params, rows, STUDENT, teacher, wanted=wanted)
        return got.comparison.divergence

    shared = divergence(TokenRows(tokens, positions, ids, prompt_of=sees))[0]
    alone = divergence(single)
    np.testing.assert_allclose(shared[4:7], alone[0, 3:], atol=2e-5)
    np.testing.assert_allclose(shared[7:9], alone[1, 3:5], atol=2e-5)
    assert shared[9] == 0 and np.all(np.asarray(alone[0, 3:]) > 1e-4)
