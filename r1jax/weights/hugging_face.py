"""Hugging Face directories: read tensor by tensor into sharded arrays, and written back.

They are local, or on a bucket (`gs://...`), where tensors are read by ranges of bytes.

What is read and written derives from `r1jax.models.declare`; there is no list of names here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from r1jax.bucket import locate, on_bucket, read_range
from r1jax.config.packaged import packaged_shape
from r1jax.models.config import Head, ModelConfig
from r1jax.models.parameters import (
    Params,
    ParamSpec,
    abstract_params,
    declare,
    declare_head,
    init_head,
    is_spec,
)
from r1jax.sharding import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Some repositories hold the same weights a second time, in their authors' own format.
_OTHER_FORMATS = ["*/*", "consolidated*"]
_DTYPES: dict[str, DTypeLike] = {"BF16": jnp.bfloat16, "F16": jnp.float16, "F32": jnp.float32}
_CODES = {jnp.dtype(dtype): code for code, dtype in _DTYPES.items()}
_COMPARED_ROWS = 4096
# Buffers that some exporters store although they follow from the config.
_DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def resolve(path_or_name: str) -> Path:
    """A directory (local, or on a bucket) as it is; else the hub's repository, downloaded.

    Raises:
      ValueError: neither a directory nor a repository that can be reached.
    """
    path = _directory(path_or_name)
    if path is not None:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                path_or_name, allow_patterns=_PATTERNS, ignore_patterns=_OTHER_FORMATS
            )
        )
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise ValueError(
            f"model {path_or_name!r}: not a directory here, and not to be had from the hub "
            f"({(str(error).splitlines() or [type(error).__name__])[0]}). Check the name; without "
            "a network, copy the model's directory to this machine and give its path"
        ) from error


def find_config(path_or_name: str) -> dict[str, Any]:
    """`config.json` for a plan: of a local directory, of r1jax itself, or of a hub repository.

    The published shapes that come with r1jax need no network and give the same plan everywhere; a
    run reads the model's own file, and `differences_from_published` compares the two.

    Raises:
      ValueError: neither a directory nor a repository that can be reached.
    """
    path = _directory(path_or_name)
    if path is not None:
        return read_config(path)
    packaged = packaged_shape(path_or_name)
    if packaged is not None:
        return _read_mapping(packaged)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return _read_mapping(Path(hf_hub_download(path_or_name, "config.json")))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise ValueError(
            f"model {path_or_name!r}: not a directory here, and its config.json is not to be had "
            f"from the hub ({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from error


def _directory(path_or_name: str) -> Path | None:
    """A directory that is there; None if the name may be one of the hub's."""
    path = locate(path_or_name).expanduser()
    if path.is_dir():
        return path
    if on_bucket(path_or_name):
        raise ValueError(f"model {path_or_name!r}: there is nothing under this name on the bucket")
    return None


def differences_from_published(name: str, config: ModelConfig) -> list[str]:
    """How a model of the hub differs from the shape that plans take it to have."""
    packaged = packaged_shape(name)
    if packaged is None:
        return []
    published = asdict(ModelConfig.from_hugging_face(_read_mapping(packaged)))
    return [
        f"{key} = {value!r}, planned with {published[key]!r}"
        for key, value in asdict(config).items()
        if value != published[key]
    ]


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a directory."""
    path = locate(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json: is it a Hugging Face model directory?")
    return _read_mapping(path)


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """`generation_config.json` of a directory, or None; it names all EOS ids of a chat model."""
    path = locate(directory) / "generation_config.json"
    if not path.is_file():
        return None
    return _read_mapping(path)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a mapping")
    return content


class Tensors:
    """The tensors of a directory, by name; data is read when asked for, box by box."""

    def __init__(self, directory: Path) -> None:
        index = directory / _INDEX
        if index.is_file():
            names: Mapping[str, str] = _read_mapping(index).get("weight_map", {})
            files = sorted(set(names.values()))
            lost = [file for file in files if not (directory / file).is_file()]
            if lost:
                raise ValueError(
                    f"{directory} lacks {', '.join(lost)}, which {_INDEX} lists; copy or download "
                    "the missing files"
                )
        elif (directory / _SINGLE).is_file():
            files = [_SINGLE]
        else:
            others = sorted(p.name for p in directory.iterdir() if p.suffix in {".bin", ".pth"})
            raise ValueError(
                f"{directory} has neither {_SINGLE} nor {_INDEX}"
                + (f", only {', '.join(others[:3])}" if others else "")
                + "; write safetensors with save_pretrained of transformers"
            )
        self._slices: dict[str, Any] = {}
        for file in files:
            try:
                handle = _open_safetensors(directory / file)
            except SafetensorError as error:
                raise ValueError(
                    f"{directory / file} is not a whole safetensors file ({error}); copy or "
                    "download it again"
                ) from error
            self._slices |= {name: handle.get_slice(name) for name in handle.keys()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, from the files' headers."""
        return {name: tuple(part.get_shape()) for name, part in self._slices.items()}

    def dtypes(self) -> dict[str, str]:
        """Name -> the format's name of the dtype (`BF16`), from the files' headers."""
        return {name: str(part.get_dtype()) for name, part in self._slices.items()}

    def read(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """tensor[box]; only that is copied out of the (memory-mapped) file."""
        part: np.ndarray = self._slices[name][box]
        return part


def _open_safetensors(path: Path) -> Any:
    return _OnBucket(path) if on_bucket(path) else safe_open(path, framework="numpy")


class _OnBucket:
    """As `safe_open`, of a file on a bucket; the format is explained at `_write_safetensors`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        size = path.stat().length  # type: ignore[attr-defined]  # etils' own
        self._data = 8 + int.from_bytes(read_range(path, 0, min(8, size)), "little")
        if self._data > size:
            raise SafetensorError(f"it has {size} bytes, fewer than its header")
        self._tensors: dict[str, Any] = json.loads(read_range(path, 8, self._data))
        self._tensors.pop("__metadata__", None)
        end = self._data + max((t["data_offsets"][1] for t in self._tensors.values()), default=0)
        if end != size:
            raise SafetensorError(f"it has {size} bytes, and its header says {end}")

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> _SliceOnBucket:
        entry = self._tensors[name]
        start = self._data + entry["data_offsets"][0]
        return _SliceOnBucket(self._path, tuple(entry["shape"]), entry["dtype"], start)


@dataclass(frozen=True)
class _SliceOnBucket:
    """A tensor on a bucket: `[box]` reads the rows that the box touches."""

    path: Path
    shape: tuple[int, ...]
    code: str
    start: int

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return self.code

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        dtype = jnp.dtype(_DTYPES[self.code])
        first, last, _ = box[0].indices(self.shape[0])
        row = math.prod(self.shape[1:]) * dtype.itemsize
        data = read_range(self.path, self.start + first * row, self.start + last * row)
        rows = np.frombuffer(data, dtype).reshape(last - first, *self.shape[1:])
        return rows[:, *box[1:]]


def stored_names(spec: ParamSpec) -> list[str]:
    """The checkpoint tensors of a weight: one, or one per layer, or per layer and expert.

    Copies that a prediction module has of it are not among them.
    """
    return [name for name, _ in _entries(spec)]


def _entries(spec: ParamSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each tensor of a weight, and the index that its value has there."""
    stacked = int(spec.per_layer) + int(spec.per_expert)
    for index in np.ndindex(spec.shape[:stacked]):
        layer, expert = (*index, 0, 0)[:2]
        name = spec.stored.name.format(layer=spec.stored.first_layer + layer, expert=expert)
        yield name, index


def _head_names(model: ModelConfig, *heads: Head) -> set[str]:
    """The tensors of these heads on a decoder like `model`."""
    untied = replace(model, tie_word_embeddings=False)
    declared = [declare_head(replace(untied, head=head)) for head in heads]
    return {name for specs in declared for spec in specs.values() for name in stored_names(spec)}


def _check(
    tensors: Tensors,
    declared: Mapping[str, Any],
    model: ModelConfig,
    directory: Path,
    *,
    ignored: Set[str],
) -> None:
    found, dtypes = tensors.shapes(), tensors.dtypes()
    specs = jax.tree.leaves(declared, is_leaf=is_spec)
    expected = {name: spec.stored.file_shape for spec in specs for name in stored_names(spec)}
    missing = sorted(expected.keys() - found.keys())
    copies = {copy for spec in specs for copy in spec.stored.copies}
    # A prediction module (MTP) is stored as a layer behind the last; a model may do without it.
    module = f"model.layers.{model.num_hidden_layers}."
    lost = [name for name in missing if name.startswith(module)]
    if lost and lost == missing and not any(name.startswith(module) for name in found):
        raise ValueError(
            f"{directory} has no prediction module ({module}*), though num_nextn_predict_layers = "
            f"{model.num_nextn_predict_layers}: transformers leaves it out of what it writes. Set "
            "multi_token_prediction of the model to false, or copy the layer's tensors from the "
            "model that this one was made of"
        )
    unused = f"{module}eh_proj.weight" in found and not model.num_nextn_predict_layers
    passed_over = (module,) if unused else ()
    extra = sorted(
        name
        for name in found.keys() - expected.keys() - copies - ignored
        if not (name.endswith(_DERIVED) or name.startswith(passed_over))
    )
    wrong = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    unread = [
        f"{name} is {dtypes[name]}"
        for name in expected
        if name in dtypes and dtypes[name] not in _DTYPES
    ]
    problems = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (
            ("missing", missing),
            ("not known", extra),
            ("misshapen", wrong),
            (f"of a dtype other than {', '.join(_DTYPES)}", unread),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{directory} does not hold the {model.architecture} model that its config.json "
            f"describes; {'; '.join(problems)}. Check that config.json and the weights belong "
            "together"
        )
    # An output matrix of its own means that the weights are not tied, and transformers would use
    # it.
    output = "lm_head.weight"
    if (
        model.head == "language"
        and model.tie_word_embeddings
        and output in found
        and not _equal(tensors, output, "model.embed_tokens.weight")
    ):
        raise ValueError(
            f"{directory}: config.json says tie_word_embeddings = true, but {output} differs from "
            "model.embed_tokens.weight; set tie_word_embeddings to false there"
        )


def _equal(tensors: Tensors, a: str, b: str) -> bool:
    shapes = tensors.shapes()
    rows = shapes[a][0]
    spans = (slice(at, min(at + _COMPARED_ROWS, rows)) for at in range(0, rows, _COMPARED_ROWS))
    return shapes[a] == shapes[b] and all(
        np.array_equal(tensors.read(a, (span,)), tensors.read(b, (span,))) for span in spans
    )


def load_params(
    path: str | Path,
    model: ModelConfig,
    layout: Layout,
    dtype: DTypeLike = jnp.float32,
    *,
    new_head: jax.Array | None = None,
) -> Params:
    """Read weights straight into sharded arrays.

    One tensor is in host memory at a time, and of it only the rows that a device needs: a layer
    is read, sent and written into its place of the stacked array, which only devices hold.

    Args:
      model: what the directory holds.
      new_head: a key. The directory holds the decoder of `model` under another head (a reward
        model starts from a language model): that head is passed over, and the weights of
        `declare_head(model)`, these alone, are drawn from the key.

    Raises:
      ValueError: tensors that are missing, not known or misshapen; all are named. Or the head
        that would be drawn is there.
    """
    directory = resolve(str(path))
    tensors = Tensors(directory)
    declared, abstract = declare(model), abstract_params(model, layout, dtype)
    # A tied checkpoint may hold a copy of the embedding.
    ignored = _head_names(model, "language") if model.tie_word_embeddings else set()
    if new_head is not None:
        own = _head_names(model, model.head)
        if present := sorted(own & tensors.shapes().keys()):
            raise ValueError(
                f"{directory} has a {model.head} head already ({', '.join(present)}); load it "
                "without new_head, or a trained head would be lost"
            )
        ignored = _head_names(model, *get_args(Head)) - own
        head = declare_head(model)
        declared = {name: node for name, node in declared.items() if name not in head}
        abstract = {name: abstract[name] for name in declared}
    _check(tensors, declared, model, directory, ignored=ignored)

    def load(spec: ParamSpec, target: jax.ShapeDtypeStruct) -> jax.Array:
        names, kind = stored_names(spec), target.dtype
        if not spec.per_layer:
            return _read(tensors, names, spec, spec.shape, kind, target.sharding)
        shape, sharding = spec.shape[1:], layout.sharding(spec.axes[1:])
        stack = jnp.zeros(spec.shape, kind, device=target.sharding)
        for layer in range(spec.shape[0]):
            each = len(names) // spec.shape[0]
            own = names[layer * each : (layer + 1) * each]
            value = _read(tensors, own, spec, shape, kind, sharding)
            # Waiting keeps the host from reading ahead of the transfers.
            stack = _put_layer(stack, value, np.int32(layer), target.sharding)
            stack = jax.block_until_ready(stack)
        return stack

    params: Params = jax.tree.map(load, declared, abstract, is_leaf=is_spec)
    if new_head is not None:
        params |= init_head(new_head, model, layout, dtype)
    return params


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put_layer(
    stack: jax.Array, value: jax.Array, layer: jax.Array, sharding: NamedSharding
) -> jax.Array:
    stack = jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)
    return jax.lax.with_sharding_constraint(stack, sharding)


def _read(
    tensors: Tensors,
    names: list[str],
    spec: ParamSpec,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    sharding: NamedSharding,
) -> jax.Array:
    """A weight, or a layer of it, from its tensor, or from those of its experts."""
    shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        wanted = index or tuple(slice(None) for _ in shape)
        bounds = tuple(s.indices(size)[:2] for s, size in zip(wanted, shape, strict=True))
        if bounds not in shards:  # devices with the same shard share one copy on the host
            if spec.per_expert:  # only those that the device holds
                own = names[slice(*bounds[0])]
                parts = [_read_part(tensors, name, spec, bounds[1:], dtype) for name in own]
                shards[bounds] = np.stack(parts)
            else:
                shards[bounds] = _read_part(tensors, names[0], spec, bounds, dtype)
        return shards[bounds]

    return jax.make_array_from_callback(shape, sharding, part)


def _read_part(
    tensors: Tensors,
    name: str,
    spec: ParamSpec,
    bounds: tuple[tuple[int, int], ...],
    dtype: DTypeLike,
) -> np.ndarray:
    """The part `bounds` of a weight, [start, stop) by dimension.

    A file merges dimensions ([heads * head_dim, hidden]), in which a range of heads is a range of
    rows; dimensions within a merged one are read whole and cut afterwards.
    """
    stored = spec.stored
    split = [(0, 0)] * len(bounds)
    for ours, theirs in enumerate(stored.order):  # our dimension j is the file's order[j]
        split[theirs] = bounds[ours]
    box, sizes, cut = [], [], []
    for group in _merged(stored.shape, stored.file_shape):
        start, stop = split[group[0]]
        inner = [stored.shape[i] for i in group[1:]]
        box.append(slice(start * math.prod(inner), stop * math.prod(inner)))
        sizes += [stop - start, *inner]
        cut += [slice(None), *(slice(*split[i]) for i in group[1:])]
    block = tensors.read(name, tuple(box)).reshape(sizes)[tuple(cut)]
    return np.ascontiguousarray(block.transpose(stored.order), dtype)


def _merged(split: tuple[int, ...], file_shape: tuple[int, ...]) -> Iterator[list[int]]:
    """For each dimension of the file, those of `split` that it merges."""
    position = 0
    for size in file_shape:
        group = [position]
        while math.prod(split[i] for i in group) != size:
            group.append(group[-1] + 1)
        position = group[-1] + 1
        yield group


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
    """Write a directory that transformers loads; an earlier model there is replaced when complete.

    Every process of a `jax.distributed` run calls this; process 0 writes.

    Args:
      directory: written under a temporary name beside it and renamed, so that a killed export
        leaves nothing half-written under this name. On a bucket (`gs://...`), which has no rename,
        each file is there when it is complete, and `config.json`, without which there is no model,
        is removed first and written last.
      params: the tree of `declare(model)`.
      tokenizer: saved beside the weights.
      generation_config: content of `generation_config.json` (EOS ids); ids that it does not give
        are the tokenizer's. A model without logits generates nothing: only its `config.json` has
        the ids.
      dtype: of the stored weights; default: that of each array.
      max_shard_bytes: most bytes of a safetensors file, unless one tensor is larger.

    Raises:
      ValueError: `directory` holds something else than a model, a weight is not as `model` says,
        a dtype is none that is stored, or a model with a scalar head has no fit padding token.
    """
    if model.head == "scalar":
        check_padding(tokenizer, generation_config)
    bucket = on_bucket(directory)
    target = locate(directory) if bucket else Path(os.path.abspath(directory))
    unknown = target.exists() and not (target / "config.json").is_file()
    if unknown and not bucket and os.listdir(target):
        raise ValueError(
            f"{target} exists and has no config.json: an export replaces a model, nothing else; "
            "choose another directory"
        )
    tensors = _stored_tensors(params, model, dtype)
    if jax.process_index() == 0:
        configs = _configs(tensors, model, tokenizer, generation_config)
        write = _write_to_bucket if bucket else _write_and_rename
        write(target, tensors, configs, tokenizer, max_shard_bytes)
    else:
        for tensor in tensors:
            tensor.gather()  # this process's part in the collectives
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"export {target.name}")


def check_padding(
    tokenizer: PreTrainedTokenizerBase | None, generation_config: Mapping[str, Any] | None = None
) -> None:
    """Whether a reward model with this tokenizer gives the same scores in transformers.

    A sequence classification there has no lengths: it reads a text's score at the last token that
    is not `pad_token_id`. Without one it takes no batches, and where EOS is the padding it would
    read the token before EOS. Ask before training: `export` refuses, too, but after it.

    Raises:
      ValueError: there is no padding token, or it is the EOS that ends every text.
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


def _special_ids(
    tokenizer: PreTrainedTokenizerBase | None, generation_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The ids that both configs of a directory name; those of the generation config come first."""
    ids = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = (generation_config or {}).get(key)
        if value is None:
            value = getattr(tokenizer, key, None)
        if value is not None:
            ids[key] = value
    return ids


def _configs(
    tensors: list[_Tensor],
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: Mapping[str, Any] | None,
) -> dict[str, dict[str, Any]]:
    """`generation_config.json`, where there is one, and `config.json`: name -> content."""
    exact = {
        name
        for spec in jax.tree.leaves(declare(model), is_leaf=is_spec)
        if spec.exact
        for name in stored_names(spec)
    }
    kinds = {jnp.dtype(_DTYPES[t.code]).name for t in tensors if t.name not in exact}
    kind = kinds.pop() if len(kinds) == 1 else "float32"
    # transformers 5 reads `dtype`, earlier releases `torch_dtype`.
    ids = _special_ids(tokenizer, generation_config)
    config = {**model.to_hugging_face(), "dtype": kind, "torch_dtype": kind, **ids}
    generation = {**(generation_config or {}), **ids}
    written = generation and model.head == "language"
    return {**({"generation_config.json": generation} if written else {}), "config.json": config}


def _write_small(
    directory: Path,
    configs: Mapping[str, Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    for name, content in configs.items():
        _write_json(directory / name, content)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))


def _write_to_bucket(
    target: Path,
    tensors: list[_Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_bytes: int,
) -> None:
    config = target / "config.json"
    config.unlink(missing_ok=True)
    for stale in target.glob("model*.safetensors*"):
        stale.unlink()
    with TemporaryDirectory(prefix="r1jax-") as scratch:
        _write_small(Path(scratch), configs, tokenizer)
        _write_weights(target, tensors, max_shard_bytes)
        for path in sorted(Path(scratch).rglob("*"), key=lambda path: path.name == config.name):
            if path.is_file():
                (target / path.relative_to(scratch)).write_bytes(path.read_bytes())


def _write_and_rename(
    target: Path,
    tensors: list[_Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_bytes: int,
) -> None:
    partial_dir = target.with_name(target.name + ".partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    partial_dir.mkdir(parents=True)
    _write_small(partial_dir, configs, tokenizer)
    _write_weights(partial_dir, tensors, max_shard_bytes)
    if target.exists():
        # Moved aside first: removing takes longer than a rename and can fail half-way.
        replaced = target.with_name(target.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        partial_dir.rename(target)
        shutil.rmtree(replaced)
    else:
        partial_dir.rename(target)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be written; `gather` brings it to the host as the file holds it."""

    name: str
    shape: tuple[int, ...]
    code: str
    gather: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(_DTYPES[self.code]).itemsize


@jax.jit
def _entry_of(stack: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    for position in index:
        stack = jax.lax.dynamic_index_in_dim(stack, position, 0, keepdims=False)
    return stack


def _stored_tensors(params: Params, model: ModelConfig, dtype: DTypeLike | None) -> list[_Tensor]:
    declared = jax.tree.leaves_with_path(declare(model), is_leaf=is_spec)
    leaves = dict(jax.tree.leaves_with_path(params))
    misfits = sorted(
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path in leaves.keys() ^ {path for path, _ in declared}
    )
    if misfits:
        raise ValueError(f"params and the model config differ in {', '.join(misfits)}")
    tensors = []
    for path, spec in declared:
        leaf = leaves[path]
        kind = jnp.dtype(spec.dtype(dtype or leaf.dtype))
        if leaf.shape != spec.shape:
            raise ValueError(f"{spec.stored.name}: shape {leaf.shape}, expected {spec.shape}")
        if kind not in _CODES:
            raise ValueError(
                f"{spec.stored.name}: {kind} is not stored; give a dtype of "
                f"{', '.join(known.name for known in _CODES)}"
            )
        copies = [(name, ()) for name in spec.stored.copies]
        for name, index in [*_entries(spec), *copies]:
            gather = partial(_gather, leaf, spec, index, kind)
            tensors.append(_Tensor(name, spec.stored.file_shape, _CODES[kind], gather))
    return tensors


def _gather(leaf: jax.Array, spec: ParamSpec, index: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    value = _entry_of(leaf, tuple(np.int32(i) for i in index)) if index else leaf
    if not (value.is_fully_addressable or value.is_fully_replicated):
        assert isinstance(value.sharding, NamedSharding)
        everywhere = NamedSharding(value.sharding.mesh, PartitionSpec())
        value = jax.jit(lambda x: x, out_shardings=everywhere)(value)
    inverse = np.argsort(spec.stored.order)
    array = np.asarray(value).transpose(inverse).reshape(spec.stored.file_shape)
    return np.ascontiguousarray(array, kind)


def _write_weights(directory: Path, tensors: list[_Tensor], max_shard_bytes: int) -> None:
    shards: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        held = sum(other.nbytes for other in shards[-1])
        if shards[-1] and held + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        _write_safetensors(directory / _SINGLE, tensors)
        return
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(directory / file, shard)
        weight_map |= {tensor.name: file for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / _INDEX, content)


def _write_safetensors(path: Path, tensors: list[_Tensor]) -> None:
    """Write one file tensor by tensor; the library's writer wants all of them in memory.

    The format (huggingface.co/docs/safetensors): the header's length in 8 bytes, the JSON header
    padded to a multiple of 8, then the data without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.code, "shape": tensor.shape, "data_offsets": offsets}
        at += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            file.write(tensor.gather().view(np.uint8).data)
