"""Held-out evaluation while an RL stage trains.

Accuracy, votes and length over the steps, as in figures 2 and 3 of DeepSeek-R1 (arXiv 2501.12948
v1): R1-Zero's pass@1 and cons@16 on AIME 2024, and its length of response. (The paper's lengths are
those of training, which metrics.jsonl has as `length/mean`; these are of the held-out problems.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from r1jax.data.instructions import Instruction
from r1jax.evaluation.metrics import summarise
from r1jax.files import JsonObject
from r1jax.metrics.heartbeat import span
from r1jax.models.parameters import Params
from r1jax.processes import process_batch_slice
from r1jax.rewards.maths import equivalent_key
from r1jax.rollouts.sampling import generate_options
from r1jax.rollouts.scored_samples import PromptPart, scored_batches
from r1jax.rollouts.scoring import RewardScorer, check_domains
from r1jax.rollouts.turns import Attempts, instructions_of
from r1jax.run.resolve import ResolvedRun
from r1jax.run.seeds import seed_of
from r1jax.run.train_loop import Snapshot, TrainLoop
from r1jax.stages.grpo.settings import GRPOStage


class HeldOutEvaluation:
    """The evaluations of an RL stage: none where the stage names no held-out dataset.

    They draw what an `evaluate` stage with these settings would draw of the same weights. The noise
    is the same at every step, so differences are the policy's. No more prompts are sampled at once
    than in a rollout's `batch`, over all processes, and of each no more completions.

    `accuracy` is pass@1 of the last evaluation in this process; None where it is unknown.
    """

    def __init__(self, stage: GRPOStage, run: ResolvedRun, *, batch: int) -> None:
        self._stage = stage
        self._sampler = run.models.sampler_of(stage.name)
        self.reports: list[str] = []
        self.accuracy: float | None = None
        self._parts: list[PromptPart] = []
        if stage.held_out is None:
            return
        prompts, report = run.datasets.prompts(stage.held_out, self._sampler.tokenizer)
        self._instructions: tuple[Instruction, ...] = ()
        if stage.turns is not None:
            self._instructions = instructions_of(stage.turns, [stage.held_out], run, self._sampler)
        domains = {prompt.domain: stage.held_out for prompt in prompts}
        check_domains(stage, domains, run.config)
        self.reports.append(f"held out: {report}")
        # A divisor of both: samples are drawn in equal parts, none of them larger than a group.
        self._samples = math.gcd(stage.held_out_samples, stage.outputs_per_question)
        starts = range(0, stage.held_out_samples, self._samples)
        self._parts = [(prompt, start) for prompt in prompts for start in starts]
        # Of few problems one smaller batch: a rollout's would be padded with copies of the last.
        count = process_batch_slice(run.layouts.rollout).count
        self._batch = min(batch, -(-len(self._parts) // count) * count)
        self._seed = seed_of(run.config.seed, "evaluate", stage.held_out)

    @span("held_out")
    def evaluate_if_due(
        self, loop: TrainLoop, scorer: RewardScorer, before: Snapshot, weights: Params
    ) -> None:
        """At the stage's ends and every so many steps, write a row of held_out.jsonl.

        Call it after a step was saved, never before: a checkpoint is then without the evaluation of
        its own step, and a resumed run makes that again. `weights` are the loop's, as the sampler
        reads them.
        """
        step, stage = loop.step, self._stage
        due = step % stage.held_out_every == 0 or step == stage.steps
        if not self._parts or not due or loop.held_out_step == step:
            return
        rows = self._scored_rows(loop, scorer, before, weights)
        summary = summarise(rows, same_answer=equivalent_key)
        loop.recorder.log_held_out(step, summary)
        loop.held_out_step = step
        loop.clock.lap("held_out")
        self.accuracy = summary["pass_at_1"]["value"]
        right = "unknown" if self.accuracy is None else f"{self.accuracy:.3g}"
        length = summary["mean_length"]["value"]
        loop.progress.print(
            f"{stage.name}: held out at step {step}: accuracy {right}, length {length:.0f}"
        )

    def _scored_rows(
        self, loop: TrainLoop, scorer: RewardScorer, before: Snapshot, weights: Params
    ) -> Iterator[JsonObject]:
        """Of which no more than a batch is in memory."""
        options = generate_options(
            self._sampler,
            self._stage.held_out_sampling,
            samples=self._samples,
            max_new_tokens=self._stage.max_new_tokens_at(loop.step),
            seed=self._seed,
        )
        limits = self._stage.attempt_limits_at(loop.step)
        attempts = Attempts(limits, self._instructions)
        for rows in scored_batches(
            weights, self._parts, self._sampler, scorer, options, self._batch, attempts
        ):
            loop.clock.lap("held_out")
            loop.leave_if_stopped(before)
            yield from rows
