"""Weights in fp8, a scale to each block of 128 x 128, as DeepSeek-V3 and R1 are released.

A matrix `X.weight` [out, in] is stored as codes in float8_e4m3fn, and beside it
`X.weight_scale_inv` [ceil(out / 128), ceil(in / 128)] in float32: a weight is its code times the
scale of its block (README_WEIGHTS.md of DeepSeek-V3, and `weight_dequant` of its inference code).
"""

from __future__ import annotations

import re

import numpy as np

from r1jax.files import JsonObject
from r1jax.weights.hugging_face.tensor_files import FLOAT8, Tensors

BLOCK = 128
# In config.json. The last entry says how an engine multiplies with such weights.
QUANTIZATION_CONFIG: JsonObject = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
    "activation_scheme": "dynamic",
}
# Which of a checkpoint's matrices are quantised, as in the released index: the projections of
# attention, MLPs and experts. Neither are the router, the embedding, the output matrix, and the
# prediction module's `eh_proj`.
_QUANTISED = re.compile(r"\.(self_attn|mlp)\.(.*\.)?\w+_proj(_with_mqa)?\.weight$")
_LARGEST = np.float32(448)  # of e4m3, which has no infinity
# The value of each code. Looking them up is three times as fast as converting them.
_VALUES = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)


def is_quantised(config: JsonObject) -> bool:
    """Whether a `config.json` says that weights are in fp8, block by block.

    Raises ValueError if they are quantised in another way.
    """
    given = config.get("quantization_config")
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"quantization_config is a {type(given).__name__}, expected a mapping")
    if given is None:
        return False
    wrong = {k: given.get(k) for k, v in QUANTIZATION_CONFIG.items() if given.get(k) != v}
    # The dtype of a tensor shows whether it is an exception. Entries that are off do not matter.
    known = {*QUANTIZATION_CONFIG, "modules_to_not_convert"}
    wrong |= {key: value for key, value in given.items() if value and key not in known}
    if wrong:
        raise ValueError(
            f"quantization_config with {_listed(wrong)} is not supported; only "
            f"{_listed(QUANTIZATION_CONFIG)}. Convert the weights to bf16 with their publisher's "
            "tool, and remove quantization_config from config.json"
        )
    return True


def _listed(settings: JsonObject) -> str:
    return ", ".join(f"{key} = {value!r}" for key, value in settings.items())


def is_quantised_matrix(name: str) -> bool:
    """Whether the tensor of this name is in fp8 where a checkpoint is."""
    return _QUANTISED.search(name) is not None


def scale_name(name: str) -> str:
    """The tensor with the scales of another one."""
    return f"{name}_scale_inv"


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of a matrix, partial ones too, along each dimension."""
    return tuple(-(-size // BLOCK) for size in shape)


def dequantise(
    codes: np.ndarray, scales: np.ndarray, start: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """The values of a matrix, or of a box of it, in float32.

    Args:
      codes: [rows, columns], float8_e4m3fn.
      scales: [block rows, block columns] of the blocks that the box touches.
      start: the row and the column of the matrix where the box begins.
    """
    row, column = (at % BLOCK for at in start)  # within the first block
    values: np.ndarray = _VALUES[codes.view(np.uint8)]
    by_column = np.repeat(scales.astype(np.float32), BLOCK, axis=1)
    for index, of_columns in enumerate(by_column[:, column : column + codes.shape[1]]):
        block_row = slice(max(index * BLOCK - row, 0), (index + 1) * BLOCK - row)
        values[block_row] *= of_columns
    return values


def quantise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a matrix [rows, columns] of float32.

    The largest of a block gets the largest code: scale = max |w| / 448, code = w / scale, rounded
    to the nearest (`act_quant` of DeepSeek-V3's inference code; how the released weights were made
    is not reported). So `dequantise` and this give the same codes again, even with a rounding to
    bfloat16 between them; scales differ by a rounding, unless scale times 448 is exact.
    """
    rows, columns = values.shape
    codes = np.empty(values.shape, FLOAT8)
    scales = np.empty(scale_shape(values.shape), np.float32)
    for index, first in enumerate(range(0, rows, BLOCK)):
        block_row = values[first : first + BLOCK]
        of_column = np.abs(block_row).max(axis=0)
        largest = np.maximum.reduceat(of_column, range(0, columns, BLOCK))
        # A block of zeros has a scale, too, by which engines divide.
        scales[index] = np.maximum(largest / _LARGEST, np.finfo(np.float32).tiny)
        codes[first : first + BLOCK] = block_row / np.repeat(scales[index], BLOCK)[:columns]
    return codes, scales


def read_values(tensors: Tensors, name: str, box: tuple[slice, ...]) -> np.ndarray:
    """tensor[box]; where it is stored in fp8, its values in float32."""
    part = tensors.read(name, box)
    if part.dtype != FLOAT8:
        return part
    bounds = [s.indices(n)[:2] for s, n in zip(box, tensors.types[name].shape, strict=True)]
    blocks = tuple(slice(first // BLOCK, -(-last // BLOCK)) for first, last in bounds)
    scales = tensors.read(scale_name(name), blocks)
    return dequantise(part, scales, (bounds[0][0], bounds[1][0]))
