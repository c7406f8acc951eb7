"""Named reward functions, the rows that they get, and the scores that they return.

A reward function is `f(row: Answered, options: Mapping) -> Score`. It is either registered here
under a short name (`@reward("accuracy")`) or named in the config as `package.module:function`.
It runs in a worker process (`r1jax.rewards.worker`), never in the trainer's.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from r1jax.settings.names import nearest

if TYPE_CHECKING:  # workers start sooner without pydantic
    from r1jax.settings.rewards import VerifierSection


RewardOptions: TypeAlias = Mapping[str, Any]
"""The options of a reward as a config has them; its `check` refuses what it does not know."""


class Outcome(StrEnum):
    """What the verifier says about one completion."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSEABLE = "unparseable"  # there is no final answer, or none that can be read
    VERIFIER_FAILED = "verifier_failed"  # not known: deadline, memory, crash, bad reference


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
    """The result of one reward function for one row.

    Attributes:
      reward: its value; nan when the verifier failed, since 0 would punish an unknown answer.
      outcome: one of four.
      extracted: the final answer as it was read, for votes and logs.
      detail: the reason when the verifier failed; else more about the result, for logs.
    """

    reward: float
    outcome: Outcome
    extracted: str | None = None
    detail: str | None = None

    @classmethod
    def binary(cls, right: bool, extracted: str | None = None, detail: str | None = None) -> Score:
        """1 and right, or 0 and wrong."""
        return cls(float(right), Outcome.RIGHT if right else Outcome.WRONG, extracted, detail)

    @classmethod
    def failed(cls, detail: str) -> Score:
        """The row could not be scored."""
        return cls(math.nan, Outcome.VERIFIER_FAILED, None, detail)


RewardFunction: TypeAlias = Callable[[Answered, RewardOptions], Score]


def _no_check(options: RewardOptions) -> None:
    """Of a function that checks its options itself, or takes any."""


def _no_section_check(options: RewardOptions, section: VerifierSection) -> None:
    """Of a function that works with any deadline and memory."""


@dataclass(frozen=True)
class RewardEntry:
    """A reward function with its checks and its preparation.

    Attributes:
      function: scores a row.
      check: raises ValueError on options that the function does not understand; called where
        the run starts, so it must be cheap.
      prepare: called once in a new worker, before any deadline starts: slow imports go here.
      check_section: raises ValueError on options that do not fit the workers' deadline or
        memory; called after `check`.
    """

    function: RewardFunction
    check: Callable[[RewardOptions], None] = _no_check
    prepare: Callable[[RewardOptions], None] = _no_check
    check_section: Callable[[RewardOptions, VerifierSection], None] = _no_section_check


REWARDS: dict[str, RewardEntry] = {}


def reward(
    name: str,
    *,
    check: Callable[[RewardOptions], None] = _no_check,
    prepare: Callable[[RewardOptions], None] = _no_check,
    check_section: Callable[[RewardOptions, VerifierSection], None] = _no_section_check,
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


def check_reward(name: str, options: RewardOptions, section: VerifierSection | None = None) -> None:
    """Checks a name and its options without importing the user's code.

    Raises:
      ValueError: unknown name (with the nearest one), or options that the function refuses, alone
        or with the workers' `section`.
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


def load_reward(name: str, options: RewardOptions) -> RewardEntry:
    """The entry of a name; imports the module of `package.module:function`.

    Raises:
      ValueError: as `check_reward`, or the module or the function does not exist.
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


def refuse_unknown(name: str, options: RewardOptions, known: tuple[str, ...]) -> None:
    """For the `check` of a reward: raises ValueError on an option that is not in `known`."""
    for key in options:
        if key not in known:
            raise ValueError(
                f"rewards.{name}.options.{key}: no such option; there are {sorted(known)}"
            )
