"""A run's life: one process at a time, mended settings, longer stages, Ctrl-C, a new start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from r1jax import recipe
from r1jax.cli import app
from r1jax.config.load import parse_config
from r1jax.evaluation.run_directory import read_run
from r1jax.lock import LOCK, is_locked, locked
from r1jax.run.checkpointed import find_model
from r1jax.run.selection import Selection
from r1jax.run.stop import EXIT_INTERRUPTED, RunError, StopSignal, stop_on_signals
from r1jax.run.train_loop import TrainLoop

CONFIG = """
name: life
model:
  tokenizer: characters:running_total
  compute_dtype: float32
  remat: none
  log_prob_chunk: 8
  config: {model_type: qwen2, vocab_size: 20, hidden_size: 16, intermediate_size: 32,
    num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, tie_word_embeddings: true}
data:
  train: {source: "task:running_total", template: plain, limit: 50}
trackers: []
stages:
  - {name: base, kind: pretrain, data: train, steps: 4, rows_per_step: 4, row_tokens: 64,
     log_every: 1, checkpoint_every: 2, optimizer: {learning_rate: 0.01}}
  - {name: tuned, kind: pretrain, data: train, steps: 2, rows_per_step: 4, row_tokens: 64,
     log_every: 1, checkpoint_every: 1, optimizer: {learning_rate: 0.01}}
"""
BASE = Selection(only="base")


def run(output: Path, changes: Sequence[str] = (), selection: Selection = BASE) -> int:
    return recipe.run(parse_config(CONFIG, "test", [f"output={output}", *changes]), selection)


def weights(output: Path, stage: str = "00-base") -> bytes:
    return (output / "life-s0" / "stages" / stage / "model" / "model.safetensors").read_bytes()


def status(output: Path) -> dict[str, str]:
    record = json.loads((output / "life-s0" / "run.json").read_text())
    return {name: entry["status"] for name, entry in record["stages"].items()}


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Raises before the update that follows `step`, once."""
    update = TrainLoop.update
    errors = [error]

    def stopped(loop: TrainLoop, batch: object) -> object:
        if loop.step == step and errors:
            raise errors.pop()
        return update(loop, batch)

    monkeypatch.setattr(TrainLoop, "update", stopped)


def test_a_second_process_is_refused_by_name(tmp_path: Path) -> None:
    directory = tmp_path / "life-s0"
    with locked(directory):
        assert is_locked(directory)
        with pytest.raises(ValueError, match=f"process {os.getpid()} on .* is running it"):
            run(tmp_path)
    assert not is_locked(directory)
    assert run(tmp_path) == 0
    assert (directory / "lock").read_bytes() == b""


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    script = "import sys, time; from pathlib import Path; from r1jax.lock import locked\n"
    script += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert is_locked(tmp_path)
        holder.kill()
    assert not is_locked(tmp_path)
    with locked(tmp_path):
        pass


def test_a_longer_run_equals_one_that_was_never_shorter(tmp_path: Path) -> None:
    assert run(tmp_path / "a") == 0
    free = ["stages.base.checkpoint_every=3", "stages.base.keep_checkpoints=5", "trackers=[]"]
    assert run(tmp_path / "a", [*free, "stages.base.log_every=2", "stages.base.steps=6"]) == 0
    assert run(tmp_path / "b", ["stages.base.steps=6"]) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    # What rests on it would be stale; what decided it stays as it was.
    both = ["stages.base.steps=6"]
    assert run(tmp_path / "a", both, Selection(only="tuned")) == 0
    with pytest.raises(ValueError, match="tuned is finished with other settings.*--restart tuned"):
        run(tmp_path / "a", ["stages.base.steps=8"])
    for change in ("stages.base.steps=4", "stages.base.optimizer.learning_rate=0.1"):
        with pytest.raises(ValueError, match="base and tuned are finished with other settings"):
            run(tmp_path / "a", [change])
    with pytest.raises(ValueError, match="tuned, which has begun, rests on it"):
        run(tmp_path / "a", both, Selection(restart=("base",)))
    changed = ["stages.base.steps=2"]
    assert run(tmp_path / "a", changed, Selection(restart=("base", "tuned"), only="base")) == 0
    assert weights(tmp_path / "a") != weights(tmp_path / "b")
    assert status(tmp_path / "a") == {"base": "done"}
    assert not list((tmp_path / "a" / "life-s0" / "stages").glob("*tuned"))


def test_steps_are_locked_where_the_learning_rate_depends_on_them(tmp_path: Path) -> None:
    cosine = "stages.base.optimizer.schedule=cosine"
    assert run(tmp_path, [cosine]) == 0
    with pytest.raises(ValueError, match="steps: 4 -> 6"):
        run(tmp_path, [cosine, "stages.base.steps=6"])


def test_a_stage_that_saved_nothing_runs_with_mended_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 1, RunError("no more"))
    with pytest.raises(RunError):
        run(tmp_path)
    assert status(tmp_path) == {"base": "running"}
    (stage, _) = read_run(tmp_path / "life-s0").stages
    assert stage.status == "stopped"  # nobody runs it
    with locked(tmp_path / "life-s0"):
        assert read_run(tmp_path / "life-s0").stages[0].status == "running"
    # In a copy, such as one of a bucket, nobody can see whether a process runs it.
    shutil.copytree(tmp_path / "life-s0", tmp_path / "copy", ignore=shutil.ignore_patterns(LOCK))
    seen = read_run(tmp_path / "copy").stages[0].status
    assert seen == f"running when last saved, {read_run(tmp_path / 'copy').info['saved']}"
    mended = ["stages.base.optimizer.learning_rate=0.001"]
    assert run(tmp_path, mended) == 0
    assert run(tmp_path / "b", mended) == 0
    assert weights(tmp_path) == weights(tmp_path / "b")
    stop_at(monkeypatch, 3, RunError("no more"))
    with pytest.raises(RunError):
        run(tmp_path / "c")
    with pytest.raises(ValueError, match="base was begun with other settings"):
        run(tmp_path / "c", mended)


def test_a_newer_version_resumes_what_an_older_one_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 3, RunError("no more"))
    with pytest.raises(RunError):
        run(tmp_path)
    path = tmp_path / "life-s0" / "run.json"
    record = json.loads(path.read_text())
    settings = record["stages"]["base"]["ingredients"]["stages.base"]
    del settings["mtp_weight"], settings["optimizer"]["final_fraction"]  # as before they existed
    path.write_text(json.dumps(record))
    assert run(tmp_path) == 0


def test_ctrl_c_saves_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    update = TrainLoop.update

    def interrupted(loop: TrainLoop, batch: object) -> object:
        if loop.step == 2 and loop.stage.name == "base":
            os.kill(os.getpid(), signal.SIGINT)
        return update(loop, batch)

    monkeypatch.setattr(TrainLoop, "update", interrupted)
    assert run(tmp_path) == EXIT_INTERRUPTED == 130
    said = capfd.readouterr()
    assert "Stopped by Ctrl-C. base: saved at step 3; the same command goes on" in said.out
    assert "once more leaves at once" in said.err
    monkeypatch.undo()
    assert run(tmp_path) == 0
    assert run(tmp_path / "b") == 0
    assert weights(tmp_path) == weights(tmp_path / "b")


def test_a_second_ctrl_c_leaves_at_once_even_while_python_waits() -> None:
    script = """
import ctypes, os, signal, threading, time
from r1jax.run.stop import stop_on_signals
def twice():
    for _ in range(2):
        time.sleep(0.3); os.kill(os.getpid(), signal.SIGINT)
with stop_on_signals() as stop:
    threading.Thread(target=twice).start()
    ctypes.CDLL(None).sleep(60); ctypes.CDLL(None).sleep(60)  # Python calls no handler meanwhile
"""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=100)
    assert done.returncode == EXIT_INTERRUPTED and time.monotonic() - begun < 50


def test_signals_are_handed_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop.requested:
            time.sleep(0.01)
        assert stop == StopSignal(requested=True, interrupted=False)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_record_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "life-s0" / "run.json"
    path.parent.mkdir()
    path.write_text('{"stages": ')
    with pytest.raises(ValueError, match="run.json: not the record of a run"):
        run(tmp_path)
    with pytest.raises(ValueError, match="--restart bas: no such stage; did you mean base"):
        run(tmp_path, (), Selection(restart=("bas",)))


def test_any_kept_checkpoint_is_sampled_evaluated_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stop_at(monkeypatch, 3, RunError("no more"))
    with pytest.raises(RunError):
        run(tmp_path, ["stages.base.checkpoint_every=1"])
    directory = tmp_path / "life-s0"
    assert find_model(str(directory)) == find_model(f"{directory}@3")  # the newest of a stopped run
    two = find_model(f"{directory}@base:2")
    assert (two.stage, two.step) == ("base", 2)
    for wrong in ("@1", "@last", "@tuned:2"):
        with pytest.raises(ValueError, match="kept are"):
            find_model(f"{directory}{wrong}")
    with pytest.raises(ValueError, match="no stage bass; there are base, tuned"):
        find_model(f"{directory}@bass:2")
    # An empty directory, or one with half of its files, is no checkpoint that anything reads.
    checkpoints = directory / "stages/00-base/checkpoints"
    (checkpoints / "999").mkdir()
    capfd.readouterr()
    assert find_model(str(directory)) == find_model(f"{directory}@3")
    (line,) = [each for each in capfd.readouterr().err.splitlines() if "is damaged" in each]
    assert f"{checkpoints}/999 is damaged" in line and line.endswith("base:3 is used")
    with pytest.raises(ValueError, match=r"999 is damaged .*; kept are base:2, base:3, as in "):
        find_model(f"{directory}@999")
    (checkpoints / "999" / "metadata").mkdir()
    with pytest.raises(ValueError, match=r"999 is damaged .*; kept are base:2, base:3, as in "):
        find_model(f"{directory}@base:999")
    shutil.rmtree(checkpoints / "999")
    # Both are what the run had at that step: the same as of one that ended there.
    assert run(tmp_path / "short", ["stages.base.steps=2"]) == 0
    assert (Path(two.path) / "model.safetensors").read_bytes() == weights(tmp_path / "short")
    recipe.export_run(Path(f"{directory}@2"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights(tmp_path / "short")
    sampled = ["sample", f"{directory}@2", "-p", "1+1=", "--template", "plain"]
    done = CliRunner().invoke(app, [*sampled, "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output

    evaluation = tmp_path / "evaluation.yaml"
    document = yaml.safe_load(CONFIG) | {"name": "tests", "rewards": {"accuracy": {}}}
    settings = {"samples_per_problem": 1, "problems_per_batch": 2, "problems": 2}
    stage = {"name": "all", "kind": "evaluate", "data": "train", "max_new_tokens": 2, **settings}
    evaluation.write_text(yaml.safe_dump(document | {"stages": [stage]}))
    for model in (f"{directory}@2", f"{directory}@3", str(directory), tmp_path / "out"):
        command = ["eval", str(model), "--config", str(evaluation)]
        if model == tmp_path / "out":
            command += ["--out", str(directory / "evaluations")]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    evaluated = sorted(path.name for path in (directory / "evaluations").iterdir())
    assert evaluated == ["tests-eval-base-2-s0", "tests-eval-base-3-s0", "tests-eval-s0"]


def test_two_models_under_one_evaluation_config_do_not_collide(tmp_path: Path) -> None:
    config = parse_config(CONFIG, "test", [f"output={tmp_path}"])
    names = []
    for model in ("a/small", "b/small", "c/small", "a/small", "c/small"):
        names.append(recipe.free_name(config, model))
        home = tmp_path / f"{names[-1]}-s0"
        home.mkdir(exist_ok=True)
        (home / "config.yaml").write_text(yaml.safe_dump({"model": {"path": model}}))
    assert names[:2] == ["life", "life-small"] and names[2].startswith("life-small-")
    assert names[3:] == [names[0], names[2]]
