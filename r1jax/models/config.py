"""What a decoder is (`ModelConfig`) and how it is executed (`Execution`), as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

Architecture = Literal["qwen2", "qwen3", "llama"]
Head = Literal["language", "scalar"]

# A class of transformers is named after the family and what stands on the decoder.
_HF_FAMILY: dict[str, str] = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}
_HF_HEAD: dict[Head, str] = {
    "language": "ForCausalLM",
    "scalar": "ForSequenceClassification",
}


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Frequency rescaling of Llama 3.x: long wavelengths are stretched by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """A dense pre-norm decoder with grouped-query attention, RoPE and a SwiGLU MLP.

    The fields carry the names of Hugging Face's `config.json`; `from_hugging_face` reads one,
    `to_hugging_face` writes one.

    head: what is read off the activations: `language`, the logits of the next token, or `scalar`,
        one number (a reward model: a sequence classification with one label).
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Llama3RopeScaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02
    head: Head = "language"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd: RoPE rotates pairs")

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 and 2.5 have biases on q, k and v (never on the output projection)."""
        return self.architecture == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises queries and keys per head before RoPE."""
        return self.architecture == "qwen3"

    @staticmethod
    def from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json` mapping; raises ValueError naming what is unsupported."""
        architecture = config.get("model_type")
        if architecture not in _HF_FAMILY:
            raise ValueError(
                f"model_type = {architecture!r} is not supported; known: {sorted(_HF_FAMILY)}"
            )
        required = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        missing = [key for key in required if key not in config]
        if missing:
            raise ValueError(f"model config lacks {', '.join(missing)}")
        if config.get("use_sliding_window"):
            raise ValueError("use_sliding_window = true is not supported; set it to false")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act = {config['hidden_act']!r} is not supported; only silu")
        for bias, expected in (("attention_bias", architecture == "qwen2"), ("mlp_bias", False)):
            if bias in config and bool(config[bias]) != expected and bool(config[bias]):
                raise ValueError(f"{bias} = {config[bias]} is not supported for {architecture}")
        heads = config["num_attention_heads"]
        # transformers 5 nests the rotary settings, earlier releases keep them flat.
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
        return ModelConfig(
            architecture=architecture,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            rope_scaling=_rope_scaling(rope),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=config.get("max_position_embeddings", 32_768),
            initializer_range=config.get("initializer_range", 0.02),
            head=_head(config),
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The mapping that `from_hugging_face` inverts, readable by transformers 4 and 5."""
        scalar = self.head == "scalar"
        scaling: dict[str, Any] | None = None
        if self.rope_scaling is not None:
            scaling = {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": (
                    self.rope_scaling.original_max_position_embeddings
                ),
            }
        return {
            "architectures": [_HF_FAMILY[self.architecture] + _HF_HEAD[self.head]],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {
                "rope_theta": self.rope_theta,
                **(scaling or {"rope_type": "default"}),
            },
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
            "attention_dropout": 0.0,
            "use_cache": True,
            **({"attention_bias": False} if self.architecture != "qwen2" else {}),
            **({"use_sliding_window": False} if self.architecture != "llama" else {}),
            # transformers counts the labels by their names; without names it takes two.
            **({"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if scalar else {}),
        }


def _head(config: Mapping[str, Any]) -> Head:
    """What a `config.json` puts on its decoder; a mapping without a class is a language model."""
    classes = config.get("architectures") or []
    if not any(str(name).endswith(_HF_HEAD["scalar"]) for name in classes):
        return "language"
    labels = config.get("num_labels", len(config.get("id2label") or ("LABEL_0", "LABEL_1")))
    if labels != 1:
        raise ValueError(
            f"{classes[0]} with {labels} labels is not supported: a reward model has num_labels = 1"
        )
    return "scalar"


def _rope_scaling(rope: Mapping[str, Any]) -> Llama3RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type = {kind!r} is not supported; known: default, llama3")
    return Llama3RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


@dataclass(frozen=True)
class Execution:
    """How the same function is computed: none of these fields changes the mathematics.

    remat: what the backward pass keeps of a layer: `none` recomputes nothing, `dots` keeps the
        matrix products, `full` keeps only the layer's input.
    scan_layers: one compiled layer body in a loop (fast to compile), or an unrolled network
        (faster on the CPU, where loops over stacked weights copy them).
    log_prob_chunk: time steps whose logits exist at once.
    attention: `xla` everywhere, `splash` on TPU, `flash` (Pallas) on GPU.
    """

    param_dtype: DTypeLike = jnp.float32
    compute_dtype: DTypeLike = jnp.bfloat16
    attention: Literal["xla", "splash", "flash"] = "xla"
    remat: Literal["none", "dots", "full"] = "full"
    scan_layers: bool = True
    log_prob_chunk: int = 256
