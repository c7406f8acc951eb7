"""Writes `report.html` from a run directory.

The page is one file; its content security policy forbids every request, and every script but the
page's, which it knows by its hash (`script.js`). Jinja escapes all text of the run; only the plots,
in which matplotlib escapes it, are inserted as is.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from r1jax.evaluation.metrics import Summary, votes
from r1jax.evaluation.results import before_and_after, wall_seconds
from r1jax.evaluation.run_directory import Run, StageRecord, read_run
from r1jax.files import write_text
from r1jax.report.attempts import attempts_table
from r1jax.report.comparisons import comparisons
from r1jax.report.completions import (
    Sample,
    every_sample,
    samples_by_step,
    side_by_side,
    written_dataset,
)
from r1jax.report.evolution import evolutions
from r1jax.report.plots import Curve, line_plot
from r1jax.report.schedule import schedule
from r1jax.report.searches import costs_of_accuracy, drawn_trees
from r1jax.report.stage_table import rewards_beyond, stage_tables
from r1jax.report.training import training
from r1jax.report.warnings import warnings_of
from r1jax.report.wording import UNKNOWN, Figure, Plot, duration, figure, flat, paragraphs, value_of


class _Side(NamedTuple):
    """One of the two big figures; `share` in per cent, None where there is only a `state`."""

    label: str
    weights: str
    share: float | None
    figure: Figure
    state: str


class _Change(NamedTuple):
    """A row of the table of before and after."""

    label: str
    meaning: str
    before: Figure
    after: Figure
    change: str = ""
    unit: str = ""


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into a run directory, finished or not; returns its path.

    Raises FileNotFoundError and ValueError as `read_run`.
    """
    run = read_run(run_dir)
    return write_text(run.directory / "report.html", _render(run))


def _render(run: Run) -> str:
    before, after = before_and_after(run)
    compared = after or before
    benchmark = run.benchmark(compared.data) if compared is not None else None
    stages = [
        (
            stage,
            training(run, stage, benchmark),
            samples_by_step(run, stage),
            written_dataset(stage),
        )
        for stage in run.stages
        if not stage.is_evaluation
    ]
    sides, problems = headline(run, before, after)
    samples = every_sample(run)
    return template("report.html.j2").render(
        title=run.title,
        name=run.info.get("name", run.config.get("name")),
        seed=run.info.get("seed", run.config.get("seed")),
        started=str(run.info.get("started", ""))[:16].replace("T", " "),
        total=duration(wall_seconds(run)["total"]),
        missing=run.missing(),
        warnings=warnings_of(run),
        sides=sides,
        problems=problems,
        comparison=_comparison(before, after),
        protocol=_protocol(after if _summary(after) else before),
        votes=_votes(before, after),
        evolutions=evolutions(run),
        attempts=attempts_table(run),
        # A base model and its reinforcement learning need no graph.
        whole_recipe=len(stages) > 2,
        schedule=schedule(run),
        stage_tables=stage_tables(run, (before, after)),
        comparisons=comparisons(run),
        costs=costs_of_accuracy(run),
        trees=drawn_trees(run),
        groups=side_by_side(run, before, after),
        stages=stages,
        samples=samples,
        sample_filters=_filters(samples),
        notes=paragraphs(str(run.config.get("notes") or "")),
        versions=flat(run.info.get("versions")),
        hardware=flat(run.info.get("hardware")),
        config=(run.directory / "config.yaml").read_text(encoding="utf-8"),
    )


def template(name: str) -> jinja2.Template:
    """A template of this package; it escapes what it inserts, and a missing name is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("r1jax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (Path(__file__).parent / "script.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    environment.globals.update(
        script=Markup(script), script_hash=base64.b64encode(digest).decode("ascii")
    )
    return environment.get_template(name)


def _filters(samples: Sequence[Sample]) -> list[tuple[str, list[str]]]:
    """Of stage, outcome and domain, those that tell samples apart, with their values."""
    every = {
        "stage": [sample.stage for sample in samples],
        "outcome": [sample.answer.outcome for sample in samples],
        "domain": [sample.domain for sample in samples if sample.domain],
    }
    filters = [(name, list(dict.fromkeys(values))) for name, values in every.items()]
    return [(name, values) for name, values in filters if len(values) > 1]


def _summary(stage: StageRecord | None) -> Summary:
    return (stage.summary if stage is not None else None) or {}


def headline(
    run: Run, before: StageRecord | None, after: StageRecord | None
) -> tuple[list[_Side], int | None]:
    """Two big figures, and of how many problems they are."""
    sides = []
    for label, stage in (("Before", before), ("After", after)):
        summary = _summary(stage)
        share = value_of(summary, "pass_at_1")
        state = "not part of this run" if stage is None else "not measured yet"
        sides.append(
            _Side(
                label=label,
                weights=(run.weights_of(stage.name) if stage is not None else None) or "",
                share=None if share is None else 100 * share,
                figure=figure(summary.get("pass_at_1"), percent=True),
                state="the verifier failed on every sample" if "pass_at_1" in summary else state,
            )
        )
    return sides, _summary(after).get("problems") or _summary(before).get("problems")


def _comparison(before: StageRecord | None, after: StageRecord | None) -> list[_Change]:
    """Rows of the table: what is measured, before, after, and the change."""
    b, a = _summary(before), _summary(after)
    if not (a or b):
        return []
    k = votes(a or b)
    rows = [_change("pass@1", "right at the first try", b, a, "pass_at_1")]
    if k > 1:
        rows += [
            _change(f"cons@{k}", f"right by a vote of {k}", b, a, f"cons_at_{k}"),
            _change(f"pass@{k}", f"right at least once in {k}", b, a, f"pass_at_{k}"),
        ]
    rows.append(_change("mean length", "tokens per completion", b, a, "mean_length", digits=1))
    old, new = b.get("parts") or {}, a.get("parts") or {}
    for name in rewards_beyond([b, a]):
        label = name.replace("_", " ")
        rows.append(_change(label, "mean of this reward", old, new, name, digits=2))
    for name, label in (
        ("unanswered_samples", "no answer found"),
        ("truncated_samples", "cut off at the length limit"),
        ("unscored_samples", "verifier failed, left out"),
    ):
        rows.append(_Change(label, "samples", _count(b, name), _count(a, name)))
    return rows


def _change(
    label: str, meaning: str, before: Summary, after: Summary, name: str, digits: int | None = None
) -> _Change:
    """A row of one figure: a share in per cent, or a number with so many digits."""
    percent = digits is None
    old, new = value_of(before, name), value_of(after, name)
    change = unit = ""
    if old is not None and new is not None:
        delta = new - old
        change = f"{100 * delta:+.1f}" if percent else f"{delta:+.{digits}f}"
        unit = "points" if percent else ""
        if name == "mean_length" and old > 0:
            unit = f"×{new / old:.2f}"
    b, a = (figure(s.get(name), percent=percent, digits=digits or 1) for s in (before, after))
    return _Change(label, meaning, b, a, change.replace("-", "−") or "–", unit)


def _count(summary: Summary, name: str) -> Figure:
    if summary.get(name) is None:
        return UNKNOWN
    total = summary.get("problems", 0) * summary.get("samples", 0)
    return Figure(str(summary[name]), f"of {total}" if total else "")


def _protocol(stage: StageRecord | None) -> str:
    summary = _summary(stage)
    if stage is None or not summary:
        return ""
    sampling = stage.config.get("sampling") or {}
    names = [name for name in ("temperature", "top_p") if name in sampling]
    drawn = [f"{name.replace('_', '-')} {sampling[name]:g}" for name in names]
    samples = ", ".join([f"{summary.get('samples')} samples each", *drawn])
    return f"{summary.get('problems')} problems of the data {stage.data!r}, {samples}."


def _votes(before: StageRecord | None, after: StageRecord | None) -> Plot | None:
    """cons@k and pass@k against k: whether further samples of a problem help."""
    curves, sizes = [], set()
    for side, stage in (("after", after), ("before", before)):
        summary = _summary(stage)
        first = value_of(summary, "pass_at_1")
        for kind, label in (("cons", "vote of k"), ("pass", "at least one of k")):
            by_k = {
                int(name.rsplit("_", 1)[1]): float(estimate["value"])
                for name, estimate in summary.items()
                if name.startswith(f"{kind}_at_") and estimate.get("value") is not None
            } | ({} if first is None else {1: first})
            if len(by_k) > 1:
                ks = sorted(by_k)
                sizes.update(ks)
                curves.append(Curve(f"{side}: {label}", ks, [by_k[k] for k in ks]))
    if not curves:
        return None
    title = "Accuracy against the number of samples"
    label = "samples per problem, k"
    svg = line_plot(curves, title=title, percent=True, x_label=label, x_ticks=sorted(sizes))
    return Plot(title, Markup(svg), [curve.name for curve in curves])
