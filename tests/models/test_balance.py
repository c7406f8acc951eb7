"""The balance of experts, in numbers worked out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.models.balance import load_figures, move_biases
from r1jax.models.experts import sequence_imbalance

# Four tokens and three experts, of which a token takes one.
SCORES = np.asarray([[0.6, 0.2, 0.2], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1], [0.9, 0.9, 0.2]])


def imbalance(rows: list[list[int]], scores: np.ndarray = SCORES, chosen: int = 1) -> list[float]:
    ids = jnp.asarray(rows, jnp.int32)
    each = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (*ids.shape, scores.shape[-1]))
    return sequence_imbalance(each, ids, chosen, segments=5).tolist()


def test_the_imbalance_of_a_sequence_by_hand() -> None:
    # Tokens 0, 1 and 2: f = 3/3 * (2, 1, 0), P = (1.2, 1.4, 0.4) / 3.
    assert imbalance([[1, 1, 1, 0]]) == pytest.approx([(2 * 1.2 + 1 * 1.4) / 3])
    # The last one: f = 3/1 * (1, 0, 0); scores that sum to 2 are taken as shares, 0.45, 0.45, 0.1.
    assert imbalance([[0, 0, 0, 2]]) == pytest.approx([3 * 0.45])


def test_sequences_of_a_row_are_counted_apart_and_padding_not_at_all() -> None:
    first, second = imbalance([[1, 1, 0, 0]])[0], imbalance([[0, 0, 1, 1]])[0]
    both = imbalance([[1, 1, 2, 2], [3, 3, 0, 0]])
    assert both == pytest.approx([first + second, first])
    assert imbalance([[0, 0, 0, 0]]) == [0]


def test_an_even_sequence_has_1_and_the_most_uneven_experts_over_chosen() -> None:
    even = np.asarray([[0.9, 0.8, 0, 0], [0, 0, 0.9, 0.8]] * 2)
    assert imbalance([[1] * 4], even, chosen=2) == pytest.approx([1])
    uneven = np.asarray([[0.5, 0.5, 0, 0]] * 4)
    assert imbalance([[1] * 4], uneven, chosen=2) == pytest.approx([2])


def test_the_loss_lowers_the_scores_of_what_is_chosen_too_often() -> None:
    ids = jnp.ones((1, 4), jnp.int32)

    def loss(scores: jax.Array) -> jax.Array:
        return sequence_imbalance(scores, ids, 1, segments=2).sum()

    scores = jnp.asarray(SCORES[None], jnp.float32)
    slopes = jax.grad(loss)(scores)[0].sum(axis=0)
    assert slopes[0] > 0 > slopes[2]  # expert 0 is the best of three tokens, expert 2 of none


def test_biases_move_against_the_load() -> None:
    params = {
        "embed": jnp.ones(2),
        "layers": {"router_bias": jnp.asarray([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])},
    }
    loads = {"layers": jnp.asarray([[6.0, 3.0, 0.0], [1.0, 1.0, 4.0]])}
    moved = move_biases(params, loads, 0.25)
    expected = [[0.25, 0.5, 0.75], [0.25, 0.25, -0.25]]
    np.testing.assert_allclose(moved["layers"]["router_bias"], expected)
    assert moved["embed"] is params["embed"]


def test_load_figures_by_hand() -> None:
    figures = load_figures({"layers": jnp.asarray([[6.0, 3.0, 0.0], [2.0, 2.0, 2.0]])})
    assert {name: float(value) for name, value in figures.items()} == pytest.approx(
        {"experts/max_load": 2.0, "experts/max_load_mean": 1.5, "experts/unused": 1 / 6}
    )
