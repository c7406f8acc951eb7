"""Scores of rows that eight devices share, beside those of one; prints the largest differences."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.models.chunked_log_probs import (
    Chunks,
    TargetLogProbs,
    TeacherTokens,
    chunked_log_probs,
    wanted_log_probs,
)
from r1jax.objectives.distillation import Divergence
from r1jax.sharding import Layout, make_layout

VOCAB = 13  # which no number of devices divides


def differences(axes: dict[str, int], chunk: int) -> dict[str, float]:
    layout = make_layout(axes, {"vocab": None}, jax.devices())
    rng = np.random.default_rng(0)
    hidden, matrix, weights = (
        jnp.asarray(rng.standard_normal(shape, np.float32))
        for shape in ((2, 16, 6), (6, VOCAB), (2, 16))
    )
    # Two tokens that are equally likely, and the most: the first of them counts.
    matrix = matrix.at[:, VOCAB - 1].set(matrix[:, 0])
    targets = jnp.asarray(rng.integers(0, VOCAB, (2, 16)), jnp.int32)

    # Of one row most tokens, of the other few: devices have different numbers of chunks.
    wanted = jnp.asarray(rng.random((2, 16)) < np.asarray([[0.8], [0.1]]))

    # A teacher, which has a token less.
    others, other_matrix = (
        jnp.asarray(rng.standard_normal(shape, np.float32))
        for shape in ((2, 16, 4), (4, VOCAB - 1))
    )

    def value(
        hidden: jax.Array, matrix: jax.Array, layout: Layout | None
    ) -> tuple[jax.Array, tuple[TargetLogProbs, ...]]:
        given, chunks = (hidden, matrix, targets), Chunks(chunk, layout)
        scores = chunked_log_probs(*given, chunks=chunks, temperature=0.7, most_likely=True)
        some = wanted_log_probs(*given, wanted, chunks=chunks, temperature=0.7)
        sums = [
            jnp.sum(each.log_probs * weights) + jnp.sum(each.entropy) for each in (scores, some)
        ]
        total, compared = sums[0] + 2 * sums[1], []
        for divergence in (Divergence(), Divergence("jsd", beta=0.3, top_k=5)):
            teacher = TeacherTokens(others, other_matrix, divergence, 0.9)
            each = wanted_log_probs(*given, wanted, chunks=chunks, temperature=0.7, teacher=teacher)
            assert each.comparison is not None
            total = total + jnp.sum(each.comparison.divergence * weights)
            compared.append(each)
        return total, (scores, some, *compared)

    def bonus(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        chunks = Chunks(chunk, layout)
        some = wanted_log_probs(hidden, matrix, targets, wanted, chunks=chunks, temperature=0.7)
        return jnp.sum(some.entropy * weights)

    of_bonus = jax.jit(jax.grad(bonus, argnums=(0, 1)))(hidden, matrix)
    by_hand = entropy_gradients(*(np.asarray(x) for x in (hidden, matrix, wanted * weights)), 0.7)
    errors = {
        f"gradient of the entropy by {name}": float(np.abs(np.asarray(got) - exact).max())
        for name, got, exact in zip(("hidden", "matrix"), of_bonus, by_hand, strict=True)
    }

    found = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), static_argnums=2)
    one, all_of_them = found(hidden, matrix, None), found(hidden, matrix, layout)
    return errors | {
        jax.tree_util.keystr(path): float(np.abs(a - b).max())
        for (path, a), b in zip(
            jax.tree.leaves_with_path(jax.device_get(one)),
            jax.tree.leaves(jax.device_get(all_of_them)),
            strict=True,
        )
    }


def entropy_gradients(
    hidden: np.ndarray, matrix: np.ndarray, weights: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of the sum of weights * H in float64, all logits at once: dH/dz_k = -p_k (log p_k + H)."""
    hidden, matrix = hidden.astype(np.float64), matrix.astype(np.float64)
    logits = hidden @ matrix / temperature
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    entropy = -(np.exp(logs) * logs).sum(axis=-1, keepdims=True)
    by_logits = -np.exp(logs) * (logs + entropy) * weights[..., None] / temperature
    return by_logits @ matrix.T, np.einsum("bth,btv->hv", hidden, by_logits)


if __name__ == "__main__":
    cases = [
        ({"sequence": 8}, 2),
        ({"data": 2, "sequence": 4}, 3),
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, 64),
    ]
    print(json.dumps([differences(*case) for case in cases]))
