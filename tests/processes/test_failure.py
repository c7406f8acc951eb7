"""What happens to all processes of a run when one of them is killed, stopped, fails, or differs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from r1jax.lock import locked
from r1jax.peers import EXIT_PEER_LOST
from r1jax.recipe import EXIT_PREEMPTED

pytestmark = pytest.mark.slow  # hosts that fail

TESTS = Path(__file__).parents[1]
RUN = "tiny-hosts-s0"
HOST = socket.gethostname()
# A host trains on every other part of the batch, and samples on neighbouring ones.
INTERLEAVED = ("mesh.axes={fsdp: 2, data: 2}", "mesh.rollout={axes: {data: 4}}")
# Each host samples half of the answers to every question.
SPLIT_ANSWERS = ("mesh.axes={fsdp: 2}", "mesh.rollout={axes: {sample: 2}, rules: {sample: sample}}")
# Of six parts of the batch, which are pairs of devices, each host has one and a half: the first two
# hosts read three of them, the others the rest.
PAIRS_ACROSS = ("mesh.axes={data: 6, tensor: 2}", "mesh.rules={kv_heads: null}")
ONLY_SAMPLED_IN_PAIRS = (
    "mesh.axes={data: 6}",
    "mesh.rules={kv_heads: null}",
    "mesh.rollout={axes: {data: 3, tensor: 2}}",
)
IN_SIXES = ("stages.tuned.rows_per_step=12", "stages.rl.questions_per_step=12")
ON_FOUR_HOSTS = "mesh.axes={data: 2, fsdp: 4}"  # each of which has its own part of the weights


@dataclass(frozen=True)
class Ended:
    """The exit status of a process (-9: killed), and all that it said."""

    status: int
    said: str


class Hosts:
    """Runs `r1jax run tiny_hosts.yaml` on hosts, which are processes of this machine."""

    def __init__(self) -> None:
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        }

    def run(
        self,
        output: Path,
        count: int,
        devices: int,
        *changes: str,
        accidents: Mapping[int, str] | None = None,
        own_changes: Mapping[int, str] | None = None,
    ) -> list[Ended]:
        """The ends of `count` hosts with so many devices each.

        Args:
          accidents: of hosts, as `POINT NUMBER`; see host_of_many.py.
          own_changes: to the config, on single hosts.
        """
        accidents, own_changes = accidents or {}, own_changes or {}
        address = f"127.0.0.1:{free_port()}"
        started = [
            subprocess.Popen(
                [
                    *(sys.executable, "host_of_many.py", *accidents.get(i, "none 0").split()),
                    *("run", "tiny_hosts.yaml", f"output={output}", f"mesh.cpu_devices={devices}"),
                    *changes,
                    *([own_changes[i]] if i in own_changes else []),
                ],
                env=self._environment
                | {
                    "JAX_COORDINATOR_ADDRESS": address if count > 1 else "",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(i),
                },
                cwd=TESTS,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for i in range(count)
        ]
        try:
            said = [process.communicate(timeout=600)[0] for process in started]
        finally:
            for process in started:
                with suppress(ProcessLookupError):  # it has ended, and so have its workers
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [Ended(p.returncode, text) for p, text in zip(started, said, strict=True)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def statuses(ended: list[Ended]) -> list[int]:
    return [each.status for each in ended]


def told(ended: list[Ended]) -> str:
    return "\n".join(f"--- {each.status}\n{each.said}" for each in ended)


def assert_equal_runs(output: Path, reference: Path) -> None:
    """Metrics of every step and the weights of every stage, to float tolerance.

    Each step moves a weight by up to 2e-3. Where its gradient is almost zero, Adam makes as much of
    the rounding of float32 sums.
    """
    for stage in ("00-tuned", "01-rl"):
        run, wanted = (folder / RUN / "stages" / stage for folder in (output, reference))
        metrics = [rows(folder / "metrics.jsonl") for folder in (run, wanted)]
        assert [row["step"] for row in metrics[0]] == [row["step"] for row in metrics[1]]
        for found, row in zip(*metrics, strict=True):
            assert found.keys() == row.keys()
            for key, value in row.items():
                where = f"{stage}, step {row['step']}: {key}"
                np.testing.assert_allclose(
                    float(found[key]), float(value), atol=2e-4, err_msg=where
                )
        weights = [load_file(folder / "model/model.safetensors") for folder in (run, wanted)]
        assert weights[0].keys() == weights[1].keys()
        for key, value in weights[1].items():
            np.testing.assert_allclose(weights[0][key], value, atol=2e-4, err_msg=key)


def checkpoints(output: Path, stage: str) -> list[str]:
    return sorted(path.name for path in (output / RUN / "stages" / stage / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def hosts() -> Hosts:
    return Hosts()


@pytest.fixture(scope="module")
def alone(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process on one device, which nothing disturbs."""
    output = tmp_path_factory.mktemp("alone")
    ended = hosts.run(output, 1, 1)
    assert statuses(ended) == [0], told(ended)
    metrics = rows(output / RUN / "stages/01-rl/metrics.jsonl")
    # There is something to agree on.
    assert all(row["optimizer/grad_norm"] > 0.01 for row in metrics)
    assert len({row["reward/mean"] for row in metrics}) == 4
    return output


@pytest.fixture(scope="module")
def killed(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    """A run on 4 hosts with 2 devices each, one of which dies between sampling and update."""
    output = tmp_path_factory.mktemp("killed")
    accidents = {2: "killed_before_an_update 3"}
    return output, hosts.run(output, 4, 2, ON_FOUR_HOSTS, accidents=accidents)


def test_when_one_is_killed_the_others_stop_and_name_it(
    killed: tuple[Path, list[Ended]],
) -> None:
    output, ended = killed
    lost = EXIT_PEER_LOST
    assert statuses(ended) == [lost, lost, -signal.SIGKILL, lost], told(ended)
    for index in (0, 1, 3):
        said = ended[index].said
        assert f"Process 2 ({HOST}) is lost: it has not been seen for 4" in said, said
        assert f"last checkpoint. Process {index} ({HOST}) stops, with exit status 134" in said
        assert "Traceback" not in said and "Terminating process" not in said, said
    assert checkpoints(output, "01-rl") == ["2"]


@pytest.mark.parametrize(
    ("devices", "axes"),
    [(1, "{data: -1}"), (2, "{data: -1}"), (8, "{data: 2, tensor: 1, fsdp: 4}")],
)
def test_one_process_goes_on_from_the_checkpoint_of_four(
    devices: int,
    axes: str,
    hosts: Hosts,
    killed: tuple[Path, list[Ended]],
    alone: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(killed[0], tmp_path / "taken_over")
    (ended,) = hosts.run(tmp_path / "taken_over", 1, devices, f"mesh.axes={axes}")
    assert ended.status == 0 and "rl: resumed at step 2" in ended.said, ended.said
    assert_equal_runs(tmp_path / "taken_over", alone)


def test_the_killed_run_goes_on_to_the_end_of_one_process(
    hosts: Hosts, killed: tuple[Path, list[Ended]], alone: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed[0], tmp_path / "again")
    ended = hosts.run(tmp_path / "again", 4, 2, ON_FOUR_HOSTS)
    assert statuses(ended) == [0, 0, 0, 0], told(ended)
    assert "rl: resumed at step 2" in ended[0].said
    assert_equal_runs(tmp_path / "again", alone)


def test_sigterm_to_one_saves_the_same_step_of_all(
    hosts: Hosts, alone: Path, tmp_path: Path
) -> None:
    """On 2 hosts with 2 devices each; the run that goes on ends as that of one process."""
    accidents = {1: "sigterm_before_an_update 1"}
    ended = hosts.run(tmp_path, 2, 2, *INTERLEAVED, accidents=accidents)
    assert statuses(ended) == [EXIT_PREEMPTED, EXIT_PREEMPTED], told(ended)
    assert "Stopped by SIGTERM. rl: saved at step 1" in ended[0].said
    assert checkpoints(tmp_path, "01-rl") == ["1"]
    ended = hosts.run(tmp_path, 2, 2, *INTERLEAVED)
    assert statuses(ended) == [0, 0], told(ended)
    assert "rl: resumed at step 1" in ended[0].said
    assert_equal_runs(tmp_path, alone)


def test_hosts_that_share_the_answers_to_a_question_run_as_one_process(
    hosts: Hosts, alone: Path, tmp_path: Path
) -> None:
    """Stop strings are looked for, and rewards given, where a whole group has come together."""
    ended = hosts.run(tmp_path, 2, 1, *SPLIT_ANSWERS)
    assert statuses(ended) == [0, 0], told(ended)
    assert_equal_runs(tmp_path, alone)
    found, wanted = (
        rows(output / RUN / "stages/01-rl/samples.jsonl") for output in (tmp_path, alone)
    )
    assert [row["completion"] for row in found] == [row["completion"] for row in wanted]
    assert sum(row["completion"].endswith(("7", "42")) for row in found) > 5


@pytest.fixture(scope="module")
def alone_in_sixes(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone_in_sixes")
    ended = hosts.run(output, 1, 1, *IN_SIXES)
    assert statuses(ended) == [0], told(ended)
    return output


def test_hosts_that_hold_some_parts_in_common_run_and_go_on_as_one_process(
    hosts: Hosts, alone_in_sixes: Path, tmp_path: Path
) -> None:
    changes = (*PAIRS_ACROSS, *IN_SIXES)
    ended = hosts.run(tmp_path, 4, 3, *changes, accidents={2: "killed_before_an_update 3"})
    assert statuses(ended)[2] == -signal.SIGKILL, told(ended)
    assert checkpoints(tmp_path, "01-rl") == ["2"]
    ended = hosts.run(tmp_path, 4, 3, *changes)
    assert statuses(ended) == [0, 0, 0, 0], told(ended)
    assert "rl: resumed at step 2" in ended[0].said
    assert_equal_runs(tmp_path, alone_in_sixes)


def test_hosts_that_sample_some_parts_in_common_run_as_one_process(
    hosts: Hosts, alone_in_sixes: Path, tmp_path: Path
) -> None:
    """They train on parts of their own. Of three parts each reads all."""
    ended = hosts.run(tmp_path, 2, 3, *ONLY_SAMPLED_IN_PAIRS, *IN_SIXES)
    assert statuses(ended) == [0, 0], told(ended)
    assert_equal_runs(tmp_path, alone_in_sixes)
    found, wanted = (
        rows(output / RUN / "stages/01-rl/samples.jsonl") for output in (tmp_path, alone_in_sixes)
    )
    assert [row["completion"] for row in found] == [row["completion"] for row in wanted]


def test_when_the_first_is_killed_the_others_name_it(hosts: Hosts, tmp_path: Path) -> None:
    """JAX ends them in that moment, as its key-value store was there."""
    ended = hosts.run(tmp_path, 2, 2, accidents={0: "killed_as_it_begins 1"})
    assert statuses(ended) == [-signal.SIGKILL, -signal.SIGABRT], told(ended)
    assert EXIT_PEER_LOST == 128 + signal.SIGABRT  # what a shell or a container says of it
    said = ended[1].said
    assert "Process 0 (127.0.0.1:" in said and "is lost: nobody answers there" in said, said
    assert f"Process 1 ({HOST}) stops, with exit status 134" in said, said


def test_one_that_fails_alone_ends_all(hosts: Hosts, tmp_path: Path) -> None:
    """It keeps its own exit status, by which the launcher knows not to start again."""
    ended = hosts.run(tmp_path, 2, 2, accidents={1: "fails_alone 1"})
    assert statuses(ended) == [EXIT_PEER_LOST, 1], told(ended)
    error = "the disk of this host is full"
    assert f"Process 1 ({HOST}) failed with OSError: {error}. Process 0" in ended[0].said
    assert error in ended[1].said and "is lost" not in ended[1].said


def test_a_directory_that_others_run_is_refused_by_all(hosts: Hosts, tmp_path: Path) -> None:
    with locked(tmp_path / RUN):
        ended = hosts.run(tmp_path, 2, 1)
    assert statuses(ended) == [2, 2], told(ended)
    assert f"process {os.getpid()} on {HOST}, since" in ended[0].said
    assert "others are running it, process 0 says who" in ended[1].said
    assert [path.name for path in (tmp_path / RUN).iterdir()] == ["lock"]


def test_all_fall_back_from_a_checkpoint_that_is_damaged(hosts: Hosts, tmp_path: Path) -> None:
    tuned = ("stages.tuned.checkpoint_every=1", "--only", "tuned")
    ended = hosts.run(tmp_path, 2, 1, *tuned)
    assert statuses(ended) == [0, 0], told(ended)
    folder = tmp_path / RUN / "stages/00-tuned/checkpoints"
    assert checkpoints(tmp_path, "00-tuned") == ["1", "2"]
    for path in sorted((folder / "2/arrays").rglob("*")):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:40])
    ended = hosts.run(tmp_path, 2, 1, "stages.tuned.steps=3", *tuned)
    assert statuses(ended) == [0, 0], told(ended)
    assert "2 is damaged" in ended[0].said and "Going on from 1" in ended[0].said
    assert checkpoints(tmp_path, "00-tuned") == ["2", "2.damaged", "3"]
    steps = [row["step"] for row in rows(tmp_path / RUN / "stages/00-tuned/metrics.jsonl")]
    assert steps == [1, 2, 3]


def test_unequal_shares_do_not_hang(hosts: Hosts, tmp_path: Path) -> None:
    """No answer of process 1 can be scored, and of the last batch it has no prompts."""
    stages = [
        {"name": "picked", "kind": "rejection_sampling", "data": "questions", "rewards": ["here"]}
        | {"samples_per_prompt": 4, "prompts_per_batch": 8, "max_new_tokens": 12},
        {"name": "rl", "kind": "grpo", "data": "questions", "steps": 1, "questions_per_step": 8}
        | {"outputs_per_question": 4, "max_new_tokens": 12, "length_bucket": 32}
        | {"optimizer": {"learning_rate": 0.01}},
    ]
    rewards = {"here": {"function": "tiny_rewards:last_number_in", "options": {"process": "0"}}}
    ended = hosts.run(
        tmp_path, 2, 1, f"stages={json.dumps(stages)}", f"rewards={json.dumps(rewards)}"
    )
    assert statuses(ended) == [0, 0], told(ended)
    picked = tmp_path / RUN / "stages/00-picked"
    samples = rows(picked / "samples.jsonl")
    failed = [row["outcome"] == "verifier_failed" for row in samples]
    of_batches = [[False] * 16 + [True] * 16] * 2 + [[False] * 16]
    assert failed == [one for batch in of_batches for one in batch]
    asked_here = {row["problem_id"] for row, lost in zip(samples, failed, strict=True) if not lost}
    kept = rows(picked / "dataset.jsonl")
    assert kept and {row["provenance"]["problem_id"] for row in kept} <= asked_here
    (update,) = rows(tmp_path / RUN / "stages/01-rl/metrics.jsonl")
    assert update["outcome/verifier_failed"] == 0.5 and update["optimizer/finite"] == 1


@pytest.mark.parametrize(
    ("accidents", "own_changes", "messages"),
    [
        (
            {1: "another_jaxlib 0"},
            {2: "stages.rl.steps=3"},
            [
                f'jaxlib: "0.0.1" in process 1 ({HOST}); "',
                f"config.stages.1.steps: 3 in process 2 ({HOST}); "
                f"4 in processes 0 ({HOST}), 1 ({HOST})",
                "Give every host the same",
            ],
        ),
        (
            {1: "another_device 0"},
            {},
            [f"devices of a process: 2 in process 0 ({HOST}); 3 in", "mesh.cpu_devices="],
        ),
        (
            {1: "shorter_data 1"},
            {},
            [
                f"data.conversations: examples: 16 in process 0 ({HOST}); 15 in process 1",
                f"data.questions: examples: 20 in process 0 ({HOST}); 19 in process 1",
                "Every host has to read the same data",
            ],
        ),
    ],
)
def test_processes_that_differ_are_refused_before_anything_runs(
    accidents: dict[int, str],
    own_changes: dict[int, str],
    messages: list[str],
    hosts: Hosts,
    tmp_path: Path,
) -> None:
    count = 1 + max([*accidents, *own_changes])
    ended = hosts.run(tmp_path, count, 2, accidents=accidents, own_changes=own_changes)
    assert statuses(ended) == [2] * count, told(ended)
    for each in ended:
        for message in messages:
            assert message in each.said, each.said
    assert list(tmp_path.iterdir()) == []
