"""Texts between the attempts of a conversation, as the model reads them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from r1jax.data.chat_template import check_template, render_follow_up, turn_end
from r1jax.data.tokenizers import encode_texts
from r1jax.settings.section import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1jax.settings.data import DataSection


class Instruction(NamedTuple):
    """What stands between two attempts: the user's turn, in the template of the data.

    text, token_ids: behind an attempt that ended with a stop token, up to where the next begins.
    end_text, end_ids: what closes an attempt that did not, before `text`.
    prefill: the end of `text` that belongs to the next attempt, such as `<think>\\n`, or "".
    """

    text: str
    token_ids: tuple[int, ...]
    end_text: str
    end_ids: tuple[int, ...]
    prefill: str

    @property
    def longest(self) -> int:
        """Tokens of it at most."""
        return len(self.end_ids) + len(self.token_ids)


def encode_instruction(
    text: str,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
) -> Instruction:
    """The user's `text` in the section's template, encoded.

    With `template: chat` it is the next user's message, by the tokenizer's chat template.

    Raises:
      SettingError: the template cannot hold it.
      ValueError: the tokenizer cannot encode it.
    """
    check_template(section)
    end = turn_end(section, tokenizer, stop_ids).text
    rendered = render_follow_up(text, section, tokenizer, end)
    behind, end_ids = encode_texts([rendered.text, end], tokenizer)
    if not behind:
        raise SettingError("template", f"it leaves nothing of the user's turn {text!r}")
    return Instruction(rendered.text, tuple(behind), end, tuple(end_ids), rendered.prefill)
