"""The report is complete in itself, escapes all that models write, and bears unfinished runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fabricated_run import HOSTILE, fabricate

from r1jax.report import write_report
from r1jax.report.page import duration
from r1jax.report.plots import Curve, Marker, endpoints, line_plot, short, smooth


class Page(HTMLParser):
    """Collects tags, text, and every attribute through which a page could fetch something."""

    void = {"meta", "link", "img", "br", "hr", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetches: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                if not (value or "").startswith(("#", "data:")):
                    self.fetches.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    run_dir = fabricate(tmp_path_factory.mktemp("runs") / "run", problems=12, samples=4, steps=60)
    html = write_report(run_dir).read_text(encoding="utf-8")
    return html, Page(html)


def test_page_is_well_formed_and_fetches_nothing(finished: tuple[str, Page]) -> None:
    html, page = finished
    assert page.open == []
    assert page.fetches == []
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import|https?://", html)


def test_model_text_is_escaped(finished: tuple[str, Page]) -> None:
    html, page = finished
    assert HOSTILE in page.text  # it is shown, as text
    assert "<script" not in html


def test_every_part_of_the_run_can_be_tampered_with(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", problems=4, samples=2, steps=20)
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("R1-Zero on running totals", "<script>t</script>"))
    for file in run_dir.glob("stages/*/samples.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            for key in ("prompt", "completion", "answer", "extracted", "outcome"):
                row[key] = f"<script>{key}</script></pre>"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = run_dir / "stages" / "02-r1-zero" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("experiment/surprise", "<script>$m_"))
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "<script" not in html
    assert Page(html).open == []


def test_what_is_on_the_page(finished: tuple[str, Page]) -> None:
    html, page = finished
    assert "unfinished" not in page.text
    for words in ("pass@1", "cons@4", "Reward", "Entropy", "KL to the reference", "Sampler gap"):
        assert words in page.text
    for words in ("Gradient norm", "Throughput", "Length", "experiment/surprise", "jax", "0.10.2"):
        assert words in page.text
    assert "How an answer changed in training" in page.text
    assert html.count('<article class="card pair"') == 6
    assert "task:running_total" in page.text  # the config
    assert "<" not in page.text.replace(HOSTILE, "").partition("What it cost")[2]  # no repr
    assert 'name="viewport"' in html and "prefers-color-scheme: dark" in html


def test_figures_on_the_page_are_those_of_the_summaries(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", problems=8, samples=4, steps=20)
    for number, figure in (("01-base-eval", 0.12345), ("03-final-eval", 0.98765)):
        file = run_dir / "stages" / number / "summary.json"
        summary = json.loads(file.read_text())
        summary["pass_at_1"] = {"value": figure, "low": figure - 0.01, "high": figure + 0.01}
        file.write_text(json.dumps(summary))
    text = " ".join(Page(write_report(run_dir).read_text(encoding="utf-8")).text.split())
    assert text.index("Before 12.3 %") < text.index("After 98.8 %")
    assert "11.3 – 13.3" in text and "+86.4 points" in text


@pytest.mark.parametrize("until", ["base", "base-eval", "r1-zero", "final-eval"])
def test_unfinished_runs_say_what_is_missing(tmp_path: Path, until: str) -> None:
    run_dir = fabricate(tmp_path / "run", problems=4, samples=2, steps=30, until=until)
    html = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == [] and "unfinished" in page.text
    assert "final-eval (evaluate): " + ("no summary yet" if until == "final-eval" else "") in (
        page.text
    )
    assert "not measured yet" in page.text


def test_a_run_that_has_only_just_begun(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", problems=2, samples=2, steps=20)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_bytes((run_dir / "config.yaml").read_bytes())
    text = Page(write_report(bare).read_text(encoding="utf-8")).text
    assert "run.json" in text and "base (pretrain): not started" in text


def test_long_texts_keep_their_beginning_and_their_end(tmp_path: Path) -> None:
    run_dir = fabricate(tmp_path / "run", problems=2, samples=2, steps=20)
    file = run_dir / "stages" / "03-final-eval" / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["completion"] = "BEGIN" + "x" * 50_000 + "END"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Page(write_report(run_dir).read_text(encoding="utf-8")).text
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


def test_plots_bear_odd_curves() -> None:
    for values in ([0.0], [3e-4] * 5, [0.0, 0.0], [-1.0, 2.0], [1e-9, 1e9]):
        for log in (False, True):
            assert "<svg" in line_plot([Curve("c", range(len(values)), values)], title="t", log=log)


def test_numbers() -> None:
    np.testing.assert_allclose(smooth([0, 3, 0, 3]), [1.5, 1, 2, 1.5])
    assert endpoints([1.0, *[0.0] * 38, 5.0]) == (0.5, 2.5)
    assert [short(v) for v in (0, 0.35, 21_900, 2.8e-5, 4.1e8, -1.5)] == [
        "0",
        "0.35",
        "21.9k",
        "2.8e-5",
        "410M",
        "-1.5",
    ]
    assert [duration(s) for s in (3.21, 41, 59.7, 372, 3599.8, 11100)] == [
        "3.2 s",
        "41 s",
        "1 min 00 s",
        "6 min 12 s",
        "1 h 00 min",
        "3 h 05 min",
    ]
