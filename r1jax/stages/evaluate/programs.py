"""What an evaluation compiles: the sampler, and the scoring of reward models."""

from __future__ import annotations

from r1jax.programs import Planning, StagePrograms, sampling_programs
from r1jax.stages.evaluate.settings import EvaluateStage


def programs(stage: EvaluateStage, planning: Planning) -> StagePrograms:
    return sampling_programs(
        stage,
        planning,
        prompts=stage.problems_per_batch,
        samples=stage.samples_at_once,
        new_tokens=stage.max_new_tokens,
        sampling=stage.sampling,
    )
