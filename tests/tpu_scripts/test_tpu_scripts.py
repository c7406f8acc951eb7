"""The launch scripts, run against stand-ins for gcloud, kubectl and a worker's programs.

What is sent to a worker runs for real, in a folder that stands for its home directory; see
cloud_stand_ins/.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1jax.recipe import EXIT_PREEMPTED
from r1jax.run.tpu_compiler import VARIABLE, unset_flags

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tpu_scripts"
STAND_INS = Path(__file__).parents[1] / "cloud_stand_ins"
COMMANDS = sorted(
    path.relative_to(SCRIPTS).as_posix()
    for path in SCRIPTS.rglob("*.sh")
    if path.name not in ("slice.sh", "worker.sh")
)
WORKER_TOOLS = ("curl", "python3", "r1jax")

READY = {"queue": ["ACTIVE"]}
NONE = {"queue": [""]}
# What a shell, gcloud's splitting at spaces, ssh or YAML could spoil.
AWKWARD = [
    """notes=it's $5 a "day" & more; `true` $(false) $HOME *""",
    "name=two  spaces  ",
    "stages.rl.data=[{step: 0, data: a}]",
    "text=back\\slash\\\\ and $$(HOME) {{SLICE}}\nnext line\tüß",
    "empty=",
    "--from",
    "rl",
]


class Cloud:
    """A project with one queued resource, its workers, and the settings of the scripts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log.jsonl"
        programs = folder / "bin"
        programs.mkdir()
        source = (STAND_INS / "gcloud.py").read_text()
        for name in ("gcloud", "kubectl"):
            # Not `env python3`, which is a stand-in here.
            (programs / name).write_text(f"#!{sys.executable} -IS\n{source}")
        for name in WORKER_TOOLS:
            shutil.copy(STAND_INS / "worker_tool.sh", programs / name)
        for program in programs.iterdir():
            program.chmod(0o755)
        (folder / "checkout").write_text("the wheel")
        self.environment = os.environ | {
            "CLOUD": str(folder),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "STOP_SECONDS": "0.1",
        }
        self.settings: dict[str, Any] = {
            "PROJECT": "proj",
            "ZONE": "us-east5-b",
            "SLICE": "r1",
            "ACCELERATOR_TYPE": "v6e-16",
            "RUNTIME_VERSION": "v2-alpha-tpuv6e",
            "CAPACITY": "spot",
            "BUCKET": "a-bucket",
            "EXTRAS": "tpu,hf",
            "POLL_SECONDS": "0.05",
            "KUBE_CONTEXT": "gke_proj",
            "SERVICE_ACCOUNT": "runner",
            "IMAGE": "registry/r1jax:1",
            "GKE_ACCELERATOR": "tpu-v6e-slice",
            "GKE_TOPOLOGY": "4x4",
            "CHIPS_PER_HOST": "4",
            "GKE_SPOT": "yes",
        }
        self.scenario: dict[str, Any] = {
            "lives": [NONE, {"queue": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]}],
            "nodes": ["r1"],
            "workers": 2,
            "unreachable": [],
            "bucket": "a-bucket",
            "create_error": "",
            "list_error": "",
            "failure": "",
            "jobset": "",
            "apply_error": "",
        }
        self.plan("wait")
        self.save()

    def save(self, **changes: Any) -> None:
        self.scenario |= changes
        (self.folder / "scenario.json").write_text(json.dumps(self.scenario))
        lines = [f"{name}={shlex.quote(str(value))}" for name, value in self.settings.items()]
        (self.folder / "slice.env").write_text("\n".join(lines))

    def two_slices(self) -> None:
        self.settings["SLICES"] = 2
        self.save(nodes=["r1-0", "r1-1"])

    def plan(self, *turns: str, worker: str | None = None) -> None:
        """What the run does at its first, second, ... start; on one worker, or on all others."""
        name = "runs" if worker is None else f"{worker.replace('/', '-')}.runs"
        (self.folder / name).write_text("\n".join(turns) + "\n")

    def command(self, script: str, *words: str, option: str | None = None) -> list[str]:
        options = ["--settings", str(self.folder / "slice.env"), *([option] if option else [])]
        return [str(SCRIPTS / script), *options, *words]

    def run(self, script: str, *words: str, status: int = 0, option: str | None = None) -> str:
        """What a script said on both outputs; it must end with this status."""
        run = subprocess.run(
            self.command(script, *words, option=option),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert run.returncode == status, run.stdout
        return run.stdout

    def calls(self, *kinds: str) -> list[list[str]]:
        """The calls whose words begin so, or of all kinds that change something."""
        if not self.log.exists():
            return []
        made = [json.loads(line) for line in self.log.read_text().splitlines()]
        if kinds:
            return [call for call in made if call[: len(kinds)] == list(kinds)]
        return [call for call in made if not {"list", "describe", "get"} & set(call)]

    def steps(self) -> list[str]:
        """The changing calls, each as one word; the steps of worker.sh by their names."""
        steps = []
        for call in self.calls():
            if "ssh" in call:
                sent = next(word for word in call if word.startswith("--command="))
                words = shlex.split(sent.partition("=")[2])
                steps.append("tail" if words[0] == "tail" else words[3])
            else:
                steps.append(call[4] if call[1] == "compute" else call[2])
        return [step for step in steps if step != "state"]

    def runs(self) -> list[list[str]]:
        """[NODE/WORKER, R1JAX_MULTI_HOST=..., words of r1jax...] of each start of r1jax."""
        path = self.folder / "runs.log"
        if not path.exists():
            return []
        return [run.split("\0") for run in path.read_text().split("\0\n") if run]

    def tools(self, tool: str) -> list[str]:
        """The calls of one of a worker's programs."""
        path = self.folder / "worker.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.split(" ")[1] == tool]

    def install_and_launch(self, *words: str) -> None:
        self.save(lives=[READY, NONE])
        self.run("install.sh")
        self.run("launch.sh", "tiny/r1_zero", *words)

    def until_ended(self, worker: str) -> None:
        """Waits for the run's end on one worker."""
        for _ in range(600):
            if (self.folder / worker.replace("/", "-") / "r1jax/ended").exists():
                return
            time.sleep(0.05)
        raise AssertionError(f"the run on {worker} does not end")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path)
    yield cloud
    left = [path.read_text() for path in tmp_path.glob("*/r1jax/pid")]
    for pid in " ".join(left).split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            pass


SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
SCP = ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
PLACE = ["--project=proj", "--zone=us-east5-b"]


# create.sh and delete.sh


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["--node-id=r1", "--spot"]),
        ({"CAPACITY": "reserved"}, ["--node-id=r1", "--reserved"]),
        ({"CAPACITY": "on-demand"}, ["--node-id=r1"]),
        ({"QUEUE_FOR": "6h"}, ["--node-id=r1", "--spot", "--valid-until-duration=6h"]),
        ({"SLICES": 2}, ["--node-count=2", "--node-prefix=r1", "--spot"]),
    ],
)
def test_create_asks_and_waits(settings: dict[str, Any], expected: list[str], cloud: Cloud) -> None:
    cloud.settings |= settings
    cloud.save(nodes=["r1"] if settings.get("SLICES") is None else ["r1-0", "r1-1"])
    said = cloud.run("create.sh")
    assert cloud.calls() == [
        [
            *(*QUEUE, "create", "r1", *PLACE, "--accelerator-type=v6e-16"),
            *("--runtime-version=v2-alpha-tpuv6e", "--quiet", *expected),
            "--scopes=https://www.googleapis.com/auth/cloud-platform",
        ]
    ]
    for state in ("none", "waiting WAITING_FOR_RESOURCES", "waiting PROVISIONING", "ready"):
        assert f"r1: {state}\n" in said
    # Another call finds it ready.
    cloud.run("create.sh")
    assert len(cloud.calls()) == 1


def test_what_is_asked_before_and_while_waiting(cloud: Cloud) -> None:
    cloud.save(lives=[READY])
    cloud.run("create.sh")
    log = [json.loads(line) for line in cloud.log.read_text().splitlines()]
    assert log == [
        [
            *("gcloud", "storage", "buckets", "describe", "gs://a-bucket", "--project=proj"),
            *("--format=value(name)", "--quiet"),
        ],
        [
            *(*QUEUE, "list", *PLACE, '--filter=name~"/r1$"'),
            *("--format=value(state.state)", "--quiet"),
        ],
        [
            # Without the quotes gcloud reads the parentheses as its own, and finds nothing.
            *("gcloud", "compute", "tpus", "tpu-vm", "list", *PLACE),
            *('--filter=name~"/r1(-[0-9]+)?$"', "--format=value(name.basename(),state)", "--quiet"),
        ],
    ]


def test_create_waits_for_every_node(cloud: Cloud) -> None:
    cloud.two_slices()
    states = [{"r1-1": "CREATING"}, {"r1-0": "REPAIRING"}, {}]
    cloud.save(lives=[{"queue": ["ACTIVE"], "nodes": states}, NONE])
    said = cloud.run("create.sh")
    assert "r1-1 is CREATING" in said and "r1-0 is REPAIRING" in said
    assert cloud.calls() == []


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_replaces_what_is_over(state: str, cloud: Cloud) -> None:
    cloud.save(lives=[{"queue": [state]}, READY])
    cloud.run("create.sh")
    assert cloud.steps() == ["delete", "create"]
    assert cloud.calls()[0] == [*QUEUE, "delete", "r1", *PLACE, "--force", "--quiet"]


@pytest.mark.parametrize(
    "life",
    [
        {"queue": ["WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDING", "SUSPENDED"]},
        {"queue": ["PROVISIONING", "ACTIVE"], "nodes": [{"r1": "PREEMPTED"}]},
        # Deleted behind the queue's back.
        {"queue": ["ACTIVE"], "nodes": [{"r1": ""}]},
    ],
)
def test_create_asks_again_when_preempted_meanwhile(life: dict[str, Any], cloud: Cloud) -> None:
    cloud.save(lives=[NONE, life, READY])
    cloud.run("create.sh")
    assert cloud.steps() == ["create", "delete", "create"]


def test_no_capacity(cloud: Cloud) -> None:
    cloud.settings["QUEUE_FOR"] = "1h"
    cloud.save(
        lives=[NONE, {"queue": ["WAITING_FOR_RESOURCES", "FAILED"]}, READY],
        failure="no capacity in us-east5-b",
    )
    assert "no slice: no capacity in us-east5-b" in cloud.run("create.sh", status=3)
    assert cloud.steps() == ["create"]


def test_a_refused_request_is_shown(cloud: Cloud) -> None:
    cloud.save(create_error="Quota limit 'TPUV6EPreemptible' has been exceeded")
    assert "Quota limit" in cloud.run("create.sh", status=1)
    assert cloud.steps() == ["create"]


def test_not_being_able_to_ask_is_not_the_same_as_none(cloud: Cloud) -> None:
    cloud.save(list_error="PERMISSION_DENIED")
    for script in ("create.sh", "delete.sh", "stop.sh"):
        assert "PERMISSION_DENIED" in cloud.run(script, status=1)
    assert cloud.calls() == []


def test_a_bucket_that_is_not_there_is_named_before_anything_is_asked_for(cloud: Cloud) -> None:
    cloud.save(bucket="")
    assert "gs://a-bucket cannot be looked at" in cloud.run("create.sh", status=2)
    assert cloud.calls() == []


def test_delete_of_nothing(cloud: Cloud) -> None:
    assert "there is none" in cloud.run("delete.sh")
    assert cloud.calls() == []


# Settings and options


def test_missing_settings_are_all_named(cloud: Cloud) -> None:
    for name in ("PROJECT", "BUCKET"):
        del cloud.settings[name]
    cloud.settings["ZONE"] = ""
    cloud.save()
    # One that the environment has does not count.
    cloud.environment["PROJECT"] = "another"
    assert "slice.env does not set PROJECT ZONE BUCKET" in cloud.run("create.sh", status=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLICES", "0"),
        ("SLICES", "two"),
        ("CAPACITY", "preemptible"),
        ("SLICE", "R1"),
        ("SLICE", "r1-"),
        ("BUCKET", "gs://a-bucket"),
        ("EXTRAS", "tpu hf"),
        ("RESTARTS", "many"),
        ("POLL_SECONDS", "1m"),
        ("GKE_TOPOLOGY", "16"),
        ("CHIPS_PER_HOST", "0"),
        ("GKE_SPOT", "true"),
    ],
)
def test_settings_that_cannot_be_used_are_named(name: str, value: str, cloud: Cloud) -> None:
    cloud.settings[name] = value
    cloud.save()
    assert f"{name}={value} in {cloud.folder}/slice.env" in cloud.run("create.sh", status=2)
    assert cloud.calls() == []


def test_the_example_sets_everything(cloud: Cloud) -> None:
    shutil.copy(SCRIPTS / "slice.env.example", cloud.folder / "slice.env")
    for script in COMMANDS:
        words = ["tiny/r1_zero"] if Path(script).name in ("launch.sh", "run.sh") else []
        cloud.run(script, *words, option="--dry-run")


def test_a_missing_file_says_what_to_copy(cloud: Cloud) -> None:
    (cloud.folder / "slice.env").unlink()
    assert "slice.env.example" in cloud.run("create.sh", status=2)


@pytest.mark.parametrize("script", COMMANDS)
def test_help_and_unknown_options(script: str, cloud: Cloud) -> None:
    said = cloud.run(script, option="--help")
    assert said.startswith(f"{Path(script).name} [--settings FILE]") and said.endswith(".\n")
    assert "#!" not in said and "\n. " not in said
    assert "there is no option --dryrun" in cloud.run(script, status=2, option="--dryrun")


@pytest.mark.parametrize("script", COMMANDS)
def test_a_dry_run_calls_nothing(script: str, cloud: Cloud) -> None:
    words = ["tiny/r1_zero", *AWKWARD] if Path(script).name in ("launch.sh", "run.sh") else []
    said = cloud.run(script, *words, option="--dry-run")
    assert cloud.calls() == [] and cloud.calls("gcloud") == [] and cloud.runs() == []
    assert not list(cloud.folder.glob("r1*"))
    assert bool(said) == (script != "watch.sh")


# What is checked before anything is created

STARTING = ["run.sh", "launch.sh", "gke/launch.sh"]


@pytest.mark.parametrize("option", [None, "--dry-run"])
@pytest.mark.parametrize("script", STARTING)
def test_a_run_that_the_slice_would_refuse_creates_nothing(
    script: str, option: str | None, cloud: Cloud
) -> None:
    (cloud.folder / "refused").write_text("rows = 8 is not a multiple of 16")
    cloud.settings["SLICES"] = 2
    cloud.save()
    said = cloud.run(script, "mine", "seed=1", "--from", "rl", status=2, option=option)
    assert "rows = 8 is not a multiple of 16" in said
    assert "nothing was created or started" in said
    assert cloud.calls() == [] and cloud.calls("gcloud") == []
    (checked,) = (cloud.folder / "checks.log").read_text().splitlines()
    slice_name = "2xv6e:4x4" if script.startswith("gke") else "2xv6e-16"
    assert checked == f"-m r1jax on-slice {slice_name} -- mine seed=1 --from rl"


def test_the_file_of_settings_has_a_name_of_before(cloud: Cloud) -> None:
    def ended(*words: str) -> str:
        command = [str(SCRIPTS / "launch.sh"), "--slice", *words, "--dry-run", "mine"]
        done = subprocess.run(command, env=cloud.environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert "worker.sh\\ r1\\ start" in ended(str(cloud.folder / "slice.env"))
    assert "--slice v6e:8x8: which slice it is stands in slice.env" in ended("v6e:8x8")


@pytest.mark.parametrize("script", ["launch.sh", "gke/launch.sh"])
def test_settings_for_the_slice_are_used(script: str, cloud: Cloud) -> None:
    (cloud.folder / "settings_for").write_text("--slice\nv6e:4x4\n")
    said = cloud.run(script, "tiny/r1_zero", "seed=1", option="--dry-run")
    words = said.replace('", "', " ").replace("\\", "")
    assert "output=gs://a-bucket/runs --slice v6e:4x4 seed=1" in words


def test_the_first_run_of_the_readme_fits_the_example(cloud: Cloud) -> None:
    """By the planner itself; on more chips it says what to change, and that is enough."""
    cloud.environment["PYTHON"] = sys.executable
    example = (SCRIPTS / "slice.env.example").read_text()
    (cloud.folder / "slice.env").write_text(example)
    first = "qwen2.5-1.5b/r1_zero_gsm8k"
    said = cloud.run("run.sh", first, option="--dry-run")
    assert "on v6e:4x4: mesh data 1, fsdp 16, tensor 1. The mesh divides the batches" in said
    (line,) = [line for line in said.splitlines() if "on v6e:4x4" in line]
    (shown,) = re.findall(r"^qwen2.* on v6e:4x4: .*$", (ROOT / "docs/pods.md").read_text(), re.M)
    # The program and its size follow the config, and the compiler.
    pattern = r"(program, ).*( takes about ).*( of the 31)"
    assert re.sub(pattern, r"\1\2\3", shown) == re.sub(pattern, r"\1\2\3", line)
    assert "GiB of a device" in said and "queued-resources create" in said

    larger = example.replace("ACCELERATOR_TYPE=v6e-16", "ACCELERATOR_TYPE=v6e-64")
    (cloud.folder / "slice.env").write_text(larger.replace("GKE_TOPOLOGY=4x4", "GKE_TOPOLOGY=8x8"))
    refused = cloud.run("run.sh", first, option="--dry-run", status=2)
    assert "is not a multiple of 64" in refused and "queued-resources" not in refused
    change = re.findall(r"such as (\S+=\d+)", refused)
    assert change == ["stages.rl.micro_batches=8"]
    assert "fsdp 64" in cloud.run("gke/launch.sh", first, *change, option="--dry-run")


# install.sh


def test_install_reaches_every_worker_and_is_cheap_again(cloud: Cloud) -> None:
    cloud.two_slices()
    cloud.run("install.sh")
    copies = cloud.calls(*SCP)
    assert [copy[6:] for copy in copies] == [
        [f"{node}:", "--recurse", *PLACE, "--worker=all", "--quiet"] for node in ("r1-0", "r1-1")
    ]
    assert copies[0][5].endswith("/r1jax") and not Path(copies[0][5]).exists()
    everywhere = ["r1-0/0", "r1-0/1", "r1-1/0", "r1-1/1"]
    wheel = "r1jax-0.1.0-py3-none-any.whl"
    installs = [line for line in cloud.tools("python3") if "uv pip install" in line]
    assert sorted(line.split(" ")[0] for line in installs) == everywhere
    for line in installs:
        home = cloud.folder / line.split(" ")[0].replace("/", "-")
        assert line.endswith(
            f"--reinstall-package r1jax r1jax[gcs,tpu,hf] @ file://{home}/r1jax/{wheel}"
        )

    said = cloud.run("install.sh")
    assert len([line for line in cloud.tools("python3") if "uv" in line]) == 3 * len(everywhere)
    assert sorted(re.findall(r"@worker (\S+) installed", said)) == everywhere

    (cloud.folder / "checkout").write_text("another wheel")
    cloud.run("install.sh")
    installs = [line for line in cloud.tools("python3") if "uv pip install" in line]
    assert len(installs) == 2 * len(everywhere)


# launch.sh


def test_every_word_arrives_on_every_worker(cloud: Cloud) -> None:
    cloud.two_slices()
    cloud.install_and_launch(*AWKWARD)
    for worker in ("r1-0/0", "r1-0/1", "r1-1/0", "r1-1/1"):
        cloud.run("stop.sh")
        (run,) = [run for run in cloud.runs() if run[0] == worker]
        assert run[1:] == [
            *("R1JAX_MULTI_HOST=1", "run", "tiny/r1_zero", "output=gs://a-bucket/runs"),
            *AWKWARD,
        ]


def test_launch_says_exactly_what_a_dry_run_says(cloud: Cloud) -> None:
    dry = cloud.run("launch.sh", "tiny/r1_zero", *AWKWARD, option="--dry-run")
    cloud.install_and_launch(*AWKWARD)
    (sent,) = [call for call in cloud.calls(*SSH) if " start " in call[-1]]
    # bash reads its own $'...', which shlex does not know.
    script = f"for word in {dry.strip()}; do printf '%s\\0' \"$word\"; done"
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert words.stdout.split("\0")[:-1] == sent
    assert sent[5:10] == ["r1", *PLACE, "--worker=all", "--quiet"]


def test_launch_again_leaves_the_same_run_and_refuses_another(cloud: Cloud) -> None:
    cloud.install_and_launch("seed=1")
    said = cloud.run("launch.sh", "tiny/r1_zero", "seed=1")
    assert said.count("running already") == 2
    said = cloud.run("launch.sh", "tiny/r1_zero", "seed=2", status=1)
    assert "@worker r1/0 busy with another run: r1jax run tiny/r1_zero" in said and "seed=1" in said
    cloud.run("stop.sh")
    assert len(cloud.runs()) == 2
    cloud.run("launch.sh", "tiny/r1_zero", "seed=2")
    cloud.run("stop.sh")
    assert len(cloud.runs()) == 4


def test_launch_does_not_mix_two_runs(cloud: Cloud) -> None:
    cloud.plan("0", worker="r1/1")
    cloud.install_and_launch()
    cloud.until_ended("r1/1")
    said = cloud.run("launch.sh", "tiny/r1_zero", status=1)
    assert "on some of the workers only" in said
    assert "r1/0 running" in said and "r1/1 ended 0" in said
    cloud.run("stop.sh")


def test_launch_needs_an_installation(cloud: Cloud) -> None:
    cloud.run("install.sh")
    for path in cloud.folder.glob("r1-*/r1jax/installed"):
        path.unlink()
    said = cloud.run("launch.sh", "tiny/r1_zero", status=1)
    assert "@worker r1/1 broken r1jax is not installed" in said
    assert cloud.runs() == []


@pytest.mark.parametrize("script", ["launch.sh", "gke/launch.sh"])
@pytest.mark.parametrize("output", ["runs", "/mnt/other"])
def test_outputs_that_would_be_lost_are_refused(script: str, output: str, cloud: Cloud) -> None:
    said = cloud.run(script, "tiny/r1_zero", f"output={output}", status=2)
    assert f"output={output} would not outlive the machines" in said
    assert cloud.calls() == []


def test_a_config_of_ones_own_goes_to_the_bucket(cloud: Cloud, tmp_path: Path) -> None:
    config = tmp_path / "my run.yaml"
    config.write_text("name: mine\n")
    cloud.save(lives=[READY])
    cloud.run("install.sh")
    cloud.run("launch.sh", str(config), "output=gs://a-bucket/elsewhere")
    cloud.run("stop.sh")
    (copy,) = cloud.calls("gcloud", "storage")
    assert copy[2:5] == ["cp", str(config), "gs://a-bucket/configs/r1/"]
    assert cloud.runs()[0][2:] == [
        *("run", "gs://a-bucket/configs/r1/my run.yaml", "output=gs://a-bucket/runs"),
        "output=gs://a-bucket/elsewhere",
    ]


def test_launch_names_a_worker_that_does_not_answer(cloud: Cloud) -> None:
    cloud.save(unreachable=["r1/1"])
    assert "worker 1 of r1 does not answer" in cloud.run("launch.sh", "tiny/r1_zero", status=1)


# watch.sh, stop.sh and tail.sh


def test_watch_sees_the_end(cloud: Cloud) -> None:
    cloud.plan("0")
    cloud.install_and_launch()
    assert "the run finished" in cloud.run("watch.sh")


def test_watch_names_the_worker_that_failed_first(cloud: Cloud) -> None:
    cloud.two_slices()
    cloud.plan("134")
    cloud.plan("1", worker="r1-1/0")
    cloud.install_and_launch()
    cloud.until_ended("r1-1/0")
    said = cloud.run("watch.sh", status=1)
    assert "r1-1/0 was the first, exit status 1" in said
    assert "the log of r1-1/0, turn 1: 1" in said
    assert "the log of r1-0/0" not in said


def test_watch_takes_the_earlier_of_two_failures(cloud: Cloud) -> None:
    cloud.plan("2")
    cloud.install_and_launch()
    for worker in (0, 1):
        cloud.until_ended(f"r1/{worker}")
        (cloud.folder / f"r1-{worker}/r1jax/ended").write_text(f"2 {100 - worker}.5\n")
    assert "r1/1 was the first, exit status 2" in cloud.run("watch.sh", status=1)


@pytest.mark.parametrize("others", ["143", "134", "vanish"])
def test_watch_sees_a_preemption(others: str, cloud: Cloud) -> None:
    cloud.plan("143", worker="r1/0")
    cloud.plan(others)
    cloud.install_and_launch()
    assert "preempted" in cloud.run("watch.sh", status=143)


def test_a_failure_of_a_preempted_slice_is_a_preemption(cloud: Cloud) -> None:
    cloud.plan("1")
    cloud.install_and_launch()
    cloud.until_ended("r1/0")
    cloud.save(lives=[{"queue": ["ACTIVE"] * 3 + ["SUSPENDING"]}])
    assert "preempted: leaving SUSPENDING" in cloud.run("watch.sh", status=143)


def test_watch_sees_a_vm_go(cloud: Cloud) -> None:
    cloud.install_and_launch()
    life = {"queue": ["ACTIVE"], "nodes": [{}, {}, {"r1": "PREEMPTED"}]}
    cloud.save(lives=[life])
    assert "preempted: gone r1 is PREEMPTED" in cloud.run("watch.sh", status=143)


def test_watch_gives_up_on_silence(cloud: Cloud) -> None:
    cloud.install_and_launch()
    cloud.save(unreachable=["r1/1"])
    said = cloud.run("watch.sh", status=1)
    assert said.count("worker 1 of r1 does not answer") == 5
    assert "5 times in a row" in said


def test_watch_without_a_run(cloud: Cloud) -> None:
    cloud.save(lives=[READY])
    cloud.run("install.sh")
    assert "there is no run" in cloud.run("watch.sh", status=2)


def test_stop_saves_and_tells_watch(cloud: Cloud) -> None:
    cloud.install_and_launch()
    said = cloud.run("stop.sh")
    assert len(re.findall(r"@worker r1/[01] ended 143 [0-9.]+ stopped\n", said)) == 2
    assert "was stopped" in cloud.run("watch.sh", status=10)
    cloud.run("stop.sh")
    # Started again, it is a run like any other.
    cloud.plan("wait", "143")
    cloud.run("launch.sh", "tiny/r1_zero")
    assert "preempted" in cloud.run("watch.sh", status=143)


def test_a_vm_that_goes_down_waits_for_the_run_to_save(cloud: Cloud) -> None:
    """SIGTERM then reaches the run's supervisor, too, which must not die before it."""
    cloud.install_and_launch()
    home = cloud.folder / "r1-0/r1jax"
    while not (home / "pid").exists():
        time.sleep(0.05)
    run = int((home / "pid").read_text())
    os.kill(os.getsid(run), signal.SIGTERM)
    time.sleep(0.3)
    assert not (home / "ended").exists()
    os.kill(run, signal.SIGTERM)
    cloud.until_ended("r1/0")
    assert (home / "ended").read_text().split()[0] == "143"
    cloud.run("stop.sh")


def test_stop_of_nothing(cloud: Cloud) -> None:
    assert "there is none" in cloud.run("stop.sh")
    cloud.save(lives=[READY])
    cloud.run("install.sh")
    assert cloud.run("stop.sh").count("idle") == 2


def test_tail(cloud: Cloud) -> None:
    cloud.two_slices()
    for words, node, worker in (([], "r1-0", 0), (["r1-1"], "r1-1", 0), (["r1-1", "3"], "r1-1", 3)):
        line = cloud.run("tail.sh", *words, option="--dry-run")
        assert shlex.split(line) == [
            *(*SSH, node, *PLACE, f"--worker={worker}", "--quiet"),
            "--command=tail -n 100 -F r1jax/log",
        ]
    assert "there are: r1-0 r1-1" in cloud.run("tail.sh", "r1", status=2)
    assert "numbered from 0" in cloud.run("tail.sh", "r1-0", "last", status=2)


# run.sh

ROUND = ["scp", "install", "start"]


def test_run_goes_on_after_each_preemption(cloud: Cloud) -> None:
    """A slice stays after SIGTERM; goes without a word; then, on a new one, the run finishes."""
    cloud.plan("143", "wait", "0")
    cloud.plan("143", "suspend", "0", worker="r1/0")
    cloud.save(lives=[NONE, READY, READY])
    said = cloud.run("run.sh", "tiny/r1_zero", *AWKWARD)
    assert "again (2 of 100)" in said and "the run finished" in said
    assert "preempted: r1/0 ended 143" in said and "preempted: gone r1 is SUSPENDED" in said
    assert cloud.steps() == ["create", *ROUND, "stop", *ROUND, "delete", "create", *ROUND]
    assert len({tuple(run[2:]) for run in cloud.runs()}) == 1 and len(cloud.runs()) == 6
    assert cloud.runs()[0][-len(AWKWARD) :] == AWKWARD


def test_run_gives_up_when_a_worker_fails(cloud: Cloud) -> None:
    cloud.plan("1", worker="r1/1")
    said = cloud.run("run.sh", "tiny/r1_zero", status=1)
    assert "r1/1 was the first, exit status 1" in said
    assert "again" not in said
    assert cloud.steps() == ["create", *ROUND, "tail", "stop"]
    assert re.search("@worker r1/0 ended 143 .* stopped", said)


def test_run_ends_when_it_is_stopped(cloud: Cloud) -> None:
    cloud.save(lives=[READY])
    running = subprocess.Popen(
        cloud.command("run.sh", "tiny/r1_zero"),
        env=cloud.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for _ in range(600):
        if len(cloud.runs()) == 2:
            break
        time.sleep(0.05)
    cloud.run("stop.sh")
    said = running.communicate(timeout=120)[0]
    assert running.returncode == 143 and "the run was stopped" in said
    assert len(cloud.runs()) == 2


def test_run_takes_up_a_run_that_is_going_on(cloud: Cloud) -> None:
    cloud.install_and_launch()
    cloud.settings["RESTARTS"] = 0
    # create.sh finds it active, and so does watch.sh for a while.
    cloud.save(lives=[{"queue": ["ACTIVE"] * 3 + ["SUSPENDED"]}, READY])
    said = cloud.run("run.sh", "tiny/r1_zero", status=1)
    assert "running already" in said and "more than RESTARTS=0 times" in said
    assert len(cloud.runs()) == 2


def test_a_slice_that_goes_while_it_is_set_up_is_replaced(cloud: Cloud) -> None:
    cloud.plan("0")
    cloud.scenario["unreachable"] = ["r1/1"]
    life = {"queue": ["ACTIVE", "SUSPENDED"]}
    cloud.save(lives=[NONE, life, READY])
    # Only the first slice is out of reach; the failing step is install.sh.
    said = cloud.run("run.sh", "tiny/r1_zero", status=1)
    assert "again (1 of 100)" in said
    assert cloud.steps()[:5] == ["create", "scp", "install", "delete", "create"]


def test_no_capacity_ends_the_loop(cloud: Cloud) -> None:
    cloud.save(lives=[NONE, {"queue": ["FAILED"]}, READY], failure="stockout")
    assert "no slice: stockout" in cloud.run("run.sh", "tiny/r1_zero", status=3)
    assert cloud.steps() == ["create"]


# GKE


def expanded(word: str) -> str:
    """What a container gets of an argument: $$ stands for $, and $(NAME) for a variable."""
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", word), "a reference to a variable"
    return word.replace("$$", "$")


def test_the_manifest_is_the_job(cloud: Cloud) -> None:
    cloud.settings["SLICES"] = 3
    cloud.save()
    cloud.run("gke/launch.sh", "tiny/r1_zero", *AWKWARD)
    text = (cloud.folder / "applied.yaml").read_text()
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "r1"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 100 and policy["restartStrategy"] == "BlockingRecreate"
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 3
    # 4 x 4 chips, 4 on a host.
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["image"] == "registry/r1jax:1"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    words = [*container["command"], *map(expanded, container["args"])]
    assert words == ["r1jax", "run", "tiny/r1_zero", "output=gs://a-bucket/runs", *AWKWARD]


@pytest.mark.parametrize(("accelerator", "kind"), [("tpu-v6e-slice", ""), ("tpu7x", "TPU7x")])
def test_a_chip_gets_the_options_of_its_compiler(cloud: Cloud, accelerator: str, kind: str) -> None:
    cloud.settings |= {"GKE_ACCELERATOR": accelerator, "GKE_TOPOLOGY": "4x4x4" if kind else "4x4"}
    cloud.save()
    cloud.run("gke/launch.sh", "tiny/r1_zero")
    (slices,) = yaml.safe_load((cloud.folder / "applied.yaml").read_text())["spec"][
        "replicatedJobs"
    ]
    (container,) = slices["template"]["spec"]["template"]["spec"]["containers"]
    (variable,) = container["env"]
    assert variable["name"] == VARIABLE
    assert bool(variable["value"]) == bool(kind)
    assert unset_flags(kind, {VARIABLE: variable["value"]}) is None


def action(manifest: dict[str, Any], *, exit_code: int, disrupted: bool = False) -> str:
    """What JobSet does about a pod's end, by the rules that the manifest gives it."""
    job = manifest["replicatedJobs"][0]["template"]["spec"]
    reason = "BackoffLimitExceeded"
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if disrupted if codes is None else exit_code in codes["values"]:
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
            break
    for rule in manifest["failurePolicy"]["rules"]:
        if reason in rule.get("onJobFailureReasons", [reason]):
            return str(rule["action"])
    return "RestartJobSet"


def test_gke_goes_on_after_preemptions_only(cloud: Cloud) -> None:
    said = cloud.run("gke/launch.sh", "tiny/r1_zero", option="--dry-run")
    manifest = yaml.safe_load(said.split("\n", 1)[1])["spec"]
    # 143 is r1jax's own; the last process of a run that has lost another one ends with 134.
    assert EXIT_PREEMPTED == 143
    assert action(manifest, exit_code=143) == "RestartJobSet"
    assert action(manifest, exit_code=134) == "RestartJobSet"
    assert action(manifest, exit_code=137, disrupted=True) == "RestartJobSet"
    for code in (1, 2, 137):
        assert action(manifest, exit_code=code) == "FailJobSet"


def test_a_dry_run_on_gke_prints_what_would_be_applied(cloud: Cloud) -> None:
    cloud.settings["GKE_SPOT"] = "no"
    cloud.save()
    said = cloud.run("gke/launch.sh", "tiny/r1_zero", option="--dry-run")
    command, manifest = said.split("\n", 1)
    assert cloud.calls() == []
    cloud.run("gke/launch.sh", "tiny/r1_zero")
    assert shlex.split(command) == cloud.calls()[-1]
    assert manifest.strip() == (cloud.folder / "applied.yaml").read_text().strip()
    assert "{{" not in manifest and "gke-spot" not in manifest


@pytest.mark.parametrize(("jobset", "steps"), [("", []), ("Failed", ["delete"])])
def test_gke_replaces_a_jobset_that_has_ended(jobset: str, steps: list[str], cloud: Cloud) -> None:
    cloud.save(jobset=jobset)
    cloud.run("gke/launch.sh", "tiny/r1_zero")
    made = [next(word for word in call[1:] if word[0] != "-") for call in cloud.calls()]
    assert made == [*steps, "apply"]


def test_gke_refuses_another_run_and_sizes_that_do_not_fit(cloud: Cloud) -> None:
    cloud.save(apply_error="field is immutable")
    said = cloud.run("gke/launch.sh", "tiny/r1_zero", status=1)
    assert "field is immutable" in said and "gke/stop.sh first" in said
    cloud.settings["CHIPS_PER_HOST"] = 3
    cloud.save()
    assert "GKE_TOPOLOGY=4x4 is 16 chips" in cloud.run("gke/launch.sh", "c", status=2)


def test_gke_stop_and_tail(cloud: Cloud) -> None:
    cloud.run("gke/stop.sh")
    cloud.run("gke/tail.sh")
    place = ["kubectl", "--context=gke_proj", "--namespace=default"]
    assert cloud.calls() == [
        [*place, "delete", "jobset", "r1", "--ignore-not-found"],
        [
            *(*place, "logs", "--follow", "--tail=100", "--container=r1jax"),
            "--selector=jobset.sigs.k8s.io/jobset-name=r1,jobset.sigs.k8s.io/job-index=0,"
            "batch.kubernetes.io/job-completion-index=0",
        ],
    ]


# The scripts as such


def test_shellcheck() -> None:
    program = Path(sys.executable).with_name("shellcheck")
    found = str(program) if program.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed: pip install 'r1jax[test]'")
    run = subprocess.run(
        [found, *map(str, sorted(SCRIPTS.rglob("*.sh"))), str(STAND_INS / "worker_tool.sh")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout


def test_every_script_is_strict_and_can_be_called() -> None:
    assert "set -euo pipefail" in (SCRIPTS / "slice.sh").read_text()
    assert "set -euo pipefail" in (SCRIPTS / "worker.sh").read_text()
    for script in COMMANDS:
        assert os.access(SCRIPTS / script, os.X_OK), script
        assert "slice.sh" in (SCRIPTS / script).read_text(), script
