"""What a run says at its end: what it reached, what to doubt, and the next commands."""

from __future__ import annotations

import shlex
from pathlib import Path

from r1jax.evaluation.metrics import Summary, votes
from r1jax.evaluation.results import before_and_after
from r1jax.evaluation.run_directory import Run, StageRecord, language_models
from r1jax.report.plots import endpoints
from r1jax.report.warnings import warnings_of
from r1jax.report.wording import figure, plural


def ending(
    run: Run,
    home: Path,
    *,
    sampled: tuple[str, str] | None = None,
    benchmarks: bool = True,
    variable: str = "",
) -> list[str]:
    """The lines below that of the report.

    Args:
      home: the run's directory for the user, or its address on a bucket.
      sampled: a template and a prompt with which the model can be sampled; None: there is none.
      benchmarks: whether the model could read their questions.
      variable: of the environment, `NAME=VALUE`, without which the mesh would not fit.
    """
    lines = _result(run)
    lines += [f"Warning: {warning.text}" for warning in warnings_of(run)]
    where, commands = shlex.quote(str(home)), []
    if has_model := bool(language_models(home)):
        if sampled is not None:
            template, prompt = sampled
            text = f"--template {template} --prompt {shlex.quote(prompt)}"
            commands.append(f"r1jax sample {where} {text}")
        evaluates = any(stage.is_evaluation for stage in run.stages)
        if evaluates or benchmarks:
            with_devices = f"{variable} " if variable else ""
            asked = "" if evaluates else " --benchmark math_500"
            commands.append(f"{with_devices}r1jax eval {where}{asked}")
    commands.append(f"r1jax report {where}")
    commands += [f"r1jax export {where} DEST"] if has_model else []
    return [*lines, "Next:", *(f"  {command}" for command in commands)]


def _result(run: Run) -> list[str]:
    """Before -> after, of evaluations, else of held-out problems in training, else of curves."""
    before, after = before_and_after(run)
    old, new = ((each.summary if each else None) or {} for each in (before, after))
    lines = []
    if new or old:
        problems = new.get("problems") or old.get("problems")
        sides = [_weights(run, each) for each in (before, after) if each and each.summary]
        of = f"{plural(problems, 'held-out problem')}, {' -> '.join(sides)}"
        lines.append(f"Result, on {of}: {'; '.join(_changes(old, new))}")
    for stage in () if new and old else run.stages:
        rows = list(stage.rows("held_out.jsonl"))
        if len(rows) > 1:
            of = plural(rows[0].get("problems"), "held-out problem")
            changes = "; ".join(_changes(rows[0], rows[-1]))
            lines.append(f"Result of {stage.name}, on {of}: {changes}")
        elif stage.description.trains:
            lines += _ends_of_curve(stage)
    return lines


def _weights(run: Run, stage: StageRecord) -> str:
    return run.weights_of(stage.name) or stage.name


def _changes(old: Summary, new: Summary) -> list[str]:
    k = votes(new or old)
    names = [("pass@1", "pass_at_1", True)]
    names += [(f"cons@{k}", f"cons_at_{k}", True)] if k > 1 else []
    names.append(("mean length", "mean_length", False))
    return [
        f"{label} {' -> '.join(_figure(side, key, percent=percent) for side in (old, new) if side)}"
        for label, key, percent in names
        if any(side.get(key) for side in (old, new))
    ]


def _figure(summary: Summary, name: str, *, percent: bool) -> str:
    shown = figure(summary.get(name), percent=percent)
    interval = shown.interval.replace(" – ", ", ")
    return f"{shown.value} [{interval}]" if interval else shown.value


def _ends_of_curve(stage: StageRecord) -> list[str]:
    columns = stage.columns("metrics.jsonl")
    label, name = ("reward", "reward/mean") if "reward/mean" in columns else ("loss", "loss")
    values = columns.get(name, ([], []))[1]
    if not values:
        return []
    if len(values) == 1:
        return [f"Result of {stage.name}: {label} {values[0]:.3g} (training, the one logged value)"]
    first, last = endpoints(values)
    return [f"Result of {stage.name}: {label} {first:.3g} -> {last:.3g} (training, no interval)"]
