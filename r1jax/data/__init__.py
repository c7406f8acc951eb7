"""Data on the host: where examples come from, and how they become token ids.

Nothing here imports jax: worker processes and tools may use it without claiming an accelerator.
"""

from r1jax.data.example import Example
from r1jax.data.examples import load_examples
from r1jax.data.packing import PackedRows
from r1jax.data.prompts import PromptIterator, PromptReport, Taken, encode_prompts
from r1jax.data.templates import TEMPLATES, Prompt, render
from r1jax.data.tokenizers import load_tokenizer, save_tokenizer, stop_token_ids

__all__ = [
    "TEMPLATES",
    "Example",
    "PackedRows",
    "Prompt",
    "PromptIterator",
    "PromptReport",
    "Taken",
    "encode_prompts",
    "load_examples",
    "load_tokenizer",
    "render",
    "save_tokenizer",
    "stop_token_ids",
]
