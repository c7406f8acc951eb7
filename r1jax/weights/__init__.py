"""Weights on disk, in Hugging Face's layout."""

from r1jax.weights.hugging_face import export, load_params, read_config

__all__ = ["export", "load_params", "read_config"]
