"""Settings of turns: attempts of the model at one question, and what stands between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from r1jax.settings.section import Section, SettingError

_INSTRUCTION_TOKENS = 256


class Turn(Section):
    """An attempt of the assistant, or a text of the user behind one."""

    # Keys that belong to one role alone.
    _OF_ROLE: ClassVar[dict[str, tuple[str, ...]]] = {
        "assistant": ("max_new_tokens",),
        "user": ("text", "max_tokens"),
    }

    role: Literal["assistant", "user"] = Field(description="Who writes the turn.")
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Of the assistant's: tokens of the attempt at most. Default: max_new_tokens of "
        "the stage.",
    )
    text: str | None = Field(
        None,
        description="Of the user's: what is said, in the template of the stage's data. The model "
        "reads it, and is never trained on it.",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Of the user's: tokens of the text in its template at most, for which rows and "
        f"memory are planned. Default: {_INSTRUCTION_TOKENS}.",
    )

    @model_validator(mode="after")
    def _of_its_role(self) -> Turn:
        for role, keys in self._OF_ROLE.items():
            for key in keys if role != self.role else ():
                default = type(self).model_fields[key].default
                if key in self.model_fields_set and getattr(self, key) != default:
                    raise ValueError(f"{key} belongs to turns of role {role}; leave it out")
        if self.role == "user" and not (self.text or "").strip():
            raise ValueError(
                "text is empty: a turn of the user needs a text, which the next attempt follows"
            )
        return self

    @property
    def context_tokens(self) -> int:
        """Tokens of the user's turn at most."""
        return self.max_tokens or _INSTRUCTION_TOKENS


class TrainedTurn(Turn):
    """A turn of reinforcement learning (SCoRe, Kumar et al. 2024, arXiv 2409.12917).

    The return of attempt k is weight r_k + improvement (r_k - r_(k-1)) + discount return_(k+1);
    returns of one attempt are compared within a question's group.
    """

    _OF_ROLE: ClassVar[dict[str, tuple[str, ...]]] = {
        "assistant": (
            *("max_new_tokens", "trained", "weight", "improvement", "discount", "kl_coefficient"),
        ),
        "user": ("text", "max_tokens"),
    }

    trained: bool = Field(
        True, description="Of the assistant's: false leaves the attempt's tokens out of the loss."
    )
    weight: float = Field(
        1.0, description="Of the assistant's: the weight of the attempt's reward in its return."
    )
    improvement: float = Field(
        0.0,
        description="Of the assistant's: alpha of the bonus alpha (r_k - r_(k-1)) in its return, "
        "for the change from the attempt before it.",
    )
    discount: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Of the assistant's: how much of the next attempt's return is part of this "
        "one's. With 1, a wrong attempt that the next one mends earns more than a right one, if "
        "the next one's improvement is above this one's weight.",
    )
    kl_coefficient: float | None = Field(
        None,
        ge=0,
        description="Of the assistant's: the coefficient of the penalty on KL to the reference on "
        "its tokens. Default: the objective's.",
    )


def assistant_turns(turns: Sequence[Turn]) -> list[Turn]:
    return [turn for turn in turns if turn.role == "assistant"]


def check_order(turns: Sequence[Turn]) -> None:
    """Raises SettingError unless two or more attempts have one turn of the user between each two.

    The dataset's prompt is the user's first turn.
    """
    for index, turn in enumerate(turns):
        expected = "user" if index % 2 else "assistant"
        if turn.role != expected:
            hint = "the dataset's prompt stands before it" if index == 0 else "they take turns"
            raise SettingError(
                f"turns.{index}", f"role is {turn.role}, and should be {expected}: {hint}"
            )
    if len(turns) % 2 == 0:
        raise SettingError(
            "turns", "the last turn is the user's, which no attempt follows: end with an assistant"
        )
    if len(turns) < 3:
        raise SettingError("turns", "one attempt alone needs no turns; leave them out")


def check_supported(key: str, others: Mapping[str, object]) -> None:
    """Raises SettingError for a setting in force, not empty or false, that turns do not go with."""
    for name, value in others.items():
        if value:
            shown = str(value).lower() if isinstance(value, bool) else ""
            raise SettingError(
                key,
                f"several attempts at a question do not go with {name}"
                f"{f' = {shown}' if shown else ''}; leave out one of them",
            )


def attempt_limits(turns: Sequence[Turn], max_new_tokens: int) -> tuple[int, ...]:
    """Tokens of each attempt at most; `max_new_tokens` where a turn does not say."""
    return tuple(turn.max_new_tokens or max_new_tokens for turn in assistant_turns(turns))


def tokens_of_turns(turns: Sequence[Turn], max_new_tokens: int) -> int:
    """Tokens behind the prompt at most: of all attempts, and of the user's turns between them."""
    context = sum(turn.context_tokens for turn in turns if turn.role == "user")
    return sum(attempt_limits(turns, max_new_tokens)) + context
