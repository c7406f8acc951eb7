"""Every weight, declared once.

Only `declare(config)` says shapes, logical axes, initial values and checkpoint names; initial
values, shardings and Hugging Face loading and export derive from it. The tree that it returns is
the tree of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from r1jax.models.config import Decoder, ModelConfig
from r1jax.sharding import Axes, Layout

if TYPE_CHECKING:
    from jaxtyping import Array, Key, PyTree

# The tree of weights: arrays by name, those of a stack of layers in a subtree.
Params = dict[str, "PyTree"]
# The same tree with a `ParamSpec` for each array.
ParamSpecs = dict[str, "PyTree"]


@dataclass(frozen=True)
class Stored:
    """A weight in a Hugging Face checkpoint.

    name: with `{layer}` where the weight has one tensor per layer, and `{expert}` where it has one
        per expert.
    shape: of one such tensor once its merged dimensions are split (a `[heads * head_dim, hidden]`
        matrix has shape `(heads, head_dim, hidden)`).
    order: `value = tensor.reshape(shape).transpose(order)`.
    first_layer: the layer that the first entry belongs to.
    copies: names under which the same tensor is stored again. They are written, and optional when
        read.
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    file_shape: tuple[int, ...]
    first_layer: int = 0
    copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParamSpec:
    """One weight: shape, logical axes, initial distribution and checkpoint tensors.

    exact: kept in float32 whatever the dtype of the others.
    """

    shape: tuple[int, ...]
    axes: Axes
    init: Literal["normal", "ones", "zeros"]
    stored: Stored
    exact: bool = False

    def dtype(self, dtype: DTypeLike) -> DTypeLike:
        """The dtype of this weight, where the others have `dtype`."""
        return jnp.float32 if self.exact else dtype

    @property
    def per_expert(self) -> bool:
        """Whether the second dimension runs over experts."""
        return self.axes[1:2] == ("expert",)

    @property
    def per_layer(self) -> bool:
        """Whether the first dimension runs over layers."""
        return bool(self.axes) and self.axes[0] == "layers"


def is_spec(node: object) -> bool:
    return isinstance(node, ParamSpec)


@dataclass(frozen=True)
class _Stack:
    """Declares the weights of equal layers, stacked along a first dimension."""

    layers: range

    def matrix(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: Axes,
        *,
        inputs: int = 1,
        experts: int | None = None,
    ) -> ParamSpec:
        """A torch Linear, which stores [*out, *in]; ours is [*in, *out].

        inputs: how many leading dimensions of `shape` are the matrix's input.
        experts: their number, in a dimension after the layers', with a tensor each.
        """
        outputs = len(shape) - inputs
        split = shape[inputs:] + shape[:inputs]
        order = (*range(outputs, len(shape)), *range(outputs))
        file_shape = (_product(split[:outputs]), _product(split[outputs:]))
        if experts is not None:
            shape, axes = (experts, *shape), ("expert", *axes)
        stored = self._stored(f"{name}.weight", split, order, file_shape)
        return ParamSpec((len(self.layers), *shape), ("layers", *axes), "normal", stored)

    def vector(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: Axes,
        init: Literal["ones", "zeros"],
        *,
        exact: bool = False,
    ) -> ParamSpec:
        order = tuple(range(len(shape)))
        stored = self._stored(name, shape, order, (_product(shape),))
        return ParamSpec((len(self.layers), *shape), ("layers", *axes), init, stored, exact=exact)

    def _stored(
        self, name: str, shape: tuple[int, ...], order: tuple[int, ...], file: tuple[int, ...]
    ) -> Stored:
        return Stored(f"model.layers.{{layer}}.{name}", shape, order, file, self.layers.start)


def declare(config: ModelConfig) -> ParamSpecs:
    """The tree of `ParamSpec`s of a decoder and its head.

    Equal layers are stacked: `layers`, and where experts begin after some dense layers, those as
    `dense_layers`. The module of multi-token prediction is `prediction`: one more layer
    and what joins it to the decoder, whose embedding and head it shares.
    """
    hidden = config.hidden_size
    vocab = (config.vocab_size, hidden)
    copies = _copies(config, "embed_tokens")
    if config.tie_word_embeddings:
        copies += _copies(config, "shared_head.head")
    tree: ParamSpecs = {
        "embed": ParamSpec(
            vocab,
            ("vocab", "embed"),
            "normal",
            Stored("model.embed_tokens.weight", vocab, (0, 1), vocab, copies=copies),
        ),
        "final_norm": ParamSpec(
            (hidden,), (None,), "ones", Stored("model.norm.weight", (hidden,), (0,), (hidden,))
        ),
    }
    for name, layers in config.stacks.items():
        tree[name] = _decoder_layers(_Stack(layers), config, dense=name == "dense_layers")
    if config.prediction_layers:
        stack = _Stack(config.prediction_layers)
        tree["prediction"] = {
            "token_norm": stack.vector("enorm.weight", (hidden,), (None,), "ones"),
            "activation_norm": stack.vector("hnorm.weight", (hidden,), (None,), "ones"),
            "join": stack.matrix("eh_proj", (2 * hidden, hidden), ("embed", None)),
            **_decoder_layers(stack, config, dense=False),
            "output_norm": stack.vector("shared_head.norm.weight", (hidden,), (None,), "ones"),
        }
    return tree | declare_head(config)


def _copies(config: ModelConfig, name: str) -> tuple[str, ...]:
    """Where released checkpoints store a matrix again that the prediction module shares."""
    return tuple(f"model.layers.{layer}.{name}.weight" for layer in config.prediction_layers)


def _decoder_layers(stack: _Stack, config: ModelConfig, *, dense: bool) -> dict[str, ParamSpec]:
    hidden = config.hidden_size
    attention = _grouped_attention if config.latent is None else _latent_attention
    mlp = _dense_mlp if config.experts is None or dense else _mixture
    return {
        "attention_norm": stack.vector("input_layernorm.weight", (hidden,), (None,), "ones"),
        **attention(stack, config),
        "mlp_norm": stack.vector("post_attention_layernorm.weight", (hidden,), (None,), "ones"),
        **mlp(stack, config),
    }


def _grouped_attention(stack: _Stack, config: ModelConfig) -> dict[str, ParamSpec]:
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    weights = {
        "o": stack.matrix(
            "self_attn.o_proj", (heads, head_dim, hidden), ("heads", "head_dim", "embed"), inputs=2
        )
    }
    for name, count, axis in (
        ("q", heads, "heads"),
        ("k", kv_heads, "kv_heads"),
        ("v", kv_heads, "kv_heads"),
    ):
        weights[name] = stack.matrix(
            f"self_attn.{name}_proj", (hidden, count, head_dim), ("embed", axis, "head_dim")
        )
        if config.qkv_bias:
            weights[f"{name}_bias"] = stack.vector(
                f"self_attn.{name}_proj.bias", (count, head_dim), (axis, "head_dim"), "zeros"
            )
    if config.qk_norm:
        for name in ("q", "k"):
            weights[f"{name}_norm"] = stack.vector(
                f"self_attn.{name}_norm.weight", (head_dim,), (None,), "ones"
            )
    return weights


def _latent_attention(stack: _Stack, config: ModelConfig) -> dict[str, ParamSpec]:
    latent = config.latent
    assert latent is not None
    hidden, heads = config.hidden_size, config.num_attention_heads
    rank, rotated, values = latent.kv_lora_rank, latent.qk_rope_head_dim, latent.v_head_dim
    up = (rank, heads, latent.qk_nope_head_dim + values)
    weights = {
        "kv_down": stack.matrix(
            "self_attn.kv_a_proj_with_mqa", (hidden, rank + rotated), ("embed", None)
        ),
        "kv_norm": stack.vector("self_attn.kv_a_layernorm.weight", (rank,), (None,), "ones"),
        "kv_up": stack.matrix("self_attn.kv_b_proj", up, ("latent", "heads", "head_dim")),
        "o": stack.matrix(
            "self_attn.o_proj", (heads, values, hidden), ("heads", "head_dim", "embed"), inputs=2
        ),
    }
    if latent.q_lora_rank is None:
        shape = (hidden, heads, config.head_dim)
        return weights | {
            "q": stack.matrix("self_attn.q_proj", shape, ("embed", "heads", "head_dim"))
        }
    rank = latent.q_lora_rank
    return weights | {
        "q_down": stack.matrix("self_attn.q_a_proj", (hidden, rank), ("embed", None)),
        "q_norm": stack.vector("self_attn.q_a_layernorm.weight", (rank,), (None,), "ones"),
        "q_up": stack.matrix(
            "self_attn.q_b_proj", (rank, heads, config.head_dim), ("latent", "heads", "head_dim")
        ),
    }


def _dense_mlp(stack: _Stack, config: ModelConfig) -> dict[str, ParamSpec]:
    return _swiglu(stack, "mlp", config.hidden_size, config.intermediate_size)


def _swiglu(
    stack: _Stack, name: str, hidden: int, inner: int, experts: int | None = None
) -> dict[str, ParamSpec]:
    embed = "embed" if experts is None else "expert_embed"
    shapes: dict[str, tuple[tuple[int, ...], Axes]] = {
        "gate": ((hidden, inner), (embed, "mlp")),
        "up": ((hidden, inner), (embed, "mlp")),
        "down": ((inner, hidden), ("mlp", embed)),
    }
    return {
        part: stack.matrix(f"{name}.{part}_proj", shape, axes, experts=experts)
        for part, (shape, axes) in shapes.items()
    }


def _mixture(stack: _Stack, config: ModelConfig) -> dict[str, ParamSpec]:
    experts, hidden = config.experts, config.hidden_size
    assert experts is not None
    count, inner = experts.n_routed_experts, experts.moe_intermediate_size
    shared = _swiglu(stack, "mlp.shared_experts", hidden, experts.n_shared_experts * inner)
    bias = {
        "router_bias": stack.vector(
            "mlp.gate.e_score_correction_bias", (count,), (None,), "zeros", exact=True
        )
    }
    return {
        "router": stack.matrix("mlp.gate", (hidden, count), ("embed", None)),
        **(bias if experts.biased else {}),
        **_swiglu(stack, "mlp.experts.{expert}", hidden, inner, experts=count),
        **{f"shared_{name}": spec for name, spec in shared.items()},
    }


def declare_head(config: ModelConfig) -> dict[str, ParamSpec]:
    """The weights of `config.head` alone; a tied output matrix is none of them."""
    hidden = config.hidden_size
    if config.head == "scalar":
        stored = Stored("score.weight", (1, hidden), (1, 0), (1, hidden))
        return {"score": ParamSpec((hidden, 1), ("embed", None), "normal", stored)}
    if config.head == "token_labels":  # a torch Linear with a bias
        stored = Stored("score.weight", (2, hidden), (1, 0), (2, hidden))
        bias = Stored("score.bias", (2,), (0,), (2,))
        return {
            "score": ParamSpec((hidden, 2), ("embed", None), "normal", stored),
            "score_bias": ParamSpec((2,), (None,), "zeros", bias),
        }
    if config.tie_word_embeddings:
        return {}
    vocab = (config.vocab_size, hidden)
    copies = _copies(config, "shared_head.head")
    stored = Stored("lm_head.weight", vocab, (1, 0), vocab, copies=copies)
    return {"unembed": ParamSpec(vocab[::-1], ("embed", "vocab"), "normal", stored)}


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def abstract_params(config: ModelConfig, layout: Layout, dtype: DTypeLike) -> Params:
    """The weights as `jax.ShapeDtypeStruct`s with shardings; refuses what does not divide."""
    return _abstract(declare(config), layout, dtype)


def abstract_weights(model: Decoder) -> Params:
    """As `abstract_params`, in the dtype that the model keeps its weights in."""
    return abstract_params(model.config, model.layout, model.execution.param_dtype)


def _abstract(declared: ParamSpecs, layout: Layout, dtype: DTypeLike) -> Params:
    named = jax.tree.leaves_with_path(declared, is_leaf=is_spec)
    leaves = [
        jax.ShapeDtypeStruct(
            spec.shape,
            spec.dtype(dtype),
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
    key: Key[Array, ""], config: ModelConfig, layout: Layout, dtype: DTypeLike = jnp.float32
) -> Params:
    """Random weights, created sharded (no host or single device ever holds the whole tree)."""
    return _create(key, declare(config), config, layout, dtype)


def init_head(
    key: Key[Array, ""], config: ModelConfig, layout: Layout, dtype: DTypeLike = jnp.float32
) -> Params:
    """Random weights of the head alone, for a decoder that was trained under another one."""
    return _create(key, declare_head(config), config, layout, dtype)


def _create(
    key: jax.Array,
    declared: ParamSpecs,
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
    dtype = spec.dtype(dtype)
    if spec.init == "normal":
        scale = config.initializer_range
        return (scale * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)
    return jnp.full(spec.shape, 1 if spec.init == "ones" else 0, dtype)
