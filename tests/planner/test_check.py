"""What is said of a run on a slice that is not there, without compiling for it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import forked
import pytest

from r1jax.config.load import ConfigError, load_config
from r1jax.config.slices import slice_name
from r1jax.planner.topologies import is_slice
from r1jax.run.models import make_layouts
from r1jax.run.resolve import check_divided
from r1jax.settings.stage import Divided
from r1jax.sharding import StandIn

TESTS = Path(__file__).parents[1]

STAGES = """
  - {name: other, kind: evaluate, weights: absent, data: theirs, samples_per_problem: 1,
     problems_per_batch: 1, max_new_tokens: 8, rewards: [format]}
"""
SLICES = """
slices:
  v6e:2x4: {mesh.axes: {data: 8}, stages.base.rows_per_step: 8, stages.zero.micro_batches: 1}
  v5p-8: {mesh.axes: {data: 4}}
"""
FOR_EIGHT = (
    *("mesh.axes={data: 2, fsdp: -1}", "stages.base.rows_per_step=8"),
    "stages.zero.micro_batches=1",
)
MINE, OTHERS, BASED = "MINE", "OTHERS", "BASED"  # configs, see below
COMMANDS = {
    "dry run": ("run", MINE, "--slice", "v6e-8", "--dry-run"),
    "dry run refused": ("run", MINE, "--slice", "v5p:2x2x1", "--dry-run", "mesh.axes={data: 3}"),
    "check": ("plan", MINE, "--slice", "v6e:2x4", "--check"),
    "check refused": ("plan", MINE, "--topology", "v6e-8", "--check", "mesh.axes={data: -1}"),
    "memory": ("plan", MINE, "--slice", "v6e-8", "--check", "model.config.hidden_size=262144"),
    "no settings": ("run", MINE, "--slice", "v6e:4x4", "--dry-run"),
    "one stage": ("plan", OTHERS, "--fake-devices", "1", "--only", "base", "--quick"),
    "unknown shape": ("plan", OTHERS, "--fake-devices", "1", "--check"),
    "trains": ("run", MINE, *FOR_EIGHT, "--only", "base"),
    "described": ("run", MINE, *FOR_EIGHT, "--dry-run"),
    "scripts": ("on-slice", "v6e-8", "--", MINE, "seed=1", "--from", "zero"),
    "scripts, other name": ("on-slice", "v5p-8", "--", MINE),
    "scripts, none of it": ("on-slice", "v6e-16", "--", MINE, "--only", "base"),
    "scripts, given": ("on-slice", "v6e-8", "--", MINE, "--slice", "v6e:2x4"),
    "scripts, another given": ("on-slice", "v6e-8", "--", MINE, "--slice", "v5p-8"),
    "scripts, option": ("on-slice", "v6e-8", "--", MINE, "--fro", "zero"),
    "scripts, stage": ("on-slice", "v6e-8", "--", MINE, "--from", "zeroes"),
    "scripts, key": ("on-slice", "v6e-8", "--", MINE, "stages.zero.micro_batch=2"),
    "scripts, unknown": ("on-slice", "v3-8", "--", MINE),
    "scripts, base": ("on-slice", "v6e-8", "--", BASED),
    "scripts, file": (
        *("on-slice", "v6e-8", "--", MINE, "data.train.source=jsonl:tiny_pairs.jsonl"),
        "model.tokenizer=../tests",
    ),
    "scripts, absolute": (
        *("on-slice", "v6e-8", "--", MINE, "--only", "base"),
        f"data.held_out.source=jsonl:{TESTS / 'tiny_pairs.jsonl'}",
    ),
    "scripts, reward": ("on-slice", "v6e-8", "--", MINE, "rewards.mine={function: 'a.py:f'}"),
}
# One process for all, as one without the TPU compiler.
PROGRAM = """
import importlib.util, json, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "libtpu" else find(name, *a)
from typer.testing import CliRunner
from r1jax.cli import app
done = {}
for name, words in json.loads(sys.argv[1]).items():
    ended = CliRunner().invoke(app, words)
    done[name] = [ended.exit_code, ended.stdout, ended.stderr]
    if ended.exception and not isinstance(ended.exception, SystemExit):
        done[name][2] += repr(ended.exception)
json.dump(done, open(sys.argv[2], "w"))
"""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """All of COMMANDS, with eight devices that XLA_FLAGS makes of the CPU."""
    folder = tmp_path_factory.mktemp("check")
    tiny = (TESTS / "tiny.yaml").read_text() + f"output: {folder / 'runs'}\n"
    theirs = 'data:\n  theirs: {source: "jsonl:/nowhere/rows.jsonl"}\n'
    absent = "models: {absent: {path: /nowhere/at/all}}\n"
    texts = {
        MINE: tiny + SLICES,
        OTHERS: absent
        + tiny.replace("data:\n", theirs, 1).replace("output:", STAGES.lstrip("\n") + "output:"),
        BASED: f"base: {TESTS / 'tiny.yaml'}\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    words = {
        name: [str(folder / f"{word}.yaml") if word in texts else word for word in command]
        for name, command in COMMANDS.items()
    }
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    ended = forked.run(
        *("-c", PROGRAM, json.dumps(words), str(folder / "done.json")),
        env=os.environ | environment,
        cwd=TESTS,
    )
    assert ended.returncode == 0, ended.stderr
    results = json.loads((folder / "done.json").read_text())
    return {name: Done(*result) for name, result in results.items()}


@pytest.mark.parametrize(
    ("cloud", "ours"),
    [
        *(("v6e-1", "v6e:1x1"), ("v6e-8", "v6e:2x4"), ("v6e-16", "v6e:4x4"), ("v6e-64", "v6e:8x8")),
        *(("v6e-256", "v6e:16x16"), ("v5litepod-128", "v5e:8x16"), ("v5litepod-4", "v5e:2x2")),
        *(("v5p-8", "v5p:2x2x1"), ("v5p-16", "v5p:2x2x2"), ("v5p-64", "v5p:2x4x4")),
        *(("v5p-128", "v5p:4x4x4"), ("v5p-1024", "v5p:8x8x8"), ("v4-32", "v4:2x2x4")),
        *(("tpu7x-512", "tpu7x:4x8x8"), ("2xv6e-64", "2xv6e:8x8"), ("1xv5p-8", "v5p:2x2x1")),
        *(("v5p:4x4x8", "v5p:4x4x8"), ("v5p-384", "v5p-384"), ("mine", "mine"), ("v3-8", "v3-8")),
    ],
)
def test_a_slice_has_two_names(cloud: str, ours: str) -> None:
    assert slice_name(cloud) == ours
    assert is_slice(ours) == (":" in ours)


def test_a_remedy_is_a_setting_that_divides() -> None:
    assert Divided(".rows / n", 8, "batch", ("n", 4)).remedy(16) == "n=2"
    assert Divided(".rows / n", 6, "batch", ("n", 4)).remedy(16) == ""
    assert Divided(".row_tokens", 100, "time").remedy(16) == "row_tokens=112"
    assert Divided(": rows x samples", 100, "batch").remedy(16) == ""
    # Where no smaller divisor does, the first setting above the line is raised.
    rows = (("rows", 7), ("samples", 6))
    assert Divided(": rows x samples", 42, "batch", factors=rows).remedy(16) == "rows=8"
    assert Divided(": rows x samples / n", 21, "batch", ("n", 2), rows).remedy(3) == "n=1"
    assert Divided(": rows x samples / n", 21, "batch", ("n", 2), rows).remedy(4) == "rows=8"


def test_every_batch_that_does_not_divide_is_named_with_what_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(TESTS)
    monkeypatch.syspath_prepend(TESTS)
    config = load_config("tiny.yaml")
    layouts = make_layouts(config.mesh, stands_for=StandIn("tpu", hosts=1))
    monkeypatch.setattr("r1jax.sharding.Layout.shards", lambda *_: 8)
    with pytest.raises(ConfigError) as refused:
        check_divided(config, layouts)
    first, second = refused.value.problems
    assert "stages.base.rows_per_step / micro_batches = 4 is not a multiple of 8" in first
    assert second.endswith("change one of the two, such as stages.zero.micro_batches=1")
    check_divided(config, layouts, [config.stage("before")])  # that stage alone


def test_a_dry_run_is_of_the_slice_that_it_names(done: dict[str, Done]) -> None:
    """With all checks, and each array's size there."""
    assert done["dry run"].status == 0, done["dry run"].err
    assert "devices: 8 x v6e:2x4, mesh data 8" in done["dry run"].out
    assert "zero: key-value cache" in done["dry run"].out
    assert done["dry run refused"].status == 2
    assert "needs a multiple of 3 devices and there are 4" in done["dry run refused"].err
    assert "`r1jax plan`" in done["dry run refused"].err
    assert done["no settings"].status == 2
    assert "it has settings for v6e:2x4, v5p-8" in done["no settings"].err


def test_a_check_needs_no_compiler(done: dict[str, Done]) -> None:
    assert done["check"].status == 0, done["check"].err
    line = "tiny on v6e:2x4: mesh data 8. The mesh divides the batches; the fullest program, "
    assert line in done["check"].out
    refused = done["check refused"]
    assert refused.status == 2 and "is not a multiple of 8" in refused.err
    assert done["memory"].status == 2 and "31.2 GiB are free" in done["memory"].err


def test_plan_of_one_stage_looks_at_that_stage_alone(done: dict[str, Done]) -> None:
    """Not at the models and data of others."""
    assert done["one stage"].status == 0, done["one stage"].err
    assert "A step of base" in done["one stage"].out
    unknown = done["unknown shape"]
    assert unknown.status == 0 and "memory is not known: " in unknown.out
    assert "/nowhere/at/all" in unknown.out


def test_fake_devices_of_xla_are_used(done: dict[str, Done]) -> None:
    assert done["trains"].status == 0, done["trains"].err
    assert "devices: 8 x cpu, mesh data 2, fsdp 4" in done["described"].out


def test_what_the_scripts_ask(done: dict[str, Done]) -> None:
    checked = done["scripts"]
    assert (checked.status, checked.out) == (0, "--slice\nv6e:2x4\n"), checked.err
    assert "tiny on v6e:2x4: mesh data 8" in checked.err
    assert done["scripts, other name"].out == "--slice\nv5p-8\n"  # as the file calls it
    assert (done["scripts, given"].status, done["scripts, given"].out) == (0, "")
    for name, message in (
        ("another given", "the slice of these scripts is v6e:2x4"),
        ("option", "No such option"),
        ("stage", "did you mean zero"),
        ("key", "micro_batches"),
        ("base", "only the config itself is copied to the slice"),
        ("reward", "only the config is copied to the slice"),
        ("file", "data.train.source: tiny_pairs.jsonl is on this machine"),
        ("file", "model.tokenizer: ../tests is on this machine"),
    ):
        refused = done[f"scripts, {name}"]
        assert refused.status == 2 and message in refused.err, refused
    assert "no settings for v6e:4x4; it has some for v6e:2x4, v5p-8" in (
        done["scripts, none of it"].err
    )
    absolute = done["scripts, absolute"]
    assert "data.held_out.source: /" in absolute.err and "or mount it there, too" in absolute.err
    unknown = done["scripts, unknown"]
    assert (unknown.status, unknown.out) == (0, "")
    assert "the planner does not know this slice" in unknown.err
