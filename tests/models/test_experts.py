"""Tokens travel to their experts and back: in turns and chunks, and nothing is lost."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.models.experts import Exchange, run_experts

# Each program runs once: spend no time on LLVM's optimisations. XLA's own passes are the same.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)
run = jit(run_experts, static_argnums=4)
EXPERTS, HIDDEN, INNER = 5, 6, 4


def make(tokens: int) -> tuple[Any, ...]:
    """Tokens that mostly want the same expert, their choices, and the experts' weights."""
    rng = np.random.default_rng(tokens)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    chosen = np.stack([rng.permutation(EXPERTS)[:2] for _ in range(tokens)])
    chosen[: tokens // 2] = [3, 1]
    weights = {
        "gate": normal(EXPERTS, HIDDEN, INNER),
        "up": normal(EXPERTS, HIDDEN, INNER),
        "down": normal(EXPERTS, INNER, HIDDEN),
    }
    made = normal(tokens, HIDDEN), chosen.astype(np.int32), normal(tokens, 2), weights
    return tuple(jax.tree.map(jnp.asarray, made))


def one_by_one(tokens: Any, chosen: Any, share: Any, weights: Any) -> jax.Array:
    """Every expert for every token, and of each token those that it chose."""
    inner = jax.nn.silu(jnp.einsum("nh,ehi->nei", tokens, weights["gate"]))
    inner = inner * jnp.einsum("nh,ehi->nei", tokens, weights["up"])
    found = jnp.einsum("nei,eih->neh", inner, weights["down"])
    wanted = jnp.sum(jax.nn.one_hot(chosen, EXPERTS) * share[..., None], axis=1)
    return jnp.einsum("neh,ne->nh", found, wanted)


@pytest.mark.parametrize(
    "exchange",
    [
        Exchange(1, 100),
        Exchange(1, 100, buffer=7),  # four rounds
        Exchange(1, 4),  # four chunks, the last one of a single token
        Exchange(1, 4, buffer=3),
    ],
)
def test_sums_and_gradients_are_those_of_every_expert_for_itself(exchange: Exchange) -> None:
    tokens, chosen, share, weights = make(13)
    seed = np.random.default_rng(0).standard_normal(tokens.shape, np.float32)

    def total(compute: Any, tokens: Any, share: Any, weights: Any) -> Any:
        found = compute(tokens, chosen, share, weights)
        return jnp.sum(found * seed), found

    def values(compute: Any) -> Any:
        grad = jax.value_and_grad(total, argnums=(1, 2, 3), has_aux=True)
        return jit(grad, static_argnums=0)(compute, tokens, share, weights)

    def travelling(*arguments: Any) -> jax.Array:
        return run_experts(*arguments, exchange)

    expected, actual = values(one_by_one), values(travelling)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_padding_goes_to_no_expert() -> None:
    tokens, chosen, share, weights = make(6)
    chosen = chosen.at[4:].set(EXPERTS)
    found = run(tokens, chosen, share, weights, Exchange(1, 100))
    alone = run(tokens[:4], chosen[:4], share[:4], weights, Exchange(1, 100))
    np.testing.assert_allclose(found[:4], alone, rtol=1e-5)
    assert not found[4:].any()


def test_a_tokens_sum_depends_on_no_other_token() -> None:
    tokens, chosen, share, weights = make(12)
    several = run(tokens, chosen, share, weights, Exchange(1, 5, buffer=4))
    for i in range(len(tokens)):
        one = [x[i : i + 1] for x in (tokens, chosen, share)]
        alone = run(*one, weights, Exchange(1, 100))[0]
        np.testing.assert_allclose(several[i], alone, rtol=1e-5)


def test_there_is_buffer_rows_half_of_an_even_share() -> None:
    assert Exchange(8, 100).buffer_rows(8 * 320) == 160
    assert Exchange(8, 100).buffer_rows(8 * 10) == 16  # but for a few in any case
    assert Exchange(8, 100).buffer_rows(12) == 12
    assert Exchange(1, 100).buffer_rows(4000) == 4000  # on one device all stay where they are
