"""Named reward functions, what they are given, and what they answer.

A reward function is `f(row: Answered, options: Mapping) -> Score`. It is either registered here
under a short name (`@reward("accuracy")`) or named in the config as `package.module:function`.
It runs in a worker process (`r1jax.rewards.worker`), never in the trainer's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from r1jax.settings.names import nearest

if TYPE_CHECKING:  # workers start sooner without pydantic
    from r1jax.settings.rewards import VerifierSection


class Outcome(StrEnum):
    """What the verifier found out about one completion."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSEABLE = "unparseable"  # there is no final answer, or none that can be read
    VERIFIER_FAILED = "verifier_failed"  # nobody knows: deadline, memory, crash, bad reference


@dataclass(frozen=True)
class Answered:
    """One row to score.

    Attributes:
      prompt: what the model was shown, for the reward functions that look at it.
      completion: the prompt's prefilled suffix (such as `<think>`) followed by the generated
        text, without special tokens.
      answer: the reference answer.
      domain: free label of the row's source.
      truncated: the model was cut off before it ended its answer itself.
    """

    prompt: str
    completion: str
    answer: str
    domain: str = ""
    truncated: bool = False


@dataclass(frozen=True)
class Score:
    """What one reward function says of one row.

    Attributes:
      reward: its value; nan when the verifier failed, since 0 would punish an unjudged answer.
      outcome: one of four.
      extracted: the final answer as it was read, for votes and logs.
      detail: why, when the verifier failed; else what more the function has to say, for logs.
    """

    reward: float
    outcome: Outcome
    extracted: str | None = None
    detail: str | None = None


RewardFunction = Callable[[Answered, Mapping[str, Any]], Score]


def _no_check(options: Mapping[str, Any]) -> None:
    """A function that checks its own options, or has any."""


def _no_section_check(options: Mapping[str, Any], section: VerifierSection) -> None:
    """A function that works within any deadline and memory."""


@dataclass(frozen=True)
class RewardEntry:
    """A reward function with what surrounds it.

    Attributes:
      function: scores a row.
      check: raises ValueError on options that the function does not understand; called where
        the run starts, so it must be cheap.
      prepare: called once in a new worker, before any deadline runs: slow imports go here.
      check_section: raises ValueError on options that do not go with the workers' deadline or
        memory; called beside `check`.
    """

    function: RewardFunction
    check: Callable[[Mapping[str, Any]], None] = _no_check
    prepare: Callable[[Mapping[str, Any]], None] = _no_check
    check_section: Callable[[Mapping[str, Any], VerifierSection], None] = _no_section_check


REWARDS: dict[str, RewardEntry] = {}


def reward(
    name: str,
    *,
    check: Callable[[Mapping[str, Any]], None] = _no_check,
    prepare: Callable[[Mapping[str, Any]], None] = _no_check,
    check_section: Callable[[Mapping[str, Any], VerifierSection], None] = _no_section_check,
) -> Callable[[RewardFunction], RewardFunction]:
    """Registers the decorated function under `name`; see `RewardEntry` for the rest.

    Raises:
      ValueError: the name is taken, or has the colon of `package.module:function`.
    """
    if ":" in name:
        raise ValueError(f"reward {name!r}: a registered name has no colon")

    def register(function: RewardFunction) -> RewardFunction:
        if name in REWARDS:
            raise ValueError(f"reward {name!r} is registered already")
        REWARDS[name] = RewardEntry(function, check, prepare, check_section)
        return function

    return register


def check_reward(
    name: str, options: Mapping[str, Any], section: VerifierSection | None = None
) -> None:
    """Checks a name and its options without importing code of the user's.

    Raises:
      ValueError: unknown name (with the nearest one), or options the function refuses, be it for
        the workers' `section`.
    """
    if name in REWARDS:
        REWARDS[name].check(options)
        if section is not None:
            REWARDS[name].check_section(options, section)
    elif ":" in name:
        module, _, function = name.partition(":")
        parts = [*module.split("."), function]
        if not all(part.isidentifier() for part in parts):
            raise ValueError(f"rewards.{name}: not of the form package.module:function")
    else:
        raise ValueError(
            f"rewards.{name}: no reward of this name; {nearest(name, REWARDS)}there are "
            f"{sorted(REWARDS)}, and yours as package.module:function"
        )


def load_reward(name: str, options: Mapping[str, Any]) -> RewardEntry:
    """The entry of a name; imports the module of `package.module:function`.

    Raises:
      ValueError: as `check_reward`, or the module or function is not there.
    """
    check_reward(name, options)
    if name in REWARDS:
        return REWARDS[name]
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"rewards.{name}: importing {module_name} failed: {type(error).__name__}: {error}; "
            "is its directory on PYTHONPATH?"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"rewards.{name}: {module_name} has no function {function_name!r}")
    return RewardEntry(function)


def refuse_unknown(name: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """For a reward's `check`: an option outside `known` is a ValueError."""
    for key in options:
        if key not in known:
            raise ValueError(
                f"rewards.{name}.options.{key}: no such option; there are {sorted(known)}"
            )
