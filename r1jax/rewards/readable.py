"""Readability reward: is the text one that would be kept for training?

R1-Zero's answers are hard to read, DeepSeek-R1 says (arXiv 2501.12948, sections 2.2.4 and 2.3.1):
languages are mixed, and nothing is formatted for a reader. This reward applies to every sample the
filters by which cold start and rejection sampling choose texts (`r1jax.rewards.filters`).
"""

from __future__ import annotations

from collections.abc import Mapping

from r1jax.rewards.extraction import final_answer
from r1jax.rewards.filters import FILTERS, apply_filters, load_filters
from r1jax.rewards.registry import RewardInput, RewardOptions, Score, reward


def _check(options: RewardOptions) -> None:
    where = "rewards.readable.options"
    if not options:
        raise ValueError(f"{where} is empty: name at least one filter of {sorted(FILTERS)}")
    for name, given in options.items():
        if not isinstance(given, Mapping):
            raise ValueError(
                f"{where}.{name} = {given!r}: must map the filter's options to their values; "
                "{} takes the defaults"
            )
    try:
        load_filters(options)
    except ValueError as error:
        raise ValueError(f"{where}.{str(error).removeprefix('filters.')}") from None


@reward("readable", check=_check, reads_answer=False)
def readable(row: RewardInput, options: RewardOptions) -> Score:
    """1 if the model ended the completion itself and all filters keep it, else 0.

    Options: filters of `r1jax.rewards.filters.FILTERS`, `name: options`, in the order in which they
    are applied. `Score.detail` says what refused the text: `truncated` or `filter NAME`.
    """
    refused = apply_filters(row.completion, load_filters(options))
    why = "truncated" if row.truncated else refused and f"filter {refused}"
    return Score.binary(why is None, final_answer(row.completion), why)
