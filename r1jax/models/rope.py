"""Rotary position embeddings (arXiv 2104.09864), of halves or of neighbouring dimensions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from r1jax.models.config import ModelConfig, YarnRopeScaling

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def _inverse_frequencies(config: ModelConfig) -> Float[np.ndarray, " pairs"]:
    """Angular frequencies in radians per token, of the rope_dim / 2 pairs.

    With Llama 3's scaling, wavelengths above `original / low_freq_factor` are stretched by
    `factor`, those below `original / high_freq_factor` are kept, and those between interpolated.
    YaRN does the same by dimensions instead of wavelengths, from `beta_fast` to `beta_slow`.
    """
    exponents = np.arange(0, config.rope_dim, 2, dtype=np.float32) / config.rope_dim
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, YarnRopeScaling):
        kept = 1 - _yarn_ramp(scaling, config.rope_dim, config.rope_theta)
        return (frequencies / scaling.factor * (1 - kept) + frequencies * kept).astype(np.float32)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    smooth = (turns - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * frequencies / scaling.factor + smooth * frequencies).astype(np.float32)


def _yarn_ramp(scaling: YarnRopeScaling, dim: int, theta: float) -> np.ndarray:
    """How far each frequency is divided, from 0 (kept) to 1, float32 [dim / 2]."""

    def pair(turns: float) -> float:
        """The pair of dimensions that makes this number of turns within the original context."""
        per_radian = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(per_radian) / (2 * math.log(theta))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), dim - 1)
    steps = np.arange(dim // 2, dtype=np.float32) - low
    # A ramp without width would divide by 0; DeepSeek's code gives it this one.
    ramp: np.ndarray = np.clip(steps / (high - low or 0.001), 0, 1)
    return ramp


def rotations(
    positions: Int[Array, "*shape"], config: ModelConfig
) -> tuple[Float[Array, "*shape pairs"], Float[Array, "*shape pairs"]]:
    """Cosines and sines of positions, in float32.

    With YaRN they carry what `mscale` sharpens on top of `mscale_all_dim`.
    """
    angles = positions[..., None].astype(jnp.float32) * _inverse_frequencies(config)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnRopeScaling):
        return cos, sin
    ratio = scaling.sharpening(scaling.mscale) / scaling.sharpening(scaling.mscale_all_dim)
    return ratio * cos, ratio * sin


def rotate(
    x: Float[Array, "*shape heads rope_dim"],
    cos: Float[Array, "*shape pairs"],
    sin: Float[Array, "*shape pairs"],
    *,
    interleaved: bool = False,
) -> Float[Array, "*shape heads rope_dim"]:
    """Rotate pairs of dimensions.

    Args:
      interleaved: dimensions 2i and 2i + 1 are a pair (DeepSeek), else i and i + rope_dim / 2. The
        result has the pairs' halves apart in both cases: products of queries and keys do not depend
        on the order.
    """
    wide = x.astype(jnp.float32)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
