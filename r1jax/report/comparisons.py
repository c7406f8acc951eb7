"""Checkpoints that the config puts side by side, with their figures and what they took to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from r1jax.evaluation.run_directory import Run, StageRecord
from r1jax.report.stage_table import Checkpoint, Measure, Measures, by_benchmark, measures, plots
from r1jax.report.tables import Heading, Plot, Table
from r1jax.report.wording import UNKNOWN, Figure, duration, paragraphs

Column = tuple[Heading, list[Figure]]


@dataclass(frozen=True)
class Comparison:
    """A table with its plots.

    Attributes:
      counted: which stages the wall times are of, in words.
      note: the config's, by paragraph.
    """

    table: Table
    plots: list[Plot]
    counted: str
    note: list[str]


@dataclass(frozen=True)
class Cost:
    """What made the weights of a row, beyond what all rows share: names of stages."""

    training: list[str]
    sampling: list[str]


def comparisons(run: Run, seeds: Sequence[Run] = ()) -> list[Comparison]:
    """All of the config's.

    Args:
      seeds: the runs, where `run` stands for the mean of them.
    """
    found = []
    for section in run.config.get("comparisons") or []:
        names = [str(name) for name in section["evaluations"]]
        rows = _rows(run, names)
        all_of_it, domains = _split(measures(rows))
        spent = costs(run, names)
        columns = [
            *_columns(all_of_it, rows),
            *_cost_columns(spent, run, seeds),
            *_columns(domains, rows),
        ]
        lines = [
            (Heading(row.name, row.kind), [cells[i] for _, cells in columns])
            for i, row in enumerate(rows)
        ]
        table = Table(section["title"], "", [heading for heading, _ in columns], lines)
        pictures = plots(all_of_it, rows, [_rows(seed, names) for seed in seeds])
        note = paragraphs(section.get("note") or "")
        found.append(Comparison(table, pictures, _counted(rows, spent), note))
    return found


def _split(found: Measures) -> tuple[Measures, Measures]:
    """What is said of all problems, and the first tries by domain.

    A table with votes by domain, too, no screen would hold; they are in the stage table.
    """

    def whole(columns: Sequence[Measure]) -> list[Measure]:
        return [each for each in columns if each.benchmark.domain is None]

    domains = [each for each in found.right if each.benchmark.domain is not None]
    all_of_it = Measures(whole(found.right), whole(found.vote), whole(found.rest))
    return all_of_it, Measures(domains, [], [])


def _columns(found: Measures, rows: Sequence[Checkpoint]) -> list[Column]:
    labelled = [
        *((Heading("pass@1", f"{each.label} {each.note}".strip()), each) for each in found.right),
        *((Heading(each.name.replace("_at_", "@"), each.label), each) for each in found.vote),
        *((Heading(each.label, each.note), each) for each in found.rest),
    ]
    return [(heading, [each.said(row) for row in rows]) for heading, each in labelled]


def _cost_columns(spent: Sequence[Cost], run: Run, seeds: Sequence[Run]) -> list[Column]:
    """Wall times, as far as there are any."""
    columns = [
        ("training", [_seconds(cost.training, run, seeds) for cost in spent]),
        ("rejection sampling", [_seconds(cost.sampling, run, seeds) for cost in spent]),
    ]
    return [
        (Heading(label, "wall time"), cells)
        for label, cells in columns
        if any(cell != UNKNOWN for cell in cells)
    ]


def _rows(run: Run, names: Sequence[str]) -> list[Checkpoint]:
    """The evaluations as rows: the weights' name, and that of the evaluation."""
    stages = {stage.name: stage for stage in run.stages}
    return [
        Checkpoint(
            run.weights_of(name) or name,
            name,
            by_benchmark(run.benchmark(stages[name].config["data"]), 0, stages[name].summary or {}),
        )
        for name in names
    ]


def costs(run: Run, names: Sequence[str]) -> list[Cost]:
    """What each evaluation's weights took beyond what the weights of all of them have gone through.

    Training is the stages on the path of the weights back to the last one that all share, or to
    the model. Rejection sampling is the stages whose datasets those learn from; what a teacher took
    to train is not in it.
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
    found = []
    for path in paths:
        own = [name for name in path if name not in shared]
        sources = (edge.source for edge in run.edges if edge.gives == "data" and edge.target in own)
        found.append(Cost(own, list(dict.fromkeys(sources))))
    return found


def _counted(rows: Sequence[Checkpoint], spent: Sequence[Cost]) -> str:
    parts = []
    for row, cost in zip(rows, spent, strict=True):
        said = ", ".join(cost.training)
        if cost.sampling:
            said += f" (samples of {', '.join(cost.sampling)})"
        parts.append(f"of {row.name}: {said or 'nothing of its own'}")
    return f"Wall times {'; '.join(parts)}."


def _seconds(names: Sequence[str], run: Run, seeds: Sequence[Run]) -> Figure:
    """Wall time of some stages; over seeds the mean, with the range."""

    def spent(stages: Sequence[StageRecord]) -> float:
        return sum(stage.spent for stage in stages if stage.name in names)

    if not spent(run.stages):
        return UNKNOWN
    each = [spent(seed.stages) for seed in seeds]
    ends = f"{duration(min(each))} – {duration(max(each))}" if each else ""
    return Figure(duration(spent(run.stages)), ends)
