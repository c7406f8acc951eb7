"""The update of a stage's policy: its model, its objective, and a teacher's part in the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import optax

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
from r1jax.models.parameters import Params
from r1jax.policy_step import GRPOBatch, LogProbFn, PolicyOutputs, make_policy_step
from r1jax.stages.distillation import (
    DIVERGENCE,
    DistillationTerms,
    distillation_terms,
    make_teacher,
)
from r1jax.stages.experts import check_experts
from r1jax.stages.grpo.critic import after_warmup
from r1jax.stages.grpo.objective import stage_objective
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.train_step import Metrics, TrainState, TrainStep


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
