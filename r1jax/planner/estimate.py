"""How long a program takes at best: the roofline of its operations on a chip.

Each operation takes the longer of its products at peak speed and its bytes at the bandwidth of HBM,
one after the other. Exchange between devices runs beside them, over the links of its mesh axes. A
program takes the longer of both; real ones take longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from r1jax.planner.hlo import Collective, Cost, axes_of
from r1jax.planner.topologies import Slice


@dataclass(frozen=True)
class Times:
    """Seconds of a call, at best: all products at peak speed, every byte at full bandwidth."""

    compute: float
    memory: float
    network: float
    total: float

    @property
    def bound(self) -> str:
        return max(("compute", "memory", "network"), key=lambda name: float(getattr(self, name)))


@dataclass(frozen=True)
class Traffic:
    """Exchange of one kind along some mesh axes, in a call.

    bytes: that each device sends. seconds: None where the links are unknown.
    """

    kind: str
    axes: tuple[str, ...]
    count: float
    bytes: float
    seconds: float | None


def times(cost: Cost, target: Slice) -> Times | None:
    """None where nothing is known about the chip."""
    chip = target.chip
    if chip is None:
        return None
    flops, bandwidth = chip.flops / chip.devices, chip.hbm_bandwidth / chip.devices
    on_chip = sum(
        each.times * max(each.flops / flops, each.bytes / bandwidth) for each in cost.operations
    )
    network = sum(each.times * _seconds(each, target) for each in cost.collectives)
    return Times(
        compute=cost.flops / flops,
        memory=cost.bytes / bandwidth,
        network=network,
        total=max(on_chip, network),
    )


def traffic(cost: Cost, target: Slice, mesh: Mapping[str, int]) -> list[Traffic]:
    """Exchange by kind and mesh axes, the most bytes first.

    mesh: axis -> size; the target's devices are in the mesh's order.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for each in cost.collectives:
        groups.setdefault((each.kind, axes_of(each.group, mesh)), []).append(each)
    rows = []
    for (kind, axes), group in groups.items():
        count, sent = sum(e.times for e in group), sum(e.times * e.bytes for e in group)
        seconds = sum(e.times * _seconds(e, target) for e in group) if target.chip else None
        rows.append(Traffic(kind, axes, count, sent, seconds))
    return sorted(rows, key=lambda row: -row.bytes)


def _seconds(each: Collective, target: Slice) -> float:
    assert target.chip is not None
    sent = each.bytes
    if each.kind == "all-to-all":
        # What goes to a far device passes through those between: n / 4 links on average in a ring
        # that is used both ways.
        size = len(each.group)
        sent *= max(1.0, size / 4 * size / (size - 1))
    return sent / target.bandwidth(each.group)
