"""Hugging Face directories: read tensor by tensor into sharded arrays, and written back.

They are local, or on a bucket (`gs://...`), where tensors are read by ranges of bytes. Names and
shapes of tensors come from `r1jax.models.declare`.
"""

from r1jax.weights.hugging_face.directories import (
    differences_from_published,
    find_config,
    read_config,
    read_generation_config,
    resolve,
)
from r1jax.weights.hugging_face.exporting import check_padding, convert, export, with_padding
from r1jax.weights.hugging_face.fp8 import dequantise, is_quantised, quantise
from r1jax.weights.hugging_face.loading import load_params
from r1jax.weights.hugging_face.names import stored_names, stored_shapes
from r1jax.weights.hugging_face.tensor_files import Tensors

__all__ = [
    "Tensors",
    "check_padding",
    "convert",
    "dequantise",
    "differences_from_published",
    "export",
    "find_config",
    "is_quantised",
    "load_params",
    "quantise",
    "read_config",
    "read_generation_config",
    "resolve",
    "stored_names",
    "stored_shapes",
    "with_padding",
]
