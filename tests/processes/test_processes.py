"""Several processes, each with its own rows, do what one process does."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import forked
import jax
import numpy as np
import pytest
import yaml
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from safetensors.numpy import load_file

from r1jax.config.load import load_config
from r1jax.processes import BatchSlice, agree, differences
from r1jax.run.resolve import check, resolve

TESTS = Path(__file__).parents[1]
RUN = "tiny-processes-s0"
# Of tiny_processes.yaml the stage by_rule alone, on the weights of the beginning.
_PLAN = yaml.safe_load((TESTS / "tiny_processes.yaml").read_text())
BY_RULE = (
    f"stages={json.dumps(_PLAN['stages'][1:2])}",
    f"data={json.dumps({'questions': _PLAN['data']['questions']})}",
    f"rewards={json.dumps({'last_number': _PLAN['rewards']['last_number']})}",
)


def start(
    output: Path, processes: int, *changes: str, devices: int = 2, pairs_across: bool = False
) -> list[forked.Process]:
    """The processes of a run on so many devices in all.

    pairs_across: see one_of_many.py.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "JAX_NUM_CPU_DEVICES": str(devices // processes),
        "PAIRS_ACROSS": "1" if pairs_across else "",
    }
    return [
        forked.Process(
            *("one_of_many.py", str(port), str(processes), str(index)),
            *(
                "tiny_processes.yaml",
                f"output={output}",
                f"mesh.cpu_devices={devices // processes}",
            ),
            *changes,
            env=environment,
            cwd=TESTS,
            one_output=True,
        )
        for index in range(processes)
    ]


def ended(started: list[forked.Process], status: int) -> list[str]:
    """What the processes said, all of which must end with this exit status."""
    try:
        said = [process.communicate(timeout=900)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [status] * len(started), "\n".join(said)
    return said


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole recipe, run by one process."""
    output = tmp_path_factory.mktemp("one")
    ended(start(output, 1), 0)
    return output / RUN


def assert_equal_recipes(two: Path, one: Path) -> None:
    """Samples and datasets of all stages, and to float tolerance metrics and weights."""
    found = sorted(path.relative_to(one) for path in one.glob("stages/*/*"))
    assert len([path for path in found if path.name == "model"]) == 6
    for path in found:
        name = str(path)
        exact = ("dataset.jsonl", "held_out.jsonl", "rewritten.jsonl")
        if path.name in exact or "after/samples" in name:
            assert (two / path).read_bytes() == (one / path).read_bytes(), name
        elif path.name == "metrics.jsonl":
            metrics = [rows(run / path) for run in (one, two)]
            assert len(metrics[0]) == len(metrics[1])
            for alone, shared in zip(*metrics, strict=True):
                assert alone.keys() == shared.keys()
                for key, value in alone.items():
                    np.testing.assert_allclose(
                        float(shared[key]), float(value), atol=2e-4, err_msg=f"{name}: {key}"
                    )
        elif path.name == "model":
            weights = [load_file(run / path / "model.safetensors") for run in (one, two)]
            assert weights[0].keys() == weights[1].keys()
            for key, value in weights[0].items():
                np.testing.assert_allclose(
                    weights[1][key], value, atol=2e-4, err_msg=f"{name}: {key}"
                )


@pytest.mark.slow  # three processes run a whole recipe
def test_two_processes_run_every_kind_of_stage_as_one(one: Path, tmp_path: Path) -> None:
    said = ended(start(tmp_path, 2), 0)
    # Process 0 speaks; the others have nothing to say.
    assert all(words in said[0] for words in ("by_rule: ", "(stage 1 of", "Report:", "Next:"))
    assert not any(words in said[1] for words in ("Report:", "Next:", "by_rule", "distilled"))
    two = tmp_path / RUN
    assert json.loads((two / "run.json").read_text())["hardware"]["processes"] == 2
    assert_equal_recipes(two, one)
    # Of the last batches process 1 had nothing: of prompts, of drafts, and of readable texts.
    for stage in ("01-by_rule", "02-by_model", "07-after"):
        assert len(rows(two / "stages" / stage / "samples.jsonl")) == 12 * 4
    assert len(rows(two / "stages/02-by_model/rewritten.jsonl")) % 8 in range(1, 5)
    assert len(rows(two / "stages/02-by_model/dataset.jsonl")) < 8
    (last,) = rows(two / "stages/06-rl/metrics.jsonl")[-1:]
    assert {"domain/general", "domain/maths", "reward/helpful", "reward/safety"} <= last.keys()


@pytest.mark.slow  # three processes run a whole recipe
@pytest.mark.parametrize("sampling", [(), ("mesh.rollout={axes: {data: 8}}",)])
def test_processes_that_hold_some_parts_in_common_run_every_kind_of_stage_as_one(
    sampling: tuple[str, ...], one: Path, tmp_path: Path
) -> None:
    """Of four parts of the batch the first process's devices hold three, the second's, too.

    Where each samples a half, reward models, which read rows as they are trained on, have the texts
    of both.
    """
    mesh = ("mesh.axes={data: 4, tensor: 2}", "mesh.rules={kv_heads: null}")
    whole = ("stages.helpful_model.micro_batches=1", "stages.rl.micro_batches=1")
    ended(start(tmp_path, 2, *mesh, *sampling, *whole, devices=8, pairs_across=True), 0)
    assert_equal_recipes(tmp_path / RUN, one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.by_rule.prompts_per_batch=7", "by_rule.prompts_per_batch = 7"),
        ("stages.by_model.rewrite.drafts_per_batch=3", "by_model.rewrite.drafts_per_batch = 3"),
        ("stages.after.problems_per_batch=5", "after.problems_per_batch = 5"),
        ("stages.rl.rollout_batches=8", "mini_batches_per_rollout / rollout_batches = 1"),
    ],
)
def test_batches_that_processes_cannot_share_are_refused(
    change: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the rows that are left over would be nobody's."""
    monkeypatch.chdir(TESTS)
    monkeypatch.setattr("r1jax.run.resolve.process_batch_slice", lambda _: BatchSlice(0, 2))
    config = load_config("tiny_processes.yaml", [change])
    with pytest.raises(ValueError, match=f"stages.*{message} is not a multiple of 2, the proc"):
        check(resolve(config))


def test_only_the_first_process_shows_bars_of_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
    config = load_config(TESTS / "tiny.yaml")
    try:
        for index in (0, 1):
            monkeypatch.setattr(jax, "process_index", lambda i=index: i)
            resolve(config)
            assert are_progress_bars_disabled() == bool(index)
            assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == str(index)
    finally:
        enable_progress_bars()


def test_each_process_signs_its_errors(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        forked.Process(
            *("-m", "r1jax", "run", "tiny_processes.yaml", f"output={tmp_path}"),
            "stages.after.problems_per_batch=5",
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
            cwd=TESTS,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for index, (process, (out, errors)) in enumerate(zip(started, said, strict=True)):
        assert (process.returncode, out) == (2, ""), errors
        assert f"[process {index}] command line: stages.after.problems_per_batch = 5" in errors


def test_an_empty_dataset_is_the_same_error_on_all_processes(tmp_path: Path) -> None:
    said = ended(
        start(
            tmp_path,
            2,
            *BY_RULE,
            "stages.by_rule.filters={length: {min_words: 100}}",
        ),
        1,
    )
    errors = [
        [line for line in text.splitlines() if "RunError: by_rule: no sample is left" in line]
        for text in said
    ]
    assert len(errors[0]) == 1 and errors[0] == errors[1]
    assert "filter length" in errors[0][0]


def test_sigterm_to_one_process_stops_the_rewriting_of_all(tmp_path: Path) -> None:
    asked: list[str] = []
    started: list[forked.Process] = []
    server = answering(lambda: started[1].send_signal(signal.SIGTERM), asked)
    started += start(
        tmp_path,
        2,
        *BY_RULE,
        "stages.by_rule.rewrite={kind: endpoint, model: m, concurrency: 1, "
        f"url: 'http://127.0.0.1:{server.server_port}/v1'}}",
    )
    said = ended(started, 143)
    server.shutdown()
    kept = rows(tmp_path / RUN / "stages/00-by_rule/rewritten.jsonl")
    assert len(kept) == len(asked) == len(set(asked))
    assert f"Stopped by SIGTERM. by_rule: {len(kept)} of " in " ".join(said[0].split())


def answering(begin: Callable[[], None], asked: list[str]) -> HTTPServer:
    """A slow model's server, which calls `begin` as it is asked for the first time."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            if len(asked) == 1:
                begin()
            threading.Event().wait(0.5)
            choice = {"message": {"content": "<think>1+1=2</think>2"}, "finish_reason": "stop"}
            body = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_differences_name_the_value_and_who_has_it() -> None:
    facts = [
        {"jax": "1", "config": {"steps": step, "stages": [{"name": "a"}, {"name": name}]}}
        for step, name in [(2, "b"), (2, "b"), (3, "c"), (2, "b"), (2, "b"), (2, "b")]
    ]
    assert differences(facts, list("uvwxyz")) == [
        "config.steps: 3 in process 2 (w); 2 in processes 0 (u), 1 (v), 3 (x), 4 (y) and 1 more",
        'config.stages.1.name: "c" in process 2 (w); "b" in processes 0 (u), 1 (v), 3 (x), 4 (y) '
        "and 1 more",
    ]
    assert differences(facts[:2], ["u", "v"]) == []


def test_differences_see_what_one_process_lacks() -> None:
    """And 1, 1.0, "1", true, null, [] and {} are seven values."""
    assert differences([{"a": 1, "b": {"c": []}}, {"a": 1}], ["u", "v"]) == [
        "b.c: [] in process 0 (u); nothing in process 1 (v)"
    ]
    values = [1, 1.0, "1", True, None, [], {}]
    (found,) = differences([{"a": value} for value in values], list("abcdefg"))
    assert found.count(" in process ") == 7


def test_one_process_agrees_with_itself() -> None:
    agree({"jax": "1"}, "Nothing is wrong.")
