"""Several seeds on one page: means and intervals by hand, what is refused, and comparisons."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fabricated_run import (
    COMPARISON,
    DOMAINS,
    HOSTILE,
    Size,
    check_comparison_costs,
    fabricate,
    fabricate_recipe,
    write_lines,
)
from html_page import Page
from typer.testing import CliRunner

from r1jax.cli import app
from r1jax.config.load import ConfigError
from r1jax.config.run_config import RunConfig
from r1jax.evaluation.run_directory import read_run
from r1jax.evaluation.seeds import _summary_over_seeds, mean_over_seeds, read_seeds, seed_curves
from r1jax.report.comparisons import _Cost, _costs, comparisons
from r1jax.report.page import write_report
from r1jax.report.plots import band_plot
from r1jax.report.seeds import write_seeds_report
from r1jax.report.wording import Figure, Heading, Table, markdown

CHECKPOINTS = ["base", "zero", "dev1", "dev2", "dev3", "r1", "student", "distilled"]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        fabricate_recipe(folder / f"s{seed}", Size(problems=8, samples=4, steps=20), seed=seed)
        for seed in range(3)
    ]
    for seed, run in enumerate(runs):
        # Nine seconds, and 9 more for each seed, in place of what r1 took.
        info = json.loads((run / "run.json").read_text())
        info["stages"]["r1"]["seconds"] = {"update": 9.0 + 9.0 * seed}
        (run / "run.json").write_text(json.dumps(info))
    return runs


@pytest.fixture(scope="module")
def written(recipes: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "new"
    assert [path.parent for path in write_seeds_report(recipes[::-1], out)] == [out] * 3
    return out


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page.read(written / "report.html")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes a JSON or YAML file in place."""
    is_json = path.suffix == ".json"
    content = json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text())
    change(content)
    path.write_text(json.dumps(content) if is_json else yaml.safe_dump(content))


def few(tmp_path: Path, seeds: int = 2) -> list[Path]:
    return [
        fabricate(tmp_path / f"s{seed}", Size(problems=4, samples=2, steps=20), seed=seed)
        for seed in range(seeds)
    ]


# --- figures --------------------------------------------------------------------------------------


def test_the_interval_over_seeds_by_hand() -> None:
    # Mean 3, squares 4 + 0 + 4 over 2: deviation 2; t of 2 degrees of freedom: 4.302653.
    found = mean_over_seeds([1.0, 3.0, 5.0], is_share=False)
    half = 4.302652729911275 * 2 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half))
    # Two values, one degree of freedom: 12.706205 x deviation / sqrt(2), which is half the gap.
    found = mean_over_seeds([0.4, 0.6], is_share=False)
    assert (found.low, found.high) == pytest.approx((0.5 - 1.2706205, 0.5 + 1.2706205))
    found = mean_over_seeds([0.4, 0.6], is_share=True)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0, 1))
    found = mean_over_seeds([0.2, 0.2, 0.2], is_share=True)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))


def test_a_single_seed_says_nothing_of_others() -> None:
    found = mean_over_seeds([0.25], is_share=True)
    assert found.value == 0.25 and math.isnan(found.low) and math.isnan(found.high)


def test_nine_of_ten_intervals_of_few_seeds_hold_the_mean() -> None:
    # 95 % of them, of which 2,000 draws are off by 0.5 points; normal quantiles give 82 %.
    draws = np.random.default_rng(0).standard_normal((2000, 3))
    found = [mean_over_seeds(row, is_share=False) for row in draws]
    assert 0.93 < np.mean([each.low < 0 < each.high for each in found]) < 0.97


def test_a_summary_over_seeds() -> None:
    def estimate(value: float | None) -> dict[str, Any]:
        return {"value": value, "low": None, "high": None}

    def summary(right: float | None, length: float, wrong: int) -> dict[str, Any]:
        return {
            "pass_at_1": estimate(right),
            "mean_length": estimate(length),
            "parts": {"helpful": estimate(-length)},
            "by_domain": {"maths": {"pass_at_1": estimate(right), "problems": 3}},
            "problems": 8,
            "outcomes": {"wrong": wrong},
            "unscored_samples": wrong,
        }

    first, second = summary(0.9, 10.0, 1), summary(1.0, 30.0, 2)
    merged = _summary_over_seeds([first, second])
    assert merged["pass_at_1"]["value"] == pytest.approx(0.95)
    assert merged["pass_at_1"]["low"] == pytest.approx(0.95 - 12.7062047 * 0.05)
    assert merged["pass_at_1"]["high"] == 1.0  # a share
    assert merged["mean_length"]["high"] == pytest.approx(20 + 127.062047)
    assert merged["parts"]["helpful"]["value"] == -20
    assert merged["by_domain"]["maths"]["pass_at_1"] == merged["pass_at_1"]
    # Counts of one seed are not those of both.
    assert merged["problems"] == 8 and not {"outcomes", "unscored_samples"} & set(merged)
    assert _summary_over_seeds([first]) == first
    # A mean of the other seeds would be one of other runs than its neighbours are.
    missing = _summary_over_seeds([first, summary(None, 1.0, 1), {}])
    assert missing["pass_at_1"] == missing["by_domain"]["maths"]["pass_at_1"] == estimate(None)


# --- the page -------------------------------------------------------------------------------------


def test_the_tables_have_the_means(recipes: list[Path], page: Page) -> None:
    assert page.open == [] and page.fetches == []
    assert "<script" not in page.without_script
    heading, *rows = page.table("Right at the first try")
    assert heading == ["", "held_out_plain all", *DOMAINS]
    assert [row[0].split()[0] for row in rows] == CHECKPOINTS
    for row in rows:
        files = [
            next(run.glob(f"stages/*-{row[0].split()[0]}-eval/summary.json")) for run in recipes
        ]
        summaries = [json.loads(file.read_text()) for file in files]
        for cell, part in zip(row[1:], [None, *DOMAINS], strict=True):
            own = [s if part is None else s["by_domain"][part] for s in summaries]
            values = np.array([each["pass_at_1"]["value"] for each in own])
            half = 4.302652729911275 * values.std(ddof=1) / math.sqrt(3)
            low, high = max(0, values.mean() - half), min(1, values.mean() + half)
            assert cell == f"{100 * values.mean():.1f} % {100 * low:.1f} – {100 * high:.1f}"
    assert "Seeds" not in page.words.partition("Stage by stage")[0]
    assert "95 % interval over seeds" in page.words


def test_each_seed_has_figures_by_itself(recipes: list[Path], page: Page) -> None:
    _, *rows = page.table("Each seed: right at the first try")
    assert [row[0] for row in rows[:3]] == ["base seed 0", "base seed 1", "base seed 2"]
    for run, row in zip(recipes, rows[-3:], strict=True):
        (file,) = run.glob("stages/*-distilled-eval/summary.json")
        own = json.loads(file.read_text())["pass_at_1"]
        low, high = 100 * own["low"], 100 * own["high"]
        assert row[1] == f"{100 * own['value']:.1f} % {low:.1f} – {high:.1f}"


def test_wall_time_is_mean_and_range(written: Path, page: Page) -> None:
    rows = page.table("What it cost")
    cells = {row[0].split()[0]: row[1] for row in rows[1:]}
    assert cells["r1"] == "18 s 9.0 s – 27 s"
    # Eight evaluations of 18.3 seconds.
    assert rows[-2][0] == "evaluation 8 in all" and cells["evaluation"].startswith("2 min 26 s")
    results = json.loads((written / "results.json").read_text())
    by_seed = {"0": 9, "1": 18, "2": 27}
    spread = {"mean": 18, "lowest": 9, "highest": 27, "by_seed": by_seed}
    assert results["stage_seconds"]["r1"] == spread
    total = sum(each["mean"] for each in results["stage_seconds"].values())
    assert results["wall_seconds"]["mean"] == pytest.approx(total)


def test_results_over_seeds(recipes: list[Path], written: Path) -> None:
    results = json.loads((written / "results.json").read_text())
    assert results["seeds"] == [0, 1, 2] and results["name"] == "tiny-r1"
    assert [each["weights"] for each in results["evaluations"]] == CHECKPOINTS
    for each in results["evaluations"]:
        own = [each["by_seed"][seed]["mean_length"]["value"] for seed in ("0", "1", "2")]
        assert each["mean_length"]["value"] == pytest.approx(np.mean(own))
    assert {each["stage"] for each in results["curves"]} == {"zero", "dev2", "r1"}
    assert results["config"] == read_run(recipes[0]).config


def test_markdown_says_the_same(written: Path, page: Page) -> None:
    text = (written / "tables.md").read_text(encoding="utf-8")
    first = text.partition("## Right at the first try")[2].partition("\n\n")[2].partition("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in first.splitlines()[2:]]
    for line, row in zip(lines, page.table("Right at the first try")[1:], strict=True):
        assert line[0] == row[0].split()[0]
        assert [re.sub(r"[()]", "", cell) for cell in line[1:]] == row[1:]
    assert "| r1 | 18 s (9.0 s – 27 s) |" in text


def test_markdown_escapes_what_names_hold() -> None:
    rows = [(Heading("a|b\n<script>"), [Figure("1", "0 – 2"), Figure("–")])]
    made = markdown(Table("t", "", [Heading("*x*", "y"), Heading("z")], rows))
    assert made.splitlines() == [
        r"|  | \*x\*, y | z |",
        "| --- | ---: | ---: |",
        r"| a\|b &lt;script&gt; | 1 (0 – 2) | – |",
    ]


def test_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    runs = few(tmp_path)
    for run in runs:
        edit(run / "config.yaml", lambda plan: plan.update(title=HOSTILE, notes=HOSTILE))
        edit(run / "run.json", lambda info: info["hardware"].update(kind=HOSTILE))
        for file in run.glob("stages/*/summary.json"):
            edit(
                file, lambda s: s["parts"].update({HOSTILE: {"value": 0.125, "low": 0, "high": 1}})
            )
    page, text, _ = (
        p.read_text(encoding="utf-8") for p in write_seeds_report(runs, tmp_path / "o")
    )
    assert "<script" not in Page(page).without_script + text
    assert Page(page).open == [] and Page(page).text.count(HOSTILE) >= 5


def test_a_single_seed_shows_its_own_intervals(tmp_path: Path) -> None:
    (run,) = few(tmp_path, 1)
    page, text, results = write_seeds_report([run], tmp_path / "out")
    own = json.loads((run / "stages" / "03-final-eval" / "summary.json").read_text())
    (_, after) = json.loads(results.read_text())["evaluations"]
    assert after["pass_at_1"] == own["pass_at_1"]
    words = Page(page.read_text(encoding="utf-8")).words
    assert "over problems" in words and "over seeds" not in words
    assert "A single seed: 95 % intervals over problems." in text.read_text(encoding="utf-8")


# --- curves ---------------------------------------------------------------------------------------


def test_curves_of_held_out_problems_or_else_of_training(tmp_path: Path) -> None:
    runs = few(tmp_path)
    held_out = [run / "stages" / "02-r1-zero" / "held_out.jsonl" for run in runs]
    for file in held_out:
        file.unlink()
    found = seed_curves(read_seeds(runs))
    assert [(each.measure, each.held_out) for each in found] == [
        ("pass_at_1", False),
        ("mean_length", False),
    ]
    metrics = [read_run(run).stages[2].columns("metrics.jsonl") for run in runs]
    np.testing.assert_array_equal(found[0].values, [m["reward/accuracy"][1] for m in metrics])

    def row(step: int, value: float) -> dict[str, Any]:
        figure = {"value": value, "low": value - 0.1, "high": value + 0.1}
        votes = {f"cons_at_{k}": figure | {"value": value + k} for k in (2, 16, 8)}
        nothing = {"value": None, "low": None, "high": None}
        return {"step": step, "problems": 4, "pass_at_1": figure, **votes, "mean_length": nothing}

    write_lines(held_out[0], [row(0, 0.25), row(10, 0.5)])
    # One seed alone is not enough.
    assert not seed_curves(read_seeds(runs))[0].held_out
    rows = [row(0, 0.75), row(10, 0.25), row(20, 1.0)]
    write_lines(held_out[1], rows)
    right, vote = seed_curves(read_seeds(runs))
    assert (right.measure, vote.measure) == ("pass_at_1", "cons_at_16") and right.held_out
    assert right.steps == vote.steps == [0, 10]
    np.testing.assert_array_equal(right.values, [[0.25, 0.5], [0.75, 0.25]])
    page, _, results = write_seeds_report(runs, tmp_path / "out")
    curve = json.loads(results.read_text())["curves"][0]
    del curve["measure"], curve["stage"], curve["held_out"]
    assert curve == {
        "steps": [0, 10],
        "mean": [0.5, 0.375],
        "lowest": [0.25, 0.25],
        "highest": [0.75, 0.5],
    }
    words = Page(page.read_text(encoding="utf-8")).words
    assert "pass@1, held-out" in words and "cons@16, held-out" in words


def test_a_band_takes_its_colours_from_the_page() -> None:
    svg = band_plot(
        [0, 1, 2], np.array([[0.1, 0.5, 0.7], [0.2, 0.2, 0.3]]), title='a "b" <c>', percent=True
    )
    found = set(re.findall(r"var\((--[a-z0-9-]+)\)", svg))
    assert found == {"--series-1", "--muted", "--rule"}
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert "<svg" in band_plot([0.0], np.array([[3.0]]), title="t")
    assert "<svg" in band_plot(range(50), np.ones((2, 50)), title="t")


# --- refusals -------------------------------------------------------------------------------------


def test_other_configs_are_refused_with_the_differences(tmp_path: Path) -> None:
    runs = few(tmp_path, 3)

    def words(plan: dict[str, Any]) -> None:
        plan.update(name="other", title="t", notes="n")

    edit(runs[1] / "config.yaml", words)
    assert [run.directory for run in read_seeds(runs)] == runs  # words may differ

    def harder(plan: dict[str, Any]) -> None:
        plan["stages"][2]["optimizer"]["learning_rate"] = 0.5
        plan["rewards"]["accuracy"]["weight"] = 2.0

    edit(runs[2] / "config.yaml", harder)
    with pytest.raises(ConfigError) as error:
        write_seeds_report(runs, tmp_path / "out")
    assert error.value.problems == (
        f"{runs[0]} and {runs[2]} are runs of different configs:",
        "  rewards.accuracy.weight: 1.0 -> 2.0",
        "  stages.2.optimizer.learning_rate: 0.0003 -> 0.5",
    )
    assert not (tmp_path / "out").exists()


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    runs = few(tmp_path)
    edit(
        runs[1] / "config.yaml", lambda plan: plan["data"].update({f"d{i}": {} for i in range(11)})
    )
    with pytest.raises(ConfigError) as error:
        read_seeds(runs)
    assert len(error.value.problems) == 1 + 8 + 1 and error.value.problems[-1] == "  and 3 more"


def test_a_seed_twice_is_refused(tmp_path: Path) -> None:
    runs = [*few(tmp_path, 1), fabricate(tmp_path / "again", Size(problems=4, samples=2, steps=20))]
    with pytest.raises(ConfigError, match=r"s0 and .*again both have seed = 0: give one run"):
        read_seeds(runs)
    with pytest.raises(ConfigError, match="both have seed = 0"):
        read_seeds([runs[0], runs[0]])


def test_unfinished_runs_are_refused(tmp_path: Path) -> None:
    runs = few(tmp_path, 1)
    runs.append(
        fabricate(tmp_path / "s1", Size(problems=4, samples=2, steps=20, until="r1-zero"), seed=1)
    )
    with pytest.raises(ConfigError) as error:
        read_seeds(runs)
    assert error.value.problems == (
        f"{runs[1]} is not finished: stage r1-zero (grpo): stopped; "
        "stage final-eval (evaluate): not started",
    )


def test_the_command(tmp_path: Path) -> None:
    runs = few(tmp_path)
    result = CliRunner().invoke(app, ["report", *map(str, runs)])
    assert result.exit_code == 2 and "--out DIR" in result.stderr
    kept = (runs[0] / "config.yaml").read_bytes()
    result = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(runs[0])])
    assert result.exit_code == 2 and "a run's directory" in result.stderr
    assert (runs[0] / "config.yaml").read_bytes() == kept
    out = tmp_path / "deep" / "out"
    result = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(
        f"{name.partition('.')[0]}: {out / name}\n"
        for name in ("report.html", "tables.md", "results.json")
    )
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "results.json", "tables.md"]


# --- comparisons ----------------------------------------------------------------------------------


def test_comparisons_name_evaluate_stages(recipes: list[Path]) -> None:
    plan = read_run(recipes[0]).config

    def check(**section: Any) -> RunConfig:
        return RunConfig.model_validate(plan | {"comparisons": [{"title": "t", **section}]})

    assert check(evaluations=["r1-eval", "base-eval"]).comparisons[0].note == ""
    with pytest.raises(ValueError, match=r"comparisons\.0\.evaluations: 'r1' is not one of the ev"):
        check(evaluations=["r1-eval", "r1"])
    with pytest.raises(ValueError, match=r"comparisons\.0\.evaluations: 'r1-eval' is named twice"):
        check(evaluations=["r1-eval", "r1-eval"])
    with pytest.raises(ValueError, match="at least 2 items"):
        check(evaluations=["r1-eval"])


def test_costs_count_from_what_all_share(recipes: list[Path]) -> None:
    run = read_run(recipes[0])
    # dev2 came from base by dev1, which learned from cold-start; a student shares nothing.
    assert _costs(run, ["dev2-eval", "distilled-eval"]) == [
        _Cost(["base", "dev1", "dev2"], ["cold-start"]),
        _Cost(["distilled"], ["harvested"]),
    ]
    assert _costs(run, ["base-eval", "zero-eval", "dev1-eval"]) == [
        _Cost([], []),
        _Cost(["zero"], []),
        _Cost(["dev1"], ["cold-start"]),
    ]
    assert _costs(run, ["dev3-eval", "r1-eval"]) == [_Cost([], []), _Cost(["r1"], [])]
    assert _costs(run, ["student-eval", "distilled-eval"])[0] == _Cost([], [])


def test_a_comparison_over_seeds(written: Path, page: Page) -> None:
    heading, *rows = page.table(f"<h2>{COMPARISON}")
    assert heading[:3] == ["", "pass@1 held_out_plain all", "cons@4 held_out_plain"]
    assert heading[-4:] == [f"pass@1 {name}" for name in DOMAINS]
    assert [row[0] for row in rows] == ["dev2 dev2-eval", "distilled distilled-eval"]
    check_comparison_costs(page)
    assert f"## {COMPARISON}" in (written / "tables.md").read_text(encoding="utf-8")


def test_a_comparison_in_an_unfinished_run(tmp_path: Path) -> None:
    run_dir = fabricate_recipe(
        tmp_path / "run", Size(4, samples=2, steps=20, until="dev2", curves=())
    )
    page = Page.read(write_report(run_dir))
    assert page.open == []
    _, *rows = page.table("<h2>Distillation")
    assert [row[1] for row in rows] == ["–", "–"]


def test_without_comparisons_there_is_none(tmp_path: Path) -> None:
    assert comparisons(read_run(few(tmp_path, 1)[0])) == []


def test_attempts_and_searches_over_seeds(tmp_path: Path) -> None:
    def estimate(value: float) -> dict[str, float]:
        return {"value": value, "low": value, "high": value}

    runs = few(tmp_path)
    for seed, run in enumerate(runs):
        (path,) = run.glob("stages/*final-eval/summary.json")
        right = 0.9 + 0.1 * seed
        attempts = {"right_1": 0.5, "right_2": right, "difference": right - 0.5}
        attempts |= {"mended": 0.05, "spoilt": 0.0}
        edit(
            path,
            lambda summary, found=attempts: summary.update(
                attempts={name: estimate(value) for name, value in found.items()},
                generated_tokens=estimate(100.0 + 20 * found["right_2"]),
            ),
        )
        for name in ("config.yaml", "run.json"):

            def with_search(content: Any) -> None:
                for stage in content.get("stages", []):
                    if isinstance(stage, dict) and stage.get("name") == "final-eval":
                        stage["search"] = {"kind": "beam", "scored_by": "process"}

            edit(run / name, with_search)
    tables = write_seeds_report(runs, tmp_path / "out")
    text = next(path for path in tables if path.suffix == ".md").read_text()
    assert "## Self-correction" in text
    # Half of 0.1, times 12.7 of Student's t, is below 0 and above 1.
    assert "95.0 % (31.5 – 100.0)" in text and "45.0 % (−18.5 – 108.5)" in text
    assert "| beam by process | 119 |" in text
    page = (tmp_path / "out/report.html").read_text()
    assert "Self-correction" in page and "beam by process" in page
