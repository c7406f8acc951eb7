"""The reinforcement learning loop: sample, score, update; read it from top to bottom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.data import PromptBatch, PromptIterator
from r1jax.data.order import DataCursor
from r1jax.grpo import GRPOBatch
from r1jax.objectives.advantages import group_advantages
from r1jax.processes import BatchSlice, gather, max_over_processes, process_batch_slice
from r1jax.rewards import RowScore
from r1jax.rollouts.sampling import (
    Completion,
    check_domains,
    sample_batch,
    stop_search,
    to_sampling,
)
from r1jax.rollouts.scoring import Judge
from r1jax.run.context import Context
from r1jax.run.optimizer import make_optimizer, make_schedule
from r1jax.run.train_loop import TrainLoop
from r1jax.sampler import Finish, GenerateOptions, make_rollout_weights
from r1jax.stages.grpo.held_out import HeldOut
from r1jax.stages.grpo.programs import make_score, make_update
from r1jax.stages.grpo.settings import GRPOStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run_grpo(stage: GRPOStage, context: Context, directory: Path) -> None:
    """Train with GRPO, resuming where a former process stopped."""
    model, sampler = context.model_of(stage.name).decoder, context.sampler_of(stage.name)
    tokenizer, rewards = sampler.tokenizer, context.config.rewards_of(stage)
    rollout_layout = sampler.decoder.layout
    share = process_batch_slice(rollout_layout)
    questions = Questions(stage, context, tokenizer, share)
    check_domains(stage.name, questions.domains, rewards)
    schedule = make_schedule(stage.optimizer, stage.steps)
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    with_reference = stage.loss.kl_coefficient > 0
    score, update = jax.jit(make_score(stage, model)), make_update(stage, model, optimizer)
    rollout_weights = make_rollout_weights(model, sampler.decoder)
    group, phase = stage.outputs_per_question, stage.mini_batches_per_rollout
    per_phase = stage.questions_per_step * phase
    own = per_phase // share.count  # questions of this process
    part = own // stage.rollout_batches
    held_out = HeldOut(stage, context, batch=share.count * part)
    loop = TrainLoop(
        stage, context, directory, stage.steps, optimizer, update, with_reference=with_reference
    )
    with loop, Judge(rewards, context) as judge:
        loop.restore(questions)
        for report in questions.reports + held_out.reports:
            loop.progress.print(f"{stage.name}: {report}")
        while loop.step < stage.steps:
            first = loop.step
            loop.begin_round(phase)
            # 0. Measure the policy as it stands, where an evaluation is due.
            weights = rollout_weights(loop.state.params)
            held_out.evaluate_if_due(loop, judge, questions, weights, max_new_tokens(stage, first))

            # 1. Sample. Each part is scored by the workers while the next one is generated.
            place = questions.state()
            taken = questions.take(per_phase, first)
            asked, firsts = taken.prompts, [repeat * group for repeat in taken.repeats]
            completions: list[Completion] = []
            pending = []
            options = GenerateOptions(
                samples=group,
                max_new_tokens=max_new_tokens(stage, first),
                seed=context.seed(stage.name, "rollout"),
                step=first,
                sampling=to_sampling(stage.sampling),
                eos_ids=sampler.eos_ids,
                stop=stop_search(tokenizer, stage.sampling),
                speculative=stage.sampling.speculative,
                record_experts=stage.replay_experts,
            )
            for start in range(0, own, part):
                # A preempted host has little time; a rollout may take an hour, and is done again.
                loop.leave_if_asked(place)
                batch = sample_batch(
                    weights,
                    asked[start : start + part],
                    sampler.decoder,
                    tokenizer,
                    options,
                    firsts=firsts[start : start + part],
                )
                pending.append(judge.submit(batch))
                completions.extend(batch)
            del weights  # where they are a copy, the update needs its room
            sampled = share.count * sum(len(completion.token_ids) for completion in completions)
            rollout_seconds = loop.clock.lap("rollout")
            scores = [score_ for each in pending for score_ in each.result()]
            score_seconds = loop.clock.lap("score_wait")

            # 2. Advantages within each question's group.
            earned = np.asarray([s.reward for s in scores], np.float32)
            advantages = group_advantages(
                jnp.asarray(earned.reshape(own, group)), scale=stage.loss.advantage_scale
            )
            rows = training_rows(stage, completions, scores, np.asarray(advantages.values))
            facts = rollout_metrics(
                gather(sample_facts(completions, scores), rollout_layout),
                gather(np.asarray(advantages.zero_variance).tolist(), rollout_layout),
            )

            # 3. Update: the phase's outputs, split at random into mini-batches.
            order = np.arange(len(completions))
            if phase > 1:
                order = np.random.default_rng(context.seed(stage.name, "split", first)).permutation(
                    order
                )
            mini_batches = [
                loop.place(jax.tree.map(lambda x, i=index: x[i], rows), rollout_layout)
                for index in np.split(order, phase)
            ]
            if phase > 1:  # these weights sampled the phase; the updates below move away from them
                mini_batches = [
                    b.replace(old_log_probs=score(loop.state.params, b.inputs))
                    for b in mini_batches
                ]
            due = first == 0 or (
                (first + phase) // stage.samples_every > first // stage.samples_every
            )
            if stage.replay_experts and due:
                gap = measure_gap(score, loop.state.params, mini_batches[0])
                facts["sampler/gap_mean_without_replay"] = gap
            for batch in mini_batches:
                if with_reference:
                    reference = score(loop.reference, own_choice(batch.inputs))
                    batch = batch.replace(reference_log_probs=reference)
                metrics = loop.update(batch)
                metrics["optimizer/learning_rate"] = schedule(loop.step - 1)
                loop.recorder.log(loop.step, {**facts, **metrics})
                every = stage.reference_refresh_every
                if with_reference and every and loop.step % every == 0:
                    loop.reference = jax.tree.map(jnp.copy, loop.state.params)
            update_seconds = loop.clock.lap("update")

            # 4. Tell, and save between phases.
            if due:
                loop.recorder.log_samples(
                    completion.row(score_, step=loop.step)
                    for completion, score_ in zip(completions[:group], scores, strict=False)
                )
            trained = sampled + share.count * group * sum(len(p.token_ids) for p in asked)
            loop.log_timings(
                {
                    "seconds/rollout": rollout_seconds,
                    "seconds/score_wait": score_seconds,
                    "seconds/update": update_seconds,
                    "tokens_per_second/rollout": sampled / rollout_seconds,
                    "tokens_per_second/update": trained / update_seconds,
                }
            )
            loop.progress.update(
                loop.step,
                {
                    "reward": facts["reward/mean"],
                    "length": facts["length/mean"],
                    "held_out": held_out.accuracy,
                    "tokens_per_second": sampled / rollout_seconds,
                },
            )
            loop.save_if_due(questions)
        weights = rollout_weights(loop.state.params)
        held_out.evaluate_if_due(loop, judge, questions, weights, max_new_tokens(stage, loop.step))
        loop.finish()


def own_choice(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokens, for a model that chooses their experts itself."""
    return {name: leaf for name, leaf in inputs.items() if name != "experts"}


def measure_gap(score: Callable[[Any, Any], jax.Array], params: Any, batch: GRPOBatch) -> float:
    """The mean of |sampler's log-prob - trainer's| over trained tokens, without replay."""
    gap = jnp.abs(score(params, own_choice(batch.inputs)) - batch.sampler_log_probs)
    trained = batch.mask > 0
    return float(jnp.sum(jnp.where(trained, gap, 0.0)) / jnp.maximum(trained.sum(), 1))


class Questions:
    """The prompts of a stage, from the dataset that is in force at a step.

    Each dataset is walked on its own; one that comes back later goes on where it was left.
    """

    def __init__(
        self,
        stage: GRPOStage,
        context: Context,
        tokenizer: PreTrainedTokenizerBase,
        share: BatchSlice,
    ) -> None:
        self._stage = stage
        self.reports: list[str] = []
        self.domains: dict[str, str] = {}
        self._walks: dict[str, PromptIterator] = {}
        trained = (data for key, data in stage.datasets() if key != "held_out")
        for name in dict.fromkeys(trained):
            prompts, report = context.prompts(name, tokenizer)
            self.reports.append(report if isinstance(stage.data, str) else f"{name}: {report}")
            self.domains |= {prompt.domain: name for prompt in prompts}
            self._walks[name] = PromptIterator(
                prompts,
                seed=context.seed(stage.name),
                process_index=share.index,
                process_count=share.count,
            )

    def take(self, count: int, step: int) -> PromptBatch:
        """The next `count` questions for step `step`; this process's share of them."""
        return self._walks[self._stage.data_at(step)].take(count)

    def state(self) -> DataCursor:
        return {name: walk.state() for name, walk in self._walks.items()}

    def restore(self, state: DataCursor) -> None:
        for name, walk in self._walks.items():
            walk.restore(state[name])


def max_new_tokens(stage: GRPOStage, step: int) -> int:
    """The completion limit that is in force at a step."""
    if isinstance(stage.max_new_tokens, int):
        return stage.max_new_tokens
    return [change.tokens for change in stage.max_new_tokens if change.step <= step][-1]


def training_rows(
    stage: GRPOStage,
    completions: Sequence[Completion],
    scores: Sequence[RowScore],
    advantages: np.ndarray,
) -> GRPOBatch:
    """Prompt and completion of each sample as one right-padded row, host arrays [N, T].

    T is rounded up to a multiple of `length_bucket`. Ids are those that were sampled, never
    re-encoded text. Unscored samples, and truncated ones if the stage says so, are masked out.
    Experts, where they were recorded, are among the inputs: [N, T, layers * k].
    """
    longest = max_over_processes(
        max(len(c.prompt.token_ids) + len(c.token_ids) for c in completions)
    )
    time = -(-longest // stage.length_bucket) * stage.length_bucket
    shape = (len(completions), time)
    tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask, sampler = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for i, (completion, score) in enumerate(zip(completions, scores, strict=True)):
        start = len(completion.prompt.token_ids)
        end = start + len(completion.token_ids)
        tokens[i, :start], tokens[i, start:end] = completion.prompt.token_ids, completion.token_ids
        segment_ids[i, :end] = 1
        sampler[i, start:end] = completion.sampler_log_probs
        left_out = stage.mask_truncated and completion.finish == Finish.LENGTH
        mask[i, start:end] = 0.0 if left_out or not score.scored else 1.0
    positions = np.broadcast_to(np.arange(time, dtype=np.int32), shape)
    inputs = {"tokens": tokens, "positions": positions, "segment_ids": segment_ids}
    first = completions[0].experts
    if first is not None:
        inputs["experts"] = np.zeros((*shape, first.shape[-1]), first.dtype)
        for row, completion in zip(inputs["experts"], completions, strict=True):
            assert completion.experts is not None
            row[: len(completion.experts)] = completion.experts
    return GRPOBatch(
        inputs=inputs,
        mask=mask,
        advantages=advantages.reshape(-1),
        sampler_log_probs=sampler,
    )


def sample_facts(
    completions: Sequence[Completion], scores: Sequence[RowScore]
) -> list[dict[str, Any]]:
    """What `rollout_metrics` needs to know of each sample, as JSON."""
    return [
        {
            "length": len(completion.token_ids),
            "truncated": completion.finish == Finish.LENGTH,
            "outcome": str(score.outcome),
            "domain": completion.prompt.domain,
            "reward": score.reward if score.scored else None,
            "parts": {name: part.reward for name, part in score.parts.items()},
            "drafted": completion.drafted,
            "accepted": completion.accepted,
        }
        for completion, score in zip(completions, scores, strict=True)
    ]


def rollout_metrics(
    samples: Sequence[Mapping[str, Any]], zero_variance: Sequence[bool]
) -> dict[str, float]:
    """What a rollout phase looked like; rewards are means over scored samples."""
    lengths = [sample["length"] for sample in samples]
    outcomes = Counter(sample["outcome"] for sample in samples)
    scored = [sample for sample in samples if sample["reward"] is not None]

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if values else float("nan")

    return {
        "reward/mean": mean([sample["reward"] for sample in scored]),
        **{
            f"reward/{name}": mean([s["parts"][name] for s in scored if name in s["parts"]])
            for name in dict.fromkeys(name for sample in samples for name in sample["parts"])
        },
        **{
            f"outcome/{name}": outcomes[name] / len(samples)
            for name in ("right", "wrong", "unparseable", "verifier_failed")
        },
        "length/mean": mean(lengths),
        "length/max": float(max(lengths)),
        "length/truncated": mean([sample["truncated"] for sample in samples]),
        "groups/zero_variance": mean(zero_variance),
        **_by_domain(scored),
        **_by_drafts(samples),
    }


def _by_drafts(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of speculative samples: drafts that stayed, and tokens for each reading of the weights.

    The second is the most that sampling can be faster by, where reading the weights is all it does.
    """
    drafted = sum(sample["drafted"] for sample in samples)
    if not drafted:
        return {}
    tokens = sum(sample["length"] - 1 for sample in samples)  # the first comes of the prompt
    return {
        "speculative/acceptance": sum(sample["accepted"] for sample in samples) / drafted,
        "speculative/tokens_per_step": tokens / drafted,
    }


def _by_domain(scored: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean reward of each domain, where there are several."""
    rewards: dict[str, list[float]] = {}
    for sample in scored:
        rewards.setdefault(sample["domain"], []).append(sample["reward"])
    if len(rewards) < 2:
        return {}
    return {f"domain/{name or 'none'}": float(np.mean(x)) for name, x in sorted(rewards.items())}
