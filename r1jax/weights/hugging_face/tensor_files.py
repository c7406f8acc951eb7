"""Tensors in safetensors files, local or on a bucket: read box by box, written one by one.

The format (huggingface.co/docs/safetensors): the header's length in 8 bytes, the JSON header padded
to a multiple of 8, then the data. Its library has no float8 for numpy and reads no buckets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

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


@dataclass(frozen=True)
class TensorType:
    """A tensor's shape, and the format's name of its dtype (`BF16`)."""

    shape: tuple[int, ...]
    code: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.code].itemsize


class Tensors:
    """The tensors of a directory, by name, with their `types` from the files' headers."""

    def __init__(self, directory: Path) -> None:
        """Raises ValueError for files that are missing, cut off or of another format."""
        index = directory / INDEX
        if index.is_file():
            names: Mapping[str, str] = read_mapping(index).get("weight_map", {})
            files = sorted(set(names.values()))
            missing = [file for file in files if not (directory / file).is_file()]
            if missing:
                raise ValueError(
                    f"{directory} lacks {', '.join(missing)}, which {INDEX} lists; copy or "
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
            self.types |= file.types
            self._locations |= {tensor: (file, start) for tensor, start in file.starts.items()}
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
        entries: JsonObject = json.loads(self._bytes(8, data))
        entries.pop("__metadata__", None)
        end = data + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if end != size:
            raise ValueError(f"it has {size} bytes, and its header says {end}")
        self.types = {
            name: TensorType(tuple(e["shape"]), e["dtype"]) for name, e in entries.items()
        }
        self.starts = {name: data + entry["data_offsets"][0] for name, entry in entries.items()}
        for name, tensor in self.types.items():
            first, last = entries[name]["data_offsets"]
            if tensor.code in DTYPES and tensor.nbytes != last - first:
                raise ValueError(f"{name} {list(tensor.shape)} has {last - first} bytes")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop), mapped where the file is local."""
        if self._local is not None:
            return self._local[start:stop]
        return np.frombuffer(read_range(self._path, start, stop), np.uint8)

    def _bytes(self, start: int, stop: int) -> bytes:
        return self.read(start, stop).tobytes() if stop > start else b""


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
