"""All configs on all their slices: the table, its margin, and what is not compiled again."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from r1jax.config.load import load_config
from r1jax.planner import compiler
from r1jax.planner.estimate import Times
from r1jax.planner.plan import Plan, ProgramPlan, StagePlan, distinct_stages
from r1jax.planner.report import as_markdown, has_margin
from r1jax.planner.topologies import Slice

GIB = 2.0**30


def program(name: str, **memory: float) -> ProgramPlan:
    times = Times(compute=3.0, memory=1.0, network=2.0, total=3.5)
    sizes = {kind: size * GIB for kind, size in memory.items()}
    return ProgramPlan(name, 2.0, sizes, True, times=times, compile_seconds=4.0)


def stage(name: str, *programs: ProgramPlan) -> StagePlan:
    return StagePlan(name, "sft", "step", 4096, programs, 7.0, 585.1, 0.4)


def planned(*stages: StagePlan, hbm: float = 16.0) -> Plan:
    return Plan("v5e:2x2", {"fsdp": 4, "data": 1}, 4, hbm * GIB, stages)


def cells(table: str) -> list[list[str]]:
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_a_row_shows_the_fullest_program_and_the_whole_step() -> None:
    small, large = program("prefill", weights=1.0), program("update", weights=2.0, batch=0.5)
    table = as_markdown([("a/b", planned(stage("rl", small, large)))], [])
    ((config, where, mesh, name, fits, weights, *_, other, free, time, rate, mfu, bound, took),) = (
        cells(table)
    )
    assert (config, where, mesh, name) == ("a/b", "v5e:2x2", "fsdp 4", "rl")
    assert (fits, weights, other, free) == ("yes", "2 GiB", "512 MiB", "84.4 %")
    assert (time, rate, mfu, bound, took) == ("step: 7 s", "585", "40 %", "compute", "8 s")


def test_a_tenth_of_the_memory_stays_free() -> None:
    plans = {
        size: planned(stage("s", replace(program("update", cache=size), fits=size < 16)))
        for size in (14, 15, 17)
    }
    assert [has_margin(plan) for plan in plans.values()] == [True, False, False]
    table = as_markdown(
        [(str(size), plan) for size, plan in plans.items()], [("x", "v5e:4x4"), ("x", "v6e:2x2")]
    )
    assert [row[4] for row in cells(table)] == ["yes", "tight", "**no**"]
    assert "- 17 on v5e:2x2: s: update is 1 GiB a device too large" in table
    assert "- x: not planned yet on v5e:4x4, v6e:2x2" in table


def test_what_the_compiler_gave_up_on_does_not_fit() -> None:
    gone = replace(program("update", activations=40.0), fits=False, times=None, problem="too large")
    plan = planned(replace(stage("s", gone), seconds=None, tokens_per_second=None))
    row = cells(as_markdown([("a", plan)], []))[0]
    assert row[4] == "**no**" and row[-5:-1] == ["", "", "40 %", ""]


def test_stages_that_are_alike_share_a_row_and_refusals_are_told() -> None:
    same = [stage(name, program("decode", cache=1.0)) for name in ("aime", "maths")]
    refused = Plan("v5e:2x2", {"fsdp": 3}, 4, None, refused="needs a multiple of 3 devices")
    table = as_markdown([("a", planned(*same)), ("b", refused)], [])
    first, second = cells(table)
    assert first[3] == "aime, maths"
    assert second[:5] == ["b", "v5e:2x2", "fsdp 3", "", "refused"] and len(second) == len(first)
    assert "- b on v5e:2x2: needs a multiple of 3 devices" in table
    assert not has_margin(refused)
    apart = replace(planned(*same), sampling_mesh={"data": 2, "tensor": 2})
    assert cells(as_markdown([("a", apart)], []))[0][2] == "fsdp 4; sampling: data 2, tensor 2"


def test_of_evaluations_that_differ_in_what_they_ask_the_largest_is_planned() -> None:
    config = load_config("distill/qwen2.5-math-7b", (), "v5p:2x2x2")
    assert [stage.name for stage in config.stages][1:] == [
        *("aime_2024", "math_500", "gpqa_diamond", "livecodebench")
    ]
    assert distinct_stages(config) == ["student", "livecodebench"]  # questions of 8,192 tokens
    # Another batch, or other sampling, is another program.
    other = load_config(
        "distill/qwen2.5-math-7b",
        ["stages.math_500.problems_per_batch=8", "stages.gpqa_diamond.sampling.temperature=1.0"],
        "v5p:2x2x2",
    )
    assert distinct_stages(other) == ["student", "math_500", "gpqa_diamond", "livecodebench"]


# --- What was compiled ---------------------------------------------------------------------------


def lowered(scale: float) -> jax.stages.Lowered:
    return jax.jit(lambda x: jnp.sin(x) @ x * scale).lower(jnp.ones((8, 8)))


def one_device() -> Slice:
    return Slice("one", tuple(jax.devices()[:1]), None)


def test_a_program_is_compiled_once_for_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiler.Compiler(one_device(), cache=tmp_path)(lowered(1.0))
    real, compiled = compiler._compile, []

    def counted(*arguments: Any) -> Any:
        compiled.append(1)
        return real(*arguments)

    monkeypatch.setattr(compiler, "_compile", counted)
    again = compiler.Compiler(one_device(), cache=tmp_path)(lowered(1.0))
    assert again == first and not compiled
    assert again.module is not None and again.argument_bytes == 4 * 8 * 8
    # Another text, another slice or another effort is another program.
    compiler.Compiler(one_device(), cache=tmp_path)(lowered(2.0))
    compiler.Compiler(replace(one_device(), name="two"), cache=tmp_path)(lowered(1.0))
    compiler.Compiler(one_device(), quick=True, cache=tmp_path)(lowered(1.0))
    assert len(compiled) == 3


def test_what_does_not_fit_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> dict[str, Any]:
        return {"needed": 20.0, "available": 16.0}

    monkeypatch.setattr(compiler, "_compile", too_large)
    for _ in range(2):
        with pytest.raises(compiler.DoesNotFit) as caught:
            compiler.Compiler(one_device(), cache=tmp_path)(lowered(1.0))
        assert (caught.value.needed, caught.value.available) == (20.0, 16.0)
        monkeypatch.setattr(compiler, "_compile", None)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: `make plan-all` gets it; then PYTHONPATH=.libtpu",
)
def test_a_packaged_config_fits_its_slice(tmp_path: Path) -> None:
    """The smallest of what `make plan-all` does; the second call compiles nothing."""
    command = [sys.executable, "-m", "r1jax", "plan-all", "r1_sft/qwen2.5-math-1.5b"]
    command += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "PLANS.md")]
    compiled = []
    for _ in range(2):
        done = subprocess.run(
            [*command, "--minutes", "0.001"],  # time for one slice to begin
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        compiled.append([(f.name, f.stat().st_mtime_ns) for f in (tmp_path / "cache").iterdir()])
    assert compiled[0] == compiled[1] and len(compiled[0]) == 1
    table = (tmp_path / "PLANS.md").read_text()
    (row,) = cells(table)
    assert row[1:5] == ["v5e:2x4", "fsdp 4, sequence 2", "sft", "yes"]
    assert float(row[11].removesuffix(" %")) >= 10
    assert ": not planned yet on v5p:2x2x1, v6e:2x2" in table


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: `make plan-all` gets it; then PYTHONPATH=.libtpu",
)
def test_the_meshes_in_the_docs_are_what_their_command_says_of_a_slice() -> None:
    """Figures may move by a twentieth, with the compiler's version; what fits may not."""
    text = (Path(__file__).parents[2] / "docs" / "pods.md").read_text()
    typed, table = re.findall(r"```bash\n(r1jax plan [^`]*)```\s+```text\n(slice [^`]*)```", text)[
        0
    ]
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(typed.replace("\\\n", " "))],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    printed = done.stdout.splitlines()
    *rows, refusal = table.splitlines()[1:]
    for row in rows:
        cells = re.split(r" {2,}", row.strip())
        (other,) = [line for line in printed if re.split(r" {2,}", line.strip())[:2] == cells[:2]]
        others = re.split(r" {2,}", other.strip())
        assert others[:4] == cells[:4]
        for shown, now in zip(cells[4:], others[4:], strict=True):
            was, value = (float(re.sub("[^0-9.]", "", each)) for each in (shown, now))
            assert value == pytest.approx(was, rel=0.05), (row, other)
    for part in refusal.split(" ... "):
        assert part in done.stdout
