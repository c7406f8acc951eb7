"""The question of a rendered prompt: without what the template puts around all of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

# Where a template ends and a question may begin: behind a line break, a tag, or a role's colon.
_BEGINS = re.compile(r"(?:\n|[>\]：:])\s*")
# Where a question ends and a template may begin.
_ENDS = re.compile(r"\s*(?:\n|[<\[]|\b\w+: ?)")


def questions_of(prompts: Iterable[str], template: str | None) -> Mapping[str, str]:
    """Prompt -> its question.

    What all prompts begin and end with is the template's, a system prompt or a suffix, up to a line
    break, a tag or a role; so a word that all questions begin with stays. Fewer than three
    different prompts, and those of the template `plain`, are kept as they are.
    """
    distinct = list(dict.fromkeys(prompts))
    same = {prompt: prompt for prompt in distinct}
    if template == "plain" or len(distinct) < 3:
        return same
    start = os.path.commonprefix(distinct)
    begins = [match.end() for match in _BEGINS.finditer(start)]
    first = begins[-1] if begins else 0
    rests = [prompt[first:] for prompt in distinct]
    end = os.path.commonprefix([rest[::-1] for rest in rests])[::-1]
    boundary = _ENDS.search(end)
    last = len(end) - boundary.start() if boundary is not None else 0
    questions = [rest[: len(rest) - last].strip() for rest in rests]
    return dict(zip(distinct, questions, strict=True)) if all(questions) else same
