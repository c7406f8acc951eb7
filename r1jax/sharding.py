"""Logical axes on a device mesh: a sharding is a table, not code.

Arrays name their axes by meaning ("embed", "heads", "batch"); a `Layout` holds the mesh and the
table that maps those names to mesh axes. A new sharding is a new table.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]
Rules = Mapping[str, tuple[str, ...]]

# Weights are split over `fsdp` along one dimension and over `tensor` along another; activations
# over the batch. Mesh axes that a mesh does not have are dropped.
DEFAULT_RULES: Rules = {
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "layers": (),
    "batch": ("data", "fsdp"),
    "sample": (),
    "time": (),
    "activation_embed": (),
}


@dataclass(frozen=True)
class Layout:
    """A mesh and the table of logical axes; hashable, so it can be a static argument.

    `layout.constrain(x, ("batch", "time", None))` is a no-op on one device.
    """

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    def spec(
        self, axes: Axes, *, shape: tuple[int, ...] | None = None, name: str = ""
    ) -> PartitionSpec:
        """The partition of an array with these logical axes.

        Raises:
          ValueError: an unknown logical axis, two dimensions on one mesh axis, or (if `shape` is
            given) a dimension that its mesh axes do not divide. Names the array, axis and sizes.
        """
        table = dict(self.rules)
        used: dict[str, str] = {}
        parts: list[str | tuple[str, ...] | None] = []
        for index, axis in enumerate(axes):
            if axis is None:
                parts.append(None)
                continue
            if axis not in table:
                raise ValueError(
                    f"{name}: logical axis {axis!r} has no rule; known: {sorted(table)}"
                )
            targets = tuple(t for t in table[axis] if t in self.mesh.shape)
            for target in targets:
                if target in used:
                    raise ValueError(
                        f"{name}: logical axes {used[target]!r} and {axis!r} both map to mesh axis "
                        f"{target!r}; change one of the two rules"
                    )
                used[target] = axis
            size = math.prod(self.mesh.shape[t] for t in targets)
            if shape is not None and shape[index] % size:
                raise ValueError(
                    f"{name}: dimension {index} ({axis!r}, size {shape[index]}) is not divisible "
                    f"by {size}, the size of mesh axes {targets}; choose a size that divides "
                    f"{shape[index]}, or map {axis!r} to null in mesh.rules"
                )
            parts.append(targets[0] if len(targets) == 1 else (targets or None))
        return PartitionSpec(*parts)

    def sharding(
        self, axes: Axes, *, shape: tuple[int, ...] | None = None, name: str = ""
    ) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes, shape=shape, name=name))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def shards(self, axis: str) -> int:
        """Into how many parts the logical axis is split."""
        targets = dict(self.rules)[axis]
        return math.prod(self.mesh.shape[t] for t in targets if t in self.mesh.shape)

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))


def from_process_rows(rows: np.ndarray, layout: Layout) -> jax.Array:
    """This process's rows [n, ...] as its part of an array that is split along the batch.

    Raises:
      ValueError: the rows of all processes do not divide by the mesh's split of the batch.
    """
    sharding = layout.sharding(("batch", *(None,) * (rows.ndim - 1)))
    mine = set(jax.local_devices())
    placed = layout.sharding(("batch",)).devices_indices_map((layout.shards("batch"),))
    parts = len({str(index) for device, index in placed.items() if device in mine})
    if len(rows) % parts:
        raise ValueError(
            f"{len(rows)} rows do not divide by {parts}, the parts of the batch on this process; "
            "change the number of rows or mesh.axes"
        )
    return jax.make_array_from_process_local_data(sharding, rows)


def to_process_rows(array: jax.Array) -> np.ndarray:
    """The rows of an array split along the batch that this process's devices hold."""
    if array.is_fully_addressable:
        return np.asarray(array)
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def make_layout(
    axes: Mapping[str, int],
    overrides: Mapping[str, str | Sequence[str] | None] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """Arrange `devices` (default: all) as named axes; at most one size may be -1.

    Args:
      axes: mesh axis -> size, outermost first.
      overrides: logical axis -> mesh axis, several, or None; replaces the default rule.
    """
    devices = list(jax.devices() if devices is None else devices)
    known = math.prod(size for size in axes.values() if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in axes.values()]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh.axes = {dict(axes)} needs a multiple of {known} devices and there are "
            f"{len(devices)}; change the sizes, or use -1 for one of them"
        )
    rules = dict(DEFAULT_RULES)
    for logical, target in (overrides or {}).items():
        if logical not in rules:
            raise ValueError(
                f"mesh.rules.{logical}: no such logical axis; known: {', '.join(sorted(rules))}"
            )
        targets = () if target is None else (target,) if isinstance(target, str) else tuple(target)
        unknown = [t for t in targets if t not in axes]
        if unknown:
            raise ValueError(f"mesh.rules.{logical} = {target!r}: mesh axes are {', '.join(axes)}")
        rules[logical] = targets
    mesh = Mesh(
        np.asarray(devices).reshape(sizes), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
    )
    return Layout(mesh, tuple(sorted(rules.items())))


def split_cpu(devices: int | Literal["cores"]) -> None:
    """Let JAX's CPU be several devices, so that a batch split over them keeps every core busy.

    XLA runs the small operations of a decode loop on one core, however many there are. To be called
    before JAX starts; later it changes nothing. Accelerators are not concerned.

    Args:
      devices: `cores` is one per core, rounded down to a power of two, which batches divide by.
    """
    if devices == "cores":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        devices = 1 << ((cores or 1).bit_length() - 1)
    with contextlib.suppress(RuntimeError):  # JAX has already started
        jax.config.update("jax_num_cpu_devices", devices)


def single_device() -> Layout:
    """The layout of a program that runs on the first device alone."""
    return make_layout({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
