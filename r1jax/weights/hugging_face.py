"""Hugging Face directories: read tensor by tensor into sharded arrays, and written back.

What is read and written derives from `r1jax.models.declare`; there is no list of names here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from safetensors import safe_open
from safetensors.numpy import save_file

from r1jax.models.config import ModelConfig
from r1jax.models.parameters import Params, ParamSpec, abstract_params, declare, is_spec
from r1jax.sharding import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Buffers that some exporters store although they follow from the config.
_DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def resolve(path_or_name: str) -> Path:
    """A local directory as it is, else the hub repository of that name, downloaded.

    Raises:
      ValueError: neither a directory nor a repository that can be reached.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(path_or_name, allow_patterns=_PATTERNS))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise ValueError(
            f"model {path_or_name!r}: not a directory here, and not to be had from the hub "
            f"({str(error).splitlines()[0]})"
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a directory."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json: is it a Hugging Face model directory?")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """`generation_config.json` of a directory, or None; it names all EOS ids of a chat model."""
    path = Path(directory) / "generation_config.json"
    if not path.is_file():
        return None
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


class Tensors:
    """The tensors of a directory, by name; data is read when asked for, row range by row range."""

    def __init__(self, directory: Path) -> None:
        index = directory / _INDEX
        if index.is_file():
            names: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
            files = sorted(set(names.values()))
            lost = [file for file in files if not (directory / file).is_file()]
            if lost:
                raise ValueError(f"{directory} lacks {', '.join(lost)}, which {_INDEX} lists")
        elif (directory / _SINGLE).is_file():
            files = [_SINGLE]
        else:
            raise ValueError(f"{directory} has neither {_SINGLE} nor {_INDEX}")
        self._handles = [safe_open(directory / file, framework="numpy") for file in files]
        self._of = {name: handle for handle in self._handles for name in handle.keys()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, from the files' headers."""
        return {
            name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._of.items()
        }

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """tensor[start:stop]."""
        part: np.ndarray = self._of[name].get_slice(name)[start:stop]
        return part


def stored_names(spec: ParamSpec) -> list[str]:
    """The checkpoint tensors of a weight: one, or one per layer."""
    if not spec.per_layer:
        return [spec.stored.name]
    return [spec.stored.name.format(layer=layer) for layer in range(spec.shape[0])]


def _check(found: Mapping[str, tuple[int, ...]], model: ModelConfig, directory: Path) -> None:
    specs = jax.tree.leaves(declare(model), is_leaf=is_spec)
    expected = {name: spec.stored.file_shape for spec in specs for name in stored_names(spec)}
    ignored = {"lm_head.weight"} if model.tie_word_embeddings else set()
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(
        name for name in found.keys() - expected.keys() - ignored if not name.endswith(_DERIVED)
    )
    wrong = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (("missing", missing), ("not known", extra), ("misshapen", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            f"{directory} does not hold the {model.architecture} model that its config.json "
            f"describes; {'; '.join(problems)}. Check that config.json and the weights belong "
            "together"
        )


def load_params(
    path: str | Path, model: ModelConfig, layout: Layout, dtype: DTypeLike = jnp.float32
) -> Params:
    """Read weights straight into sharded arrays.

    One tensor is in host memory at a time, and of it only the rows that a device needs: a layer
    is read, sent and written into its place of the stacked array, which only devices hold.

    Raises:
      ValueError: tensors that are missing, not known or misshapen; all are named.
    """
    directory = resolve(str(path))
    tensors = Tensors(directory)
    _check(tensors.shapes(), model, directory)
    abstract = abstract_params(model, layout, dtype)

    def load(spec: ParamSpec, target: jax.ShapeDtypeStruct) -> jax.Array:
        names = stored_names(spec)
        if not spec.per_layer:
            return _read(tensors, names[0], spec, spec.shape, dtype, target.sharding)
        axes, shape = spec.axes[1:], spec.shape[1:]
        sharding = layout.sharding(axes)
        stack = jax.jit(lambda: jnp.zeros(spec.shape, dtype), out_shardings=target.sharding)()
        put = jax.jit(_put_layer, donate_argnums=0, out_shardings=target.sharding)
        for layer, name in enumerate(names):
            value = _read(tensors, name, spec, shape, dtype, sharding)
            stack = put(stack, value, jnp.int32(layer))
        return stack

    return jax.tree.map(load, declare(model), abstract, is_leaf=is_spec)


def _put_layer(stack: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def _read(
    tensors: Tensors,
    name: str,
    spec: ParamSpec,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    sharding: NamedSharding,
) -> jax.Array:
    stored = spec.stored
    rows_per_entry = stored.file_shape[0] // stored.shape[0]

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        wanted = index or tuple(slice(None) for _ in shape)
        # The slice of our dimension j is one of the stored tensor's dimension order[j].
        split = [slice(None)] * len(shape)
        for ours, theirs in enumerate(stored.order):
            split[theirs] = wanted[ours]
        start, stop, _ = split[0].indices(stored.shape[0])
        rows = tensors.rows(name, start * rows_per_entry, stop * rows_per_entry)
        block = rows.reshape(stop - start, *stored.shape[1:])[(slice(None), *split[1:])]
        return np.ascontiguousarray(block.transpose(stored.order)).astype(dtype)

    return jax.make_array_from_callback(shape, sharding, part)


def export(
    directory: str | Path,
    params: Params,
    model: ModelConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Write a directory that transformers loads; an existing one is replaced in one step.

    Args:
      directory: made under another name and renamed when complete.
      params: the tree of `declare(model)`.
      tokenizer: saved beside the weights.
      generation_config: content of `generation_config.json` (EOS ids).
      dtype: of the stored weights; default: that of each array.
      max_shard_bytes: size of a safetensors file, and so about the host memory used.
    """
    target = Path(directory)
    partial_dir = target.with_name(target.name + ".partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    partial_dir.mkdir(parents=True)
    kind = jnp.dtype(dtype or jax.tree.leaves(params)[0].dtype).name
    config = {**model.to_hugging_face(), "dtype": kind, "torch_dtype": kind}
    generation = dict(generation_config or {})
    if "eos_token_id" in generation:
        config["eos_token_id"] = generation["eos_token_id"]
    for key in ("bos_token_id", "pad_token_id"):
        value = generation.get(key, getattr(tokenizer, key, None))
        if value is not None:
            config[key] = value
            generation.setdefault(key, value)
    _write_json(partial_dir / "config.json", config)
    if generation:
        _write_json(partial_dir / "generation_config.json", generation)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(partial_dir))
    _write_weights(partial_dir, _stored_tensors(params, model, dtype), max_shard_bytes)
    shutil.rmtree(target, ignore_errors=True)
    partial_dir.rename(target)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@partial(jax.jit, static_argnames=("dtype",))
def _layer_of(stack: jax.Array, layer: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False).astype(dtype)


def _stored_tensors(
    params: Params, model: ModelConfig, dtype: DTypeLike | None
) -> Iterator[tuple[str, np.ndarray]]:
    specs = jax.tree.leaves(declare(model), is_leaf=is_spec)
    for spec, leaf in zip(specs, jax.tree.leaves(params), strict=True):
        if leaf.shape != spec.shape:
            raise ValueError(f"{spec.stored.name}: shape {leaf.shape}, expected {spec.shape}")
        kind = jnp.dtype(dtype or leaf.dtype)
        inverse = np.argsort(spec.stored.order)
        for layer, name in enumerate(stored_names(spec)):
            value = _layer_of(leaf, layer, kind) if spec.per_layer else leaf.astype(kind)
            array = np.asarray(value).transpose(inverse).reshape(spec.stored.file_shape)
            yield name, np.ascontiguousarray(array)


def _write_weights(
    directory: Path, tensors: Iterator[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        if held:
            save_file(held, directory / f"part-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(held))
            held.clear()

    for name, array in tensors:
        if held and sum(a.nbytes for a in held.values()) + array.nbytes > max_shard_bytes:
            flush()
        held[name] = array
        total += array.nbytes
    flush()
    if len(shards) == 1:
        (directory / "part-0").rename(directory / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{index}").rename(directory / file)
        weight_map |= {name: file for name in names}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / _INDEX, content)
