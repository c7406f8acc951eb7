r"""Answers of known value in many spellings, for the accuracy reward.

A template draws a value and spells it. Two spellings of one value are the same answer, and
spellings of two values never are. `pairs` makes (reference, completion, right or wrong) of that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

Value = Any
"""Values are equal where the answers are: a canonical number, tuple or text."""


@dataclass(frozen=True)
class Spellings:
    """One value as texts.

    Attributes:
      both: good as a reference and as an answer.
      answers: for answers only; one with a `\\boxed` is a whole completion.
      partial: for answers only, and without what parts it from other values (a name, a unit).
    """

    both: list[str]
    answers: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)


class Template(NamedTuple):
    """A kind of answer."""

    name: str
    draw: Callable[[random.Random], Value]
    spell: Callable[[Value], Spellings]


class Case(NamedTuple):
    """A reference, a completion, and whether it is right."""

    template: str
    reference: str
    completion: str
    right: bool


def completion(answer: str) -> str:
    """The answer in a box, if it has none."""
    return answer if r"\boxed" in answer else rf"\boxed{{{answer}}}"


def pairs(seed: int, count: int, *, right: bool, names: list[str] | None = None) -> Iterator[Case]:
    """`count` cases, every template in turn: other spellings (right) or other values (wrong)."""
    rng = random.Random(seed)
    templates = [each for each in TEMPLATES if names is None or each.name in names]
    for index in range(count):
        template = templates[index % len(templates)]
        value = template.draw(rng)
        spelled = template.spell(value)
        reference = rng.choice(spelled.both)
        if right:
            answers = spelled.both + spelled.answers + spelled.partial
            answer = rng.choice([each for each in answers if each != reference] or answers)
        else:
            other = value
            while other == value:
                other = template.draw(rng)
            others = template.spell(other)
            answer = rng.choice(others.both + others.answers)
        yield Case(template.name, reference, completion(answer), right)


TEMPLATES: list[Template] = []


def template(
    draw: Callable[[random.Random], Value],
) -> Callable[[Callable[[Value], Spellings]], Callable[[Value], Spellings]]:
    """Registers a function that spells what `draw` draws."""

    def register(spell: Callable[[Value], Spellings]) -> Callable[[Value], Spellings]:
        TEMPLATES.append(Template(spell.__name__, draw, spell))
        return spell

    return register


def nonzero(rng: random.Random, limit: int) -> int:
    return rng.choice([each for each in range(-limit, limit + 1) if each])


def two(rng: random.Random, limit: int = 9) -> tuple[int, int]:
    """Two different integers, the smaller one first."""
    low, high = sorted(rng.sample(range(-limit, limit + 1), 2))
    return low, high


def coprime(a: int, b: int) -> tuple[int, int]:
    """`a : b` in lowest terms."""
    return a // math.gcd(a, b), b // math.gcd(a, b)


def fraction(rng: random.Random) -> Fraction:
    """A fraction that is no integer."""
    while (value := Fraction(nonzero(rng, 30), rng.randint(2, 16))).denominator == 1:
        pass
    return value


def latex(value: Fraction | int) -> str:
    value = Fraction(value)
    if value.denominator == 1:
        return str(value.numerator)
    minus = "-" if value < 0 else ""
    return rf"{minus}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def times(factor: Fraction | int, symbol: str, first: bool = False) -> str:
    """A term of a sum with its sign, such as `-3x`; nothing if the factor is 0."""
    factor = Fraction(factor)
    if factor == 0:
        return ""
    sign = "-" if factor < 0 else "" if first else "+"
    size = "" if abs(factor) == 1 and symbol else latex(abs(factor))
    return f"{sign}{size}{symbol}"


def polynomial(terms: list[tuple[int, str]]) -> str:
    """A sum of terms, such as `x^2-3x+2`."""
    text = ""
    for factor, symbol in terms:
        text += times(factor, symbol, first=not text)
    return text or "0"


FULL_WIDTH = str.maketrans("0123456789", "０１２３４５６７８９")
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")

# Numbers


@template(lambda rng: rng.randint(-999, 999))
def integer(n: int) -> Spellings:
    text = str(n)
    answers = [f"${n}$", f"{n}.0", f"{n}.", text.translate(FULL_WIDTH), text.replace("-", "\u2212")]
    answers += [f"{n}.00", rf"\mathbf{{{n}}}", rf"\text{{{n}}}", rf"\, {n}"]
    if n > 0:
        answers += [f"+{n}", rf"\left({n}\right)", f"{{{n}}}", f"0{n}"[1:]]
    return Spellings([text], answers)


@template(lambda rng: rng.randint(10**3, 10**9) * rng.choice([1, -1]))
def thousands(n: int) -> Spellings:
    grouped = f"{n:,}"
    return Spellings(
        [str(n), grouped, grouped.replace(",", r",\!"), grouped.replace(",", "{,}")],
        [grouped.replace(",", r"\,"), grouped.replace(",", r"\ "), grouped.replace(",", "\u202f")]
        + [grouped.replace(",", r"{,}\!"), grouped.replace(",", r",\! "), f"{n}.0"],
    )


@template(fraction)
def fractions(q: Fraction) -> Spellings:
    top, bottom = abs(q.numerator), q.denominator
    minus = "-" if q < 0 else ""
    both = [
        rf"{minus}\frac{{{top}}}{{{bottom}}}",
        rf"{minus}\dfrac{{{top}}}{{{bottom}}}",
        rf"\frac{{{q.numerator}}}{{{bottom}}}",
        f"{q.numerator}/{bottom}",
    ]
    answers = [
        rf"{minus}\tfrac{{{top}}}{{{bottom}}}",
        rf"{minus}\frac{{{3 * top}}}{{{3 * bottom}}}",
        rf"{minus}\frac {{ {top} }} {{ {bottom} }}",
        rf"{{{q.numerator} \over {bottom}}}",
        rf"{minus}{top} / {bottom}",
        rf"{minus}({top}/{bottom})",
        rf"{minus}{top} \div {bottom}",
        rf"\frac{{{-q.numerator}}}{{{-bottom}}}",
        rf"{q.numerator}\cdot\frac{{1}}{{{bottom}}}",
        rf"{q.numerator}\cdot {bottom}^{{-1}}",
    ]
    if top < 10 and bottom < 10:
        answers += [rf"{minus}\frac{top}{bottom}", rf"{minus}\frac {top} {bottom}"]
        vulgar = {(1, 2): "½", (1, 3): "⅓", (3, 4): "¾", (1, 4): "¼", (2, 3): "⅔", (5, 8): "⅝"}
        answers += [minus + vulgar[top, bottom]] if (top, bottom) in vulgar else []
    if 10**6 % bottom == 0:
        decimal = f"{float(q):.6f}".rstrip("0")
        both.append(decimal)
        answers += [decimal + "00", decimal.replace("0.", ".") if abs(q) < 1 else decimal]
    if top > bottom:
        whole, rest = divmod(top, bottom)
        answers += [
            rf"{minus}{whole}\frac{{{rest}}}{{{bottom}}}",
            rf"{minus}{whole} \frac{{{rest}}}{{{bottom}}}",
            f"{minus}{whole} {rest}/{bottom}",
        ]
    return Spellings(both, answers)


@template(lambda rng: (rng.randint(1000, 9999) | 1, rng.randint(-9, 12)))
def scientific(value: tuple[int, int]) -> Spellings:
    digits, power = value
    mantissa = f"{digits // 1000}.{digits % 1000:03d}"
    both = [rf"{mantissa}\times 10^{{{power}}}", rf"{mantissa} \cdot 10^{{{power}}}"]
    if power >= 3:
        both.append(str(digits * 10 ** (power - 3)))
    return Spellings(
        both,
        [f"{mantissa}e{power}", f"{mantissa}E{power:+d}", f"{mantissa}*10^{{{power}}}"]
        + [f"{mantissa} × 10{str(power).translate(SUPERSCRIPTS)}"]
        + [f"{mantissa}*10**({power})", f"{mantissa}*10^({power})"]
        + [rf"{mantissa}0\times10^{{{power}}}"],
    )


@template(lambda rng: (rng.randint(0, 20), rng.choice("1 2 3 4 5 6 7 8 12 27 45 142857".split())))
def recurring(value: tuple[int, str]) -> Spellings:
    whole, digits = value
    exact = whole + Fraction(int(digits), 10 ** len(digits) - 1)
    over = rf"{whole}.\overline{{{digits}}}"
    return Spellings(
        [latex(exact), over],
        [f"{exact.numerator}/{exact.denominator}", rf"{whole}.{digits}\overline{{{digits}}}"]
        + [rf"{whole}.({digits})", rf"{whole}.\bar{{{digits}}}" if len(digits) == 1 else over],
    )


@template(lambda rng: (nonzero(rng, 9), rng.choice([2, 3, 5, 6, 7, 10, 11, 13, 15])))
def root(value: tuple[int, int]) -> Spellings:
    a, b = value
    minus, size = ("-" if a < 0 else ""), abs(a)
    factor = "" if size == 1 else str(size)
    dot = "" if size == 1 else rf"{size}\cdot "
    star = "" if size == 1 else f"{size}*"
    return Spellings(
        [rf"{minus}{factor}\sqrt{{{b}}}", rf"{minus}\sqrt{{{a * a * b}}}"],
        [
            rf"{minus}{dot}\sqrt{{{b}}}",
            f"{minus}{factor}√{b}",
            f"{minus}{star}sqrt({b})",
            rf"{minus}{dot}{b}^{{1/2}}",
            rf"{minus}{dot}{b}^{{\frac{{1}}{{2}}}}",
            rf"{minus}{factor}\sqrt {{{b}}}",
            rf"\frac{{{a * b}}}{{\sqrt{{{b}}}}}",
            rf"{minus}{dot}{b}^{{0.5}}",
            f"{minus}{star}{b}**0.5",
            f"{minus}{factor}√({b})",
        ]
        + ([rf"{minus}{factor}\sqrt{b}", rf"{minus}{factor}\sqrt {b}"] if b < 10 else []),
    )


@template(
    lambda rng: (nonzero(rng, 9), nonzero(rng, 7), rng.choice([2, 3, 5, 7]), rng.randint(2, 9))
)
def surd(value: tuple[int, int, int, int]) -> Spellings:
    a, b, c, d = value
    part, back = times(b, rf"\sqrt{{{c}}}"), times(-b, rf"\sqrt{{{c}}}")
    joined = rf"\frac{{{a}{part}}}{{{d}}}"
    conjugate = Fraction(a * a - b * b * c, d)
    return Spellings(
        [
            joined,
            rf"\frac{{{a}}}{{{d}}}{'+' if b > 0 else '-'}\frac{{{abs(b)}\sqrt{{{c}}}}}{{{d}}}",
        ],
        [
            rf"({a}{part})/{d}",
            rf"\frac{{1}}{{{d}}}\left({a}{part}\right)",
            rf"\frac{{{times(b, f'√{c}', True)}{'+' if a > 0 else '-'}{abs(a)}}}{{{d}}}",
            f"({a}{'+' if b > 0 else '-'}{abs(b)}*sqrt({c}))/{d}",
            rf"\frac{{{latex(conjugate)}}}{{{a}{back}}}",
        ],
    )


@template(lambda rng: (rng.choice([2, 3, 5, 7]), rng.randint(20, 300)))
def power(value: tuple[int, int]) -> Spellings:
    base, n = value
    return Spellings(
        [rf"{base}^{{{n}}}", rf"{base}\cdot {base}^{{{n - 1}}}"],
        [f"{base}^{n}" if n < 10 else f"{base}**{n}", rf"{base**2}\cdot {base}^{{{n - 2}}}"]
        + [f"{base}^({n})", f"{base}{str(n).translate(SUPERSCRIPTS)}", rf"{{{base}}}^{{{n}}}"]
        + [rf"\frac{{{base}^{{{n + 5}}}}}{{{base**5}}}", str(base**n)],
    )


@template(lambda rng: (rng.choice([2, 3, 5, 9]), rng.randint(60, 200), rng.randint(0, 3)))
def tiny(value: tuple[int, int, int]) -> Spellings:
    base, n, whole = value
    plus = f"{whole}+" if whole else ""
    multiple = "" if whole == 1 else rf"{whole}\cdot "
    top = f"{multiple}{base}^{{{n}}}+1" if whole else "1"
    return Spellings(
        [rf"{plus}\frac{{1}}{{{base}^{{{n}}}}}", rf"{plus}{base}^{{-{n}}}"],
        [rf"{plus}\left(\frac{{1}}{{{base}}}\right)^{{{n}}}", rf"{plus}1/{base}^{{{n}}}"]
        + [rf"\frac{{{top}}}{{{base}^{{{n}}}}}"]
        + [rf"{plus}\frac{{{base}}}{{{base}^{{{n + 1}}}}}"],
    )


@template(lambda rng: (rng.randint(10, 60), rng.randint(1, 5), rng.choice([1, -1])))
def factorial(value: tuple[int, int, int]) -> Spellings:
    n, k, sign = value
    over = rf"\frac{{{n}!}}{{{n - k}!}}"
    product = math.perm(n, k)
    if sign > 0:
        return Spellings([over, str(product)], [rf"\dfrac{{{n}!}}{{({n}-{k})!}}", f"{n}!/{n - k}!"])
    return Spellings(
        [rf"\frac{{{n - k}!}}{{{n}!}}", rf"\frac{{1}}{{{product}}}"],
        [rf"\frac{{({n}-{k})!}}{{{n}!}}", f"{n - k}!/{n}!"],
    )


@template(lambda rng: (rng.randint(8, 40), rng.randint(2, 4)))
def binomial(value: tuple[int, int]) -> Spellings:
    n, k = value
    return Spellings(
        [rf"\binom{{{n}}}{{{k}}}", str(math.comb(n, k))],
        [rf"\frac{{{n}!}}{{{k}!\cdot {n - k}!}}", rf"\dbinom{{{n}}}{{{n - k}}}"]
        + [rf"{{{n} \choose {k}}}", rf"\frac{{{n}!}}{{{k}!{n - k}!}}", f"{math.comb(n, k):,}"],
    )


@template(lambda rng: tuple(rng.sample([2, 3, 5, 6, 7, 10, 11], 2)))
def logarithm(value: tuple[int, int]) -> Spellings:
    a, b = value
    return Spellings(
        [rf"\log_{{{a}}} {{{b}}}", rf"\frac{{\ln {b}}}{{\ln {a}}}"],
        [
            rf"\frac{{\log {b}}}{{\log {a}}}",
            rf"\log_{{{a}}}({b})",
            rf"\frac{{1}}{{\log_{{{b}}} {a}}}",
        ]
        + [f"ln({b})/ln({a})", rf"\frac{{\ln({b})}}{{\ln({a})}}"]
        + [rf"\log_{a} {b}" if a < 10 else rf"\log_{{{a}}}{b}"],
    )


@template(lambda rng: tuple(rng.sample([2, 3, 5, 7, 11, 13], 2)))
def log_of_fraction(value: tuple[int, int]) -> Spellings:
    a, b = value
    return Spellings(
        [rf"\ln\frac{{{a}}}{{{b}}}", rf"\ln {a}-\ln {b}"],
        [rf"\ln\left(\frac{{{a}}}{{{b}}}\right)", f"ln({a}/{b})", rf"-\ln\frac{{{b}}}{{{a}}}"]
        + [rf"\ln({a}) - \ln({b})", rf"\frac{{1}}{{2}}\ln\frac{{{a * a}}}{{{b * b}}}"],
    )


@template(fraction)
def multiple_of_pi(q: Fraction) -> Spellings:
    top, bottom = q.numerator, q.denominator
    part = times(top, r"\pi", True)
    star = {1: "pi", -1: "-pi"}.get(top, f"{top}*pi")
    return Spellings(
        [rf"\frac{{{part}}}{{{bottom}}}", rf"{latex(q)}\pi"],
        [f"{star}/{bottom}", f"{times(top, 'π', True)}/{bottom}", rf"{part}/{bottom}"]
        + [rf"{top}/{bottom} \pi", rf"\pi\cdot{latex(q)}" if q > 0 else rf"{part}/{bottom}"]
        + [f"{times(top, 'pi', True)}/{bottom}", rf"\dfrac{{{part}}}{{{bottom}}}"],
    )


@template(lambda rng: (nonzero(rng, 9), rng.randint(2, 9)))
def power_of_e(value: tuple[int, int]) -> Spellings:
    a, n = value
    factor = times(a, "", True) if abs(a) > 1 else "-" if a < 0 else ""
    star = f"{a}*" if abs(a) > 1 else factor
    return Spellings(
        [rf"{factor}e^{{{n}}}", rf"{factor}\mathrm{{e}}^{{{n}}}"],
        [f"{star}exp({n})", rf"{factor}\exp({n})", f"{factor}e^{n}", f"{star}e**{n}"]
        + [rf"{factor}\exp\left({n}\right)", rf"{factor}e\cdot e^{{{n - 1}}}"],
    )


@template(lambda rng: (nonzero(rng, 12), nonzero(rng, 12)))
def complex_number(value: tuple[int, int]) -> Spellings:
    a, b = value
    roman, text = times(b, r"\mathrm{i}"), times(b, r"\text{i}")
    return Spellings(
        [f"{a}{times(b, 'i')}", f"{a} {'+' if b > 0 else '-'} {times(abs(b), 'i', True)}"],
        [f"{times(b, 'i', True)}{'+' if a > 0 else '-'}{abs(a)}", f"{a}{roman}"]
        + [f"{a}{'+' if b > 0 else '-'}{abs(b)}*i", f"{a}{'+' if b > 0 else '-'}i{abs(b)}"]
        + [f"{a}{text}", rf"-({-a}{times(-b, 'i')})", f"z = {a}{times(b, 'i')}"],
    )


@template(lambda rng: (rng.randint(2, 30), rng.choice([3, 4, 5])))
def higher_root(value: tuple[int, int]) -> Spellings:
    a, n = value
    a = a * a + 1
    return Spellings(
        [rf"\sqrt[{n}]{{{a}}}", rf"{a}^{{\frac{{1}}{{{n}}}}}"],
        [rf"{a}^{{1/{n}}}", f"{a}^(1/{n})", f"{a}**(1/{n})"]
        + ([f"∛{a}", f"∛({a})"] if n == 3 else [])
        + [rf"\sqrt[{2 * n}]{{{a * a}}}"],
    )


@template(lambda rng: rng.choice([1, 2, 3, 4, 5, 7, 9, -2, -3]))
def inverse_tangent(a: int) -> Spellings:
    return Spellings(
        [rf"\arctan {{{a}}}", rf"\tan^{{-1}} ({a})"],
        [rf"\arctan({a})", f"arctan({a})", rf"\tan^{{-1}}{{{a}}}", f"atan({a})"]
        + [rf"\operatorname{{arctan}}({a})", rf"\arctan\left({a}\right)"],
    )


@template(lambda rng: (rng.choice(["sin", "tan"]), rng.choice([10, 20, 25, 40, 50, 70])))
def trigonometric(value: tuple[str, int]) -> Spellings:
    name, degrees = value
    return Spellings(
        [rf"\{name} {degrees}^\circ", rf"\{name}({degrees}^{{\circ}})"],
        [rf"\{name}\frac{{{degrees}\pi}}{{180}}", rf"\{name} {degrees}°"]
        + [rf"\{name}\left(\frac{{{degrees // 5}\pi}}{{36}}\right)"],
    )


# Expressions with variables


@template(lambda rng: (nonzero(rng, 5), rng.randint(-9, 9), rng.randint(-9, 9)))
def quadratic(value: tuple[int, int, int]) -> Spellings:
    a, b, c = value
    x, y = "x", polynomial([(a, "x^2"), (b, "x"), (c, "")])
    spaced = y.replace("+", " + ").replace("-", " - ").strip()
    lifted = y.replace("x^2", "x²")
    program = f"{a}*x**2 + ({b})*x + ({c})"
    return Spellings(
        [y, spaced, polynomial([(c, ""), (b, "x"), (a, "x^2")])],
        [lifted, program, y.replace("x^2", "x^{2}"), f"{a}({x}^2)+{b}*{x}+{c}".replace("+-", "-")]
        + [rf"{x}\left({polynomial([(a, 'x'), (b, '')])}\right){times(c, '')}"]
        + [
            f"y = {y}",
            f"f(x) = {y}",
            rf"-\left({polynomial([(-a, 'x^2'), (-b, 'x'), (-c, '')])}\right)",
        ],
    )


@template(two)
def factored(value: tuple[int, int]) -> Spellings:
    r, s = value
    one, other = polynomial([(1, "x"), (-r, "")]), polynomial([(1, "x"), (-s, "")])
    return Spellings(
        [f"({one})({other})", polynomial([(1, "x^2"), (-r - s, "x"), (r * s, "")])],
        [f"({other})({one})", rf"\left({one}\right)\left({other}\right)", f"({one})*({other})"]
        + [rf"({one}) \cdot ({other})", rf"({one})\times({other})"],
    )


@template(
    lambda rng: (nonzero(rng, 9), nonzero(rng, 9), rng.choice(["xy", "ab", "mn", "st", "ht"]))
)
def two_variables(value: tuple[int, int, str]) -> Spellings:
    a, b, (x, y) = value
    return Spellings(
        [polynomial([(a, x), (b, y)]), polynomial([(b, y), (a, x)])],
        [f"{a}*{x}+({b})*{y}", rf"{a}\cdot {x} {'+' if b > 0 else '-'} {abs(b)}\cdot {y}"],
    )


@template(lambda rng: (rng.randint(2, 9), rng.choice("tmshcgdlkLnx")))
def one_letter(value: tuple[int, str]) -> Spellings:
    a, x = value
    return Spellings([f"{a}{x}", rf"{a}\cdot {x}"], [f"{a}*{x}", f"{x}*{a}", f"({a}{x})"])


@template(lambda rng: (nonzero(rng, 9), rng.randint(1, 9), rng.randint(2, 9)))
def rational_function(value: tuple[int, int, int]) -> Spellings:
    a, b, c = value
    return Spellings(
        [rf"\frac{{{a}}}{{{c}x+{b}}}", rf"\frac{{{2 * a}}}{{{2 * c}x+{2 * b}}}"],
        [f"{a}/({c}x+{b})", f"{a}/({c}*x+{b})", rf"{a}({b}+{c}x)^{{-1}}"]
        + [rf"-\frac{{{-a}}}{{{c}x+{b}}}", rf"\dfrac{{{a}}}{{{b}+{c}x}}"],
    )


@template(lambda rng: rng.randint(2, 9))
def double_angle(n: int) -> Spellings:
    return Spellings(
        [rf"{n}\sin 2x", rf"{2 * n}\sin x\cos x"],
        [rf"{n}\sin(2x)", f"{n}*sin(2*x)", rf"{2 * n}\cos(x)\sin(x)", rf"{n}\sin{{2x}}"],
    )


@template(lambda rng: (rng.randint(2, 9), nonzero(rng, 9)))
def antiderivative(value: tuple[int, int]) -> Spellings:
    a, b = value
    text = polynomial([(a, "x^3"), (b, "x")])
    return Spellings([f"{text}+C", f"{text} + C"], [f"C+{text}", f"y={text}+C"], [])


@template(lambda rng: nonzero(rng, 9))
def absolute_value(a: int) -> Spellings:
    one, other = polynomial([(1, "x"), (-a, "")]), polynomial([(a, ""), (-1, "x")])
    return Spellings(
        [f"|{one}|", rf"\left|{one}\right|"],
        [f"|{other}|", rf"\lvert {one}\rvert", rf"\left\lvert {other} \right\rvert", f"abs({one})"],
    )


# Tuples, lists, sets, intervals


@template(lambda rng: tuple(rng.randint(-9, 9) for _ in range(rng.choice([2, 3]))))
def ordered_tuple(value: tuple[int, ...]) -> Spellings:
    text = ",".join(map(str, value))
    spaced = text.replace(",", r",\ ")
    names = "(x,y)" if len(value) == 2 else "(x, y, z)"
    return Spellings(
        [f"({text})", f"({text.replace(',', ', ')})", rf"\left({text}\right)"],
        [f"（{text.replace(',', '，')}）", f"{names}=({text})", f"({spaced})"]
        + [rf"\left( {text.replace(',', ' , ')} \right)", rf"\big({text}\big)"]
        + [f"({','.join(f'{each}.0' for each in value)})"],
    )


@template(lambda rng: tuple(rng.randint(-9, 9) for _ in range(3)))
def vector(value: tuple[int, ...]) -> Spellings:
    text = ", ".join(map(str, value))
    return Spellings(
        [rf"\langle {text} \rangle", rf"\left\langle {text} \right\rangle"],
        [rf"\langle {text.replace(' ', '')}\rangle", rf"\left\langle {text}\right\rangle"],
    )


@template(lambda rng: frozenset((rng.randint(-5, 5), rng.randint(-5, 5)) for _ in range(2)))
def points(value: frozenset[tuple[int, int]]) -> Spellings:
    ordered = [f"({a},{b})" for a, b in sorted(value)]
    back = ordered[::-1]
    joined = r"\boxed{" + r"} \text{ and } \boxed{".join(back) + "}"
    return Spellings(
        [", ".join(ordered), ",".join(back)],
        [r" \text{ and } ".join(ordered), r"\{" + ", ".join(back) + r"\}", " and ".join(back)]
        + [joined, ", ".join(rf"$\boxed{{{each}}}$" for each in ordered)]
        + [r"(x,y)=" + r" \text{ or } ".join(back), "、".join(ordered), "; ".join(ordered)],
    )


@template(lambda rng: frozenset(rng.sample(range(-12, 13), rng.choice([2, 3]))))
def solutions(value: frozenset[int]) -> Spellings:
    ordered = [str(each) for each in sorted(value)]
    back = ordered[::-1]
    return Spellings(
        [", ".join(ordered), ",".join(back), "x=" + ",".join(ordered)],
        [
            ", ".join(f"x = {each}" for each in back),
            " or ".join(f"x={each}" for each in back),
            r" \text{ or } ".join(f"x={each}" for each in ordered),
            r" \text{ and } ".join(back),
            rf"\{{{', '.join(back)}\}}",
            rf"x \in \{{{', '.join(ordered)}\}}",
            r",\ ".join(f"x_{index + 1}={each}" for index, each in enumerate(back)),
            " and ".join(rf"\boxed{{{each}}}" for each in back),
            r", ".join(rf"\boxed{{x={each}}}" for each in ordered),
            " or ".join(rf"$\boxed{{{each}}}$" for each in back),
            "或".join(f"x={each}" for each in ordered),
            "、".join(back),
            "x=" + r" \text{ or } ".join(back),
            "; ".join(ordered),
            r",\quad ".join(ordered),
            r"$" + r"$, $".join(back) + "$",
            rf"\left\{{{', '.join(ordered)}\right\}}",
        ],
    )


@template(lambda rng: (rng.randint(1, 9), rng.choice([2, 3, 5, 7])))
def plus_minus(value: tuple[int, int]) -> Spellings:
    a, b = value
    return Spellings(
        [rf"{a} \pm \sqrt{{{b}}}", rf"{a}+\sqrt{{{b}}}, {a}-\sqrt{{{b}}}"],
        [rf"x = {a} \pm \sqrt{{{b}}}", rf"x={a}-\sqrt{{{b}}} \text{{ or }} x={a}+\sqrt{{{b}}}"]
        + [rf"\{{{a}-\sqrt{{{b}}}, {a}+\sqrt{{{b}}}\}}", f"{a} ± √{b}"],
    )


@template(lambda rng: frozenset(rng.sample(range(1, 12), rng.randint(2, 5))))
def finite_set(value: frozenset[int]) -> Spellings:
    ordered = [str(each) for each in sorted(value)]
    return Spellings(
        [rf"\{{{','.join(ordered)}\}}", rf"\{{{', '.join(ordered[::-1])}\}}"],
        [rf"\left\{{{', '.join(ordered)}\right\}}", rf"A = \{{{', '.join(ordered[::-1])}\}}"]
        + [rf"\lbrace {', '.join(ordered)} \rbrace"],
        [", ".join(ordered)],
    )


@template(lambda rng: (*two(rng), rng.choice(["()", "[)", "(]", "[]"])))
def interval(value: tuple[int, int, str]) -> Spellings:
    low, high, (left, right) = value
    below, above = ("<" if left == "(" else r"\le "), ("<" if right == ")" else r"\le ")
    text = f"{left}{low},{high}{right}"
    back = [each.replace("<", ">").replace(r"\le", r"\ge") for each in (above, below)]
    sign = {"<": "<", r"\le ": "≤"}
    return Spellings(
        [text, rf"\left{left}{low}, {high}\right{right}", rf"x \in {text}"],
        [f"{low}{below}x{above}{high}", f"{high}{back[0]}x{back[1]}{low}"]
        + [rf"\{{x \mid {low}{below}x{above}{high}\}}", f"{low}{sign[below]}x{sign[above]}{high}"]
        + [rf"\{{x : {low}{below}x{above}{high}\}}", f"D = {text}"]
        + [f"{low} {below}x {above}{high}".replace(r"\le", r"\leq")]
        + [f"{low}{below}x{above}{high}".replace(r"\le ", "<=")],
    )


@template(lambda rng: (rng.randint(-20, 20), rng.choice([">", ">=", "<", "<="])))
def ray(value: tuple[int, str]) -> Spellings:
    a, sign = value
    latex_sign = {">": ">", ">=": r"\ge", "<": "<", "<=": r"\le"}[sign]
    other = {">": "<", ">=": r"\le", "<": ">", "<=": r"\ge"}[sign]
    closed = "=" in sign
    upward = sign[0] == ">"
    text = (
        f"{'[' if closed else '('}{a},\\infty)"
        if upward
        else f"(-\\infty,{a}{']' if closed else ')'}"
    )
    return Spellings(
        [text, f"x {latex_sign} {a}"],
        [f"{a} {other} x", f"x{sign}{a}", rf"\{{x \mid x {latex_sign} {a}\}}", rf"x \in {text}"]
        + [text.replace(r",\infty", r",+\infty"), text.replace(r"\infty", "∞")]
        + [f"x {latex_sign} {a}".replace(r"\ge", "≥").replace(r"\le", "≤")]
        + [f"x {latex_sign} {a}".replace(r"\ge", r"\geq").replace(r"\le", r"\leqslant")]
        + [rf"\{{x | x{latex_sign} {a}\}}", rf"\{{x \in \mathbb{{R}} : x {latex_sign} {a}\}}"],
    )


@template(two)
def union(value: tuple[int, int]) -> Spellings:
    a, b = value
    return Spellings(
        [rf"(-\infty,{a})\cup({b},\infty)", rf"(-\infty, {a}) \cup ({b}, \infty)"],
        [rf"({b},+\infty)\cup(-\infty,{a})", rf"x<{a} \text{{ or }} x>{b}", f"x < {a} or x > {b}"]
        + [rf"x \in (-\infty,{a}) \cup ({b},\infty)", rf"(-∞,{a})∪({b},∞)"]
        + [rf"x>{b} \text{{ or }} x<{a}", rf"\left(-\infty,{a}\right)\cup\left({b},\infty\right)"],
    )


@template(lambda rng: rng.randint(-20, 20))
def all_but_one(a: int) -> Spellings:
    return Spellings(
        [rf"(-\infty,{a})\cup({a},\infty)", rf"x \ne {a}"],
        [rf"x \neq {a}", rf"\mathbb{{R}}\setminus\{{{a}\}}", f"x≠{a}"]
        + [rf"\mathbb{{R}} \setminus \left\{{ {a} \right\}}", rf"\{{x \mid x \ne {a}\}}"],
    )


@template(lambda rng: tuple(rng.randint(-9, 9) for _ in range(4)))
def matrix(value: tuple[int, ...]) -> Spellings:
    a, b, c, d = value
    rows = [[a, b], [c, d]]

    def spelled(kind: str, column: str, row: str) -> str:
        body = row.join(column.join(map(str, each)) for each in rows)
        return rf"\begin{{{kind}}}{body}\end{{{kind}}}"

    return Spellings(
        [spelled("pmatrix", " & ", r" \\ "), spelled("pmatrix", "&", r"\\")],
        [spelled("bmatrix", "&", r"\\"), spelled("bmatrix", " & ", " \\\\\n")]
        + [rf"\left[\begin{{array}}{{cc}}{a} & {b} \\ {c} & {d}\end{{array}}\right]"]
        + [rf"\left(\begin{{array}}{{rr}}{a}&{b}\\{c}&{d}\end{{array}}\right)"]
        + [spelled("pmatrix", " & ", r" \\[4pt] "), "M = " + spelled("bmatrix", " & ", "\\\\ ")]
        + [rf"\begin{{pmatrix}} {a} & {b} \\ {c} & {d} \\ \end{{pmatrix}}"]
        + [rf"\left(\begin{{matrix}}{a}&{b}\\{c}&{d}\end{{matrix}}\right)"],
    )


@template(lambda rng: tuple(Fraction(nonzero(rng, 9), rng.randint(1, 6)) for _ in range(3)))
def column(value: tuple[Fraction, ...]) -> Spellings:
    entries = [latex(each) for each in value]
    slashes = r" \\ ".join(map(str, value))
    tight, loose, lines = r"\\".join(entries), r" \\ ".join(entries), " \\\\\n".join(entries)
    return Spellings(
        [rf"\begin{{pmatrix}} {slashes} \end{{pmatrix}}"],
        [rf"\begin{{pmatrix}}{tight}\end{{pmatrix}}", rf"\begin{{bmatrix}} {lines} \end{{bmatrix}}"]
        + [rf"\left[\begin{{array}}{{c}} {loose} \end{{array}}\right]"],
    )


# Equations and relations


@template(lambda rng: (nonzero(rng, 7), nonzero(rng, 9)))
def line(value: tuple[int, int]) -> Spellings:
    m, b = value
    slope, intercept = times(m, "x", True), times(b, "")
    zero = f"{polynomial([(m, 'x'), (-1, 'y'), (b, '')])}=0"
    return Spellings(
        [f"y={slope}{intercept}", f"y = {slope} {intercept[0]} {intercept[1:]}", zero],
        [f"{slope}{intercept}=y", f"y={b}{times(m, 'x')}", f"y{times(-m, 'x')} = {b}"]
        + [f"{polynomial([(-2 * m, 'x'), (2, 'y')])}={2 * b}", f"y={m}*x+({b})"]
        + [f"0={polynomial([(m, 'x'), (-1, 'y'), (b, '')])}"],
    )


@template(lambda rng: (nonzero(rng, 6), nonzero(rng, 6), rng.randint(2, 9)))
def circle(value: tuple[int, int, int]) -> Spellings:
    a, b, r = value
    one, other = polynomial([(1, "x"), (-a, "")]), polynomial([(1, "y"), (-b, "")])
    expanded = polynomial(
        [(1, "x^2"), (1, "y^2"), (-2 * a, "x"), (-2 * b, "y"), (a * a + b * b - r * r, "")]
    )
    return Spellings(
        [f"({one})^2+({other})^2={r * r}", f"{expanded}=0"],
        [
            f"({other})^2 + ({one})^2 = {r}^2",
            f"{r * r}=({one})^2+({other})^2",
            f"({one})²+({other})²={r * r}",
        ],
    )


@template(lambda rng: coprime(rng.randint(1, 9), rng.randint(1, 20)))
def without_real_solution(value: tuple[int, int]) -> Spellings:
    a, c = value
    return Spellings(
        [
            f"{polynomial([(a, 'x^2'), (c, '')])}=0",
            f"{polynomial([(2 * a, 'x^2'), (2 * c, '')])}=0",
        ],
        [f"0={polynomial([(a, 'x^2'), (c, '')])}", f"{polynomial([(a, 'x^2')])}=-{c}"],
    )


@template(lambda rng: (lambda b: (rng.randrange(b), b))(rng.randint(3, 20)))
def congruence(value: tuple[int, int]) -> Spellings:
    a, b = value
    return Spellings(
        [
            rf"x \equiv {a} \pmod{{{b}}}",
            rf"x\equiv {a}\pmod {b}" if b < 10 else rf"x\equiv {a}\pmod{{{b}}}",
        ],
        [rf"x \equiv {a} (\bmod {b})", rf"x \equiv {a} \pmod {{{b}}}", rf"x≡{a} (mod {b})"]
        + [rf"x \equiv {a + b} \pmod{{{b}}}", rf"x \equiv {a - b} \pmod{{{b}}}"],
    )


@template(lambda rng: (nonzero(rng, 9), nonzero(rng, 9)))
def named_values(value: tuple[int, int]) -> Spellings:
    a, b = value
    return Spellings(
        [f"a={a}, b={b}", f"b={b},a={a}"],
        [
            rf"a = {a} \text{{ and }} b = {b}",
            rf"a={a},\ b={b}",
            f"a={a} and b={b}",
            f"(a,b)=({a},{b})",
        ]
        + [rf"\boxed{{a={a}}} and \boxed{{b={b}}}", f"a={a}; b={b}", rf"a={a},\quad b={b}"],
    )


@template(lambda rng: (rng.choice("xyzknwt"), rng.randint(-30, 30)))
def named_value(value: tuple[str, int]) -> Spellings:
    name, a = value
    return Spellings([f"{name}={a}", f"{name} = {a}"], [f"{name}:={a}", f"{a}={name}"], [str(a)])


@template(lambda rng: (nonzero(rng, 9), nonzero(rng, 9)))
def function(value: tuple[int, int]) -> Spellings:
    a, b = value
    text = polynomial([(a, "x"), (b, "")])
    return Spellings(
        [f"f(x)={text}", f"f(x) = {polynomial([(b, ''), (a, 'x')])}"],
        [f"f(x)={a}*x+({b})", rf"f(x) = \left({text}\right)"],
        [text],
    )


# Quantities


@template(lambda rng: (rng.randint(1, 99), rng.choice(["cm", "km", "feet", "inches", "hours"])))
def quantity(value: tuple[int, str]) -> Spellings:
    n, unit = value
    return Spellings(
        [rf"{n}\text{{ {unit}}}", rf"{n} \text{{ {unit}}}", rf"{n}\mbox{{ {unit}}}"],
        [
            f"{n} {unit}",
            rf"{n}\ \mathrm{{{unit}}}",
            rf"{n}~\text{{{unit}}}",
            rf"{n}.0\text{{ {unit}}}",
        ]
        + [rf"{n} \, \text{{{unit}}}", rf"{n} \mathrm{{~{unit}}}"],
        [str(n), f"{n}.0"],
    )


@template(
    lambda rng: (rng.randint(1, 99), rng.choice(["km/h", "m/s", "miles per hour", "cm^2", "m^3"]))
)
def compound_unit(value: tuple[int, str]) -> Spellings:
    n, unit = value
    spelled = {"cm^2": r"\text{cm}^2", "m^3": r"\text{ m}^3"}.get(unit, rf"\text{{ {unit}}}")
    return Spellings([rf"{n}{spelled}", rf"{n} {spelled}"], [f"{n} {unit}"], [str(n)])


@template(lambda rng: rng.randint(1, 179))
def degrees(n: int) -> Spellings:
    return Spellings(
        [rf"{n}^\circ", rf"{n}^{{\circ}}"],
        [f"{n}°", rf"{n}\text{{ degrees}}", f"{n} degrees", rf"{n} ^ \circ"],
        [str(n)],
    )


@template(lambda rng: rng.randint(2, 98))
def percent(n: int) -> Spellings:
    return Spellings(
        [rf"{n}\%", f"{n}%"],
        [f"{n} percent", rf"{n}\text{{ percent}}", rf"{n}\,\%", f"{n}.0%", f"{n}％", rf"{n}~\%"],
        [str(n)],
    )


@template(lambda rng: (rng.randint(1, 4000), rng.randint(0, 99)))
def money(value: tuple[int, int]) -> Spellings:
    whole, cents = value
    text = f"{whole:,}.{cents:02d}"
    return Spellings(
        [rf"\${text}", text, text.replace(",", "")],
        [
            f"${text}$",
            rf"\$ {text}",
            rf"{text}\text{{ dollars}}",
            f"{text} dollars",
            rf"\text{{\${text}}}",
        ]
        + [rf"\${text.replace(',', r'{,}')}", f"{text} USD"],
    )


@template(
    lambda rng: (rng.randint(2, 99), rng.choice(["hundred", "thousand", "million", "billion"]))
)
def magnitude(value: tuple[int, str]) -> Spellings:
    n, word = value
    zeros = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9}[word]
    return Spellings(
        [str(n * 10**zeros), f"{n * 10**zeros:,}"],
        [
            rf"{n}\text{{ {word}}}",
            f"{n} {word}",
            rf"{n}\times 10^{zeros}",
            rf"{n} \text{{ {word}}}",
        ],
    )


@template(lambda rng: (rng.randint(1, 12), rng.randint(1, 59)))
def time_of_day(value: tuple[int, int]) -> Spellings:
    hour, minute = value
    text = f"{hour}:{minute:02d}"
    return Spellings(
        [text, rf"{hour}\!:\!{minute:02d}", rf"{text} \text{{ p.m.}}"],
        [f"{hour:02d}:{minute:02d}", rf"{text}\text{{ pm}}", f"{text} PM"][: 1 if hour > 9 else 3],
    )


@template(lambda rng: coprime(rng.randint(1, 20), rng.choice([7, 11, 13, 23, 29])))
def ratio(value: tuple[int, int]) -> Spellings:
    a, b = value
    return Spellings([f"{a}:{b}", f"{a} : {b}"], [rf"{a}\!:\!{b}", rf"{a} \colon {b}", f"{a}：{b}"])


@template(
    lambda rng: (
        rng.choice([3, 4, 5, 6, 7, 8]),
        "".join(rng.choices("012", k=4)).lstrip("0") or "1",
    )
)
def based(value: tuple[int, str]) -> Spellings:
    base, digits = value
    return Spellings(
        [f"{digits}_{base}", f"{digits}_{{{base}}}"],
        [rf"({digits})_{base}", rf"{digits}_{{\text{{{base}}}}}", rf"{{{digits}}}_{{{base}}}"],
    )


# Text


@template(lambda rng: "".join(rng.sample("ABCD", 4)))
def letters(text: str) -> Spellings:
    return Spellings(
        [text, rf"\text{{{text}}}"], [rf"\mathrm{{{text}}}", f"{text}.", f"$ {text} $"]
    )


@template(lambda rng: tuple(rng.choice("TF") for _ in range(4)))
def truth_values(value: tuple[str, ...]) -> Spellings:
    text = ", ".join(value)
    return Spellings([text, rf"\text{{{text}}}"], [text.replace(" ", ""), rf"\mathrm{{{text}}}"])


@template(lambda rng: rng.choice("ABCDE"))
def choice(letter: str) -> Spellings:
    return Spellings(
        [letter, rf"\text{{({letter})}}", f"({letter})"],
        [rf"\text{{{letter}}}", rf"\textbf{{({letter})}}", f"{letter}.", rf"\mathrm{{{letter}}}"]
        + [f"（{letter}）", f"Option {letter}", rf"\textbf{{{letter}}}"],
    )


@template(lambda rng: frozenset(rng.sample("ABCDE", rng.choice([2, 3]))))
def choices(value: frozenset[str]) -> Spellings:
    ordered = sorted(value)
    text = ", ".join(ordered)
    return Spellings(
        [text, rf"\text{{{','.join(ordered)}}}"],
        [",".join(ordered), rf"\text{{{text}}}", ", ".join(ordered[::-1])],
    )


@template(
    lambda rng: rng.choice(["Monday", "Tuesday", "even", "odd", "ellipse", "circle", "Yes", "No"])
)
def word(text: str) -> Spellings:
    return Spellings(
        [text, rf"\text{{{text}}}"],
        [
            text.lower(),
            rf"\text{{ {text.lower()}}}",
            rf"\textbf{{{text}}}",
            rf"\mathrm{{{text}}}",
            f"{text}.",
        ],
    )


@template(lambda rng: rng.choice(["plus", "minus", "empty", "reals"]))
def special(name: str) -> Spellings:
    texts = {
        "plus": [r"\infty", r"+\infty", "∞"],
        "minus": [r"-\infty", "-∞", r"-\, \infty"],
        "empty": [r"\emptyset", r"\varnothing", r"\{\}", "∅"],
        "reals": [r"\mathbb{R}", r"(-\infty,\infty)", r"(-\infty, +\infty)", r"\mathbb R"],
    }[name]
    return Spellings(texts)
