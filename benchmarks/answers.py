r"""How often the accuracy reward judges right: reference answers with small changes.

A file has reference answers, a JSON list of strings. Each one is changed in ways whose right
verdict is known, and the changed text is scored as the answer `\boxed{...}` to the reference, in
worker processes with a deadline, as in a run. A right verdict is reward 1 for another spelling of
the same value, and reward 0 (wrong or unparseable) for another value; a masked row has no verdict.

    python benchmarks/answers.py REFERENCES.json
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from r1jax.rewards.registry import Outcome, RewardInput
from r1jax.rewards.verifier import Verifier
from r1jax.settings.rewards import RewardSection, VerifierSection

Expected = Literal["right", "wrong", "either"]


class Pair(NamedTuple):
    """A reference, an answer to it, and the verdict that it should get."""

    reference: str
    answer: str
    expected: Expected


Change = Callable[[str, random.Random], Iterator[Pair]]

_MATRIX = re.compile(r"(\\begin\{[pbvBV]?matrix\})(.*?)(\\end\{[pbvBV]?matrix\})", re.DOTALL)
_ROW_END = re.compile(r"\\\\[ \t\n]*")
_COMMAND = r"\\begin\{array\}\{[^}]*\}|\\(?:begin|end)\{[^}]*\}|\\[A-Za-z]+|\\."
_WORDS = r"\\(?:text|mbox|mathrm|textbf)\s*\{[^{}]*\}"


def same_text(reference: str, rng: random.Random) -> Iterator[Pair]:
    """The reference itself."""
    yield Pair(reference, reference, "right")


def row_spaces(reference: str, rng: random.Random) -> Iterator[Pair]:
    r"""White space behind `\\` of a matrix put in, or taken out."""
    if _MATRIX.search(reference) and r"\\" in reference:
        for space in ("", " ", "\n  "):
            changed = _ROW_END.sub(lambda _: r"\\" + space, reference)  # noqa: B023
            if changed != reference and not re.search(r"\\\\[A-Za-z]", changed):
                yield Pair(reference, changed, "right")


def brackets(reference: str, rng: random.Random) -> Iterator[Pair]:
    """Another kind of brackets round a matrix, with and without white space."""
    for old, new in (("pmatrix", "bmatrix"), ("bmatrix", "pmatrix")):
        if old in reference:
            changed = reference.replace(old, new)
            yield Pair(reference, changed, "right")
            bare = re.sub(r"\s*(\\\\|&|\\begin\{[a-z]+\}|\\end\{[a-z]+\})\s*", r"\1", changed)
            if not re.search(r"\\\\[A-Za-z]", bare):
                yield Pair(reference, bare, "right")


def thousands(reference: str, rng: random.Random) -> Iterator[Pair]:
    r"""`,\!` between groups of digits taken out, on either side, or made a comma."""
    separator = r",\!"
    if re.search(r"[0-9],\\![0-9]{3}", reference):
        without = reference.replace(separator, "")
        yield Pair(reference, without, "right")
        yield Pair(without, reference, "right")
        yield Pair(reference, reference.replace(separator, ","), "right")


_OTHERWISE: list[tuple[str, str]] = [
    (r"\\frac(?=\{)", r"\\dfrac"),
    (r"\\dfrac(?=\{)", r"\\tfrac"),
    (r"\\frac\{([0-9]+)\}\{([0-9]+)\}", r"\\frac{ \1 }{ \2 }"),
    (r"^\\frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1/\2"),
    (r"\\sqrt\{([0-9])\}", r"\\sqrt\1"),
    (r"\\sqrt\{([0-9]+)\}", r"√\1"),
    (r"\^([0-9])", r"^{\1}"),
    (r"_([0-9])", r"_{\1}"),
    (r"(?<=[0-9a-z}])\s*([-+=<>])\s*(?=[0-9a-z\\])", r" \1 "),
    (r"(?<=[0-9a-z}])\s*([-+=])\s*(?=[0-9a-z\\])", r"\1"),
    (r"(?<![\\!]),\s*(?=[-0-9a-z\\(])(?!\\!|[0-9]{3}(?![0-9]))", r",\\ "),
    (r"\\left(?=[(\[|])|\\right(?=[)\]|])", ""),
    (r"\\pi(?![a-zA-Z])", "π"),
    (r"\\infty(?![a-zA-Z])", "∞"),
    (r"\\cup(?![a-zA-Z])", "∪"),
    (r"\\text\{([^{}]*)\}$", r"\\mbox{\1}"),
    (r"\\le(?![a-zA-Z])", r"\\leq"),
    (r"^-(?=[0-9])", "\u2212"),
    (r"^(.*)$", r"$\1$"),
    (r"^(.*)$", r"\\displaystyle \1"),
    (r"^(.*)$", r"\1."),
    (r"^(.*)$", r"The answer is $\1$."),
    (r"^(.*)$", r"{\1}"),
]


def spelled_otherwise(reference: str, rng: random.Random) -> Iterator[Pair]:
    """The same mathematics in another LaTeX or Unicode spelling."""
    ways = [way for way in _OTHERWISE if re.sub(*way, reference) != reference]
    if "$" in reference or r"\text" in reference:
        ways = [way for way in ways if not way[0].endswith("$")]
    if not ways:
        return
    pattern, new = rng.choice(ways)
    yield Pair(reference, re.sub(pattern, new, reference), "right")


def entries_swapped(reference: str, rng: random.Random) -> Iterator[Pair]:
    """Two different entries of a matrix change places."""
    matrix = _MATRIX.search(reference)
    if matrix is None:
        return
    parts = re.split(r"(\\\\|&)", matrix[2])
    entries = [index for index in range(0, len(parts), 2) if parts[index].strip()]
    pairs = [
        (one, other)
        for one in entries
        for other in entries
        if one < other and parts[one].strip() != parts[other].strip()
    ]
    if pairs:
        one, other = rng.choice(pairs)
        parts[one], parts[other] = parts[other], parts[one]
        changed = reference[: matrix.start(2)] + "".join(parts) + reference[matrix.end(2) :]
        yield Pair(reference, changed, "wrong")


def sign(reference: str, rng: random.Random) -> Iterator[Pair]:
    """A minus in front taken away; one put in front of a number or a fraction."""
    if reference.startswith("-"):
        changed = reference[1:].strip()
        # The value of -a and a is the same for 0 alone, and -a = 0 is the same equation.
        yield Pair(reference, changed, "either" if "=" in reference else "wrong")
    elif re.fullmatch(
        r"[1-9][0-9]*(,\\!?[0-9]{3})*|\\[dt]?frac\{[1-9][0-9]*\}\{[0-9]+\}", reference
    ):
        yield Pair(reference, "-" + reference, "wrong")


def digit(reference: str, rng: random.Random) -> Iterator[Pair]:
    """One digit becomes another one."""
    places = [match.start() for match in re.finditer("[0-9]", reference)]
    if places:
        place = rng.choice(places)
        new = rng.choice([each for each in "123456789" if each != reference[place]])
        changed = reference[:place] + new + reference[place + 1 :]
        yield Pair(reference, changed, "wrong")


def _letters(reference: str) -> list[int]:
    """Where letters stand that belong neither to a command nor to words in `\\text{}`."""
    hidden = {
        place
        for match in re.finditer(f"{_WORDS}|{_COMMAND}", reference)
        for place in range(match.start(), match.end())
    }
    return [
        place
        for place, character in enumerate(reference)
        if place not in hidden and character.isascii() and character.isalpha()
    ]


def renamed(reference: str, rng: random.Random) -> Iterator[Pair]:
    """One variable has another name, wherever it stands."""
    places = _letters(reference)
    names = sorted({reference[place] for place in places})
    if not names:
        return
    old = rng.choice(names)
    free = [each for each in "kqruvwabcdfghjlmnopstxyz" if each not in reference]
    if not free:
        return
    new = rng.choice(free[:6])
    changed = "".join(
        new if place in places and character == old else character
        for place, character in enumerate(reference)
    )
    # The argument of a function that is named, and a variable bound by a set, may have any name.
    bound = re.search(rf"[a-z]\({old}\)\s*=", reference) or re.search(r"\\mid|\|", reference)
    yield Pair(reference, changed, "either" if bound else "wrong")


def letter_left_out(reference: str, rng: random.Random) -> Iterator[Pair]:
    """One letter is missing."""
    places = _letters(reference)
    if not places:
        return
    place = rng.choice(places)
    changed = (reference[:place] + reference[place + 1 :]).strip()
    if not changed or changed == reference:
        return
    # `= 3` for `x = 3` lacks nothing but the name.
    harmless = changed.lstrip().startswith("=")
    yield Pair(reference, changed, "either" if harmless else "wrong")


def wrong_number(reference: str, rng: random.Random) -> Iterator[Pair]:
    """A number that no reference is likely to be."""
    yield Pair(reference, str(rng.randrange(10**8, 10**9)), "wrong")


CHANGES: dict[str, Change] = {
    "none": same_text,
    r"white space behind \\": row_spaces,
    "brackets of matrices": brackets,
    r"thousands ,\!": thousands,
    "spelled otherwise": spelled_otherwise,
    "two entries swapped": entries_swapped,
    "sign": sign,
    "one digit changed": digit,
    "one variable renamed": renamed,
    "one letter left out": letter_left_out,
    "a wrong number": wrong_number,
}


@dataclass
class Result:
    """Verdicts on the rows of one change.

    Attributes:
      rows: those whose right verdict is known.
      right: those with the right verdict.
      unparseable: those among `right` where the answer could not be read.
      masked: no verdict, by cause.
      failures: pairs with a wrong verdict or none, and what was said.
      either: pairs whose verdict is a matter of taste, by what was said.
    """

    rows: int = 0
    right: int = 0
    unparseable: int = 0
    masked: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Pair, str]] = field(default_factory=list)
    either: Counter[str] = field(default_factory=Counter)

    def add(self, pair: Pair, outcome: Outcome, detail: str | None) -> None:
        """Counts one verdict."""
        if pair.expected == "either":
            self.either[str(outcome)] += 1
            return
        self.rows += 1
        rewarded = outcome is Outcome.RIGHT
        if outcome is Outcome.VERIFIER_FAILED:
            self.masked[(detail or "").partition(":")[0]] += 1
        elif rewarded == (pair.expected == "right"):
            self.right += 1
            self.unparseable += outcome is Outcome.UNPARSEABLE
            return
        self.failures.append((pair, detail or str(outcome)))


def verdicts(pairs: list[Pair], section: VerifierSection) -> list[tuple[Outcome, str | None]]:
    """The outcome of each pair and why there is none, from worker processes."""
    rows = [RewardInput("?", rf"\boxed{{{pair.answer}}}", pair.reference) for pair in pairs]
    with Verifier({"accuracy": RewardSection()}, section) as verifier:
        scores = [each.parts["accuracy"] for each in verifier.submit(rows).result()]
    return [(each.outcome, each.detail) for each in scores]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("references", type=Path, help="a JSON list of reference answers")
    parser.add_argument("--limit", type=int, help="so many of them, drawn by the seed")
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds for one row")
    parser.add_argument("--examples", type=int, default=3, help="failures shown of each change")
    parser.add_argument("--failures", type=Path, help="all failures go here, as JSON lines")
    arguments = parser.parse_args()

    references: list[str] = json.loads(arguments.references.read_text())
    if arguments.limit is not None:
        references = random.Random(arguments.seed).sample(references, arguments.limit)
    section = VerifierSection(workers=arguments.workers, deadline_seconds=arguments.deadline)
    total = Result()
    seconds = 0.0
    unreadable: set[str] = set()
    lines: list[str] = []
    for name in arguments.changes:
        rng = random.Random(arguments.seed)
        pairs = [pair for each in references for pair in CHANGES[name](each, rng)]
        start = time.perf_counter()
        said = verdicts(pairs, section)
        seconds += time.perf_counter() - start
        result = Result()
        for pair, (outcome, detail) in zip(pairs, said, strict=True):
            result.add(pair, outcome, detail)
            total.add(pair, outcome, detail)
            if (detail or "").startswith("UnreadableReference"):
                unreadable.add(pair.reference)
        show(name, result, arguments.examples)
        lines += [
            json.dumps({"change": name, **pair._asdict(), "said": detail}, ensure_ascii=False)
            for pair, detail in result.failures
        ]
    show("all", total, 0)
    print(
        f"{len(unreadable)} of {len(references)} references are unreadable "
        f"({len(unreadable) / len(references):.2%}); {sum(total.masked.values())} rows masked; "
        f"{(total.rows + total.either.total()) / seconds:.0f} rows/s with "
        f"{arguments.workers} worker(s), their start included"
    )
    for reference in sorted(unreadable)[: arguments.examples]:
        print(f"    unreadable: {reference}")
    if arguments.failures is not None:
        arguments.failures.write_text("".join(line + "\n" for line in lines))


def show(name: str, result: Result, examples: int) -> None:
    """Prints one line of figures and some failures."""
    share = result.right / max(1, result.rows)
    masked = ", ".join(f"{count} {cause}" for cause, count in result.masked.most_common())
    print(
        f"{name:24} {result.rows:6} rows  {result.right:6} right verdicts ({share:7.2%})  "
        f"unparseable {result.unparseable:5}  masked {masked or 0}"
        + (f"  (apart, either verdict: {dict(result.either)})" if result.either else ""),
        flush=True,
    )
    for pair, said in result.failures[:examples]:
        print(f"    {pair.reference!r} / {pair.answer!r}: {said}; expected {pair.expected}")


if __name__ == "__main__":
    main()
