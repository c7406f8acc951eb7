"""A reward that even an untrained model earns now and then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r1jax.rewards import Answered, Outcome, Score


def digits(row: Answered, options: Mapping[str, Any]) -> Score:
    """The share of digits among the completion's characters."""
    count = sum(character.isdigit() for character in row.completion)
    return Score(count / max(len(row.completion), 1), Outcome.RIGHT)
