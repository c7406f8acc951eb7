"""Data on the host: where examples come from, and how they become token ids.

Nothing here imports jax, and transformers is imported only where a tokenizer is made.
"""

from r1jax.data.conversations import encode_conversations
from r1jax.data.documents import Document, encode_documents
from r1jax.data.example import Example, Message
from r1jax.data.examples import load_examples
from r1jax.data.packing import PackedRows, packed_once
from r1jax.data.preferences import (
    EncodedPreference,
    LabelledResponse,
    PreferenceIterator,
    PreferencePair,
    encode_preferences,
    encode_responses,
    load_labelled,
    load_pairs,
    pad_texts,
    preference_arrays,
    scored_text,
)
from r1jax.data.prompts import (
    Prompt,
    PromptBatch,
    PromptIterator,
    encode_prompt,
    encode_prompts,
)
from r1jax.data.tokenizers import load_tokenizer, stop_token_ids

__all__ = [
    "Document",
    "EncodedPreference",
    "Example",
    "LabelledResponse",
    "Message",
    "PackedRows",
    "PreferenceIterator",
    "PreferencePair",
    "Prompt",
    "PromptBatch",
    "PromptIterator",
    "encode_conversations",
    "encode_documents",
    "encode_preferences",
    "encode_prompt",
    "encode_prompts",
    "encode_responses",
    "load_examples",
    "load_labelled",
    "load_pairs",
    "load_tokenizer",
    "packed_once",
    "pad_texts",
    "preference_arrays",
    "scored_text",
    "stop_token_ids",
]
