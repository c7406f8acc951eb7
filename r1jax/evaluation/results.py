"""`results.json`: what the model could do at each evaluation, how that was measured, its cost."""

from __future__ import annotations

from pathlib import Path

from r1jax.evaluation.run_directory import Run, StageRecord, read_run
from r1jax.files import JsonObject, write_json
from r1jax.settings.model import MODEL


def before_and_after(run: Run) -> tuple[StageRecord | None, StageRecord | None]:
    """The two evaluations to compare, finished or not.

    `after` is the evaluation that most stages led to, of equal ones the last: an ablation behind
    the recipe is not its result. `before` is the first one on the same problems. A lone evaluation
    is the one before if it precedes all learning, else the one after. Evaluations of other models
    (a student's) and searches count only where there is none of the main one, and none without.
    """
    evaluations = run.evaluations()
    evaluations = [s for s in evaluations if run.model_of(s.name) == MODEL] or evaluations
    # A search says what more tokens bring, not what training did.
    evaluations = [s for s in evaluations if not s.config.get("search")] or evaluations
    if not evaluations:
        return None, None
    last = max(reversed(evaluations), key=lambda stage: len(_sources(run, stage.name)))
    benchmark = run.benchmark(last.data)
    first = next(stage for stage in evaluations if run.benchmark(stage.data) == benchmark)
    if first is not last:
        return first, last
    learning = [stage.learns for stage in run.stages]
    trained = any(learning[: run.stages.index(last)])
    return (last, None) if any(learning) and not trained else (None, last)


def _sources(run: Run, name: str) -> set[str]:
    # The stages and models that a stage's result rests on.
    sources: set[str] = set()
    unseen = {name}
    while unseen:
        unseen = {edge.source for edge in run.edges if edge.target in unseen} - sources
        sources |= unseen
    return sources


def wall_seconds(run: Run) -> dict[str, float]:
    """Seconds by phase (rollout, update, ...) over all stages, and their `total`."""
    seconds: dict[str, float] = {}
    for stage in run.stages:
        for phase, spent in stage.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    return seconds | {"total": sum(seconds.values())}


def evaluation(run: Run, stage: StageRecord | None) -> JsonObject | None:
    """A finished evaluation's summary with its stage, weights and data; else None."""
    if stage is None or stage.summary is None:
        return None
    origin = {"weights": run.weights_of(stage.name), "data": stage.data}
    return {"stage": stage.name, **origin, **stage.summary}


def results(run: Run) -> JsonObject:
    """The content of `results.json`.

    `evaluations` are the summaries of all finished evaluations in order, with `before` and `after`,
    the two to compare; `wall_seconds` by phase and `stage_seconds` by stage and phase; `machine` by
    stage: compilations and memory; `missing` in words; `config`, resolved. Unknown ones are null.
    """
    before, after = before_and_after(run)
    evaluated = [evaluation(run, stage) for stage in run.evaluations()]
    missing = run.missing()
    return {
        "name": run.info.get("name", run.config.get("name")),
        "seed": run.info.get("seed", run.config.get("seed")),
        "complete": not missing,
        "missing": missing,
        "before": evaluation(run, before),
        "after": evaluation(run, after),
        "evaluations": [each for each in evaluated if each is not None],
        "wall_seconds": wall_seconds(run),
        "stage_seconds": {stage.name: stage.seconds for stage in run.stages if stage.seconds},
        "machine": {stage.name: stage.machine for stage in run.stages if stage.machine},
        "versions": run.info.get("versions", {}),
        "hardware": run.info.get("hardware", {}),
        "config": run.config,
    }


def write_results(run_dir: str | Path) -> Path:
    """Writes `results.json` into a run directory; a reader never sees half a file."""
    run = read_run(run_dir)
    return write_json(run.directory / "results.json", results(run))
