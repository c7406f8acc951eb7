"""Conversations as documents for supervised fine-tuning: only the assistant's part is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from r1jax.data.chat_template import Piece, check_template, render_conversation, turn_end
from r1jax.data.documents import Document
from r1jax.data.example import Example, Message
from r1jax.data.examples import row_label
from r1jax.data.tokenizers import encode_texts
from r1jax.settings.section import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1jax.settings.data import DataSection


def encode_conversations(
    examples: Sequence[Example],
    *,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
) -> list[Document]:
    """One document per example, rendered as `chat_template.render_conversation` says.

    An example is its `messages` up to the assistant's last one, or `prompt` and `response`; with
    the section's `system_prompt` (where the messages have none), and with its `prompt_prefix` and
    `prompt_suffix` around each user message. A prompt is encoded apart from the turn after it, as
    sampled ids follow a prompt's ids. `max_prompt_tokens` has no effect. `stop_ids`: as
    `stop_token_ids` gives them.

    Raises SettingError: the template is unknown, lacks or refuses something, or has markers that
    are no tokens; an example has no response, or one that is empty or goes on after a stop token.
    """
    check_template(section)
    end = turn_end(section, tokenizer, stop_ids)
    conversations: list[list[Piece]] = []
    for example in examples:
        with _naming(example, section):
            messages = _conversation(example, section)
            conversations.append(list(render_conversation(messages, section, tokenizer, end)))
    ids = iter(
        encode_texts([piece.text for pieces in conversations for piece in pieces], tokenizer)
    )
    documents = []
    for example, pieces in zip(examples, conversations, strict=True):
        with _naming(example, section):
            documents.append(_joined([(next(ids), piece.trained) for piece in pieces], stop_ids))
    return documents


@contextmanager
def _naming(example: Example, section: DataSection) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        key = error.key if isinstance(error, SettingError) else "source"
        reason = error.problem if isinstance(error, SettingError) else str(error)
        raise SettingError(key, f"{row_label(section, example.id)}: {reason}") from error


def _conversation(example: Example, section: DataSection) -> list[Message]:
    """The messages up to the assistant's last one, with the section's additions."""
    if example.messages and example.response is not None:
        raise SettingError("fields", "it has a response and messages; name the one to train on")
    messages = list(example.messages)
    if example.response is not None:
        question = Message("user", example.prompt)
        messages = [*example.history, question, Message("assistant", example.response)]
    if not messages:
        raise SettingError(
            "fields",
            "it has no response to train on; name the column in fields.response, or the one of "
            "whole conversations in fields.messages",
        )
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if [message.role for message in messages[-2:]] != ["user", "assistant"]:
        raise ValueError("its messages hold no answer of the assistant to a user; remove the row")
    if section.system_prompt is not None and messages[0].role != "system":
        messages.insert(0, Message("system", section.system_prompt))
    before, behind = section.prompt_prefix, section.prompt_suffix
    return [
        replace(each, content=before + each.content + behind) if each.role == "user" else each
        for each in messages
    ]


def _joined(pieces: Sequence[tuple[list[int], bool]], stop_ids: Collection[int]) -> Document:
    tokens: list[int] = []
    flags: list[bool] = []
    for ids, trained in pieces:
        if trained and not tokens:
            raise ValueError("its prompt has no tokens; use another template or remove the row")
        if trained and not set(stop_ids).isdisjoint(ids[:-1]):
            raise ValueError(
                "the assistant's message goes on after a stop token; cut it there or remove the row"
            )
        tokens += ids
        flags += [trained] * len(ids)
    return Document(np.asarray(tokens, np.int32), np.asarray(flags, np.bool_))
