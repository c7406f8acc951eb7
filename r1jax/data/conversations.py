"""Conversations as documents for supervised fine-tuning: only the assistant's part is trained."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from r1jax.data.chat_template import TEMPLATES, chat_prompt, check_template, render_chat
from r1jax.data.documents import Document
from r1jax.data.example import Example, Message
from r1jax.data.tokenizers import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1jax.settings.data import DataSection

_MARKER = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>")
"""How released models write their special tokens: `<|im_end|>`, `<｜User｜>`."""


class _Turns(NamedTuple):
    """How the assistant's turns end: what closes one, and the text of every stop token."""

    end: str
    stops: tuple[str, ...]


class _Piece(NamedTuple):
    text: str
    trained: bool


def encode_conversations(
    examples: Sequence[Example],
    *,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
) -> list[Document]:
    """One document per example: what the assistant is given, and what it should write.

    An example is its `messages` up to the assistant's last one, or `prompt` and `response`. What
    stands before an assistant's turn is exactly what the sampler is given to continue, by the
    section's template, its `system_prompt` (where the messages bring none) and its
    `prompt_suffix` (after each user message). It is encoded apart from the turn, as sampled ids
    follow a prompt's ids. `max_prompt_tokens` has no say: rows bound whole documents.

    An assistant's turn is the message and what the chat template puts behind it, up to the first
    stop token. If there is none it is the message and the tokenizer's EOS. Where the template
    opens the answer itself (a prefilled `<think>`), that belongs to the prompt, and a message that
    begins with it (white space at its end apart) is not given it twice; nor is a stop token that
    the message brings.

    The last turn is always trained. An earlier one is trained only where the conversation up to
    its end, as the sampler would have met it, is a beginning of the last turn's prompt. Templates
    of reasoning models break that on purpose: they drop the thoughts of past turns, so that the
    document no longer holds what the assistant wrote, and training on the rest would teach it to
    answer without a thought.

    Args:
        stop_ids: Every id that ends a completion (`stop_token_ids`).

    Raises:
        ValueError: the template is unknown, lacks or refuses something, or has markers that are no
            tokens; an example has no response, or one that is empty or goes on after a stop token
            (names the row).
    """
    check_template(section)
    turns = _turns(section, tokenizer, stop_ids)
    pieces: list[list[_Piece]] = []
    for example in examples:
        with _naming(example, section):
            messages = _conversation(example, section)
            pieces.append(list(_pieces(messages, section, tokenizer, turns)))
    ids = iter(encode_texts([piece.text for own in pieces for piece in own], tokenizer))
    documents = []
    for example, own in zip(examples, pieces, strict=True):
        with _naming(example, section):
            documents.append(_joined([(next(ids), piece.trained) for piece in own], stop_ids))
    return documents


@contextmanager
def _naming(example: Example, section: DataSection) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{section.source}: row {example.id}: {error}") from error


def _turns(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]
) -> _Turns:
    stops = tuple(stop for stop in (str(tokenizer.decode([i])) for i in stop_ids) if stop)
    end = tokenizer.eos_token
    if section.template == "chat":
        question, answer = Message("user", "Is it?"), Message("assistant", "Yes, it is.")
        rendered = render_chat([question, answer], tokenizer, open_answer=False)
        _check_markers(rendered + render_chat([question], tokenizer, open_answer=True), tokenizer)
        before, _, behind = rendered.rpartition(answer.content)
        if not before:
            raise ValueError("the tokenizer's chat template leaves out what the assistant says")
        found = [behind.index(stop) + len(stop) for stop in stops if stop in behind]
        end = behind[: min(found)] if found else end
    if end is None:
        raise ValueError(
            "the tokenizer has no EOS token, and its chat template ends the assistant's turn with "
            "no stop token: the model would never learn to stop. Set eos_token in the tokenizer."
        )
    if encode_texts([end], tokenizer)[0][-1:] not in [[i] for i in stop_ids]:
        raise ValueError(
            f"the assistant's turn ends in {end!r}, which the tokenizer does not encode as a stop "
            f"token ({', '.join(map(repr, stops))}); use the tokenizer that belongs to the model"
        )
    return _Turns(end, stops)


def _check_markers(rendered: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """A marker without a token would be cut into letters, and the model never told of it."""
    for marker in _MARKER.findall(rendered):
        if tokenizer.convert_tokens_to_ids(marker) in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"the chat template writes {marker!r}, which is not a token of the tokenizer; use "
                "the tokenizer that the template was made for, or template: r1_zero or plain"
            )


def _conversation(example: Example, section: DataSection) -> list[Message]:
    """What is said up to the assistant's last message, with the section's additions."""
    if example.messages and example.response is not None:
        raise ValueError("it has a response and messages; name the one to train on in data.fields")
    messages = list(example.messages)
    if example.response is not None:
        messages = [Message("user", example.prompt), Message("assistant", example.response)]
    if not messages:
        raise ValueError(
            "it has no response to train on; name the column in data.fields.response, or the one "
            "of whole conversations in data.fields.messages"
        )
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if [message.role for message in messages[-2:]] != ["user", "assistant"]:
        raise ValueError("its messages hold no answer of the assistant to a user; remove the row")
    if section.system_prompt is not None and messages[0].role != "system":
        messages.insert(0, Message("system", section.system_prompt))
    return [
        replace(message, content=message.content + section.prompt_suffix)
        if message.role == "user"
        else message
        for message in messages
    ]


def _pieces(
    messages: Sequence[Message],
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    turns: _Turns,
) -> Iterator[_Piece]:
    *given, last = messages
    if section.template == "chat":
        prompt, prefill = chat_prompt(given, tokenizer)
    elif len(given) == 1:
        prompt, prefill = TEMPLATES[section.template](given[0].content, None, tokenizer)
    else:
        raise ValueError(
            f"template = {section.template!r} has a place for one question and its answer only, "
            f"not for {', '.join(message.role for message in messages)}; use template: chat"
        )
    start = 0
    for turn in range(1, len(given)):
        if (given[turn - 1].role, given[turn].role) != ("user", "assistant"):
            continue
        opening, opened = chat_prompt(given[:turn], tokenizer)
        completion = _completion(given[turn].content, opened, turns)
        if prompt.startswith(opening + completion):
            yield _Piece(prompt[start : len(opening)], False)
            yield _Piece(completion, True)
            start = len(opening) + len(completion)
    yield _Piece(prompt[start:], False)
    yield _Piece(_completion(last.content, prefill, turns), True)


def _completion(message: str, prefill: str, turns: _Turns) -> str:
    """What the model itself should write for `message`, its end included."""
    for opening in (prefill, prefill.rstrip()):
        if opening and message.startswith(opening):
            message = message.removeprefix(opening)
            break
    for stop in turns.stops:
        if message.endswith(stop):
            message = message.removesuffix(stop)
            break
    if not message:
        raise ValueError("the assistant's message is empty; remove the row")
    return message + turns.end


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
