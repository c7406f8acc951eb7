"""Slices that a run may be planned for: TPUs that are not there, CPUs that are not many.

The TPU compiler (`libtpu`) knows a slice by its name alone, on any machine.
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

from r1jax.sharding import StandIn


@dataclass(frozen=True)
class Chip:
    """What one chip has.

    hbm: bytes. flops: peak in bfloat16, per second. hbm_bandwidth, link_bandwidth: bytes per
    second, the latter of one link in one direction. dimensions: of the torus. wraps: an axis of so
    many chips, or a multiple, is a ring; a shorter one a line. devices: what JAX sees of a chip.
    between_slices: bytes per second of a chip's share in the data-centre network, where published.
    """

    hbm: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    wraps: int
    devices: int = 1
    between_slices: float | None = None


_GIB = 2**30

# Google Cloud's pages on each TPU (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x): peak
# bfloat16 FLOP/s, bandwidth of HBM, and the bandwidth of a chip's interconnect, both directions of
# all its links (v4 600 GB/s, v5e 400, v5p 1,200, v6e 800, TPU7x 1,200): six links in a 3D torus,
# four in a 2D one. Slices of v4, v5p and TPU7x have rings along axes of whole cubes of
# 4 x 4 x 4, those of v5e and v6e along axes of 16. HBM is what the compiler leaves to a program, a
# little less than the 32, 16, 95, 32 and 192 GiB that the chips have. Between slices: 6.4 Tbit/s of
# 256 chips (v5e), 50 Gbit/s of a chip (v5p), 25.6 Tbit/s of 256 chips (v6e).
CHIPS = {
    "v4": Chip(30.75 * _GIB, 275e12, 1228e9, 50e9, 3, 4),
    "v5e": Chip(15.75 * _GIB, 197e12, 819e9, 50e9, 2, 16, between_slices=3.125e9),
    "v5p": Chip(95 * _GIB, 459e12, 2765e9, 100e9, 3, 4, between_slices=6.25e9),
    "v6e": Chip(31.24 * _GIB, 918e12, 1638e9, 100e9, 2, 16, between_slices=12.5e9),
    "tpu7x": Chip(189.48 * _GIB, 2307e12, 7380e9, 100e9, 3, 4, devices=2),
}
# As on Cloud's machines: without it, the compiler takes the two cores of a v4 chip for devices.
_SETTINGS = {"v4": {"chip_config_name": "megacore"}}
# What JAX calls the chips that are attached.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}


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

    def bandwidth(self, group: Sequence[int]) -> float:
        """Bytes per second that a device can send to a group of devices (indices of `devices`).

        A group that crosses slices waits for the network between them.
        """
        assert self.chip is not None
        if len({getattr(self.devices[i], "slice_index", 0) for i in group}) > 1:
            assert self.chip.between_slices is not None
            return self.chip.between_slices / self.chip.devices
        return self.links(group) * self.chip.link_bandwidth

    def links(self, group: Sequence[int]) -> float:
        """Links of a device, counted in one direction, that a group of devices can talk over.

        Along each axis of the torus that the group extends over: two where the axis is a ring and
        the group all of it, else one. What lies in between is assumed to be free.
        """
        assert self.chip is not None
        positions = zip(*(self.devices[i].coords for i in group), strict=True)
        links = 0.0
        for size, row in zip(self.shape, positions, strict=True):
            if (extent := len(set(row))) > 1:
                links += 2 if extent == size and size % self.chip.wraps == 0 else 1
        # The two halves of a TPU7x share its links; between them it is six times as fast as a link
        # (cloud.google.com/tpu/docs/tpu7x, "Dual-chiplet architecture").
        return links / self.chip.devices if links else 6.0


def _parsed(name: str) -> tuple[int, str, str]:
    """How many slices, of which kind, of which shape; ValueError where there are no such."""
    known = ", ".join(_example(chip) for chip in CHIPS)
    parts = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):(\d+(?:x\d+)*)", name)
    if parts is None or parts[2] not in CHIPS:
        raise ValueError(
            f"--topology {name}: no such slice; should be KIND:SHAPE, such as {known}, or "
            "2xKIND:SHAPE for two of them"
        )
    slices, kind, shape = int(parts[1] or 1), parts[2], parts[3]
    chip = CHIPS[kind]
    if slices > 1 and chip.between_slices is None:
        several = ", ".join(kind for kind, each in CHIPS.items() if each.between_slices)
        raise ValueError(
            f"--topology {name}: the network between slices of {kind} is not known here; that of "
            f"{several} is"
        )
    if shape.count("x") + 1 != chip.dimensions:
        raise ValueError(
            f"--topology {name}: a slice of {kind} has {chip.dimensions} dimensions, such as "
            f"{_example(kind)}"
        )
    return slices, kind, shape


def is_slice(name: str) -> bool:
    """Whether it is the name of a slice, or of several."""
    try:
        return bool(_parsed(name))
    except ValueError:
        return False


def has_tpu_compiler() -> bool:
    """Whether `tpu_slice` can be had on this machine."""
    return importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ


def stand_ins(name: str) -> Slice:
    """CPU devices in place of a slice, for checks and estimates; it is not known to the compiler.

    Raises ValueError: no such slice, or JAX has started with fewer devices.
    """
    slices, kind, shape = _parsed(name)
    chip, chips = CHIPS[kind], math.prod(map(int, shape.split("x")))
    # A host has 4 chips; of the 2D kinds, up to 8 are on one.
    hosts = slices * (1 if chip.dimensions == 2 and chips <= 8 else -(-chips // 4))
    devices = fake_devices(slices * chips * chip.devices).devices
    return Slice(name, devices, chip, StandIn("tpu", hosts))


def tpu_slice(name: str) -> Slice:
    """A slice by its name, such as `v5p:4x4x8`, or several, `2xv5p:4x4x8`; none need be there.

    Raises ValueError: no such slice, or no TPU compiler on this machine.
    """
    slices, kind, shape = _parsed(name)
    chip, known = CHIPS[kind], ", ".join(_example(chip) for chip in CHIPS)
    if not has_tpu_compiler():
        raise ValueError(
            f"--topology {name} needs the TPU compiler: pip install 'r1jax[tpu]' (no TPU is "
            "needed); or use --fake-devices N"
        )
    from jax.experimental import topologies

    # There may be no cloud around this machine, and no TPU is used: another process may have it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    _use_cpu()
    try:
        with quiet():
            topology = topologies.get_topology_desc(
                topology_name=f"{kind}:{shape}",
                platform="tpu",
                **({"num_slices": slices} if slices > 1 else {}),
                **_SETTINGS.get(kind, {}),
            )
    except Exception as error:  # JAX passes on whatever the plug-in raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--topology {name}: the TPU compiler knows no such slice ({reason[:200]}); others are "
            f"{known}"
        ) from error
    return Slice(name, tuple(topology.devices), chip)


def _example(kind: str) -> str:
    return f"{kind}:{'4x4' if CHIPS[kind].dimensions == 2 else '4x4x4'}"


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
    return Slice(f"{len(devices)} x {kind}", tuple(devices), CHIPS.get(_KINDS.get(kind, "")))


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
