"""Closed and symbolic expressions in a canonical form: like terms merged, roots of small integers
taken apart into primes, rationals exact. Nothing is expanded, so the form is linear in the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

MAX_BITS = 1 << 17  # of an exact integer: some 39,000 digits
_MAX_FACTORIAL = 5000
_LARGEST_PRIME = 1000  # of the trial division of radicands


@dataclass(frozen=True, slots=True, eq=False)
class Expr:
    """An operation on expressions. Two of one `key` are equal.

    Attributes:
      op: `number`, `symbol`, a constant (`pi`, `e`, `i`, `infinity`), `+`, `*`, `^`, or a function.
      value: of a number.
      key: the canonical spelling.
      symbols: names of the free symbols.
      huge: holds a power or factorial too large to evaluate: compared by `key` alone.
    """

    op: str
    args: tuple[Expr, ...] = ()
    value: Fraction = Fraction(0)
    key: str = ""
    symbols: frozenset[str] = frozenset()
    huge: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


_NO_SYMBOLS: frozenset[str] = frozenset()


def number(value: Fraction | int) -> Expr:
    """An exact rational."""
    value = Fraction(value)
    huge = max(value.numerator.bit_length(), value.denominator.bit_length()) > 12_000
    return Expr(
        "number",
        (),
        value,
        hex(value.numerator) + "/" + hex(value.denominator) if huge else str(value),
    )


def symbol(name: str) -> Expr:
    """A free symbol."""
    return Expr("symbol", key=name, symbols=frozenset((name,)))


ZERO, ONE, MINUS_ONE = number(0), number(1), number(-1)
PI, E, IMAGINARY = (Expr(name, key=name) for name in ("pi", "e", "i"))
INFINITY = Expr("infinity", key="infinity")


def function(name: str, *args: Expr, huge: bool = False) -> Expr:
    """`name(args)`, as it stands."""
    key = f"{name}({','.join(each.key for each in args)})"
    symbols = _NO_SYMBOLS.union(*(each.symbols for each in args))
    return Expr(name, args, Fraction(0), key, symbols, huge or any(each.huge for each in args))


def _joined(op: str, args: list[Expr]) -> Expr:
    return function(op, *sorted(args, key=lambda each: each.key))


def _parts(expr: Expr, op: str) -> tuple[Fraction, list[Expr]]:
    """The rational part of a sum or product, and the other parts."""
    parts = list(expr.args) if expr.op == op else [expr]
    rational = [each.value for each in parts if each.op == "number"]
    return (
        rational[0] if rational else Fraction(op == "*"),
        [each for each in parts if each.op != "number"],
    )


def add(*terms: Expr) -> Expr:
    """The sum; terms that differ in a rational factor are merged.

    Raises:
      ZeroDivisionError: there are two infinities in it.
    """
    if sum(term.op == "infinity" or term.key == "*(-1,infinity)" for term in terms) > 1:
        raise ZeroDivisionError("a sum of infinities")
    constant = Fraction(0)
    merged: dict[str, tuple[Fraction, Expr]] = {}
    for term in terms:
        rational, others = _parts(term, "+")
        constant += rational
        for each in others:
            factor, rest = _parts(each, "*")
            base = _joined("*", rest) if len(rest) > 1 else rest[0]
            merged[base.key] = (merged.get(base.key, (Fraction(0), base))[0] + factor, base)
    parts = [multiply(number(factor), base) for factor, base in merged.values() if factor]
    if constant or not parts:
        parts.append(number(constant))
    return parts[0] if len(parts) == 1 else _joined("+", parts)


def multiply(*factors: Expr) -> Expr:
    """The product; powers of one base with rational exponents are merged.

    Raises:
      ZeroDivisionError: it is 0 times infinity.
    """
    coefficient = Fraction(1)
    powers: dict[str, tuple[Expr, Fraction]] = {}
    opaque: list[Expr] = []
    stack = list(reversed(factors))
    while stack:
        factor = stack.pop()
        if factor.op == "*":
            stack.extend(reversed(factor.args))
        elif factor.op == "number":
            coefficient *= factor.value
        else:
            base, exponent = factor, Fraction(1)
            if factor.op == "^" and factor.args[1].op == "number":
                base, exponent = factor.args[0], factor.args[1].value
            if base.op == "infinity" or base.huge:
                opaque.append(factor)
            elif base.key in powers:
                powers[base.key] = (base, powers[base.key][1] + exponent)
            else:
                powers[base.key] = (base, exponent)
    if not coefficient:
        if any(each.op == "infinity" for each in opaque):
            raise ZeroDivisionError("0 times infinity")
        return ZERO
    parts = list(opaque)
    for base, exponent in powers.values():
        raised = base if exponent == 1 else power(base, number(exponent))
        rational, others = _parts(raised, "*")
        coefficient *= rational
        parts.extend(others)
    if not parts:
        return number(coefficient)
    if len(parts) == 1 and parts[0].op == "+" and coefficient != 1:
        return add(*(multiply(number(coefficient), each) for each in parts[0].args))
    if coefficient != 1:
        parts.append(number(coefficient))
    return parts[0] if len(parts) == 1 else _joined("*", parts)


def negative(expr: Expr) -> Expr:
    """The expression times -1."""
    return multiply(MINUS_ONE, expr)


def divide(top: Expr, bottom: Expr) -> Expr:
    """The quotient.

    Raises:
      ZeroDivisionError: the divisor is 0.
    """
    return multiply(top, power(bottom, MINUS_ONE))


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def power(base: Expr, exponent: Expr) -> Expr:
    """The power; exact where it is rational and not too large.

    Raises:
      ZeroDivisionError: a negative power of 0.
    """
    if exponent.op == "number":
        n = exponent.value
        if n == 1 or base.key == "1":
            return base
        if n == 0 and base.op != "infinity":
            return ONE
        if base.op == "number":
            return _rational_power(base.value, n)
        if base.op == "i" and n.denominator == 1:
            return (ONE, IMAGINARY, MINUS_ONE, negative(IMAGINARY))[n.numerator % 4]
        if base.op == "^" and base.args[1].op == "number" and n.denominator == 1:
            return power(base.args[0], number(base.args[1].value * n))
        if base.op == "*" and n.denominator == 1 and not base.huge:
            return multiply(*(power(each, exponent) for each in base.args))
        if base.op == "*" and not base.huge:
            rational, others = _parts(base, "*")
            if rational > 0 and rational != 1:
                rest = _joined("*", others) if len(others) > 1 else others[0]
                return multiply(_rational_power(rational, n), power(rest, exponent))
    return function("^", base, exponent)


def _rational_power(base: Fraction, n: Fraction) -> Expr:
    if base == 0:
        if n < 0:
            raise ZeroDivisionError
        return ZERO
    if base == 1:
        return ONE
    if abs(n) * _bits(base) > MAX_BITS:
        if base == -1 and n.denominator == 1:
            return MINUS_ONE if n.numerator % 2 else ONE
        return function("^", number(base), number(n), huge=True)
    if n.denominator == 1:
        return number(base**n.numerator)
    if base < 0:  # the real root where there is one
        if n.denominator % 2:
            return multiply(MINUS_ONE if n.numerator % 2 else ONE, _rational_power(-base, n))
        if n.denominator == 2:
            return multiply(power(IMAGINARY, number(n.numerator)), _rational_power(-base, n))
        return function("^", number(base), number(n))
    coefficient = Fraction(1)
    parts: list[Expr] = []
    for factor, count in [
        *_factors(base.numerator),
        *((factor, -count) for factor, count in _factors(base.denominator)),
    ]:
        exponent = count * n
        whole = exponent.numerator // exponent.denominator
        coefficient *= Fraction(factor) ** whole
        if exponent != whole:
            parts.append(function("^", number(factor), number(exponent - whole)))
    if coefficient != 1:
        parts.append(number(coefficient))
    if not parts:
        return ONE
    return parts[0] if len(parts) == 1 else _joined("*", parts)


def _factors(n: int) -> Iterable[tuple[int, int]]:
    """(factor, count): small primes, and what is left as it is, or as the square that it is."""
    found: list[tuple[int, int]] = []
    if n.bit_length() <= 4096:
        divisor = 2
        while divisor <= _LARGEST_PRIME and divisor * divisor <= n:
            count = 0
            while n % divisor == 0:
                n //= divisor
                count += 1
            if count:
                found.append((divisor, count))
            divisor += 1 if divisor == 2 else 2
        root = _whole_root(n)
        if root:
            return [*found, (root, 2)]
    return [*found, (n, 1)] if n > 1 else found


def _whole_root(n: int) -> int:
    root = math.isqrt(n)
    return root if n > 1 and root * root == n else 0


def factorial(n: Expr, step: int = 1) -> Expr:
    """`n!`, or `n!!` with a step of 2."""
    if n.op == "number" and n.value.denominator == 1 and n.value >= 0 and not n.huge:
        if n.value > _MAX_FACTORIAL:
            return function("!" * step, n, huge=True)
        product = 1
        for factor in range(n.value.numerator, 1, -step):
            product *= factor
        return number(product)
    return function("!" * step, n)


def binomial(n: Expr, k: Expr) -> Expr:
    """The binomial coefficient."""
    if n.op == k.op == "number" and n.value.denominator == k.value.denominator == 1:
        top, bottom = n.value.numerator, k.value.numerator
        if 0 <= bottom <= top:
            if top > 100_000 and min(bottom, top - bottom) > 1000:
                return function("binomial", n, k, huge=True)
            return number(math.comb(top, bottom))
    return function("binomial", n, k)
