"""Steps are profiled on demand, with the rollout that feeds them, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.config.load import load_config
from r1jax.metrics.profiling import ProfiledSteps, StepProfiler
from r1jax.recipe import Selection, _profiled_steps, run
from r1jax.run.record import RunFiles, open_record

TINY = Path(__file__).parents[1] / "tiny.yaml"


def test_steps_are_read_and_written() -> None:
    assert ProfiledSteps.parse("10:12") == ProfiledSteps(10, 12)
    assert ProfiledSteps.parse("7:7") == ProfiledSteps(7, 7)
    assert ProfiledSteps.parse("rl-2:1:3") == ProfiledSteps(1, 3, "rl-2")
    for text in ("10:12", "rl-2:1:3", "5:5:5"):
        assert str(ProfiledSteps.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "10", "10-12", ":12", "10:", "0:3", "12:10", "a:b", "-1:3", "1:2:x", "Zero:1:2", "１:2"],
)
def test_other_texts_are_refused_with_the_form(text: str) -> None:
    with pytest.raises(ValueError, match=f"^--profile-steps {text}: .*(FIRST:LAST|LAST is not)"):
        ProfiledSteps.parse(text)


@given(
    first=st.integers(1, 12),
    length=st.integers(1, 5),
    updates=st.integers(1, 4),
    done=st.integers(0, 3),
)
def test_a_trace_is_from_the_feeding_round_to_the_last_step(
    first: int, length: int, updates: int, done: int
) -> None:
    """Against a plain reading of what a loop does, written down event by event."""
    done *= updates  # of a run that was resumed
    last = first + length - 1
    events: list[Any] = []

    class Annotation:
        def __init__(self, name: str, step_num: int) -> None:
            self.step = step_num

        def __enter__(self) -> None:
            events.append(("step", self.step))

        def __exit__(self, *_: object) -> None:
            events.append(("end", self.step))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.profiler, "start_trace", lambda *_, **__: events.append("start"))
        patch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
        patch.setattr(jax.profiler, "StepTraceAnnotation", Annotation)
        profiler = StepProfiler(ProfiledSteps(first, last), Path("profile"))
        step = done
        while step < 16:
            profiler.begin_round(step, updates)
            events.append(("round", step + 1))
            for _ in range(updates):
                step += 1
                profiler.end_step(step)
        profiler.close()
        profiler.close()
    rounds = range(done + 1, step + 1, updates)
    fed = [r for r in rounds if r <= last and r + updates > first]
    assert (profiler.wrote, events.count("start"), events.count("stop")) == (
        bool(fed),
        bool(fed),
        bool(fed),
    )
    if fed:
        traced = events[events.index("start") + 1 : events.index("stop")]
        expected: list[Any] = []
        for r in fed:
            steps = [s for s in range(r, r + updates) if s <= last]
            expected += [("step", r), ("round", r), ("end", r)]
            expected += [event for s in steps[1:] for event in (("step", s), ("end", s))]
        assert traced == expected
    assert [e for e in events if e[0] == "round"] == [("round", r) for r in rounds]


def test_a_loop_that_is_left_early_leaves_a_trace(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfiledSteps(1, 9), tmp_path / "profile")
    profiler.begin_round(0, 1)
    jax.numpy.ones(3).block_until_ready()
    profiler.close()
    assert profiler.wrote and list(tmp_path.rglob("*.xplane.pb"))
    profiler = StepProfiler(None, tmp_path / "none")
    profiler.begin_round(0, 1)
    profiler.end_step(1)
    profiler.close()
    assert not profiler.wrote


@pytest.mark.parametrize(
    ("steps", "selection", "message"),
    [
        ("9:12", Selection(), "no stage takes these steps .base goes from step 1 to 6; zero goes"),
        ("base:7:8", Selection(), r"base goes from step 1 to 6\)"),
        ("7:8", Selection(only="base"), "zero is not selected"),
        ("zeroo:1:2", Selection(), "zeroo is no train stage; did you mean zero"),
        ("before:1:2", Selection(), "before is no train stage; there are base, zero"),
    ],
)
def test_steps_that_no_stage_takes_are_refused_before_training(
    steps: str, selection: Selection, message: str, tmp_path: Path
) -> None:
    config = load_config(str(TINY), [f"output={tmp_path}"])
    with pytest.raises(ValueError, match=f"^--profile-steps {steps}: .*{message}"):
        run(config, selection, ProfiledSteps.parse(steps))
    assert not list(tmp_path.glob("tiny-s0/stages/*"))


def test_steps_that_a_run_has_behind_it_are_refused(tmp_path: Path) -> None:
    config = load_config(str(TINY), [f"output={tmp_path}"])
    files = RunFiles.of(config)
    open_record(config, files).mark(config.stage("base"), "done", {})
    (files.stage_directory("zero") / "checkpoints" / "6").mkdir(parents=True)
    (files.stage_directory("zero") / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(ValueError, match="base is finished; zero goes from step 7 to 8"):
        run(config, Selection(), ProfiledSteps(3, 6))


def test_only_the_named_stage_and_only_process_0_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(str(TINY))
    base, zero = config.stage("base"), config.stage("zero")
    every, one = ProfiledSteps(1, 2), ProfiledSteps(1, 2, "zero")
    assert _profiled_steps(None, zero) is None
    assert _profiled_steps(every, zero) == _profiled_steps(every, base) == every
    assert _profiled_steps(one, base) is None
    assert _profiled_steps(one, zero) == one
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert _profiled_steps(one, zero) is None
