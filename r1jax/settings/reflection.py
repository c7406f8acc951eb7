"""Which words or steps of a completion count as reflection."""

from __future__ import annotations

import re
from collections.abc import Sequence


def compile_patterns(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """Regular expressions whose matches count as reflection; case does not matter.

    Raises:
      ValueError: one of them is not a regular expression, or matches the empty text.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern, re.IGNORECASE))
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        if compiled[-1].search(""):
            raise ValueError(f"{pattern!r} matches the empty text; let it match one character")
    return compiled
