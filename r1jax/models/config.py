"""What a decoder is (`ModelConfig`) and how it is executed (`Execution`), as frozen data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from r1jax.sharding import Layout

Architecture = Literal["qwen2", "qwen3", "llama", "deepseek_v2", "deepseek_v3"]
Head = Literal["language", "scalar", "token_labels"]
# A `config.json`.
HuggingFaceConfig = dict[str, Any]
AttentionKernel = Literal["xla", "splash", "flash", "flash_packed", "cudnn"]
RematPolicy = Literal["none", "dots", "full"]

# A transformers class is named by the family and the head.
_HF_FAMILY: dict[str, str] = {
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "llama": "Llama",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
}
_HF_HEAD: dict[Head, str] = {
    "language": "ForCausalLM",
    "scalar": "ForSequenceClassification",
    "token_labels": "ForTokenClassification",
}
# That transformers does not have: what is written for it, nobody could load.
_NO_HF_CLASS = ("DeepseekV2ForTokenClassification",)
# The labels of a head, in order; transformers counts them by their names.
_HF_LABELS: dict[Head, tuple[str, ...]] = {
    "language": (),
    "scalar": ("LABEL_0",),
    "token_labels": ("wrong", "right"),
}


def architectures() -> dict[str, str]:
    """What can be loaded: `model_type` of a config.json -> the family of its transformers class."""
    return dict(_HF_FAMILY)


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Frequency rescaling of Llama 3.x: long wavelengths are stretched by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnRopeScaling:
    """YaRN (arXiv 2309.00071): frequencies that turn rarely are divided by `factor`.

    beta_fast, beta_slow: turns within the original context above which a frequency is kept, and
        below which it is divided; linear in the dimension between them.
    mscale, mscale_all_dim: how much attention is sharpened for the longer context, on the rotated
        dimensions and on all of them; see `sharpening`.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def sharpening(self, mscale: float) -> float:
        """0.1 * mscale * ln(factor) + 1, by which keys or queries are multiplied."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads from one latent.

    The KV cache holds `kv_lora_rank + qk_rope_head_dim` values of a token: the latent, from which
    every head's keys and values are projected, and a rotated key that all heads share.

    q_lora_rank: rank of the queries' latent; None: queries are projected in one step.
    qk_nope_head_dim, qk_rope_head_dim: a head's query and key without and with a position.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class MixtureOfExperts:
    """Routed and shared experts in place of the MLP (arXiv 2412.19437, section 2.1.2).

    first_k_dense_replace: the number of first layers that have the dense MLP.
    n_group, topk_group: experts are in equal groups, and a token chooses within its best groups.
    norm_topk_prob: the chosen experts' weights are divided by their sum.
    routed_scaling_factor: and multiplied by this.
    scoring_func: a score of each expert alone, or normalised over all.
    topk_method: `noaux_tc` chooses by scores plus a bias, a group's score being that of its two
        best experts (DeepSeek-V3); `group_limited_greedy` by scores, a group's being that of its
        best (V2, arXiv 2405.04434); `greedy` regardless of groups (V2-Lite).
    """

    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    first_k_dense_replace: int = 0
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"

    @property
    def biased(self) -> bool:
        """Whether a bias of each expert is added for the choice."""
        return self.topk_method == "noaux_tc"

    @property
    def index_dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest integer type for the experts' indices."""
        return np.min_scalar_type(self.n_routed_experts - 1)

    @property
    def group_score_experts(self) -> int:
        """How many of a group's best experts its score is the sum of."""
        return 2 if self.biased else 1

    def __post_init__(self) -> None:
        for name, known in (
            ("scoring_func", ("sigmoid", "softmax")),
            ("topk_method", ("noaux_tc", "greedy", "group_limited_greedy")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} is not supported; known: {', '.join(known)}"
                )
        smallest = self.group_score_experts * self.n_group
        if self.n_routed_experts % self.n_group or self.n_routed_experts < smallest:
            raise ValueError(
                f"n_routed_experts = {self.n_routed_experts} does not make n_group = "
                f"{self.n_group} equal groups of {self.group_score_experts} at least, which score "
                "a group"
            )
        if self.topk_method == "greedy" and self.topk_group != self.n_group:
            raise ValueError(
                f"topk_group = {self.topk_group} of n_group = {self.n_group}: topk_method = "
                "'greedy' knows no groups; set 'group_limited_greedy', or both to 1"
            )
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if not 1 <= self.topk_group <= self.n_group or self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} of {reachable} experts in "
                f"topk_group = {self.topk_group} of {self.n_group} groups: choose fewer experts, "
                "or from more groups"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder with RoPE and SwiGLU MLPs.

    Attention is grouped-query attention, or latent attention; the MLP is dense, or a mixture of
    experts. The fields carry the names of Hugging Face's `config.json`; `from_hugging_face` reads
    one, `to_hugging_face` writes one.

    head_dim: of a query and a key; with latent attention, both of its parts together.
    latent, experts: of DeepSeek-V3; None in the dense families.
    num_nextn_predict_layers: 1 with a module that predicts the token after the next (see
        `r1jax.models.multi_token_prediction`), else 0.
    head: the output: `language`, the logits of the next token; `scalar`, one number (a reward
        model: a sequence classification with one label); or `token_labels`, the logits of "wrong"
        and "right" at each token (a process reward model: a token classification).
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
    rope_scaling: Llama3RopeScaling | YarnRopeScaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02
    head: Head = "language"
    latent: LatentAttention | None = None
    experts: MixtureOfExperts | None = None
    num_nextn_predict_layers: int = 0

    def __post_init__(self) -> None:
        if self.num_nextn_predict_layers not in (0, 1):
            raise ValueError(
                f"num_nextn_predict_layers = {self.num_nextn_predict_layers} is not supported: a "
                "model has one module for multi-token prediction, or none; set it to 1 or 0"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.rope_dim % 2:
            name = "head_dim" if self.latent is None else "qk_rope_head_dim"
            raise ValueError(f"{name} = {self.rope_dim} is odd: RoPE rotates pairs")
        if self.latent is not None:
            width = self.latent.qk_nope_head_dim + self.latent.qk_rope_head_dim
            if self.head_dim != width or self.num_key_value_heads != self.num_attention_heads:
                raise ValueError(
                    f"head_dim = {self.head_dim}, num_key_value_heads = "
                    f"{self.num_key_value_heads}: latent attention has heads of {width} "
                    f"(qk_nope_head_dim + qk_rope_head_dim), and {self.num_attention_heads} of "
                    "keys, as many as of queries"
                )
        if self.experts is not None and not (
            0 <= self.experts.first_k_dense_replace < self.num_hidden_layers
        ):
            raise ValueError(
                f"first_k_dense_replace = {self.experts.first_k_dense_replace} leaves no layer of "
                f"num_hidden_layers = {self.num_hidden_layers} for the experts"
            )

    @property
    def stacks(self) -> dict[str, range]:
        """Equal layers, stacked in one array of weights: name in the tree -> their indices."""
        dense = 0 if self.experts is None else self.experts.first_k_dense_replace
        first = {"dense_layers": range(dense)} if dense else {}
        return {**first, "layers": range(dense, self.num_hidden_layers)}

    @property
    def prediction_layers(self) -> range:
        """Indices of the layers of multi-token prediction, after the decoder's."""
        first = self.num_hidden_layers
        return range(first, first + self.num_nextn_predict_layers)

    @property
    def rope_dim(self) -> int:
        """Dimensions of a query and a key that are rotated."""
        return self.head_dim if self.latent is None else self.latent.qk_rope_head_dim

    @property
    def v_head_dim(self) -> int:
        """Dimensions of a head's value."""
        return self.head_dim if self.latent is None else self.latent.v_head_dim

    @property
    def all_stacks(self) -> dict[str, range]:
        """`stacks`, and `prediction` where there is a module for multi-token prediction."""
        layers = self.prediction_layers
        return {**self.stacks, "prediction": layers} if layers else self.stacks

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, width) of a layer's KV cache per token: keys and values, or a latent."""
        if self.latent is None:
            return ((self.num_key_value_heads, self.head_dim),) * 2
        return ((1, self.latent.kv_lora_rank + self.latent.qk_rope_head_dim),)

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 and 2.5 have biases on q, k and v (never on the output projection)."""
        return self.architecture == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises queries and keys per head before RoPE."""
        return self.architecture == "qwen3"

    @staticmethod
    def from_hugging_face(config: HuggingFaceConfig) -> ModelConfig:
        """Read a `config.json` mapping; raises ValueError naming what is unsupported."""
        architecture = config.get("model_type")
        if architecture not in tuple(_HF_FAMILY):
            raise ValueError(
                f"model_type = {architecture!r} is not supported; known: {sorted(_HF_FAMILY)}"
            )
        required: tuple[str, ...] = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        deepseek = architecture.startswith("deepseek")
        if deepseek:
            config = {**_DEEPSEEK[architecture], **config}
            required += tuple(
                f.name for p in (LatentAttention, MixtureOfExperts) for f in fields(p)
            )
        missing = [key for key in required if key not in config]
        if missing:
            raise ValueError(f"model config lacks {', '.join(missing)}")
        _check_values(config, required)
        if config.get("use_sliding_window"):
            raise ValueError("use_sliding_window = true is not supported; set it to false")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act = {config['hidden_act']!r} is not supported; only silu")
        for bias, expected in (("attention_bias", architecture == "qwen2"), ("mlp_bias", False)):
            if bias in config and bool(config[bias]) != expected and bool(config[bias]):
                raise ValueError(f"{bias} = {config[bias]} is not supported for {architecture}")
        heads = config["num_attention_heads"]
        if deepseek:
            _refuse_other_deepseeks(config)
        latent = LatentAttention(**_fields_of(LatentAttention, config)) if deepseek else None
        experts = MixtureOfExperts(**_fields_of(MixtureOfExperts, config)) if deepseek else None
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        if latent is not None:
            head_dim = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        # transformers 5 nests the rotary settings, earlier releases keep them flat.
        section = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        rope = config.get(section) or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"{section} = {rope!r} of the model config: needs a mapping")
        theta = {"rope_theta": 10_000.0, **config, **rope}["rope_theta"]
        _check_number(f"{section}.rope_theta" if "rope_theta" in rope else "rope_theta", theta)
        return ModelConfig(
            architecture=architecture,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            rope_scaling=_rope_scaling(rope, section, yarn=latent is not None),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=config.get("max_position_embeddings", 32_768),
            initializer_range=config.get("initializer_range", 0.02),
            head=_head(config),
            latent=latent,
            experts=experts,
            num_nextn_predict_layers=config.get("num_nextn_predict_layers", 0),
        )

    def to_hugging_face(self) -> HuggingFaceConfig:
        """The mapping that `from_hugging_face` inverts, readable by transformers 4 and 5.

        Raises ValueError where transformers has no class of such models.
        """
        labels, name = _HF_LABELS[self.head], _HF_FAMILY[self.architecture] + _HF_HEAD[self.head]
        if name in _NO_HF_CLASS:
            raise ValueError(
                f"transformers has no {name}, so that nothing could load what is exported; train "
                f"one of another family than {self.architecture}"
            )
        scaling: dict[str, Any] | None = None
        if self.rope_scaling is not None:
            kind = "yarn" if isinstance(self.rope_scaling, YarnRopeScaling) else "llama3"
            # Releases before 4.45, and DeepSeek's own code, call it `type`.
            old = {"type": kind} if kind == "yarn" else {}
            scaling = {"rope_type": kind, **old, **asdict(self.rope_scaling)}
        parts: dict[str, Any] = {}
        if self.latent is not None and self.experts is not None:
            parts = {
                **asdict(self.latent),
                **asdict(self.experts),
                "moe_layer_freq": 1,
                "rope_interleave": True,
            }
        if parts or self.num_nextn_predict_layers:
            parts["num_nextn_predict_layers"] = self.num_nextn_predict_layers
        return {
            "architectures": [name],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            # transformers takes `head_dim` for the rotated part.
            "head_dim": self.rope_dim,
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
            **({"use_sliding_window": False} if "qwen" in self.architecture else {}),
            **parts,
            **(
                {
                    "id2label": {str(index): name for index, name in enumerate(labels)},
                    "label2id": {name: index for index, name in enumerate(labels)},
                }
                if labels
                else {}
            ),
        }


def _head(config: HuggingFaceConfig) -> Head:
    """What a `config.json` puts on its decoder; a mapping without a class is a language model."""
    classes = config.get("architectures") or []
    heads = [head for head, labels in _HF_LABELS.items() if labels]
    head = next((h for h in heads if any(str(c).endswith(_HF_HEAD[h]) for c in classes)), None)
    if head is None:
        return "language"
    labels = config.get("num_labels", len(config.get("id2label") or ("LABEL_0", "LABEL_1")))
    if labels != (count := len(_HF_LABELS[head])):
        kind = "a reward model" if head == "scalar" else "a process reward model"
        raise ValueError(
            f"{classes[0]} with {labels} labels is not supported: {kind} has num_labels = {count}"
        )
    return head


def _fields_of(
    part: type[LatentAttention] | type[MixtureOfExperts], config: HuggingFaceConfig
) -> dict[str, Any]:
    """Those entries that are fields of `part`; without groups, transformers writes null."""
    return {
        field.name: config[field.name]
        for field in fields(part)
        if config[field.name] is not None or field.default is MISSING
    }


# What a release's config.json, or transformers' of that name, may leave out.
_DEEPSEEK: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy"},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}


def _refuse_other_deepseeks(config: HuggingFaceConfig) -> None:
    """Variants that no released DeepSeek-V2, V3, R1 or Moonlight has."""
    only: dict[str, Any] = {
        "moe_layer_freq": 1,
        "rope_interleave": True,
        "tie_word_embeddings": False,
    }
    if config["model_type"] == "deepseek_v2":
        # DeepSeek's code would divide the weights by their sum; transformers' never does.
        only["norm_topk_prob"] = False
    for key, value in only.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} = {config[key]!r} is not supported; only {value!r}")


def _rope_scaling(
    rope: Mapping[str, Any], section: str, *, yarn: bool
) -> Llama3RopeScaling | YarnRopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    known: dict[str, type[Llama3RopeScaling] | type[YarnRopeScaling]] = (
        {"yarn": YarnRopeScaling} if yarn else {"llama3": Llama3RopeScaling}
    )
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(
            f"rope_type = {kind!r} is not supported; known: default, {', '.join(known)}"
        )
    scaling, values = known[kind], {}
    needed = [field.name for field in fields(scaling) if field.default is MISSING]
    if missing := [f"{section}.{name}" for name in needed if rope.get(name) is None]:
        raise ValueError(
            f"model config lacks {', '.join(missing)}, which rope_type = {kind!r} needs"
        )
    for field in fields(scaling):
        if (value := rope.get(field.name)) is not None:
            _check_number(f"{section}.{field.name}", value)
            values[field.name] = (int if field.type == "int" else float)(value)
    return scaling(**values)  # type: ignore[arg-type]


_LARGEST = 10**6
"""Of a size in a model config: beyond those of any model, and soon refused instead of allocated."""
# What may be larger, and how many names of tensors follow from it.
_LIMITS = {
    "vocab_size": 10**8,
    "intermediate_size": 10**8,
    "max_position_embeddings": 10**12,
    "num_hidden_layers": 10**4,
    "n_routed_experts": 10**5,
}


def _check_values(config: HuggingFaceConfig, required: Sequence[str]) -> None:
    """Raises ValueError for what is no size or number, or beyond those of any model."""
    parts = [field for part in (LatentAttention, MixtureOfExperts) for field in fields(part)]
    others = {field.name for field in parts if "int" not in str(field.type)}
    optional = {field.name for field in parts if field.default is not MISSING} | {"q_lora_rank"}
    sizes = [*required, "num_key_value_heads", "head_dim", "max_position_embeddings"]
    for key in dict.fromkeys([*sizes, "num_nextn_predict_layers"]):
        value = config.get(key)
        if key in others or (value is None and (key not in required or key in optional)):
            continue
        least, most = int(key in _AT_LEAST_1), _LIMITS.get(key, _LARGEST)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(
                f"{key} = {str(value)[:40]} of the model config: needs a whole number from "
                f"{least} to {most}"
            )
    for key in ("rms_norm_eps", "initializer_range", "routed_scaling_factor"):
        if config.get(key) is not None:
            _check_number(key, config[key])
    experts = config.get("n_routed_experts") if "n_routed_experts" in required else None
    if experts is not None and experts * config["num_hidden_layers"] > _LARGEST:
        raise ValueError(
            f"num_hidden_layers = {config['num_hidden_layers']} of n_routed_experts = {experts} "
            f"are more than {_LARGEST} experts, beyond any model"
        )


_AT_LEAST_1 = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
)


def _check_number(key: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 <= value < math.inf):  # type: ignore[operator]
        raise ValueError(f"{key} = {value!r} of the model config: needs a finite number, 0 or more")


@dataclass(frozen=True)
class Execution:
    """How the same function is computed: none of these fields changes the mathematics.

    remat: what the backward pass keeps of a layer, see `r1jax.models.remat`; `auto`: what fits.
    device_memory: bytes of a device, for `auto`; None: not known.
    scan_layers: one compiled layer body in a loop (fast to compile), or an unrolled network
        (faster on the CPU, where loops over stacked weights copy them).
    log_prob_chunk, log_prob_tokens: time steps whose logits exist at once on a device, and tokens
        that these are at least: a GPU is slow with few, of which each chunk reads and writes the
        output matrix's gradient.
    expert_chunk: tokens that a device dispatches to their experts at once.
    attention: over whole rows: `xla` on any platform, `splash` on TPU; on GPU `flash`, which is
        JAX's Pallas kernel, and two that were not run on one: `flash_packed`, this package's, and
        `cudnn`.
    sampler_attention: over pages of the KV cache: `kernel` where the platform has one, `auto` on
        TPU alone, as the GPU's has not been run on one; neither where `attention` is `xla`.
    """

    param_dtype: DTypeLike = jnp.float32
    compute_dtype: DTypeLike = jnp.bfloat16
    attention: AttentionKernel = "xla"
    sampler_attention: Literal["auto", "xla", "kernel"] = "auto"
    remat: RematPolicy | Literal["auto"] = "full"
    device_memory: int | None = None
    scan_layers: bool = True
    log_prob_chunk: int = 256
    log_prob_tokens: int = 1
    expert_chunk: int = 4096

    def logit_steps(self, rows: int, time: int) -> int:
        """How many time steps' logits exist at once, of a device's rows of `time` tokens."""
        return min(max(self.log_prob_chunk, -(-self.log_prob_tokens // rows)), time)


@dataclass(frozen=True)
class Decoder:
    """Everything static about a model: what it is, how and where it is computed. Hashable."""

    config: ModelConfig
    execution: Execution
    layout: Layout
