"""Compiles small programs for eight CPU devices and prints what the planner reads in them."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax.planner import hlo

MESH = {"a": 2, "b": 4}


def read(function: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    cost = hlo.cost(hlo.parse(text), **options)
    return {
        "flops": cost.flops,
        "collectives": [
            [each.kind, hlo.axes_of(each.group, MESH), each.bytes, each.times]
            for each in cost.collectives
        ],
    }


def main() -> dict[str, Any]:
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), tuple(MESH))

    def split(*axes: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    def array(shape: tuple[int, ...], *axes: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split(*axes))

    def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    def shards(specs: Any, out: Any, function: Any) -> Any:
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)

    rows, one = PartitionSpec(("a", "b")), PartitionSpec()
    summed = shards(rows, one, lambda x: jax.lax.psum(x, "b"))
    gathered = shards(rows, one, lambda x: jax.lax.all_gather(x, "a"))

    def many(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, y: y + summed(y * 2)[0, 0], x)

    def until(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: jnp.tanh(x @ weights), x)

    whole = array((64, 16))
    return {
        "scan": read(layers, whole, array((5, 16, 16))),
        "grad": read(jax.grad(lambda w, x: layers(x, w).sum()), array((5, 16, 16)), whole),
        "psum": read(summed, array((64, 16), ("a", "b"))),
        "gather": read(gathered, array((64, 16), ("a", "b"))),
        "in a loop": read(many, array((64, 16), ("a", "b"))),
        "until": read(until, whole, array((16, 16)), unknown_trips=7),
    }


if __name__ == "__main__":
    print(json.dumps(main()))
