"""The steps of a solution: where they end, in its text and in its tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from r1jax.data.limits import find_all
from r1jax.settings.steps import StepRule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def step_ends(text: str, rule: StepRule) -> list[int]:
    """Offsets behind the steps of a text, increasing; [] for one without visible text.

    A step ends behind each match of the rule, and the last one at the end of the text. A part
    without visible text before its separator is no step: it belongs to the one that follows it, or
    at the end of the text to the one before.
    """
    ends, start = [], 0
    for start, is_step in _matches(text, rule):
        if is_step:
            ends.append(start)
    if text[start:].strip():
        ends.append(len(text))
    return ends


def first_step_end(text: str, rule: StepRule) -> int | None:
    """The offset behind the first step that the rule ends in a text; None: it goes on."""
    return next((end for end, is_step in _matches(text, rule) if is_step), None)


def _matches(text: str, rule: StepRule) -> Iterator[tuple[int, bool]]:
    """The offset behind each match of the rule, and whether a step ends there."""
    start = 0
    for match in find_all(re.compile(rule.expression), text, "step_rule.pattern"):
        # The match of a pattern may be the step itself, as `[^.]+\.` is.
        content = match.start() if rule.pattern is None else match.end()
        yield match.end(), bool(text[start:content].strip())
        start = match.end()


def cut_steps(text: str, rule: StepRule) -> list[str]:
    """The steps of a text, with their separators: joined, they are the text.

    A text without visible characters has none.
    """
    ends = step_ends(text, rule)
    starts = [0, *ends[:-1]]
    stops = [*ends[:-1], len(text)]
    return [text[start:stop] for start, stop in zip(starts, stops, strict=True)] if ends else []


def join_steps(steps: Sequence[str], rule: StepRule) -> str:
    """The text of given steps: `rule.joint` is put behind each that does not end with a separator,
    the last one excepted."""
    return "".join(
        step if last or len(step) in step_ends(f"{step}x", rule) else step + rule.joint
        for step, last in zip(steps, [False] * (len(steps) - 1) + [True], strict=True)
    )


@dataclass(frozen=True)
class TokenSteps:
    """Finds the tokens at which steps end, for one tokenizer and rule.

    A step ends with the token in which its last character lies: the first one with which the
    decoded tokens hold all of the step. That token may hold the beginning of the next step, too.
    Token ids are decoded, never encoded again, so that sampled ones keep their positions; a
    character of several tokens belongs to the last of them.
    """

    tokenizer: PreTrainedTokenizerBase
    rule: StepRule
    _pieces: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    def ends(self, token_ids: Sequence[int]) -> list[int]:
        """The index of the last token of each step, increasing.

        Steps that end in one token are one step: no model can score them apart.
        """
        text = self.decode(token_ids)
        counts = self.counts(token_ids, step_ends(text, self.rule))
        return [count - 1 for count in dict.fromkeys(counts)]

    def character_ends(self, token_ids: Sequence[int]) -> list[int]:
        """How many characters of the text are there at the end of each step of `ends`."""
        offsets = step_ends(self.decode(token_ids), self.rule)
        return list(dict(zip(self.counts(token_ids, offsets), offsets, strict=True)).values())

    def counts(self, token_ids: Sequence[int], offsets: Sequence[int]) -> list[int]:
        """How many tokens hold the first characters of their text, for each number of characters,
        which increase."""
        text, pieces = self.decode(token_ids), self._texts(token_ids)
        # Where each token is whole characters, their lengths add up.
        alone = "".join(pieces) == text
        counts, count, length = [], 0, 0
        for offset in offsets:
            if alone:
                while length < offset:
                    length += len(pieces[count])
                    count += 1
            else:
                count = self._search(token_ids, text[:offset], count)
            counts.append(count)
        return counts

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))

    def _search(self, token_ids: Sequence[int], beginning: str, low: int) -> int:
        """The smallest number of tokens, `low` or more, whose text begins so; by bisection."""
        high = len(token_ids)
        while low < high:
            middle = (low + high) // 2
            if self.decode(token_ids[:middle]).startswith(beginning):
                high = middle
            else:
                low = middle + 1
        return high

    def _texts(self, token_ids: Sequence[int]) -> list[str]:
        for token in set(token_ids) - self._pieces.keys():
            self._pieces[token] = self.decode([token])
        return [self._pieces[token] for token in token_ids]
