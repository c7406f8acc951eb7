"""What rejection sampling compiles: the sampler, reward models, and the sampler of a rewriter."""

from __future__ import annotations

from dataclasses import replace

from r1jax.programs import Planning, Rollout, StagePrograms, sampling_programs
from r1jax.programs.program import longest_prompt
from r1jax.stages.rejection_sampling.settings import RejectionSamplingStage


def programs(stage: RejectionSamplingStage, planning: Planning) -> StagePrograms:
    sampling = sampling_programs(
        stage,
        planning,
        prompts=stage.prompts_per_batch,
        samples=stage.samples_per_prompt,
        new_tokens=stage.max_new_tokens,
        sampling=stage.sampling,
    )
    rewrite = stage.model_rewrite
    if rewrite is None:
        return sampling
    # It reads a question and an answer, each as long as may be, and is alone in memory.
    rewriter = Rollout(
        planning.sampler_of(rewrite.weights),
        rewrite.drafts_per_batch,
        1,
        longest_prompt(stage, planning.config) + stage.max_new_tokens,
        rewrite.max_new_tokens,
        rewrite.sampling,
        planning.output_specs,
    )
    rewriting = rewriter.programs({}, 0.0, "rewrite: ")
    return replace(sampling, programs=(*sampling.programs, *rewriting))
