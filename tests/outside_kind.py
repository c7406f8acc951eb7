"""A kind of stage from outside, in one file: a student learns texts as far as a teacher knows them.

The loss of each token is weighted by the probability that the teacher gives it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from r1jax.models import Decoder, TokenRows, token_log_probs
from r1jax.models.parameters import abstract_weights
from r1jax.objectives.normalisation import mean_weights
from r1jax.programs import Planning, Program, StagePrograms, TrainBatch, train_programs
from r1jax.programs.program import batch_array
from r1jax.run.resolve import ResolvedRun, StageRun
from r1jax.run.train_loop import train_loop
from r1jax.settings.stage import Divided, EpochStage, StageDescription, WeightsUse
from r1jax.stages.supervised import packed_arrays, packed_rows
from r1jax.train_step import LossOutput, TrainState, make_optimizer, train_step


class Distil(EpochStage):
    DESCRIPTION: ClassVar = StageDescription(title="distillation by weight", leaves="weights")
    row_tokens: int
    teacher: str

    def other_weights(self) -> list[WeightsUse]:
        return [WeightsUse("teacher", self.teacher, "teacher")]

    def divided(self) -> list[Divided]:
        return [*super().divided(), Divided(".row_tokens", self.row_tokens, "time")]


def check(stage: Distil, run: ResolvedRun) -> None:
    sizes = [run.models.of(name).decoder.config.vocab_size for name in (stage.name, stage.teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"stages.{stage.name}.teacher = {stage.teacher!r}: vocabularies {sizes}")


def log_probs(params: Any, batch: Any, model: Decoder) -> jax.Array:
    rows = TokenRows(batch["tokens"], batch["positions"], batch["segment_ids"])
    return token_log_probs(params, rows, model).log_probs


def confidence(params: Any, batch: Any, model: Decoder) -> jax.Array:
    return jnp.exp(log_probs(params, batch, model)) * batch["trained"]


def make_update(stage: Distil, model: Decoder, optimizer: optax.GradientTransformation) -> Any:
    def loss_fn(params: Any, rows: Any) -> LossOutput:
        batch, weights = rows
        total = -jnp.sum(log_probs(params, batch, model) * batch["confidence"])
        return LossOutput(total * weights[0])

    def step(state: TrainState, batch: Any) -> Any:
        rows = batch, mean_weights(stage.rows_per_step, batch["confidence"].sum())
        return train_step(state, rows, loss_fn, optimizer, micro_batches=stage.micro_batches)

    return step


def programs(stage: Distil, planning: Planning) -> StagePrograms:
    model, teacher = planning.decoder_of(stage.name), planning.decoder_of(stage.teacher)
    shape, optimizer = (stage.rows_per_step, stage.row_tokens), make_optimizer(stage.optimizer, 1)
    rows: Any = packed_arrays(stage, model)
    batch = TrainBatch({**rows, "confidence": batch_array(model, shape, jnp.float32)}, *shape)
    training = train_programs(make_update(stage, model, optimizer), optimizer, model, batch)
    weights, (update,) = abstract_weights(teacher), training.programs
    lower = partial(jax.jit(partial(confidence, model=teacher)).lower, weights, rows)
    resident = {"optimizer": update.arguments["optimizer"], "weights": abstract_weights(model)}
    mesh = teacher.layout.mesh.shape
    first = Program("confidence", mesh, lower, {"teacher": weights}, resident, calls=1)
    return StagePrograms((first, update), training.tokens)


def run(stage: Distil, run: StageRun) -> None:
    model, teacher = run.models.of(stage.name), run.models.of(stage.teacher)
    rows: Any = packed_rows(stage, run, run.datasets.texts(stage.data, model))
    steps = stage.steps_for(rows.rows_per_epoch())
    optimizer = make_optimizer(stage.optimizer, steps)
    confidence_of = jax.jit(partial(confidence, model=teacher.decoder))
    teacher_params = run.models.weights(stage.teacher, teacher)
    update = make_update(stage, model.decoder, optimizer)
    with train_loop(stage, run, optimizer, update, rows, steps=steps) as loop:
        while loop.step < steps:
            loop.begin_round()
            batch = loop.to_devices(rows.take(stage.rows_per_step))
            metrics = loop.update({**batch, "confidence": confidence_of(teacher_params, batch)})
            loop.recorder.log(loop.step, metrics)
            loop.save_if_due(rows)
        loop.finish()
