"""A run that is profiled, watched and keeps what it compiles, looked at from all sides."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from r1jax.config.load import load_config
from r1jax.evaluation.run_directory import read_run
from r1jax.files import read_rows
from r1jax.metrics.heartbeat import HEARTBEAT, _Heartbeat
from r1jax.metrics.profiling import ProfiledSteps
from r1jax.recipe import EVERYTHING, run

TESTS = Path(__file__).parents[1]
STAGES = """[
  {name: zero, kind: grpo, data: train, steps: 4, questions_per_step: 2, outputs_per_question: 4,
   mini_batches_per_rollout: 2, max_new_tokens: 8, length_bucket: 64, checkpoint_every: 4,
   optimizer: {learning_rate: 0.01}},
  {name: after, kind: evaluate, data: held_out, samples_per_problem: 4, problems_per_batch: 4,
   max_new_tokens: 8}]"""


@dataclass(frozen=True)
class Done:
    """A finished run: its directory, what it said, and its beats (stage, step, spans)."""

    directory: Path
    kept: Path
    said: str
    beats: list[tuple[str, int, tuple[str, ...]]]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    output = tmp_path_factory.mktemp("runs")
    kept = output / "kept"
    # After the directory itself: JAX's default keeps nothing that compiles within a second.
    limit = "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", limit)}
    beats = []
    beat = _Heartbeat.beat

    def noted(self: _Heartbeat) -> None:
        beats.append((self.stage, self.step, tuple(self.spans)))
        beat(self)

    changes = [f"output={output}", f"compilation_cache={kept}", f"stages={STAGES}"]
    changes.append("rewards={accuracy: {options: {symbolic: false}}}")
    config = load_config(str(TESTS / "tiny.yaml"), changes)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(_Heartbeat, "beat", noted)
        jax.config.update(limit, 0)
        jax.clear_caches()  # of other tests in this process: each stage compiles something
        assert run(config, EVERYTHING, ProfiledSteps(4, 4)) == 0
    yield Done(output / "tiny-s0", kept, said.getvalue(), beats)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    HEARTBEAT.begin_stage("")


def test_the_profile_holds_the_step_and_the_rollout_that_feeds_it(done: Done) -> None:
    profile = done.directory / "stages/00-zero/profile"
    assert f"Profile: {profile}; to look at it" in done.said and f"--logdir {profile}" in done.said
    assert [path.parent for path in done.directory.rglob("profile")].count(profile.parent) == 1
    (file,) = profile.rglob("*.xplane.pb")
    spans: dict[str, list[Any]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                spans.setdefault(event.name, []).append(event)
    # Steps 3 and 4 learn from one rollout, which is traced in whole, so step 3 is, too.
    steps = {dict(event.stats)["step_num"]: event for event in spans["step"]}
    assert sorted(steps) == [3, 4]
    for rollout in spans["rollout"]:  # one for each return of the queue to the host
        assert steps[3].start_ns <= rollout.start_ns < rollout.end_ns <= steps[3].end_ns
    assert spans["rollout"] and spans["reward"]
    assert len(spans["update"]) == 2 * 2  # begun, and waited for
    assert not any(name.startswith("$") for name in spans)  # calls of Python functions


def test_every_span_of_every_stage_is_a_beat(done: Done) -> None:
    spans: dict[str, set[tuple[str, ...]]] = {}
    for stage, _, open_spans in done.beats:
        spans.setdefault(stage, set()).add(open_spans)
    names = ("setup", "rollout", "reward", "place", "update", "checkpoint", "export", "held_out")
    assert spans["zero"] >= {(name,) for name in names}
    assert spans["after"] >= {("rollout",), ("reward",)}
    steps = [step for stage, step, _ in done.beats if stage == "zero"]
    assert steps == sorted(steps) and set(steps) == {0, 1, 2, 3, 4}
    prompts = [step for stage, step, _ in done.beats if stage == "after"]
    assert prompts == sorted(prompts) and set(prompts) == {0, 4}
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    assert not (done.directory / "hangs").exists()


def test_compilations_and_memory_are_noted_by_step_and_by_stage(done: Done) -> None:
    assert f"Compiled programs are kept in {done.kept}" in done.said
    assert any(done.kept.iterdir())
    *_, last = read_rows(done.directory / "stages/00-zero/timings.jsonl")
    machine = {stage.name: stage.machine for stage in read_run(done.directory).stages}
    for figures in (last, machine["zero"], machine["after"]):
        assert figures["compile_count"] > 0 and figures["compile_seconds"] > 0
        assert 0 < figures["memory_bytes"] <= figures["memory_peak_bytes"]
        asked = figures["cache_hits"] + figures["cache_misses"]
        assert 0 < asked <= figures["compile_count"]
    assert machine["zero"]["compile_count"] >= last["compile_count"]
    assert json.loads((done.directory / "results.json").read_text())["machine"] == machine
    first, *_ = read_rows(done.directory / "stages/00-zero/timings.jsonl")
    asked = first["cache_hits"] + first["cache_misses"]
    line = f"zero: {first['compile_count']} programs compiled in {first['compile_seconds']:.0f} s"
    assert f"{line}; the cache had {first['cache_hits']} of {asked}\n" in done.said


def test_what_watches_a_run_is_no_part_of_its_result(done: Done) -> None:
    """Such settings may change between two calls, and metrics are the same whatever they are."""
    record = json.loads((done.directory / "run.json").read_text())["stages"]["zero"]
    assert "watchdog" not in str(record["ingredients"])
    assert "compilation_cache" not in str(record["ingredients"])
    metrics = (done.directory / "stages/00-zero/metrics.jsonl").read_text()
    assert "compile" not in metrics and "memory" not in metrics
