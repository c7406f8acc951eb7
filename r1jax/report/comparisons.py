"""Checkpoints that the config puts side by side, with their figures and the cost of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from r1jax.evaluation.run_directory import Run
from r1jax.report.stage_table import Checkpoint, Measures, by_benchmark, measures, plots
from r1jax.report.wording import UNKNOWN, Figure, Heading, Plot, Table, duration, paragraphs

Column = tuple[Heading, list[Figure]]


class _Comparison(NamedTuple):
    """A table with its plots.

    counted: which stages the wall times are of, as a sentence. note: the config's, by paragraph.
    """

    table: Table
    plots: list[Plot]
    counted: str
    note: list[str]


class _Cost(NamedTuple):
    """The stages that a row's weights took, without those of all rows."""

    training: list[str]
    sampling: list[str]


def comparisons(run: Run, seeds: Sequence[Run] = ()) -> list[_Comparison]:
    """All of the config's; `seeds`: the runs, where `run` stands for the mean of them."""
    made = []
    for section in run.config.get("comparisons") or []:
        names = [str(name) for name in section["evaluations"]]
        rows, spent = _rows(run, names), _costs(run, names)
        every = measures(rows)
        whole = Measures(*([m for m in part if m.benchmark.domain is None] for part in every))
        # Votes by domain are in the stage table only; here they would make a table too wide.
        by_domain = Measures([m for m in every.right if m.benchmark.domain is not None], [], [])
        columns = _columns(whole, rows) + _cost_columns(spent, run, seeds)
        columns += _columns(by_domain, rows)
        lines = [
            (Heading(row.name, row.kind), [cells[i] for _, cells in columns])
            for i, row in enumerate(rows)
        ]
        table = Table(section["title"], "", [heading for heading, _ in columns], lines)
        pictures = plots(whole, rows, [_rows(seed, names) for seed in seeds])
        note = paragraphs(section.get("note") or "")
        made.append(_Comparison(table, pictures, _counted(rows, spent), note))
    return made


def _columns(columns: Measures, rows: Sequence[Checkpoint]) -> list[Column]:
    labelled = [
        *((Heading("pass@1", f"{each.label} {each.note}".strip()), each) for each in columns.right),
        *((Heading(each.short, each.label), each) for each in columns.vote),
        *((Heading(each.label, each.note), each) for each in columns.rest),
    ]
    return [(heading, [each.cell(row) for row in rows]) for heading, each in labelled]


def _cost_columns(spent: Sequence[_Cost], run: Run, seeds: Sequence[Run]) -> list[Column]:
    """Wall times, as far as there are any; those of sampling under the titles of its stages."""
    sampled = {name for cost in spent for name in cost.sampling}
    titles = (stage.description.title for stage in run.stages if stage.name in sampled)
    columns = [("training", [cost.training for cost in spent])]
    columns.append((", ".join(dict.fromkeys(titles)), [cost.sampling for cost in spent]))
    cells = [(label, [_seconds(names, run, seeds) for names in each]) for label, each in columns]
    return [
        (Heading(label, "wall time"), figures)
        for label, figures in cells
        if any(figure != UNKNOWN for figure in figures)
    ]


def _rows(run: Run, names: Sequence[str]) -> list[Checkpoint]:
    """The evaluations as rows: the weights' name, and that of the evaluation."""
    stages = [stage for name in names for stage in run.stages if stage.name == name]
    figures = [by_benchmark(run.benchmark(each.data), 0, each.summary or {}) for each in stages]
    weights = [run.weights_of(name) or name for name in names]
    return [Checkpoint(*row) for row in zip(weights, names, figures, strict=True)]


def _costs(run: Run, names: Sequence[str]) -> list[_Cost]:
    """The stages that each evaluation's weights took, without those that all of them share.

    Training is the stages on the path of the weights back to the last shared one, or to the model.
    Sampling is the stages whose datasets those learn from, without the training of a teacher.
    """
    stages = {stage.name for stage in run.stages}
    paths = []
    for name in names:
        path: list[str] = []
        weights = run.weights_of(name)
        while weights in stages:
            path.insert(0, weights)
            weights = run.weights_of(weights)
        paths.append(path)
    shared = set.intersection(*(set(path) for path in paths))
    spent = []
    for path in paths:
        training = [name for name in path if name not in shared]
        sources = (e.source for e in run.edges if e.gives == "data" and e.target in training)
        spent.append(_Cost(training, list(dict.fromkeys(sources))))
    return spent


def _counted(rows: Sequence[Checkpoint], spent: Sequence[_Cost]) -> str:
    parts = []
    for row, cost in zip(rows, spent, strict=True):
        stages = ", ".join(cost.training) or "nothing of its own"
        samples = f" (samples of {', '.join(cost.sampling)})" if cost.sampling else ""
        parts.append(f"of {row.name}: {stages}{samples}")
    return f"Wall times {'; '.join(parts)}."


def _seconds(names: Sequence[str], run: Run, seeds: Sequence[Run]) -> Figure:
    """Wall time of some stages; over seeds the mean, with the range."""

    def seconds(run: Run) -> float:
        return sum(stage.total_seconds for stage in run.stages if stage.name in names)

    if not seconds(run):
        return UNKNOWN
    each = [seconds(seed) for seed in seeds]
    ends = f"{duration(min(each))} – {duration(max(each))}" if each else ""
    return Figure(duration(seconds(run)), ends)
