"""Evaluation as in the paper: k samples per problem, every sample stored."""

from __future__ import annotations

import json

import jax

from r1jax.evaluation.metrics import summarise
from r1jax.files import read_rows, write_text
from r1jax.programs import Planning, StagePrograms, sampling_programs
from r1jax.programs.rollout import search_programs
from r1jax.rewards.maths import equivalent_key
from r1jax.rollouts.scored_samples import SAMPLES, store_scored_samples
from r1jax.rollouts.scoring import check_example_domains
from r1jax.rollouts.searching import check_search, store_searches
from r1jax.rollouts.turns import check_turns
from r1jax.run.resolve import ResolvedRun, StageRun
from r1jax.run.seeds import seed_of
from r1jax.settings.names import nearest
from r1jax.stages.evaluate.settings import EvaluateStage


def check(stage: EvaluateStage, run: ResolvedRun) -> None:
    """Every problem needs a reward, and what chooses samples is one."""
    rewards = run.config.rewards_of(stage)
    for name in stage.chosen_by:
        if name not in rewards:
            raise run.config.refusal(
                ("stages", stage.name, "chosen_by"),
                f"{name!r} is no reward of this stage; {nearest(name, rewards)}there are "
                f"{', '.join(rewards)}",
            )
    check_example_domains(stage, run, stage.problems)
    check_search(stage, stage.dataset_search(), run)
    if stage.turns is not None:
        check_turns(stage, stage.turns, stage.max_new_tokens, run)


def run(stage: EvaluateStage, run: StageRun) -> None:
    """Sample or search, score and store, resuming behind the last whole batch; then summarise."""
    # The same noise before and after training: differences are the model's.
    seed = seed_of(run.config.seed, "evaluate", stage.data)
    if (search := stage.dataset_search()) is None:
        clock, _ = store_scored_samples(stage, run, stage.dataset_sampling(), seed, "accuracy")
    else:
        clock, _ = store_searches(stage, run, search, seed, "accuracy")
    if jax.process_index() == 0:
        summary = summarise(
            read_rows(run.directory / SAMPLES),
            same_answer=equivalent_key,
            chosen_by=stage.chosen_by,
        )
        write_text(run.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    run.record.mark(stage, "done", clock.seconds)


def programs(stage: EvaluateStage, planning: Planning) -> StagePrograms:
    """The sampler, and the scoring of reward models."""
    if (search := stage.dataset_search()) is not None:
        return search_programs(stage, planning, search)
    return sampling_programs(stage, planning, stage.dataset_sampling())
