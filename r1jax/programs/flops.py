"""The products that a model's forward pass needs, whatever a program computes beside them."""

from __future__ import annotations

import math

import jax

from r1jax.models import ModelConfig, declare
from r1jax.models.parameters import ParamSpec, is_spec


def forward_flops(
    config: ModelConfig, rows: int, time: int, start: int = 0, *, with_module: bool = False
) -> float:
    """FLOPs of a forward pass, two for each product: weights, and causal attention.

    Args:
      rows, time: tokens read of each row.
      start: tokens of a row that were read before, and are attended to.
      with_module: multi-token prediction is computed, too.
    """
    weights = 0.0
    for path, spec in jax.tree.leaves_with_path(declare(config), is_leaf=is_spec):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        used = math.prod(spec.shape) * _used(spec, config)
        if name.startswith("prediction."):
            weights += used * with_module
        elif name == "unembed" or (name == "embed" and config.head == "language"):
            # Looking tokens up is no product; a tied table is the output matrix, too.
            is_head = name == "unembed" or config.tie_word_embeddings
            weights += used * is_head * (1 + with_module)
        elif name != "embed":
            weights += used
    seen = time * start + time * (time + 1) / 2
    # Queries with keys, and weights with values.
    width = config.num_attention_heads * (config.head_dim + config.v_head_dim)
    layers = config.num_hidden_layers + with_module
    return 2.0 * rows * (time * weights + layers * width * seen)


def _used(spec: ParamSpec, config: ModelConfig) -> float:
    """The part of a weight that a token is multiplied by: of the routed experts, the chosen."""
    if not spec.per_expert or config.experts is None:
        return 1.0
    return config.experts.num_experts_per_tok / config.experts.n_routed_experts
