"""Rows that are sorted by group, each times its group's matrix: the product of a device's experts.

XLA has it as a ragged dot, which is fast where XLA has a kernel for it. Where it has none, it
multiplies every row by every group's matrix and keeps one of the results; there, the groups are cut
into blocks of rows with one matrix each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_BLOCK = 32  # rows of a block on the CPU: small against a group, large against the cost of a loop


@jax.custom_vjp
def grouped_product(
    rows: Float[Array, "n features_in"],
    weights: Float[Array, "groups features_in features_out"],
    sizes: Int[Array, " groups"],
) -> Float[Array, "n features_out"]:
    """Rows, sorted by group, each times its group's matrix.

    Rows that follow the last group's are not computed on TPU: undefined.

    Args:
      sizes: rows of each group.
    """
    return jax.lax.platform_dependent(
        rows, weights, sizes, cpu=_product_cpu, default=jax.lax.ragged_dot
    )


def _forward(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> Any:
    return grouped_product(rows, weights, sizes), (rows, weights, sizes)


def _backward(residuals: Any, gradient: jax.Array) -> Any:
    rows, weights, sizes = residuals
    d_rows = grouped_product(gradient, weights.swapaxes(1, 2), sizes)
    # XLA's gradient of the weights multiplies, on TPU, every row for every group.
    d_weights = jax.lax.platform_dependent(
        rows,
        gradient,
        sizes,
        cpu=_outer_products_cpu,
        tpu=_outer_products_tpu,
        default=_outer_products,
    )
    return d_rows, d_weights.astype(weights.dtype), None


grouped_product.defvjp(_forward, _backward)


def _outer_products(rows: jax.Array, gradient: jax.Array, sizes: jax.Array) -> jax.Array:
    """Of each group, the sum of its rows' outer products with the gradient, float32."""
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return jax.lax.ragged_dot_general(
        rows, gradient, sizes, dimensions, preferred_element_type=jnp.float32
    )


def _outer_products_tpu(rows: jax.Array, gradient: jax.Array, sizes: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tile = 512 if len(rows) % 512 == 0 else 128
    rows, gradient = (jnp.pad(x, ((0, -len(x) % tile), (0, 0))) for x in (rows, gradient))
    tiles = (tile, min(512, rows.shape[1]), min(1024, gradient.shape[1]))
    return tgmm(rows.swapaxes(0, 1), gradient, sizes, jnp.float32, tiles)


# --- In blocks -----------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """How groups fall into blocks of rows; a block has rows of one group, and then empty ones.

    group: int32 [blocks], of each block. rows: int32 [blocks, _BLOCK], the row in each place;
    beyond the last one: padding. places: int32 [n], of each row among all blocks' rows;
    undefined for rows that follow the last group's.
    """

    group: jax.Array
    rows: jax.Array
    places: jax.Array


def _blocks(count: int, sizes: jax.Array) -> _Blocks:
    groups = len(sizes)
    blocks = -(-count // _BLOCK) + groups - 1  # enough, wherever groups end
    last_row, last_block = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // _BLOCK))

    def group_of(ends: jax.Array, positions: int) -> jax.Array:
        after = jnp.arange(positions, dtype=jnp.int32)[:, None] >= ends
        return jnp.minimum(jnp.sum(after, axis=1, dtype=jnp.int32), groups - 1)

    # How far a group's rows move to begin with a block.
    moved = (last_block - -(-sizes // _BLOCK)) * _BLOCK - (last_row - sizes)
    group = group_of(last_block, blocks)
    rows = jnp.arange(blocks * _BLOCK, dtype=jnp.int32).reshape(blocks, _BLOCK)
    rows = rows - moved[group][:, None]
    places = jnp.arange(count, dtype=jnp.int32) + moved[group_of(last_row, count)]
    return _Blocks(group, jnp.where(rows < last_row[group][:, None], rows, count), places)


def _product_cpu(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    group, inside, places = _blocks(len(rows), sizes)
    blocks = rows.at[inside].get(mode="fill", fill_value=0)
    results = jax.lax.map(lambda block: block[0] @ weights[block[1]], (blocks, group))
    return results.reshape(-1, results.shape[-1]).at[places].get(mode="fill", fill_value=0)


def _outer_products_cpu(rows: jax.Array, gradient: jax.Array, sizes: jax.Array) -> jax.Array:
    """As `_outer_products`."""
    group, inside, _ = _blocks(len(rows), sizes)

    def add(sums: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        rows, gradient, group = block
        product = jnp.matmul(rows.T, gradient, preferred_element_type=jnp.float32)
        return sums.at[group].add(product), None

    sums = jnp.zeros((len(sizes), rows.shape[1], gradient.shape[1]), jnp.float32)
    blocks = (x.at[inside].get(mode="fill", fill_value=0) for x in (rows, gradient))
    return jax.lax.scan(add, sums, (*blocks, group))[0]
