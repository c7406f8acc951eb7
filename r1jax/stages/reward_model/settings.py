"""Settings of reward model training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from r1jax.settings.stage import EpochStage


class RewardModelStage(EpochStage):
    """Train a reward model: the policy's architecture with a scalar head, on preferences.

    `data` has rows of prompt, chosen, rejected, or of prompt, response, safe; `rows_per_step`
    counts pairs, or labelled responses.
    """

    kind: Literal["reward_model"] = "reward_model"
    loss: Literal["pairwise", "pointwise"] = Field(
        description="pairwise (helpful) or pointwise (safety)."
    )
    reads: Literal["summary", "response"] = Field(
        description="summary: what follows the thought (helpful); response: all (safety)."
    )
    rows_per_step: int = Field(256, ge=1)
    max_tokens: int = Field(8192, ge=2, description="Longer rows are left out and counted.")
    length_bucket: int = Field(128, ge=1, description="Rows are padded to a multiple of this.")
