"""The type that every source is mapped to, and the split of a dataset by its questions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from r1jax.files import JsonObject

Split = Literal["train", "held_out"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One problem.

    Attributes:
        id: Position in the source, before any split or limit. It is part of the key of every
            sample drawn for this problem, so it must not depend on the split or the limit.
        prompt: The question, without template. Of a conversation without a `prompt` column, its
            first user message, which then decides the side of a split.
        answer: The reference answer that rewards compare with; empty when there is none.
        text: A whole document (question and solution) for pretraining, or None.
        domain: Free label, passed on to rewards and metrics.
        response: What the assistant should say to `prompt`, or None.
        messages: A whole conversation, in place of prompt and response; empty where there is none.
        history: The messages before `prompt`, where the row has a conversation as its prompt: the
            system's, and earlier turns.
        columns: All columns of the source's row that JSON can hold, for rewards.
    """

    id: int
    prompt: str
    answer: str
    text: str | None = None
    domain: str = ""
    response: str | None = None
    messages: tuple[Message, ...] = ()
    history: tuple[Message, ...] = ()
    columns: JsonObject = field(default_factory=dict, compare=False, repr=False)


def split_of(problem: str, held_out_fraction: float) -> Split:
    """The split that a problem belongs to, from a hash of its text (white space collapsed) alone.

    It depends on neither position nor seed, so a problem that occurs twice, or is generated again
    from another index, falls on the same side both times: the splits are disjoint by construction.
    """
    digest = hashlib.blake2b(" ".join(problem.split()).encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "little") / 2.0**64
    return "held_out" if share < held_out_fraction else "train"
