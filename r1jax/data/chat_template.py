"""Templates: from a question or a conversation to exactly the text that the model reads.

`render_prompt` gives the text that the model continues (sampling), `render_conversation` the pieces
of a whole conversation (supervised fine-tuning).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from r1jax.data.example import Message
from r1jax.data.limits import TimeOverError, cpu_time_limit, memory_limit
from r1jax.data.tokenizers import begins_with_bos, encode_texts
from r1jax.settings.names import nearest
from r1jax.settings.section import SettingError

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
question with an end mark gets no second one, which is a choice."""

_MARKER = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>")
"""How released models write their special tokens: `<|im_end|>`, `<｜User｜>`."""

_ATTEMPT = "The first attempt."

_RENDER_SECONDS = 5.0
"""CPU time in which a chat template has to render one conversation; released ones take
milliseconds."""

_RENDER_BYTES = 4 << 30
"""Memory that it may take; other threads allocate from the same limit meanwhile, and have room."""

_ADDED_CHARACTERS = 1_000_000
"""What a chat template may write beside ten times the messages' text."""


class RenderedPrompt(NamedTuple):
    """The text that the model continues, exactly as it is encoded, BOS included when there is one;
    and its end that belongs to the completion, such as `<think>\\n`, or "".
    """

    text: str
    prefill: str


class _TurnEnd(NamedTuple):
    """How the assistant's turns end: the text that closes one, and the text of every stop token."""

    text: str
    stops: tuple[str, ...]


class Piece(NamedTuple):
    """A part of a rendered conversation, and whether the model learns to write it."""

    text: str
    trained: bool


# What the functions below set themselves, or what would change what they give.
_RESERVED = ("messages", "conversation", "tools", "add_generation_prompt", "tokenize")


def check_template(section: DataSection) -> None:
    """Raises SettingError when the section's template is unknown or would ignore a setting."""
    if section.template not in TEMPLATES:
        hint = nearest(section.template, TEMPLATES)
        raise SettingError("template", f"{hint}known: {', '.join(sorted(TEMPLATES))}")
    for key in ("system_prompt", "chat_template_kwargs"):
        if getattr(section, key) is not None and section.template != "chat":
            raise SettingError(
                key,
                f"template = {section.template!r} cannot hold it; use template: chat or remove "
                f"{key}",
            )
    for name in section.chat_template_kwargs or ():
        if name in _RESERVED:
            raise SettingError(f"chat_template_kwargs.{name}", "r1jax sets it; remove it")


def render_prompt(
    question: str,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    history: Sequence[Message] = (),
) -> RenderedPrompt:
    """The question in the section's template, which `check_template` has checked.

    history: messages before it; where they begin with the system's, the section's is left out.
    """
    question = f"{section.prompt_prefix}{question}{section.prompt_suffix}"
    messages = [*history, Message("user", question)]
    if section.system_prompt is not None and messages[0].role != "system":
        messages.insert(0, Message("system", section.system_prompt))
    return TEMPLATES[section.template](messages, section, tokenizer)


def _r1_zero(
    messages: Sequence[Message], section: DataSection, tokenizer: PreTrainedTokenizerBase
) -> RenderedPrompt:
    question = _only_question(messages, section)
    # Not str.format: a question may hold braces.
    text = R1_ZERO.replace("{stop}", _full_stop(question)).replace("{prompt}", question)
    return RenderedPrompt(_with_bos(text, tokenizer), "")


def _full_stop(text: str) -> str:
    return "" if text.endswith((".", "?", "!", "。", "？", "！")) else "."


def _plain(
    messages: Sequence[Message], section: DataSection, tokenizer: PreTrainedTokenizerBase
) -> RenderedPrompt:
    return RenderedPrompt(_with_bos(_only_question(messages, section), tokenizer), "")


def _only_question(messages: Sequence[Message], section: DataSection) -> str:
    if len(messages) == 1:
        return messages[0].content
    raise SettingError(
        "template",
        f"{section.template!r} has a place for one question and its answer only, not for "
        f"{', '.join(message.role for message in messages)}; use template: chat",
    )


def _with_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    bos = tokenizer.bos_token
    if begins_with_bos(tokenizer) and not text.startswith(str(bos)):
        return f"{bos}{text}"
    return text


def _chat(
    messages: Sequence[Message], section: DataSection, tokenizer: PreTrainedTokenizerBase
) -> RenderedPrompt:
    """The text that the assistant continues after `messages`, by the tokenizer's chat template."""
    text = _apply_chat_template(messages, section, tokenizer, open_answer=True)
    turn = _apply_chat_template(messages, section, tokenizer, open_answer=False)
    # Only what the generation prompt adds can be a prefill: a question may well say "<think>".
    # A template that ignores the flag (or rewrites the turn) is read from the question's end on.
    follows = text.startswith(turn) and len(text) > len(turn)
    question = messages[-1].content
    opened = text[len(turn) if follows else text.rfind(question) + len(question) :]
    at = opened.find("<think>")
    return RenderedPrompt(text, opened[at:] if at >= 0 else "")


TEMPLATES: Mapping[
    str, Callable[[Sequence[Message], DataSection, PreTrainedTokenizerBase], RenderedPrompt]
] = MappingProxyType({"chat": _chat, "r1_zero": _r1_zero, "plain": _plain})
"""Name -> function of a conversation that ends with the user, the section, and the tokenizer."""


def turn_end(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]
) -> _TurnEnd:
    """How the section's template ends the assistant's turns; `stop_ids`: see `stop_token_ids`.

    Raises ValueError: the tokenizer's chat template is missing, leaves the assistant's message out
    or writes markers that are no tokens; or a turn does not end in a stop token.
    """
    stops = tuple(stop for stop in (str(tokenizer.decode([i])) for i in stop_ids) if stop)
    end = tokenizer.eos_token
    if section.template == "chat":
        question, answer = Message("user", "Is it?"), Message("assistant", "Yes, it is.")
        rendered = _apply_chat_template([question, answer], section, tokenizer, open_answer=False)
        opened = _apply_chat_template([question], section, tokenizer, open_answer=True)
        _check_markers(rendered + opened, tokenizer)
        before, _, behind = rendered.rpartition(answer.content)
        if not before:
            raise SettingError("template", "the chat template leaves out what the assistant says")
        ends = [behind.index(stop) + len(stop) for stop in stops if stop in behind]
        end = behind[: min(ends)] if ends else end
    if end is None:
        raise SettingError(
            "template",
            "the tokenizer has no EOS token, and its chat template ends the assistant's turn with "
            "no stop token: the model would never learn to stop. Set eos_token in the tokenizer.",
        )
    if encode_texts([end], tokenizer)[0][-1:] not in [[i] for i in stop_ids]:
        raise SettingError(
            "template",
            f"the assistant's turn ends in {end!r}, which the tokenizer does not encode as a stop "
            f"token ({', '.join(map(repr, stops))}); use the tokenizer that belongs to the model",
        )
    return _TurnEnd(end, stops)


def render_follow_up(
    text: str, section: DataSection, tokenizer: PreTrainedTokenizerBase, end: str
) -> RenderedPrompt:
    """The user's next message behind an assistant's turn, which `end` has closed.

    By the chat template where the section uses it; as in R1-Zero's prompt; or as it stands.
    """
    if section.template == "r1_zero":
        return RenderedPrompt(f" User: {text}{_full_stop(text)} Assistant:", "")
    if section.template != "chat":
        return RenderedPrompt(text, "")
    messages = [Message("user", "Is it?"), Message("assistant", _ATTEMPT), Message("user", text)]
    if section.system_prompt is not None:
        messages.insert(0, Message("system", section.system_prompt))
    whole, prefill = _chat(messages, section, tokenizer)
    behind = whole.partition(_ATTEMPT)[2]
    if not behind or text.strip() not in behind:
        left_out = "what the user says" if behind else "what the assistant says"
        raise SettingError("template", f"the chat template leaves out {left_out} in later turns")
    return RenderedPrompt(behind.removeprefix(end), prefill)


def render_conversation(
    messages: Sequence[Message],
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    end: _TurnEnd,
) -> Iterator[Piece]:
    """The pieces of a conversation whose last message is the assistant's; joined, its whole text.

    What stands before an assistant's turn is exactly what the sampler is given to continue. The
    turn is the message and what the template puts behind it, up to the first stop token (without
    one: EOS). A prefilled `<think>` belongs to the prompt: a message that begins with it, white
    space at its end apart, does not repeat it; nor is a stop token at a message's end repeated.

    The last turn is trained. An earlier one is trained only where the conversation up to its end,
    as the sampler would have met it, is a beginning of the last turn's prompt. Templates of
    reasoning models drop the thoughts of past turns, so that training on the rest would teach it to
    answer without a thought.

    Raises ValueError: the template cannot hold the messages, or an assistant's message is empty.
    """
    *before, last = messages
    if section.template != "chat":
        _only_question(before, section)
    prompt, prefill = TEMPLATES[section.template](before, section, tokenizer)
    start = 0
    for turn in range(1, len(before)):
        if (before[turn - 1].role, before[turn].role) != ("user", "assistant"):
            continue
        opening, opened = _chat(before[:turn], section, tokenizer)
        completion = _completion(before[turn].content, opened, end)
        if prompt.startswith(opening + completion):
            yield Piece(prompt[start : len(opening)], False)
            yield Piece(completion, True)
            start = len(opening) + len(completion)
    yield Piece(prompt[start:], False)
    yield Piece(_completion(last.content, prefill, end), True)


_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
"""As Qwen3 and DeepSeek-R1 write a turn without a thought."""


def _completion(message: str, prefill: str, end: _TurnEnd) -> str:
    """What the model itself should write for `message`, its end included.

    Where the prompt opens a thought and the message has none, an empty thought is closed.
    """
    opening = prefill if message.startswith(prefill) else prefill.rstrip()
    begun = bool(opening) and message.startswith(opening)
    message = message.removeprefix(opening)
    message = message.removesuffix(next((s for s in end.stops if message.endswith(s)), ""))
    if not message:
        raise ValueError("the assistant's message is empty; remove the row")
    if "</think>" in prefill:
        if message.lstrip().startswith("<think>"):
            raise ValueError(
                "the assistant's message has a thought, and the chat template has closed an empty "
                "one before it; set what opens it (such as chat_template_kwargs: {enable_thinking: "
                "true}), or take the thought out of the row"
            )
    elif "<think>" in prefill and "</think>" not in message:
        if begun or message.lstrip().startswith("<think>"):
            raise ValueError("the assistant's thought has no </think>; close it or remove the row")
        closed = _EMPTY_THOUGHT.startswith(prefill)
        message = (_EMPTY_THOUGHT.removeprefix(prefill) if closed else "</think>\n\n") + message
    return message + end.text


def _apply_chat_template(
    messages: Sequence[Message],
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    open_answer: bool,
) -> str:
    """The tokenizer's chat template on `messages`; `open_answer`: with the assistant's header."""
    if not tokenizer.chat_template:
        raise SettingError(
            "template", "the tokenizer has no chat template; use template: r1_zero or plain"
        )
    given = section.chat_template_kwargs or {}
    names = set(re.findall(r"\w+", str(tokenizer.chat_template)))
    for name in given.keys() - names:
        raise SettingError(
            f"chat_template_kwargs.{name}",
            f"the tokenizer's chat template does not read it; {nearest(name, names)}remove it",
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    remedy = "mend the tokenizer's chat_template, or use template: r1_zero or plain"
    try:
        with cpu_time_limit(_RENDER_SECONDS), memory_limit(_RENDER_BYTES):
            text = str(
                tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=open_answer, **given
                )
            )
    except (TimeOverError, MemoryError) as error:
        amount = f"more memory than {_RENDER_BYTES >> 20} MiB"
        if isinstance(error, TimeOverError):
            amount = f"longer than {_RENDER_SECONDS:g} s"
        raise SettingError(
            "template",
            f"the tokenizer's chat template takes {amount} for one conversation; {remedy}",
        ) from None
    except Exception as error:  # A template can divide by 0, call itself without end, ...
        raise SettingError(
            "template",
            "the tokenizer's chat template refuses the messages: "
            f"{str(error) or type(error).__name__}",
        ) from error
    limit = _ADDED_CHARACTERS + 10 * sum(len(message.content) for message in messages)
    if len(text) > limit:
        raise SettingError(
            "template",
            f"the tokenizer's chat template writes {len(text)} characters for one conversation, "
            f"where {limit} are allowed; {remedy}",
        )
    return text


def _check_markers(rendered: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a marker without a token, which would be cut into letters."""
    for marker in _MARKER.findall(rendered):
        if tokenizer.convert_tokens_to_ids(marker) in (None, tokenizer.unk_token_id):
            raise SettingError(
                "template",
                f"the chat template writes {marker!r}, which is not a token of the tokenizer; use "
                "the tokenizer that the template was made for, or template: r1_zero or plain",
            )
