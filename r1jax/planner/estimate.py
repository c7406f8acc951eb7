"""How long a program takes: the roofline of its operations on a chip.

Each operation takes the longer of its products at peak speed and its bytes at the bandwidth of HBM,
one after the other. Exchange between devices runs beside them, over the links of its mesh axes. A
program takes the longer of both; real ones take longer. Of a chip whose efficiency was measured,
the shares of the peaks that programs reach take the place of the peaks, and no operation takes less
time than a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from r1jax.planner.hlo import Collective, Cost, axes_of
from r1jax.planner.topologies import Slice
from r1jax.run.chips import Efficiency


@dataclass(frozen=True)
class Times:
    """Seconds of a call: of all products alone, of all bytes in HBM, of all exchange; together."""

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


_PERFECT = Efficiency(1.0, 1.0, 0.0, (), "")


def times(cost: Cost, target: Slice) -> Times | None:
    """None where nothing is known about the chip."""
    chip = target.chip
    if chip is None:
        return None
    reached = chip.efficiency or _PERFECT
    flops, bandwidth = chip.flops / chip.devices, chip.hbm_bandwidth / chip.devices
    compute = memory = on_chip = 0.0
    for each in cost.operations:
        products = each.flops / (flops * reached.of_kernel(each.kernel))
        moved = each.bytes / (bandwidth * reached.hbm_bandwidth)
        compute += each.times * products
        memory += each.times * moved
        on_chip += each.times * max(products, moved, reached.launch_seconds)
    network = sum(each.times * _seconds(each, target) for each in cost.collectives)
    return Times(compute, memory, network, max(on_chip, network))


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
    return each.bytes / target.bandwidth(each.group, each.kind)
