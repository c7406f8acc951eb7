"""Directories that transformers loads, written tensor by tensor."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from r1jax.bucket import locate, on_bucket
from r1jax.files import JsonObject
from r1jax.models.config import ModelConfig
from r1jax.models.parameters import Params, ParamSpec, declare, is_spec
from r1jax.weights.hugging_face.directories import read_config
from r1jax.weights.hugging_face.fp8 import (
    QUANTIZATION_CONFIG,
    is_quantised,
    is_quantised_matrix,
    quantise,
    read_values,
    scale_name,
    scale_shape,
)
from r1jax.weights.hugging_face.names import PLAIN, check, entries, head_names, stored_names
from r1jax.weights.hugging_face.tensor_files import (
    CODES,
    DTYPES,
    FLOAT8,
    StoredWeight,
    Tensors,
    TensorType,
    write_json,
    write_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_BYTES = 2 << 30
_ValuesIn = Callable[[np.dtype], np.ndarray]


def export(
    directory: str | Path,
    params: Params,
    model: ModelConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: JsonObject | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a directory that transformers loads; a model that is there is replaced at the end.

    Every process of a `jax.distributed` run calls this; process 0 writes. A local directory is
    written under a temporary name and renamed, so that a killed export leaves nothing half-written.
    On a bucket (`gs://...`) `config.json`, without which there is no model, is removed first and
    written last.

    Args:
      generation_config: content of `generation_config.json` (EOS ids); ids that it does not give
        are the tokenizer's. A model without logits has them in its `config.json` only.
      dtype: of the stored weights; default: that of each array. `fp8`: the matrices that DeepSeek
        releases in fp8 (`quantise`), and the others in bfloat16.
      max_shard_bytes: the largest safetensors file, unless one tensor is larger.

    Raises ValueError: `directory` holds something else than a model, a weight does not fit `model`,
    a dtype cannot be stored, or a model with a scalar head has no suitable padding token.
    """
    if model.head == "scalar":
        check_padding(tokenizer, generation_config)
    _refuse_what_is_no_model(target := _target(directory))
    weights = _stored_weights(params, model, dtype)
    if jax.process_index() == 0:
        ids = _special_ids(tokenizer, generation_config)
        configs = {"config.json": model.to_hugging_face() | _format(weights, model, dtype) | ids}
        generation = {**(generation_config or {}), **ids}
        if generation and model.head == "language":
            configs["generation_config.json"] = generation

        def write_others(folder: Path) -> None:
            for name, content in configs.items():
                write_json(folder / name, content)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))

        _write(target, weights, write_others, max_shard_bytes)
    else:
        for weight in weights:
            weight.values()  # this process's part in the collectives
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"export {target.name}")


def convert(
    source: str | Path,
    directory: str | Path,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the model of a directory in another dtype; the other files beside it are copied.

    One tensor is in memory at a time, and none is on a device. Both directories are local, or on a
    bucket. Raises ValueError as `load_params` and `export`.
    """
    source = locate(source)
    raw = read_config(source)
    model, quantised = ModelConfig.from_hugging_face(raw), is_quantised(raw)
    _refuse_what_is_no_model(target := _target(directory))
    tensors, declared = Tensors(source), declare(model)
    ignored = head_names(model, "language") if model.tie_word_embeddings else set()
    check(tensors, declared, model, source, quantised=quantised, ignored=ignored)

    def read(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        values = read_values(tensors, name, tuple(slice(None) for _ in shape))
        return np.ascontiguousarray(values, dtype)

    fp8, kind = _is_fp8(dtype), _unquantised(dtype)
    weights = []
    for spec in jax.tree.leaves(declared, is_leaf=is_spec):
        names = stored_names(spec)
        originals = dict(zip(names, names, strict=True))
        originals |= dict.fromkeys(spec.stored.copies, names[0])
        for name, original in originals.items():
            values = partial(read, original, spec.stored.file_shape)
            weights.append(_stored(spec, name, spec.dtype(kind), fp8, values))
    former = {key: value for key, value in raw.items() if key != "quantization_config"}

    def write_others(folder: Path) -> None:
        for path in source.iterdir():
            if path.is_file() and ".safetensors" not in path.name:
                (folder / path.name).write_bytes(path.read_bytes())
        write_json(folder / "config.json", former | _format(weights, model, dtype))

    _write(target, weights, write_others, max_shard_bytes)


def _is_fp8(dtype: DTypeLike | None) -> bool:
    return isinstance(dtype, str) and dtype == "fp8"


def _unquantised(dtype: DTypeLike) -> DTypeLike:
    """The dtype of what is not quantised."""
    return jnp.bfloat16 if _is_fp8(dtype) else dtype


def _target(directory: str | Path) -> Path:
    return locate(directory) if on_bucket(directory) else Path(os.path.abspath(directory))


def _refuse_what_is_no_model(target: Path) -> None:
    unknown = target.exists() and not (target / "config.json").is_file()
    if unknown and not on_bucket(target) and os.listdir(target):
        raise ValueError(
            f"{target} exists and has no config.json: an export replaces a model, nothing else; "
            "choose another directory"
        )


def check_padding(
    tokenizer: PreTrainedTokenizerBase | None, generation_config: JsonObject | None = None
) -> None:
    """Checks that a reward model with this tokenizer gives the same scores in transformers.

    A sequence classification there has no lengths: it reads a text's score at the last token that
    is not `pad_token_id`. Without one it takes no batches, and where EOS is the padding it would
    read the token before EOS; both raise ValueError. Call it before training: `export` is after it.
    """
    ids = _special_ids(tokenizer, generation_config)
    pad, eos = ids.get("pad_token_id"), getattr(tokenizer, "eos_token_id", None)
    if pad is not None and pad != eos:
        return
    raise ValueError(
        (
            "a reward model needs a padding token (pad_token_id), and there is none"
            if pad is None
            else f"pad_token_id = {pad} is also the EOS token, which ends every text; transformers "
            "would take it for padding and score the token before it"
        )
        + ". Set another one of the vocabulary, such as an unused special token, as "
        "tokenizer.pad_token, write the tokenizer with save_pretrained and name its directory in "
        "model.tokenizer"
    )


@lru_cache(maxsize=8)
def with_padding(
    tokenizer: PreTrainedTokenizerBase, eos_ids: tuple[int, ...]
) -> PreTrainedTokenizerBase:
    """The tokenizer with a padding token for a reward model, where its own ends texts (Qwen2.5).

    It is a special token of the vocabulary that the chat template does not write, one for padding
    first; where there is none the tokenizer stays as it is, and `check_padding` refuses it.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    taken = {*eos_ids, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    written = str(tokenizer.chat_template or "")
    unused = [
        token.content
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and index not in taken and token.content not in written
    ]
    if not unused:
        return tokenizer
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = next((token for token in unused if "pad" in token), unused[0])
    return padded


def _special_ids(
    tokenizer: PreTrainedTokenizerBase | None, generation_config: JsonObject | None
) -> JsonObject:
    """The ids that both configs of a directory name; those of the generation config come first."""
    ids = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = (generation_config or {}).get(key)
        ids[key] = getattr(tokenizer, key, None) if value is None else value
    return {key: value for key, value in ids.items() if value is not None}


def _format(weights: list[StoredWeight], model: ModelConfig, dtype: DTypeLike | None) -> JsonObject:
    """The dtypes in `config.json`."""
    specs = jax.tree.leaves(declare(model), is_leaf=is_spec)
    exact = {name for spec in specs if spec.exact for name in stored_names(spec)}
    plain = (weight.tensors for weight in weights if len(weight.tensors) == 1)  # not quantised
    named = (tensor for tensors in plain for tensor in tensors.items())
    kinds = {DTYPES[tensor.code].name for name, tensor in named if name not in exact}
    kind = kinds.pop() if len(kinds) == 1 else "float32"
    # transformers 5 reads `dtype`, earlier releases `torch_dtype`.
    quantisation = {"quantization_config": QUANTIZATION_CONFIG} if _is_fp8(dtype) else {}
    return {"dtype": kind, "torch_dtype": kind, **quantisation}


def _write(
    target: Path, weights: list[StoredWeight], write_others: Callable[[Path], None], max_bytes: int
) -> None:
    """Writes a directory; `write_others(folder)` writes all but the weights."""
    if not on_bucket(target):
        _write_and_rename(target, weights, write_others, max_bytes)
        return
    config = target / "config.json"
    config.unlink(missing_ok=True)
    for stale in target.glob("model*.safetensors*"):
        stale.unlink()
    with TemporaryDirectory(prefix="r1jax-") as scratch:
        write_others(Path(scratch))
        write_weights(target, weights, max_bytes)
        for path in sorted(Path(scratch).rglob("*"), key=lambda path: path.name == config.name):
            if path.is_file():
                (target / path.relative_to(scratch)).write_bytes(path.read_bytes())


def _write_and_rename(
    target: Path, weights: list[StoredWeight], write_others: Callable[[Path], None], max_bytes: int
) -> None:
    partial_dir = target.with_name(target.name + ".partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    partial_dir.mkdir(parents=True)
    write_others(partial_dir)
    write_weights(partial_dir, weights, max_bytes)
    # Moved aside first: removing takes longer than a rename and can fail half-way.
    replaced = target.with_name(target.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    partial_dir.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


@jax.jit
def _entry_of(stack: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    for position in index:
        stack = jax.lax.dynamic_index_in_dim(stack, position, 0, keepdims=False)
    return stack


def _stored_weights(
    params: Params, model: ModelConfig, dtype: DTypeLike | None
) -> list[StoredWeight]:
    """The weights that `export` writes, with the same arguments."""
    declared = jax.tree.leaves_with_path(declare(model), is_leaf=is_spec)
    leaves = dict(jax.tree.leaves_with_path(params))
    misfits = sorted(
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path in leaves.keys() ^ {path for path, _ in declared}
    )
    if misfits:
        raise ValueError(f"params and the model config differ in {', '.join(misfits)}")
    fp8 = _is_fp8(dtype)
    weights = []
    for path, spec in declared:
        leaf = leaves[path]
        if leaf.shape != spec.shape:
            raise ValueError(f"{spec.stored.name}: shape {leaf.shape}, expected {spec.shape}")
        kind = spec.dtype(_unquantised(dtype or leaf.dtype))
        copies: list[tuple[str, tuple[int, ...]]] = [(name, ()) for name in spec.stored.copies]
        for name, index in [*entries(spec), *copies]:
            weights.append(_stored(spec, name, kind, fp8, partial(_gather, leaf, spec, index)))
    return weights


def _stored(
    spec: ParamSpec, name: str, dtype: DTypeLike, fp8: bool, values: _ValuesIn
) -> StoredWeight:
    """One tensor of a weight, or the two of a quantised one; `values` gives it in a dtype."""
    shape, kind = spec.stored.file_shape, jnp.dtype(dtype)
    if CODES.get(kind) not in PLAIN:
        raise ValueError(
            f"{spec.stored.name}: {kind} is not stored; give a dtype of "
            f"{', '.join(DTYPES[code].name for code in PLAIN)}"
        )
    if fp8 and is_quantised_matrix(name):
        codes, scales = TensorType(shape, CODES[FLOAT8]), TensorType(scale_shape(shape), "F32")
        parts, exact = {name: codes, scale_name(name): scales}, jnp.dtype(jnp.float32)
        return StoredWeight(parts, lambda: quantise(values(exact)))
    return StoredWeight({name: TensorType(shape, CODES[kind])}, lambda: (values(kind),))


def _gather(leaf: jax.Array, spec: ParamSpec, index: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    value = _entry_of(leaf, tuple(np.int32(i) for i in index)) if index else leaf
    if not (value.is_fully_addressable or value.is_fully_replicated):
        assert isinstance(value.sharding, NamedSharding)
        replicated = NamedSharding(value.sharding.mesh, PartitionSpec())
        value = jax.jit(lambda x: x, out_shardings=replicated)(value)
    inverse = np.argsort(spec.stored.order)
    array = np.asarray(value).transpose(inverse).reshape(spec.stored.file_shape)
    return np.ascontiguousarray(array, kind)
