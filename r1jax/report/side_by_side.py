"""Several runs of any configs on one page: results, curves, costs, and what differs in settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from r1jax.config.load import ConfigError
from r1jax.evaluation.metrics import votes
from r1jax.evaluation.results import before_and_after, wall_seconds
from r1jax.evaluation.run_directory import Run, StageRecord, read_run
from r1jax.files import write_text
from r1jax.report.page import template
from r1jax.report.plots import SERIES, Curve, Marker, line_plot
from r1jax.report.training import Columns, panels_of
from r1jax.report.warnings import warnings_of
from r1jax.report.wording import UNKNOWN, Figure, Heading, Plot, Table, duration, figure, flat

_MOST_SETTINGS = 60  # rows of the table of differences
_ABSENT = Figure("–")


def write_side_by_side(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Writes `compare.html` of two runs or more, finished or not, into the directory `out`.

    Raises ConfigError for fewer runs, one that is given twice, or more than a plot has colours.
    """
    directories = [Path(each).resolve() for each in run_dirs]
    if not 2 <= len(set(directories)) == len(directories) <= SERIES:
        needed = f"--compare needs from two to {SERIES} different runs"
        raise ConfigError([f"{needed}, not {', '.join(map(str, run_dirs))}"])
    runs = [read_run(each) for each in directories]
    Path(out).mkdir(parents=True, exist_ok=True)
    return write_text(Path(out) / "compare.html", _render(runs, _labels(directories)))


def _labels(directories: Sequence[Path]) -> list[str]:
    """The directories' names; where two have the same, with those above them that differ."""
    depth = 1
    while True:
        labels = ["/".join(each.parts[-depth:]) for each in directories]
        if len(set(labels)) == len(labels):
            return labels
        depth += 1


def _render(runs: Sequence[Run], labels: Sequence[str]) -> str:
    warned = [
        (label, [each.text for each in warnings_of(run)])
        for label, run in zip(labels, runs, strict=True)
    ]
    return template("side_by_side.html.j2").render(
        title=" and ".join([", ".join(labels[:-1]), labels[-1]]),
        warned=[(label, texts) for label, texts in warned if texts],
        results=_results(runs, labels),
        settings=_settings(runs, labels),
        curves=_curves(runs, labels),
        cost=_cost(runs, labels),
    )


def _results(runs: Sequence[Run], labels: Sequence[str]) -> Table:
    """What each run could do before and after, with intervals."""
    columns = [Heading("state"), Heading("problems")]
    names = [("pass@1", "pass_at_1", True), ("cons", "cons", True)]
    names.append(("mean length", "mean_length", False))
    columns += [Heading(label, side) for label, _, _ in names for side in ("before", "after")]
    rows = []
    for run, label in zip(runs, labels, strict=True):
        sides = [(s.summary if s else None) or {} for s in before_and_after(run)]
        problems = next((s["problems"] for s in reversed(sides) if "problems" in s), None)
        cells = [Figure("unfinished" if run.missing() else "finished")]
        cells.append(UNKNOWN if problems is None else Figure(f"{problems:,}"))
        for _, name, percent in names:
            for side in sides:
                k = votes(side) if side else 0
                shown = figure(
                    side.get(f"cons_at_{k}" if name == "cons" else name), percent=percent
                )
                cells.append(
                    shown._replace(value=f"{shown.value} @{k}") if name == "cons" and k else shown
                )
        rows.append((Heading(label, run.title), cells))
    return Table("Results", "", columns, rows)


def _settings(runs: Sequence[Run], labels: Sequence[str]) -> Table | None:
    """Settings that are not the same in all runs; None where there are none."""
    trees = []
    for run in runs:
        stages = {stage["name"]: stage for stage in run.config["stages"]}
        trees.append(dict(flat({**run.config, "stages": stages})))
    keys = dict.fromkeys(key for tree in trees for key in tree)
    rows = [
        (Heading(key), [Figure(tree[key]) if key in tree else _ABSENT for tree in trees])
        for key in keys
        if len({tree.get(key) for tree in trees}) > 1 and key != "notes"
    ]
    if not rows:
        return None
    left_out = len(rows) - _MOST_SETTINGS
    lead = f"{left_out} more are left out" if left_out > 0 else ""
    return Table("Settings", lead, [Heading(label) for label in labels], rows[:_MOST_SETTINGS])


def _curves(runs: Sequence[Run], labels: Sequence[str]) -> list[tuple[str, list[Plot]]]:
    """For each train stage that two runs have by the same name, a plot of each metric's first
    curve; colours are the runs'."""
    names = [stage.name for run in runs for stage in run.stages if stage.description.trains]
    found = []
    for name in [each for each in dict.fromkeys(names) if names.count(each) > 1]:
        stages = [next((s for s in run.stages if s.name == name), None) for run in runs]
        plots = _held_out(stages, labels) + _metrics(stages, labels)
        if plots:
            found.append((name, plots))
    return found


def _held_out(stages: Sequence[StageRecord | None], labels: Sequence[str]) -> list[Plot]:
    """pass@1 of held-out problems over training, with its intervals."""
    curves = []
    for stage, label in zip(stages, labels, strict=True):
        rows = [] if stage is None else list(stage.rows("held_out.jsonl"))
        marks = Marker.all_of((row["step"], row.get("pass_at_1")) for row in rows)
        curves.append(Curve.of(label, marks))
    if sum(bool(curve.values) for curve in curves) < 2:
        return []
    title = "Held-out accuracy over training"
    return [Plot(title, Markup(line_plot(curves, title=title, percent=True)), list(labels))]


def _metrics(stages: Sequence[StageRecord | None], labels: Sequence[str]) -> list[Plot]:
    columns: list[dict[str, Columns]] = [
        {} if stage is None else {f: stage.columns(f) for f in ("metrics.jsonl", "timings.jsonl")}
        for stage in stages
    ]
    plots = []
    stage, metrics = next(
        (stage, each["metrics.jsonl"]) for stage, each in zip(stages, columns, strict=True) if stage
    )
    for panel in panels_of(stage, metrics):
        key = next(iter(panel.keys), "")
        curves = [
            Curve(label, *each.get(panel.file, {}).get(key, ([], [])))
            for each, label in zip(columns, labels, strict=True)
        ]
        if sum(bool(curve.values) for curve in curves) > 1:
            title = panel.title if len(panel.keys) == 1 else f"{panel.title}: {panel.keys[key]}"
            svg = line_plot(curves, title=title, percent=panel.percent, log=panel.log)
            plots.append(Plot(title, Markup(svg), list(labels)))
    return plots


def _cost(runs: Sequence[Run], labels: Sequence[str]) -> Table:
    """Wall time of each run by phase."""
    seconds = [wall_seconds(run) for run in runs]
    phases = list(dict.fromkeys(["total", *(phase for each in seconds for phase in each)]))
    rows = [
        (Heading(label), [Figure(duration(each[p])) if p in each else _ABSENT for p in phases])
        for label, each in zip(labels, seconds, strict=True)
    ]
    return Table("Wall time", "", [Heading(phase.replace("_", " ")) for phase in phases], rows)
