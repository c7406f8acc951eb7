"""What a run would take on a slice: memory, work, exchange and time of everything it compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from r1jax.config.packaged import packaged_meshes, read_mesh
from r1jax.config.run_config import RunConfig
from r1jax.models import Decoder, ModelConfig
from r1jax.models.cudnn_attention import CUDNN_ATTENTION
from r1jax.planner import hlo
from r1jax.planner.compiler import Compiler, DoesNotFit
from r1jax.planner.estimate import Times, Traffic, times, traffic
from r1jax.planner.topologies import Slice
from r1jax.programs import Planning, Program
from r1jax.programs.program import bytes_by_kind, longest_prompt
from r1jax.rollouts.scoring import directory_section
from r1jax.run.chips import Efficiency
from r1jax.run.models import Layouts, decoder_of, make_layouts
from r1jax.run.resolve import check_divided, load_functions
from r1jax.run.selection import Selection
from r1jax.settings.kinds import describe_kind
from r1jax.settings.mesh import MeshSection
from r1jax.settings.model import MODEL, ModelSection
from r1jax.settings.stage import Stage
from r1jax.sharding import Layout
from r1jax.weights import hugging_face


@dataclass(frozen=True)
class ProgramPlan:
    """One compiled function of a stage, on one device.

    memory: bytes in HBM by what they are; `activations` are all temporaries of the program (such as
        gradients and logits). total: their sum; at least, where it is too large to compile.
    flops, bytes: of a call. exchange: by kind and mesh axes. times: None on unknown chips.
    utilisation: the FLOP/s that the model needs, as a share of the peak.
    compile_seconds: of processor time. measured: seconds of a call on devices that are there.
    problem: why nothing is known but memory.
    """

    name: str
    calls: float
    memory: dict[str, float]
    fits: bool | None
    flops: float = 0.0
    bytes: float = 0.0
    exchange: tuple[Traffic, ...] = ()
    times: Times | None = None
    utilisation: float | None = None
    unknown_kernels: tuple[str, ...] = ()
    compile_seconds: float = 0.0
    measured: float | None = None
    problem: str = ""

    @property
    def total(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class StagePlan:
    """A stage: its programs, and a step of it (or a batch, where it only samples).

    seconds: None where a program does not fit, or the chip is unknown. measured: by the measured
        calls. tokens: of a step, sampled or trained on, over all devices. notes: about slots, pages
        and packing.
    """

    name: str
    kind: str
    unit: str
    tokens: int
    programs: tuple[ProgramPlan, ...]
    seconds: float | None
    tokens_per_second: float | None
    utilisation: float | None
    measured: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def fullest(self) -> ProgramPlan:
        return max(self.programs, key=lambda program: program.total)


@dataclass(frozen=True)
class Plan:
    """A config on a slice, its devices arranged as a mesh.

    sampling_mesh: while they sample, where that differs. refused: why it cannot be. efficiency: by
        which times are made, where they are not those of a perfect machine.
    """

    target: str
    mesh: dict[str, int]
    devices: int
    hbm: float | None
    stages: tuple[StagePlan, ...] = ()
    sampling_mesh: dict[str, int] | None = None
    refused: str = ""
    efficiency: Efficiency | None = None

    @property
    def fits(self) -> bool:
        programs = [program for stage in self.stages for program in stage.programs]
        return not self.refused and all(program.fits is not False for program in programs)


@dataclass(frozen=True)
class PlanOptions:
    """How to plan.

    stages: names of those to plan; None: all. quick, cache: see `Compiler`. measure: run what fits,
        too, on the slice's devices. progress: called with a line before each compilation.
    """

    stages: Sequence[str] | None = None
    quick: bool = False
    cache: Path | None = None
    measure: bool = False
    progress: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Case:
    """What to plan: a config on a slice, its devices arranged as a mesh."""

    config: RunConfig
    target: Slice
    mesh: MeshSection


_ALL = PlanOptions()


class UnknownShapeError(ValueError):
    """A model whose config.json cannot be had here."""


def plan(case: Case, options: PlanOptions = _ALL) -> Plan:
    """Compile everything that a run's stages call for a slice, and add it up.

    Needs no weights, data or tokenizer: lengths are the largest that the config allows.

    Raises ValueError: the mesh does not fit the slice, the config or the models, or a model's shape
    is unknown.
    """
    config, mesh = case.config, case.mesh
    layout, rollout_layout = layouts = make_layouts(mesh, case.target.devices)
    planned = planned_stages(config, options.stages)
    check_divided(config, layouts, planned)
    target = replace(case.target, devices=tuple(layout.mesh.devices.flat))
    compiler = Compiler(target, quick=options.quick, cache=options.cache)
    planning = planning_for(config, layouts)
    return Plan(
        target=target.name,
        mesh=dict(layout.mesh.shape),
        devices=layouts.devices,
        hbm=target.hbm,
        stages=tuple(_plan_stage(stage, planning, compiler, target, options) for stage in planned),
        sampling_mesh=None if mesh.rollout is None else dict(rollout_layout.mesh.shape),
        efficiency=None if target.chip is None else target.chip.efficiency,
    )


def planned_stages(config: RunConfig, names: Sequence[str] | None) -> list[Stage]:
    """The stages of these names; None: all. Raises ValueError for a name that is not there."""
    chosen = [Selection(only=name).stages(config)[0] for name in names or ()]
    return [stage for stage in config.stages if not chosen or stage.name in chosen]


def planning_for(config: RunConfig, layouts: Layouts) -> Planning:
    """What stages need to say their programs, by the shapes of the models alone."""
    return Planning(config, _decoders(config, layouts.training), layouts.rollout)


def distinct_stages(config: RunConfig) -> list[str]:
    """The stages that show what a config needs: of those that compile the same programs
    (`Stage.planning_key`), such as evaluations on several benchmarks, the one with the longest
    prompts."""
    kept: dict[str, Stage] = {}
    for stage in config.stages:
        models = [str(reward.model) for reward in config.rewards_of(stage).values() if reward.model]
        key = stage.planning_key(models)
        if key is None:
            kept[f"stage {stage.name}"] = stage
        elif key not in kept or longest_prompt(stage, config) > longest_prompt(kept[key], config):
            kept[key] = stage
    names = {stage.name for stage in kept.values()}
    return [stage.name for stage in config.stages if stage.name in names]


def plan_case(case: Case, options: PlanOptions = _ALL) -> Plan:
    """The plan of a case; one that cannot be says why (`refused`)."""
    try:
        return plan(case, options)
    except ValueError as error:
        target, mesh = case.target, dict(case.mesh.axes)
        return Plan(target.name, mesh, len(target.devices), target.hbm, refused=str(error))


def parse_mesh(text: str, config: MeshSection) -> MeshSection:
    """A mesh of the command line: `data=2,fsdp=-1`, `fsdp` (all devices), a name in configs/mesh.

    Axes of the config's mesh that are not named have size 1, so that its rules stay valid.
    """
    if text == "config":
        return config
    if text in packaged_meshes():
        named = MeshSection.model_validate({"rules": config.rules} | read_mesh(text))
        return named.model_copy(update={"axes": _with_axes_of(config, named.axes)})
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name.isidentifier() or (size and not size.lstrip("-").isdigit()):
            raise ValueError(
                f"--mesh {text}: {part!r} is no axis; should be such as fsdp=8,tensor=4 or fsdp "
                "(all devices) or config"
            )
        axes[name] = int(size or -1)
    bad = [name for name, size in axes.items() if size < 1 and size != -1]
    if bad or list(axes.values()).count(-1) > 1:
        raise ValueError(
            f"--mesh {text}: a size is at least 1, or -1 for what is left, which one axis may be"
        )
    return config.model_copy(update={"axes": _with_axes_of(config, axes), "rollout": None})


def _with_axes_of(config: MeshSection, axes: dict[str, int]) -> dict[str, int]:
    return axes | {name: 1 for name in config.axes if name not in axes}


def _decoders(config: RunConfig, layout: Layout) -> Callable[[str], Decoder]:
    """The decoder of a stage's weights, of a model by its name, or of a directory."""
    heads = {stage.name: stage.DESCRIPTION.head for stage in config.stages}

    @functools.cache
    def find(name: str) -> Decoder:
        if name in heads or name == MODEL or name in config.models:
            key = config.model_of(name)
            section, where = config.section_of(key), MODEL if key == MODEL else f"models.{key}"
        else:
            section, where = directory_section(name, config.model), f"model {name}"
        shape = _shape(section, where)
        if (head := heads.get(name)) is not None:
            shape = replace(shape, head=head)
            section = section.model_copy(update={"multi_token_prediction": False})
        return decoder_of(section, shape, layout)

    return find


def _shape(section: ModelSection, where: str) -> ModelConfig:
    try:
        raw = section.config or hugging_face.find_config(str(section.path))
    except ValueError as error:
        raise UnknownShapeError(
            f"{error}. Give its shape, which is all that a plan needs: "
            f"'{where}.config={{model_type: ..., hidden_size: ..., ...}}' (the keys of its "
            f"config.json), or a directory with that file as {where}.path"
        ) from error
    return ModelConfig.from_hugging_face(raw)


def _plan_stage(
    stage: Stage, planning: Planning, compiler: Compiler, target: Slice, options: PlanOptions
) -> StagePlan:
    called = load_functions(stage).programs(stage, planning)
    programs = []
    groups = [program.devices or target.devices for program in called.programs]
    for program, devices in zip(called.programs, groups, strict=True):
        options.progress(f"{target.name}: {stage.name}: {program.name}")
        # Programs count their devices in the mesh's order.
        planned = _plan_program(program, compiler, replace(target, devices=devices))
        if options.measure and planned.fits is not False and not planned.problem:
            options.progress(f"{target.name}: {stage.name}: {program.name}: measuring")
            # Where the data decides on its turns, of as many as are planned with.
            seconds = compiler.seconds(program.lower(), program.prepare)
            planned = replace(planned, measured=seconds * program.turns / program.trial_turns)
        programs.append(planned)
    if not stage.samples_ahead():  # one group of devices after the other
        groups = [()] * len(groups)
    best = _step_seconds(programs, groups, lambda each: each.times.total if each.times else None)
    useful = sum(program.calls * program.useful_flops for program in called.programs)
    return StagePlan(
        name=stage.name,
        kind=stage.kind,
        unit=called.unit,
        tokens=called.tokens,
        programs=tuple(programs),
        seconds=best,
        tokens_per_second=None if not best else called.tokens / best,
        utilisation=_utilisation(useful, best, target),
        measured=_step_seconds(programs, groups, lambda each: each.measured),
        notes=(*called.notes, *called.limits),
    )


def _step_seconds(
    programs: Sequence[ProgramPlan],
    groups: Sequence[tuple[jax.Device, ...]],
    seconds: Callable[[ProgramPlan], float | None],
) -> float | None:
    """Of all calls of a step; None where the seconds of a program are unknown.

    groups: the devices of each program; groups work at the same time.
    """
    of_group: dict[frozenset[jax.Device], float] = {}
    for program, devices in zip(programs, groups, strict=True):
        if (taken := seconds(program)) is None:
            return None
        group = frozenset(devices)
        of_group[group] = of_group.get(group, 0.0) + program.calls * taken
    return max(of_group.values(), default=0.0)


def _plan_program(program: Program, compiler: Compiler, target: Slice) -> ProgramPlan:
    unknown = ProgramPlan(program.name, program.calls, {}, None)
    held = bytes_by_kind(program.resident, program.arguments)
    try:
        binary = compiler(program.lower())
    except DoesNotFit as error:
        # The compiler's number holds the arguments, too.
        needed: dict[str, float] = {**bytes_by_kind(program.resident), "activations": error.needed}
        return replace(unknown, memory=needed, fits=False, problem="too large to compile")
    held["activations"] += binary.temporary_bytes
    held[program.makes] += max(0, binary.output_bytes - binary.alias_bytes)
    arguments = bytes_by_kind(program.arguments).total()
    held["padding"] += max(0, binary.argument_bytes - arguments)
    memory = {name: float(size) for name, size in held.items() if size}
    planned = replace(
        unknown,
        memory=memory,
        fits=None if target.hbm is None else sum(memory.values()) <= target.hbm,
        compile_seconds=binary.seconds,
    )
    if binary.module is None:
        problem = "its text is unreadable; pip install 'r1jax[tpu]' gets jaxlib's own TPU compiler"
        return replace(planned, problem=problem)
    cost = hlo.cost(
        binary.module,
        unknown_trips=program.turns,
        largest_branch=program.larger_branch,
        scopes={CUDNN_ATTENTION: 0.0, **program.scopes},  # rows of few segments
    )
    taken = times(cost, target)
    seconds = None if taken is None else taken.total
    return replace(
        planned,
        flops=cost.flops,
        bytes=cost.bytes,
        exchange=tuple(traffic(cost, target, program.mesh)),
        times=taken,
        utilisation=_utilisation(program.useful_flops, seconds, target),
        unknown_kernels=cost.unknown,
    )


def _utilisation(useful: float, seconds: float | None, target: Slice) -> float | None:
    if not seconds or target.chip is None:
        return None
    peak = target.chip.flops / target.chip.devices * len(target.devices)
    return useful / seconds / peak


def advice(program: ProgramPlan, stage: StagePlan, hbm: float, devices: int) -> str:
    """By how much a program is too large, and what would help, the largest part first."""
    largest_first = sorted(program.memory.items(), key=lambda item: -item[1])
    large = [name for name, size in largest_first if size > 0.1 * program.total]
    hints = [HINTS[name] for name in large if name in HINTS]
    if "activations" in large or "cache" in large:
        hints.insert(0, describe_kind(stage.kind).less_memory)
    wanted = -(-devices * program.total // hbm)
    return (
        f"{stage.name}: {program.name} is {gib(program.total - hbm)} a device too "
        f"large; its {large[0]} are {gib(program.memory[large[0]])}. What would help: "
        f"{'; '.join([*hints, f'about {wanted:.0f} such devices instead of {devices}'])}"
    )


def gib(size: float) -> str:
    """Bytes as text, in GiB."""
    number = size / 2**30
    return f"{number:,.0f} GiB" if number >= 100 else f"{number:.3g} GiB"


# By what takes the memory.
HINTS = {
    "weights": "a larger fsdp or tensor axis, model.param_dtype: bfloat16",
    "optimizer": "a larger fsdp axis, optimizer.moment_dtype: bfloat16",
    "reference": "kl_coefficient: 0 of loss or objective (then no reference policy is kept)",
    "activations": "a sequence or tensor axis, model.remat: full, a smaller model.log_prob_chunk",
    "cache": "a tensor axis while sampling (mesh.rollout), which splits kv_heads",
    "batch": "a smaller mini_batches_per_rollout",
    "reward models": "smaller reward models",
}
