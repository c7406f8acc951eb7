"""The KL estimator by hand, and its expectation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.objectives.kl import k3_divergence


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
