"""The loop of reinforcement learning; read `run` from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from r1jax.data.instructions import Instruction
from r1jax.files import JsonObject
from r1jax.processes import process_batch_slice
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
from r1jax.sampler import make_rollout_weights
from r1jax.settings.reflection import compile_patterns
from r1jax.settings.rewards import RewardSection
from r1jax.settings.section import SettingError
from r1jax.stages.distillation import check_teacher, teacher_decoder
from r1jax.stages.experts import check_experts
from r1jax.stages.grpo.batches import make_update_batches
from r1jax.stages.grpo.credit import check_step_rewards, group_advantages_of
from r1jax.stages.grpo.critic import check_critic, make_critic
from r1jax.stages.grpo.held_out import HeldOutEvaluation
from r1jax.stages.grpo.objective import stage_objective
from r1jax.stages.grpo.phase import PhaseSampler, phase_metrics
from r1jax.stages.grpo.policy_update import make_update
from r1jax.stages.grpo.programs import abstract_batch, programs
from r1jax.stages.grpo.questions import Questions
from r1jax.stages.grpo.rows import mini_batches, pack_updates, packed_shape, training_samples
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.stages.grpo.turns import check_stage_turns, turn_samples
from r1jax.stages.grpo.updates import PhaseUpdates
from r1jax.train_step import make_optimizer, make_schedule

__all__ = ["check", "programs", "run"]  # what a stage kind has


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
    experts = abstract_batch(stage, model, all_steps).inputs.get("experts")
    update = make_update(stage, model, optimizer, all_steps.micro_batches, teacher)
    critic = make_critic(stage, objective, run, all_steps.micro_batches)
    update_batches = make_update_batches(
        stage, objective, model, teacher, critic, all_steps.micro_batches
    )
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
            beside=Beside(
                reference=objective.penalty is not None,
                teacher=stage.distillation is not None,
                critic=None if critic is None else critic.start,
            ),
        ) as loop,
        reward_scorer(reward_sections, run) as scorer,
    ):
        loop.clock.lap("setup")
        for report in questions.reports + held_out.reports:
            loop.progress.print(f"{stage.name}: {report}")

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
            packed = pack_updates(
                mini_batches(to_train, updates, seed_of(seed, stage.name, "split", first)),
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

            # 4. Old log-probs, and advantages of tokens that follow from log-probs or a critic.
            batches, learnt = update_batches.complete(loop, batches)
            if stage.replay_experts and samples_due:
                gap = update_batches.gap_without_replay(loop.state.params, batches[0])
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
                rows = update_batches.with_reference(loop, rows)

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
