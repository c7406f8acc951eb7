"""Which reference answers a reward cannot read: every sample of such a row is unscored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from r1jax.rewards.registry import (
    REWARDS,
    RewardInput,
    RewardOptions,
    Score,
    check_reward,
    reward,
)
from r1jax.rewards.verifier import Verifier
from r1jax.rewards.visible import is_blank

if TYPE_CHECKING:
    from r1jax.settings.rewards import RewardSection, VerifierSection

_NAME = "_reference"


def unreadable_references(
    answers: Mapping[str, Iterable[str]],
    rewards: Mapping[str, RewardSection],
    section: VerifierSection,
) -> dict[str, dict[str, str]]:
    """Reward -> answer -> why the reward cannot read it, for those of which that is so.

    They are read in worker processes, each within the deadline. Of functions that are not
    registered, nothing is known.

    Args:
      answers: reward -> the reference answers of the rows that it is for.
    """
    from r1jax.settings.rewards import RewardSection

    reasons: dict[str, dict[str, str]] = {}
    readers: dict[str, RewardSection] = {}
    rows: list[RewardInput] = []
    for name, given in answers.items():
        function = rewards[name].function or name
        entry = None if rewards[name].model is not None else REWARDS.get(function)
        if entry is None or not entry.reads_answer:
            continue
        distinct = dict.fromkeys(given)
        reasons[name] = {answer: "it is empty" for answer in distinct if is_blank(answer)}
        if entry.checks_references:
            options = {"function": function, "options": dict(rewards[name].options)}
            readers[name] = RewardSection(function=_NAME, options=options, domains=[name])
            left = [answer for answer in distinct if answer not in reasons[name]]
            rows += [RewardInput("", "", answer, domain=name) for answer in left]
    if rows:
        with Verifier(readers, section) as verifier:
            for row, score in zip(rows, verifier.submit(rows).result(), strict=True):
                part = score.parts[row.domain]
                if part.reward != 1.0:
                    reasons[row.domain][row.answer] = part.detail or "no reason given"
    return reasons


def _check(options: RewardOptions) -> None:
    check_reward(options["function"], options["options"])


def _prepare(options: RewardOptions) -> None:
    REWARDS[options["function"]].prepare(options["options"])


@reward(_NAME, check=_check, prepare=_prepare)
def _readable(row: RewardInput, options: RewardOptions) -> Score:
    """1 if the reward `options.function` can read the row's reference answer, else 0."""
    problem = REWARDS[options["function"]].check_reference(row.answer, options["options"])
    return Score.binary(problem is None, detail=problem)
