"""Runs of one config that differ in their seed: means over them, and how far they differ.

The seed is the unit. A figure of several runs is the mean of their figures; its interval, Student's
t over seeds with n - 1 degrees of freedom, says how the mean would change with other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from r1jax.config.lineage import differences
from r1jax.config.load import ConfigError
from r1jax.evaluation.metrics import LEVEL, Estimate, Floats, Summary, votes
from r1jax.evaluation.results import evaluation, wall_seconds
from r1jax.evaluation.run_directory import Run, StageRecord, read_run
from r1jax.files import JsonObject

# How names of figures begin that lie in 0..1 whatever the seed.
_SHARES = ("pass_at_", "cons_at_", "best_of_", "weighted_vote", "right_", "mended", "spoilt")
# What runs of one config may differ in: their seed, where they are stored, and texts about them.
_MAY_DIFFER = ("seed", "name", "output", "title", "notes", "comparisons")
_DIFFERENCES_SHOWN = 8
# Figures of held-out problems -> the metrics that say the same of training samples.
_IN_TRAINING = {"pass_at_1": ("reward/accuracy", "outcome/right"), "mean_length": ("length/mean",)}


def read_seeds(run_dirs: Sequence[str | Path]) -> tuple[Run, ...]:
    """Reads finished runs of one config, in the order of their seeds.

    Raises:
      ConfigError: two are of the same seed, one is not finished, or their configs differ in more
        than the seed, the directory and the texts; has a line for each.
      FileNotFoundError, ValueError: as `read_run`.
    """
    if not run_dirs:
        raise ValueError("no run directory given: nothing to compare")
    runs = sorted((read_run(path) for path in run_dirs), key=seed_of)
    problems = []
    for one, other in zip(runs, runs[1:], strict=False):
        if seed_of(one) == seed_of(other):
            problems.append(
                f"{one.directory} and {other.directory} both have seed = {seed_of(one)}: give one "
                "run of each seed"
            )
    first = runs[0]
    for run in runs[1:]:
        lines = list(differences(_common(first), _common(run)))
        if lines:
            rest = len(lines) - _DIFFERENCES_SHOWN
            problems += [
                f"{first.directory} and {run.directory} are runs of different configs:",
                *(f"  {line}" for line in lines[:_DIFFERENCES_SHOWN]),
                *([f"  and {rest} more"] if rest > 0 else []),
            ]
    for run in runs:
        gaps = run.missing()
        if gaps:
            problems.append(f"{run.directory} is not finished: {'; '.join(gaps)}")
    if problems:
        raise ConfigError(problems)
    return tuple(runs)


def seed_of(run: Run) -> int:
    return int(run.config.get("seed", 0))


def _common(run: Run) -> JsonObject:
    return {name: value for name, value in run.config.items() if name not in _MAY_DIFFER}


def mean_over_seeds(values: Sequence[float], *, is_share: bool) -> Estimate:
    """The mean of one value per seed, with Student's t interval; of width 0 where all seeds agree.

    Args:
      values: at least one. A single one says nothing of other seeds: the ends are nan.
      is_share: values lie in [0, 1] whatever the seed, so the interval is cut there.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 1:
        return Estimate(float(x[0]), math.nan, math.nan)
    quantile = float(stdtrit(x.size - 1, (1 + LEVEL) / 2))
    half = quantile * float(x.std(ddof=1)) / math.sqrt(x.size)
    mean = float(x.mean())
    low, high = mean - half, mean + half
    if is_share:
        low, high = float(np.maximum(low, 0.0)), float(np.minimum(high, 1.0))  # which keep nan
    return Estimate(mean, low, high)


def _summary_over_seeds(summaries: Sequence[Summary]) -> JsonObject:
    """The figures of one evaluation over seeds; a single seed's summary is returned as it is.

    Each `{"value", "low", "high"}` is over seeds, by domain and by reward too. A figure that one
    seed lacks (the verifier failed on every sample) is null. Counts are kept where all seeds agree.
    """
    if len(summaries) == 1:
        return dict(summaries[0])
    merged: JsonObject = {}
    for name in dict.fromkeys(name for summary in summaries for name in summary):
        values = [summary.get(name) for summary in summaries]
        tables = [value if isinstance(value, Mapping) else {} for value in values]
        if any("value" in table for table in tables):
            is_share = name.startswith(_SHARES)
            figures = [math.nan if (v := t.get("value")) is None else float(v) for t in tables]
            merged[name] = mean_over_seeds(figures, is_share=is_share).to_json()
        elif any(any(isinstance(inner, Mapping) for inner in table.values()) for table in tables):
            merged[name] = _summary_over_seeds(tables)
        elif all(value == values[0] for value in values):
            merged[name] = values[0]
    return merged


def mean_run(runs: Sequence[Run]) -> Run:
    """One run that stands for all: its summaries and seconds are means over seeds.

    Only evaluations keep a summary, and no stage has a directory: its files are of one seed.
    """

    def mean_stage(stages: Sequence[StageRecord]) -> StageRecord:
        phases = dict.fromkeys(phase for stage in stages for phase in stage.seconds)
        seconds = {p: sum(s.seconds.get(p, 0.0) for s in stages) / len(stages) for p in phases}
        summaries = [stage.summary or {} for stage in stages]
        summary = _summary_over_seeds(summaries) if stages[0].is_evaluation else None
        return replace(stages[0], directory=None, seconds=seconds, summary=summary)

    records = zip(*(run.stages for run in runs), strict=True)
    return replace(runs[0], stages=tuple(mean_stage(stages) for stages in records))


@dataclass(frozen=True)
class _SeedCurves:
    """One curve of a stage, in each run.

    measure: `pass_at_1`, `cons_at_<k>` or `mean_length`. held_out: measured on held-out problems;
    else on the samples just trained on. steps: those that all runs have. values: [seeds, steps].
    """

    stage: str
    measure: str
    held_out: bool
    steps: list[float]
    values: Floats


def seed_curves(runs: Sequence[Run]) -> list[_SeedCurves]:
    """The curves of stages that train on samples: of held-out problems if all runs measured them,
    else of the training samples."""
    every = []
    for stages in zip(*(run.stages for run in runs), strict=True):
        seeds = [_held_out_curves(stage) for stage in stages]
        held_out = all(seeds)
        if not held_out:
            seeds = [_training_curves(stage) for stage in stages]
        for measure in seeds[0]:
            curves = [curves.get(measure, {}) for curves in seeds]
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            if steps:
                values = np.array([[curve[step] for step in steps] for curve in curves])
                every.append(_SeedCurves(stages[0].name, measure, held_out, steps, values))
    return every


def _held_out_curves(stage: StageRecord) -> dict[str, dict[float, float]]:
    curves: dict[str, dict[float, float]] = {}
    for row in stage.rows("held_out.jsonl"):
        for name, figure in row.items():
            if isinstance(figure, Mapping) and figure.get("value") is not None:
                curves.setdefault(name, {})[float(row["step"])] = float(figure["value"])
    names = ("pass_at_1", f"cons_at_{votes(curves)}", "mean_length")
    return {name: curves[name] for name in names if name in curves}


def _training_curves(stage: StageRecord) -> dict[str, dict[float, float]]:
    columns = stage.columns("metrics.jsonl")
    curves = {}
    for measure, names in _IN_TRAINING.items():
        known = [name for name in names if name in columns]
        if known:
            curves[measure] = dict(zip(*columns[known[0]], strict=True))
    return curves


def results_over_seeds(runs: Sequence[Run]) -> JsonObject:
    """The content of the `results.json` of several runs.

    `evaluations` are those of `results`, each over seeds, with the single ones in `by_seed`;
    seconds have `mean`, `lowest`, `highest` and `by_seed`; `curves` are over the steps of RL
    training; `config`, resolved, of the first seed.
    """
    seeds = [str(seed_of(run)) for run in runs]
    mean = mean_run(runs)

    def spread(seconds: Sequence[float]) -> JsonObject:
        ends = {"lowest": min(seconds), "highest": max(seconds)}
        by_seed = dict(zip(seeds, seconds, strict=True))
        return {"mean": sum(seconds) / len(seconds), **ends, "by_seed": by_seed}

    stages = list(zip(*(run.stages for run in runs), strict=True))
    return {
        "name": mean.config.get("name"),
        "seeds": [seed_of(run) for run in runs],
        "evaluations": [
            (evaluation(mean, stage) or {})
            | {"by_seed": {seed: r.summary for seed, r in zip(seeds, records, strict=True)}}
            for stage, records in zip(mean.stages, stages, strict=True)
            if stage.is_evaluation
        ],
        "wall_seconds": spread([wall_seconds(run)["total"] for run in runs]),
        "stage_seconds": {each[0].name: spread([r.total_seconds for r in each]) for each in stages},
        "curves": [
            {
                "stage": each.stage,
                "measure": each.measure,
                "held_out": each.held_out,
                "steps": each.steps,
                "mean": each.values.mean(axis=0).tolist(),
                "lowest": each.values.min(axis=0).tolist(),
                "highest": each.values.max(axis=0).tolist(),
            }
            for each in seed_curves(runs)
        ],
        **{
            name: {seed: run.info.get(name, {}) for seed, run in zip(seeds, runs, strict=True)}
            for name in ("versions", "hardware")
        },
        "config": runs[0].config,
    }
