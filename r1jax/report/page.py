"""Turns a run directory into `report.html`.

The page is one file without scripts; a content security policy in it forbids every request. All
text of the run (questions, completions, names, configs) goes through Jinja's escaping; only the
plots are inserted as they are, and what they hold of the run's text matplotlib escapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from r1jax.evaluation.results import before_and_after, wall_seconds
from r1jax.evaluation.run_directory import Run, StageRecord, read_run
from r1jax.files import write_text
from r1jax.report.comparisons import comparisons
from r1jax.report.completions import side_by_side, strip
from r1jax.report.datasets import written_dataset
from r1jax.report.plots import Curve, line_plot
from r1jax.report.schedule import schedule
from r1jax.report.stage_table import rewards_beyond, stage_tables
from r1jax.report.training import training
from r1jax.report.wording import KINDS, Figure, duration, figure, flat, paragraphs, value_of, votes


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into a run directory, finished or not; returns its path.

    Raises:
      FileNotFoundError: the directory holds no `config.yaml`.
      ValueError: a file of the run is damaged; names file and line.
    """
    run = read_run(run_dir)
    return write_text(run.directory / "report.html", render(run))


def render(run: Run) -> str:
    """The page as text."""
    before, after = before_and_after(run)
    missing = run.missing()
    compared = after or before
    benchmark = run.benchmark(compared.config["data"]) if compared is not None else None
    stages = [
        {
            "name": stage.name,
            "kind": KINDS.get(stage.kind, stage.kind),
            "training": training(run, stage, benchmark),
            "strip": strip(stage),
            "dataset": written_dataset(stage),
        }
        for stage in run.stages
        if stage.kind != "evaluate"
    ]
    return template("report.html.j2").render(
        title=run.config.get("title") or run.config.get("name"),
        name=run.info.get("name", run.config.get("name")),
        seed=run.info.get("seed", run.config.get("seed")),
        started=str(run.info.get("started", ""))[:16].replace("T", " "),
        total=duration(wall_seconds(run)["total"]),
        missing=missing,
        headline=headline(run, before, after),
        comparison=_comparison(before, after),
        protocol=_protocol(after if _summary(after) else before),
        votes=_votes(before, after),
        # A base model and its reinforcement learning need no map.
        whole_recipe=len(stages) > 2,
        schedule=schedule(run),
        stage_tables=stage_tables(run, (before, after)),
        comparisons=comparisons(run),
        groups=side_by_side(run, before, after),
        stages=stages,
        notes=paragraphs(str(run.config.get("notes") or "")),
        versions=flat(run.info.get("versions")),
        hardware=flat(run.info.get("hardware")),
        config=(run.directory / "config.yaml").read_text(encoding="utf-8"),
    )


def template(name: str) -> jinja2.Template:
    """A template of this package; what it inserts is escaped, and what is missing an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("r1jax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _summary(stage: StageRecord | None) -> dict[str, Any]:
    return (stage.summary if stage is not None else None) or {}


def headline(run: Run, before: StageRecord | None, after: StageRecord | None) -> dict[str, Any]:
    """Two big figures, with what each is and what is still to come."""
    sides = []
    for label, stage in (("Before", before), ("After", after)):
        share = value_of(_summary(stage), "pass_at_1")
        said = figure(_summary(stage).get("pass_at_1"), percent=True)
        state = "not part of this run" if stage is None else "not measured yet"
        if share is None and _summary(stage):
            state = "the verifier failed on every sample"
        sides.append(
            {
                "label": label,
                "weights": (run.weights_of(stage.name) if stage is not None else None) or "",
                "share": None if share is None else 100 * share,
                "value": said.value,
                "interval": said.interval,
                "state": state,
            }
        )
    problems = _summary(after).get("problems") or _summary(before).get("problems")
    return {"sides": sides, "problems": problems}


def _comparison(before: StageRecord | None, after: StageRecord | None) -> list[dict[str, Any]]:
    """Rows of the table: what is measured, before, after, and the change."""
    b, a = _summary(before), _summary(after)
    k = votes(a or b)
    rows = [_change("pass@1", "right at the first try", b, a, "pass_at_1", percent=True)]
    if k > 1:
        rows += [
            _change(f"cons@{k}", f"right by a vote of {k}", b, a, f"cons_at_{k}", percent=True),
            _change(f"pass@{k}", f"right at least once in {k}", b, a, f"pass_at_{k}", percent=True),
        ]
    rows.append(_change("mean length", "tokens per completion", b, a, "mean_length"))
    old, new = b.get("parts") or {}, a.get("parts") or {}
    for name in rewards_beyond([b, a]):
        label = name.replace("_", " ")
        rows.append(_change(label, "mean of this reward", old, new, name, digits=2))
    for name, label in (
        ("unanswered_samples", "no answer found"),
        ("truncated_samples", "cut off at the length limit"),
        ("unscored_samples", "verifier failed, left out"),
    ):
        rows.append(
            {
                "label": label,
                "meaning": "samples",
                "before": _count(b, name),
                "after": _count(a, name),
                "change": "",
                "unit": "",
            }
        )
    return rows if a or b else []


def _change(
    label: str,
    meaning: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    name: str,
    *,
    percent: bool = False,
    digits: int = 1,
) -> dict[str, Any]:
    old, new = value_of(before, name), value_of(after, name)
    change = unit = ""
    if old is not None and new is not None:
        delta = new - old
        change = f"{100 * delta:+.1f}" if percent else f"{delta:+.{digits}f}"
        unit = "points" if percent else ""
        if name == "mean_length" and old > 0:
            unit = f"×{new / old:.2f}"
    return {
        "label": label,
        "meaning": meaning,
        "before": figure(before.get(name), percent=percent, digits=digits),
        "after": figure(after.get(name), percent=percent, digits=digits),
        "change": change.replace("-", "−") or "–",
        "unit": unit,
    }


def _count(summary: Mapping[str, Any], name: str) -> Figure:
    if name not in summary:
        return Figure("–")
    total = summary.get("problems", 0) * summary.get("samples", 0)
    return Figure(str(summary[name]), f"of {total}" if total else "")


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
                int(name.rsplit("_", 1)[1]): float(estimate["value"])
                for name, estimate in _summary(stage).items()
                if name.startswith(f"{kind}_at_") and estimate.get("value") is not None
            }
            base = value_of(_summary(stage), "pass_at_1")
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
