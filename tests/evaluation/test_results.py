"""results.json: which evaluations it compares, and what it says of a run that is not done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from fabricated_run import Size, fabricate, fabricate_recipe

from r1jax.config.lineage import edges
from r1jax.config.load import load_config
from r1jax.config.run_config import RunConfig
from r1jax.evaluation.results import before_and_after, write_results
from r1jax.evaluation.run_directory import read_run


def write_config(directory: Path, stages: list[tuple[str, str, str]]) -> Path:
    directory.mkdir()
    plan = [{"name": name, "kind": kind, "data": data} for name, kind, data in stages]
    (directory / "config.yaml").write_text(yaml.safe_dump({"name": "x", "seed": 0, "stages": plan}))
    return directory


def test_results_of_a_finished_run(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", Size(problems=12, samples=4, steps=20))
    results = json.loads(write_results(run_dir).read_text())
    assert results["complete"] and results["missing"] == []
    for side, stage in (("before", "base-eval"), ("after", "final-eval")):
        assert results[side]["stage"] == stage
        for name in ("pass_at_1", "cons_at_4", "mean_length"):
            figure = results[side][name]
            assert figure["low"] <= figure["value"] <= figure["high"]
    assert results["after"]["pass_at_1"]["value"] > results["before"]["pass_at_1"]["value"]
    # Phases are summed over stages: two evaluations and one grpo stage roll out.
    assert results["wall_seconds"]["rollout"] == pytest.approx(2 * 14.1 + 141.0)
    by_stage = sum(sum(phases.values()) for phases in results["stage_seconds"].values())
    assert results["wall_seconds"]["total"] == pytest.approx(by_stage)
    assert not list(run_dir.glob("*.partial"))


def test_results_of_an_unfinished_run(tmp_path: Path) -> None:
    size = Size(problems=6, samples=2, steps=30, until="r1-zero", curves=("r1-zero",))
    run_dir = fabricate(tmp_path / "run", size)
    results = json.loads(write_results(run_dir).read_text())
    assert not results["complete"]
    assert results["before"] is not None and results["after"] is None
    assert results["missing"] == [
        "stage base (pretrain): no metrics",
        "stage r1-zero (grpo): stopped",
        "stage final-eval (evaluate): not started",
    ]


def test_results_of_a_whole_recipe(tmp_path: Path) -> None:
    run_dir = fabricate_recipe(tmp_path / "run", Size(problems=8, samples=2, steps=20))
    results = json.loads(write_results(run_dir).read_text())
    found = [(each["stage"], each["weights"], each["data"]) for each in results["evaluations"]]
    plain = [(f"{name}-eval", name, "held_out_plain") for name in ("base", "zero")]
    rest = ("dev1", "dev2", "dev3", "r1", "student", "distilled")
    assert found == plain + [(f"{name}-eval", name, "held_out") for name in rest]
    for each in results["evaluations"]:
        assert set(each["by_domain"]) == {"code", "logic", "maths", "stem"}
        assert 0 <= each["parts"]["language_consistency"]["value"] <= 1
    # The template differs, the problems do not; and a student is not what the model became.
    assert results["before"] == results["evaluations"][0]
    assert results["after"] == results["evaluations"][5]


def test_results_of_a_recipe_on_its_way(tmp_path: Path) -> None:
    run_dir = fabricate_recipe(
        tmp_path / "run", Size(problems=8, samples=2, steps=20, until="harvested")
    )
    results = json.loads(write_results(run_dir).read_text())
    names = [each["weights"] for each in results["evaluations"]]
    assert names == ["base", "zero", "dev1", "dev2"]
    assert results["after"] is None
    assert results["missing"][0] == "stage harvested (rejection_sampling): no summary yet"


def test_lineage_of_a_run(tmp_path: Path) -> None:
    run = read_run(fabricate_recipe(tmp_path / "run", Size(problems=4, samples=2, steps=20)))
    config = RunConfig.model_validate(run.config)
    assert list(run.edges) == edges(config)
    for stage in config.stages:
        assert run.weights_of(stage.name) == config.weights_of(stage.name)
        assert run.model_of(stage.name) == config.model_of(stage.name)
    order = run.order()
    assert [name for name in order if name not in ("model", "student")] == [
        stage.name for stage in config.stages
    ]
    reversed_edges = replace(run, edges=run.edges[::-1])  # data may be named before weights
    assert reversed_edges.weights_of("dev3") == "base"
    assert order.index("student") == order.index("student-eval") - 1 and order[0] == "model"


def test_benchmarks_are_problems_not_templates(tmp_path: Path) -> None:
    run_dir = write_config(tmp_path / "run", [("a", "evaluate", "x"), ("b", "evaluate", "y")])
    config = yaml.safe_load((run_dir / "config.yaml").read_text())

    def benchmark(x: dict[str, object], y: dict[str, object]) -> str:
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config | {"data": {"x": x, "y": y}}))
        return read_run(run_dir).benchmark("y")

    plain = {"source": "task:t", "split": "held_out", "template": "plain", "limit": 4}
    assert benchmark(plain, plain | {"template": "chat", "system_prompt": "Think."}) == "x"
    assert benchmark(plain, plain | {"limit": 5}) == "y"
    assert benchmark(plain, plain | {"split": "train"}) == "y"
    assert benchmark({"mixture": {"y": 1.0}}, plain) == "y"


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([("a", "evaluate", "h"), ("t", "grpo", "d"), ("b", "evaluate", "h")], ("a", "b")),
        # Figures on other data do not compare.
        (
            [
                ("x", "evaluate", "other"),
                ("a", "evaluate", "h"),
                ("t", "grpo", "d"),
                ("b", "evaluate", "h"),
            ],
            ("a", "b"),
        ),
        ([("a", "evaluate", "h"), ("t", "grpo", "d")], ("a", None)),
        ([("a", "evaluate", "h"), ("t", "sft", "d")], ("a", None)),
        ([("t", "pretrain", "d"), ("b", "evaluate", "h")], (None, "b")),
        # Pretraining makes the model before, and a reward model is no language model.
        ([("b", "evaluate", "h"), ("t", "pretrain", "d")], (None, "b")),
        ([("b", "evaluate", "h"), ("t", "reward_model", "d")], (None, "b")),
        ([("t", "grpo", "d"), ("b", "evaluate", "h")], (None, "b")),
        ([("b", "evaluate", "h")], (None, "b")),
        ([("t", "grpo", "d")], (None, None)),
    ],
)
def test_which_evaluations_are_compared(
    tmp_path: Path,
    stages: list[tuple[str, str, str]],
    expected: tuple[str | None, str | None],
) -> None:
    before, after = before_and_after(read_run(write_config(tmp_path / "run", stages)))
    assert (before and before.name, after and after.name) == expected


def test_a_line_being_written_is_not_an_error_and_a_broken_one_is(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", Size(problems=3, samples=2, steps=20))
    metrics = run_dir / "stages" / "02-r1-zero" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 20, "rew')
    steps, _ = read_run(run_dir).stages[2].columns("metrics.jsonl")["reward/mean"]
    assert steps == list(range(20))
    metrics.write_text(whole + '{"step": 20, "rew\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:21: not a JSON line"):
        read_run(run_dir).stages[2].columns("metrics.jsonl")


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", Size(problems=3, samples=2, steps=20))
    steps, values = read_run(run_dir).stages[2].columns("metrics.jsonl")["policy/kl"]
    assert 7 not in steps and len(values) == 19


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the directory of a run"):
        write_results(tmp_path)


def test_an_ablation_behind_the_recipe_is_not_its_result(tmp_path: Path) -> None:
    """The miniature's last evaluation of the main model is that of another R1-Zero."""
    config = load_config("tiny/r1").model_dump(mode="json")
    assert [s["name"] for s in config["stages"] if s["kind"] == "evaluate"][
        6
    ] == "zero_english_eval"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    before, after = before_and_after(read_run(tmp_path))
    assert before is not None and before.name == "base_eval"
    assert after is not None and after.name == "r1_eval"
