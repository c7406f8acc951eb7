"""Every weight, declared once.

`declare(config)` is the only place where shapes, logical axes, initial values and checkpoint
names are written down; initial values, shardings and Hugging Face loading and export derive from
it. The tree it returns is the tree of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from r1jax.models.config import ModelConfig
from r1jax.sharding import Axes, Layout

Params = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """How a weight lies in a Hugging Face checkpoint.

    name: with `{layer}` where the weight has one tensor per layer.
    shape: of one such tensor once its merged dimensions are split (a `[heads * head_dim, hidden]`
        matrix has shape `(heads, head_dim, hidden)`).
    order: `value = tensor.reshape(shape).transpose(order)`.
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    file_shape: tuple[int, ...]


@dataclass(frozen=True)
class ParamSpec:
    """One weight: shape, logical axes, initial distribution and place in a checkpoint."""

    shape: tuple[int, ...]
    axes: Axes
    init: Literal["normal", "ones", "zeros"]
    stored: Stored

    @property
    def per_layer(self) -> bool:
        """Whether the first dimension runs over layers."""
        return bool(self.axes) and self.axes[0] == "layers"


def is_spec(node: object) -> bool:
    return isinstance(node, ParamSpec)


def declare(config: ModelConfig) -> dict[str, Any]:
    """The tree of `ParamSpec`s of a dense decoder (Qwen2, Qwen3, Llama 3) and its head."""
    layers, hidden, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    heads, kv_heads, head_dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )

    def layer_matrix(
        name: str, shape: tuple[int, ...], axes: Axes, order: tuple[int, ...], inputs: int
    ) -> ParamSpec:
        # `inputs`: how many leading dimensions of `shape` are the matrix's input; a torch Linear
        # stores [out, in], so the stored tensor has the output dimensions first.
        inverse = tuple(sorted(range(len(order)), key=order.__getitem__))
        split = tuple(shape[i] for i in inverse)
        outputs = len(shape) - inputs
        file_shape = (_product(split[:outputs]), _product(split[outputs:]))
        return ParamSpec(
            (layers, *shape),
            ("layers", *axes),
            "normal",
            Stored(f"model.layers.{{layer}}.{name}.weight", split, order, file_shape),
        )

    def layer_vector(
        name: str, shape: tuple[int, ...], axes: Axes, init: Literal["ones", "zeros"]
    ) -> ParamSpec:
        stored = Stored(
            f"model.layers.{{layer}}.{name}", shape, tuple(range(len(shape))), (_product(shape),)
        )
        return ParamSpec((layers, *shape), ("layers", *axes), init, stored)

    layer: dict[str, ParamSpec] = {
        "attention_norm": layer_vector("input_layernorm.weight", (hidden,), (None,), "ones"),
        "q": layer_matrix(
            "self_attn.q_proj",
            (hidden, heads, head_dim),
            ("embed", "heads", "head_dim"),
            (2, 0, 1),
            1,
        ),
        "k": layer_matrix(
            "self_attn.k_proj",
            (hidden, kv_heads, head_dim),
            ("embed", "kv_heads", "head_dim"),
            (2, 0, 1),
            1,
        ),
        "v": layer_matrix(
            "self_attn.v_proj",
            (hidden, kv_heads, head_dim),
            ("embed", "kv_heads", "head_dim"),
            (2, 0, 1),
            1,
        ),
        "o": layer_matrix(
            "self_attn.o_proj",
            (heads, head_dim, hidden),
            ("heads", "head_dim", "embed"),
            (1, 2, 0),
            2,
        ),
        "mlp_norm": layer_vector("post_attention_layernorm.weight", (hidden,), (None,), "ones"),
        "gate": layer_matrix("mlp.gate_proj", (hidden, inner), ("embed", "mlp"), (1, 0), 1),
        "up": layer_matrix("mlp.up_proj", (hidden, inner), ("embed", "mlp"), (1, 0), 1),
        "down": layer_matrix("mlp.down_proj", (inner, hidden), ("mlp", "embed"), (1, 0), 1),
    }
    if config.qkv_bias:
        for name, count, axis in (
            ("q", heads, "heads"),
            ("k", kv_heads, "kv_heads"),
            ("v", kv_heads, "kv_heads"),
        ):
            layer[f"{name}_bias"] = layer_vector(
                f"self_attn.{name}_proj.bias", (count, head_dim), (axis, "head_dim"), "zeros"
            )
    if config.qk_norm:
        for name in ("q", "k"):
            layer[f"{name}_norm"] = layer_vector(
                f"self_attn.{name}_norm.weight", (head_dim,), (None,), "ones"
            )

    vocab = (config.vocab_size, hidden)
    tree: dict[str, Any] = {
        "embed": ParamSpec(
            vocab,
            ("vocab", "embed"),
            "normal",
            Stored("model.embed_tokens.weight", vocab, (0, 1), vocab),
        ),
        "layers": layer,
        "final_norm": ParamSpec(
            (hidden,), (None,), "ones", Stored("model.norm.weight", (hidden,), (0,), (hidden,))
        ),
    }
    return tree | declare_head(config)


def declare_head(config: ModelConfig) -> dict[str, ParamSpec]:
    """The weights that only `config.head` has; a tied output matrix is none."""
    hidden = config.hidden_size
    if config.head == "scalar":
        stored = Stored("score.weight", (1, hidden), (1, 0), (1, hidden))
        return {"score": ParamSpec((hidden, 1), ("embed", None), "normal", stored)}
    if config.tie_word_embeddings:
        return {}
    vocab = (config.vocab_size, hidden)
    stored = Stored("lm_head.weight", vocab, (1, 0), vocab)
    return {"unembed": ParamSpec(vocab[::-1], ("embed", "vocab"), "normal", stored)}


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def abstract_params(config: ModelConfig, layout: Layout, dtype: DTypeLike) -> Params:
    """The weights as `jax.ShapeDtypeStruct`s with shardings; refuses what does not divide."""
    return _abstract(declare(config), layout, dtype)


def _abstract(declared: dict[str, Any], layout: Layout, dtype: DTypeLike) -> Params:
    named = jax.tree.leaves_with_path(declared, is_leaf=is_spec)
    leaves = [
        jax.ShapeDtypeStruct(
            spec.shape,
            dtype,
            sharding=layout.sharding(
                spec.axes,
                shape=spec.shape,
                name=jax.tree_util.keystr(path, simple=True, separator="."),
            ),
        )
        for path, spec in named
    ]
    return jax.tree.unflatten(jax.tree.structure(declared, is_leaf=is_spec), leaves)


def init_params(
    key: jax.Array, config: ModelConfig, layout: Layout, dtype: DTypeLike = jnp.float32
) -> Params:
    """Random weights, created sharded (no host or single device ever holds the whole tree)."""
    return _create(key, declare(config), config, layout, dtype)


def init_head(
    key: jax.Array, config: ModelConfig, layout: Layout, dtype: DTypeLike = jnp.float32
) -> Params:
    """Random weights of the head alone, for a decoder that was trained under another one."""
    return _create(key, declare_head(config), config, layout, dtype)


def _create(
    key: jax.Array,
    declared: dict[str, Any],
    config: ModelConfig,
    layout: Layout,
    dtype: DTypeLike,
) -> Params:
    specs, structure = jax.tree.flatten(declared, is_leaf=is_spec)
    shardings = jax.tree.map(lambda a: a.sharding, _abstract(declared, layout, dtype))

    def create(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(specs))
        return jax.tree.unflatten(
            structure,
            [_initial(k, spec, config, dtype) for k, spec in zip(keys, specs, strict=True)],
        )

    return jax.jit(create, out_shardings=shardings)(key)


def _initial(key: jax.Array, spec: ParamSpec, config: ModelConfig, dtype: DTypeLike) -> jax.Array:
    if spec.init == "normal":
        scale = config.initializer_range
        return (scale * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)
    return jnp.full(spec.shape, 1 if spec.init == "ones" else 0, dtype)
