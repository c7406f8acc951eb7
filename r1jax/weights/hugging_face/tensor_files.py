"""Tensors in safetensors files, local or on a bucket: read box by box, written one by one.

The format (huggingface.co/docs/safetensors): the header's length in 8 bytes, the JSON header padded
to a multiple of 8, then the data. Its library has no float8 for numpy and reads no buckets.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeGuard

import jax.numpy as jnp
import numpy as np

from r1jax.bucket import on_bucket, read_range
from r1jax.files import JsonObject
from r1jax.weights.hugging_face.directories import read_mapping

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)
DTYPES: dict[str, np.dtype] = {
    "BF16": jnp.dtype(jnp.bfloat16),
    "F16": jnp.dtype(jnp.float16),
    "F32": jnp.dtype(jnp.float32),
    "F8_E4M3": FLOAT8,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_FILE = re.compile(r"[\w.\-]+\.safetensors")  # no path, which could lead elsewhere
_HEADS = ("lm_head.", "score.", "model.")


@dataclass(frozen=True)
class TensorType:
    """A tensor's shape, and the format's name of its dtype (`BF16`)."""

    shape: tuple[int, ...]
    code: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.code].itemsize


class Tensors:
    """The tensors of a directory, by name, with their `types` from the files' headers.

    With several files the index says which file a tensor is read from, whatever else they hold.
    Names without the prefix `model.`, as a decoder is saved without its head, get it.
    """

    def __init__(self, directory: Path) -> None:
        """Raises ValueError for files that are missing, cut off or of another format."""
        index = directory / INDEX
        file_of: Mapping[str, str] | None = None
        if index.is_file():
            file_of = _weight_map(index)
            files = sorted(set(file_of.values()))
            missing = [file for file in files if not (directory / file).is_file()]
            if missing:
                raise ValueError(
                    f"{directory} lacks {_listed(missing)}, which {INDEX} lists; copy or "
                    "download the missing files"
                )
        elif (directory / SINGLE).is_file():
            files = [SINGLE]
        else:
            others = sorted(p.name for p in directory.iterdir() if p.suffix in {".bin", ".pth"})
            raise ValueError(
                f"{directory} has neither {SINGLE} nor {INDEX}"
                + (f", only {', '.join(others[:3])}" if others else "")
                + "; write safetensors with save_pretrained of transformers"
            )
        self.types: dict[str, TensorType] = {}
        self._locations: dict[str, tuple[_File, int]] = {}
        for name in files:
            try:
                file = _File(directory / name)
            except ValueError as error:
                raise ValueError(
                    f"{directory / name} is not a whole safetensors file ({error}); copy or "
                    "download it again"
                ) from error
            here = [each for each in file.types if file_of is None or file_of.get(each) == name]
            self.types |= {tensor: file.types[tensor] for tensor in here}
            self._locations |= {tensor: (file, file.starts[tensor]) for tensor in here}
        if file_of is not None and (absent := sorted(file_of.keys() - self.types.keys())):
            raise ValueError(
                f"{index} has {_listed(absent)} in {file_of[absent[0]]}, which does not hold "
                f"{'it' if len(absent) == 1 else 'them'}; download the index and its files again"
            )
        if "embed_tokens.weight" in self.types:
            for table in (self.types, self._locations):
                renamed = {_with_prefix(name): value for name, value in table.items()}
                table.clear()
                table.update(renamed)  # type: ignore[arg-type]
        # Devices with columns of the same rows read these rows one after another, alternating with
        # those of the scales.
        self._rows = lru_cache(maxsize=2)(_File.read)

    def read(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """tensor[box]. Of a local file this is a view, and only what is copied from it is read; of
        one on a bucket, the rows that the box touches."""
        shape, (file, start) = self.types[name].shape, self._locations[name]
        dtype = DTYPES[self.types[name].code]
        first, last, _ = box[0].indices(shape[0])
        row = math.prod(shape[1:]) * dtype.itemsize
        data = self._rows(file, start + first * row, start + last * row)
        return data.view(dtype).reshape(last - first, *shape[1:])[:, *box[1:]]


class _File:
    """A file whose header is read; `starts`: offset in bytes of each tensor's data."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = None
        if on_bucket(path):
            size = path.stat().length  # type: ignore[attr-defined]  # of etils
        else:
            size = path.stat().st_size
            if size:
                self._local = np.asarray(np.memmap(path, np.uint8, "r"))
        data = 8 + int.from_bytes(self._bytes(0, min(8, size)), "little")
        if size < 8 or data > size:
            raise ValueError(f"it has {size} bytes, fewer than its header")
        self.types, self.starts = {}, {}
        entries = _header(self._bytes(8, data))
        begins = 0
        for name, (tensor, first, last) in sorted(entries.items(), key=lambda e: e[1][1:]):
            if first != begins:  # nothing lies between two tensors, or in both
                what = "overlap" if first < begins else "leave a gap"
                raise ValueError(f"the tensors {what} before {name}: {first}, not {begins}")
            begins = last
            if tensor.code in DTYPES and tensor.nbytes != last - first:
                raise ValueError(f"{name} {list(tensor.shape)} has {last - first} bytes")
            self.types[name], self.starts[name] = tensor, data + first
        if data + begins != size:
            raise ValueError(f"it has {size} bytes, and its header says {data + begins}")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop), mapped where the file is local."""
        if self._local is not None:
            return self._local[start:stop]
        return np.frombuffer(read_range(self._path, start, stop), np.uint8)

    def _bytes(self, start: int, stop: int) -> bytes:
        return self.read(start, stop).tobytes() if stop > start else b""


def _weight_map(index: Path) -> Mapping[str, str]:
    """Tensor -> file in the index's directory; raises ValueError where it says something else."""
    given = read_mapping(index).get("weight_map")
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{index}: weight_map has to map tensors to files; download it again")
    for name, file in given.items():
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise ValueError(
                f"{index}: weight_map.{name} = {file!r} is not a safetensors file beside it; "
                "download it again"
            )
    return given


def _header(text: bytes) -> dict[str, tuple[TensorType, int, int]]:
    """Tensor -> type, and the first byte of its data and the one behind it."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"its header is a {type(entries).__name__}")
    entries.pop("__metadata__", None)
    read = {}
    for name, entry in entries.items():
        parts = entry if isinstance(entry, dict) else {}
        shape, code, offsets = (parts.get(key) for key in ("shape", "dtype", "data_offsets"))
        if not (_counts(shape) and isinstance(code, str) and _counts(offsets)):
            raise ValueError(f"its header says {json.dumps(entry)[:80]} of {name}")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise ValueError(f"data_offsets of {name} = {offsets}")
        read[name] = TensorType(tuple(shape), code), offsets[0], offsets[1]
    return read


def _counts(value: object) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers of at least 0."""
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _with_prefix(name: str) -> str:
    return name if name.startswith(_HEADS) else f"model.{name}"


def _listed(names: Sequence[str]) -> str:
    """Up to eight names, and how many follow."""
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + rest


@dataclass(frozen=True)
class StoredWeight:
    """A weight as files hold it: one tensor, or codes and their scales, which lie in one file.

    tensors: name -> type. values: brings the tensors to the host, in this order.
    """

    tensors: Mapping[str, TensorType]
    values: Callable[[], tuple[np.ndarray, ...]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def write_weights(directory: Path, weights: list[StoredWeight], max_shard_bytes: int) -> None:
    """Writes one file, or several of at most `max_shard_bytes` and an index; splits no weight."""
    shards: list[list[StoredWeight]] = [[]]
    for weight in weights:
        held = sum(other.nbytes for other in shards[-1])
        if shards[-1] and held + weight.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(weight)
    if len(shards) == 1:
        _write_safetensors(directory / SINGLE, weights)
        return
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(directory / file, shard)
        weight_map |= {name: file for weight in shard for name in weight.tensors}
    total = sum(weight.nbytes for weight in weights)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX, content)


def write_json(path: Path, content: JsonObject) -> None:
    """Writes a JSON file as transformers does; for folders that are renamed when complete."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_safetensors(path: Path, weights: list[StoredWeight]) -> None:
    """Writes one file weight by weight; the library's writer needs all of them in memory."""
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    at = 0
    for weight in weights:
        for name, tensor in weight.tensors.items():
            offsets = [at, at + tensor.nbytes]
            header[name] = {"dtype": tensor.code, "shape": tensor.shape, "data_offsets": offsets}
            at += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for weight in weights:
            for value in weight.values():
                file.write(value.view(np.uint8).data)
