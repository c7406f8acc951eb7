"""The report is complete in itself, escapes all that models write, and bears unfinished runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

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
from hypothesis import given
from hypothesis import strategies as st

from r1jax.config.lineage import Edge
from r1jax.evaluation.run_directory import read_run
from r1jax.files import JsonObject
from r1jax.report.completions import _Answer, _choose_problems, _Problem
from r1jax.report.page import write_report
from r1jax.report.plots import (
    SERIES,
    Curve,
    Dots,
    Marker,
    _smooth,
    dot_plot,
    endpoints,
    line_plot,
    short,
)
from r1jax.report.schedule import LANE, _draw, _Rail, _rails, schedule
from r1jax.report.stage_table import rewards_beyond
from r1jax.report.wording import duration, figure


@pytest.fixture(scope="module")
def recipe_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    curves = ("zero", "dev1", "helpful-model", "r1", "distilled")
    return fabricate_recipe(folder / "run", Size(problems=12, samples=4, curves=curves))


@pytest.fixture(scope="module")
def recipe(recipe_run: Path) -> Page:
    return Page.read(write_report(recipe_run))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("runs")
    return Page.read(write_report(fabricate(folder / "run", Size(12, samples=4, steps=60))))


def small(until: str | None = None, curves: tuple[str, ...] = ()) -> Size:
    return Size(problems=4, samples=2, steps=20, until=until, curves=curves)


def rewrite_rows(path: Path, change: Callable[[JsonObject], object]) -> None:
    """Changes each row of a JSON-lines file in place."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    write_lines(path, rows)


def test_page_is_well_formed_and_fetches_nothing(finished: Page, recipe: Page) -> None:
    for page in (finished, recipe):
        assert page.open == []
        assert page.fetches == []
        assert not {"link", "iframe", "object", "img"} & set(page.tags)
        assert page.tags.count("script") == 1
        assert not re.search(r"url\((?!#)|@import|https?://", page.without_script)


# It is shown, as text: by the first problem's evaluations, and as a kept text of each dataset.
@pytest.mark.parametrize(("run", "least"), [("finished", 2), ("recipe", 8 + 2)])
def test_model_text_is_escaped(run: str, least: int, request: pytest.FixtureRequest) -> None:
    page: Page = request.getfixturevalue(run)
    assert page.text.count(HOSTILE) >= least
    assert "<script" not in page.without_script


@pytest.mark.parametrize(("make", "curves"), [(fabricate, "r1-zero"), (fabricate_recipe, "zero")])
def test_every_part_of_the_run_can_be_tampered_with(
    tmp_path: Path, make: Callable[[Path, Size], Path], curves: str
) -> None:
    run_dir = make(tmp_path / "run", small(curves=(curves,)))
    config = run_dir / "config.yaml"
    plan = yaml.safe_load(config.read_text()) | {"title": "<script>t</script>"}
    for stage in plan["stages"]:
        if stage["kind"] == "evaluate":
            stage["data"] = "<script>$d_</script>"
    config.write_text(yaml.safe_dump(plan))

    def tamper(row: JsonObject) -> None:
        for key in ("prompt", "completion", "answer", "extracted", "outcome", "domain"):
            row[key] = f"<script>{key}</script></pre>"
        row["response"] = "<script>response</script></pre>"

    for file in [*run_dir.glob("stages/*/samples.jsonl"), *run_dir.glob("stages/*/dataset.jsonl")]:
        rewrite_rows(file, tamper)
    for file in [*run_dir.glob("stages/*/summary.json"), *run_dir.glob("stages/*/*.jsonl")]:
        text = file.read_text().replace("experiment/surprise", "<script>$m_")
        file.write_text(text.replace("format", "<script>$p_").replace('"maths"', '"<script>$"'))
    page = Page.read(write_report(run_dir))
    assert "<script" not in page.without_script and "<script>$m_" in page.text
    assert page.open == []


def test_what_is_on_the_page(finished: Page) -> None:
    page, html = finished, finished.html
    assert "unfinished" not in page.text
    for words in ("pass@1", "cons@4", "Reward", "Entropy", "KL to the reference", "Sampler gap"):
        assert words in page.text
    for words in ("Gradient norm", "Throughput", "Length", "experiment/surprise", "jax", "0.10.2"):
        assert words in page.text
    assert "How an answer changed in training" in page.text
    assert html.count('<article class="card pair">') == 6
    assert "task:running_total" in page.text  # the config
    schedule = page.text.partition("what they cost")[2].partition("Samples")[0]
    setup = page.text.partition("Versions")[2].partition('"use strict"')[0]
    assert len(schedule) > 200 < len(setup)
    assert "<" not in schedule + setup.partition("// Values")[0]  # no repr
    assert 'name="viewport"' in html and "prefers-color-scheme: dark" in html


def test_figures_on_the_page_are_those_of_the_summaries(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", small())
    for number, share in (("01-base-eval", 0.12345), ("03-final-eval", 0.98765)):
        file = run_dir / "stages" / number / "summary.json"
        summary = json.loads(file.read_text())
        summary["pass_at_1"] = {"value": share, "low": share - 0.01, "high": share + 0.01}
        file.write_text(json.dumps(summary))
    text = Page.read(write_report(run_dir)).words
    assert text.index("Before · base 12.3 %") < text.index("After · r1-zero 98.8 %")
    assert "11.3 – 13.3" in text and "+86.4 points" in text


@pytest.mark.parametrize("until", ["base", "base-eval", "r1-zero", "final-eval"])
def test_unfinished_runs_say_what_is_missing(tmp_path: Path, until: str) -> None:
    page = Page.read(write_report(fabricate(tmp_path / "run", small(until, (until,)))))
    assert page.open == [] and "unfinished" in page.text
    gap = "no summary yet" if until == "final-eval" else "not started"
    assert f"final-eval (evaluate): {gap}" in page.text
    assert "not measured yet" in page.text


def test_the_stage_table_has_every_checkpoint_and_figure(recipe_run: Path, recipe: Page) -> None:
    heading, *rows = recipe.table("Right at the first try")
    assert heading == ["", "held_out_plain all", *DOMAINS]
    names = ["base", "zero", "dev1", "dev2", "dev3", "r1", "student", "distilled"]
    assert [row[0].split()[0] for row in rows] == names
    rewards = recipe.table("Rewards and length")
    # Accuracy is what pass@1 is the mean of, and is not said again.
    assert rewards[0] == ["", "format", "language consistency", "tokens per completion"]
    votes = recipe.table("Right by a vote")
    assert votes[0] == ["", "held_out_plain all cons@4", *(f"{name} cons@4" for name in DOMAINS)]

    def said(estimate: dict[str, float], scale: float, digits: int, unit: str) -> str:
        value, low, high = (f"{scale * estimate[k]:.{digits}f}" for k in ("value", "low", "high"))
        return f"{value}{unit} {low} – {high}"

    for row, reward, vote in zip(rows, rewards[1:], votes[1:], strict=True):
        (file,) = recipe_run.glob(f"stages/*-{row[0].split()[0]}-eval/summary.json")
        summary = json.loads(file.read_text())
        parts = [summary, *(summary["by_domain"][domain] for domain in DOMAINS)]
        assert row[1:] == [said(part["pass_at_1"], 100, 1, " %") for part in parts]
        assert vote[1:] == [said(part["cons_at_4"], 100, 1, " %") for part in parts]
        assert reward[1:] == [
            said(summary["parts"]["format"], 1, 2, ""),
            said(summary["parts"]["language_consistency"], 1, 2, ""),
            said(summary["mean_length"], 1, 1, ""),
        ]
    assert recipe.html.count('aria-label="maths"') == 1  # each table with its plot
    assert "pass@1 of" not in recipe.text


def test_a_simple_run_needs_no_stage_table(finished: Page) -> None:
    assert "Stage by stage" not in finished.text
    assert finished.html.count('class="stages"') == 1  # by difficulty
    assert "format mean of this reward" in finished.words


def test_what_training_changed_problem_by_problem(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", Size(6, samples=4, steps=20, curves=()))
    before, after = (
        run / "stages" / name / "samples.jsonl" for name in ("01-base-eval", "03-final-eval")
    )
    for path, right in ((before, (0, 0, 1, 2, 4, 4)), (after, (4, 0, 3, 4, 4, 4))):
        rewrite_rows(
            path,
            lambda row, right=right: row.update(
                outcome="right" if row["sample"] < right[row["problem_id"]] else "wrong",
                length=10 + row["problem_id"],
                completion="wait, an error" if row["problem_id"] < 2 else "sure",
            ),
        )
    words = Page.read(write_report(run)).words
    assert "What reinforcement learning changed" in words
    # pass@1, tokens and reflections, before and after, of the two that were never right.
    hardest = words.partition("never right 2 problems")[2].partition("to 25 %")[0]
    intervals = r"(?:[0-9.]+ – [0-9.]+)"
    shares = rf"0\.0 % {intervals}50\.0 % {intervals}"
    assert re.fullmatch(
        rf"{shares}10\.5 {intervals}10\.5 {intervals}2\.00 2\.00 – 2\.002\.00 2\.00 – 2\.00 ",
        hardest,
    )
    assert "r1-zero: pass@4 changed by 16.7 points" in words
    assert "of 6 problems, 1 were solved that no sample solved before, and 0 no longer" in words


def test_the_graph_says_where_everything_comes_from(recipe: Page) -> None:
    words = recipe.words.partition("The stages, and what they cost")[2]
    for line in (
        "dev1 supervised fine-tuning 200 steps weights from base data from cold-start",
        "helpful-model reward model 60 steps weights from dev3",
        "r1 reinforcement learning 200 steps weights from dev3 reward from helpful-model",
        "cold-start rejection sampling 100 of 400 samples kept weights from zero",
    ):
        assert line in words
    assert "r1-eval on held_out" in words and "4 min 07 s · 20 %" in words


def test_bars_name_the_longest_phases_and_add_up(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", small())
    info = json.loads((run_dir / "run.json").read_text())
    phases = {f"phase_{i}": float(i + 1) for i in range(9)}
    info["stages"]["r1-zero"]["seconds"] = phases
    info["stages"]["base"]["seconds"] = {"phase_0": 22.5}
    for name in ("base-eval", "final-eval"):
        info["stages"][name]["seconds"] = {}
    (run_dir / "run.json").write_text(json.dumps(info))
    found = schedule(read_run(run_dir))
    # phase 0 has 23.5 seconds in all, phases 4 to 8 have 5 to 9, and the rest are 1 to 3.
    assert found.bars == [*(f"phase {i}" for i in (0, 4, 5, 6, 7, 8)), "other"]
    nodes = {node.name: node for node in found.nodes}
    assert nodes["r1-zero"].widths == pytest.approx([100 * s / 45 for s in (1, 5, 6, 7, 8, 9, 9)])
    assert nodes["base"].widths == pytest.approx([50, 0, 0, 0, 0, 0, 0])
    assert (nodes["r1-zero"].share, nodes["base"].share) == ("67 %", "33 %")


def test_the_table_of_seconds_says_compilations_and_memory(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", small())
    info = json.loads((run_dir / "run.json").read_text())
    del info["stages"]["base"]["machine"]  # of an older run
    (run_dir / "run.json").write_text(json.dumps(info))
    rows = Page.read(write_report(run_dir)).table("Seconds by phase")
    assert rows[0][-4:] == ["sampler tok/s", "update tok/s", "programs compiled", "memory at most"]
    last = {row[0]: row[-2:] for row in rows}
    assert last["base"] == ["–", "–"]
    assert last["base-eval"] == ["31 in 12 s", "3 GiB"]
    assert last["r1-zero"] == ["31 in 12 s, 8 cached", "3 of 16 GiB"]


def test_evaluations_beyond_before_and_after_are_in_the_table(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", small())
    config = run_dir / "config.yaml"
    plan = yaml.safe_load(config.read_text())
    plan["models"] = {"student": plan["model"]}
    plan["stages"][3]["weights"] = "student"
    config.write_text(yaml.safe_dump(plan))
    rows = Page.read(write_report(run_dir)).table("Right at the first try")
    assert [row[0] for row in rows] == ["", "base pretraining", "student model"]


def test_rejection_sampling_says_what_it_removed(recipe: Page) -> None:
    words = recipe.words
    assert words.count("What became of 400 samples kept 100 25.0 % wrong 231 57.8 %") == 2
    assert "filter repetition 41 10.2 %" in words
    assert "domain rows mean tokens code 25" in words and "all 100" in words
    assert words.count("Some of the kept texts (4)") == 2


def test_losses_of_fine_tuning_and_reward_models(recipe: Page) -> None:
    for stage, expected in (
        ("dev1", ("training", "held-out", "assistant")),
        ("helpful-model", ("training", "held-out", "Judged right")),
        ("r1", ("Reward", "Accuracy", "held-out, with interval")),
    ):
        section = recipe.section(f"<h2>{stage} <small>")
        for words in expected:
            assert words in section, (stage, words)
    # A stage without a held-out set has no curve of one.
    assert "held-out" not in recipe.section("<h2>distilled <small>")


def test_held_out_evaluations_in_training_come_first(finished: Page, recipe: Page) -> None:
    panels = [  # title, what it says, bands
        ("Held-out accuracy over training", r"25\.0 % → 75\.0 % .*pass@1cons@16 30 problems", 1),
        ("Held-out length over training", "100 → 500 ", 1),
        ("Held-out accuracy by domain", r"25\.0 % → 75\.0 % .*codelogicmathsstem", 0),
    ]
    for page, heading, expected in (
        (finished, "<h2>Training: r1-zero", panels[:2]),
        (recipe, "<h2>zero <small>", panels),
        (recipe, "<h2>r1 <small>", []),
    ):
        section = page.section(heading)
        shown = re.findall(r'<figure class="card panel">.*?</figure>', section, re.DOTALL)
        titles = re.findall(r"<h3>(.*?)</h3>", section)
        assert titles[: len(expected) + 1] == [*(title for title, _, _ in expected), "Reward"]
        assert section.count("Held-out accuracy by domain</h3>") == (len(expected) == 3)
        for panel, (_, says, bands) in zip(shown, expected, strict=False):
            assert re.search(says, Page(panel).words)
            assert panel.count("opacity: 0.15") == bands


def test_the_same_problem_at_every_checkpoint(recipe_run: Path, recipe: Page) -> None:
    articles = re.findall(r'<article class="card pair">.*?</article>', recipe.html, re.DOTALL)
    compared = [article for article in articles if 'class="answers many"' in article]
    assert len(compared) == 2 * len(DOMAINS)
    names = ["base", "zero", "dev1", "dev2", "dev3", "r1", "student", "distilled"]
    for article in compared:
        assert re.findall(r'<p class="meta"><b>(.*?)</b>', article) == names
        prompt = Page(re.findall(r"<pre>(.*?)</pre>", article)[0]).words
        shown = [Page(text).text for text in re.findall(r"<pre>(.*?)</pre>", article)[1:]]
        for name, text in zip(names, shown, strict=True):
            (file,) = recipe_run.glob(f"stages/*-{name}-eval/samples.jsonl")
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            (first,) = [r for r in rows if (r["prompt"], r["sample"]) == (prompt, 0)]
            assert text == first["completion"]


@pytest.mark.parametrize("until", ["base", "zero", "cold-start", "dev1", "helpful-model"])
def test_unfinished_recipes(tmp_path: Path, until: str) -> None:
    page = Page.read(write_report(fabricate_recipe(tmp_path / "run", small(until, (until,)))))
    assert page.open == [] and "unfinished" in page.text
    assert f"stage {until} (" in page.text


def test_a_config_of_another_version_costs_only_the_lines(tmp_path: Path) -> None:
    run_dir = fabricate_recipe(tmp_path / "run", small(curves=("helpful-model",)))
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("kind: reward_model", "kind: alchemy"))
    page = Page.read(write_report(run_dir))
    assert page.open == []
    assert "not one that this version of r1jax reads" in page.words
    assert "helpful-model alchemy" in page.words and "Right at the first try" in page.words


def test_files_of_before_domains_and_rewards(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", small())
    for file in run_dir.glob("stages/*/samples.jsonl"):
        rewrite_rows(file, lambda row: row.pop("domain"))
    for file in run_dir.glob("stages/*/summary.json"):
        summary = json.loads(file.read_text())
        del summary["parts"]
        file.write_text(json.dumps(summary))
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert html.count('<article class="card pair"') == 4
    assert "mean of this reward" not in html


def test_a_comparison(recipe: Page) -> None:
    """Two checkpoints side by side, with the figures of the stage table."""
    heading, *rows = recipe.table(f"<h2>{COMPARISON}")
    assert [row[0] for row in rows] == ["dev2 dev2-eval", "distilled distilled-eval"]
    assert heading[1] == "pass@1 held_out_plain all"
    by_name = {row[0].split()[0]: row for row in recipe.table("Right at the first try")[1:]}
    assert [row[1] for row in rows] == [by_name[name][1] for name in ("dev2", "distilled")]
    check_comparison_costs(recipe)


def test_which_problems_are_shown() -> None:
    def problems(outcomes: str) -> dict[int, _Problem]:
        named = {"r": "right", "w": "wrong"}
        return {
            key: _Problem(0, "", "", "", _Answer("", "", named[letter], 1, 0))
            for key, letter in enumerate(outcomes)
        }

    old, new = problems("rwwwrwwr"), problems("rrwrwrrw")
    assert _choose_problems(old, new, set(range(8)), 6) == [1, 3, 5, 2, 4, 0]
    assert _choose_problems(old, new, {0, 2, 7}, 6) == [2, 7, 0]
    assert _choose_problems(old, new, set(range(8)), 2) == [1, 2]
    assert _choose_problems(old, {}, {0, 2}, 6) == [2, 0]  # the other side is still to come


def test_a_reward_that_repeats_pass_at_1_is_left_out() -> None:
    def summary(right: float | None, **parts: float) -> JsonObject:
        figures = {name: {"value": value} for name, value in parts.items()}
        return {"pass_at_1": {"value": right}, "parts": figures}

    first = summary(0.3, accuracy=0.1 + 0.2, format=0.3)
    second = summary(0.5, accuracy=0.5, format=0.9, helpful=-1.0)
    assert rewards_beyond([first, second, {}]) == ["format", "helpful"]
    assert rewards_beyond([summary(None, accuracy=0.0)]) == ["accuracy"]


# Each row may draw on any before it, as a schedule does.
GRAPHS = st.integers(2, 9).flatmap(
    lambda rows: st.lists(
        st.tuples(
            st.integers(0, rows - 2), st.integers(1, rows - 1), st.sampled_from(["weights", "data"])
        ).filter(lambda edge: edge[0] < edge[1]),
        max_size=14,
    ).map(lambda edges: (rows, edges))
)


@given(GRAPHS)
def test_lines_of_the_graph_are_the_edges_and_never_share_a_lane(
    graph: tuple[int, list[tuple[int, int, str]]],
) -> None:
    rows, wanted = graph
    order = [f"s{i}" for i in range(rows)]
    found = _rails(order, [Edge(order[a], order[b], gives) for a, b, gives in wanted])
    drawn = [(rail.source, target, rail.gives) for rail in found for target in rail.targets]
    assert sorted(drawn) == sorted(set(wanted))
    for rail in found:
        if rail.lane == 0:
            assert rail.targets == (rail.source + 1,)
    for row in range(rows):
        lanes = [rail.lane for rail in found if row in rail.rows and rail.lane]
        assert len(lanes) == len(set(lanes))
    drawings, centre = _draw(rows, found)
    for row, drawing in enumerate(drawings):
        ports = [p for p in drawing.pieces if p.shape in ("arrives", "leaves")]
        bent = [rail for rail in found if rail.lane and row in (rail.source, *rail.targets)]
        assert len(ports) == len(bent)
        # A line that goes on reaches the end of its row, and begins at the top of the next.
        for rail in found:
            here = [p for p in drawing.pieces if p.left == centre - rail.lane * LANE]
            if rail.source <= row < rail.targets[-1]:
                assert any(p.height is None for p in here)
            if rail.source < row <= rail.targets[-1]:
                assert any(p.top == 0 for p in here)


def test_a_graph_by_hand() -> None:
    # base -> zero -> tuned, which starts from base and learns from zero's answers.
    edges = [Edge("a", "b", "weights"), Edge("a", "c", "weights"), Edge("b", "c", "data")]
    assert set(_rails(["a", "b", "c"], edges)) == {
        _Rail(0, (1,), 0, "weights"),
        _Rail(1, (2,), 0, "data"),
        _Rail(0, (2,), 1, "weights"),
    }


def test_a_run_that_has_only_just_begun(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", small())
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_bytes((run_dir / "config.yaml").read_bytes())
    text = Page(write_report(bare).read_text(encoding="utf-8")).text
    assert "run.json" in text and "base (pretrain): not started" in text


def test_long_texts_keep_their_beginning_and_their_end(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", small())
    text = "BEGIN" + "x" * 50_000 + "END"
    file = run_dir / "stages" / "03-final-eval" / "samples.jsonl"
    rewrite_rows(file, lambda row: row.update(completion=text))
    text = Page.read(write_report(run_dir)).text
    assert "BEGIN" in text and "END" in text and "47,008 characters left out" in text
    assert "x" * 2000 not in text


def test_plots_take_their_colours_and_fonts_from_the_page() -> None:
    curves = [Curve("a", [0, 1, 2], [0.1, 0.5, 0.7]), Curve("b", [0, 1, 2], [0.2, 0.2, 0.3])]
    svg = line_plot(curves, title='a "b" <c>', percent=True, markers=[Marker(2, 0.6, 0.5, 0.7)])
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", svg)) == {
        "--series-1",
        "--series-2",
        "--muted",
        "--rule",
    }
    assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour that dark mode cannot change"
    assert "50%" in re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    exponents = line_plot([Curve("c", [0, 1], [1e-6, 1e-3])], title="t", log=True)
    assert "DejaVu" not in svg + exponents
    assert svg == line_plot(
        curves, title='a "b" <c>', percent=True, markers=[Marker(2, 0.6, 0.5, 0.7)]
    )


def test_dot_plots_take_colours_from_the_page_and_names_as_they_are() -> None:
    marks = [Marker(0, 0.2, 0.1, 0.3), Marker(2, 0.9, 0.9, 0.9)]
    series = [Dots("one", marks), Dots("two", [Marker(1, 0.5, 0.5, 0.6)])]
    labels = ["$x_1$", "<b>&", "a name that is far too long for its place"]
    svg = dot_plot(labels, series, title='a "b" <c>', percent=True)
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", svg)) == {
        "--series-1",
        "--series-2",
        "--muted",
        "--rule",
    }
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"$x_1$", "&lt;b&gt;&amp;", "a name that is …", "50%"} <= set(texts)
    assert svg == dot_plot(labels, series, title='a "b" <c>', percent=True)
    assert "<svg" in dot_plot(["a"], [Dots("one", [])], title="t")


def test_a_band_is_where_the_intervals_are() -> None:
    def heights(path: str) -> list[float]:
        return [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]

    # So many points that a line without a band would be smoothed over.
    marks = [Marker(i, i % 2, i % 2 - 0.25, i % 2 + 0.5) for i in range(100)]
    svg = line_plot([Curve.of("a", marks)], title="t")
    assert 'id="FillBetween' not in svg
    (line,) = re.findall(r'<path d="([^"]*)"[^>]*stroke-width: 1\.9', svg)
    ((name, shift),) = re.findall(
        r'<use xlink:href="#(\w+)" x="0" y="(\S+)"[^>]*opacity: 0\.15', svg
    )
    (band,) = re.findall(rf'<path id="{name}" d="([^"]*)"', svg)
    zero, one = heights(line)[:2]
    assert heights(line) == [zero, one] * 50
    ends = {round((zero - y - float(shift)) / (zero - one), 3) for y in heights(band)}
    assert ends == {-0.25, 0.5, 0.75, 1.5}
    bare = line_plot([Curve.of("a", marks, band=False)], title="t")
    assert "opacity: 0.15" not in bare and "opacity: 0.28" in bare


def test_a_plot_tells_its_curves_apart() -> None:
    curves = [Curve(str(i), [0, 1], [i, i]) for i in range(SERIES + 1)]
    svg = line_plot(curves, title="t")
    found = set(re.findall(r"var\(--series-(\d)\)", svg))
    assert found == {str(i + 1) for i in range(SERIES)}


def test_plots_bear_odd_curves() -> None:
    for values in ([0.0], [3e-4] * 5, [0.0, 0.0], [-1.0, 2.0], [1e-9, 1e9]):
        for log in (False, True):
            assert "<svg" in line_plot([Curve("c", range(len(values)), values)], title="t", log=log)


def test_numbers() -> None:
    np.testing.assert_allclose(_smooth([0, 3, 0, 3]), [1.5, 1, 2, 1.5])
    assert endpoints([1.0, *[0.0] * 38, 5.0]) == (0.5, 2.5)
    assert [short(v) for v in (0, 0.35, 21_900, 2.8e-5, 4.1e8, -1.5)] == [
        "0",
        "0.35",
        "21.9k",
        "2.8e-5",
        "410M",
        "-1.5",
    ]
    estimate = {"value": -0.25, "low": -0.5, "high": 0.125}
    said = figure(estimate, percent=True)
    assert (said.value, said.interval) == ("−25.0 %", "−50.0 – 12.5")
    assert figure({"value": None}).value == figure(None).value == "–"
    assert figure({"value": 2.0, "low": None, "high": None}).interval == "interval unknown"
    assert Marker.of(3, {"value": 1.0, "low": None, "high": 2.0}) == Marker(3, 1.0, 1.0, 2.0)
    assert Marker.of(3, {"value": None}) is Marker.of(3, None) is None
    assert [duration(s) for s in (3.21, 41, 59.7, 372, 3599.8, 11100)] == [
        "3.2 s",
        "41 s",
        "1 min 00 s",
        "6 min 12 s",
        "1 h 00 min",
        "3 h 05 min",
    ]
