"""What reinforcement learning compiles: sampling, rewards, log-probs and the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from r1jax.grpo import GRPOBatch, PolicyOutputs, make_grpo_step
from r1jax.models import Decoder, TokenRows, token_log_probs
from r1jax.models.parameters import Params
from r1jax.programs import Planning, Program, Rollout, StagePrograms, TrainBatch
from r1jax.programs.arrays import (
    abstract_weights,
    batch_array,
    expert_choices,
    round_up,
    token_arrays,
)
from r1jax.programs.flops import forward_flops
from r1jax.programs.program import longest_prompt
from r1jax.programs.reward_models import reward_model_weights, reward_models, reward_programs
from r1jax.programs.update import update_program
from r1jax.run.expert_balance import check_experts, imbalance_of, loads_of, make_after_update
from r1jax.run.optimizer import make_optimizer
from r1jax.sampler import reads_as_is
from r1jax.sampler.rollout_weights import weights_mover
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.train_step import TrainStep, map_micro_batches

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from r1jax.programs.arrays import AbstractTree


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
    score = jax.jit(make_score(stage, model))
    score_program = Program(
        "log-probs",
        model.layout.mesh.shape,
        partial(score.lower, weights, batch.inputs),
        {"weights": weights, "batch": batch.inputs},
        {**resident, "batch": [replace(batch, inputs=None), *waiting]},
        calls=with_reference + (phase > 1),
        useful_flops=forward_flops(model.config, rows, prompt + new),
    )
    steps = [score_program, update] if score_program.calls else [update]

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


def make_score(
    stage: GRPOStage, model: Decoder
) -> Callable[[Params, Mapping[str, jax.Array]], Float[Array, "rows time"]]:
    """`score(params, inputs)`: the log-probs of all tokens under these weights."""

    def score(params: Params, inputs: Mapping[str, jax.Array]) -> Float[Array, "rows time"]:
        def part(inputs: Mapping[str, jax.Array]) -> Float[Array, "rows time"]:
            temperature = stage.sampling.temperature
            rows = TokenRows(**inputs)
            return token_log_probs(params, rows, model, temperature=temperature).log_probs

        return map_micro_batches(part, inputs, stage.micro_batches)

    return score


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
