"""Named reward functions, the rows that they get, and the scores that they return.

A reward function is `f(row: RewardInput, options: Mapping) -> Score`. It is either registered here
under a short name (`@reward("accuracy")`) or named in the config as `package.module:function` or
`file.py:function` (`r1jax.rewards.functions` says which other forms are accepted).
It runs in a worker process (`r1jax.rewards.worker`), never in the trainer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

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
class RewardInput:
    """One row to score.

    Attributes:
      prompt: what the model was shown, for the reward functions that look at it.
      completion: the prompt's prefilled suffix (such as `<think>`) followed by the generated
        text, without special tokens.
      answer: the reference answer.
      domain: free label of the row's source.
      truncated: the model was cut off before it ended its answer itself.
      question: the prompt without its template; None where it is not known.
      columns: all columns of the dataset's row that JSON can hold, as the dataset has them.
      token_ids: the tokens that were generated, EOS included; empty where they are not known.
      length: how many tokens were generated; None where it is not known.
      step, max_steps: of the stage's optimizer, done before the sample was drawn and in all; 0
        outside of training.
    """

    prompt: str
    completion: str
    answer: str
    domain: str = ""
    truncated: bool = False
    question: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    token_ids: Sequence[int] = ()
    length: int | None = None
    step: int = 0
    max_steps: int = 0

    def message(self, *, whole: bool) -> dict[str, object]:
        """The row for JSON; without columns and tokens, which may be large, unless `whole`."""
        large = ("columns", "token_ids")
        message = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in large}
        if whole:
            message |= {"columns": self.columns, "token_ids": list(self.token_ids)}
        return message


@dataclass(frozen=True)
class Score:
    """The result of one reward function for one row.

    Attributes:
      reward: its value; nan when the verifier failed, since 0 would punish an unknown answer.
      outcome: one of four.
      extracted: the final answer as it was read, for votes and logs.
      detail: the reason when the verifier failed; else more about the result, for logs.
      deadline: the cause of a deadline that passed: `answer`, `reference` or `unknown`.
      steps: of a process reward model with `per_step`: how many characters of the completion (see
        `RewardInput`) are read where a step ends, increasing, and its score.
    """

    reward: float
    outcome: Outcome
    extracted: str | None = None
    detail: str | None = None
    deadline: str | None = None
    steps: tuple[tuple[int, float], ...] = ()

    @classmethod
    def binary(cls, right: bool, extracted: str | None = None, detail: str | None = None) -> Score:
        """1 and right, or 0 and wrong."""
        return cls(float(right), Outcome.RIGHT if right else Outcome.WRONG, extracted, detail)

    @classmethod
    def failed(cls, detail: str) -> Score:
        """The row could not be scored."""
        return cls(math.nan, Outcome.VERIFIER_FAILED, None, detail)


RewardFunction: TypeAlias = Callable[[RewardInput, RewardOptions], Score | None]
"""Scores a row; None: it has nothing to say of this row, whose other rewards count."""

_GROUP_ROWS = 64

BatchFunction: TypeAlias = Callable[[Sequence[RewardInput], RewardOptions], list[Score | None]]
"""Scores the samples of one prompt together."""


F = TypeVar("F", bound=RewardFunction)


def _every_reference(answer: str, options: RewardOptions) -> str | None:
    """Of a function that reads any reference answer, or none."""
    return None


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
      check_reference: why a reference answer cannot be read, or None; called in a worker for every
        reference of a run, before it trains.
      reads_answer: rows need a reference answer.
      reads_columns: rows need their dataset's columns and their tokens.
      batch: scores the samples of one prompt together, in place of `function`.
      columns: those that a row must have.
    """

    function: RewardFunction
    check: Callable[[RewardOptions], None] = _no_check
    prepare: Callable[[RewardOptions], None] = _no_check
    check_section: Callable[[RewardOptions, VerifierSection], None] = _no_section_check
    check_reference: Callable[[str, RewardOptions], str | None] = _every_reference
    reads_answer: bool = True
    reads_columns: bool = False
    batch: BatchFunction | None = None
    columns: tuple[str, ...] = ()

    @property
    def checks_references(self) -> bool:
        return self.check_reference is not _every_reference


REWARDS: dict[str, RewardEntry] = {}


def reward(
    name: str,
    *,
    check: Callable[[RewardOptions], None] = _no_check,
    prepare: Callable[[RewardOptions], None] = _no_check,
    check_section: Callable[[RewardOptions, VerifierSection], None] = _no_section_check,
    check_reference: Callable[[str, RewardOptions], str | None] = _every_reference,
    reads_answer: bool = True,
    reads_columns: bool = False,
) -> Callable[[F], F]:
    """Registers the decorated function under `name`; see `RewardEntry` for the rest.

    Raises:
      ValueError: the name is taken, or has the colon of `package.module:function`.
    """
    if ":" in name:
        raise ValueError(f"reward {name!r}: a registered name has no colon")

    def register(function: F) -> F:
        if name in REWARDS:
            raise ValueError(f"reward {name!r} is registered already")
        REWARDS[name] = RewardEntry(
            function,
            check,
            prepare,
            check_section,
            check_reference,
            reads_answer=reads_answer,
            reads_columns=reads_columns,
        )
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
        module, _, function = name.rpartition(":")
        parts = [function] if module.endswith(".py") else [*module.split("."), function]
        if not all(part.isidentifier() for part in parts):
            raise ValueError(
                f"rewards.{name}: neither package.module:function nor file.py:function"
            )
    else:
        known = sorted(each for each in REWARDS if not each.startswith("_"))
        raise ValueError(
            f"rewards.{name}: no reward of this name; {nearest(name, known)}there are {known}, and "
            "yours as package.module:function or file.py:function"
        )


def sample_groups(rows: Sequence[RewardInput]) -> Iterator[range]:
    """Indices of the samples of each prompt: consecutive rows with one prompt, at most 64."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end].prompt != rows[start].prompt or end - start == _GROUP_ROWS:
            yield range(start, end)
            start = end


def refuse_unknown(name: str, options: RewardOptions, known: tuple[str, ...]) -> None:
    """For the `check` of a reward: raises ValueError on an option that is not in `known`."""
    for key in options:
        if key not in known:
            raise ValueError(
                f"rewards.{name}.options.{key}: no such option; there are {sorted(known)}"
            )
