"""What the page's script gets: values of plots, samples to search, questions without a template."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from fabricated_run import HOSTILE, Size, fabricate
from html_page import Page

from r1jax.files import JsonObject
from r1jax.report.page import write_report
from r1jax.report.plots import Curve, Dots, Marker, dot_plot, line_plot
from r1jax.report.questions import questions_of


def data_of(svg: str) -> JsonObject:
    (text,) = re.findall(r'data-plot="([^"]*)"', svg)
    data: JsonObject = json.loads(html.unescape(text))
    return data


def ticks(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_every_step_has_its_values_at_the_point_that_is_drawn() -> None:
    curves = [Curve("a", [0, 1, 2], [0.25, 0.5, 1.0]), Curve("b", [1], [0.75])]
    svg = line_plot(curves, title="t", percent=True)
    data = data_of(svg)
    assert [(title, [point[2:] for point in points]) for _, title, points in data["groups"]] == [
        ("step 0", [["a", "25.0 %"]]),
        ("step 1", [["a", "50.0 %"], ["b", "75.0 %"]]),
        ("step 2", [["a", "100.0 %"]]),
    ]
    # The circles of matplotlib's markers are at the same places.
    drawn = {
        (round(float(x), 1), round(float(y), 1))
        for x, y in re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)"', svg)
    }
    shown = {(x, point[1]) for x, _, points in data["groups"] for point in points}
    assert len(shown) == 4
    for place in shown:
        assert any(abs(place[0] - x) < 0.2 and abs(place[1] - y) < 0.2 for x, y in drawn), place
    assert data["from"] < min(y for _, y in shown) < max(y for _, y in shown) < data["to"]


def test_intervals_and_rows_of_dots_are_shown_and_long_curves_are_thinned() -> None:
    marks = [Marker(0, 0.5, 0.4, 0.6), Marker(2, 0.9, 0.9, 0.9)]
    data = data_of(dot_plot(["one", "<b>", "three"], [Dots("x", marks)], title="t", percent=True))
    assert data["by"] == "y"
    assert [(title, points[0][2:]) for _, title, points in data["groups"]] == [
        ("one", ["x", "50.0 % [40.0, 60.0]"]),
        ("three", ["x", "90.0 %"]),
    ]
    long = data_of(line_plot([Curve("a", range(5000), range(5000))], title="t"))["groups"]
    assert len(long) == 150 and long[0][1] == "step 0" and long[-1][1] == "step 4999"
    assert long[-1][2][0][3] == "4999"


def test_ticks_are_round_and_a_lone_point_stands_in_the_middle() -> None:
    svg = line_plot([Curve("a", [7], [0.3])], title="t")
    assert "7" in ticks(svg) and not any("." in tick for tick in ticks(svg)[:1])
    ((x, _, _),) = data_of(svg)["groups"]
    width = 3.4 * 72
    assert x == pytest.approx(width * (0.15 + 0.965) / 2, abs=0.2)
    for values in ([-2.0, -2.0], [0.0, 0.0], [3.0, 3.0]):  # not zoomed in until all ticks are equal
        shown = ticks(line_plot([Curve("a", [1, 2], values)], title="t"))
        beside = shown[shown.index("step") + 1 :]
        assert len(set(beside)) == len(beside) > 2
    log = ticks(line_plot([Curve("a", [1, 2, 3], [3e-7, 1e-5, 2e-4])], title="t", log=True))
    assert {"1e-6", "1e-5"} <= set(log) and not any("^" in tick or tick == "−" for tick in log)
    within = ticks(line_plot([Curve("a", [1, 2], [2.1e-5, 4.8e-5])], title="t", log=True))
    assert {"2e-5", "5e-5"} <= set(within)


def test_samples_are_there_to_search_and_filter(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", Size(12, samples=4, steps=40, curves=("r1-zero",)))
    page = Page.read(write_report(run))
    section = page.section("<h2>Samples")
    found = re.findall(
        r'class="card pair sample" data-stage="([^"]*)" data-outcome="(\w+)"', section
    )
    assert {stage for stage, _ in found} == {"base-eval", "r1-zero", "final-eval"}
    assert sum(stage == "final-eval" for stage, _ in found) == 12  # one of each problem
    assert {"right", "wrong", "unparseable"} <= {outcome for _, outcome in found}
    assert '<option value="r1-zero">' in section and '<option value="unparseable">' in section
    assert HOSTILE in Page(section).text and "<script" not in section


ROLES = "A conversation between User and Assistant.\nUser: {}. Assistant: "
CHAT = "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n{}\nPlease reason step by step."
CHAT += "<|im_end|>\n<|im_start|>assistant\n<think>\n"
QUESTIONS = ["What is 3+4=", "What is 5+4-1=", "What is\nthe sum of 9 and 9="]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHAT, ""),
        ("<｜User｜>{}<｜Assistant｜><think>\n", ""),
        (ROLES, "."),
        ("[INST] {} [/INST]", ""),
    ],
)
def test_a_question_stands_without_its_template(template: str, end: str) -> None:
    prompts = [template.format(question) for question in QUESTIONS]
    shown = questions_of(prompts, "chat")
    assert [shown[prompt] for prompt in prompts] == [question + end for question in QUESTIONS]


def test_prompts_without_a_template_stay_as_they_are() -> None:
    for prompts in (["Q: 1+1=", "Q: 1+2=", "Q: 1+3="], ["<b>1"], ["a", "b", "a"]):
        shown = questions_of(prompts, "plain")
        assert [shown[prompt] for prompt in prompts] == prompts
    assert questions_of(["x: a", "x: b"], "chat") == {"x: a": "x: a", "x: b": "x: b"}
    # Nothing is taken where a question would be empty.
    odd = ["user: ", "user: a", "user: b"]
    assert list(questions_of(odd, None).values()) == odd
