"""Divergences to a teacher against their formulas in float64, with gradients by differences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.objectives.distillation import Divergence, compare_logits, sampled_advantages

VOCAB = 7
KINDS = [
    Divergence("reverse_kl"),
    Divergence("forward_kl"),
    Divergence("jsd", beta=0.5),
    Divergence("jsd", beta=0.1),
]


def logits(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, 2, (2, 3, 4, VOCAB))
    return student, teacher


def formula(student: np.ndarray, teacher: np.ndarray, divergence: Divergence) -> np.ndarray:
    """As the papers write it, of probabilities; the tail of the top k is one more event."""
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (student, teacher))
    if divergence.top_k is not None and divergence.top_k < VOCAB:
        order = np.argsort(-teacher, axis=-1)[..., : divergence.top_k]
        p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
        p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sum(a * np.log(a / b), axis=-1)

    if divergence.kind == "reverse_kl":
        return kl(p, q)
    if divergence.kind == "forward_kl":
        return kl(q, p)
    beta = divergence.beta
    mixture = beta * q + (1 - beta) * p
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


@pytest.mark.parametrize("top_k", [None, 1, 3, VOCAB])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_divergence_and_its_gradient(kind: Divergence, top_k: int | None) -> None:
    divergence = Divergence(kind.kind, kind.beta, top_k)
    student, teacher = logits()
    weights = np.random.default_rng(1).uniform(size=student.shape[:-1])

    def loss(student: Any) -> Any:
        values = compare_logits(student, jnp.asarray(teacher), divergence).divergence
        return jnp.sum(values * weights), values

    (_, values), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(student))
    np.testing.assert_allclose(values, formula(student, teacher, divergence), atol=2e-6)
    step, expected = 1e-5, np.zeros_like(student)
    for v in range(VOCAB):
        at = np.zeros_like(student)
        at[..., v] = step
        above, below = (formula(student + sign * at, teacher, divergence) for sign in (1, -1))
        expected[..., v] = weights * (above - below) / (2 * step)
    np.testing.assert_allclose(gradient, expected, atol=2e-6)


def test_the_tail_counts_as_one_and_never_adds() -> None:
    student, teacher = map(jnp.asarray, logits(3))
    for kind in KINDS:
        values = [
            compare_logits(student, teacher, Divergence(kind.kind, kind.beta, k)).divergence
            for k in (1, 2, 4, VOCAB, None)
        ]
        for fewer, more in zip(values, values[1:], strict=False):
            assert np.all(fewer <= more + 1e-6)
        np.testing.assert_allclose(values[-2], values[-1], atol=1e-6)  # all tokens are kept


def test_agreement_and_the_teacher_is_a_constant() -> None:
    student, teacher = map(jnp.asarray, logits(5))
    teacher = teacher.at[0].add(3 * student[0])
    compared = compare_logits(student, teacher, Divergence())
    np.testing.assert_array_equal(compared.agrees, student.argmax(-1) == teacher.argmax(-1))
    assert 0 < compared.agrees.mean() < 1
    by_teacher = jax.grad(lambda t: compare_logits(student, t, Divergence()).divergence.sum())
    assert np.all(by_teacher(teacher) == 0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("top_k", [None, 2])
def test_tokens_without_probability_leave_it_finite(kind: Divergence, top_k: int | None) -> None:
    divergence = Divergence(kind.kind, kind.beta, top_k)
    sharp = jnp.asarray([[0.0, -500.0, -900.0], [-1e30, 0.0, -1e30], [0.0, -1e30, 5.0]])
    flat = jnp.asarray([[0.0, 0.0, 0.0], [-1e30, 1.0, -1e30], [0.0, -1e30, 3.0]])
    for pair in ((sharp, flat), (flat, sharp)):

        def loss(student: Any, teacher: Any = pair[1]) -> Any:
            return compare_logits(student, teacher, divergence).divergence.sum()

        value, gradient = jax.value_and_grad(loss)(pair[0])
        assert np.isfinite(value) and np.all(np.isfinite(gradient))
        assert value >= 0


def test_sampled_advantages_are_an_estimate_of_the_gradient() -> None:
    student, teacher = map(jnp.asarray, logits(7))
    exact = jax.grad(lambda s: 0.3 * compare_logits(s, teacher, Divergence()).divergence.sum())(
        student
    )

    def surrogate(student: Any) -> Any:
        """The mean over all tokens that could be sampled, each with the policy's probability."""
        log_p, log_q = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
        flat_p, flat_q = (x.reshape(-1, VOCAB) for x in (log_p, log_q))
        advantages = sampled_advantages(flat_p, flat_q, 0.3)
        return -jnp.sum(jax.lax.stop_gradient(jnp.exp(flat_p)) * advantages * flat_p)

    np.testing.assert_allclose(jax.grad(surrogate)(student), exact, atol=2e-6)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 7\) and the teacher's \(2, 8\)"):
        compare_logits(jnp.ones((2, 7)), jnp.ones((2, 8)), Divergence())
    with pytest.raises(ValueError, match="teacher_log_probs has shape"):
        sampled_advantages(jnp.ones((2, 3)), jnp.ones((2, 1)))
