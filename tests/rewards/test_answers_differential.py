"""The accuracy reward against answers of known value, and against answers that mean harm."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from answer_templates import TEMPLATES, Case, completion, pairs

from r1jax.rewards.extraction import final_answer
from r1jax.rewards.maths import UnreadableAnswer, equivalent_key, same_answer
from r1jax.rewards.registry import Outcome, RewardInput, Score
from r1jax.rewards.verifier import Verifier
from r1jax.settings.rewards import RewardSection, VerifierSection


def scores(rows: Sequence[tuple[str, str]], deadline: float = 5.0) -> list[Score]:
    """Scores (reference, completion) in a worker process with a deadline for each row."""
    answered = [RewardInput("?", text, reference) for reference, text in rows]
    section = VerifierSection(workers=1, deadline_seconds=deadline)
    with Verifier({"accuracy": RewardSection()}, section) as verifier:
        return [each.parts["accuracy"] for each in verifier.submit(answered).result()]


def misjudged(cases: Sequence[Case]) -> list[tuple[Case, str]]:
    """The cases with another verdict than theirs, masked rows included."""
    said = scores([(case.reference, case.completion) for case in cases])
    return [
        (case, score.detail or str(score.outcome))
        for case, score in zip(cases, said, strict=True)
        if score.outcome is Outcome.VERIFIER_FAILED
        or (score.outcome is Outcome.RIGHT) != case.right
    ]


def test_pairs_by_hand() -> None:
    """Other spellings of one value, and wrong answers that some grader rewards."""
    lines = (Path(__file__).parent / "answers.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    cases = [
        Case("by hand", reference, completion(answer), verdict == "right")
        for verdict, reference, answer in rows
    ]
    assert not misjudged(cases)


def test_spellings_and_values() -> None:
    count = 3 * len(TEMPLATES)
    cases = [*pairs(1, count, right=True), *pairs(2, count, right=False)]
    assert not misjudged(cases)


@pytest.mark.slow
def test_no_other_value_is_right() -> None:
    assert not misjudged(list(pairs(20261129, 3000, right=False)))


@pytest.mark.slow
def test_other_spellings_are_right() -> None:
    count = 3000
    wrong = misjudged(list(pairs(20261130, count, right=True)))
    assert len(wrong) <= count / 100, wrong


@pytest.mark.slow
def test_values_of_other_templates_are_wrong() -> None:
    """Fixed answers, and answers of one kind, to references of another kind."""
    rng = random.Random(3)
    fixed = [r"\frac{1}{9^{99}}", "987654321", r"e^{-987}", "q", "[]", r"\emptyset", "0.0", "()"]
    fixed += [r"\mathbb{R}", r"\infty", "3<x<1", "x=x", "0=0", r"\text{none}", "A, B, C, D, E"]
    cases = []
    for one in [each for each in TEMPLATES if each.name != "special"] * 4:
        reference = rng.choice(one.spell(one.draw(rng)).both)
        other = rng.choice([each for each in TEMPLATES if each is not one])
        spelled = other.spell(other.draw(rng))
        for answer in [*fixed, rng.choice(spelled.both + spelled.answers)]:
            cases.append(Case(one.name, reference, completion(answer), False))
    assert not misjudged(cases)


REFERENCES = ["7", r"\frac{1}{2}", r"\sqrt{2}", "x+1", "(1,2)", r"\{1,2\}", r"x \in (0,1)", "y=2x"]

HOSTILE = {
    "tower": "9^{9^9}",
    "tower of towers": "9^{9^{9^{9^9}}}",
    "tower of a variable": "x^{9^{9^9}}",
    "tower below a bar": r"\frac{1}{9^{9^9}}",
    "negative tower": "9^{-9^{9}}",
    "tower in plain text": "9**9**9**9",
    "root of a tower": r"\sqrt{9^{9^9}}",
    "cosine of a tower": r"\cos(10^{10^{10}})",
    "factorials": "9!!!!",
    "large factorial": "(10^9)!",
    "factorial of a factorial": "((99)!)!",
    "binomial": r"\binom{10^9}{5\cdot10^8}",
    "large binomial": r"\binom{999999}{499999}",
    "difference of towers": "6+9^{9^9}-9^{9^9}",
    "zero times a tower": r"6+0\cdot 9^{9^9}",
    "remainder of a tower": r"9^{9^9} \bmod 11",
    "sum": r"\sum_{k=1}^{10^{12}} \frac{1}{k}",
    "product": r"\prod_{k=1}^{10^{9}} k",
    "integral": r"\int_0^1 e^{e^{e^{x}}} dx",
    "limit": r"\lim_{x\to 0} \frac{\sin(\sin(\sin(x^{99})))}{x^{999}}",
    "expansion": "(a+b+c+d+e+f+g)^{999}",
    "product of sums": "".join(f"(x+{k})" for k in range(400)),
    "sum of roots": "+".join(rf"\sqrt{{{k}}}" for k in range(2, 60)),
    "nested roots": r"\sqrt{2+" * 200 + "1" + "}" * 200,
    "nested logarithms": r"\ln(" * 500 + "9" + ")" * 500,
    "digits": "7" * 100_000,
    "digits behind the point": "7." + "0" * 100_000 + "1",
    "long exponent": "1e" + "9" * 5000,
    "exponent of a decimal": "1e999999999",
    "small exponent of a decimal": "1e-999999999",
    "scientific tower": r"1.5\times 10^{999999999}",
    "base": "1" * 5000 + "_7",
    "recurring decimal": r"0.\overline{" + "123456789" * 2000 + "}",
    "braces": "{" * 5000 + "7" + "}" * 5000,
    "brackets": "(" * 5000 + "8" + ")" * 5000,
    "open brackets": "(" * 50_000,
    "open braces": r"\{" * 20_000,
    "fractions": r"\frac{1}{1+" * 5000 + "1" + "}" * 5000,
    "exponents": "2^{" * 5000 + "1" + "}" * 5000,
    "left and right": r"\left(" * 5000 + "8" + r"\right)" * 5000,
    "bars": "|" * 5000,
    "minus signs": "-" * 50_000 + "8",
    "plus and minus": "1" + r"\pm 1" * 40,
    "list": ",".join("1" * 20_000),
    "list of names": ",".join(f"x_{{{k}}}={k}" for k in range(3000)),
    "union": r"\cup".join(f"({k},{k + 1})" for k in range(2000)),
    "matrix": r"\begin{pmatrix}" + r"\\".join(["&".join("1" * 60)] * 60) + r"\end{pmatrix}",
    "spaces": "7" + " " * 100_000 + "8",
    "backslashes": "\\" * 50_000,
    "dots and commas": "1,1.1," * 10_000,
    "thousands that are none": "1,234," * 10_000 + "5",
    "words": "the answer is " * 5000,
    "words in commands": r"\text{ and }" * 5000,
    "inequalities": "<".join("x" * 5000),
    "equations": "=".join("x" * 5000),
    "equation of high degree": "x^{99}-x^{7}+x^{3}+1=0",
    "equations with roots": r"\sqrt{x}+\sqrt{x+1}+\sqrt{x+2}+\sqrt[3]{x+5}=\ln x",
    "trigonometric equation": r"\sin(\cos(\tan x)) = x^{x^x}",
    "congruence": r"x \equiv 123456789 \pmod{987654321987}",
    "code": "__import__('time').sleep(100)",
    "evaluation": "eval('9**9**9')",
    "surrogate": "\ud800",
    "null": "\x00" * 1000,
    "combining characters": "7" + "\u0301" * 50_000,
    "set of tuples": r"\{" + ",".join(f"({k},{k})" for k in range(3000)) + r"\}",
}


def not_wrong(reference: str, deadline: float) -> dict[str, str]:
    """The hostile answers that are not judged wrong in time, and what was said."""
    # A lone surrogate never reaches a worker: no file of rows can hold one.
    names = [name for name in HOSTILE if name != "surrogate"]
    said = scores([(reference, completion(HOSTILE[name])) for name in names], deadline)
    return {
        name: score.detail or str(score.outcome)
        for name, score in zip(names, said, strict=True)
        if score.outcome not in (Outcome.WRONG, Outcome.UNPARSEABLE)
    }


def test_hostile_answers_are_wrong() -> None:
    assert not not_wrong("7", deadline=5.0)


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
def test_each_hostile_answer_is_judged_in_a_second(reference: str) -> None:
    assert not not_wrong(reference, deadline=1.5)


TOKENS = r"""
\frac \sqrt \pi \infty \left( \right) ( ) [ ] { } \{ \} | + - * / ^ _ = < > \le \ne \pm \cdot , ;
: . ! ' % \% \$ $ & \\ \begin{pmatrix} \end{pmatrix} \begin{cases} \end{cases} \text{ \text{or}
\mathrm{ \sin \log \ln \log_ \binom \sum_ \int_ \lim_ \overline{ \vec ^\circ \cup \in \setminus
\mathbb{R} \emptyset \equiv \pmod \mid \langle \rangle \lfloor \rfloor \max \gcd \approx x y n i e
a 0 1 2 3 7 10 0.5 .5 1e5 999 0. .. ... \ldots and or not if for cm million percent true A B (A)
x= f(x)= 3:4 1,000 1,\!000 √ ² ½ π ∞ ≤ 或 、 。 元 \quad \! ~ @ # \phantom{ \operatorname{foo} \over
\sqrt[3] \sqrt[ \boxed{ _5 _{10} ^{-1} ^{99} ^{9^9} !! \sin^{-1} \sin^2
""".split()


def test_any_text_is_read_or_refused() -> None:
    """A sequence of tokens in any order has a verdict: nothing else is raised, as it would mask."""
    rng = random.Random(4)
    for _ in range(1500):
        answer = rng.choice(("", " ")).join(rng.choices(TOKENS, k=rng.randint(1, 12)))
        kind = rng.choice(TEMPLATES)
        reference = rng.choice(kind.spell(kind.draw(rng)).both)
        with contextlib.suppress(UnreadableAnswer):
            same_answer(reference, answer)
        equivalent_key(answer)


@pytest.mark.parametrize("depth", [4000, 50_000])
def test_boxes_are_read_in_linear_time(depth: int) -> None:
    nested, row = r"\boxed{" * depth + "7" + "}" * depth, r"\boxed{7}" * depth
    start = time.monotonic()
    assert final_answer(nested) == final_answer(row) == "7"
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("name", HOSTILE)
def test_a_key_for_votes_is_made_of_any_answer_at_once(name: str) -> None:
    start = time.monotonic()
    equivalent_key(HOSTILE[name])
    assert time.monotonic() - start < 2
