"""From a question to exactly the text that the model continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import TemplateError

from r1jax.data.example import Example, Message
from r1jax.data.tokenizers import begins_with_bos, encode_texts
from r1jax.settings.names import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1jax.settings.data import DataSection

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: {prompt}{stop} Assistant:"
)
"""DeepSeek-R1 paper (arXiv 2501.12948), table 1. There `prompt` is followed by a full stop; a
question that brings its own end mark gets no second one, which is a choice."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A question as the model gets it.

    Attributes:
        id: The example's id, part of the sampling key.
        text: Exactly what is encoded, BOS included when there is one.
        prefill: The end of `text` that belongs to the answer, such as `<think>\\n`, or "". Rewards
            must see prefill + completion, or a format reward never finds the opening tag.
        token_ids: int32 [tokens], the ids of `text`.
        question: The example's prompt without any template.
        answer: The reference answer.
        domain: The example's domain.
    """

    id: int
    text: str
    prefill: str
    token_ids: np.ndarray
    question: str
    answer: str
    domain: str = ""


def render_chat(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, open_answer: bool
) -> str:
    """The tokenizer's chat template on `messages`, and with `open_answer` the assistant's header.

    Raises:
        ValueError: there is no chat template, or it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "template: chat, but the tokenizer has no chat template; use template: r1_zero or plain"
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_answer)
        )
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the messages: {error}") from error


def chat_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text that the assistant continues after `messages`, and its prefill."""
    text = render_chat(messages, tokenizer, open_answer=True)
    turn = render_chat(messages, tokenizer, open_answer=False)
    # Only what the generation prompt adds can be a prefill: a question may well say "<think>".
    # A template that ignores the flag (or rewrites the turn) is read from the question's end on.
    follows = text.startswith(turn) and len(text) > len(turn)
    question = messages[-1].content
    opened = text[len(turn) if follows else text.rfind(question) + len(question) :]
    at = opened.find("<think>")
    return text, opened[at:] if at >= 0 else ""


def _chat(
    question: str, system_prompt: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    system = [] if system_prompt is None else [Message("system", system_prompt)]
    return chat_prompt([*system, Message("user", question)], tokenizer)


def _r1_zero(
    question: str, system_prompt: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    del system_prompt
    stop = "" if question.endswith((".", "?", "!", "。", "？", "！")) else "."
    # Not str.format: a question may hold braces.
    text = R1_ZERO.replace("{stop}", stop).replace("{prompt}", question)
    return _with_bos(text, tokenizer), ""


def _plain(
    question: str, system_prompt: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    del system_prompt
    return _with_bos(question, tokenizer), ""


def _with_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    bos = tokenizer.bos_token
    if begins_with_bos(tokenizer) and not text.startswith(str(bos)):
        return f"{bos}{text}"
    return text


_Template = Callable[[str, "str | None", "PreTrainedTokenizerBase"], tuple[str, str]]

TEMPLATES: Mapping[str, _Template] = MappingProxyType(
    {"chat": _chat, "r1_zero": _r1_zero, "plain": _plain}
)
"""Name -> function of (question, system prompt, tokenizer) to (text, prefill)."""


def check_template(section: DataSection) -> None:
    """Raises ValueError when the section's template is unknown or would ignore a setting."""
    if section.template not in TEMPLATES:
        hint = nearest(section.template, TEMPLATES)
        raise ValueError(
            f"template = {section.template!r}: {hint}known: {', '.join(sorted(TEMPLATES))}"
        )
    if section.system_prompt is not None and section.template != "chat":
        raise ValueError(
            f"system_prompt is set, but template = {section.template!r} has no place for it; "
            "use template: chat or remove system_prompt"
        )


def render_text(
    example: Example, section: DataSection, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """The text to encode and its prefill."""
    question = example.prompt + section.prompt_suffix
    return TEMPLATES[section.template](question, section.system_prompt, tokenizer)


def render(example: Example, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Applies the section's template to one example and encodes it, whatever its length.

    The text carries its BOS itself and is encoded without adding special tokens, so that no
    template can end up with two.

    Raises:
        ValueError: unknown template, a chat template that is missing, or text that the tokenizer
            cannot encode.
    """
    check_template(section)
    text, prefill = render_text(example, section, tokenizer)
    return to_prompt(example, text, prefill, encode_texts([text], tokenizer)[0])


def to_prompt(example: Example, text: str, prefill: str, ids: list[int]) -> Prompt:
    """Joins an example with its encoded text."""
    return Prompt(
        id=example.id,
        text=text,
        prefill=prefill,
        token_ids=np.asarray(ids, np.int32),
        question=example.prompt,
        answer=example.answer,
        domain=example.domain,
    )
