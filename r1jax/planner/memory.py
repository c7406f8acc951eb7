"""Whether the machine has the memory that a run takes, before it begins and where it ran out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

from r1jax.config.yaml_file import ConfigError
from r1jax.metrics.heartbeat import HEARTBEAT
from r1jax.models import Decoder
from r1jax.planner.plan import HINTS, gib
from r1jax.programs import Planning
from r1jax.programs.program import Program, bytes_by_kind
from r1jax.rollouts.scoring import directory_section
from r1jax.run.models import build_decoder
from r1jax.run.resolve import ResolvedRun, load_functions
from r1jax.run.stop import RunError
from r1jax.settings.stage import Stage


def planning_of(run: ResolvedRun) -> Planning:
    """What a stage needs to say its programs, for the devices of this run."""

    def decoder_of(name: str) -> Decoder:
        if name in run.models.by_name or any(stage.name == name for stage in run.config.stages):
            return run.models.of(name).decoder
        return build_decoder(directory_section(name, run.config.model), run.layouts.training)[0]

    return Planning(run.config, decoder_of, run.layouts.rollout)


def sizes_of(program: Program) -> Counter[str]:
    """Bytes on a device as a program runs, by what they are; temporaries are an estimate."""
    return bytes_by_kind(program.resident, program.arguments) + Counter(program.temporaries)


def check_memory(run: ResolvedRun, stages: Sequence[Stage]) -> None:
    """Raises ConfigError, with a line for each stage that takes more memory than is free."""
    if lines := too_large(stages, planning_of(run), free_here()):
        raise ConfigError(lines)


def too_large(stages: Sequence[Stage], planning: Planning, free: float | None) -> list[str]:
    """A line for each stage whose fullest program needs more than the `free` bytes of a device."""
    lines: list[str] = []
    if free is None:
        return lines
    for stage in stages:
        programs = load_functions(stage).programs(stage, planning).programs
        fullest = max(programs, key=lambda program: sizes_of(program).total(), default=None)
        if fullest is None or (needed := sizes_of(fullest).total()) <= free:
            continue
        parts = ", ".join(f"{kind} {gib(size)}" for kind, size in _large(fullest).items())
        line = (
            f"its {fullest.name} needs {gib(needed)} on each device ({parts}), and "
            f"{gib(free)} are free. {_remedy(stage, fullest)}"
        )
        lines += planning.config.refusal(f"stages.{stage.name}", line).problems
    return lines


def _large(program: Program) -> dict[str, int]:
    """What takes a tenth of a program's memory or more, the largest first."""
    sizes = sizes_of(program)
    return {kind: n for kind, n in sizes.most_common() if n >= 0.1 * sizes.total()}


def _remedy(stage: Stage, program: Program | None) -> str:
    kinds = [] if program is None else _large(program)
    hints = [stage.DESCRIPTION.less_memory] + [HINTS[kind] for kind in kinds if kind in HINTS]
    hints += ["more devices, or a smaller model (`r1jax plan` says what a slice holds)"]
    return f"What would help: {'; '.join(filter(None, hints))}"


def free_here() -> int | None:
    """Bytes that the first device of this process has left."""
    return free_memory(jax.local_devices()[0])


def free_memory(device: jax.Device) -> int | None:
    """Bytes that a device of this process has left; of a CPU, its part of the machine's."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    if device.platform != "cpu":
        return None
    free = _host_memory()
    return None if free is None else free // jax.local_device_count()


def _host_memory() -> int | None:
    """Bytes that this process can have, of the machine and of its control group."""
    try:
        available = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:  # not Linux
        return None
    sizes = [int(available[1]) << 10] if available else []
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text().strip()
        used = re.search(r"^anon (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        if most.isdecimal() and used:
            sizes.append(max(0, int(most) - int(used[1])))
    except OSError:  # no such group
        pass
    return min(sizes, default=None)


@contextmanager
def explained_out_of_memory(stage: Stage, run: ResolvedRun) -> Iterator[None]:
    """Where a device or the host runs out of memory in the block, one message instead of XLA's.

    Raises RunError: what ran, what it needs and what is free, and what would help.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(text):
            raise
        place = run.config.place(("stages", stage.name))
        raise RunError(f"{place}stages.{stage.name}: {_explain(text, stage, run)}") from error


_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|Ran out of memory")
_ASKED = re.compile(r"allocat\w*\s+(\d+)(?: bytes|B)?|Used ([\d.]+\w?) of ([\d.]+\w?)")


def _explain(text: str, stage: Stage, run: ResolvedRun) -> str:
    where = f"out of memory ({HEARTBEAT})"
    found = _ASKED.search(text)
    if found and found[1]:
        needed = f"it needs {gib(int(found[1]))} more"
    else:
        needed = f"it needs {found[2]} of {found[3]}" if found else "it needs more than there is"
    free = free_here()
    left = "" if free is None else f", and {gib(free)} are free on a device"
    programs = load_functions(stage).programs(stage, planning_of(run)).programs
    fullest = max(programs, key=lambda program: sizes_of(program).total(), default=None)
    estimate = ""
    if fullest is not None:
        size = sizes_of(fullest).total()
        estimate = f" By estimate the fullest program, {fullest.name}, takes {gib(size)}."
    return f"{where}: {needed}{left}.{estimate} {_remedy(stage, fullest)}"
