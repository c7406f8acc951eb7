"""The KL estimators by hand, their expectations, and the expectations of their gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.objectives.advantages import penalise_advantages
from r1jax.objectives.kl import (
    divergence,
    k1_divergence,
    k2_divergence,
    k3_divergence,
    weighted_divergence,
)


@pytest.mark.parametrize("function", [k3_divergence, jax.jit(k3_divergence)])
def test_k3_by_hand(function: object) -> None:
    log_probs, reference = jnp.log(jnp.asarray([[0.5]])), jnp.log(jnp.asarray([[0.25]]))
    np.testing.assert_allclose(function(log_probs, reference), 0.5 - np.log(0.5) - 1, rtol=1e-6)
    assert function(log_probs, log_probs) == 0


def test_its_expectation_under_the_policy_is_the_divergence() -> None:
    policy, reference = np.asarray([[0.7, 0.2, 0.1]]), np.asarray([[0.3, 0.3, 0.4]])
    k3 = k3_divergence(jnp.log(policy), jnp.log(reference))
    assert (k3 >= 0).all()
    divergence = np.sum(policy * np.log(policy / reference))
    np.testing.assert_allclose(np.sum(policy * k3), divergence, rtol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    log_probs = jnp.zeros((4, 6))
    with pytest.raises(ValueError, match=r"reference_log_probs has shape \(4, 1\).*\(4, 6\)"):
        k3_divergence(log_probs, jnp.zeros((4, 1)))
    with pytest.raises(ValueError, match=r"log_probs has shape \(6,\)"):
        k3_divergence(jnp.zeros(6), jnp.zeros(6))
    with pytest.raises(ValueError, match="reference_log_probs has dtype int32"):
        k3_divergence(log_probs, jnp.zeros((4, 6), jnp.int32))


def test_k1_and_k2_by_hand() -> None:
    log_probs, reference = jnp.log(jnp.asarray([[0.5]])), jnp.log(jnp.asarray([[0.25]]))
    for k1, k2 in (
        (k1_divergence, k2_divergence),
        (jax.jit(k1_divergence), jax.jit(k2_divergence)),
    ):
        np.testing.assert_allclose(k1(log_probs, reference), np.log(2), rtol=1e-6)
        np.testing.assert_allclose(k2(log_probs, reference), np.log(2) ** 2 / 2, rtol=1e-6)


LOGITS = np.asarray([0.9, -0.2, 0.4, -1.5])
REFERENCE = np.log([0.1, 0.3, 0.35, 0.25])
SAMPLED = np.log([0.4, 0.3, 0.2, 0.1])  # of the policy that sampled, where it is another one


def mean_gradient(loss: object, sampled: np.ndarray | None = None) -> np.ndarray:
    """The gradient by logits of a token's loss(log pi), on average over tokens that were drawn."""

    def mean(logits: jax.Array) -> jax.Array:
        x = jax.nn.log_softmax(logits)
        probs = jax.lax.stop_gradient(jnp.exp(x if sampled is None else jnp.asarray(sampled)))
        return jnp.sum(probs * loss(x[:, None])[:, 0])

    return np.asarray(jax.grad(mean)(jnp.asarray(LOGITS)))


def of_kl() -> np.ndarray:
    """The gradient of KL itself, from all tokens."""

    def kl(logits: jax.Array) -> jax.Array:
        x = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(x) * (x - REFERENCE))

    return np.asarray(jax.grad(kl)(jnp.asarray(LOGITS)))


def test_which_estimators_have_the_gradient_of_kl() -> None:
    with jax.enable_x64(True):
        reference, old = jnp.asarray(REFERENCE)[:, None], jnp.asarray(SAMPLED)[:, None]
        expected = of_kl()
        assert np.abs(expected).max() > 0.1
        by_name = {
            name: mean_gradient(lambda x, n=name: divergence(x, reference, n))
            for name in ("k1", "k2", "k3")
        }
        np.testing.assert_allclose(by_name["k1"], 0, atol=1e-12)  # it penalises nothing
        np.testing.assert_allclose(by_name["k2"], expected, atol=1e-12)
        assert np.abs(by_name["k3"] - expected).max() > 0.05
        for name in ("k1", "k2", "k3"):
            # Weighted by the ratio all have it, on policy and off.
            for sampled, before in ((None, None), (SAMPLED, old)):

                def loss(x: jax.Array, n: str = name, b: jax.Array | None = before) -> jax.Array:
                    start = jax.lax.stop_gradient(x) if b is None else b
                    return weighted_divergence(jnp.exp(x - start), x, reference, n)

                np.testing.assert_allclose(mean_gradient(loss, sampled), expected, atol=1e-12)

        def in_reward(x: jax.Array, name: str) -> jax.Array:
            kl = divergence(x, reference, name)
            return -x * penalise_advantages(0 * x, kl, 1.0, jnp.ones(x.shape))

        np.testing.assert_allclose(
            mean_gradient(lambda x: in_reward(x, "k1")), expected, atol=1e-12
        )
        for name in ("k2", "k3"):  # other penalties
            assert np.abs(mean_gradient(lambda x, n=name: in_reward(x, n)) - expected).max() > 0.05
    with pytest.raises(ValueError, match=r"ratio has shape \(4, 1\)"):
        weighted_divergence(jnp.zeros((4, 1)), jnp.zeros((4, 6)), jnp.zeros((4, 6)), "k3")
