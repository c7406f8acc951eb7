"""Several seeds of one config on one page, with their tables as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from r1jax.config.load import ConfigError
from r1jax.evaluation.results import before_and_after
from r1jax.evaluation.run_directory import Run
from r1jax.evaluation.seeds import (
    mean_over_seeds,
    mean_run,
    read_seeds,
    results_over_seeds,
    seed_curves,
    seed_of,
)
from r1jax.files import write_json, write_text
from r1jax.report.attempts import attempts_table
from r1jax.report.comparisons import comparisons
from r1jax.report.page import headline, template
from r1jax.report.plots import Dots, Marker, band_plot, dot_plot
from r1jax.report.searches import costs_of_accuracy
from r1jax.report.stage_table import checkpoints, measures, stage_by_stage, tables
from r1jax.report.wording import (
    Figure,
    Heading,
    Plot,
    Table,
    duration,
    flat,
    markdown,
    paragraphs,
    plain,
)

_CURVES = {"pass_at_1": "pass@1", "mean_length": "tokens per completion"}


def write_seeds_report(run_dirs: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Writes `report.html`, `tables.md` and `results.json` of several runs; returns their paths.

    The runs are finished, of one config, each of another seed; `out` is a directory that is not of
    a run, made if it does not exist. Raises ConfigError if not.
    """
    directory = Path(out)
    if (directory / "config.yaml").exists():
        raise ConfigError(
            [f"--out {directory} is a run's directory, with a report of its own: name another"]
        )
    runs = read_seeds(run_dirs)
    page, text, content = _render(runs), _markdown_tables(runs), results_over_seeds(runs)
    directory.mkdir(parents=True, exist_ok=True)
    return [
        write_text(directory / "report.html", page),
        write_text(directory / "tables.md", text),
        write_json(directory / "results.json", content),
    ]


def _render(runs: Sequence[Run]) -> str:
    mean = mean_run(runs)
    several = len(runs) > 1
    rows = checkpoints(mean)
    sides, problems = headline(mean, *before_and_after(mean))
    hardware = {json.dumps(run.info.get("hardware"), sort_keys=True) for run in runs}
    return template("seeds.html.j2").render(
        title=mean.title,
        name=mean.config.get("name"),
        seeds=_seeds(runs),
        several=several,
        total=duration(sum(stage.total_seconds for run in runs for stage in run.stages)),
        sides=sides,
        problems=problems,
        interval="95 % interval over seeds" if several else "95 % interval over problems",
        meaning=_meaning(runs),
        stages=stage_by_stage(rows, [checkpoints(run) for run in runs] if several else ()),
        each_seed=_each_seed(runs),
        comparisons=comparisons(mean, runs if several else ()),
        attempts=attempts_table(mean, "seeds" if several else "problems"),
        costs=costs_of_accuracy(mean),
        curves=_curves(runs),
        wall=_wall_table(runs),
        wall_by_seed=_wall_by_seed(runs),
        wall_plot=_wall_plot(runs),
        hardware="The seeds ran on different hardware." if len(hardware) > 1 else "",
        notes=paragraphs(str(mean.config.get("notes") or "")),
        setups=[
            (f"seed {seed_of(r)}", flat(r.info.get("versions")) + flat(r.info.get("hardware")))
            for r in runs
        ],
        config=(mean.directory / "config.yaml").read_text(encoding="utf-8"),
    )


def _markdown_tables(runs: Sequence[Run]) -> str:
    mean = mean_run(runs)
    rows = checkpoints(mean)
    parts = [f"# {plain(mean.title)}\n", f"{plain(_seeds(runs).capitalize())}. {_meaning(runs)}\n"]
    for table in tables(measures(rows), rows):
        parts += [f"## {table.title} ({table.lead})\n", markdown(table)]
    for compared in comparisons(mean, runs if len(runs) > 1 else ()):
        parts += [f"## {plain(compared.table.title)}\n", markdown(compared.table)]
        parts += [f"{plain(text)}\n" for text in (compared.counted, *compared.note)]
    if attempts := attempts_table(mean, "seeds" if len(runs) > 1 else "problems"):
        parts += [f"## {attempts.title}\n", markdown(attempts)]
    for cost in costs_of_accuracy(mean):
        parts += [f"## {plain(cost.table.title)}\n", markdown(cost.table)]
    wall = _wall_table(runs)
    parts += [f"## {wall.title}\n", markdown(wall)]
    for table in _each_seed(runs):
        parts += [f"<details><summary>{table.title}</summary>\n", markdown(table), "</details>\n"]
    return "\n".join(parts)


def _seeds(runs: Sequence[Run]) -> str:
    numbers = [str(seed_of(run)) for run in runs]
    return f"seeds {', '.join(numbers)}" if len(numbers) > 1 else f"seed {numbers[0]}"


def _meaning(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return "A single seed: 95 % intervals over problems."
    return (
        f"Means over {len(runs)} seeds with 95 % intervals over seeds (Student's t; of shares cut "
        "at 0 and 100 %; without width where all seeds agree)."
    )


def _each_seed(runs: Sequence[Run]) -> list[Table]:
    """The stage tables with a row for each of several seeds, with intervals over problems."""
    if len(runs) == 1:
        return []
    columns = measures(checkpoints(mean_run(runs)))
    made = []
    for each in zip(*(tables(columns, checkpoints(run)) for run in runs), strict=True):
        lines = zip(*(table.rows for table in each), strict=True)
        rows = [
            (Heading(heading.label, f"seed {seed_of(run)}"), cells)
            for line in lines
            for run, (heading, cells) in zip(runs, line, strict=True)
        ]
        title = f"Each seed: {each[0].title.lower()}"
        lead = "95 % intervals over problems"
        made.append(Table(title, lead, each[0].columns, rows, folded=True))
    return made


def _wall(runs: Sequence[Run]) -> list[tuple[Heading, list[float]]]:
    """Seconds of each seed: by stage, of all evaluations together, and in all."""
    rows = []
    for stages in zip(*(run.stages for run in runs), strict=True):
        if not stages[0].is_evaluation:
            heading = Heading(stages[0].name, stages[0].description.title)
            rows.append((heading, [stage.total_seconds for stage in stages]))
    evaluations = [[stage.total_seconds for stage in run.evaluations()] for run in runs]
    if evaluations[0]:
        count = f"{len(evaluations[0])} in all" if len(evaluations[0]) > 1 else ""
        rows.append((Heading("evaluation", count), [sum(each) for each in evaluations]))
    totals = [sum(stage.total_seconds for stage in run.stages) for run in runs]
    return [*rows, (Heading("total", ""), totals)]


def _wall_table(runs: Sequence[Run]) -> Table:
    def cell(seconds: Sequence[float]) -> Figure:
        ends = f"{duration(min(seconds))} – {duration(max(seconds))}"
        return Figure(duration(sum(seconds) / len(seconds)), ends if len(runs) > 1 else "")

    note = "mean over seeds, and range" if len(runs) > 1 else ""
    rows = [(heading, [cell(seconds)]) for heading, seconds in _wall(runs)]
    return Table("Wall time", "", [Heading("wall time", note)], rows)


def _wall_by_seed(runs: Sequence[Run]) -> Table:
    headings = [Heading(stage.name, stage.description.title) for stage in runs[0].stages]
    every = zip(*(run.stages for run in runs), strict=True)
    times = [[Figure(duration(stage.total_seconds)) for stage in stages] for stages in every]
    rows = list(zip(headings, times, strict=True))
    columns = [Heading(f"seed {seed_of(run)}") for run in runs]
    return Table("Every stage in each seed", "", columns, rows, folded=True)


def _wall_plot(runs: Sequence[Run]) -> Plot:
    rows = _wall(runs)[:-1]  # beside the total, no stage would be visible
    values = [mean_over_seeds(seconds, is_share=False).value for _, seconds in rows]
    means = [Marker(i, mean, mean, mean) for i, mean in enumerate(values)]
    several = rows if len(runs) > 1 else []
    seeds = [Marker(i, s, s, s) for i, (_, seconds) in enumerate(several) for s in seconds]
    title = "seconds by stage"
    dots = Dots("mean", means, seeds)
    return Plot(title, Markup(dot_plot([h.label for h, _ in rows], [dots], title=title)), [])


def _curves(runs: Sequence[Run]) -> list[tuple[str, list[Plot]]]:
    """Stage -> plots."""
    curves: dict[str, list[Plot]] = {}
    for each in seed_curves(runs):
        label = _CURVES.get(each.measure, each.measure.replace("_at_", "@"))
        title = f"{label}, {'held-out' if each.held_out else 'training answers'}"
        percent = each.measure != "mean_length"
        svg = band_plot(each.steps, each.values, title=f"{title} ({each.stage})", percent=percent)
        curves.setdefault(each.stage, []).append(Plot(title, Markup(svg), []))
    return list(curves.items())
