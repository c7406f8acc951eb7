"""Readability reward: is the text one that would be kept for training?

R1-Zero's answers are hard to read, DeepSeek-R1 says (arXiv 2501.12948, sections 2.2.4 and 2.3.1):
languages are mixed, and nothing is formatted for a reader. The filters by which cold start and
rejection sampling choose texts (`r1jax.data.filters`) say the same of every sample here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r1jax.rewards.extraction import final_answer
from r1jax.rewards.registry import Answered, Outcome, Score, reward


def _check(options: Mapping[str, Any]) -> None:
    # Not above, here and below: r1jax.data imports the rewards. A worker checks before its first
    # row, so the import is on no deadline.
    from r1jax.data.filters import FILTERS, load_filters

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


@reward("readable", check=_check)
def readable(row: Answered, options: Mapping[str, Any]) -> Score:
    """1 if the model ended the completion itself and all filters keep it, else 0.

    Options: filters of `r1jax.data.filters.FILTERS`, `name: options`, in the order in which they
    are asked. `Score.detail` says what refused the text: `truncated` or `filter NAME`.
    """
    from r1jax.data.filters import apply_filters, load_filters

    refused = apply_filters(row.completion, load_filters(options))
    why = "truncated" if row.truncated else refused and f"filter {refused}"
    return Score(
        reward=float(why is None),
        outcome=Outcome.RIGHT if why is None else Outcome.WRONG,
        extracted=final_answer(row.completion),
        detail=why,
    )
