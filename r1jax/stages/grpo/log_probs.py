"""Log-probs of packed rows: old ones, those of the reference policy and of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax

from r1jax.models import Decoder, TokenRows, token_log_probs
from r1jax.models.parameters import Params
from r1jax.objectives.objective import Objective
from r1jax.policy_step import GRPOBatch
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.train_step import map_micro_batches

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Num


def with_old_log_probs(stage: GRPOStage, objective: Objective) -> bool:
    """Whether they are computed before the update, which else computes them anyway."""
    needed = stage.samples_divergence or "old_log_probs" in objective.needs
    return stage.mini_batches_per_rollout > 1 or needed


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


def without_experts(rows: LogProbRows) -> LogProbRows:
    return rows._replace(inputs=inputs_without_experts(rows.inputs))


def inputs_without_experts(inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The same tokens, for a model that chooses their experts itself."""
    return {name: leaf for name, leaf in inputs.items() if name != "experts"}


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
