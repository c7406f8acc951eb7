"""Runs with kinds of stages that come from outside: described, or no longer importable."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from fabricated_run import Size, fabricate, write_lines
from html_page import Page

from r1jax.evaluation.results import results
from r1jax.evaluation.run_directory import read_run
from r1jax.files import JsonObject
from r1jax.report.page import write_report
from r1jax.report.seeds import write_seeds_report
from r1jax.settings.stage import Stage, StageDescription, TrainStage


class Imitate(TrainStage):
    """Trains, with a metric of its own kind before the loss."""

    DESCRIPTION: ClassVar[StageDescription] = StageDescription(
        title="imitation of a teacher",
        leaves="weights",
        loss_note="Distance to the teacher, nats.",
        leading_panels=("teacher/agreement", "loss"),
    )
    data: str
    steps: int

    def datasets(self) -> list[tuple[str, str]]:
        return [("data", self.data)]


class Quiz(Stage):
    """Evaluates without a dataset of the config, and says only pass@1."""

    DESCRIPTION: ClassVar[StageDescription] = StageDescription(title="quiz", leaves="evaluation")
    questions: int


class Gather(Stage):
    """Leaves a dataset, and no counts of what was removed."""

    DESCRIPTION: ClassVar[StageDescription] = StageDescription(title="gathering", leaves="dataset")


STAGES: list[JsonObject] = [
    {"name": "student", "kind": "Imitate", "data": "train", "steps": 20},
    {"name": "student-quiz", "kind": "Quiz", "questions": 5},
    {"name": "texts", "kind": "Gather"},
]


def run_with(module: str, directory: Path, *, seed: int = 0) -> Path:
    """A finished plain run with three stages of other kinds at its end."""
    size = Size(problems=4, samples=2, steps=20, curves=("base", "r1-zero"))
    fabricate(directory, size, seed=seed)
    config, record = directory / "config.yaml", directory / "run.json"
    plan, info = yaml.safe_load(config.read_text()), json.loads(record.read_text())
    for number, stage in enumerate(STAGES, start=len(plan["stages"])):
        plan["stages"].append(stage | {"kind": f"{module}:{stage['kind']}"})
        info["stages"][stage["name"]] = {"status": "done", "seconds": {"update": 4.0}}
        (directory / "stages" / f"{number:02d}-{stage['name']}").mkdir()
    config.write_text(yaml.safe_dump(plan))
    record.write_text(json.dumps(info))
    student, quiz, texts = sorted(directory.glob("stages/*"))[-3:]
    metrics = [
        {"step": step, "loss": 2 - step / 20, "teacher/agreement": step / 20, "odd": 1.0}
        for step in range(1, 21)
    ]
    write_lines(student / "metrics.jsonl", metrics)
    right = {"value": 0.625, "low": 0.5, "high": 0.75}
    (quiz / "summary.json").write_text(json.dumps({"pass_at_1": right, "grade": "B"}))
    write_lines(quiz / "samples.jsonl", [{"question": "1+1", "reply": "2"}])
    (texts / "summary.json").write_text(json.dumps({"rows": 2, "mean_tokens": 3.0}))
    kept = {"prompt": "1+1", "response": "<think>two</think>2"}
    write_lines(texts / "dataset.jsonl", [kept, {"messages": []}])
    return directory


def test_the_report_reads_what_kinds_say_of_themselves(tmp_path: Path) -> None:
    run_dir = run_with(__name__, tmp_path / "run")
    page = Page.read(write_report(run_dir))
    assert page.open == [] and "finished" in page.words and "unfinished" not in page.words

    section = page.section("<h2>student <small>imitation of a teacher")
    panels = re.findall(r"<h3>(.*?)</h3>", section)
    assert panels == ["teacher/agreement", "Loss", "odd"]
    assert "Distance to the teacher, nats." in section
    assert "student imitation of a teacher 20 steps weights from r1-zero" in page.words
    assert "student-quiz pass@1 62.5 %" in page.words
    rows = page.table("Right at the first try")
    assert rows[0] == ["", "held_out", "student-quiz"]
    assert rows[-1] == ["student imitation of a teacher", "–", "62.5 % 50.0 – 75.0"]

    section = Page(page.section("<h2>texts <small>gathering")).words
    assert "The dataset domain rows mean tokens all 2 3" in section
    assert "Some of the kept texts (1)" in section and "What became of" not in section


def test_results_have_evaluations_of_other_kinds(tmp_path: Path) -> None:
    content = results(read_run(run_with(__name__, tmp_path / "run")))
    assert content["complete"]
    quiz = content["evaluations"][-1]
    assert (quiz["stage"], quiz["weights"], quiz["grade"]) == ("student-quiz", "student", "B")
    # Most stages led to the student, whose evaluation compares with no earlier one.
    assert content["before"] is None and content["after"]["stage"] == "student-quiz"


def test_several_seeds_with_other_kinds(tmp_path: Path) -> None:
    runs = [run_with(__name__, tmp_path / f"s{seed}", seed=seed) for seed in range(2)]
    page = Page.read(write_seeds_report(runs, tmp_path / "out")[0])
    assert page.open == []
    assert ["student imitation of a teacher", "4.0 s 4.0 s – 4.0 s"] in page.table("What it cost")
    assert ["evaluation 3 in all", "41 s 41 s – 41 s"] in page.table("What it cost")


@pytest.mark.parametrize("module", ["no_such_module", f"{__name__}.nothing"])
def test_a_kind_that_cannot_be_imported_costs_only_what_it_says(
    tmp_path: Path, module: str
) -> None:
    """The page has its curves, under the name of its class, and every other stage."""
    page = Page.read(write_report(run_with(module, tmp_path / "run")))
    assert page.open == []
    assert "not one that this version of r1jax reads" in page.words
    panels = re.findall(r"<h3>(.*?)</h3>", page.section("<h2>student <small>Imitate"))
    assert panels == ["Loss", "odd", "teacher/agreement"]
    assert "Before and after" in page.words and "pass@1" in page.words
