"""What the updates of a phase read beside its samples: log-probs of three policies, and the
advantages of tokens that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from r1jax.critic_step import CriticBatch
from r1jax.models import Decoder
from r1jax.models.parameters import Params
from r1jax.objectives.distillation import sampled_advantages
from r1jax.objectives.objective import Objective
from r1jax.policy_step import GRPOBatch, batch_advantages
from r1jax.run.train_loop import TrainLoop
from r1jax.stages.grpo.critic import Critic
from r1jax.stages.grpo.log_probs import (
    log_prob_rows,
    make_log_probs,
    with_old_log_probs,
    without_experts,
)
from r1jax.stages.grpo.settings import GRPOStage

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclass(frozen=True)
class UpdateBatches:
    """Completes the mini-batches of a phase, which are on the devices.

    critic: None where the objective has none.
    _log_probs, _teacher_log_probs: of the policy's model, as it is or with the reference's weights,
    and of the teacher; the latter only where a stage adds to the advantages of sampled tokens.
    """

    stage: GRPOStage
    objective: Objective
    critic: Critic | None
    _log_probs: jax.stages.Wrapped
    _teacher_log_probs: jax.stages.Wrapped | None
    _towards_teacher: jax.stages.Wrapped
    _token_advantages: jax.stages.Wrapped

    def complete(
        self, loop: TrainLoop, batches: Sequence[GRPOBatch]
    ) -> tuple[list[GRPOBatch], Sequence[CriticBatch]]:
        """With what has to be computed before the first update; and what a critic learns from.

        Old log-probs are those of the weights that sampled, from which the updates move away.
        """
        batches = list(batches)
        if "segment_ids" in self.objective.needs and self.stage.turns is None:
            batches = [replace(b, segment_ids=b.inputs["segment_ids"]) for b in batches]
        if with_old_log_probs(self.stage, self.objective):
            batches = [
                replace(b, old_log_probs=self._log_probs(loop.state.params, log_prob_rows(b)))
                for b in batches
            ]
        if self._teacher_log_probs is not None:
            assert loop.teacher is not None
            log_probs = [
                self._teacher_log_probs(loop.teacher, without_experts(log_prob_rows(b)))
                for b in batches
            ]
            batches = list(map(self._towards_teacher, batches, log_probs))
        if not (self.objective.changes_token_advantages or self.critic is not None):
            return batches, ()
        # KL in the reward: before the first update, then, and not beside each.
        batches = [self.with_reference(loop, batch) for batch in batches]
        if self.critic is not None:
            return self.critic.with_advantages(loop, batches)
        changed: list[GRPOBatch] = self._token_advantages(batches)
        return changed, ()

    def with_reference(self, loop: TrainLoop, batch: GRPOBatch) -> GRPOBatch:
        """With log-probs of the reference policy, where the stage has one."""
        if loop.reference is None or batch.reference_log_probs is not None:
            return batch
        rows = without_experts(log_prob_rows(batch))
        return replace(batch, reference_log_probs=self._log_probs(loop.reference, rows))

    def gap_without_replay(self, params: Params, batch: GRPOBatch) -> float:
        """The mean of |sampler's log-prob - trainer's| over trained tokens, whose experts the
        trainer chooses itself."""
        assert batch.sampler_log_probs is not None
        rows = without_experts(log_prob_rows(batch))
        gap = jnp.abs(self._log_probs(params, rows) - batch.sampler_log_probs)
        trained = batch.mask > 0
        return float(jnp.sum(jnp.where(trained, gap, 0.0)) / jnp.maximum(trained.sum(), 1))


def make_update_batches(
    stage: GRPOStage,
    objective: Objective,
    model: Decoder,
    teacher: Decoder | None,
    critic: Critic | None,
    micro_batches: int,
) -> UpdateBatches:
    """Compiles nothing before it is used.

    Args:
      micro_batches: that the rows are split into, as of `PackedShape`.
    """
    teacher_log_probs = None
    if stage.samples_divergence:
        assert teacher is not None
        teacher_log_probs = jax.jit(make_log_probs(stage, teacher, micro_batches))
    return UpdateBatches(
        stage,
        objective,
        critic,
        jax.jit(make_log_probs(stage, model, micro_batches)),
        teacher_log_probs,
        jax.jit(partial(_towards_teacher, stage)),
        jax.jit(partial(batch_advantages, objective)),
    )


def _towards_teacher(
    stage: GRPOStage, batch: GRPOBatch, log_probs: Float[Array, "rows time"]
) -> GRPOBatch:
    """With the teacher's log-probs, and what they add to the advantages of trained tokens."""
    assert stage.distillation is not None and batch.old_log_probs is not None
    added = sampled_advantages(batch.old_log_probs, log_probs, stage.distillation.coefficient)
    advantages = batch.advantages + jnp.where(batch.mask > 0, added, 0.0)
    return replace(batch, advantages=advantages, teacher_log_probs=log_probs)
