"""Rewards that even an untrained model earns now and then."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from r1jax.rewards import Outcome, RewardInput, Score


def digits(row: RewardInput, options: Mapping[str, Any]) -> Score:
    """The share of digits among the completion's characters."""
    count = sum(character.isdigit() for character in row.completion)
    return Score(count / max(len(row.completion), 1), Outcome.RIGHT)


def last_number(row: RewardInput, options: Mapping[str, Any]) -> Score:
    """1 for whoever says a number, whichever; the last one is the answer."""
    numbers = re.findall(r"\d+", row.completion)
    if not numbers:
        return Score(0.0, Outcome.WRONG)
    return Score(1.0, Outcome.RIGHT, extracted=numbers[-1])


def last_number_in(row: RewardInput, options: Mapping[str, Any]) -> Score:
    """`last_number` in one process of the run; in the others no answer can be scored."""
    if os.environ["JAX_PROCESS_ID"] != options["process"]:
        raise RuntimeError("out of order")
    return last_number(row, options)


def even_digits(row: RewardInput, options: Mapping[str, Any]) -> Score:
    """Right is a completion with an even number of digits, which a continuation may change."""
    return Score.binary(sum(character.isdigit() for character in row.completion) % 2 == 0)
