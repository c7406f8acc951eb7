"""Prompts as token ids, and the order in which a run visits them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from r1jax.data.chat_template import RenderedPrompt, check_template, render_prompt
from r1jax.data.example import Example
from r1jax.data.examples import row_label
from r1jax.data.order import IndexStream, fingerprint, id_bytes
from r1jax.data.tokenizers import encode_texts
from r1jax.files import JsonObject
from r1jax.settings.section import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1jax.settings.data import DataSection

_BATCH = 4096  # Texts per tokenizer call: large enough to be fast, small enough for memory.


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A question as the model gets it.

    id: the example's, part of the sampling key. text: exactly what is encoded, with any BOS.
    prefill: its end that belongs to the completion, such as `<think>\\n`, or "": rewards get
    prefill + completion, or a format reward never finds the opening tag.
    token_ids: int32 [tokens], of `text`. question: the example's prompt without any template.
    columns: all columns of the example's row.
    """

    id: int
    text: str
    prefill: str
    token_ids: np.ndarray
    question: str
    answer: str
    domain: str = ""
    columns: JsonObject = field(default_factory=dict, repr=False)


def encode_prompt(
    example: Example, section: DataSection, tokenizer: PreTrainedTokenizerBase
) -> Prompt:
    """Renders one example by the section's template and encodes it, whatever its length.

    The text holds its BOS itself and is encoded without adding special tokens, so that no template
    can end up with two. Raises ValueError for a template that does not apply, or text that the
    tokenizer cannot encode.
    """
    check_template(section)
    rendered = render_prompt(example.prompt, section, tokenizer, example.history)
    return _to_prompt(example, rendered, encode_texts([rendered.text], tokenizer)[0])


def check_prompts(
    examples: Sequence[Example], section: DataSection, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises ValueError where `encode_prompts` would for want of a prompt that is short enough.

    It looks no further than the first one that is.
    """
    for example in examples:
        text = render_prompt(example.prompt, section, tokenizer, example.history).text
        if len(encode_texts([text], tokenizer)[0]) <= section.max_prompt_tokens:
            return
    encode_prompts(examples, section, tokenizer)


def encode_prompts(
    examples: Sequence[Example], section: DataSection, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], str]:
    """Renders and encodes every example; drops those that are too long.

    Returns the prompts in the order of `examples`, each of 1 .. `section.max_prompt_tokens` tokens,
    and a sentence that counts them. Raises ValueError: all prompts are too long, one has no tokens,
    or a template does not apply.
    """
    check_template(section)
    prompts: list[Prompt] = []
    longest = total = 0
    shortest = sys.maxsize
    for start in range(0, len(examples), _BATCH):
        batch = [examples[i] for i in range(start, min(start + _BATCH, len(examples)))]
        rendered = [
            render_prompt(example.prompt, section, tokenizer, example.history) for example in batch
        ]
        encoded = encode_texts([each.text for each in rendered], tokenizer)
        for example, each, ids in zip(batch, rendered, encoded, strict=True):
            if not ids:
                raise SettingError(
                    "source",
                    f"{row_label(section, example.id)} has an empty prompt; the sampler needs at "
                    "least one token. Use another template or remove the row",
                )
            total, longest = total + 1, max(longest, len(ids))
            shortest = min(shortest, len(ids))
            if len(ids) <= section.max_prompt_tokens:
                prompts.append(_to_prompt(example, each, ids))
    if not total:
        raise SettingError("source", "there are no examples to make prompts of")
    if not prompts:
        raise SettingError(
            "max_prompt_tokens",
            f"all {total} prompts have more than {section.max_prompt_tokens} tokens (the shortest "
            f"has {shortest}, the longest {longest}); raise it",
        )
    report, too_long = f"{len(prompts)} of {total} prompts", total - len(prompts)
    if too_long:
        return prompts, f"{report}; {too_long} too long (the longest has {longest} tokens)"
    return prompts, f"{report}, the longest has {longest} tokens"


def _to_prompt(example: Example, rendered: RenderedPrompt, ids: list[int]) -> Prompt:
    return Prompt(
        id=example.id,
        text=rendered.text,
        prefill=rendered.prefill,
        token_ids=np.asarray(ids, np.int32),
        question=example.prompt,
        answer=example.answer,
        domain=example.domain,
        columns=example.columns,
    )


class PromptStream:
    """An endless, seeded, resumable order of prompts (see `IndexStream`), the same in all
    processes.

    A state of other prompts or of another seed is refused.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        if not prompts:
            raise ValueError("PromptStream needs at least one prompt")
        self.prompts = prompts
        self._indices = IndexStream(
            len(prompts),
            seed=seed,
            fingerprint=fingerprint(
                (prompt.id, (id_bytes(prompt.token_ids), prompt.answer.encode()))
                for prompt in prompts
            ),
        )
        self.state, self.restore = self._indices.state, self._indices.restore

    def fork(self) -> PromptStream:
        """A stream at the same position, which moves on alone."""
        other = copy.copy(self)
        other._indices = copy.copy(self._indices)
        other.state, other.restore = other._indices.state, other._indices.restore
        return other

    def following(self) -> int:
        """The index of the next prompt."""
        (index,), _ = self._indices.take(1)
        return index
