"""Evaluation as in the paper: k samples per problem, every sample stored."""

from __future__ import annotations

import json
from pathlib import Path

import jax

from r1jax.evaluation.metrics import summarise
from r1jax.files import read_rows
from r1jax.rewards.maths import equivalent_key
from r1jax.rollouts.scored_samples import SAMPLES, judge_samples, share_right
from r1jax.run.context import Context
from r1jax.stages.evaluate.settings import EvaluateStage


def run_evaluate(stage: EvaluateStage, context: Context, directory: Path) -> None:
    """Sample, score and store; resumes behind the last whole batch."""
    clock, _ = judge_samples(
        stage,
        context,
        directory,
        limit=stage.problems,
        samples=stage.samples_per_problem,
        batch=stage.problems_per_batch,
        samples_per_batch=stage.samples_per_batch,
        # The same noise before and after training: differences are the model's.
        seed=context.seed("evaluate", stage.data),
        progress_figures=lambda rows: {"accuracy": share_right(rows)},
    )
    if jax.process_index() == 0:
        summary = summarise(read_rows(directory / SAMPLES), same_answer=equivalent_key)
        (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    context.mark(stage.name, stage.kind, "done", clock.seconds)
