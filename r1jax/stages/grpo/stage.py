"""The loop of reinforcement learning; read `run` from top to bottom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.data import PromptBatch, PromptIterator
from r1jax.data.order import DataCursor
from r1jax.files import JsonObject
from r1jax.grpo import GRPOBatch
from r1jax.models.parameters import Params
from r1jax.objectives.advantages import group_advantages
from r1jax.processes import BatchSlice, gather, max_over_processes, process_batch_slice
from r1jax.rewards import RowScore
from r1jax.rollouts.completions import Completion
from r1jax.rollouts.sampling import generate_options, sample_batch
from r1jax.rollouts.scoring import (
    PendingRewards,
    check_domains,
    check_example_domains,
    reward_scorer,
)
from r1jax.run.expert_balance import check_experts
from r1jax.run.optimizer import make_optimizer, make_schedule
from r1jax.run.resolve import ResolvedRun, StageRun
from r1jax.run.seeds import seed_of
from r1jax.run.train_loop import train_loop
from r1jax.sampler import Finish, make_rollout_weights
from r1jax.stages.grpo.held_out import HeldOutEvaluation
from r1jax.stages.grpo.programs import make_score, make_update, programs
from r1jax.stages.grpo.reference import copy_policy, refresh_reference
from r1jax.stages.grpo.settings import GRPOStage

if TYPE_CHECKING:
    from jaxtyping import PyTree
    from transformers import PreTrainedTokenizerBase

__all__ = ["check", "programs", "run"]


def check(stage: GRPOStage, run: ResolvedRun) -> None:
    """Settings about experts fit the model; every prompt has a reward."""
    model = run.models.of(stage.name).decoder.config
    check_experts(stage.name, stage.balance, model, replay_experts=stage.replay_experts)
    check_example_domains(stage, run)


def run(stage: GRPOStage, run: StageRun) -> None:
    """Train with GRPO, resuming where a former process stopped."""
    model, sampler = run.models.of(stage.name).decoder, run.models.sampler_of(stage.name)
    rollout_layout, seed = sampler.decoder.layout, run.config.seed
    share = process_batch_slice(rollout_layout)
    prompts = _TrainingPrompts(stage, run, sampler.tokenizer, share)
    reward_sections = run.config.rewards_of(stage)
    check_domains(stage.name, prompts.domains, reward_sections)
    schedule = make_schedule(stage.optimizer, stage.steps)
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    log_probs_of, update = jax.jit(make_score(stage, model)), make_update(stage, model, optimizer)
    rollout_weights = make_rollout_weights(model, sampler.decoder)
    group, updates = stage.outputs_per_question, stage.mini_batches_per_rollout
    per_phase = stage.questions_per_step * updates
    count = per_phase // share.count  # prompts of this process
    part = count // stage.rollout_batches
    held_out = HeldOutEvaluation(stage, run, batch=share.count * part)
    make_reference = copy_policy if stage.loss.kl_coefficient > 0 else None
    with (
        train_loop(
            stage, run, optimizer, update, prompts, steps=stage.steps, make_reference=make_reference
        ) as loop,
        reward_scorer(reward_sections, run) as scorer,
    ):
        loop.clock.lap("setup")
        for report in prompts.reports + held_out.reports:
            loop.progress.print(f"{stage.name}: {report}")
        while loop.step < stage.steps:
            first = loop.step
            loop.begin_round(updates)
            samples_due = first == 0 or (
                (first + updates) // stage.samples_every > first // stage.samples_every
            )
            data_cursor = prompts.state()
            weights = rollout_weights(loop.state.params)
            held_out.evaluate_if_due(loop, scorer, data_cursor, weights)

            # 1. Sample. The workers score each part while the next one is generated.
            taken = prompts.take(per_phase, first)
            options = generate_options(
                sampler,
                stage.sampling,
                samples=group,
                max_new_tokens=stage.max_new_tokens_at(first),
                seed=seed_of(seed, stage.name, "rollout"),
                step=first,
                record_experts=stage.replay_experts,
            )
            completions: list[Completion] = []
            pending: list[PendingRewards] = []
            for start in range(0, count, part):
                # A preempted host has little time; a rollout may take an hour, and is done again.
                loop.leave_if_stopped(data_cursor)
                batch = sample_batch(
                    weights,
                    taken.prompts[start : start + part],
                    sampler,
                    options,
                    first_samples=[n * group for n in taken.repeats[start : start + part]],
                )
                pending.append(scorer.submit(batch))
                completions += batch
            del weights  # where they are a copy, the update needs its room
            rollout_seconds = loop.clock.lap("rollout")

            # 2. Rewards.
            scores = [score for each in pending for score in each.result()]
            score_seconds = loop.clock.lap("score_wait")

            # 3. Advantages within each prompt's group.
            rewards = np.asarray([score.reward for score in scores], np.float32)
            advantages = group_advantages(
                jnp.asarray(rewards.reshape(count, group)), scale=stage.loss.advantage_scale
            )
            rows = training_rows(stage, completions, scores, np.asarray(advantages.values))
            facts = rollout_metrics(
                gather(sample_facts(completions, scores), rollout_layout),
                gather(np.asarray(advantages.zero_variance).tolist(), rollout_layout),
            )
            order = np.arange(len(completions))
            if updates > 1:  # the phase's samples, split at random into mini-batches
                generator = np.random.default_rng(seed_of(seed, stage.name, "split", first))
                order = generator.permutation(order)
            batches = [
                loop.to_devices(jax.tree.map(lambda x, i=index: x[i], rows), rollout_layout)
                for index in np.split(order, updates)
            ]

            # 4. Old log-probs: of the weights that sampled, from which the updates move away.
            if updates > 1:  # else they are the policy's, which the update computes anyway
                batches = [
                    each.replace(old_log_probs=log_probs_of(loop.state.params, each.inputs))
                    for each in batches
                ]
            if stage.replay_experts and samples_due:
                gap = _gap_without_replay(log_probs_of, loop.state.params, batches[0])
                facts["sampler/gap_mean_without_replay"] = gap
            for batch in batches:
                # 5. Log-probs of the reference policy.
                if loop.reference is not None:
                    inputs = _without_experts(batch.inputs)
                    batch = batch.replace(reference_log_probs=log_probs_of(loop.reference, inputs))

                # 6. Update, and log.
                metrics = loop.update(batch)
                metrics["optimizer/learning_rate"] = schedule(loop.step - 1)
                loop.recorder.log(loop.step, {**facts, **metrics})
                refresh_reference(loop, stage.reference_refresh_every)
            update_seconds = loop.clock.lap("update")

            # 7. Log the phase, and save.
            if samples_due:
                loop.recorder.log_samples(
                    completion.row(score, step=loop.step)
                    for completion, score in zip(completions[:group], scores, strict=False)
                )
            sampled = share.count * sum(len(each.token_ids) for each in completions)
            read = share.count * group * sum(len(each.token_ids) for each in taken.prompts)
            loop.log_timings(
                {
                    "seconds/rollout": rollout_seconds,
                    "seconds/score_wait": score_seconds,
                    "seconds/update": update_seconds,
                    "tokens_per_second/rollout": sampled / rollout_seconds,
                    "tokens_per_second/update": (sampled + read) / update_seconds,
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
            loop.save_if_due(prompts)
        weights = rollout_weights(loop.state.params)
        held_out.evaluate_if_due(loop, scorer, prompts.state(), weights)
        loop.finish()


def _without_experts(inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The same tokens, for a model that chooses their experts itself."""
    return {name: leaf for name, leaf in inputs.items() if name != "experts"}


def _gap_without_replay(
    log_probs_of: Callable[[Params, Mapping[str, jax.Array]], jax.Array],
    params: Params,
    batch: GRPOBatch,
) -> float:
    """The mean of |sampler's log-prob - trainer's| over trained tokens, without replay."""
    assert batch.sampler_log_probs is not None
    gap = jnp.abs(log_probs_of(params, _without_experts(batch.inputs)) - batch.sampler_log_probs)
    trained = batch.mask > 0
    return float(jnp.sum(jnp.where(trained, gap, 0.0)) / jnp.maximum(trained.sum(), 1))


class _TrainingPrompts:
    """The prompts of a stage, from the dataset that is in force at a step.

    Each dataset has its own order; one that comes back later continues where it was left. `domains`
    are those of the prompts, each with a dataset that has it.
    """

    def __init__(
        self,
        stage: GRPOStage,
        run: ResolvedRun,
        tokenizer: PreTrainedTokenizerBase,
        share: BatchSlice,
    ) -> None:
        self._stage = stage
        self.reports: list[str] = []
        self.domains: dict[str, str] = {}
        self._streams: dict[str, PromptIterator] = {}
        for name in dict.fromkeys(data for _, data in stage.training_datasets()):
            prompts, report = run.datasets.prompts(name, tokenizer)
            self.reports.append(report if isinstance(stage.data, str) else f"{name}: {report}")
            self.domains |= {prompt.domain: name for prompt in prompts}
            self._streams[name] = PromptIterator(
                prompts,
                seed=seed_of(run.config.seed, stage.name),
                process_index=share.index,
                process_count=share.count,
            )

    def take(self, count: int, step: int) -> PromptBatch:
        """The next `count` prompts over all processes; this process's share of them."""
        return self._streams[self._stage.data_at(step)].take(count)

    def state(self) -> DataCursor:
        return {name: stream.state() for name, stream in self._streams.items()}

    def restore(self, state: DataCursor) -> None:
        for name, stream in self._streams.items():
            stream.restore(state[name])


def training_rows(
    stage: GRPOStage,
    completions: Sequence[Completion],
    scores: Sequence[RowScore],
    advantages: np.ndarray,
) -> GRPOBatch:
    """Prompt and completion of each sample as one right-padded row, host arrays [N, T].

    T is a multiple of `length_bucket`. Ids are those that were sampled, never re-encoded text.
    Unscored samples, and truncated ones if the stage says so, are masked out.
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
    arrays: dict[str, PyTree] = {"mask": mask, "sampler_log_probs": sampler}
    arrays["advantages"] = advantages.reshape(-1)
    return GRPOBatch(inputs=inputs, **arrays)


def sample_facts(completions: Sequence[Completion], scores: Sequence[RowScore]) -> list[JsonObject]:
    """What `rollout_metrics` reads of each sample, as JSON."""
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
    samples: Sequence[JsonObject], zero_variance: Sequence[bool]
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


def _by_drafts(samples: Sequence[JsonObject]) -> dict[str, float]:
    """Of speculative samples: drafts that stayed, and tokens for each reading of the weights."""
    drafted = sum(sample["drafted"] for sample in samples)
    if not drafted:
        return {}
    tokens = sum(sample["length"] - 1 for sample in samples)  # the first comes of the prompt
    return {
        "speculative/acceptance": sum(sample["accepted"] for sample in samples) / drafted,
        "speculative/tokens_per_step": tokens / drafted,
    }


def _by_domain(scored: Sequence[JsonObject]) -> dict[str, float]:
    """Mean reward of each domain, where there are several."""
    rewards: dict[str, list[float]] = {}
    for sample in scored:
        rewards.setdefault(sample["domain"], []).append(sample["reward"])
    if len(rewards) < 2:
        return {}
    return {f"domain/{name or 'none'}": float(np.mean(x)) for name, x in sorted(rewards.items())}
