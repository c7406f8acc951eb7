"""Decoders as pure functions over pytrees of weights."""

from r1jax.models.attention import choose_attention
from r1jax.models.config import (
    Decoder,
    Execution,
    LatentAttention,
    Llama3RopeScaling,
    MixtureOfExperts,
    ModelConfig,
    YarnRopeScaling,
)
from r1jax.models.decoder import (
    TokenRows,
    decode,
    forward,
    logits,
    prefill,
    right_padded,
)
from r1jax.models.distilled_log_probs import DistilledLogProbs, Teacher, distilled_log_probs
from r1jax.models.log_probs import TokenLogProbs, token_log_probs
from r1jax.models.multi_token_prediction import AheadLogProbs, ahead_log_probs
from r1jax.models.parameters import Params, ParamSpec, abstract_params, declare, init_params

__all__ = [
    "AheadLogProbs",
    "Decoder",
    "DistilledLogProbs",
    "Execution",
    "LatentAttention",
    "Llama3RopeScaling",
    "MixtureOfExperts",
    "ModelConfig",
    "ParamSpec",
    "Params",
    "Teacher",
    "TokenLogProbs",
    "TokenRows",
    "YarnRopeScaling",
    "abstract_params",
    "ahead_log_probs",
    "choose_attention",
    "declare",
    "decode",
    "distilled_log_probs",
    "forward",
    "init_params",
    "logits",
    "prefill",
    "right_padded",
    "token_log_probs",
]
