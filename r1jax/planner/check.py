"""Whether a run can be on a slice, by its config alone: compiles nothing, needs no weights or data.

What is found before a slice is created: a mesh that does not fit, a batch that it does not divide,
memory that it does not have by the estimate of `--dry-run`.
"""

from __future__ import annotations

from collections.abc import Sequence

from r1jax.config.yaml_file import ConfigError
from r1jax.planner.dry_run import meshes_of
from r1jax.planner.memory import sizes_of, too_large
from r1jax.planner.plan import Case, UnknownShapeError, gib, planned_stages, planning_for
from r1jax.planner.topologies import Slice, find_slice, has_compiler, stand_ins
from r1jax.run.models import make_layouts
from r1jax.run.resolve import check_divided, load_functions


def check_slice(case: Case, only: Sequence[str] | None = None) -> list[str]:
    """Lines that say what was checked; `only`: names of the stages to check, default: all.

    Raises ConfigError, or ValueError: what the run would be refused for on the slice.
    """
    target, config = case.target, case.config
    stages = planned_stages(config, only)
    layouts = make_layouts(case.mesh, target.devices, target.stands_for)
    check_divided(config, layouts, stages)
    line = f"{config.name} on {target.name}: mesh {meshes_of(layouts)}"
    planning = planning_for(config, layouts)
    try:
        problems = too_large(stages, planning, target.hbm)
        programs = [
            (sizes_of(program).total(), f"{stage.name}: {program.name}")
            for stage in stages
            for program in load_functions(stage).programs(stage, planning).programs
        ]
    except UnknownShapeError as error:
        return [f"{line}. The mesh divides the batches; memory is not known: {error}"]
    if problems:
        raise ConfigError(problems)
    size, fullest = max(programs, default=(0, "none"))
    hbm = "" if target.hbm is None else f" of the {gib(target.hbm)}"
    line += f". The mesh divides the batches; the fullest program, {fullest}, takes about "
    return [f"{line}{gib(size)}{hbm} of a device"]


def slice_or_stand_ins(name: str) -> Slice:
    """The slice as its compiler knows it, or CPU devices in its place where there is none."""
    return find_slice(name) if has_compiler(name) else stand_ins(name)
