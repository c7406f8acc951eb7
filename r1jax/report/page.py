"""Turns a run directory into `report.html`: what to show, in words and figures.

The page is one file without scripts; a content security policy in it forbids every request. All
text of the run (questions, completions, names, configs) goes through Jinja's escaping; only the
plots are inserted as they are, and they hold numbers and our own words.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
from markupsafe import Markup

from r1jax.evaluation.results import before_and_after, wall_seconds
from r1jax.evaluation.run_directory import Run, StageRecord, read_run
from r1jax.report.plots import Curve, Marker, endpoints, line_plot, short

_SHOWN_CHARACTERS = 3000
_PROBLEMS_SHOWN = 6
_STRIP_STEPS = 5


@dataclass(frozen=True)
class Panel:
    """One plot: `keys` maps columns of the metrics to names of lines."""

    title: str
    keys: Mapping[str, str]
    note: str = ""
    percent: bool = False
    log: bool = False
    held_out: str | None = None  # the evaluation's figure drawn beside the training curve
    file: str = "metrics.jsonl"


_PANELS = (
    Panel(
        "Accuracy",
        {"outcome/right": "training answers right"},
        "On the questions just trained on, at the training temperature.",
        percent=True,
        held_out="pass_at_1",
    ),
    Panel("Length", {"length/mean": "mean tokens per completion"}, held_out="mean_length"),
    Panel(
        "Entropy",
        {"policy/entropy": "nats per token"},
        "How undecided the policy is; a fall to zero ends exploration.",
    ),
    Panel("KL to the reference", {"policy/kl": "k3 estimate, nats per token"}),
    Panel(
        "Outcomes",
        {
            "outcome/wrong": "wrong",
            "outcome/unparseable": "no answer found",
            "outcome/verifier_failed": "verifier failed (left out of the loss)",
        },
        percent=True,
    ),
    Panel(
        "Lost signal",
        {"groups/zero_variance": "groups with equal rewards", "length/truncated": "cut off"},
        "A group whose samples all earn the same gives no gradient.",
        percent=True,
    ),
    Panel(
        "Sampler gap",
        {"sampler/gap_max": "largest", "sampler/gap_mean": "mean"},
        "Difference of sampler's and trainer's log-probabilities of the same tokens.",
        log=True,
    ),
    Panel("Gradient norm", {"optimizer/grad_norm": "before clipping"}),
    Panel("Clipped tokens", {"policy/clip_fraction": "share of tokens"}, percent=True),
    Panel(
        "Throughput",
        {
            "tokens_per_second/rollout": "sampler, tokens/s",
            "tokens_per_second/update": "update, tokens/s",
        },
        file="timings.jsonl",
    ),
    Panel("Longest completion", {"length/max": "tokens"}),
    Panel("Learning rate", {"optimizer/learning_rate": "after schedule"}),
)
_LOSS_NOTES = {
    "pretrain": "Next-token cross-entropy, nats.",
    "grpo": "Near zero by design: advantages of a group sum to zero. Read reward and gradient "
    "norm in its place.",
}
_PHASES = ("rollout", "score_wait", "update", "compile", "checkpoint")


@dataclass(frozen=True)
class Drawn:
    """A finished panel for the template."""

    title: str
    svg: Markup
    legend: list[str]
    first: str
    last: str
    note: str
    markers: bool


@dataclass
class Problem:
    """One held-out problem in one evaluation: its first sample, and how all of them did."""

    row: dict[str, Any]
    right: int = 0
    scored: int = 0


@dataclass(frozen=True)
class Answer:
    """One completion as the page shows it; `thought` ends with `</think>`."""

    thought: str
    rest: str
    outcome: str
    extracted: str | None
    length: Any
    tally: str = ""
    step: Any = None
    parts: list[str] = field(default_factory=list)


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into a run directory, finished or not; returns its path.

    Raises:
      FileNotFoundError: the directory holds no `config.yaml`.
      ValueError: a file of the run is damaged; names file and line.
    """
    run = read_run(run_dir)
    path = run.directory / "report.html"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(run), encoding="utf-8")
    os.replace(partial, path)
    return path


def render(run: Run) -> str:
    """The page as text."""
    before, after = before_and_after(run)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("r1jax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    seconds = wall_seconds(run)
    missing = run.missing()
    summaries = [(s, s.summary) for s in run.stages if s.summary is not None]
    shown = {stage.name for stage in (before, after) if stage is not None}
    return environment.get_template("report.html.j2").render(
        title=run.config.get("title") or run.config.get("name"),
        name=run.info.get("name", run.config.get("name")),
        seed=run.info.get("seed", run.config.get("seed")),
        started=str(run.info.get("started", ""))[:16].replace("T", " "),
        total=duration(seconds["total"]),
        missing=missing,
        headline=_headline(before, after),
        comparison=_comparison(before, after),
        protocol=_protocol(after if _summary(after) else before),
        votes=_votes(before, after),
        pairs=_pairs(before, after),
        training=[t for t in (_training(run, s, before, after) for s in run.stages) if t],
        strips=[s for s in map(_strip, run.stages) if s],
        costs=_costs(run),
        others=[
            (stage.name, stage.config["data"], _figure(summary.get("pass_at_1"), percent=True))
            for stage, summary in summaries
            if stage.name not in shown
        ],
        notes=[p for p in str(run.config.get("notes") or "").split("\n\n") if p.strip()],
        versions=_flat(run.info.get("versions")),
        hardware=_flat(run.info.get("hardware")),
        config=(run.directory / "config.yaml").read_text(encoding="utf-8"),
    )


# --- before and after -------------------------------------------------------------------------


def _summary(stage: StageRecord | None) -> dict[str, Any]:
    return (stage.summary if stage is not None else None) or {}


def _value(summary: Mapping[str, Any], name: str) -> float | None:
    value = (summary.get(name) or {}).get("value")
    return None if value is None else float(value)


def _headline(before: StageRecord | None, after: StageRecord | None) -> dict[str, Any]:
    """Two big figures, with what each is and what is still to come."""
    sides = []
    for label, stage in (("Before", before), ("After", after)):
        share = _value(_summary(stage), "pass_at_1")
        figure = _figure(_summary(stage).get("pass_at_1"), percent=True)
        state = "not part of this run" if stage is None else "not measured yet"
        if share is None and _summary(stage):
            state = "the verifier failed on every sample"
        sides.append(
            {
                "label": label,
                "share": None if share is None else 100 * share,
                "value": figure["value"],
                "interval": figure["interval"],
                "state": state,
            }
        )
    problems = _summary(after).get("problems") or _summary(before).get("problems")
    return {"sides": sides, "problems": problems}


def _comparison(before: StageRecord | None, after: StageRecord | None) -> list[dict[str, Any]]:
    """Rows of the table: what is measured, before, after, and the change."""
    b, a = _summary(before), _summary(after)
    names = [name for name in (a or b) if isinstance((a or b)[name], dict) and name != "outcomes"]
    k = max((int(n.rsplit("_", 1)[1]) for n in names if n.startswith("cons_at_")), default=1)
    wanted = {
        "pass_at_1": ("pass@1", "right at the first try"),
        f"cons_at_{k}": (f"cons@{k}", f"right by a vote of {k}"),
        f"pass_at_{k}": (f"pass@{k}", f"right at least once in {k}"),
        "mean_length": ("mean length", "tokens per completion"),
    }
    rows = []
    for name, (label, meaning) in wanted.items():
        if name not in names or (k == 1 and name == "cons_at_1"):
            continue
        percent = name != "mean_length"
        old, new = _value(b, name), _value(a, name)
        change = "–"
        if old is not None and new is not None:
            delta = new - old
            change = f"{100 * delta:+.1f} points" if percent else f"{delta:+.1f}"
            if not percent and old > 0:
                change += f" (×{new / old:.2f})"
        rows.append(
            {
                "label": label,
                "meaning": meaning,
                "before": _figure(b.get(name), percent=percent),
                "after": _figure(a.get(name), percent=percent),
                "change": change.replace("-", "−"),
            }
        )
    for name, label in (
        ("unanswered_samples", "no answer found"),
        ("truncated_samples", "cut off at the length limit"),
        ("unscored_samples", "verifier failed, left out"),
    ):
        if any(name in s for s in (b, a)):
            rows.append(
                {
                    "label": label,
                    "meaning": "samples",
                    "before": _count(b, name),
                    "after": _count(a, name),
                    "change": "",
                }
            )
    return rows


def _figure(estimate: Mapping[str, Any] | None, *, percent: bool) -> dict[str, str]:
    if not estimate or estimate.get("value") is None:
        return {"value": "–", "interval": ""}
    scale = 100.0 if percent else 1.0
    value = f"{scale * estimate['value']:.1f}" + (" %" if percent else "")
    if estimate.get("low") is None or estimate.get("high") is None:
        return {"value": value, "interval": "interval unknown"}
    low, high = scale * estimate["low"], scale * estimate["high"]
    return {"value": value, "interval": f"{low:.1f} – {high:.1f}"}


def _count(summary: Mapping[str, Any], name: str) -> dict[str, str]:
    if name not in summary:
        return {"value": "–", "interval": ""}
    total = summary.get("problems", 0) * summary.get("samples", 0)
    return {"value": str(summary[name]), "interval": f"of {total}" if total else ""}


def _protocol(stage: StageRecord | None) -> str:
    summary = _summary(stage)
    if stage is None or not summary:
        return ""
    sampling = stage.config.get("sampling") or {}
    drawn = ", ".join(
        f"{name.replace('_', '-')} {sampling[name]:g}"
        for name in ("temperature", "top_p")
        if name in sampling
    )
    return (
        f"{summary.get('problems')} problems of the data {stage.config['data']!r}, "
        f"{summary.get('samples')} samples each" + (f", {drawn}" if drawn else "") + "."
    )


def _votes(before: StageRecord | None, after: StageRecord | None) -> dict[str, Any] | None:
    """cons@k and pass@k against k: does asking more often help?"""
    curves, sizes = [], set()
    for side, stage in (("after", after), ("before", before)):
        for kind, label in (("cons", "vote of k"), ("pass", "at least one of k")):
            found = {
                int(name.rsplit("_", 1)[1]): float(figure["value"])
                for name, figure in _summary(stage).items()
                if name.startswith(f"{kind}_at_") and figure.get("value") is not None
            }
            base = _value(_summary(stage), "pass_at_1")
            if base is not None:
                found[1] = base
            if len(found) > 1:
                ks = sorted(found)
                sizes.update(ks)
                curves.append(Curve(f"{side}: {label}", ks, [found[k] for k in ks]))
    if not curves:
        return None
    svg = line_plot(
        curves,
        title="Accuracy against the number of samples",
        percent=True,
        x_label="samples per problem, k",
        x_ticks=sorted(sizes),
    )
    return {"svg": Markup(svg), "legend": [curve.name for curve in curves]}


# --- answers ----------------------------------------------------------------------------------


def _problems(stage: StageRecord | None) -> dict[Any, Problem]:
    problems: dict[Any, Problem] = {}
    if stage is None:
        return problems
    for row in stage.rows("samples.jsonl"):
        problem = problems.setdefault(row["problem_id"], Problem(row))
        if row["sample"] < problem.row["sample"]:
            problem.row = row
        problem.right += row["outcome"] == "right"
        problem.scored += row["outcome"] != "verifier_failed"
    return problems


def _pairs(before: StageRecord | None, after: StageRecord | None) -> list[dict[str, Any]]:
    """Held-out problems with the first sample of each side.

    Chosen by rule, not by eye: in the order of problem ids, at most one that is still wrong, at
    most one that was right already, and the rest from those that became right.
    """
    old, new = _problems(before), _problems(after)
    both = sorted(old.keys() & new.keys()) if old and new else sorted(old or new)
    kinds: dict[str, list[Any]] = {"became": [], "still wrong": [], "already": [], "lost": []}
    for key in both:
        was = key in old and old[key].row["outcome"] == "right"
        now = key in new and new[key].row["outcome"] == "right"
        kind = ("already" if was else "became") if now else ("lost" if was else "still wrong")
        kinds[kind].append(key)
    rare = [*kinds["still wrong"][:1], *kinds["lost"][:1], *kinds["already"][:1]]
    usual = kinds["became"][: _PROBLEMS_SHOWN - len(rare)]
    chosen = usual + rare
    # Where a kind is missing, others fill its place.
    chosen += [key for key in both if key not in chosen][: _PROBLEMS_SHOWN - len(chosen)]
    pairs = []
    for key in chosen:
        source = (old.get(key) or new[key]).row
        pairs.append(
            {
                "prompt": _cut(str(source["prompt"])),
                "answer": source["answer"],
                "before": _tallied(old.get(key)),
                "after": _tallied(new.get(key)),
            }
        )
    return pairs


def _tallied(problem: Problem | None) -> Answer | None:
    if problem is None:
        return None
    return _answer(problem.row, tally=f"{problem.right} of {problem.scored} samples right")


def _answer(row: Mapping[str, Any], tally: str = "") -> Answer:
    text = _cut(str(row["completion"]))
    thought, tag, rest = text.rpartition("</think>")
    parts = row.get("parts") or {}
    return Answer(
        thought=thought + tag,
        rest=rest,
        outcome=str(row["outcome"]),
        extracted=row.get("extracted"),
        length=row.get("length"),
        tally=tally,
        step=row.get("step"),
        parts=[f"{name} {short(v)}" for name, v in parts.items() if isinstance(v, (int, float))],
    )


def _cut(text: str) -> str:
    """The beginning and the end of a long text; the end is where the answer is."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n\n[… {left_out:,} characters left out …]\n\n{text[-half:]}"


def _strip(stage: StageRecord) -> dict[str, Any] | None:
    """Training answers over time: of one question if it came up often enough, else of several."""
    if stage.kind != "grpo":
        return None
    firsts: dict[Any, dict[Any, dict[str, Any]]] = {}  # question -> step -> its first sample
    for row in stage.rows("samples.jsonl"):
        firsts.setdefault(row["problem_id"], {}).setdefault(row["step"], row)
    if not firsts:
        return None
    often = max(firsts.values(), key=len)
    same = len(often) >= 3
    if same:
        rows = [often[step] for step in sorted(often)]
    else:
        by_step: dict[Any, dict[str, Any]] = {}
        for steps in firsts.values():
            for step, row in steps.items():
                by_step.setdefault(step, row)
        rows = [by_step[step] for step in sorted(by_step)]
    if len(rows) > _STRIP_STEPS:
        gap = (len(rows) - 1) / (_STRIP_STEPS - 1)
        rows = [rows[round(i * gap)] for i in range(_STRIP_STEPS)]
    return {
        "stage": stage.name,
        "same": same,
        "prompt": _cut(str(rows[0]["prompt"])),
        "answer": rows[0]["answer"],
        "steps": [
            {"question": _cut(str(row["prompt"])), "wanted": row["answer"], "answer": _answer(row)}
            for row in rows
        ],
    }


# --- training ---------------------------------------------------------------------------------


def _training(
    run: Run, stage: StageRecord, before: StageRecord | None, after: StageRecord | None
) -> dict[str, Any] | None:
    """All plots of one stage."""
    if stage.kind == "evaluate":
        return None
    columns = {
        "metrics.jsonl": stage.columns("metrics.jsonl"),
        "timings.jsonl": stage.columns("timings.jsonl"),
    }
    metrics = columns["metrics.jsonl"]
    if not metrics:
        return None
    parts = [name for name in sorted(metrics) if name.startswith("reward/")]
    parts.sort(key=lambda name: name != "reward/mean")
    reward = Panel(
        "Reward",
        {name: "sum" if name == "reward/mean" else name.removeprefix("reward/") for name in parts},
    )
    loss = Panel("Loss", {"loss": "loss"}, _LOSS_NOTES.get(stage.kind, ""))
    panels = (loss, *_PANELS) if stage.kind == "pretrain" else (reward, *_PANELS, loss)
    known = {key for panel in panels for key in panel.keys}
    grpo = [s for s in run.stages if s.kind == "grpo"]
    last_step = max(steps[-1] for steps, _ in metrics.values())
    markers_at = []
    if before is not None and grpo and stage is grpo[0]:
        markers_at.append((_summary(before), 0.0))
    if after is not None and grpo and stage is grpo[-1]:
        markers_at.append((_summary(after), last_step))
    drawn = []
    for panel in panels:
        markers = [
            _marker(summary[panel.held_out], step)
            for summary, step in markers_at
            if panel.held_out and _value(summary, panel.held_out) is not None
        ]
        figure = _draw(panel, columns[panel.file], markers)
        if figure is not None:
            drawn.append(figure)
    others = [
        figure
        for key in sorted(metrics.keys() - known)
        if (figure := _draw(Panel(key, {key: key}), metrics, [])) is not None
    ]
    return {"stage": stage.name, "kind": stage.kind, "panels": drawn, "others": others}


def _marker(estimate: Mapping[str, Any], step: float) -> Marker:
    value = float(estimate["value"])
    low, high = estimate.get("low"), estimate.get("high")
    return Marker(step, value, value if low is None else low, value if high is None else high)


def _draw(
    panel: Panel,
    columns: Mapping[str, tuple[list[float], list[float]]],
    markers: Sequence[Marker],
) -> Drawn | None:
    curves = [Curve(label, *columns[key]) for key, label in panel.keys.items() if key in columns]
    if not curves:
        return None
    svg = line_plot(
        curves[:5], title=panel.title, percent=panel.percent, log=panel.log, markers=markers
    )
    first, last = endpoints(curves[0].values)
    text = (lambda v: f"{100 * v:.1f} %") if panel.percent else short
    return Drawn(
        title=panel.title,
        svg=Markup(svg),
        legend=[curve.name for curve in curves[:5]],
        first=text(first),
        last=text(last),
        note=panel.note,
        markers=bool(markers),
    )


# --- costs and surroundings -------------------------------------------------------------------


def _costs(run: Run) -> dict[str, Any]:
    """Seconds by stage and phase, with speeds where they were recorded."""
    order = {phase: i for i, phase in enumerate(_PHASES)}
    phases = sorted(
        {phase for stage in run.stages for phase in stage.seconds},
        key=lambda phase: (order.get(phase, len(order)), phase),
    )
    total = wall_seconds(run)["total"]
    rows = []
    for stage in run.stages:
        spent = sum(stage.seconds.values())
        timings = stage.columns("timings.jsonl")

        def middle(name: str, timings: Any = timings) -> str:
            return short(median(timings[name][1])) if name in timings else "–"

        rows.append(
            {
                "stage": stage.name,
                "status": stage.status,
                "total": duration(spent) if stage.seconds else "–",
                "cells": [
                    duration(stage.seconds[p]) if p in stage.seconds else "–" for p in phases
                ],
                "widths": [100 * stage.seconds.get(p, 0.0) / total if total else 0 for p in phases],
                "sampler_speed": middle("tokens_per_second/rollout"),
                "update_speed": middle("tokens_per_second/update"),
            }
        )
    return {
        "phases": [phase.replace("_", " ") for phase in phases],
        "rows": rows,
        "total": duration(total),
    }


def duration(seconds: float) -> str:
    """Seconds as people say them: 41 s, 6 min 12 s, 3 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = math.floor(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as rows of dotted name and text."""
    if not isinstance(value, Mapping):
        return [] if value is None else [(prefix or "value", str(value))]
    return [
        row
        for key, inner in value.items()
        for row in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    ]
