"""Settings of a model."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from r1jax.files import JsonObject
from r1jax.settings.section import Section


class ModelSection(Section):
    """Which policy. Either `path` (weights exist) or `config` (from scratch), never both."""

    FREE: ClassVar[frozenset[str]] = frozenset({"max_position_embeddings"})

    path: str | None = Field(None, description="Hugging Face directory, gs://... or hub name.")
    config: JsonObject | None = Field(
        None, description="A Hugging Face `config.json` as a mapping: random initial weights."
    )
    tokenizer: str | None = Field(
        None,
        description="Directory or hub name, or `characters:NAME` for the alphabet of a task; "
        "default: the model's path.",
    )
    multi_token_prediction: bool = Field(
        False,
        description="Have the module that predicts the token after the next (DeepSeek-V3's MTP, "
        "num_nextn_predict_layers = 1), for mtp_weight and sampling.speculative. Most runs do "
        "without: its layer is then neither loaded nor exported, and takes no memory.",
    )
    max_position_embeddings: int | None = Field(
        None,
        ge=1,
        description="Tokens of prompt and completion that the model may be used with; default: its "
        "config's. RoPE goes beyond, as far as the training does. The exported config.json has it.",
    )
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the weights that the optimizer changes."
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Of activations, and of the weights that are computed with."
    )
    attention: Literal["auto", "xla", "splash", "flash", "flash_packed", "cudnn"] = Field(
        "auto",
        description="Over whole rows. auto: splash (a Pallas kernel) on TPU, flash (JAX's Pallas "
        "kernel) on GPU, else XLA's. On GPU also flash_packed and, from Hopper on and in bfloat16, "
        "cudnn: both read key heads where they are and pass over other segments; they were "
        "compiled for GPUs and not yet run on one. cudnn's gradients differ in their last bits "
        "from run to run, unless XLA_FLAGS has --xla_gpu_deterministic_ops=true.",
    )
    sampler_attention: Literal["auto", "xla", "kernel"] = Field(
        "auto",
        description="Over the pages of the sampler's KV cache. auto: a Pallas kernel on TPU, XLA's "
        "elsewhere; kernel: on GPU, too, where it was compiled and not yet run.",
    )
    remat: Literal["none", "dots", "full", "auto"] = Field(
        "full",
        description="What is computed again in the backward pass: nothing (none), all but matrix "
        "products and attention (dots), or each layer (full). Less memory, more compute. auto: "
        "dots where a micro-batch's activations fit the devices' memory by an estimate, else full; "
        "--dry-run says which.",
    )
    scan_layers: bool | Literal["auto"] = Field(
        "auto",
        description="Compile one layer and loop over them: compiles faster. auto: on accelerators.",
    )
    log_prob_chunk: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Time steps whose logits exist at once. auto: 256, and on a GPU so many that a "
        "device has 2,048 tokens at once.",
    )
    expert_chunk: int = Field(
        4096, ge=1, description="Tokens that a device sends to their experts at once."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of model.path and model.config")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("model.config needs model.tokenizer (a directory or characters:NAME)")
        return self


MODEL = "model"
"""The name of the section `model`, beside the names in `models`."""
