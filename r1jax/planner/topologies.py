"""Devices that a run may be planned for: slices of TPUs and hosts of GPUs that are not there, CPUs
that are not many.

A slice is named by its kind and shape: `v5p:4x4x8`, `h200:8` (a host of eight GPUs), or several,
`2xv5e:16x16`, `4xh200:8`. The compilers of TPUs (`libtpu`) and of GPUs (JAX's CUDA plug-in) compile
for them on any machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax

from r1jax.planner.gpu_targets import hopper
from r1jax.run.chips import CHIPS, KINDS, Chip, Switch, Torus
from r1jax.run.gpu_memory import GPU_MEMORY_SHARE
from r1jax.sharding import StandIn

# As on Cloud's machines: without it, the compiler takes the two cores of a v4 chip for devices.
_SETTINGS = {"v4": {"chip_config_name": "megacore"}}
_GPU_COMPILERS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


@dataclass(frozen=True)
class Slice:
    """Devices to plan for. `chip` is None where nothing is known about their speed.

    stands_for: what they stand in for, where programs cannot be compiled for them.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None
    stands_for: StandIn | None = None

    @property
    def hbm(self) -> float | None:
        """Bytes of a device."""
        return None if self.chip is None else self.chip.hbm / self.chip.devices

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each axis of the torus."""
        positions = [device.coords for device in self.devices]
        return tuple(1 + max(row) - min(row) for row in zip(*positions, strict=True))

    def bandwidth(self, group: Sequence[int], kind: str = "all-gather") -> float:
        """Bytes per second that a device can send to a group of devices (indices of `devices`).

        A group that crosses slices or hosts waits for the network between them.

        kind: of the collective.
        """
        assert self.chip is not None
        network, between = self.chip.network, self.chip.between_slices
        if isinstance(network, Switch):
            hosts = [self.devices[i].process_index for i in group]
            if (inside := hosts.count(hosts[0])) == len(hosts):
                return network.bandwidth
            assert between is not None
            if kind == "all-to-all":  # a device sends by its adapter what leaves its host
                return between * (len(hosts) - 1) / (len(hosts) - inside)
            # Rings that leave a host by another device each use the adapters of all of them.
            return min(network.bandwidth, between * inside)
        if len({getattr(self.devices[i], "slice_index", 0) for i in group}) > 1:
            assert between is not None
            return between / self.chip.devices
        links = self.links(group) * network.link_bandwidth
        if kind == "all-to-all":
            # What goes to a far device passes through those between: n / 4 links on average in a
            # ring that is used both ways.
            size = len(group)
            return links / max(1.0, size / 4 * size / (size - 1))
        return links

    def links(self, group: Sequence[int]) -> float:
        """Links of a device in a torus, in one direction, that a group of devices can talk over.

        Along each axis of the torus that the group extends over: two where the axis is a ring and
        the group all of it, else one. What lies in between is assumed to be free.
        """
        assert self.chip is not None and isinstance(self.chip.network, Torus)
        positions = zip(*(self.devices[i].coords for i in group), strict=True)
        links = 0.0
        for size, row in zip(self.shape, positions, strict=True):
            if (extent := len(set(row))) > 1:
                links += 2 if extent == size and size % self.chip.network.wraps == 0 else 1
        # The two halves of a TPU7x share its links; between them it is six times as fast as a link
        # (cloud.google.com/tpu/docs/tpu7x, "Dual-chiplet architecture").
        return links / self.chip.devices if links else 6.0


@dataclass(frozen=True)
class _Name:
    """The parts of a slice's name: `2xv6e:4x8` is two slices of the kind v6e, shape (4, 8)."""

    slices: int
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def devices(self) -> int:
        return self.slices * math.prod(self.shape) * self.chip.devices

    @property
    def hosts(self) -> int:
        network, chips = self.chip.network, math.prod(self.shape)
        if isinstance(network, Switch):
            return self.slices
        # A host has 4 chips; of the 2D kinds, up to 8 are on one.
        return self.slices * (1 if network.dimensions == 2 and chips <= 8 else -(-chips // 4))


def _parsed(name: str) -> _Name:
    """Raises ValueError where there are no such devices."""
    parts = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):(\d+(?:x\d+)*)", name)
    if parts is None or parts[2] not in CHIPS:
        raise ValueError(
            f"--topology {name}: no such slice; should be KIND:SHAPE, such as {_examples()}, or "
            "2xKIND:SHAPE for two of them"
        )
    parsed = _Name(int(parts[1] or 1), parts[2], tuple(map(int, parts[3].split("x"))))
    chip, kind, network = parsed.chip, parsed.kind, parsed.chip.network
    if parsed.slices > 1 and chip.between_slices is None:
        alike = {n: each for n, each in CHIPS.items() if each.platform == chip.platform}
        several = ", ".join(n for n, each in alike.items() if each.between_slices)
        raise ValueError(
            f"--topology {name}: the network between slices of {kind} is not known here; that of "
            f"{several} is"
        )
    if isinstance(network, Switch):
        if len(parsed.shape) != 1 or not 1 <= parsed.shape[0] <= network.devices:
            raise ValueError(
                f"--topology {name}: a host has up to {network.devices} {kind.upper()}, such as "
                f"{_example(kind)}; 2x{_example(kind)} are two hosts"
            )
    elif len(parsed.shape) != network.dimensions:
        raise ValueError(
            f"--topology {name}: a slice of {kind} has {network.dimensions} dimensions, such as "
            f"{_example(kind)}"
        )
    return parsed


def is_slice(name: str) -> bool:
    """Whether it is the name of a slice, or of several."""
    try:
        return bool(_parsed(name))
    except ValueError:
        return False


def has_compiler(name: str) -> bool:
    """Whether `find_slice` can be had of such devices on this machine.

    Raises ValueError: no such slice.
    """
    if _parsed(name).chip.platform == "gpu":
        return any(importlib.util.find_spec(each) is not None for each in _GPU_COMPILERS)
    return importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ


def stand_ins(name: str) -> Slice:
    """CPU devices in place of a slice, for checks and estimates; it is not known to the compiler.

    Raises ValueError: no such slice, or JAX has started with fewer devices.
    """
    parsed = _parsed(name)
    chip, devices = parsed.chip, fake_devices(parsed.devices).devices
    stands_for = StandIn(chip.platform, parsed.hosts, int(chip.hbm / chip.devices))
    return Slice(name, devices, chip, stands_for)


def find_slice(name: str) -> Slice:
    """A slice by its name, such as `v5p:4x4x8` or `2xh200:8`; none need be there.

    Raises ValueError: no such slice, or no compiler for it on this machine.
    """
    parsed = _parsed(name)
    platform = parsed.chip.platform
    if not has_compiler(name):
        extra, kind = {"tpu": ("tpu", "TPU"), "gpu": ("cuda", "GPU")}[platform]
        raise ValueError(
            f"--topology {name} needs the {kind} compiler: pip install 'r1jax[{extra}]' (no {kind} "
            "is needed); or use --fake-devices N"
        )
    _use_cpu()
    try:
        with quiet():
            devices = _tpus(parsed) if platform == "tpu" else _gpus(parsed)
    except Exception as error:  # JAX passes on whatever the plug-in raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--topology {name}: the {platform.upper()} compiler knows no such slice "
            f"({reason[:200]}); others are {_examples()}"
        ) from error
    return Slice(name, devices, parsed.chip)


def _tpus(name: _Name) -> tuple[jax.Device, ...]:
    from jax.experimental import topologies

    # There may be no cloud around this machine, and no TPU is used: another process may have it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(
        topology_name=f"{name.kind}:{'x'.join(map(str, name.shape))}",
        platform="tpu",
        **({"num_slices": name.slices} if name.slices > 1 else {}),
        **_SETTINGS.get(name.kind, {}),
    )
    return tuple(topology.devices)


def _gpus(name: _Name) -> tuple[jax.Device, ...]:
    from jax.experimental import topologies

    chip, device_kind = name.chip, next(each for each in KINDS if KINDS[each] == name.kind)
    memory = round(chip.hbm / GPU_MEMORY_SHARE)
    topology = topologies.get_topology_desc(
        topology_name=name.kind,
        platform="cuda",
        target_config=hopper(device_kind, int(chip.hbm_bandwidth), memory),
        topology=f"1x{name.slices}x{name.shape[0]}",  # slices, hosts of each, devices of each
    )
    return tuple(topology.devices)


def _example(kind: str) -> str:
    network = CHIPS[kind].network
    if isinstance(network, Switch):
        return f"{kind}:{network.devices}"
    return f"{kind}:{'4x4' if network.dimensions == 2 else '4x4x4'}"


def _examples() -> str:
    return ", ".join(_example(kind) for kind in CHIPS)


def fake_devices(count: int) -> Slice:
    """Devices made of this machine's CPU. Raises ValueError if JAX has started with fewer."""
    _use_cpu()
    with contextlib.suppress(RuntimeError):  # JAX has already started
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--fake-devices {count}: JAX has started with {len(devices)}; plan in a new process"
        )
    return Slice(f"{count} fake devices", tuple(devices[:count]), None)


def attached() -> Slice:
    devices = jax.devices()
    kind = devices[0].device_kind
    return Slice(f"{len(devices)} x {kind}", tuple(devices), CHIPS.get(KINDS.get(kind, "")))


def _use_cpu() -> None:
    """Only compiling: an attached accelerator may belong to a run."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps from the user what the compiler writes to file descriptor 2, behind Python's back."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
