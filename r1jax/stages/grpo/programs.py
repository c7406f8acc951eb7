"""What a stage of RL compiles and keeps in memory, of its loop in stage.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from r1jax.models import Decoder
from r1jax.models.parameters import abstract_weights
from r1jax.policy_step import GRPOBatch
from r1jax.programs import Planning, Program, SlotRollout, StagePrograms, TrainBatch
from r1jax.programs.program import (
    batch_array,
    expected_flops,
    expert_choices,
    longest_prompt,
    remat_limits,
    token_arrays,
    update_program,
)
from r1jax.programs.rollout import (
    later_attempts,
    planned_lengths,
    reward_model_weights,
    reward_models,
    reward_programs,
)
from r1jax.sampler import reads_as_is
from r1jax.sampler.rollout_weights import in_equal_parts, weights_mover
from r1jax.settings.turns import attempt_limits
from r1jax.sharding import batch_slices, same_devices
from r1jax.stages.distillation import teacher_decoder
from r1jax.stages.experts import check_experts
from r1jax.stages.grpo.critic import critic_programs, critic_state, planned_critic
from r1jax.stages.grpo.log_probs import (
    log_prob_rows,
    make_log_probs,
    with_old_log_probs,
    without_experts,
)
from r1jax.stages.grpo.objective import stage_objective
from r1jax.stages.grpo.phase import prompts_at_once
from r1jax.stages.grpo.policy_update import make_update
from r1jax.stages.grpo.rows import PackedShape, expected_micro_batches, packed_shape
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.train_step import MICRO_BATCHES, make_optimizer

if TYPE_CHECKING:
    from r1jax.programs.program import AbstractTree


def programs(stage: GRPOStage, planning: Planning) -> StagePrograms:
    """Rollout, rewards, log-probs and the update; the samples of a held-out evaluation."""
    model, sampler = planning.decoder_of(stage.name), planning.sampler_of(stage.name)
    prompt, new = longest_prompt(stage, planning.config), stage.longest_sample()
    phase, group = stage.mini_batches_per_rollout, stage.outputs_per_question
    with planning.config.blaming("stages", stage.name):
        objective = stage_objective(stage)
    with_reference = objective.penalty is not None
    rows = stage.questions_per_step * group
    weights = abstract_weights(model)
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    scorers = reward_models(stage, planning)
    others = {"reference": weights} if with_reference else {}
    others |= reward_model_weights(scorers)
    teacher = teacher_decoder(stage, planning)
    of_teacher = {} if teacher is None else {"teacher": abstract_weights(teacher)}
    in_update = None if stage.samples_divergence else teacher
    critic = None if objective.critic is None else planned_critic(stage, planning)
    beside_critic = others | of_teacher
    if critic is not None:
        others = others | critic_state(stage, critic)

    apart = not same_devices(model.layout, sampler.layout)
    row_layout = model.layout if apart else sampler.layout
    shape = packed_shape(stage, prompt, model.layout, row_layout, step=None)
    batch = abstract_batch(stage, model, shape)
    waiting = [batch] * (phase - 1)  # mini-batches of the phase that are not trained on yet
    train_batch = TrainBatch(batch, rows, prompt + new, rows // shape.rows)
    update = update_program(
        make_update(stage, model, optimizer, shape.micro_batches, teacher),
        optimizer,
        model,
        replace(train_batch, teacher=in_update),
        resident={**others, **({} if in_update else of_teacher), "batch": waiting},
    )
    others |= of_teacher
    lengths = planned_lengths(stage.lengths, new)
    forward = expected_flops(model.config, rows, lengths, before=prompt)
    scopes: dict[str, float] = {}
    notes: list[str] = []
    if stage.lengths is not None:  # else every sample fills a row
        slices = len(batch_slices(sampler.layout))
        real = [prompt + length for length in lengths.sample(phase * rows)]
        used = expected_micro_batches(shape, real, slices, phase)
        scopes = {MICRO_BATCHES: used}
        filled = sum(real) / phase / (used * shape.rows * shape.time)
        notes.append(
            f"an update runs {used:.3g} of {shape.micro_batches} micro-batches of {shape.rows} "
            f"rows of {shape.time:,} tokens, {100 * filled:.0f} % of which are real"
        )
    by_teacher = 0.0
    if teacher is not None:
        by_teacher = expected_flops(teacher.config, rows, lengths, before=prompt)
    useful = 3 * forward + (by_teacher if in_update else 0.0)
    update = replace(update, useful_flops=useful, scopes=scopes)
    resident = {**others, "optimizer": update.arguments["optimizer"]}
    log_probs = jax.jit(make_log_probs(stage, model, shape.micro_batches))
    log_probs_program = Program(
        "log-probs",
        model.layout.mesh.shape,
        partial(log_probs.lower, weights, log_prob_rows(batch)),
        {"weights": weights, "batch": batch.inputs},
        {**resident, "batch": [replace(batch, inputs=None), *waiting]},
        calls=with_reference + with_old_log_probs(stage, objective),
        useful_flops=forward,
        scopes=scopes,
    )
    steps = [log_probs_program, update] if log_probs_program.calls else [update]
    if teacher is not None and not in_update:
        of_samples = jax.jit(make_log_probs(stage, teacher, shape.micro_batches))
        read = without_experts(log_prob_rows(batch))
        teacher_program = replace(
            log_probs_program,
            name="teacher's log-probs",
            lower=partial(of_samples.lower, of_teacher["teacher"], read),
            arguments={**of_teacher, "batch": read.inputs},
            resident={
                **{name: leaf for name, leaf in resident.items() if name != "teacher"},
                "weights": weights,
                "batch": [replace(batch, inputs=None), *waiting],
            },
            calls=1,
            useful_flops=by_teacher,
        )
        steps.insert(0, teacher_program)
    if critic is not None:
        policy = {"weights": weights, "optimizer": update.arguments["optimizer"], "batch": waiting}
        forward = expected_flops(critic.config, rows, lengths, before=prompt)
        of_critic = critic_programs(
            stage,
            objective,
            critic,
            train_batch,
            shape.micro_batches,
            {**beside_critic, **policy},
        )
        steps += [
            replace(each, useful_flops=times * forward, scopes=scopes)
            for each, times in zip(of_critic, (1, 3), strict=True)
        ]

    questions, processes = stage.questions_per_phase, len(batch_slices(sampler.layout))
    of_phase = min(new, stage.tokens_per_phase or new)
    if stage.turns is not None:
        of_phase, *_ = attempt_limits(stage.turns, stage.longest_limit)
    at_once = questions if stage.goes_on else stage.questions_at_once
    rollout = SlotRollout(
        sampler,
        processes * prompts_at_once(stage, processes),
        group,
        prompt,
        of_phase,
        stage.sampling,
        planned_lengths(stage.lengths, of_phase),
        at_once,
        stage.replay_experts,
    )
    worst = stage.max_questions / questions
    limits = [*remat_limits(model, train_batch)]
    if stage.dynamic_sampling is not None:
        limits.append(
            f"dynamic sampling is planned at its limit, where a phase samples "
            f"{stage.max_questions} questions for {questions} groups, {worst:g} times as many"
        )
    notes = [*rollout.notes(), *notes]
    sampling = []
    while_sampling = resident
    if apart:
        sent, received = in_equal_parts(model, sampler)
        parts = abstract_weights(received)
        sampling += [
            _mover_program("weights to send", model, sent, weights, resident, 1 / phase),
            _mover_program("weights received", received, sampler, parts, {}, 1 / phase),
        ]
        while_sampling = {}
    elif not reads_as_is(model, sampler):
        name = "weights to the sampler"
        sampling.append(_mover_program(name, model, sampler, weights, resident, 1 / phase))
        while_sampling = {**resident, "policy": weights}
    queues = stage.max_questions / at_once
    sampling += rollout.programs(while_sampling, queues / phase)
    if stage.turns is not None:
        for prefix, later in later_attempts(rollout, stage.turns, stage.longest_limit):
            sampling += later.programs(while_sampling, queues / phase, prefix)
    if stage.tokens_per_phase is not None:
        limits.append(
            "partial rollouts are planned with samples that all go on, from their longest: "
            f"{questions * group} a phase of {stage.tokens_per_phase} tokens"
        )
        going_on = replace(
            rollout,
            at_once=rollout.at_once * group,
            samples=1,
            prompt_tokens=prompt + stage.longest_completion - stage.tokens_per_phase,
            queue=questions * group,
        )
        sampling += going_on.programs(while_sampling, 1 / phase, "go on: ")
    if stage.held_out is not None:
        held_out = replace(
            rollout,
            at_once=questions // stage.rollout_batches,
            samples=math.gcd(stage.held_out_samples, group),
            new_tokens=new if stage.turns is None else of_phase,
            sampling=stage.held_out_sampling,
            lengths=lengths if stage.turns is None else rollout.lengths,
            queue=None,
            record_experts=False,
        )
        sampling += held_out.programs(while_sampling, 0.0, "held-out ")
        if stage.turns is not None:
            for prefix, later in later_attempts(held_out, stage.turns, stage.longest_limit):
                sampling += later.programs(while_sampling, 0.0, f"held-out {prefix}")
    scored = round(worst * rows) * stage.attempts
    sampling += reward_programs(scorers, prompt + new, scored, {**resident, "weights": weights})
    tokens = round(rows * lengths.mean)
    return StagePrograms((*sampling, *steps), tokens, notes=tuple(notes), limits=tuple(limits))


def _mover_program(
    name: str,
    before: Decoder,
    after: Decoder,
    weights: AbstractTree,
    resident: Mapping[str, AbstractTree],
    calls: float,
) -> Program:
    return Program(
        name,
        after.layout.mesh.shape,
        partial(weights_mover(before, after).lower, weights),
        {"weights": weights},
        resident,
        calls,
        makes="sampler's weights",
    )


def abstract_batch(stage: GRPOStage, model: Decoder, packed: PackedShape) -> GRPOBatch:
    """The abstract batch of an update, as `pack_updates` makes it."""
    shape = packed.all_rows, packed.time
    inputs = token_arrays(model, *shape)
    check_experts(stage.balance, model.config, replay_experts=stage.replay_experts)
    objective = stage_objective(stage)
    if stage.replay_experts:
        inputs["experts"] = expert_choices(model, shape)
    per_token = batch_array(model, shape, jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=model.layout.replicated)
    arrays: dict[str, AbstractTree] = {
        "inputs": inputs,
        "mask": per_token,
        "advantages": per_token,
        "old_log_probs": per_token if with_old_log_probs(stage, objective) else None,
        "reference_log_probs": None if objective.penalty is None else per_token,
        "sampler_log_probs": per_token,
        "lengths": per_token,
        "sequences": scalar,
        "samples": scalar,
        "used_micro_batches": scalar,
        "segment_ids": None,
        "kl_coefficients": None if stage.turns is None else per_token,
        "teacher_log_probs": per_token if stage.samples_divergence else None,
    }
    if "segment_ids" in objective.needs or stage.turns is not None:
        arrays["segment_ids"] = inputs["segment_ids"]
    return GRPOBatch(**arrays)
