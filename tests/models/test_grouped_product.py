"""Products by group are those of each row with its own matrix, wherever groups begin and end."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.models.grouped_product import grouped_product

IN, OUT = 6, 4


@pytest.mark.parametrize(
    "sizes",
    [
        (32, 64, 32),  # whole blocks
        (1, 31, 33, 63),
        (0, 70, 0, 5, 0),
        (0, 0, 1),
        (40, 20),  # and rows of no group after them
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_and_gradients_are_those_of_each_row_alone(
    sizes: tuple[int, ...], dtype: Any
) -> None:
    rng = np.random.default_rng(len(sizes))
    count, beyond = sum(sizes), 9 if sizes == (40, 20) else 0

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    rows, weights = normal(count + beyond, IN), normal(len(sizes), IN, OUT)
    seed = normal(count, OUT)
    group = np.repeat(np.arange(len(sizes)), sizes)

    def grouped(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return grouped_product(rows, weights, jnp.asarray(sizes, jnp.int32))[:count]

    def alone(rows: jax.Array, weights: jax.Array) -> jax.Array:
        exactly = rows[:count].astype(jnp.float32), weights.astype(jnp.float32)[group]
        return jnp.einsum("ni,nio->no", *exactly).astype(dtype)

    def values(compute: Any) -> Any:
        found, pull = jax.vjp(compute, rows, weights)
        return found, *pull(seed)

    digits = {jnp.float32: 1e-5, jnp.bfloat16: 3e-2}[dtype]
    for a, b in zip(jax.jit(values, static_argnums=0)(grouped), values(alone), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=digits, atol=digits * 10)
