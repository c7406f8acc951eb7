"""Models as small as can be with a module of multi-token prediction."""

from __future__ import annotations

from r1jax.models import LatentAttention, MixtureOfExperts, ModelConfig

VOCAB = 5
GROUPED = ModelConfig(
    "qwen3",
    VOCAB,
    16,
    32,
    1,
    4,
    2,
    8,
    tie_word_embeddings=True,
    initializer_range=0.5,
    num_nextn_predict_layers=1,
)
LATENT = ModelConfig(
    "deepseek_v3",
    VOCAB,
    16,
    32,
    2,
    2,
    2,
    12,
    initializer_range=0.4,
    latent=LatentAttention(8, 8, 8, 4, 6),
    experts=MixtureOfExperts(4, 1, 2, 8, first_k_dense_replace=1),
    num_nextn_predict_layers=1,
)
