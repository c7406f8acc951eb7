"""The stage table: every evaluated checkpoint on every benchmark, each figure with its interval.

It is table 3 of DeepSeek-R1 (arXiv 2501.12948: R1-Zero, Dev1, Dev2, Dev3, R1) for any run, with a
plot of each benchmark beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from r1jax.evaluation.run_directory import Run, StageRecord
from r1jax.report.plots import Dots, Marker, dot_plot
from r1jax.report.wording import KINDS, Figure, figure, value_of, votes

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A dataset, or one domain of it.

    Attributes:
      turn: 0 for a checkpoint's first evaluation on the dataset, 1 for its second, ...
      domain: None for all of them.
    """

    data: str
    turn: int = 0
    domain: str | None = None

    @property
    def label(self) -> str:
        if self.domain is not None:
            return self.domain or "no domain"
        return f"{self.data} ({self.turn + 1})" if self.turn else self.data


@dataclass(frozen=True)
class Checkpoint:
    """Evaluated weights: their name, what made them, and the summary on each benchmark."""

    name: str
    kind: str
    summaries: Mapping[Benchmark, Summary]


@dataclass(frozen=True)
class Measure:
    """A column of a table: one figure of one benchmark.

    Attributes:
      part: `name` is a reward, whose mean it is.
    """

    benchmark: Benchmark
    name: str
    label: str
    note: str
    part: bool = False

    def of(self, checkpoint: Checkpoint) -> Summary | None:
        """`{"value", "low", "high"}`, where it was measured."""
        summary = checkpoint.summaries.get(self.benchmark) or {}
        found = (summary.get("parts") or {}) if self.part else summary
        return found.get(self.name)


@dataclass(frozen=True)
class Table:
    title: str
    lead: str
    columns: list[Measure]
    rows: list[tuple[Checkpoint, list[Figure]]]
    folded: bool


@dataclass(frozen=True)
class Plot:
    title: str
    svg: Markup
    legend: list[str]


def checkpoints(run: Run) -> list[Checkpoint]:
    """Everything that the run evaluates, in the order of models and stages.

    Evaluations belong together when they are of the same weights; where it is not known what they
    are of, each stands for itself.
    """
    kinds = {stage.name: KINDS.get(stage.kind, stage.kind) for stage in run.stages}
    found: dict[str, dict[Benchmark, Summary]] = {}
    for stage in run.stages:
        if stage.kind != "evaluate":
            continue
        summaries = found.setdefault(run.weights_of(stage.name) or stage.name, {})
        data = run.benchmark(stage.config["data"])
        turn = sum(each.data == data and each.domain is None for each in summaries)
        summary = stage.summary or {}
        summaries[Benchmark(data, turn)] = summary
        for domain, figures in (summary.get("by_domain") or {}).items():
            summaries[Benchmark(data, turn, domain)] = figures
    return [
        Checkpoint(name, kinds.get(name, "model"), found[name])
        for name in run.order()
        if name in found
    ]


def stage_tables(run: Run, compared: Sequence[StageRecord | None]) -> dict[str, Any] | None:
    """The tables of right answers, of votes and of rewards, and their plots.

    None where `compared`, the evaluations before and after, are all that there are, of one domain.
    """
    rows = checkpoints(run)
    benchmarks = _benchmarks(rows)
    others = [s for s in run.stages if s.kind == "evaluate" and s not in compared]
    if not others and len(benchmarks) < 2:
        return None
    several = len({(each.data, each.turn) for each in benchmarks}) > 1
    right, vote, rest = [], [], []
    plots = []
    for benchmark in benchmarks:
        whole = Benchmark(benchmark.data, benchmark.turn)
        parted = any(replace(each, domain=None) == whole != each for each in benchmarks)
        note = "all" if parted and benchmark == whole else whole.label if several and parted else ""
        right.append(Measure(benchmark, "pass_at_1", benchmark.label, note))
        series = [("first try (pass@1)", right[-1])]
        k = max(votes(row.summaries.get(benchmark) or {}) for row in rows)
        if k > 1:
            vote.append(Measure(benchmark, f"cons_at_{k}", benchmark.label, f"{note} cons@{k}"))
            series.append((f"vote of {k} (cons@{k})", vote[-1]))
        plots.append(_plot(right[-1], series, rows, percent=True))
        if benchmark == whole:
            note = whole.label if several else ""
            found = [row.summaries.get(whole) or {} for row in rows]
            more = [
                *(
                    Measure(whole, n, n.replace("_", " "), note, True)
                    for n in rewards_beyond(found)
                ),
                Measure(whole, "mean_length", "tokens per completion", note),
            ]
            rest += more
    plots += [_plot(each, [("mean", each)], rows) for each in rest]
    tables = [
        _table("Right at the first try", "pass@1", right, rows, percent=True),
        _table("Rewards and length", "means over problems", rest, rows),
        _table("Right by a vote", "cons@k", vote, rows, percent=True, folded=True),
    ]
    return {
        "tables": [table for table in tables if table is not None],
        "plots": [plot for plot in plots if plot is not None],
    }


def _benchmarks(rows: Sequence[Checkpoint]) -> list[Benchmark]:
    """Datasets as they are first met, each before its domains."""
    found = dict.fromkeys(each for row in rows for each in row.summaries)
    datasets = list(dict.fromkeys((each.data, each.turn) for each in found))
    return sorted(
        found, key=lambda each: (datasets.index((each.data, each.turn)), each.domain is not None)
    )


def rewards_beyond(summaries: Sequence[Summary]) -> list[str]:
    """Names of the rewards that say more than pass@1, which is the mean of the deciding one."""
    names = dict.fromkeys(name for summary in summaries for name in summary.get("parts") or {})

    def repeats(name: str, summary: Summary) -> bool:
        value, right = value_of(summary.get("parts") or {}, name), value_of(summary, "pass_at_1")
        return value is None or (right is not None and math.isclose(value, right, abs_tol=1e-9))

    return [name for name in names if not all(repeats(name, each) for each in summaries)]


def _table(
    title: str,
    lead: str,
    columns: list[Measure],
    rows: Sequence[Checkpoint],
    *,
    percent: bool = False,
    folded: bool = False,
) -> Table | None:
    if not columns:
        return None

    def cell(measure: Measure, row: Checkpoint) -> Figure:
        return figure(measure.of(row), percent=percent, digits=2 if measure.part else 1)

    cells = [(row, [cell(measure, row) for measure in columns]) for row in rows]
    return Table(title, lead, columns, cells, folded)


def _plot(
    column: Measure,
    series: Sequence[tuple[str, Measure]],
    rows: Sequence[Checkpoint],
    *,
    percent: bool = False,
) -> Plot | None:
    """One point with its interval for each checkpoint and series; None where nothing is known."""
    dots = [
        Dots(name, [m for i, row in enumerate(rows) if (m := Marker.of(i, measure.of(row)))])
        for name, measure in series
    ]
    if not any(each.markers for each in dots):
        return None
    title = f"{column.label} ({column.note})" if column.note else column.label
    svg = dot_plot([row.name for row in rows], dots, title=title, percent=percent)
    return Plot(title, Markup(svg), [name for name, _ in series] if len(series) > 1 else [])
