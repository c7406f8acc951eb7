"""The update of a train stage, and the loss on held-out rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import jax.numpy as jnp
import optax
from jax.stages import Wrapped

from r1jax.models import Decoder
from r1jax.programs.arrays import abstract_weights, bytes_on_device
from r1jax.programs.flops import forward_flops
from r1jax.programs.program import Program, StagePrograms
from r1jax.train_step import TrainStep, abstract_train_state, jit_update

if TYPE_CHECKING:
    from jaxtyping import PyTree

    from r1jax.programs.arrays import AbstractTree


@dataclass(frozen=True)
class TrainBatch:
    """The batch of an update.

    arrays: the update's argument beside its state.
    rows, time: texts that the model reads, and tokens of each at most, by which FLOPs and memory
        are counted; the arrays may be padded further.
    micro_batches: equal parts, which pass through the model one after the other.
    """

    arrays: AbstractTree
    rows: int
    time: int
    micro_batches: int = 1


def train_programs(
    update: TrainStep[PyTree],
    optimizer: optax.GradientTransformation,
    model: Decoder,
    batch: TrainBatch,
    *,
    with_module: bool = False,
) -> StagePrograms:
    """The programs of a stage whose step is one update, and nothing else."""
    program = update_program(update, optimizer, model, batch, with_module=with_module)
    return StagePrograms((program,), batch.rows * batch.time)


def update_program(
    update: TrainStep[PyTree],
    optimizer: optax.GradientTransformation,
    model: Decoder,
    batch: TrainBatch,
    *,
    resident: Mapping[str, AbstractTree] | None = None,
    with_module: bool = False,
) -> Program:
    """One update.

    Args:
      update: (state, batch) -> (state, metrics), as the loop compiles it.
      resident: what is in memory beside the train state and the batch.
      with_module: the module for multi-token prediction is trained, too.
    """
    state = abstract_train_state(abstract_weights(model), optimizer, model.layout)
    forward = forward_flops(model.config, batch.rows, batch.time, with_module=with_module)
    return Program(
        "update",
        model.layout.mesh.shape,
        partial(jit_update(update, state).lower, state, batch.arrays),
        {"weights": state.params, "optimizer": state.opt_state, "batch": batch.arrays},
        {} if resident is None else resident,
        calls=1,
        useful_flops=3 * forward,
        temporaries=_temporaries(model, batch),
    )


def with_held_out_loss(
    training: StagePrograms, loss: Wrapped, arrays: tuple[AbstractTree, ...], forward: float
) -> StagePrograms:
    """Adds the loss on held-out rows, whose number of batches depends on the data.

    Args:
      training: of `train_programs`.
      loss: the compiled function of the weights and the arrays.
      forward: FLOPs of its forward pass.
    """
    (update,) = training.programs
    weights = update.arguments["weights"]
    program = Program(
        "held-out loss",
        update.mesh,
        partial(loss.lower, weights, *arrays),
        {"weights": weights, "batch": arrays},
        {"optimizer": update.arguments["optimizer"]},
        calls=0,
        useful_flops=forward,
    )
    return replace(training, programs=(update, program))


def _temporaries(model: Decoder, batch: TrainBatch) -> dict[str, int]:
    """Gradients, the activations that remat keeps, and a chunk of logits with its gradients."""
    config, execution = model.config, model.execution
    shards, rows = model.layout.shards("batch"), batch.rows // batch.micro_batches
    kept = {"full": 1, "dots": 8, "none": 20}[execution.remat] * config.hidden_size
    values = rows * batch.time * config.num_hidden_layers * kept
    sizes = {
        "gradients": bytes_on_device(abstract_weights(model)),
        "activations": values * jnp.dtype(execution.compute_dtype).itemsize // shards,
    }
    if config.head == "language":
        chunk = rows * min(execution.log_prob_chunk, batch.time) * config.vocab_size
        sizes["a chunk of logits"] = chunk * 4 * 2 // shards
    return sizes
