r"""Rows/s of the accuracy reward alone, in one process and without worker processes.

Two kinds of rows, made here from a seed: whole numbers as in GSM8K, and answers as in MATH
(fractions, roots, polynomials, tuples, intervals, lists, matrices, equations, text). A third of the
answers is spelled as the reference is, a third otherwise, and a third is wrong.

    python benchmarks/rewards.py
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from fractions import Fraction

from r1jax.rewards.functions import load_reward
from r1jax.rewards.maths import accuracy
from r1jax.rewards.registry import Outcome, RewardInput

Spelled = tuple[str, str, str]
"""A reference, another spelling of it, and a wrong answer."""

_THOUGHT = "<think>We add what is given, and check each step. " + "So 3 + 4 = 7. " * 40 + "</think>"


def whole_number(rng: random.Random) -> Spelled:
    n = rng.choice([rng.randint(1, 99), rng.randint(100, 9999), rng.randint(10**4, 10**6)])
    return str(n), rng.choice([f"{n:,}", rf"\${n}", f"{n}.00", f"{n} apples"]), str(n + 1)


def fraction(rng: random.Random) -> Spelled:
    top, bottom = rng.randint(1, 40), rng.randint(2, 30)
    value = Fraction(top, bottom)
    reference = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return reference, f"{2 * top}/{2 * bottom}", rf"\frac{{{bottom}}}{{{top + bottom}}}"


def root(rng: random.Random) -> Spelled:
    a, b = rng.randint(2, 9), rng.choice([2, 3, 5, 7])
    return rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}", rf"{b}\sqrt{{{a + 1}}}"


def surd(rng: random.Random) -> Spelled:
    a, b, c = rng.randint(2, 9), rng.choice([2, 3, 5, 7]), rng.randint(2, 9)
    other = rf"\frac{{{a}}}{{{c}}}+\frac{{\sqrt{{{b}}}}}{{{c}}}"
    return rf"\frac{{{a}+\sqrt{{{b}}}}}{{{c}}}", other, rf"\frac{{{a}-\sqrt{{{b}}}}}{{{c}}}"


def multiple_of_pi(rng: random.Random) -> Spelled:
    a = rng.randint(2, 99)
    return rf"{a}\pi", rf"\pi\cdot {a}", rf"{a + 1}\pi"


def polynomial(rng: random.Random) -> Spelled:
    r, s = rng.randint(1, 9), rng.randint(1, 9)
    return f"x^2+{r + s}x+{r * s}", f"(x+{r})(x+{s})", f"x^2+{r * s + 1}x+{r + s}"


def expression(rng: random.Random) -> Spelled:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return rf"\frac{{{a}x}}{{x+{b}}}", f"{a}x/({b} + x)", rf"\frac{{{a}x}}{{x-{b}}}"


def pair(rng: random.Random) -> Spelled:
    a, b = rng.randint(-9, 9), rng.randint(10, 19)
    return f"({a},{b})", rf"\left({a}, {b}\right)", f"({b},{a})"


def interval(rng: random.Random) -> Spelled:
    a, b = rng.randint(-9, 0), rng.randint(1, 9)
    return rf"[{a},{b})\cup({b},\infty)", rf"[{a}, {b}) \cup ({b}, +\infty)", rf"[{a},\infty)"


def solutions(rng: random.Random) -> Spelled:
    a, b = rng.randint(-9, 0), rng.randint(1, 9)
    return f"{a}, {b}", rf"x = {b} \text{{ or }} x = {a}", f"{a}, {b + 1}"


def matrix(rng: random.Random) -> Spelled:
    a, b, c = (rng.randint(-9, 9) for _ in range(3))
    rows = rf"{a} & {b} \\ {c} & 11"
    swapped = rf"{a} & {b} \\ 11 & {c}"
    start, end = r"\begin{pmatrix}", r"\end{pmatrix}"
    bare = rf"\begin{{bmatrix}}{a}&{b}\\{c}&11\end{{bmatrix}}"
    return f"{start} {rows} {end}", bare, f"{start} {swapped} {end}"


def line(rng: random.Random) -> Spelled:
    m, b = rng.randint(2, 9), rng.randint(1, 9)
    return f"y = {m}x + {b}", f"{m}x - y + {b} = 0", f"y = {b + 10}x + {m}"


def words(rng: random.Random) -> Spelled:
    a, b = rng.sample(["Monday", "Friday", "ellipse", "hyperbola", "odd", "even"], 2)
    return rf"\text{{{a}}}", a, rf"\text{{{b}}}"


# MATH has more numbers than anything else.
_MATH = [whole_number] * 6 + [fraction] * 3 + [root, surd, multiple_of_pi, polynomial, expression]
_MATH += [pair, interval, solutions, matrix, line, words]


def rows_of(kinds: Sequence[Callable[[random.Random], Spelled]], count: int) -> list[RewardInput]:
    """The rows: every kind in turn, and of its three answers each in turn."""
    rng = random.Random(0)
    rows = []
    for index in range(count):
        reference, other, wrong = kinds[index // 3 % len(kinds)](rng)
        answer = (reference, other, wrong)[index % 3]
        rows.append(RewardInput("?", rf"{_THOUGHT} It is $\boxed{{{answer}}}$.", reference))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each kind is scored")
    arguments = parser.parse_args()
    load_reward("accuracy", {}).prepare({})
    for name, kinds in (("whole numbers", [whole_number]), ("MATH-like answers", _MATH)):
        rows = rows_of(kinds, 20_000)
        for row in rows[:60]:
            accuracy(row, {})
        done = right = 0
        start, cpu = time.perf_counter(), time.process_time()
        while (seconds := time.perf_counter() - start) < arguments.seconds and done < len(rows):
            right += accuracy(rows[done], {}).outcome is Outcome.RIGHT
            done += 1
        cpu = time.process_time() - cpu  # the measure where others use the machine, too
        print(
            f"{name:18} {done / seconds:8.0f} rows/s {done / cpu:8.0f} rows per CPU second  "
            f"({done} rows, {right / done:.1%} right, two thirds should be)"
        )


if __name__ == "__main__":
    main()
