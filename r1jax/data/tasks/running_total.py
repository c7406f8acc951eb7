"""The demo's task: add and subtract from left to right, where a thought makes it easy.

A prompt is `7+5-3+9=`, its answer `18`. Naming the total at once means doing the whole sum in one
forward pass, which a tiny model cannot; writing it out takes one small sum per step:

    7+5-3+9=<think>7+5=12 12-3=9 9+9=18</think><answer>18</answer>

The pretraining text stands for the web: some of it worked and right, some worked with a slip, much
of it a guess near the answer, some of it without the tags. A model of that mixture has learned a
solution that nearly always works, which reinforcement learning can find. Wrong answers are spread
out while right ones agree, so a vote over samples is better than one sample from the start.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from r1jax.data.example import Example, Split, split_of
from r1jax.data.tasks.task import HELD_OUT_SHARE

_Draw = Callable[[], float]  # The next number of a stream, in [0, 1).

_AGAIN = "<eos>=="  # the end of an attempt, and what asks for another one

_TASK_KEY = 0x72756E74  # Keeps this task's random streams apart from any other task's.


@dataclass(frozen=True)
class RunningTotal:
    """Add and subtract from left to right. Options of `task:running_total`:

    Attributes:
        min_terms, max_terms: Numbers in a problem, drawn evenly from this range (inclusive).
        term_digits: A term has at most so many digits.
        total_digits: Every running total is in 0 .. 10**total_digits - 1.
        worked_right, worked_slip, guess, malformed: Shares of the four kinds of text; their sum
            is 1. `worked_slip` has one wrong step, from which the rest follows correctly.
            `malformed` is worked but lacks a tag or two.
        guess_right: Share of the guesses that hit the answer.
        guess_spread: Other guesses are off by 1 .. guess_spread, evenly.
        second_attempts: Share of the texts with another solution behind `<eos>==`, for runs with
            two attempts at a question (`turns` with the text `==`, tokenizer
            characters:running_total).
    """

    min_terms: int = 3
    max_terms: int = 6
    term_digits: int = 1
    total_digits: int = 2
    worked_right: float = 0.2
    worked_slip: float = 0.2
    guess: float = 0.5
    malformed: float = 0.1
    guess_right: float = 0.1
    guess_spread: int = 12
    second_attempts: float = 0.0

    alphabet: ClassVar[str] = "0123456789+-= "

    def __post_init__(self) -> None:
        if not 2 <= self.min_terms <= self.max_terms:
            raise ValueError(
                f"options.min_terms = {self.min_terms}, options.max_terms = {self.max_terms}: "
                "needs 2 <= min_terms <= max_terms"
            )
        if not 1 <= self.term_digits <= self.total_digits <= 6:
            raise ValueError(
                f"options.term_digits = {self.term_digits}, options.total_digits = "
                f"{self.total_digits}: needs 1 <= term_digits <= total_digits <= 6"
            )
        shares = (self.worked_right, self.worked_slip, self.guess, self.malformed)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                "options.worked_right + worked_slip + guess + malformed = "
                f"{sum(shares):g}: shares are at least 0 and add up to 1"
            )
        for name in ("guess_right", "second_attempts"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"options.{name} = {getattr(self, name)}: a share is in 0 .. 1")
        if not 1 <= self.guess_spread < 10**self.total_digits:
            raise ValueError(
                f"options.guess_spread = {self.guess_spread}: needs 1 <= guess_spread < "
                f"10**total_digits = {10**self.total_digits}"
            )

    def example(self, index: int, split: Split) -> Example:
        """The index-th example of `split`, by drawing problems until one belongs to the split.

        By `random.Random` and only its `random()`: Python promises that stream for an integer seed
        in every version, and it is faster than a NumPy generator for few scalars.
        """
        # The split is part of the seed so that the splits do not even share problem sizes.
        seed = (_TASK_KEY << 64) | (index << 1) | (split == "held_out")
        draw = random.Random(seed).random
        while True:
            terms, totals = self._problem(draw)
            prompt = _expression(terms)
            if split_of(prompt, HELD_OUT_SHARE) == split:
                break
        text = prompt + self._solution(terms, totals, draw)
        if self.second_attempts and draw() < self.second_attempts:
            text += _AGAIN + self._solution(terms, totals, draw)
        return Example(
            id=index,
            prompt=prompt,
            answer=str(totals[-1]),
            text=text,
            domain="arithmetic",
        )

    def _problem(self, draw: _Draw) -> tuple[list[int], list[int]]:
        """Signed terms (the first is positive) and the running totals after each."""
        count = self.min_terms + int(draw() * (self.max_terms - self.min_terms + 1))
        largest, ceiling = 10**self.term_digits - 1, 10**self.total_digits - 1
        total = 1 + int(draw() * largest)
        terms, totals = [total], [total]
        for _ in range(count - 1):
            term = 1 + int(draw() * largest)
            # Both signs are equally likely where both keep the total in range. Where neither does
            # (only terms above half the range can do that) the whole total is taken away.
            up, down = total + term <= ceiling, total - term >= 0
            if not up and not down:
                term, down = total, True
            term = term if (up and (not down or draw() < 0.5)) else -term
            total += term
            terms.append(term)
            totals.append(total)
        return terms, totals

    def _solution(self, terms: list[int], totals: list[int], draw: _Draw) -> str:
        kind = draw()
        if kind < self.worked_right:
            return _worked(terms, totals)
        kind -= self.worked_right
        if kind < self.worked_slip:
            return _worked(terms, self._with_slip(terms, totals, draw))
        kind -= self.worked_slip
        if kind < self.guess:
            guess = totals[-1]
            if draw() >= self.guess_right:
                guess = self._near(guess, self.guess_spread, draw)
            return f"<think></think><answer>{guess}</answer>"
        answer, steps = totals[-1], _steps(terms, totals)
        half = f"<think>{steps}</think>{answer}", f"<think>{steps}<answer>{answer}</answer>"
        forms = (*half, steps, str(answer))
        return forms[int(draw() * len(forms))]

    def _with_slip(self, terms: list[int], totals: list[int], draw: _Draw) -> list[int]:
        """Totals with one wrong sum, and the later sums right for the total they start from."""
        at = 1 + int(draw() * (len(terms) - 1))
        wrong = totals[:at] + [self._near(totals[at], 9, draw)]
        for term in terms[at + 1 :]:
            # A total may leave the range after a slip; clipping it is one more slip, never a
            # longer number or a sign that right solutions do not have.
            wrong.append(min(max(wrong[-1] + term, 0), 10**self.total_digits - 1))
        return wrong

    def _near(self, value: int, spread: int, draw: _Draw) -> int:
        """Another number in range at a distance of at most `spread`, each equally likely."""
        low = max(value - spread, 0)
        high = min(value + spread, 10**self.total_digits - 1)
        other = low + int(draw() * (high - low))
        return other + (other >= value)


def _expression(terms: list[int]) -> str:
    return f"{terms[0]}" + "".join(f"{term:+d}" for term in terms[1:]) + "="


def _steps(terms: list[int], totals: list[int]) -> str:
    """`7+5=12 12-3=9`: each step starts from the total before it, so that it stands alone."""
    pairs = zip(totals, terms[1:], totals[1:], strict=False)
    return " ".join(f"{before}{term:+d}={after}" for before, term, after in pairs)


def _worked(terms: list[int], totals: list[int]) -> str:
    return f"<think>{_steps(terms, totals)}</think><answer>{totals[-1]}</answer>"
