"""Documents to train on: token ids, and which of them are targets of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from r1jax.data.example import Example
from r1jax.data.tokenizers import begins_with_bos, encode_texts
from r1jax.settings.section import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One sequence, which attends to no other in its row.

    tokens: int32 [n]. trained: bool [n]; whether the model learns to predict the token from those
    before it. The first is never trained, so `trained.sum()` is the number of terms in the loss.
    """

    tokens: np.ndarray
    trained: np.ndarray

    def __post_init__(self) -> None:
        if self.tokens.shape != self.trained.shape or self.tokens.ndim != 1:
            raise ValueError(
                f"tokens {self.tokens.shape} and trained {self.trained.shape}: a document needs "
                "one flag for each of its tokens"
            )
        if self.trained[:1].any():
            raise ValueError("the first token of a document follows nothing: it cannot be trained")


def encode_documents(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[Document]:
    """Pretraining: each `Example.text` with BOS (if the tokenizer's models use one) and EOS.

    Every token but the first is trained. Raises ValueError for an example without text, and for a
    tokenizer without EOS token or without a token for a text.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so documents could not be told apart")
    bos = str(tokenizer.bos_token) if begins_with_bos(tokenizer) else ""
    eos = str(tokenizer.eos_token)
    texts = []
    for example in examples:
        if example.text is None:
            problem = f"row {example.id} has no text to train on; name its column: {{text: COLUMN}}"
            raise SettingError("fields", problem)
        opening = "" if example.text.startswith(bos) else bos
        closing = "" if example.text.endswith(eos) else eos
        texts.append(f"{opening}{example.text}{closing}")
    return [
        Document(np.asarray(ids, np.int32), np.arange(len(ids)) > 0)
        for ids in encode_texts(texts, tokenizer)
    ]
