"""Abstract arrays: shapes, dtypes and shardings of what programs read, without values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from r1jax.models import Decoder, abstract_params

if TYPE_CHECKING:
    from jaxtyping import PyTree

    # Its leaves are `jax.ShapeDtypeStruct`s with shardings.
    AbstractTree: TypeAlias = PyTree


def abstract_weights(model: Decoder) -> AbstractTree:
    return abstract_params(model.config, model.layout, model.execution.param_dtype)


def batch_array(model: Decoder, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """An array whose first dimension is split along the batch."""
    sharding = model.layout.sharding(("batch", *(None,) * (len(shape) - 1)), shape=shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def batch_arrays_like(arrays: Mapping[str, np.ndarray], model: Decoder) -> AbstractTree:
    """Arrays of these shapes and dtypes, each split along the batch."""
    return {name: batch_array(model, array.shape, array.dtype) for name, array in arrays.items()}


def token_arrays(model: Decoder, rows: int, time: int) -> dict[str, jax.ShapeDtypeStruct]:
    """`tokens`, `positions` and `segment_ids`, int32 [rows, time] each."""
    return {
        name: batch_array(model, (rows, time), jnp.int32)
        for name in ("tokens", "positions", "segment_ids")
    }


def expert_choices(model: Decoder, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The experts of tokens of this shape: [..., layers * k], split along the batch."""
    experts = model.config.experts
    assert experts is not None
    width = len(model.config.stacks["layers"]) * experts.num_experts_per_tok
    return batch_array(model, (*shape, width), experts.index_dtype)


def bytes_on_device(tree: AbstractTree) -> int:
    """Bytes of abstract arrays on one device, as they are split."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def bytes_by_kind(*named: Mapping[str, AbstractTree]) -> Counter[str]:
    """Bytes on one device by what they are; trees of the same name are added."""
    sizes: Counter[str] = Counter()
    for trees in named:
        for name, tree in trees.items():
            sizes[name] += bytes_on_device(tree)
    return sizes


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
