"""Weights of a directory, read into sharded arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from r1jax.models.config import Head, ModelConfig
from r1jax.models.parameters import (
    Params,
    ParamSpec,
    abstract_params,
    declare,
    declare_head,
    init_head,
    is_spec,
)
from r1jax.sharding import Layout
from r1jax.weights.hugging_face.directories import read_config, resolve
from r1jax.weights.hugging_face.fp8 import is_quantised, read_values
from r1jax.weights.hugging_face.names import check, head_names, stored_names
from r1jax.weights.hugging_face.tensor_files import Tensors


def load_params(
    path: str | Path,
    model: ModelConfig,
    layout: Layout,
    dtype: DTypeLike = jnp.float32,
    *,
    new_head: jax.Array | None = None,
) -> Params:
    """Reads weights into sharded arrays; those in fp8 become their values in `dtype`.

    One tensor is in host memory at a time, and of it only the part that this host's devices need:
    a layer is read, transferred and written into the stacked array, which only devices hold. Of
    experts, one of each device is in memory, and no expert of other hosts is read.

    `new_head`: a key. The directory then holds the decoder of `model` under another head (a reward
    model starts from a language model): that head is passed over, and the weights of
    `declare_head(model)`, these alone, are drawn from the key.

    Raises ValueError: as `check` and `is_quantised`, or the head that would be drawn is there.
    """
    directory = resolve(str(path))
    quantised = is_quantised(read_config(directory))
    tensors = Tensors(directory)
    declared, abstract = declare(model), abstract_params(model, layout, dtype)
    # A tied checkpoint may hold a copy of the embedding.
    ignored = head_names(model, "language") if model.tie_word_embeddings else set()
    if new_head is not None:
        new = head_names(model, model.head)
        if present := sorted(new & tensors.types.keys()):
            raise ValueError(
                f"{directory} has a {model.head} head already ({', '.join(present)}); load it "
                "without new_head, or a trained head would be lost"
            )
        ignored = head_names(model, *get_args(Head)) - new
        head = declare_head(model)
        declared = {name: node for name, node in declared.items() if name not in head}
        abstract = {name: abstract[name] for name in declared}
    check(tensors, declared, model, directory, quantised=quantised, ignored=ignored)

    def load(spec: ParamSpec, target: jax.ShapeDtypeStruct) -> jax.Array:
        names, kind = stored_names(spec), target.dtype
        if not spec.per_layer:
            return _read(tensors, names, spec, spec.shape, kind, target.sharding)
        # Experts come in rounds: in each, the next one of every shard.
        rounds = spec.shape[1] // layout.shards("expert") if spec.per_expert else 1
        shape = (spec.shape[1] // rounds, *spec.shape[2:])
        sharding = layout.sharding(spec.axes[1:])
        stack = jnp.zeros(spec.shape, kind, device=target.sharding)
        per_layer = len(names) // spec.shape[0]
        for layer, turn in np.ndindex(spec.shape[0], rounds):
            tensor_names = names[layer * per_layer : (layer + 1) * per_layer][turn::rounds]
            value = _read(tensors, tensor_names, spec, shape, kind, sharding)
            # Waiting keeps the host from reading ahead of the transfers.
            stack = _put(stack, value, np.int32(layer), np.int32(turn), target.sharding)
            stack = jax.block_until_ready(stack)
        return stack

    params: Params = jax.tree.map(load, declared, abstract, is_leaf=is_spec)
    if new_head is not None:
        params |= init_head(new_head, model, layout, dtype)
    return params


@partial(jax.jit, donate_argnums=0, static_argnums=4)
def _put(
    stack: jax.Array, value: jax.Array, layer: jax.Array, turn: jax.Array, sharding: NamedSharding
) -> jax.Array:
    """Writes a layer's `value`; of each of its rows, the `turn`-th in the stack's next dimension.

    [layers, rows * rounds, ...] and [rows, ...]: a row lies where its shard does.
    """
    rows, *rest = value.shape
    split = stack.reshape(stack.shape[0], rows, -1, *rest)
    zero = jnp.zeros_like(layer)
    start = [layer, zero, turn, *(zero for _ in rest)]
    split = jax.lax.dynamic_update_slice(split, value[None, :, None], start)
    return jax.lax.with_sharding_constraint(split.reshape(stack.shape), sharding)


Bounds = tuple[tuple[int, int], ...]  # [start, stop) by dimension


def _read(
    tensors: Tensors,
    names: list[str],
    spec: ParamSpec,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    sharding: NamedSharding,
) -> jax.Array:
    """A weight, or a layer of it, from its tensor, or from those of some of its experts."""

    def bounds_of(index: tuple[slice, ...] | None) -> Bounds:
        wanted = index or tuple(slice(None) for _ in shape)
        return tuple(s.indices(size)[:2] for s, size in zip(wanted, shape, strict=True))

    def read(bounds: Bounds) -> np.ndarray:
        if not spec.per_expert:
            return _read_part(tensors, names[0], spec, bounds, dtype)
        parts = (_read_part(tensors, n, spec, bounds[1:], dtype) for n in names[slice(*bounds[0])])
        return np.stack(list(parts))

    held = sharding.addressable_devices_indices_map(shape).values()
    # Devices with the same shard share one copy on the host. Tensor by tensor and in the file's
    # order: rows of which several devices need some columns are read once from a bucket.
    experts = int(spec.per_expert)
    wanted = sorted(
        {bounds_of(index) for index in held},
        key=lambda bounds: [*bounds[:experts], *_in_file(spec, bounds[experts:])],
    )
    shards = {bounds: read(bounds) for bounds in wanted}
    return jax.make_array_from_callback(shape, sharding, lambda index: shards[bounds_of(index)])


def _in_file(spec: ParamSpec, bounds: Bounds) -> list[tuple[int, int]]:
    """Bounds in the order of the file's dimensions (merged ones split), from those of a weight."""
    split = [(0, 0)] * len(bounds)
    for dimension, in_file in enumerate(spec.stored.order):
        split[in_file] = bounds[dimension]
    return split


def _read_part(
    tensors: Tensors, name: str, spec: ParamSpec, bounds: Bounds, dtype: DTypeLike
) -> np.ndarray:
    """The part `bounds` of a weight.

    A file merges dimensions ([heads * head_dim, hidden]), in which a range of heads is a range of
    rows; dimensions within a merged one are read whole and cut afterwards.
    """
    stored = spec.stored
    split = _in_file(spec, bounds)
    box, sizes, cut = [], [], []
    for group in _merged(stored.shape, stored.file_shape):
        start, stop = split[group[0]]
        inner = [stored.shape[i] for i in group[1:]]
        box.append(slice(start * math.prod(inner), stop * math.prod(inner)))
        sizes += [stop - start, *inner]
        cut += [slice(None), *(slice(*split[i]) for i in group[1:])]
    block = read_values(tensors, name, tuple(box)).reshape(sizes)[tuple(cut)]
    # A copy: what was read may be a view of the file.
    return np.array(block.transpose(stored.order), dtype, order="C")


def _merged(split: tuple[int, ...], file_shape: tuple[int, ...]) -> Iterator[list[int]]:
    """For each dimension of the file, those of `split` that it merges."""
    position = 0
    for size in file_shape:
        group = [position]
        while math.prod(split[i] for i in group) != size:
            group.append(group[-1] + 1)
        position = group[-1] + 1
        yield group
