"""Logical axes on a device mesh: a sharding is a table, not code.

Arrays name their axes by meaning ("embed", "heads", "batch"); a `Layout` holds the mesh and the
table that maps those names to mesh axes. A new sharding is a new table.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")  # a pytree of arrays
Axes = tuple[str | None, ...]
Rules = Mapping[str, tuple[str, ...]]

# Weights are split over `fsdp` along one dimension and over `tensor` along another; activations
# over the batch, and over time where there is a `sequence` axis, which then splits the weights
# like `fsdp`: its devices, too, would otherwise hold copies. Attention sees whole rows: there,
# `sequence` splits the heads instead (DeepSpeed-Ulysses, arXiv 2309.14509). The devices of an
# `expert` axis hold different experts and different rows of the batch, and split the other weights
# like `fsdp`. Mesh axes that a mesh does not have are dropped.
DEFAULT_RULES: Rules = {
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert", "sequence"),
    "expert_embed": ("fsdp", "sequence"),  # of a weight that `expert` splits already
    "latent": ("fsdp", "sequence"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "layers": (),
    "batch": ("data", "fsdp", "expert"),
    "sample": (),
    "time": ("sequence",),
    "attention_heads": ("tensor", "sequence"),
    "activation_embed": (),
}

# A decoded token has no time to split: the devices of a `sequence` axis take more prompts. And it
# waits for every weight that is gathered: the devices of an `expert` axis replicate what is not in
# an expert.
ROLLOUT_RULES: Rules = {
    **DEFAULT_RULES,
    "embed": ("fsdp", "sequence"),
    "batch": ("data", "fsdp", "expert", "sequence"),
    "time": (),
    "attention_heads": ("tensor",),
}


class UnevenError(ValueError):
    """A mesh does not divide a dimension of an array. `mesh_axes`: those that were to split it."""

    def __init__(self, message: str, mesh_axes: tuple[str, ...]) -> None:
        super().__init__(message)
        self.mesh_axes = mesh_axes


@dataclass(frozen=True)
class StandIn:
    """What devices stand in for, where nothing is computed: their platform, on how many hosts.

    memory: bytes of a device, where that is known.
    """

    platform: str
    hosts: int
    memory: int | None = None


@dataclass(frozen=True)
class Layout:
    """A mesh and the table of logical axes; hashable, so it can be a static argument.

    `layout.constrain(x, ("batch", "time", None))` is a no-op on one device.

    apart: of two groups of devices, of which one trains while the other samples.
    one_slice: every process reads the whole batch, whatever parts its devices hold.
    """

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]
    stands_for: StandIn | None = None
    apart: bool = False
    one_slice: bool = False

    @property
    def platform(self) -> str:
        """Of the devices, or of those that they stand in for: `cpu`, `gpu` or `tpu`."""
        if self.stands_for is not None:
            return self.stands_for.platform
        return str(self.mesh.devices.flat[0].platform)

    def spec(
        self, axes: Axes, *, shape: tuple[int, ...] | None = None, name: str = ""
    ) -> PartitionSpec:
        """The partition of an array with these logical axes.

        Raises:
          ValueError: an unknown logical axis, or two dimensions on one mesh axis.
          UnevenError: `shape` has a dimension that its mesh axes do not divide. Names the array,
            axis and sizes.
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
            targets = table[axis]
            for target in targets:
                if target in used:
                    raise ValueError(
                        f"{name}: logical axes {used[target]!r} and {axis!r} both map to mesh axis "
                        f"{target!r}; change one of the two rules"
                    )
                used[target] = axis
            size = math.prod(self.mesh.shape[t] for t in targets)
            if shape is not None and shape[index] % size:
                raise UnevenError(
                    f"{name}: dimension {index} ({axis!r}, size {shape[index]}) is not divisible "
                    f"by {size}, the size of mesh axes {targets}; make it "
                    f"{_either(_divisors(shape[index], self.mesh.size))}, or map {axis!r} to null "
                    "in mesh.rules",
                    targets,
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
        """The number of parts that the logical axis is split into."""
        return math.prod(self.mesh.shape[t] for t in dict(self.rules)[axis])

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))


def from_process_rows(rows: np.ndarray, layout: Layout) -> jax.Array:
    """This process's rows [n, ...] as its slice of an array that is split along the batch.

    They fill the parts of the slice, in the batch's order; these need not be neighbours, since a
    TPU slice's devices are not arranged host by host, and its devices may hold some of them only. A
    scalar, equal on all processes, is replicated.

    Raises:
      ValueError: the rows do not divide by the process's parts of the batch.
    """
    if not np.ndim(rows):
        return jax.make_array_from_callback((), layout.replicated, lambda _: np.asarray(rows))
    sharding = layout.sharding(("batch", *(None,) * (rows.ndim - 1)))
    parts = process_batch_parts(layout)
    if len(rows) % len(parts):
        raise ValueError(
            f"{len(rows)} rows do not divide by {len(parts)}, the parts of the batch of this "
            "process; change the number of rows or mesh.axes"
        )
    size = len(rows) // len(parts)
    first_row = {part * size: i * size for i, part in enumerate(parts)}

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        first = first_row[index[0].start or 0]
        return rows[first : first + size]

    shape = (size * layout.shards("batch"), *rows.shape[1:])
    return jax.make_array_from_callback(shape, sharding, piece)


def move_rows(rows: Tree, layout: Layout) -> Tree:
    """A pytree of arrays [n, ...] of the same devices, split along the batch as `layout` says.
    Scalars are replicated."""

    def sharding(leaf: jax.Array) -> NamedSharding:
        if not leaf.ndim:
            return layout.replicated
        return layout.sharding(("batch", *(None,) * (leaf.ndim - 1)), shape=leaf.shape, name="rows")

    moved: Tree = jax.jit(_same, out_shardings=jax.tree.map(sharding, rows))(rows)
    return moved


def _same(tree: Tree) -> Tree:
    return tree


def same_devices(one: Layout, other: Layout) -> bool:
    return set(one.mesh.devices.flat) == set(other.mesh.devices.flat)


def process_batch_parts(layout: Layout, process: int | None = None) -> list[int]:
    """Indices of the batch's equal parts in the slice of a process (default: this one)."""
    process = jax.process_index() if process is None else process
    held = _held_parts(layout)[process]
    return next(parts for parts in batch_slices(layout) if not held.isdisjoint(parts))


@functools.cache
def batch_slices(layout: Layout) -> list[list[int]]:
    """The slices of the batch that processes have, as indices of its parts; in the batch's order.

    They are apart and equally large. Processes whose devices hold a part in common (a tensor axis
    that spans hosts) have one slice, the parts of all of them: each reads and scores all its rows,
    and gives its devices what they hold. Where that makes unequal slices, some are joined.
    """
    slices: list[set[int]] = []
    for held in _held_parts(layout).values():
        apart = [parts for parts in slices if parts.isdisjoint(held)]
        slices = [*apart, held.union(*(parts for parts in slices if parts not in apart))]
    slices = [set().union(*slices)] if layout.one_slice else _equalised(slices)
    return sorted(sorted(parts) for parts in slices)


def _equalised(slices: Sequence[set[int]]) -> list[set[int]]:
    """Equally large unions of the slices: the smallest for which the largest first fit."""
    in_order = sorted(slices, key=lambda parts: (-len(parts), min(parts)))
    total = sum(map(len, slices))
    for size in (n for n in _divisors(total, total) if n >= len(in_order[0])):
        joined: list[set[int]] = []
        for parts in in_order:
            into = next((each for each in joined if len(each) + len(parts) <= size), None)
            if into is None:
                joined.append(set(parts))
            else:
                into |= parts
        if len(joined) * size == total:
            break
    return joined


def in_same_slices(one: Layout, other: Layout) -> tuple[Layout, Layout]:
    """Layouts in which a process has the same slice, so that it trains on what it has sampled.

    Where the two split the batch differently over processes, every process has the whole batch.
    """
    if _slice_of_each(one) == _slice_of_each(other):
        return one, other
    return replace(one, one_slice=True), replace(other, one_slice=True)


def slices_within(layout: Layout, other: Layout) -> bool:
    """Whether processes with the same slice of a batch in `layout` have the same in `other`, too.

    The same processes have devices of both.
    """
    first, second = _slice_of_each(layout), _slice_of_each(other)
    pairs = {(index, second[process]) for process, index in first.items()}
    return len(pairs) == len(set(first.values()))


def _slice_of_each(layout: Layout) -> dict[int, int]:
    """Of each process that has devices of the mesh, the index of its slice."""
    slices = batch_slices(layout)
    return {
        process: next(i for i, parts in enumerate(slices) if not held.isdisjoint(parts))
        for process, held in _held_parts(layout).items()
    }


@functools.cache  # a mesh may have hundreds of devices, and every batch asks
def _held_parts(layout: Layout) -> dict[int, set[int]]:
    """Of each process that has devices of the mesh, the parts of the batch that they hold.

    Devices that stand in for others are on as many hosts as those, in order.
    """
    places = layout.sharding(("batch",)).devices_indices_map((layout.shards("batch"),))
    devices = list(layout.mesh.devices.flat)
    held: dict[int, set[int]] = {}
    for i, device in enumerate(devices):
        process = device.process_index
        if layout.stands_for is not None:
            process = i * layout.stands_for.hosts // len(devices)
        held.setdefault(process, set()).add(places[device][0].start or 0)
    return held


@functools.cache
def _lacks_rows(layout: Layout) -> bool:
    """Whether a process's devices hold some, but not all, parts of its slice of the batch."""
    return any(
        len(held) < len(process_batch_parts(layout, process))
        for process, held in _held_parts(layout).items()
    )


def constrain_to_read(rows: jax.Array, layout: Layout) -> jax.Array:
    """In a compiled program: rows of the batch, so that `to_process_rows` need not gather them."""
    first = None if _lacks_rows(layout) else "batch"
    return layout.constrain(rows, (first, *(None,) * (rows.ndim - 1)))


def to_process_rows(array: jax.Array, layout: Layout) -> np.ndarray:
    """The rows of this process's slice of an array that is split along the batch; a scalar.

    All processes have to call it in the same order: devices of others may hold some of the rows.
    """
    if array.is_fully_addressable or not array.ndim:
        return np.asarray(array)
    if _lacks_rows(layout):
        if not array.is_fully_replicated:
            array = jax.jit(_same, out_shardings=layout.replicated)(array)
        rows = np.asarray(array.addressable_data(0))
        in_parts = np.split(rows, layout.shards("batch"))
        return np.concatenate([in_parts[part] for part in process_batch_parts(layout)])
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def split_devices(
    devices: Sequence[jax.Device], sampling: int
) -> tuple[list[jax.Device], list[jax.Device]]:
    """Two groups of devices: those that train, and `sampling` ones that sample.

    Each process has as many of a group, its last devices sample. Both are in the processes' order.

    Raises:
      ValueError: the processes cannot have equally many, or a group would be empty.
    """
    processes = sorted({device.process_index for device in devices})
    each, rest = divmod(sampling, len(processes))
    if rest:
        raise ValueError(
            f"mesh.rollout.devices = {sampling} is not a multiple of {len(processes)}, the "
            "processes, each of which has devices that sample and devices that train"
        )
    training: list[jax.Device] = []
    rollout: list[jax.Device] = []
    for process in processes:
        of_process = sorted((d for d in devices if d.process_index == process), key=lambda d: d.id)
        if len(of_process) <= each:
            raise ValueError(
                f"mesh.rollout.devices = {sampling} of {len(devices)} devices leaves none to train "
                f"in process {process}, which has {len(of_process)}; lower it"
            )
        training += of_process[:-each]
        rollout += of_process[-each:]
    return training, rollout


def make_layout(
    axes: Mapping[str, int],
    overrides: Mapping[str, str | Sequence[str] | None] | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    in_order: bool = False,
) -> Layout:
    """Arrange `devices` (default: all) as named axes; at most one size may be -1.

    On a TPU neighbours on an axis are neighbours in the slice. Over several slices, the first axis
    that is larger than 1 crosses them: their network (DCN) is the slow one.

    Args:
      axes: mesh axis -> size, outermost first.
      overrides: logical axis -> mesh axis, several, or None; replaces the default rule.
      in_order: keep the order of `devices` on a TPU, too, as of a group of `split_devices`.

    Raises:
      ValueError: the sizes do not make up the devices, a rule names what does not exist, or an axis
        larger than 1 splits nothing.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes(axes, len(devices), "mesh.axes")
    rules = _override(DEFAULT_RULES, overrides or {}, axes, "mesh.rules")
    sized = dict(zip(axes, sizes, strict=True))
    mesh = np.asarray(devices).reshape(sizes) if in_order else _arrange(devices, sized)
    return _layout(mesh, axes, rules)


def make_rollout_layout(
    training: Layout,
    axes: Mapping[str, int] | None = None,
    overrides: Mapping[str, str | Sequence[str] | None] | None = None,
    *,
    inherited: Mapping[str, str | Sequence[str] | None] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """The same devices as those of `training`, arranged for sampling.

    Their order is the same, so that one compiled program can move weights from one layout to the
    other.

    Args:
      axes: as in `make_layout`; default: those of `training`.
      overrides: rules in place of the default ones for sampling.
      inherited: the config's rules for training; `overrides` take precedence.
      devices: others than those of `training`, in their order.

    Raises:
      ValueError: as `make_layout`.
    """
    mesh = training.mesh
    named = dict(mesh.shape) if axes is None else axes
    arranged = mesh.devices if devices is None else np.asarray(devices)
    sizes = _sizes(named, arranged.size, "mesh.rollout.axes")
    rules = _override(ROLLOUT_RULES, inherited or {}, {**mesh.shape, **named}, "mesh.rules")
    rules = _override(rules, overrides or {}, named, "mesh.rollout.rules")
    rollout = _layout(arranged.reshape(sizes), named, rules)
    return replace(rollout, stands_for=training.stands_for, apart=training.apart)


def _sizes(axes: Mapping[str, int], devices: int, field: str) -> list[int]:
    known = math.prod(size for size in axes.values() if size != -1)
    sizes = [devices // known if size == -1 else size for size in axes.values()]
    if math.prod(sizes) != devices:
        raise ValueError(
            f"{field} = {dict(axes)} needs a multiple of {known} devices and there are "
            f"{devices}; change the sizes, or use -1 for one of them"
        )
    return sizes


def _override(
    rules: Rules,
    overrides: Mapping[str, str | Sequence[str] | None],
    axes: Mapping[str, int],
    field: str,
) -> dict[str, tuple[str, ...]]:
    rules = dict(rules)
    for logical, target in overrides.items():
        if logical not in rules:
            raise ValueError(
                f"{field}.{logical}: no such logical axis; known: {', '.join(sorted(rules))}"
            )
        targets = () if target is None else (target,) if isinstance(target, str) else tuple(target)
        if any(t not in axes for t in targets):
            raise ValueError(f"{field}.{logical} = {target!r}: mesh axes are {', '.join(axes)}")
        rules[logical] = targets
    return rules


def _layout(devices: np.ndarray, axes: Mapping[str, int], rules: Rules) -> Layout:
    used = {target for targets in rules.values() for target in targets}
    for axis, size in zip(axes, devices.shape, strict=True):
        if size > 1 and axis not in used:
            raise ValueError(
                f"mesh axis {axis!r} has {size} devices and splits nothing, so they would repeat "
                f"each other's work; use {_either(sorted(used))}, or name it in mesh.rules"
            )
    mesh = Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    # Without what the mesh does not have, so that layouts that do the same are equal.
    present = {name: tuple(t for t in targets if t in axes) for name, targets in rules.items()}
    # The sampler's slots: all devices that have prompts, or samples of a prompt, of their own.
    present["slots"] = tuple(dict.fromkeys(present["batch"] + present["sample"]))
    return Layout(mesh, tuple(sorted(present.items())))


def _arrange(devices: Sequence[jax.Device], axes: Mapping[str, int]) -> np.ndarray:
    sizes = tuple(axes.values())
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    outer = next((axis for axis, size in axes.items() if size > 1), next(iter(axes)))
    if axes[outer] % slices:
        raise ValueError(
            f"mesh.axes.{outer} = {axes[outer]}: the outermost axis crosses the {slices} slices, "
            f"so it is a multiple of {slices}"
        )
    across = tuple(slices if axis == outer else 1 for axis in axes)
    within = tuple(size // n for size, n in zip(sizes, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def _divisors(number: int, limit: int) -> list[int]:
    return [n for n in range(1, min(number, limit) + 1) if number % n == 0]


def _either(options: Sequence[object]) -> str:
    """`1, 2 or 4`"""
    *some, last = map(str, options)
    return f"{', '.join(some)} or {last}" if some else last


_CPU_DEVICES = "--xla_force_host_platform_device_count"


def split_cpu(devices: int | Literal["cores"]) -> None:
    """Make JAX's CPU several devices, so that a batch split over them keeps every core busy.

    XLA runs the small operations of a decode loop on one core. Call it before JAX starts; later it
    changes nothing. It does not affect accelerators. XLA_FLAGS and JAX_NUM_CPU_DEVICES go before.

    Args:
      devices: `cores` is one per core, rounded down to a power of two, which batches divide by.
    """
    if _CPU_DEVICES in os.environ.get("XLA_FLAGS", ""):
        return
    if os.environ.get("JAX_NUM_CPU_DEVICES"):
        return
    if devices == "cores":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        devices = 1 << ((cores or 1).bit_length() - 1)
    with contextlib.suppress(RuntimeError):  # JAX has already started
        jax.config.update("jax_num_cpu_devices", devices)


def given_cpu_devices() -> str:
    """The variable of the environment that made the CPU several devices, as `NAME=VALUE`; or ""."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if f.startswith(_CPU_DEVICES)]
    if flags:
        return f"XLA_FLAGS={flags[-1]}"
    count = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    return f"JAX_NUM_CPU_DEVICES={count}" if count else ""


def single_device() -> Layout:
    """The layout of a program that runs on the first device alone."""
    return make_layout({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
