"""The critic of objective kind ppo: a value model beside the policy, with an optimizer of its own.

It shares no weights with the policy (as in verl, and in R1's comparison with PPO): its loss has no
weight against the policy's, and the policy's update is the same program as without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from r1jax.critic_step import CriticBatch, critic_advantages, make_critic_step
from r1jax.models import Decoder, TokenRows
from r1jax.models.parameters import Params, abstract_weights
from r1jax.models.reward_head import token_values
from r1jax.objectives.objective import Objective
from r1jax.policy_step import GRPOBatch
from r1jax.programs import Planning, Program, TrainBatch
from r1jax.programs.program import update_program
from r1jax.run.models import LanguageModel
from r1jax.run.resolve import ResolvedRun
from r1jax.run.seeds import seed_of
from r1jax.run.train_loop import CriticStart, TrainLoop
from r1jax.settings.section import SettingError
from r1jax.stages.grpo.log_probs import inputs_without_experts
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.train_step import (
    Metrics,
    TrainState,
    TrainStep,
    abstract_train_state,
    create_train_state,
    jit_update,
    make_optimizer,
    map_micro_batches,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from r1jax.programs.program import AbstractTree

    Inputs = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Critic:
    """What the devices compute of a critic; its train state is `TrainLoop.critic`."""

    model: LanguageModel
    start: CriticStart
    _values: jax.stages.Wrapped
    _advantages: jax.stages.Wrapped
    _update: jax.stages.Wrapped

    def with_advantages(
        self, loop: TrainLoop, batches: Sequence[GRPOBatch]
    ) -> tuple[list[GRPOBatch], list[CriticBatch]]:
        """The mini-batches of a phase as of `critic_advantages`, by the values of now."""
        assert loop.critic is not None
        values = [
            self._values(
                loop.critic.params, inputs_without_experts(batch.inputs), batch.used_micro_batches
            )
            for batch in batches
        ]
        with_advantages: tuple[list[GRPOBatch], list[CriticBatch]]
        with_advantages = self._advantages(list(batches), values)
        return with_advantages

    def update(self, loop: TrainLoop, batch: CriticBatch) -> Metrics:
        """One update of the loop's critic, which the devices may still compute."""
        loop.critic, metrics = self._update(loop.critic, batch)
        return dict(metrics)

    def export(self, loop: TrainLoop, run: ResolvedRun) -> None:
        """Write the critic as a Hugging Face directory, which a later stage may start from."""
        assert loop.critic is not None
        self.model.export(run.files.trained_critic(loop.stage.name), loop.critic.params)


def check_critic(stage: GRPOStage, run: ResolvedRun) -> None:
    """Raises SettingError for a critic that does not read the policy's tokens, or gives labels, and
    for rewards that it could not value."""
    if not stage.rewarded:
        raise SettingError("rewards", "a critic values rewards; name some, or another objective")
    if stage.samples_divergence:
        raise SettingError(
            "distillation.form",
            "advantages of a critic are of rewards alone; use form loss, or another objective",
        )
    source = critic_source(stage, run)
    policy, critic = run.models.of(stage.name), run.models.of(source)
    if critic.decoder.config.head == "token_labels":
        raise SettingError(
            "critic.weights", "a process reward model gives labels; name a decoder's weights"
        )
    if critic.section != policy.section:
        vocabularies = [each.tokenizer.get_vocab() for each in (policy, critic)]
        if vocabularies[0] != vocabularies[1]:
            raise SettingError(
                "critic.weights",
                "its tokenizer is another one than the policy's, whose tokens a critic reads; name "
                "a model with the same vocab",
            )


def critic_source(stage: GRPOStage, run: ResolvedRun) -> str:
    """Where the critic's first weights come from."""
    return stage.critic_settings.weights or run.config.weights_of(stage.name)


def make_critic(
    stage: GRPOStage, objective: Objective, run: ResolvedRun, micro_batches: int
) -> Critic | None:
    """The critic of a stage; None where its objective has none.

    Args:
      micro_batches: that the rows are split into, as of `PackedShape`.
    """
    if objective.critic is None:
        return None
    source = critic_source(stage, run)
    model = run.models.critic_of(source)
    optimizer = _optimizer(stage)
    abstract = abstract_train_state(
        abstract_weights(model.decoder), optimizer, run.layouts.training
    )

    def create() -> TrainState:
        params = run.models.critic_weights(source, seed_of(run.config.seed, "critic", stage.name))
        return create_train_state(params, optimizer, abstract)

    update = make_critic_update(objective, model.decoder, optimizer, micro_batches)
    return Critic(
        model,
        CriticStart(abstract, create),
        jax.jit(partial(packed_values, model=model.decoder, micro_batches=micro_batches)),
        jax.jit(partial(_packed_advantages, objective)),
        jit_update(update, abstract),
    )


def _optimizer(stage: GRPOStage) -> optax.GradientTransformation:
    return make_optimizer(stage.critic_settings.optimizer or stage.optimizer, stage.steps)


def packed_values(
    params: Params,
    inputs: Inputs,
    used_micro_batches: Int[Array, ""],
    *,
    model: Decoder,
    micro_batches: int,
) -> Float[Array, "rows time"]:
    """`token_values` of packed rows, a micro-batch at a time."""

    def part(inputs: Inputs) -> Float[Array, "rows time"]:
        return token_values(params, TokenRows(**inputs), model)

    return map_micro_batches(part, inputs, micro_batches, used_micro_batches)


def _packed_advantages(
    objective: Objective, batches: Sequence[GRPOBatch], values: Sequence[jax.Array]
) -> tuple[list[GRPOBatch], list[CriticBatch]]:
    """`critic_advantages` of packed rows, which an objective may not need the segments of."""
    packed = [replace(each, segment_ids=each.inputs["segment_ids"]) for each in batches]
    results, learnt = critic_advantages(objective, packed, values)
    return (
        [replace(r, segment_ids=b.segment_ids) for r, b in zip(results, batches, strict=True)],
        [
            each._replace(inputs=inputs_without_experts(b.inputs))
            for each, b in zip(learnt, batches, strict=True)
        ],
    )


def make_critic_update(
    objective: Objective,
    model: Decoder,
    optimizer: optax.GradientTransformation,
    micro_batches: int,
) -> TrainStep[CriticBatch]:
    """One update of the critic on packed rows."""
    assert objective.critic is not None

    def value_fn(params: Params, inputs: Inputs) -> Float[Array, "rows time"]:
        return token_values(params, TokenRows(**inputs), model)

    clip = objective.critic.value_clip
    return make_critic_step(value_fn, optimizer, clip=clip, micro_batches=micro_batches)


def after_warmup(update: TrainStep[GRPOBatch], steps: int) -> TrainStep[GRPOBatch]:
    """`update`, but in the first `steps`, in which the critic alone learns, the policy is kept."""
    if not steps:
        return update

    def step(state: TrainState, batch: GRPOBatch) -> tuple[TrainState, Metrics]:
        after, metrics = update(state, batch)
        waits = state.step < steps

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(waits, old, new)

        params = jax.tree.map(keep, after.params, state.params)
        opt_state = jax.tree.map(keep, after.opt_state, state.opt_state)
        return TrainState(after.step, params, opt_state), metrics

    return step


def planned_critic(stage: GRPOStage, planning: Planning) -> Decoder:
    """The critic's decoder, for `Planning`."""
    source = stage.critic_settings.weights or planning.config.weights_of(stage.name)
    decoder = planning.decoder_of(source)
    config = replace(decoder.config, head="scalar", num_nextn_predict_layers=0)
    return replace(decoder, config=config)


def critic_state(stage: GRPOStage, model: Decoder) -> dict[str, AbstractTree]:
    """What a critic keeps in memory, for `Program.resident`."""
    state = abstract_train_state(abstract_weights(model), _optimizer(stage), model.layout)
    return {"critic": state.params, "critic's optimizer": state.opt_state}


def critic_programs(
    stage: GRPOStage,
    objective: Objective,
    model: Decoder,
    batch: TrainBatch,
    micro_batches: int,
    resident: Mapping[str, AbstractTree],
) -> list[Program]:
    """The values of a batch, and the update of the critic.

    Args:
      batch: of the policy's update. resident: what is in memory beside the critic and the batch.
    """
    rows: GRPOBatch = batch.arrays
    inputs, optimizer, state = (
        inputs_without_experts(rows.inputs),
        _optimizer(stage),
        critic_state(stage, model),
    )
    values = jax.jit(partial(packed_values, model=model, micro_batches=micro_batches))
    per_token, used = rows.mask, rows.used_micro_batches
    learnt = CriticBatch(inputs, per_token, per_token, per_token, used)
    update = update_program(
        make_critic_update(objective, model, optimizer, micro_batches),
        optimizer,
        model,
        replace(batch, arrays=learnt),
        resident=resident,
    )
    return [
        Program(
            "values",
            model.layout.mesh.shape,
            partial(values.lower, state["critic"], inputs, used),
            {"critic": state["critic"], "batch": inputs},
            {**resident, "critic's optimizer": state["critic's optimizer"]},
            calls=1,
            useful_flops=update.useful_flops / 3,
        ),
        replace(update, name="critic update", arguments={**state, "batch": learnt}),
    ]
