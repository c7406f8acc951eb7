"""Which tensors a checkpoint of a model has, by name and shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from r1jax.models.config import Head, ModelConfig
from r1jax.models.parameters import ParamSpec, declare_head, is_spec
from r1jax.weights.hugging_face.fp8 import read_values, scale_name, scale_shape
from r1jax.weights.hugging_face.tensor_files import CODES, DTYPES, FLOAT8, Tensors

if TYPE_CHECKING:
    from jaxtyping import PyTree

# Dtypes of tensors without scales; fp8 needs scales.
PLAIN = tuple(code for code, dtype in DTYPES.items() if dtype != FLOAT8)
_COMPARED_ROWS = 4096
# Buffers that some exporters store although they follow from the config.
_DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def stored_names(spec: ParamSpec) -> list[str]:
    """The checkpoint tensors of a weight, without copies: one, or one per layer (and expert)."""
    return [name for name, _ in entries(spec)]


def entries(spec: ParamSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each tensor of a weight, and its index in the stacked array."""
    stacked = int(spec.per_layer) + int(spec.per_expert)
    for index in np.ndindex(spec.shape[:stacked]):
        layer, expert = (*index, 0, 0)[:2]
        name = spec.stored.name.format(layer=spec.stored.first_layer + layer, expert=expert)
        yield name, index


def stored_shapes(
    declared: PyTree[ParamSpec], in_fp8: Callable[[str], bool]
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of a checkpoint, copies and scales too.

    in_fp8: whether the matrix of this name is stored in fp8, and so has scales.
    """
    shapes = {
        name: spec.stored.file_shape
        for spec in jax.tree.leaves(declared, is_leaf=is_spec)
        for name in [*stored_names(spec), *spec.stored.copies]
    }
    scales = {scale_name(name): scale_shape(shapes[name]) for name in shapes if in_fp8(name)}
    return shapes | scales


def head_names(model: ModelConfig, *heads: Head) -> set[str]:
    """The tensors of these heads on a decoder like `model`."""
    untied = replace(model, tie_word_embeddings=False)
    declared = [declare_head(replace(untied, head=head)) for head in heads]
    return {name for specs in declared for spec in specs.values() for name in stored_names(spec)}


def check(
    tensors: Tensors,
    declared: PyTree[ParamSpec],
    model: ModelConfig,
    directory: Path,
    *,
    quantised: bool,
    ignored: Set[str],
) -> None:
    """Checks that a directory holds these weights.

    quantised: whether matrices may be in fp8. ignored: tensors that may be there, too. Raises
    ValueError, which names all tensors that are missing, not known or misshapen.
    """
    shapes = {name: type.shape for name, type in tensors.types.items()}
    codes = {name: type.code for name, type in tensors.types.items()}
    expected = stored_shapes(declared, lambda name: codes.get(name) == CODES[FLOAT8])
    specs = jax.tree.leaves(declared, is_leaf=is_spec)
    copies = {copy for spec in specs for copy in spec.stored.copies}
    missing = sorted(expected.keys() - shapes.keys() - copies)
    # A prediction module (MTP) is stored as a layer behind the last; a model may do without it.
    module = f"model.layers.{model.num_hidden_layers}."
    lost = [name for name in missing if name.startswith(module)]
    if lost and lost == missing and not any(name.startswith(module) for name in shapes):
        raise ValueError(
            f"{directory} has no prediction module ({module}*), though num_nextn_predict_layers = "
            f"{model.num_nextn_predict_layers}: transformers leaves it out of what it writes. Set "
            "multi_token_prediction of the model to false, or copy the layer's tensors from the "
            "model that this one was made of"
        )
    unused = f"{module}eh_proj.weight" in shapes and not model.num_nextn_predict_layers
    passed_over = (module,) if unused else ()
    extra = sorted(
        name
        for name in shapes.keys() - expected.keys() - ignored
        if not (name.endswith(_DERIVED) or name.startswith(passed_over))
    )
    wrong = [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    unread = [
        f"{name} is {codes[name]}"
        for name, shape in expected.items()
        if name in codes
        and codes[name] not in PLAIN
        and not (quantised and codes[name] == CODES[FLOAT8] and len(shape) == 2)
    ]
    readable = ", ".join(PLAIN) + (
        f" and {CODES[FLOAT8]} matrices" if quantised else " without a quantization_config"
    )
    problems = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (
            ("missing", missing),
            ("not known", extra),
            ("misshapen", wrong),
            (f"of a dtype other than {readable}", unread),
        )
        if names
    ]
    head = "lm_head.weight"
    if missing == [head] and len(problems) == 1:
        raise ValueError(
            f"{directory} has no {head}, and its config.json does not say tie_word_embeddings = "
            "true: set it there if the embedding is the output matrix, too. If the model was saved "
            "without its head (AutoModel), save it again with AutoModelForCausalLM"
        )
    if problems:
        raise ValueError(
            f"{directory} does not hold the {model.architecture} model that its config.json "
            f"describes; {'; '.join(problems)}. Check that config.json and the weights belong "
            "together"
        )
    # A different output matrix means that the weights are not tied; transformers would use it.
    if (
        model.head == "language"
        and model.tie_word_embeddings
        and head in shapes
        and not _equal(tensors, head, "model.embed_tokens.weight")
    ):
        raise ValueError(
            f"{directory}: config.json says tie_word_embeddings = true, but {head} differs from "
            "model.embed_tokens.weight; set tie_word_embeddings to false there"
        )


def _equal(tensors: Tensors, a: str, b: str) -> bool:
    shape = tensors.types[a].shape
    if shape != tensors.types[b].shape:
        return False
    rows = range(0, shape[0], _COMPARED_ROWS)
    boxes = ((slice(at, at + _COMPARED_ROWS), *(slice(None) for _ in shape[1:])) for at in rows)
    return all(
        np.array_equal(read_values(tensors, a, box), read_values(tensors, b, box)) for box in boxes
    )
