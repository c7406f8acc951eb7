"""What rejection sampling compiles: the sampler, reward models, and the sampler of a rewriter."""

from __future__ import annotations

from dataclasses import replace

from r1jax.programs import Planning, Rollout, StagePrograms, sampling_programs
from r1jax.stages.rejection_sampling.settings import RejectionSamplingStage


def programs(stage: RejectionSamplingStage, planning: Planning) -> StagePrograms:
    prompt = planning.longest_prompt(stage)
    rollout = Rollout(
        planning.sampler_of(stage.name),
        stage.prompts_per_batch,
        stage.samples_per_prompt,
        prompt,
        stage.max_new_tokens,
        stage.sampling,
        planning.output_specs,
    )
    sampling = sampling_programs(stage, planning, rollout)
    rewrite = stage.model_rewrite
    if rewrite is None:
        return sampling
    # It reads a question and an answer, each as long as may be, and is alone in memory.
    rewriter = Rollout(
        planning.sampler_of(rewrite.weights),
        rewrite.drafts_per_batch,
        1,
        prompt + stage.max_new_tokens,
        rewrite.max_new_tokens,
        rewrite.sampling,
        planning.output_specs,
    )
    rewriting = rewriter.occasional_programs({}, "rewrite:")
    return replace(sampling, programs=(*sampling.programs, *rewriting))
