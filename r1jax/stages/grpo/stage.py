"""The loop of reinforcement learning; read `run` from top to bottom."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax.data.order import DataCursor
from r1jax.data.prompts import PromptBatch, PromptIterator
from r1jax.files import JsonObject
from r1jax.grpo import GRPOBatch, PolicyOutputs, group_advantages, make_grpo_step
from r1jax.models import Decoder, TokenRows, token_log_probs
from r1jax.models.balance import check_experts, imbalance_of, loads_of, make_after_update
from r1jax.models.parameters import Params, abstract_weights
from r1jax.processes import BatchSlice, gather, max_over_processes, process_batch_slice
from r1jax.programs import Planning, Program, Rollout, StagePrograms, TrainBatch
from r1jax.programs.program import (
    batch_array,
    expert_choices,
    forward_flops,
    longest_prompt,
    round_up,
    token_arrays,
    update_program,
)
from r1jax.programs.rollout import reward_model_weights, reward_models, reward_programs
from r1jax.rewards import Outcome, RowScore
from r1jax.rollouts.sampling import Completion, generate_options, sample_batch
from r1jax.rollouts.scoring import (
    PendingRewards,
    check_domains,
    check_example_domains,
    check_first_rewards,
    first_failure,
    is_scored,
    reward_scorer,
)
from r1jax.run.resolve import ResolvedRun, StageRun
from r1jax.run.seeds import seed_of
from r1jax.run.stop import RunError
from r1jax.run.train_loop import copy_weights, train_loop
from r1jax.sampler import Finish, make_rollout_weights, reads_as_is
from r1jax.sampler.rollout_weights import weights_mover
from r1jax.settings.rewards import RewardSection
from r1jax.stages.grpo.held_out import HeldOutEvaluation
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.train_step import TrainStep, make_optimizer, make_schedule, map_micro_batches

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PyTree
    from transformers import PreTrainedTokenizerBase

    from r1jax.programs.program import AbstractTree


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
    log_probs_of, update = (
        jax.jit(make_log_probs(stage, model)),
        make_update(stage, model, optimizer),
    )
    rollout_weights = make_rollout_weights(model, sampler.decoder)
    group, updates = stage.outputs_per_question, stage.mini_batches_per_rollout
    per_phase = stage.questions_per_step * updates
    count = per_phase // share.count  # prompts of this process
    part = count // stage.rollout_batches
    held_out = HeldOutEvaluation(stage, run, batch=share.count * part)
    with (
        train_loop(
            stage,
            run,
            optimizer,
            update,
            prompts,
            steps=stage.steps,
            with_reference=stage.loss.kl_coefficient > 0,
        ) as loop,
        reward_scorer(reward_sections, run) as scorer,
    ):
        loop.clock.lap("setup")
        for report in prompts.reports + held_out.reports:
            loop.progress.print(f"{stage.name}: {report}")
        unscored = None
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
                pending.append(scorer.submit(batch, first, stage.steps))
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
            samples = gather(sample_facts(completions, scores), rollout_layout)
            unscored = _unscored_phases(samples, unscored, stage, reward_sections)
            facts = rollout_metrics(
                samples,
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
                refresh = stage.reference_refresh_every
                if loop.reference is not None and refresh and loop.step % refresh == 0:
                    loop.reference = copy_weights(loop.state.params)
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


def _unscored_phases(
    samples: Sequence[JsonObject],
    before: int | None,
    stage: GRPOStage,
    rewards: Mapping[str, RewardSection],
) -> int:
    """How many phases in a row, now, no sample was scored; `before` it, None in the first phase.

    Raises:
      RunError: the first phase's rewards fail, or too many phases had nothing to train on.
    """
    if before is None:
        check_first_rewards(samples, rewards)
    if any(is_scored(sample, rewards) for sample in samples):
        return 0
    phases = (before or 0) + 1
    if phases > stage.max_bad_steps:
        raise RunError(
            f"{stage.name}: no sample was scored in {phases} rollout phases in a row, more than "
            f"max_bad_steps = {stage.max_bad_steps}: {first_failure(samples)}"
        )
    return phases


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
            "deadline": score.deadline,
            "domain": completion.prompt.domain,
            "reward": score.reward if score.scored else None,
            "parts": {name: part.reward for name, part in score.parts.items()},
            "details": {
                name: part.detail
                for name, part in score.parts.items()
                if part.outcome is Outcome.VERIFIER_FAILED
            },
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
    deadlines = Counter(filter(None, (sample.get("deadline") for sample in samples)))
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
        # By cause, and only where there were some.
        **{f"deadline/{cause}": count / len(samples) for cause, count in deadlines.items()},
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


def programs(stage: GRPOStage, planning: Planning) -> StagePrograms:
    """Rollout, rewards, log-probs and the update; the samples of a held-out evaluation."""
    model, sampler = planning.decoder_of(stage.name), planning.sampler_of(stage.name)
    prompt, new = longest_prompt(stage, planning.config), stage.longest_completion
    phase, group = stage.mini_batches_per_rollout, stage.outputs_per_question
    with_reference = stage.loss.kl_coefficient > 0
    rows = stage.questions_per_step * group
    weights = abstract_weights(model)
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    scorers = reward_models(stage, planning)
    others = {"reference": weights} if with_reference else {}
    others |= reward_model_weights(scorers)

    batch = _batch(stage, model, rows, round_up(prompt + new, stage.length_bucket))
    waiting = [batch] * (phase - 1)  # mini-batches of the phase that are not trained on yet
    update = update_program(
        make_update(stage, model, optimizer),
        optimizer,
        model,
        TrainBatch(batch, rows, prompt + new, stage.micro_batches),
        resident={**others, "batch": waiting},
    )
    resident = {**others, "optimizer": update.arguments["optimizer"]}
    log_probs = jax.jit(make_log_probs(stage, model))
    log_probs_program = Program(
        "log-probs",
        model.layout.mesh.shape,
        partial(log_probs.lower, weights, batch.inputs),
        {"weights": weights, "batch": batch.inputs},
        {**resident, "batch": [replace(batch, inputs=None), *waiting]},
        calls=with_reference + (phase > 1),
        useful_flops=forward_flops(model.config, rows, prompt + new),
    )
    steps = [log_probs_program, update] if log_probs_program.calls else [update]

    questions = stage.questions_per_step * phase // stage.rollout_batches
    rollout = Rollout(
        sampler,
        questions,
        group,
        prompt,
        new,
        stage.sampling,
        planning.output_specs,
        stage.replay_experts,
    )
    sampling = []
    while_sampling = resident
    if not reads_as_is(model, sampler):
        move = weights_mover(model, sampler)
        sampling.append(
            Program(
                "weights to the sampler",
                sampler.layout.mesh.shape,
                partial(move.lower, weights),
                {"weights": weights},
                resident,
                calls=1 / phase,
                makes="sampler's weights",
            )
        )
        while_sampling = {**resident, "policy": weights}
    sampling += rollout.programs(while_sampling, stage.rollout_batches / phase)
    evaluated = math.gcd(stage.held_out_samples, group)
    if stage.held_out is not None and evaluated != group:  # else they are the rollout's programs
        held_out = replace(
            rollout, samples=evaluated, sampling=stage.held_out_sampling, record_experts=False
        )
        sampling += held_out.programs(while_sampling, 0.0, "held-out ")
    sampling += reward_programs(scorers, prompt + new, rows, {**resident, "weights": weights})
    return StagePrograms((*sampling, *steps), rows * new)


def _batch(stage: GRPOStage, model: Decoder, rows: int, time: int) -> GRPOBatch:
    """The abstract batch of an update, as `training_rows` makes it."""
    inputs = token_arrays(model, rows, time)
    check_experts(stage.name, stage.balance, model.config, replay_experts=stage.replay_experts)
    if stage.replay_experts:
        inputs["experts"] = expert_choices(model, (rows, time))
    per_token = batch_array(model, (rows, time), jnp.float32)
    arrays: dict[str, AbstractTree] = {
        "inputs": inputs,
        "mask": per_token,
        "advantages": batch_array(model, (rows,), jnp.float32),
        "old_log_probs": per_token if stage.mini_batches_per_rollout > 1 else None,
        "reference_log_probs": per_token if stage.loss.kl_coefficient > 0 else None,
        "sampler_log_probs": per_token,
    }
    return GRPOBatch(**arrays)


def make_log_probs(
    stage: GRPOStage, model: Decoder
) -> Callable[[Params, Mapping[str, jax.Array]], Float[Array, "rows time"]]:
    """`log_probs(params, inputs)`: old log-probs, and those of the reference policy."""

    def log_probs(params: Params, inputs: Mapping[str, jax.Array]) -> Float[Array, "rows time"]:
        def part(inputs: Mapping[str, jax.Array]) -> Float[Array, "rows time"]:
            temperature = stage.sampling.temperature
            rows = TokenRows(**inputs)
            return token_log_probs(params, rows, model, temperature=temperature).log_probs

        return map_micro_batches(part, inputs, stage.micro_batches)

    return log_probs


def make_update(
    stage: GRPOStage, model: Decoder, optimizer: optax.GradientTransformation
) -> TrainStep[GRPOBatch]:
    """One GRPO update of the stage's policy.

    Raises:
      ValueError: the stage asks for something about experts that the model has no use for.
    """
    check_experts(stage.name, stage.balance, model.config, replay_experts=stage.replay_experts)
    balance = stage.balance.sequence_loss

    def log_prob_fn(params: Params, batch: GRPOBatch) -> PolicyOutputs:
        tokens = token_log_probs(
            params,
            TokenRows(**batch.inputs),
            model,
            temperature=stage.sampling.temperature,
            balance=balance > 0,
        )
        penalty = balance * imbalance_of(tokens.routings) if balance else None
        return PolicyOutputs(tokens.log_probs, tokens.entropy, penalty, loads_of(tokens.routings))

    return make_grpo_step(
        log_prob_fn,
        optimizer,
        stage.loss,
        micro_batches=stage.micro_batches,
        after_update=make_after_update(stage.balance, model.config),
    )
