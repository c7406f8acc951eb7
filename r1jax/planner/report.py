"""A plan for people, as tables, and for programs, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Column, Table

from r1jax.files import JsonObject
from r1jax.planner.plan import Plan, StagePlan, advice
from r1jax.run.chips import Efficiency


def as_json(config: str, plans: Sequence[Plan]) -> JsonObject:
    """Everything, in bytes, FLOPs, seconds and bytes sent, of one device unless said otherwise."""
    content = [asdict(plan) | {"fits": plan.fits} for plan in plans]
    written = [each for plan in content for stage in plan["stages"] for each in stage["programs"]]
    programs = [program for each in plans for stage in each.stages for program in stage.programs]
    for program, planned in zip(written, programs, strict=True):
        program["total"] = planned.total
        if planned.times is not None:
            program["times"]["bound"] = planned.times.bound
    return {"config": config, "plans": content}


def print_plans(plans: Sequence[Plan], console: Console) -> None:
    """Each plan's programs, exchange and steps; then, of several, one table of all."""
    for plan in plans:
        for stage in plan.stages:
            for table in (_memory(plan, stage), _work(stage), _exchange(stage)):
                if table.row_count:
                    console.print(table, markup=False)
            console.print(_step(stage, plan.efficiency), markup=False, highlight=False)
            named = {program.name: program.problem for program in stage.programs}
            problems = [f"{stage.name}: {name}: {why}" for name, why in named.items() if why]
            for line in [*stage.notes, *problems, *_advice(plan, stage)]:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            console.print()
    if len(plans) > 1:
        console.print(_comparison(plans), markup=False)
        for plan in plans:
            if plan.refused:
                line = f"{_mesh(plan.mesh)} on {plan.target}: {plan.refused}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    for efficiency in dict.fromkeys(plan.efficiency for plan in plans):
        if efficiency is not None:
            console.print(_reached(efficiency), markup=False, highlight=False, soft_wrap=True)
    programs = [each for plan in plans for stage in plan.stages for each in stage.programs]
    kernels = dict.fromkeys(name for program in programs for name in program.unknown_kernels)
    if kernels:
        console.print(f"Products not counted: {', '.join(kernels)}", markup=False)


MARGIN = 0.1  # of HBM, free at the fullest moment: what a packaged slice must leave


def has_margin(plan: Plan) -> bool:
    """Whether every program leaves a tenth of the memory free."""
    return not plan.refused and all(_free(plan, stage) >= MARGIN for stage in plan.stages)


def as_markdown(planned: Sequence[tuple[str, Plan]], waiting: Sequence[tuple[str, str]]) -> str:
    """One table of configs on slices, a row for each stage; stages that are alike share one.

    planned: config and its plan on a slice. waiting: (config, slice) that are not planned yet.
    """
    kinds = ("weights", "optimizer", "reference", "cache", "activations")
    head = ["config", "slice", "mesh", "stage", "fits", *kinds, "other", "HBM free", "time of a"]
    head += ["tokens/s", "MFU", "bound by", "compiled in"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    notes = []
    for name, plan in planned:
        sampling = "" if plan.sampling_mesh is None else f"; sampling: {_mesh(plan.sampling_mesh)}"
        cells = [name, plan.target, _mesh(plan.mesh) + sampling]
        if plan.refused:
            lines.append(f"| {' | '.join([*cells, '', 'refused', *[''] * (len(head) - 5)])} |")
            notes.append(f"- {name} on {plan.target}: {plan.refused}")
            continue
        alike: dict[tuple[str, ...], list[str]] = {}
        for stage in plan.stages:
            alike.setdefault(tuple(_row(plan, stage, kinds)), []).append(stage.name)
            if _free(plan, stage) < 0:
                notes += [f"- {name} on {plan.target}: {line}" for line in _advice(plan, stage)]
        for row, stages in alike.items():
            lines.append(f"| {' | '.join([*cells, ', '.join(stages), *row])} |")
    later: dict[str, list[str]] = {}
    for name, where in waiting:
        later.setdefault(name, []).append(where)
    notes += [f"- {name}: not planned yet on {', '.join(where)}" for name, where in later.items()]
    return "\n".join([_PREFACE, *lines, *(["", *notes] if notes else []), ""])


_PREFACE = """# Configs on slices, as planned

Made by `make plan-all`, with the real TPU compiler and no TPU: every function that a stage calls is
compiled for the slice. A slice `fits` if a tenth of its memory stays free (`tight`: less). Memory
is that of one device as its fullest program runs. Times are those of a perfect machine and of
texts that are all as long as the config lets them be; `bound by` says what the step waits for most.
Of evaluations that differ in what they ask, the one with the longest questions stands for all.
Compiled with the least effort (`--quick`), in seconds of one core.
"""


def _row(plan: Plan, stage: StagePlan, kinds: Sequence[str]) -> list[str]:
    fullest, free = stage.fullest, _free(plan, stage)
    other = sum(size for kind, size in fullest.memory.items() if kind not in kinds)
    parts = {
        part: sum(each.calls * getattr(each.times, part) for each in stage.programs if each.times)
        for part in ("compute", "memory", "network")
    }
    compiled = sum(program.compile_seconds for program in stage.programs)
    return [
        "yes" if free >= MARGIN else "tight" if free >= 0 else "**no**",
        *(_bytes(fullest.memory[kind]) if kind in fullest.memory else "" for kind in kinds),
        _bytes(other) if other else "",
        _share(free),
        "" if stage.seconds is None else f"{stage.unit}: {_seconds(stage.seconds)}",
        _rate(stage),
        _share(stage.utilisation),
        "" if stage.seconds is None else max(parts, key=lambda part: parts[part]),
        f"{compiled:.0f} s",
    ]


def _free(plan: Plan, stage: StagePlan) -> float:
    """Share of a device's memory that stays free."""
    return 1.0 if plan.hbm is None else 1 - stage.fullest.total / plan.hbm


def _memory(plan: Plan, stage: StagePlan) -> Table:
    title = f"{stage.name} ({stage.kind}) on {plan.target}, mesh {_mesh(plan.mesh)}"
    kinds = list(dict.fromkeys(k for program in stage.programs for k in program.memory))
    numbers = _numbers(*kinds, "all", "fits")
    table = Table("HBM of a device", *numbers, title=title, title_justify="left", box=None)
    for program in stage.programs:
        table.add_row(
            program.name,
            *(_bytes(program.memory[kind]) if kind in program.memory else "" for kind in kinds),
            _bytes(program.total),
            {True: "yes", False: "no", None: "unknown" if program.problem else ""}[program.fits],
        )
    return table


def _work(stage: StagePlan) -> Table:
    names = ("FLOPs", "HBM bytes", "bytes sent", "compute", "memory", "network", "time", "MFU")
    numbers = _numbers(f"calls a {stage.unit}", *names)
    measured = any(program.measured is not None for program in stage.programs)
    last = _numbers("measured") if measured else []
    table = Table("work of a device", *numbers, "bound by", *last, box=None)
    for program in stage.programs:
        if program.problem:
            continue
        taken = program.times
        parts = () if taken is None else (taken.compute, taken.memory, taken.network, taken.total)
        table.add_row(
            program.name,
            f"{program.calls:.3g}",
            _scaled(program.flops, 1000, ("", " K", " M", " G", " T", " P", " E")),
            _bytes(program.bytes),
            _bytes(sum(row.bytes for row in program.exchange)),
            *([_seconds(part) for part in parts] or [""] * 4),
            _share(program.utilisation),
            "" if taken is None else taken.bound,
            *([_seconds(program.measured)] if measured else ()),
        )
    return table


def _exchange(stage: StagePlan) -> Table:
    numbers = _numbers("times", "bytes sent", "time")
    table = Table("exchange", "kind", "mesh axes", *numbers, box=None)
    for program in stage.programs:
        for i, row in enumerate(program.exchange[:6]):
            table.add_row(
                "" if i else program.name,
                row.kind,
                " + ".join(row.axes),
                f"{row.count:,.0f}",
                _bytes(row.bytes),
                _seconds(row.seconds),
            )
    return table


def _step(stage: StagePlan, efficiency: Efficiency | None) -> str:
    line = f"A {stage.unit} of {stage.name}"
    if stage.seconds:
        how = "at best" if efficiency is None else "by measured efficiency"
        line += f", {how}: {_seconds(stage.seconds)}, {stage.tokens:,} tokens, "
        line += f"{_rate(stage)} tokens/s, MFU {_share(stage.utilisation)}"
    else:
        line += f": {stage.tokens:,} tokens; no time to tell"
    if stage.measured:
        rate = stage.tokens / stage.measured
        line += f"; measured: {_seconds(stage.measured)}, {rate:,.0f} tokens/s"
    return line


def _reached(efficiency: Efficiency) -> str:
    shares = {"products": efficiency.flops, "HBM": efficiency.hbm_bandwidth}
    shares |= {kernel: share for kernel, share in efficiency.kernels}
    listed = ", ".join(f"{name} {_share(share)}" for name, share in shares.items())
    return (
        f"Times by shares of the peaks ({listed}) and at least "
        f"{_seconds(efficiency.launch_seconds)} for each kernel: {efficiency.source}"
    )


def _advice(plan: Plan, stage: StagePlan) -> list[str]:
    large = [program for program in stage.programs if program.fits is False]
    return [advice(each, stage, plan.hbm, plan.devices) for each in large if plan.hbm is not None]


def _comparison(plans: Sequence[Plan]) -> Table:
    """One row a plan; a time for each stage."""
    names = ["fits", "fullest", "HBM"]
    for stage in next(plan.stages for plan in plans if plan.stages):
        names += [f"{stage.name}: {stage.unit}", "tokens/s", "MFU"]
    table = Table("slice", "mesh", *_numbers(*names), box=None)
    for plan in plans:
        if plan.refused:
            table.add_row(plan.target, _mesh(plan.mesh), "refused")
            continue
        stage = max(plan.stages, key=lambda each: each.fullest.total)
        cells = [f"{stage.name}: {stage.fullest.name}", _bytes(stage.fullest.total)]
        for each in plan.stages:
            cells += [_seconds(each.seconds), _rate(each), _share(each.utilisation)]
        verdict = "no" if not plan.fits else "yes" if plan.hbm is not None else ""
        table.add_row(plan.target, _mesh(plan.mesh), verdict, *cells)
    return table


def _numbers(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def _mesh(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {n}" for axis, n in mesh.items() if n != 1) or "one device"


def _bytes(size: float) -> str:
    return _scaled(size, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if value < base:
            return f"{value:.3g}{unit}"
        value /= base
    return f"{value:.3g}{units[-1]}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    for unit in ("s", "ms"):
        if value >= 1:
            return f"{value:.3g} {unit}"
        value *= 1000
    return f"{value:.3g} us"


def _rate(stage: StagePlan) -> str:
    return "" if stage.tokens_per_second is None else f"{stage.tokens_per_second:,.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"
