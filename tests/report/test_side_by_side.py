"""Runs of different configs on one page."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from fabricated_run import Size, fabricate
from html_page import Page
from typer.testing import CliRunner

from r1jax.cli import app
from r1jax.config.load import ConfigError
from r1jax.report.side_by_side import _labels, write_side_by_side

CURVES = ("r1-zero",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    made = [
        fabricate(folder / "one", Size(12, samples=4, steps=30, curves=CURVES), seed=0),
        fabricate(folder / "two", Size(6, samples=2, steps=20, curves=CURVES), seed=1),
    ]
    config = made[1] / "config.yaml"
    plan = yaml.safe_load(config.read_text()) | {"title": "<script>title</script>"}
    config.write_text(yaml.safe_dump(plan))
    return made


def test_results_settings_curves_and_costs_stand_side_by_side(runs: list[Path]) -> None:
    result = CliRunner().invoke(app, ["report", *map(str, runs), "--compare"])
    assert result.exit_code == 0, result.output
    assert result.output == f"compare: {runs[0] / 'compare.html'}\n"
    page = Page.read(runs[0] / "compare.html")
    assert page.open == [] and page.fetches == [] and "<script" not in page.without_script
    head, *rows = page.table("<h2>Results")
    assert [row[0].split()[0] for row in rows] == ["one", "two"]
    assert "pass@1 before" in head and "pass@1 after" in head and "mean length after" in head
    assert rows[0][2] == "12" and rows[1][2] == "6"
    assert "–" in rows[0][3] and "%" in rows[0][3]  # with its interval
    settings = {row[0]: row[1:] for row in page.table("<h2>What differs")[1:]}
    assert settings["seed"] == ["0", "1"]
    assert settings["stages.r1-zero.steps"] == ["30", "20"]
    assert "name" not in settings and "stages.r1-zero.kind" not in settings
    section = page.section("<h2>Training: r1-zero")
    for title in ("Reward: sum", "Accuracy", "Length", "Entropy"):
        assert title in section
    assert section.count("</i>one</span>") == section.count("</i>two</span>") > 5
    assert "total" in page.table("<h2>What it cost")[0]


def test_an_unfinished_run_is_compared_with_what_it_has(tmp_path: Path) -> None:
    whole, part = Size(4, samples=2, steps=20), Size(4, samples=2, steps=20, until="base-eval")
    runs = [fabricate(tmp_path / "a", whole), fabricate(tmp_path / "b", part)]
    page = Page.read(write_side_by_side(runs, tmp_path / "out"))
    rows = page.table("<h2>Results")[1:]
    assert [row[1] for row in rows] == ["finished", "unfinished"]
    assert "Training: base" in page.text and "Training: r1-zero" not in page.text


def test_what_cannot_be_compared_is_refused(runs: list[Path], tmp_path: Path) -> None:
    for given in (runs[:1], [runs[0], runs[0]], [tmp_path / str(n) for n in range(9)]):
        with pytest.raises(ConfigError, match="--compare needs from two to 7 different runs"):
            write_side_by_side(given, tmp_path)


def test_runs_of_one_name_are_told_apart() -> None:
    assert _labels([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert _labels([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
