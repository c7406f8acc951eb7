"""Overlong reward: DAPO's soft penalty of long completions (arXiv 2503.14476, equation 13)."""

from __future__ import annotations

from r1jax.rewards.registry import (
    Outcome,
    RewardInput,
    RewardOptions,
    Score,
    refuse_unknown,
    reward,
)


def overlong_penalty(length: int, max_tokens: int, cache_tokens: int) -> float:
    """0 up to `max_tokens - cache_tokens`, from there linear to -1 at `max_tokens`, -1 beyond."""
    free = max_tokens - cache_tokens
    if length <= free:
        return 0.0
    return -1.0 if length >= max_tokens else (free - length) / cache_tokens


def _check(options: RewardOptions) -> None:
    refuse_unknown("overlong", options, ("max_tokens", "cache_tokens"))
    where = "rewards.overlong.options"
    for key in ("max_tokens", "cache_tokens"):
        value = options.get(key)
        if type(value) is not int or value < 0:
            raise ValueError(f"{where}.{key} = {value!r}: must be a whole number of tokens")
    if options["cache_tokens"] > options["max_tokens"]:
        raise ValueError(
            f"{where}.cache_tokens = {options['cache_tokens']} is more than max_tokens = "
            f"{options['max_tokens']}"
        )


@reward("overlong", check=_check, reads_answer=False)
def overlong(row: RewardInput, options: RewardOptions) -> Score:
    """DAPO's penalty of the completion's length in tokens, -1 .. 0; right at 0.

    Options: `max_tokens`, L_max of the paper (there 20,480), at and beyond which it is -1;
    `cache_tokens`, L_cache (there 4,096), the tokens before it in which the penalty grows.

    Raises:
      ValueError: the row's length is not known.
    """
    if row.length is None:
        raise ValueError("the row has no length: give its tokens as `token_ids`, or `length`")
    penalty = overlong_penalty(row.length, options["max_tokens"], options["cache_tokens"])
    return Score(penalty, Outcome.RIGHT if penalty == 0 else Outcome.WRONG)
