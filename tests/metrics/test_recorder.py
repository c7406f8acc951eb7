"""Metric files: valid JSON, the same bytes after a resume, every step once in TensorBoard."""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from r1jax.files import read_rows
from r1jax.metrics.recorder import FILES, Recorder


def log_step(recorder: Recorder, step: int) -> None:
    recorder.log(step, {"loss": 1.0 / step, "reward/mean": np.float32(step), "bad": math.inf})
    recorder.log_timings(step, {"seconds/rollout": 0.25})
    recorder.log_samples([{"step": step, "completion": f"é {step}", "parts": {"format": 1.0}}])
    recorder.log_held_out(step, {"pass_at_1": {"value": None, "low": np.float32(0.5)}})


def contents(directory: Path) -> dict[str, bytes]:
    """The files that the seed determines; timings hold the clock."""
    return {name: (directory / name).read_bytes() for name in FILES if name != "timings.jsonl"}


def events(directory: Path) -> list[tuple[int, str, float, float]]:
    """(step, tag, value, wall time) of every scalar, read as TFRecord framing says."""
    scalars = []
    for path in (directory / "tensorboard").glob("events*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            assert len(data) >= 16 + length, f"{path} ends in a torn record"
            event = Event.FromString(data[12 : 12 + length])
            scalars += [
                (event.step, v.tag, v.simple_value, event.wall_time) for v in event.summary.value
            ]
            data = data[16 + length :]
    return scalars


def test_numbers_of_every_kind_become_valid_json_in_order(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.log(
            jnp.int32(3),
            {
                "z": 0.1,
                "int": np.int64(7),
                "flag": np.bool_(True),
                "float32": np.float32(0.5),
                "device": jnp.float32(2.0),
                "bfloat16": jnp.bfloat16(1.5),
                "one": jnp.ones((1,)),
                "nan": jnp.nan,
                "inf": np.float32(np.inf),
                "minus_inf": -jnp.inf,
            },
        )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == (
        '{"step": 3, "z": 0.1, "int": 7, "flag": 1, "float32": 0.5, "device": 2.0, '
        '"bfloat16": 1.5, "one": 1.0, "nan": "nan", "inf": "inf", "minus_inf": "-inf"}\n'
    )

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(text, parse_constant=refuse)
    assert math.isnan(float(row["nan"])) and float(row["minus_inf"]) == -math.inf


@pytest.mark.parametrize("value", [np.ones(2), "text", None, [1.0, 2.0]])
def test_a_metric_is_one_number(tmp_path: Path, value: Any) -> None:
    with Recorder(tmp_path) as recorder, pytest.raises(TypeError, match="'reward/mean'"):
        recorder.log(1, {"ok": 1.0, "reward/mean": value})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_samples_with_hostile_text_stay_one_line_each(tmp_path: Path) -> None:
    text = 'a\nb\r\u2028c\u2029d\x85e\x1ef"\\ 思考 \ud800'
    rows = [{"completion": text, "reward": math.nan, "parts": {"format": np.float32(1)}}] * 2
    with Recorder(tmp_path) as recorder:
        recorder.log_samples(rows)
    path = tmp_path / "samples.jsonl"
    assert len(path.read_text("utf-8").splitlines()) == 2
    for row in read_rows(path):
        assert row == {"completion": text, "reward": "nan", "parts": {"format": 1.0}}
    assert "思考" in path.read_text("utf-8")


def test_a_rewound_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    with Recorder(whole, ["tensorboard"]) as recorder:
        for step in range(1, 7):
            log_step(recorder, step)

    with Recorder(resumed, ["tensorboard"]) as recorder:
        recorder.rewind({})
        for step in range(1, 4):
            log_step(recorder, step)
        cursor = recorder.cursor()
        log_step(recorder, 4)  # after the checkpoint: lost, and taken again
    # Killed in the middle of a line and of an event.
    for name in FILES:
        with open(resumed / name, "ab") as file:
            file.write(b'{"step": 5, "lo')
    (event_file,) = (resumed / "tensorboard").iterdir()
    with open(event_file, "ab") as file:
        file.write(b"\x18\x00\x00")
    # Event files are named by the second, so a resume seldom writes to the same one.
    event_file.rename(event_file.with_name("events.out.tfevents.1700000000.elsewhere"))

    cursor = json.loads(json.dumps(cursor))  # it travels in the checkpoint
    with Recorder(resumed, ["tensorboard"]) as recorder:
        recorder.rewind(cursor)
        assert recorder.cursor() == cursor
        for step in range(4, 7):
            log_step(recorder, step)
    assert contents(resumed) == contents(whole)
    assert [row["step"] for row in read_rows(resumed / "timings.jsonl")] == [1, 2, 3, 4, 5, 6]

    assert len(list((resumed / "tensorboard").iterdir())) == 1
    assert [e[:3] for e in sorted(events(resumed))] == [e[:3] for e in sorted(events(whole))]
    tags = {"loss", "reward/mean", "bad", "seconds/rollout"}
    assert {tag for _, tag, _, _ in events(resumed)} == tags
    for tag in tags:
        assert [s for s, t, _, _ in events(resumed) if t == tag] == [1, 2, 3, 4, 5, 6]
    # The clock of a step is kept when its event is written again.
    clock = {row["step"]: row["time"] for row in read_rows(resumed / "timings.jsonl")}
    assert {s: w for s, t, _, w in events(resumed) if t == "loss" and s <= 3} == {
        step: clock[step] for step in (1, 2, 3)
    }


def test_killed_before_the_first_checkpoint_starts_over(tmp_path: Path) -> None:
    with Recorder(tmp_path, ["tensorboard"]) as recorder:
        log_step(recorder, 1)
    with Recorder(tmp_path, ["tensorboard"]) as recorder:
        recorder.rewind({})
        assert set(recorder.cursor().values()) == {0}
    assert events(tmp_path) == []


def test_opening_cuts_a_torn_last_line_only(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        log_step(recorder, 1)
        size = recorder.cursor()["samples.jsonl"]
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(b'{"completion": "' + b"x" * 200_000)
    assert [row["step"] for row in read_rows(tmp_path / "samples.jsonl")] == [1]
    with Recorder(tmp_path) as recorder:
        assert recorder.cursor()["samples.jsonl"] == size
        log_step(recorder, 2)
    assert [row["step"] for row in read_rows(tmp_path / "samples.jsonl")] == [1, 2]


def test_lines_are_in_the_file_at_once(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        log_step(recorder, 1)
        assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_a_file_shorter_than_the_cursor_is_an_error(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        log_step(recorder, 1)
        cursor = recorder.cursor()
        before = contents(tmp_path)
        cursor["samples.jsonl"] += 5
        with pytest.raises(ValueError, match=r"samples\.jsonl has \d+ bytes, but .* had \d+"):
            recorder.rewind(cursor)
        assert contents(tmp_path) == before


def test_only_process_zero_writes(tmp_path: Path) -> None:
    with Recorder(tmp_path / "stage", ["tensorboard", "wandb"], process_index=1) as recorder:
        recorder.rewind({"metrics.jsonl": 10})
        log_step(recorder, 1)
        assert recorder.cursor() == {}
    assert not (tmp_path / "stage").exists()


def test_missing_wandb_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'r1jax\[wandb\]'"):
        Recorder(tmp_path, ["wandb"])


def test_unknown_tracker_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'mlflow': not one of tensorboard, wandb"):
        Recorder(tmp_path, ["mlflow"])


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def init(**arguments: Any) -> Any:
        calls.append(arguments)
        return SimpleNamespace(
            log=lambda numbers, step: calls.append((step, numbers)),
            finish=lambda: calls.append("finish"),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    stage = tmp_path / "02-zero"
    for step in (1, 2):
        with Recorder(stage, ["wandb"], run_name="tiny-s0", config={"seed": 0}) as recorder:
            recorder.log(step, {"loss": jnp.float32(0.5), "kl": jnp.nan})
    first, logged, finished, second = calls[:4]
    assert first == second and first["resume"] == "allow" and first["id"]
    assert (first["name"], first["group"], first["config"]) == (
        "tiny-s0/02-zero",
        "tiny-s0",
        {"seed": 0},
    )
    assert logged[0] == 1 and logged[1]["loss"] == 0.5 and math.isnan(logged[1]["kl"])
    assert finished == "finish"
