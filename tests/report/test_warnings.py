"""What a run says at its end, and the warnings of its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fabricated_run import Size, fabricate, write_lines
from html_page import Page

from r1jax.config.load import load_config
from r1jax.evaluation.run_directory import read_run
from r1jax.files import JsonObject
from r1jax.report.ending import ending
from r1jax.report.page import write_report
from r1jax.report.warnings import warnings_of
from r1jax.run.record import RunFiles, open_record

SIZE = Size(problems=12, samples=4, steps=20)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fabricate(tmp_path / "run", SIZE)


def metrics(run: Path, change: Callable[[JsonObject], object]) -> None:
    (path,) = run.glob("stages/*-r1-zero/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    write_lines(path, rows)


def summary(run: Path, stage: str, **changes: object) -> None:
    (path,) = run.glob(f"stages/*-{stage}/summary.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def estimate(value: float, width: float = 0.02) -> JsonObject:
    return {"value": value, "low": value - width, "high": value + width}


def texts(run: Path) -> list[str]:
    return [each.text for each in warnings_of(read_run(run))]


def test_a_good_run_has_no_warning(run: Path) -> None:
    summary(run, "base-eval", unscored_samples=0, truncated_samples=0)
    summary(run, "final-eval", unscored_samples=0, truncated_samples=0)
    assert texts(run) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"outcome/verifier_failed": 0.2}, "r1-zero: the verifier failed on 20 % of the samples"),
        ({"length/truncated": 0.3}, "r1-zero: 30 % of the last completions were cut off"),
        (
            {"groups/zero_variance": 0.75, "outcome/right": 0.25},
            "r1-zero: in 75 % of the last groups all samples earned the same",
        ),
        ({"sampler/gap_mean": 0.5}, "r1-zero: the sampler's log-probs were 0.5 nats"),
        ({"groups/zero_variance": 1.0}, "r1-zero: no group ever had a gradient"),
        ({"optimizer/finite": 0.0}, "r1-zero: 20 of 20 updates were not finite"),
    ],
)
def test_lost_signal_is_named_with_its_figure(run: Path, change: JsonObject, text: str) -> None:
    assert not any(each.startswith(text) for each in texts(run))
    metrics(run, lambda row: row.update(change))
    assert any(each.startswith(text) for each in texts(run))


def test_groups_that_are_all_right_are_no_fault(run: Path) -> None:
    metrics(run, lambda row: row.update({"groups/zero_variance": 0.9, "outcome/right": 0.97}))
    assert not any("groups" in text for text in texts(run))


def test_evaluations_and_references_have_warnings_too(run: Path) -> None:
    summary(run, "final-eval", unscored_samples=6, truncated_samples=24, unanswered_samples=None)
    record = json.loads((run / "run.json").read_text())
    record["references"] = ["data.a: 0 of 9 rows have", "data.b: 2 of 9 rows have\n  b.jsonl:3"]
    (run / "run.json").write_text(json.dumps(record))
    found = texts(run)
    assert found[0] == "data.b: 2 of 9 rows have\n  b.jsonl:3"
    assert "final-eval: the verifier failed on 12.5 % of the samples; they do not count" in found
    assert "final-eval: 50 % of the samples were cut off at the length limit" in found
    assert [line for line in found if "names no answers" in line] == found[-1:]


@pytest.mark.parametrize(
    ("after", "words"),
    [(0.31, "cannot be told apart"), (0.2, "is lower after training"), (0.30, "cannot be told")],
)
def test_a_run_that_learned_nothing_is_not_green(run: Path, after: float, words: str) -> None:
    summary(run, "base-eval", pass_at_1=estimate(0.30))
    summary(run, "final-eval", pass_at_1=estimate(after))
    (warning,) = [each for each in warnings_of(read_run(run)) if each.nothing_learned]
    assert words in warning.text and "30.0 % [28.0 – 32.0]" in warning.text
    page = Page.read(write_report(run))
    assert '<span class="pill">' not in page.html
    assert "finished, nothing learned" in page.words and warning.text in page.text
    assert f"Warning: {warning.text}" in ending(read_run(run), run)


def test_held_out_problems_decide_where_nothing_was_evaluated(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", Size(12, samples=4, steps=20))
    for path in run.glob("stages/*-eval"):
        for file in path.iterdir():
            file.unlink()
    assert not any(each.nothing_learned for each in warnings_of(read_run(run)))
    (path,) = run.glob("stages/*-r1-zero/held_out.jsonl")
    first, *_, last = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [first, last | {"pass_at_1": first["pass_at_1"]}])
    (warning,) = [each for each in warnings_of(read_run(run)) if each.nothing_learned]
    assert warning.text.startswith("r1-zero: held-out pass@1 before and after training cannot be")


def test_a_stage_that_is_still_running_is_not_blamed(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", Size(12, samples=4, steps=20, until="r1-zero"))
    (path,) = run.glob("stages/*-r1-zero/held_out.jsonl")
    first, *_ = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [first, first | {"step": 10}])
    assert not any(each.nothing_learned for each in warnings_of(read_run(run)))


def test_what_was_said_of_references_is_in_the_record(tmp_path: Path) -> None:
    config = load_config("tiny/r1_zero", [f"output={tmp_path}"])
    files = RunFiles.of(config)
    record = open_record(config, files)
    record.note_references(["data.a: 1 of 2 rows have"])
    assert texts(files.directory)[0] == "data.a: 1 of 2 rows have"
    # The next call says it anew.
    open_record(config, files).note_references([])
    assert texts(files.directory) == []


def test_only_a_run_without_warnings_is_green(run: Path) -> None:
    for stage in ("base-eval", "final-eval"):
        summary(run, stage, unscored_samples=0, truncated_samples=0)
    assert '<span class="pill">finished</span>' in Page.read(write_report(run)).html
    metrics(run, lambda row: row.update({"length/truncated": 0.3}))
    page = Page.read(write_report(run))
    assert '<span class="pill warn">finished, 1 warning</span>' in page.html
    assert "30 % of the last completions were cut off" in page.text


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("reward/mean", "r1-zero: the reward did not rise, from 1 to 1"),
        ("loss", "base: the loss did not fall, from 1 to 1"),
    ],
)
def test_curves_decide_where_nothing_was_evaluated(tmp_path: Path, metric: str, words: str) -> None:
    run = fabricate(tmp_path / "run", Size(12, samples=4, steps=20))
    plan = yaml.safe_load((run / "config.yaml").read_text())
    plan["stages"] = [stage for stage in plan["stages"] if stage["kind"] != "evaluate"]
    (run / "config.yaml").write_text(yaml.safe_dump(plan))
    for path in run.glob("stages/*/held_out.jsonl"):
        path.unlink()
    assert texts(run) == []
    for path in run.glob("stages/*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, [row | {metric: 1.0} if metric in row else row for row in rows])
    assert words in texts(run)
    assert "finished, nothing learned" in Page.read(write_report(run)).words


def test_the_end_says_the_result_with_intervals_and_the_next_commands(run: Path) -> None:
    summary(run, "base-eval", pass_at_1=estimate(0.25), mean_length=estimate(17.0, 1))
    summary(run, "final-eval", pass_at_1=estimate(0.75), mean_length=estimate(30.0, 1))
    said = ending(read_run(run), run)
    assert said[0].startswith("Result, on 12 held-out problems, base -> r1-zero: pass@1 ")
    assert "pass@1 25.0 % [23.0, 27.0] -> 75.0 % [73.0, 77.0]; cons@4 " in said[0]
    assert "mean length 17.0 [16.0, 18.0] -> 30.0 [29.0, 31.0]" in said[0]
    # Nothing was trained here that a command could sample.
    assert said[said.index("Next:") :] == ["Next:", f"  r1jax report {run}"]
    model = run / "stages" / "02-r1-zero" / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    said = ending(read_run(run), run, sampled=("plain", "1+1="))
    commands = [line.split()[1] for line in said[said.index("Next:") + 1 :]]
    assert commands == ["sample", "eval", "report", "export"]
    assert all(f" {run}" in line for line in said[said.index("Next:") + 1 :])
    assert f"  r1jax sample {run} --template plain --prompt 1+1=" in said
    # Without a prompt that its tokenizer knows there is no such command; devices are given again.
    said = ending(read_run(run), run, variable="JAX_NUM_CPU_DEVICES=8")
    assert said[said.index("Next:") + 1] == f"  JAX_NUM_CPU_DEVICES=8 r1jax eval {run}"
    assert not any("r1jax sample" in line for line in said)
    # Nor is it asked the questions of a benchmark, where the run has no evaluation of its own.
    plan = yaml.safe_load((run / "config.yaml").read_text())
    plan["stages"] = [stage for stage in plan["stages"] if stage["kind"] != "evaluate"]
    plan["comparisons"] = []
    (run / "config.yaml").write_text(yaml.safe_dump(plan))
    said = ending(read_run(run), run)
    assert f"  r1jax eval {run} --benchmark math_500" in said
    assert not any("eval" in line for line in ending(read_run(run), run, benchmarks=False)[-2:])


def test_a_curve_of_one_value_is_no_change(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", Size(12, samples=4, steps=20, until="r1-zero"))
    (path,) = run.glob("stages/*-base/metrics.jsonl")
    for file in [*run.glob("stages/*-eval/*"), *run.glob("stages/*/held_out.jsonl")]:
        file.unlink()
    write_lines(path, [{"step": 1, "loss": 1.779}])
    said = ending(read_run(run), run)
    assert "Result of base: loss 1.78 (training, the one logged value)" in said


def test_a_run_without_evaluations_says_its_held_out_problems(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", Size(12, samples=4, steps=20, until="r1-zero"))
    for path in run.glob("stages/*-eval"):
        for file in path.iterdir():
            file.unlink()
    said = ending(read_run(run), run)
    assert any(
        line.startswith("Result of r1-zero, on 30 held-out problems: pass@1 ") for line in said
    )
