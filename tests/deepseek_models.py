"""DeepSeek-V2 and V3 as transformers has them, small and random, and V3's published config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

SIZES: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=8,
    num_experts_per_tok=3,
    max_position_embeddings=128,
    initializer_range=0.3,
    rms_norm_eps=1e-3,  # not that of the latents' norms
    num_nextn_predict_layers=0,  # transformers writes 1, and no such layer
)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
KINDS: dict[str, dict[str, Any]] = {
    "like V3": dict(
        q_lora_rank=10,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        rope_parameters=YARN,
    ),
    "like Moonlight": dict(
        q_lora_rank=None,
        n_shared_experts=2,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.5,
        norm_topk_prob=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "like V2": dict(
        q_lora_rank=10,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=4.0,
        rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "like V2-Lite": dict(
        q_lora_rank=None,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=None,
        topk_group=None,
        topk_method="greedy",
        rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
}
# Of DeepSeek-V3 and R1, as published.
PUBLISHED: dict[str, Any] = dict(
    model_type="deepseek_v3",
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    first_k_dense_replace=3,
    n_group=8,
    topk_group=4,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    rope_theta=10000,
    rope_scaling={
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 24), np.int32)


def make(kind: str, directory: Path) -> torch.nn.Module:
    """A random model on disk, norms and the router's biases moved away from their defaults."""
    torch.manual_seed(0)
    config, of_config = (
        (DeepseekV2Config, DeepseekV2ForCausalLM)
        if kind.startswith("like V2")
        else (DeepseekV3Config, DeepseekV3ForCausalLM)
    )
    model = of_config(config(**SIZES, **KINDS[kind])).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("mlp.gate.weight"):
                weight.add_(0.3 * torch.randn_like(weight))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                # Far enough from zero that some experts rank below it.
                buffer.copy_(torch.randn_like(buffer) - 0.5)
    model.save_pretrained(directory)
    return model
