"""A schedule of every kind of stage: what depends on what, what is written, and resumption."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import forked
import pytest

from r1jax.config.lineage import edges, needs
from r1jax.config.load import ConfigError, load_config
from r1jax.evaluation.run_directory import language_models
from r1jax.run.resolve import check, resolve

TESTS = Path(__file__).parents[1]
CONFIG = str(TESTS / "tiny_r1.yaml")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_schedule_is_a_graph() -> None:
    config = load_config(CONFIG)
    found = {(edge.source, edge.target, edge.gives) for edge in edges(config)}
    assert found == {
        ("model", "base", "weights"),
        ("base", "sampled", "weights"),
        ("base", "resampled", "weights"),
        ("base", "tuned", "weights"),
        ("sampled", "tuned", "data"),
        ("resampled", "tuned", "data"),
        ("tuned", "rl", "weights"),
        ("base", "helpful_model", "weights"),
        ("base", "safety_model", "weights"),
        ("helpful_model", "rl", "reward"),
        ("safety_model", "rl", "reward"),
        ("rl", "after", "weights"),
        ("student", "distilled", "weights"),
        ("sampled", "distilled", "data"),
        ("distilled", "student_after", "weights"),
    }
    assert needs(config, "tuned") == ["base", "sampled", "resampled"]
    assert config.model_of("student_after") == "student"
    assert config.model_of("after") == "model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.tuned.weights=rl", "stages.tuned.weights = 'rl': neither an earlier train stage"),
        ("stages.rl.weights=sampled", "stages.rl.weights = 'sampled': neither"),
        ("stages.base.name=student", "the name 'student' is used twice"),
        ("data.sampled.source=stage:tuned", "comes from stage:tuned, which is not a"),
        ("stages.after.rewards=[digit]", "stages.after.rewards: 'digit' is not one of"),
        ("data.everything.mixture={questions: 1, other: 1}", "data.everything.mixture.other"),
        ("data.tuning.mixture={everything: 1, more: 1}", "is itself a mixture"),
        ("data.everything.limit=5", "limit has no effect on a mixture"),
        ("stages.tuned.steps=3", "give exactly one of epochs and steps"),
        ("stages.rl.data=[{step: 1, data: questions}]", "data: steps must start at 0"),
        ("stages.sampled.rewrite={kind: model, weights: tuned}", "rewrite.weights = 'tuned'"),
        ("stages.sampled.rewrite={kind: rule, templet: x}", "rewrite.templet"),
        ("stages.sampled.rewards=[helpful]", "whose model is the stage helpful_model"),
        ("rewards.helpful.function=format", "a reward model has neither function nor options"),
    ],
)
def test_a_schedule_that_does_not_fit_together_is_refused(change: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, [change])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.sampled.filters={repetitions: {}}", "did you mean 'repetition'"),
        ("stages.sampled.rewrite={kind: rule, template: x}", "stages.sampled: template = 'x'"),
        ("data.pairs.fields={chosen: best}", "column 'best' (for chosen) does not exist"),
        ("stages.helpful_model.max_tokens=2", "nothing is left to learn from"),
    ],
)
def test_what_a_stage_could_not_use_is_refused_before_any_compute(
    change: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TESTS)
    with pytest.raises(ValueError) as caught:
        check(resolve(load_config(CONFIG, [change])))
    assert message in str(caught.value)


def start(output: Path, point: str = "none", number: int = 0) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [str(TESTS / "killed_run.py"), point, str(number), CONFIG, f"output={output}"]
    done = forked.run(*command, env=environment, cwd=TESTS)
    assert done.returncode in (0, -9), done.stderr[-3000:]
    assert (done.returncode == 0) == (point == "none")
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run, killed in each of the new stages on the way; and what its last process said."""
    folder = tmp_path_factory.mktemp("schedule")
    for point, number in (("samples", 4), ("log", 4), ("log", 12)):
        start(folder, point, number)
    said = start(folder)
    return folder / "tiny-r1-s0", said


@pytest.mark.slow
def test_the_whole_schedule_runs_and_resumes(finished: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = finished
    record = json.loads((run / "run.json").read_text())["stages"]
    assert {entry["status"] for entry in record.values()} == {"done"}
    assert len(record) == 10
    start(tmp_path)
    whole = tmp_path / "tiny-r1-s0"
    for path in sorted(whole.glob("stages/*/*")):
        name = path.relative_to(whole)
        if path.suffix in (".jsonl", ".safetensors") and path.name != "timings.jsonl":
            assert path.read_bytes() == (run / name).read_bytes(), name
    # Finished stages are skipped: what is left to say is where the report is, the result and the
    # next commands.
    said = start(run.parent).strip()
    assert said.startswith("Report:") and "\nResult" in said and "\n  r1jax export " in said


@pytest.mark.slow
def test_what_rejection_sampling_writes(finished: tuple[Path, str]) -> None:
    run, _ = finished
    (directory,) = run.glob("stages/*-sampled")
    samples, kept = rows(directory / "samples.jsonl"), rows(directory / "dataset.jsonl")
    summary = json.loads((directory / "summary.json").read_text())
    assert sum(summary["samples"].values()) == len(samples) == 24 * 4
    assert summary["samples"]["kept"] == len(kept) == summary["rows"] > 8
    per_prompt = Counter(row["provenance"]["problem_id"] for row in kept)
    assert max(per_prompt.values()) <= 2
    by_place = {(row["problem_id"], row["sample"]): row for row in samples}
    for row in kept:
        origin = row["provenance"]
        sample = by_place[origin["problem_id"], origin["sample_index"]]
        assert row["response"] == sample["completion"] and row["tokens"] == sample["length"]
        assert (origin["checkpoint"], origin["stage"]) == ("base", "sampled")
        assert sample["finish_reason"] == "eos"
    # The same rows are a TFDS dataset.
    from r1jax.data.examples import load_examples
    from r1jax.settings.data import DataSection

    (info,) = (directory / "tfds").glob("*/*/dataset_info.json")
    name = info.parts[-3]
    section = DataSection(
        source=f"tfds:{name}",
        options={"data_dir": str(directory / "tfds")},
        fields={"prompt": "prompt", "response": "response"},
    )
    again = load_examples(section)
    assert [(e.prompt, e.response) for e in again] == [(r["prompt"], r["response"]) for r in kept]


@pytest.mark.slow
def test_reward_models_learn_and_are_sequence_classifiers(finished: tuple[Path, str]) -> None:
    run, _ = finished
    (directory,) = run.glob("stages/*-helpful_model")
    metrics = rows(directory / "metrics.jsonl")
    assert {"loss", "accuracy", "held_out/loss", "held_out/accuracy"} <= metrics[-1].keys()
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=0.1)  # knows nothing yet
    assert metrics[-1]["held_out/loss"] < metrics[0]["loss"]
    config = json.loads((directory / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    # Commands that take a run's last weights take a language model's.
    trained = [path.parent.name.partition("-")[2] for path in language_models(run)]
    assert trained == ["base", "tuned", "rl", "distilled"]
    (safety,) = run.glob("stages/*-safety_model/metrics.jsonl")
    assert rows(safety)[-1]["loss"] < rows(safety)[0]["loss"]


@pytest.mark.slow
def test_what_fine_tuning_and_domains_report(finished: tuple[Path, str]) -> None:
    run, _ = finished
    (tuned,) = run.glob("stages/*-tuned/metrics.jsonl")
    metrics = rows(tuned)
    rates = [row["optimizer/learning_rate"] for row in metrics]
    assert rates[0] == pytest.approx(0.01) and rates == sorted(rates, reverse=True)
    held_out = [row["held_out/loss"] for row in metrics if "held_out/loss" in row]
    assert held_out and metrics[-1]["held_out/loss"] == held_out[-1]
    assert all(0 < loss < 5 for loss in held_out)
    (rl,) = run.glob("stages/*-rl/metrics.jsonl")
    first, *_, last = rows(rl)
    # From step 2 on questions come from both domains, and `accuracy` is for one of them.
    assert "domain/general" not in first and {"domain/general", "domain/maths"} <= last.keys()
    for name in ("helpful", "safety"):
        # Only rows of the general domain have these, and their mean is over those rows.
        assert f"reward/{name}" not in first and math.isfinite(last[f"reward/{name}"])
    (student,) = run.glob("stages/*-distilled/model/config.json")
    assert json.loads(student.read_text())["hidden_size"] == 8
