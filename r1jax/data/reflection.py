"""How often a completion reflects: matches of the config's patterns."""

from __future__ import annotations

import re
from collections.abc import Sequence

from r1jax.data.limits import find_all


def count_reflections(text: str, patterns: Sequence[re.Pattern[str]]) -> int:
    """Matches of all patterns in a completion; those of one pattern do not overlap.

    Raises:
      SettingError: one of `reflections` takes too long for this text.
    """
    return sum(len(find_all(pattern, text, "reflections")) for pattern in patterns)
