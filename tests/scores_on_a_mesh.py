"""Scores of rows that eight devices share, beside those of one; prints the largest differences."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.models.log_probs import (
    TargetLogProbs,
    _TeacherTokens,
    _wanted_log_probs,
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
        scores = chunked_log_probs(
            hidden, matrix, targets, chunk=chunk, temperature=0.7, layout=layout, most_likely=True
        )
        some = wanted_log_probs(
            hidden, matrix, targets, wanted, chunk=chunk, temperature=0.7, layout=layout
        )
        sums = [
            jnp.sum(each.log_probs * weights) + jnp.sum(each.entropy) for each in (scores, some)
        ]
        total, compared = sums[0] + 2 * sums[1], []
        for divergence in (Divergence(), Divergence("jsd", beta=0.3, top_k=5)):
            teacher = _TeacherTokens(others, other_matrix, divergence, 0.9)
            each = _wanted_log_probs(
                *(hidden, matrix, targets, wanted),
                chunk=chunk,
                temperature=0.7,
                layout=layout,
                teacher=teacher,
            )
            assert each.comparison is not None
            total = total + jnp.sum(each.comparison.divergence * weights)
            compared.append(each)
        return total, (scores, some, *compared)

    found = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), static_argnums=2)
    one, all_of_them = found(hidden, matrix, None), found(hidden, matrix, layout)
    return {
        jax.tree_util.keystr(path): float(np.abs(a - b).max())
        for (path, a), b in zip(
            jax.tree.leaves_with_path(jax.device_get(one)),
            jax.tree.leaves(jax.device_get(all_of_them)),
            strict=True,
        )
    }


if __name__ == "__main__":
    cases = [
        ({"sequence": 8}, 2),
        ({"data": 2, "sequence": 4}, 3),
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, 64),
    ]
    print(json.dumps([differences(*case) for case in cases]))
