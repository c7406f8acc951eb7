"""Reward models as pure functions: a decoder with a scalar head, and the losses it learns from."""

from r1jax.reward_models.losses import pairwise_loss, pointwise_loss, row_weights
from r1jax.reward_models.scores import reward_scores

__all__ = ["pairwise_loss", "pointwise_loss", "reward_scores", "row_weights"]
