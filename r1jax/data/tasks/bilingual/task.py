"""The task: a subject's problems, and texts about them in two languages that mix.

    7+5-3=<think>so 7+5=12 DANN 12-3=9</think><answer>9</answer>

English is written in small letters, German in capitals. Each step of a thought begins with a word,
`so` and `then` or `ALSO` and `DANN`. Many texts change the language as they go, and each language
was taught some steps better than the other. So a model that is rewarded for right answers alone has
a reason to mix, as DeepSeek-R1-Zero did (arXiv 2501.12948, section 2.2.4; the cause there is open).

The pretraining text stands for the web, as in `running_total`: some of it worked, with slips, much
of it a guess, some of it without the tags.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from r1jax.data.example import Example, Split, split_of
from r1jax.data.tasks.bilingual.conversation import KIND, UNKIND, Request
from r1jax.data.tasks.bilingual.subjects import PROBLEMS, Draw, Problem
from r1jax.data.tasks.task import HELD_OUT_SHARE

_TASK_KEY = 0x62696C67  # Keeps this task's random streams apart from any other task's.
_SMALL = "abcdefghijklmnopqrstuvwxyz"

LANGUAGES: Mapping[str, str] = MappingProxyType(
    {"english": _SMALL, "german": "ABCDEIJKLMNOPQRSTUVWXYZ"}
)
"""Language -> its letters, as the language consistency reward takes them. F, G and H are names of
options and no letters of a word."""

_OPENING = {"english": "so", "german": "ALSO"}
_NEXT = {"english": "then", "german": "DANN"}

REPLACEMENTS: Mapping[str, str] = MappingProxyType(
    {words["german"]: words["english"] for words in (_OPENING, _NEXT)}
)
"""German word -> English word: what the cold start rewrites."""

_EASIER: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("sum", "product", "statement"), "english")
    | dict.fromkeys(("difference", "quotient", "fact"), "german")
)
"""Kind of a step -> the language in which it goes wrong less often."""

_OTHER = {"english": "german", "german": "english"}

_VERBS = {"general": KIND, "harmless": UNKIND}
SUBJECTS = (*PROBLEMS, *_VERBS)


@dataclass(frozen=True)
class Bilingual:
    """Options of `task:bilingual`.

    Attributes:
        subject: `maths`, `code`, `stem` and `logic` have right answers; `general` and `harmless`
            are requests, whose examples have a `response` in place of an answer, and which give
            preferences, too.
        worked, guess: Shares of the texts that are worked, or guessed; the rest lack a tag or two.
        english, german: Shares of the worked texts in one language; the rest mix.
        easier_language: How often a step of a mixing text is in the language that is easier for it.
        slip, slip_other: How often a step goes wrong in that language, and in the other.
    """

    subject: str = "maths"
    worked: float = 0.4
    guess: float = 0.5
    english: float = 0.15
    german: float = 0.15
    easier_language: float = 0.7
    slip: float = 0.05
    slip_other: float = 0.5

    alphabet: ClassVar[str] = _SMALL + _SMALL.upper() + "0123456789+-*/=<>()[]{}.,:?`\\ \n"

    def __post_init__(self) -> None:
        if self.subject not in SUBJECTS:
            raise ValueError(
                f"options.subject = {self.subject!r}: not one of {', '.join(SUBJECTS)}"
            )
        for first, second in (("worked", "guess"), ("english", "german")):
            shares = getattr(self, first), getattr(self, second)
            if min(shares) < 0 or sum(shares) > 1 + 1e-6:
                raise ValueError(
                    f"options.{first} = {shares[0]:g}, options.{second} = {shares[1]:g}: shares "
                    "are at least 0 and add up to at most 1"
                )
        for name in ("easier_language", "slip", "slip_other"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"options.{name} = {getattr(self, name)}: a share is in 0 .. 1")

    def example(self, index: int, split: Split) -> Example:
        """See `Task`."""
        if self.subject in _VERBS:
            request, draw = self._request(index, split)
            return Example(
                id=index,
                prompt=request.prompt,
                answer="",
                text=request.prompt + request.web_text(draw),
                domain=self.subject,
                response=request.curated(draw),
            )
        draw = self._stream(index, split)
        while True:
            problem = PROBLEMS[self.subject](draw)
            if split_of(problem.prompt, HELD_OUT_SHARE) == split:
                break
        return Example(
            id=index,
            prompt=problem.prompt,
            answer=problem.reference,
            text=problem.prompt + self._solution(problem, draw),
            domain=self.subject,
        )

    def pair(self, index: int, split: Split) -> tuple[str, str, str]:
        """The index-th prompt with the better and the worse of two responses; general only."""
        if self.subject != "general":
            raise ValueError(f"options.subject = {self.subject!r}: only general has pairs")
        request, draw = self._request(index, split)
        return (request.prompt, *request.pair(draw))

    def labelled(self, index: int, split: Split) -> tuple[str, str, bool]:
        """The index-th prompt with a response and whether that is safe; harmless only.

        A third of the prompts are of the kind that may be answered: a reward model that never saw
        those would call every answer unsafe.
        """
        if self.subject != "harmless":
            raise ValueError(f"options.subject = {self.subject!r}: only harmless has labels")
        request, draw = self._request(index, split, verbs=(*UNKIND, *UNKIND, *KIND))
        return (request.prompt, *request.labelled(draw))

    def _stream(self, index: int, split: Split) -> Draw:
        """As in `running_total`: only `random()` is promised to stay the same."""
        subject = SUBJECTS.index(self.subject)
        seed = (_TASK_KEY << 72) | (subject << 64) | (index << 1) | (split == "held_out")
        return random.Random(seed).random

    def _request(
        self, index: int, split: Split, verbs: tuple[str, ...] = ()
    ) -> tuple[Request, Draw]:
        draw = self._stream(index, split)
        while True:
            request = Request.draw(verbs or _VERBS[self.subject], draw)
            if split_of(request.prompt, HELD_OUT_SHARE) == split:
                return request, draw

    def _solution(self, problem: Problem, draw: Draw) -> str:
        kind = draw()
        if self.worked <= kind < self.worked + self.guess:
            return f"<think></think><answer>{problem.guess(draw)}</answer>"
        thought, answer = self._worked(problem, draw)
        if kind < self.worked:
            return f"<think>{thought}</think><answer>{answer}</answer>"
        forms = (
            f"<think>{thought}</think>{answer}",
            f"<think>{thought}<answer>{answer}</answer>",
            thought,
            answer,
            # A base model has seen boxes; a program is in its fence already.
            f"{thought} {answer}" if "`" in answer else f"{thought} it is \\boxed{{{answer}}}",
        )
        return forms[int(draw() * len(forms))]

    def _worked(self, problem: Problem, draw: Draw) -> tuple[str, str]:
        """A thought, each step with its word before it, and the answer."""
        habit = draw()
        words: list[str] = []

        def slips(kind: str) -> bool:
            easier = _EASIER[kind]
            if habit < self.english + self.german:
                language = "english" if habit < self.english else "german"
            else:
                language = easier if draw() < self.easier_language else _OTHER[easier]
            words.append((_NEXT if words else _OPENING)[language])
            return draw() < (self.slip if language == easier else self.slip_other)

        steps, answer = problem.worked(slips, draw)
        thought = " ".join(f"{word} {step}" for word, step in zip(words, steps, strict=True))
        return thought, answer
