"""The stage table: every evaluated checkpoint on every benchmark, each figure with its interval.

It is table 3 of DeepSeek-R1 (arXiv 2501.12948), for any run, with a plot of each benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from r1jax.evaluation.metrics import JsonEstimate, Summary, votes
from r1jax.evaluation.run_directory import Run, StageRecord
from r1jax.report.plots import Dots, Marker, dot_plot
from r1jax.report.wording import Figure, Heading, Plot, Table, figure, value_of


class _Benchmark(NamedTuple):
    """A dataset, or one domain of it; `turn`: 1 for a checkpoint's second evaluation on it, ..."""

    data: str
    turn: int = 0
    domain: str | None = None

    @property
    def label(self) -> str:
        if self.domain is not None:
            return self.domain or "no domain"
        return f"{self.data} ({self.turn + 1})" if self.turn else self.data


class Checkpoint(NamedTuple):
    """Evaluated weights: their name, what made them, and the summary on each benchmark."""

    name: str
    kind: str
    summaries: Mapping[_Benchmark, Summary]


class Measure(NamedTuple):
    """A column of a table: one figure of one benchmark.

    part: the mean of the reward `name`. chooser: the reward by which the samples were chosen.
    """

    benchmark: _Benchmark
    name: str
    label: str
    note: str
    part: bool = False
    chooser: str = ""

    def estimate(self, checkpoint: Checkpoint) -> JsonEstimate | None:
        summary = checkpoint.summaries.get(self.benchmark) or {}
        if self.chooser:
            return ((summary.get("chosen_by") or {}).get(self.chooser) or {}).get(self.name)
        figures = (summary.get("parts") or {}) if self.part else summary
        return figures.get(self.name)

    @property
    def short(self) -> str:
        """A heading for a vote, or a choice among samples."""
        return self.note if self.chooser else self.name.replace("_at_", "@")

    @property
    def percent(self) -> bool:
        """Whether it is a share of right answers."""
        shares = ("pass_at_", "cons_at_", "best_of_", "weighted_vote")
        return self.name.startswith(shares) and not self.part

    def cell(self, checkpoint: Checkpoint) -> Figure:
        return figure(self.estimate(checkpoint), percent=self.percent, digits=2 if self.part else 1)


class Measures(NamedTuple):
    """The columns of the stage table: right answers and votes by benchmark, then the rest."""

    right: list[Measure]
    vote: list[Measure]
    rest: list[Measure]


def checkpoints(run: Run) -> list[Checkpoint]:
    """Everything that the run evaluates, in the order of models and stages.

    Evaluations of the same weights belong together; one of unknown weights stands for itself.
    """
    titles = {stage.name: stage.description.title for stage in run.stages}
    evaluated: dict[str, dict[_Benchmark, Summary]] = {}
    for stage in run.evaluations():
        summaries = evaluated.setdefault(run.weights_of(stage.name) or stage.name, {})
        data = run.benchmark(stage.data)
        turn = sum(each.data == data and each.domain is None for each in summaries)
        summaries |= by_benchmark(data, turn, stage.summary or {})
    return [
        Checkpoint(name, titles.get(name, "model"), evaluated[name])
        for name in run.order()
        if name in evaluated
    ]


def by_benchmark(data: str, turn: int, summary: Summary) -> dict[_Benchmark, Summary]:
    """One evaluation's figures: of all problems, and of each domain."""
    domains = (summary.get("by_domain") or {}).items()
    parts = {_Benchmark(data, turn, domain): figures for domain, figures in domains}
    return {_Benchmark(data, turn): summary, **parts}


def stage_tables(
    run: Run, compared: Sequence[StageRecord | None]
) -> tuple[list[Table], list[Plot]] | None:
    """The tables of right answers, of votes and of rewards, and their plots.

    None where `compared`, the evaluations before and after, are the only ones, and of one domain.
    """
    rows = checkpoints(run)
    others = [stage for stage in run.evaluations() if stage not in compared]
    return stage_by_stage(rows) if others or len(_benchmarks(rows)) > 1 else None


def stage_by_stage(
    rows: Sequence[Checkpoint], seeds: Sequence[Sequence[Checkpoint]] = ()
) -> tuple[list[Table], list[Plot]]:
    """The tables of some checkpoints, and their plots.

    seeds: the same checkpoints in each of several runs, where `rows` are means over them.
    """
    columns = measures(rows)
    return tables(columns, rows), plots(columns, rows, seeds)


def measures(rows: Sequence[Checkpoint]) -> Measures:
    benchmarks = _benchmarks(rows)
    several = len({(each.data, each.turn) for each in benchmarks}) > 1
    right, vote, rest = [], [], []
    for benchmark in benchmarks:
        whole = _Benchmark(benchmark.data, benchmark.turn)
        parted = any(each._replace(domain=None) == whole != each for each in benchmarks)
        note = "all" if parted and benchmark == whole else whole.label if several and parted else ""
        right.append(Measure(benchmark, "pass_at_1", benchmark.label, note))
        k = max(votes(row.summaries.get(benchmark) or {}) for row in rows)
        if k > 1:
            note = f"{note} cons@{k}".strip()
            vote.append(Measure(benchmark, f"cons_at_{k}", benchmark.label, note))
            vote += _chosen(benchmark, [row.summaries.get(benchmark) or {} for row in rows], k)
        if benchmark == whole:
            note = whole.label if several else ""
            rewards = rewards_beyond([row.summaries.get(whole) or {} for row in rows])
            rest += [Measure(whole, n, n.replace("_", " "), note, part=True) for n in rewards]
            rest.append(Measure(whole, "mean_length", "tokens per completion", note))
    return Measures(right, vote, rest)


def _chosen(benchmark: _Benchmark, summaries: Sequence[Summary], k: int) -> list[Measure]:
    """The best of k samples and the weighted vote by each reward that chooses."""
    choosers = dict.fromkeys(name for each in summaries for name in each.get("chosen_by") or {})
    names = {f"best_of_{k}": f"best of {k}", "weighted_vote": "weighted vote"}
    return [
        Measure(benchmark, name, benchmark.label, f"{title} by {chooser}", chooser=chooser)
        for chooser in choosers
        for name, title in names.items()
        if any(name in ((each.get("chosen_by") or {}).get(chooser) or {}) for each in summaries)
    ]


def tables(columns: Measures, rows: Sequence[Checkpoint]) -> list[Table]:
    """Right answers, the rest, and votes, as far as there are any."""
    parts = [
        ("Right at the first try", "pass@1", columns.right, False),
        ("Rewards and length", "means over problems", columns.rest, False),
        ("Right by a vote", "cons@k", columns.vote, True),
    ]
    return [
        Table(
            title,
            lead,
            [Heading(each.label, each.note) for each in chosen],
            [(Heading(row.name, row.kind), [m.cell(row) for m in chosen]) for row in rows],
            folded,
        )
        for title, lead, chosen, folded in parts
        if chosen
    ]


def plots(
    columns: Measures, rows: Sequence[Checkpoint], seeds: Sequence[Sequence[Checkpoint]] = ()
) -> list[Plot]:
    """One for each benchmark, of first try and vote, and one for each other figure."""
    drawn = []
    for right in columns.right:
        series = [("first try (pass@1)", right)]
        for vote in columns.vote:
            if vote.benchmark == right.benchmark:
                k = vote.name.rsplit("_", 1)[1]
                title = vote.note if vote.chooser else f"vote of {k} (cons@{k})"
                series.append((title, vote))
        drawn.append(_plot(right, series, rows, seeds))
    drawn += [_plot(each, [("mean", each)], rows, seeds) for each in columns.rest]
    return [plot for plot in drawn if plot is not None]


def _benchmarks(rows: Sequence[Checkpoint]) -> list[_Benchmark]:
    """Datasets in the order of their first evaluations, each before its domains."""
    every = dict.fromkeys(each for row in rows for each in row.summaries)
    datasets = list(dict.fromkeys((each.data, each.turn) for each in every))
    return sorted(
        every, key=lambda each: (datasets.index((each.data, each.turn)), each.domain is not None)
    )


def rewards_beyond(summaries: Sequence[Summary]) -> list[str]:
    """Names of the rewards that say more than pass@1, which is the mean of the deciding one."""
    names = dict.fromkeys(name for summary in summaries for name in summary.get("parts") or {})

    def repeats(name: str, summary: Summary) -> bool:
        value, right = value_of(summary.get("parts") or {}, name), value_of(summary, "pass_at_1")
        return value is None or (right is not None and math.isclose(value, right, abs_tol=1e-9))

    return [name for name in names if not all(repeats(name, each) for each in summaries)]


def _plot(
    column: Measure,
    series: Sequence[tuple[str, Measure]],
    rows: Sequence[Checkpoint],
    seeds: Sequence[Sequence[Checkpoint]],
) -> Plot | None:
    """One point with its interval for each checkpoint and series; None where nothing is known."""

    def markers(measure: Measure, rows: Sequence[Checkpoint]) -> list[Marker]:
        return Marker.all_of((i, measure.estimate(row)) for i, row in enumerate(rows))

    dots = [
        Dots(name, markers(measure, rows), [m for seed in seeds for m in markers(measure, seed)])
        for name, measure in series
    ]
    if not any(each.markers or each.seeds for each in dots):
        return None
    title = f"{column.label} ({column.note})" if column.note else column.label
    svg = dot_plot([row.name for row in rows], dots, title=title, percent=column.percent)
    return Plot(title, Markup(svg), [name for name, _ in series] if len(series) > 1 else [])
