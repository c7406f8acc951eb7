"""What an evaluation compiles: the sampler, and the scoring of reward models."""

from __future__ import annotations

from r1jax.programs import Planning, Rollout, StagePrograms, sampling_programs
from r1jax.stages.evaluate.settings import EvaluateStage


def programs(stage: EvaluateStage, planning: Planning) -> StagePrograms:
    rollout = Rollout(
        planning.sampler_of(stage.name),
        stage.problems_per_batch,
        stage.samples_at_once,
        planning.longest_prompt(stage),
        stage.max_new_tokens,
        stage.sampling,
        planning.output_specs,
    )
    return sampling_programs(stage, planning, rollout)
