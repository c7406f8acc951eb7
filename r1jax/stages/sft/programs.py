"""What fine-tuning compiles: pretraining's update, and the loss on held-out rows."""

from __future__ import annotations

from functools import partial

import jax

from r1jax.programs import Planning, StagePrograms
from r1jax.programs.flops import forward_flops
from r1jax.programs.update import with_held_out_loss
from r1jax.stages import supervised_programs
from r1jax.stages.sft.settings import SFTStage


def programs(stage: SFTStage, planning: Planning) -> StagePrograms:
    training = supervised_programs.programs(stage, planning)
    if stage.held_out is None:
        return training
    model = planning.decoder_of(stage.name)
    loss = jax.jit(partial(supervised_programs.loss_sums, model=model))
    rows = supervised_programs.packed_arrays(stage, model)
    forward = forward_flops(model.config, stage.rows_per_step, stage.row_tokens)
    return with_held_out_loss(training, loss, (rows,), forward)
