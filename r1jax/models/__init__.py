"""Decoders as pure functions over pytrees of weights."""

from r1jax.models.attention import choose_attention
from r1jax.models.config import (
    Execution,
    LatentAttention,
    Llama3RopeScaling,
    MixtureOfExperts,
    ModelConfig,
    YarnRopeScaling,
)
from r1jax.models.decoder import Decoder, decode, forward, logits, prefill
from r1jax.models.log_probs import TokenScores, token_scores
from r1jax.models.multi_token_prediction import AheadScores, ahead_scores
from r1jax.models.parameters import ParamSpec, abstract_params, declare, init_params

__all__ = [
    "AheadScores",
    "Decoder",
    "Execution",
    "LatentAttention",
    "Llama3RopeScaling",
    "MixtureOfExperts",
    "ModelConfig",
    "ParamSpec",
    "TokenScores",
    "YarnRopeScaling",
    "abstract_params",
    "ahead_scores",
    "choose_attention",
    "declare",
    "decode",
    "forward",
    "init_params",
    "logits",
    "prefill",
    "token_scores",
]
