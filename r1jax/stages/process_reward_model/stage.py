"""Training a process reward model on labelled steps (Lightman et al. 2023, arXiv 2305.20050)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax.data.padded_rows import padded_once, round_up
from r1jax.data.step_labels import EncodedSolution, check_both_labels, step_arrays
from r1jax.evaluation.step_metrics import roc_auc, step_accuracy
from r1jax.models import Decoder
from r1jax.models.parameters import Params
from r1jax.models.reward_head import token_label_logits
from r1jax.objectives.normalisation import token_weights
from r1jax.objectives.step_loss import right_logits, step_loss
from r1jax.processes import gather, process_batch_slice
from r1jax.programs import Planning, StagePrograms, TrainBatch, train_programs
from r1jax.programs.program import batch_arrays_like
from r1jax.run.resolve import ResolvedRun, StageRun
from r1jax.run.train_loop import TrainLoop
from r1jax.sharding import to_process_rows
from r1jax.stages.padded_rows import run_on_padded_rows
from r1jax.stages.process_reward_model.settings import NEUTRAL_LABELS, ProcessRewardModelStage
from r1jax.stages.supervised import Measure
from r1jax.train_step import LossOutput, Metrics, TrainState, TrainStep, make_optimizer, train_step

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def check(stage: ProcessRewardModelStage, run: ResolvedRun) -> None:
    """What is trained can be exported, and the rows that no stage of the run writes are labelled
    solutions, of right and wrong steps."""
    try:
        run.models.of(stage.name).decoder.config.to_hugging_face()
    except ValueError as error:
        raise run.config.refusal(("stages", stage.name, "kind"), str(error)) from error
    for _, data in stage.datasets():
        if run.config.data[data].mixture:
            raise run.config.refusal(
                ("data", data, "mixture"),
                f"stages.{stage.name} reads labelled steps, which come from one source; name one "
                "of its parts",
            )
        if not run.config.source_stages(data):
            _labelled(stage, data, run)


def run(stage: ProcessRewardModelStage, run: StageRun) -> None:
    """Train on labelled solutions, resuming where a former process stopped."""
    run_on_padded_rows(
        stage,
        run,
        load=_labelled,
        to_arrays=step_arrays,
        make_update=make_update,
        held_out=_held_out_metrics,
    )


def _labelled(
    stage: ProcessRewardModelStage, data: str, run: ResolvedRun
) -> tuple[list[EncodedSolution], str]:
    rows, report = run.datasets.step_labels(
        data,
        stage.reward_model_format(),
        run.models.of(stage.name).tokenizer,
        neutral=NEUTRAL_LABELS[stage.neutral],
    )
    with run.config.blaming("data", data, reader=stage.name):
        check_both_labels(rows)
    return rows, report


def _held_out_metrics(
    stage: ProcessRewardModelStage, run: StageRun, rows: Sequence[EncodedSolution]
) -> Measure:
    """Loss, accuracy and AUC over all labelled steps of held-out rows."""
    layout = run.layouts.training
    share = process_batch_slice(layout)
    outputs_of = jax.jit(partial(_held_out_outputs, model=run.models.of(stage.name).decoder))
    labelled = sum(int((~np.isnan(row.labels)).sum()) for row in rows)

    def measure(loop: TrainLoop) -> dict[str, float]:
        loss, steps = 0.0, list[tuple[float, float]]()
        for arrays, real in padded_once(
            rows,
            step_arrays,
            rows_per_batch=stage.rows_per_step,
            length_bucket=stage.length_bucket,
            process_index=share.index,
            process_count=share.count,
        ):
            arrays["labelled"] *= real[:, None]
            total, probabilities = outputs_of(loop.state.params, loop.to_devices(arrays))
            loss += float(total)
            at = arrays["labelled"] > 0
            scored = to_process_rows(probabilities, layout)
            pairs = zip(scored[at], arrays["labels"][at], strict=True)
            of_batch = [(float(score), float(label)) for score, label in pairs]
            steps += gather(of_batch, layout)
        scores, labels = ([step[i] for step in steps] for i in (0, 1))
        return {
            "held_out/loss": loss / labelled,
            "held_out/accuracy": step_accuracy(scores, labels),
            "held_out/auc": roc_auc(scores, labels),
        }

    return measure


def programs(stage: ProcessRewardModelStage, planning: Planning) -> StagePrograms:
    """The update, and the loss on held-out rows."""
    model = planning.decoder_of(stage.name)
    text, end = np.zeros(stage.max_tokens, np.int32), np.zeros(1, np.int32)
    row = EncodedSolution(0, text, end, np.ones(1, np.float32))
    time = round_up(stage.max_tokens, stage.length_bucket)
    arrays = batch_arrays_like(step_arrays([row] * stage.rows_per_step, time), model)
    batch = TrainBatch(arrays, stage.rows_per_step, stage.max_tokens, stage.micro_batches)
    # The number of steps only shapes the learning rate.
    optimizer = make_optimizer(stage.optimizer, stage.steps or 1)
    held_out = None
    if stage.held_out is not None:
        held_out = jax.jit(partial(_held_out_outputs, model=model)), (arrays,)
    update = make_update(stage, model, optimizer)
    return train_programs(update, optimizer, model, batch, held_out=held_out)


def make_update(
    stage: ProcessRewardModelStage, model: Decoder, optimizer: optax.GradientTransformation
) -> TrainStep[Mapping[str, jax.Array]]:
    """One update on a batch of `step_arrays`: the mean loss over its labelled steps."""

    def loss_fn(
        params: Params, rows: tuple[Mapping[str, jax.Array], Float[Array, "rows time"]]
    ) -> LossOutput:
        batch, weights = rows
        return LossOutput(*step_loss(_logits(params, batch, model), batch["labels"], weights))

    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        rows = batch, token_weights(batch["labelled"], "token_mean")
        return train_step(state, rows, loss_fn, optimizer, micro_batches=stage.micro_batches)

    return step


def _logits(
    params: Params, batch: Mapping[str, jax.Array], model: Decoder
) -> Float[Array, "rows time 2"]:
    inputs = {name: batch[name] for name in ("tokens", "positions", "segment_ids")}
    return token_label_logits(params, **inputs, model=model)


def _held_out_outputs(
    params: Params, batch: Mapping[str, jax.Array], *, model: Decoder
) -> tuple[Float[Array, ""], Float[Array, "rows time"]]:
    """The sum of the labelled steps' losses, and the probability of "right" at each token."""
    logits = _logits(params, batch, model)
    loss, _ = step_loss(logits, batch["labels"], batch["labelled"].astype(jnp.float32))
    probabilities = jax.nn.sigmoid(right_logits(logits))
    sharding = model.layout.sharding(("batch", None))
    return loss, jax.lax.with_sharding_constraint(probabilities, sharding)
