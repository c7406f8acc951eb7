"""The loop of reinforcement learning; read `run` from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax.critic_step import CriticBatch
from r1jax.data.instructions import Instruction
from r1jax.files import JsonObject
from r1jax.models import (
    Decoder,
    DistilledLogProbs,
    Teacher,
    TokenLogProbs,
    TokenRows,
    distilled_log_probs,
    token_log_probs,
)
from r1jax.models.balance import imbalance_of, loads_of, make_after_update
from r1jax.models.parameters import Params, abstract_weights
from r1jax.objectives.distillation import sampled_advantages
from r1jax.objectives.objective import Objective
from r1jax.policy_step import (
    GRPOBatch,
    LogProbFn,
    PolicyOutputs,
    batch_advantages,
    make_policy_step,
)
from r1jax.processes import process_batch_slice
from r1jax.programs import Planning, Program, SlotRollout, StagePrograms, TrainBatch
from r1jax.programs.program import (
    batch_array,
    expected_flops,
    expert_choices,
    longest_prompt,
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
from r1jax.rollouts.scoring import (
    check_domains,
    check_example_domains,
    check_first_rewards,
    first_failure,
    is_scored,
    reward_scorer,
)
from r1jax.rollouts.turns import instructions_of
from r1jax.run.resolve import ResolvedRun, StageRun
from r1jax.run.seeds import seed_of
from r1jax.run.stop import RunError
from r1jax.run.train_loop import Beside, copy_weights, train_loop
from r1jax.sampler import make_rollout_weights, reads_as_is
from r1jax.sampler.rollout_weights import in_equal_parts, weights_mover
from r1jax.settings.reflection import compile_patterns
from r1jax.settings.rewards import RewardSection
from r1jax.settings.section import SettingError
from r1jax.settings.turns import attempt_limits
from r1jax.sharding import batch_slices, same_devices
from r1jax.stages.distillation import (
    DIVERGENCE,
    DistillationTerms,
    check_teacher,
    distillation_terms,
    make_teacher,
    teacher_decoder,
)
from r1jax.stages.experts import check_experts
from r1jax.stages.grpo.credit import check_step_rewards, group_advantages_of
from r1jax.stages.grpo.critic import (
    after_warmup,
    check_critic,
    critic_programs,
    critic_state,
    make_critic,
    planned_critic,
)
from r1jax.stages.grpo.held_out import HeldOutEvaluation
from r1jax.stages.grpo.objective import stage_objective
from r1jax.stages.grpo.phase import PhaseSampler, phase_metrics, prompts_at_once
from r1jax.stages.grpo.questions import Questions
from r1jax.stages.grpo.rows import (
    PackedShape,
    expected_micro_batches,
    pack_updates,
    packed_shape,
    split_evenly,
    training_samples,
)
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.stages.grpo.turns import check_stage_turns, turn_samples
from r1jax.stages.grpo.updates import PhaseUpdates
from r1jax.train_step import (
    MICRO_BATCHES,
    Metrics,
    TrainState,
    TrainStep,
    make_optimizer,
    make_schedule,
    map_micro_batches,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Num

    from r1jax.programs.program import AbstractTree


def check(stage: GRPOStage, run: ResolvedRun) -> None:
    """Settings about experts fit the model; there is an objective; every prompt has a reward."""
    model = run.models.of(stage.name).decoder.config
    with run.config.blaming("stages", stage.name):
        check_experts(stage.balance, model, replay_experts=stage.replay_experts)
        objective = stage_objective(stage)
        if objective.critic is not None:
            check_critic(stage, run)
        if stage.reference is not None and objective.penalty is None:
            raise SettingError(
                "reference",
                f"objective {objective.name} has no penalty on KL to a reference policy; leave it "
                "out, or set kl_coefficient above 0",
            )
        check_step_rewards(stage, objective, run.config.rewards_of(stage))
        if stage.samples_divergence and not objective.by_step:
            raise SettingError(
                "distillation.form",
                "it gives the tokens of a sample different advantages, and by its formula "
                f"{objective.name} has one for each sample; set form to 'loss', or choose grpo, "
                "dr_grpo, dapo, cispo, sapo, reinforce_plus_plus or gspo of form token",
            )
    check_stage_turns(stage, run)
    check_teacher(stage, run)
    if stage.rewarded:
        check_example_domains(stage, run)


def run(stage: GRPOStage, run: StageRun) -> None:
    """Train with the stage's objective, resuming where a former process stopped."""
    model, sampler = run.models.of(stage.name).decoder, run.models.sampler_of(stage.name)
    rollout_layout, seed = sampler.decoder.layout, run.config.seed
    objective = stage_objective(stage)
    share = process_batch_slice(rollout_layout)
    questions = Questions(stage, run, sampler.tokenizer, rollout_layout)
    reward_sections = run.config.rewards_of(stage)
    if stage.rewarded:
        check_domains(stage, questions.domains, run.config)
    teacher = teacher_decoder(stage, run)
    warmup_steps = stage.critic_settings.warmup_steps
    schedule = make_schedule(stage.optimizer, stage.steps - warmup_steps)
    optimizer = make_optimizer(stage.optimizer, stage.steps - warmup_steps)
    # Devices that only sample have no rows of updates.
    apart = run.layouts.apart
    row_layout = model.layout if apart else rollout_layout
    all_steps = packed_shape(stage, questions.longest, model.layout, row_layout, step=None)
    experts = _batch(stage, model, all_steps).inputs.get("experts")
    log_probs_of, update = (
        jax.jit(make_log_probs(stage, model, all_steps.micro_batches)),
        make_update(stage, model, optimizer, all_steps.micro_batches, teacher),
    )
    if stage.samples_divergence:
        assert teacher is not None
        teacher_log_probs_of = jax.jit(make_log_probs(stage, teacher, all_steps.micro_batches))
        towards_teacher = jax.jit(partial(_towards_teacher, stage))
    token_advantages = jax.jit(partial(batch_advantages, objective))
    critic = make_critic(stage, objective, run, all_steps.micro_batches)
    rollout_weights = make_rollout_weights(model, sampler.decoder)
    updates = stage.mini_batches_per_rollout
    held_out = HeldOutEvaluation(
        stage, run, batch=stage.questions_per_phase // stage.rollout_batches
    )
    with (
        train_loop(
            stage,
            run,
            optimizer,
            update,
            questions,
            steps=stage.steps,
            beside=Beside(objective.penalty is not None, None if critic is None else critic.start),
        ) as loop,
        reward_scorer(reward_sections, run) as scorer,
    ):
        loop.clock.lap("setup")
        for report in questions.reports + held_out.reports:
            loop.progress.print(f"{stage.name}: {report}")

        def reference_log_probs(batch: GRPOBatch) -> jax.Array:
            return log_probs_of(loop.reference, _without_experts(log_prob_rows(batch)))

        reflections = compile_patterns(run.config.reflections)
        instructions: tuple[Instruction, ...] = ()
        if stage.turns is not None:
            training = [data for _, data in stage.training_datasets()]
            instructions = instructions_of(stage.turns, training, run, sampler)
        phases = PhaseSampler(
            stage, seed, sampler, questions, scorer, loop, reflections, instructions
        )
        unscored = None
        while loop.step < stage.steps:
            first = loop.step
            loop.begin_round(updates)
            samples_due = first == 0 or (
                (first + updates) // stage.samples_every > first // stage.samples_every
            )
            before = phases.snapshot()
            weights = rollout_weights(loop.state.params)
            held_out.evaluate_if_due(loop, scorer, before, weights)

            # 1. Sample. The workers score what has ended while the rest is generated. With a phase
            # of lag the next one is sampled, too, before the update of this one, or during it.
            leave = partial(loop.leave_if_stopped, before)
            phase = questions.waiting or phases.sample(loop.sampling or weights, first, leave)
            questions.waiting = loop.sampling = None
            ahead = stage.phases_of_lag and first + updates < stage.steps
            if ahead and not apart:
                questions.waiting = phases.sample(weights, first + updates, leave)
            if ahead and apart:
                loop.sampling = weights
            del weights  # where they are a copy, the update needs its room

            # 2. Rewards, and with them which groups are trained on.
            groups = phases.groups(phase)
            unscored = _unscored_phases(phase.facts, unscored, stage, reward_sections)
            facts = phase_metrics(phase, stage)
            if critic is not None:  # it compares no samples: equal ones teach, too
                del facts["groups/zero_variance"]

            # 3. Advantages, of most objectives within each prompt's group.
            prompts = stage.questions_per_phase // share.count
            if stage.turns is None:
                advantages = group_advantages_of(objective, groups, prompts)
                to_train = training_samples(stage, groups, advantages)
            else:
                to_train = turn_samples(stage, groups, objective, prompts)
            mini_batches = [to_train]
            if updates > 1:
                generator = np.random.default_rng(seed_of(seed, stage.name, "split", first))
                lengths = [sample.length for sample in to_train]
                split = split_evenly(lengths, updates, generator)
                mini_batches = [[to_train[i] for i in part] for part in split]
            packed = pack_updates(
                mini_batches,
                packed_shape(
                    stage,
                    questions.longest,
                    model.layout,
                    row_layout,
                    step=None if stage.importance_needed else first,
                ),
                row_layout,
                keep_untrained=model.config.experts is not None,
                experts=experts,
                attempts=stage.turns is not None,
            )
            batches = [loop.to_devices(batch, row_layout) for batch in packed.batches]
            if "segment_ids" in objective.needs and stage.turns is None:
                batches = [replace(b, segment_ids=b.inputs["segment_ids"]) for b in batches]

            # 4. Old log-probs: of the weights that sampled, from which the updates move away.
            if _with_old_log_probs(stage, objective):
                batches = [
                    replace(
                        each, old_log_probs=log_probs_of(loop.state.params, log_prob_rows(each))
                    )
                    for each in batches
                ]
            if stage.samples_divergence:
                assert loop.teacher is not None
                log_probs = [
                    teacher_log_probs_of(loop.teacher, _without_experts(log_prob_rows(each)))
                    for each in batches
                ]
                batches = list(map(towards_teacher, batches, log_probs))
            learnt: Sequence[CriticBatch] = ()
            if objective.changes_token_advantages or critic is not None:
                if loop.reference is not None:
                    batches = [
                        replace(b, reference_log_probs=reference_log_probs(b)) for b in batches
                    ]
                if critic is None:
                    batches = token_advantages(batches)
                else:
                    batches, learnt = critic.with_advantages(loop, batches)
            if stage.replay_experts and samples_due:
                gap = _gap_without_replay(log_probs_of, loop.state.params, batches[0])
                facts["sampler/gap_mean_without_replay"] = gap
            updating = PhaseUpdates(
                loop,
                phase,
                facts,
                lambda step: schedule(max(step - warmup_steps, 0)),
                share.count,
                sum(sample.length for sample in to_train),
                packed.rows_filled,
                samples_due,
                held_out.accuracy,
                apart,
            )
            for number, rows in enumerate(batches):
                # 5. Log-probs of the reference policy.
                if loop.reference is not None and rows.reference_log_probs is None:
                    rows = replace(rows, reference_log_probs=reference_log_probs(rows))

                # 6. Update, and log.
                of_critic = None
                if critic is not None:
                    of_critic = partial(critic.update, loop, learnt[number])
                updating.begin(rows, of_critic)
                refresh = stage.reference_refresh_every
                if loop.reference is not None and refresh and loop.step % refresh == 0:
                    loop.reference = copy_weights(loop.state.params)

            # The updates are queued on the devices that train: the host need not wait for them, nor
            # needs it another thread, whose programs processes might queue in another order.
            if ahead and apart:
                updating.all_begun()
                leave = partial(loop.leave_if_stopped, phases.snapshot(), end=updating.end)
                assert loop.sampling is not None
                questions.waiting = phases.sample(loop.sampling, first + updates, leave)
                loop.sampling = None

            # 7. Log the phase, and save.
            updating.end()
            loop.save_if_due(phases)
        weights = rollout_weights(loop.state.params)
        held_out.evaluate_if_due(loop, scorer, phases.snapshot(), weights)
        if critic is not None:
            critic.export(loop, run)
        loop.finish()


def _with_old_log_probs(stage: GRPOStage, objective: Objective) -> bool:
    """Whether they are computed before the update, which else computes them anyway."""
    needed = stage.samples_divergence or "old_log_probs" in objective.needs
    return stage.mini_batches_per_rollout > 1 or needed


def _towards_teacher(
    stage: GRPOStage, batch: GRPOBatch, log_probs: Float[Array, "rows time"]
) -> GRPOBatch:
    """With the teacher's log-probs, and what they add to the advantages of trained tokens."""
    assert stage.distillation is not None and batch.old_log_probs is not None
    added = sampled_advantages(batch.old_log_probs, log_probs, stage.distillation.coefficient)
    advantages = batch.advantages + jnp.where(batch.mask > 0, added, 0.0)
    return replace(batch, advantages=advantages, teacher_log_probs=log_probs)


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
    if not samples or not rewards:  # all of the phase's go on, or there are no rewards
        return before or 0
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


def _gap_without_replay(
    log_probs_of: Callable[[Params, LogProbRows], jax.Array], params: Params, batch: GRPOBatch
) -> float:
    """The mean of |sampler's log-prob - trainer's| over trained tokens, without replay."""
    assert batch.sampler_log_probs is not None
    rows = _without_experts(log_prob_rows(batch))
    gap = jnp.abs(log_probs_of(params, rows) - batch.sampler_log_probs)
    trained = batch.mask > 0
    return float(jnp.sum(jnp.where(trained, gap, 0.0)) / jnp.maximum(trained.sum(), 1))


def programs(stage: GRPOStage, planning: Planning) -> StagePrograms:
    """Rollout, rewards, log-probs and the update; the samples of a held-out evaluation."""
    model, sampler = planning.decoder_of(stage.name), planning.sampler_of(stage.name)
    prompt, new = longest_prompt(stage, planning.config), stage.longest_sample()
    phase, group = stage.mini_batches_per_rollout, stage.outputs_per_question
    with planning.config.blaming("stages", stage.name):
        objective = stage_objective(stage)
    with_reference = objective.penalty is not None
    with_old_log_probs = _with_old_log_probs(stage, objective)
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
    batch = _batch(stage, model, shape)
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
        calls=with_reference + with_old_log_probs,
        useful_flops=forward,
        scopes=scopes,
    )
    steps = [log_probs_program, update] if log_probs_program.calls else [update]
    if teacher is not None and not in_update:
        of_samples = jax.jit(make_log_probs(stage, teacher, shape.micro_batches))
        read = _without_experts(log_prob_rows(batch))
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
    limits = []
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


def _batch(stage: GRPOStage, model: Decoder, packed: PackedShape) -> GRPOBatch:
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
        "old_log_probs": per_token if _with_old_log_probs(stage, objective) else None,
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


class LogProbRows(NamedTuple):
    """Packed rows whose trained tokens' log-probs are computed.

    inputs: fields of `TokenRows`. used_micro_batches: as of `GRPOBatch`.
    """

    inputs: Mapping[str, jax.Array]
    mask: Num[Array, "rows time"]
    used_micro_batches: Int[Array, ""]


def log_prob_rows(batch: GRPOBatch) -> LogProbRows:
    assert batch.used_micro_batches is not None
    return LogProbRows(batch.inputs, batch.mask, batch.used_micro_batches)


def _without_experts(rows: LogProbRows) -> LogProbRows:
    """The same tokens, for a model that chooses their experts itself."""
    inputs = {name: leaf for name, leaf in rows.inputs.items() if name != "experts"}
    return rows._replace(inputs=inputs)


def make_log_probs(
    stage: GRPOStage, model: Decoder, micro_batches: int
) -> Callable[[Params, LogProbRows], Float[Array, "rows time"]]:
    """`log_probs(params, rows)`: old log-probs, and those of the reference policy."""

    def log_probs(params: Params, rows: LogProbRows) -> Float[Array, "rows time"]:
        def part(rows: tuple[Mapping[str, jax.Array], jax.Array]) -> Float[Array, "rows time"]:
            inputs, mask = rows
            return token_log_probs(
                params,
                TokenRows(**inputs),
                model,
                temperature=stage.sampling.temperature,
                wanted=mask > 0,
            ).log_probs

        per_row = rows.inputs, rows.mask
        return map_micro_batches(part, per_row, micro_batches, rows.used_micro_batches)

    return log_probs


def make_update(
    stage: GRPOStage,
    model: Decoder,
    optimizer: optax.GradientTransformation,
    micro_batches: int,
    teacher: Decoder | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One update of the stage's policy with its objective.

    Args:
      micro_batches: that the rows are split into, as of `PackedShape`.
      teacher: of a stage that distils, whose update has its weights as a third argument.

    Raises:
      ValueError: the stage asks for something about experts that the model has no use for.
    """
    check_experts(stage.balance, model.config, replay_experts=stage.replay_experts)
    balance = stage.balance.sequence_loss

    def log_prob_fn(
        params: Params, batch: GRPOBatch, teacher: Teacher | None = None
    ) -> PolicyOutputs:
        rows, wanted = TokenRows(**batch.inputs), batch.mask > 0
        temperature, balanced = stage.sampling.temperature, balance > 0
        tokens: TokenLogProbs | DistilledLogProbs
        terms: DistillationTerms = {}
        if teacher is None or stage.distillation is None:
            tokens = token_log_probs(
                params, rows, model, temperature=temperature, balance=balanced, wanted=wanted
            )
            if batch.teacher_log_probs is not None:
                shown = {DIVERGENCE: tokens.log_probs - batch.teacher_log_probs}
                terms = {"token_metrics": shown}
        else:
            tokens = distilled_log_probs(
                *(params, rows, model, teacher),
                temperature=temperature,
                balance=balanced,
                wanted=wanted,
            )
            terms = distillation_terms(tokens.comparison, stage.distillation.coefficient)
        penalty = balance * imbalance_of(tokens.routings) if balance else None
        return PolicyOutputs(
            tokens.log_probs, tokens.entropy, penalty, loads_of(tokens.routings), **terms
        )

    def policy_step(log_prob_fn: LogProbFn) -> TrainStep[GRPOBatch]:
        return make_policy_step(
            log_prob_fn,
            optimizer,
            stage_objective(stage),
            micro_batches=micro_batches,
            after_update=make_after_update(stage.balance, model.config),
        )

    warmup_steps = stage.critic_settings.warmup_steps
    if (teacher_of := make_teacher(stage, teacher)) is None:
        return after_warmup(policy_step(log_prob_fn), warmup_steps)

    def update(
        state: TrainState, batch: GRPOBatch, *teacher_weights: Params
    ) -> tuple[TrainState, Metrics]:
        function: LogProbFn = log_prob_fn
        if not stage.samples_divergence:  # else the batch has the teacher's log-probs
            function = partial(log_prob_fn, teacher=teacher_of(*teacher_weights))
        return after_warmup(policy_step(function), warmup_steps)(state, batch)

    return update
