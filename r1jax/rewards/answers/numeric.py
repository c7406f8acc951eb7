"""Values of expressions with a bound of their error, at any precision, by mpmath."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache, lru_cache
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

from r1jax.rewards.answers.expressions import MAX_BITS, Expr, number
from r1jax.rewards.answers.text import TooLarge

Number: TypeAlias = Any  # mpmath's mpf or mpc, which have no types
Point: TypeAlias = Mapping[str, Fraction]

_DIGITS = 30
_MAX_DIGITS = 6000
_MOST_DIGITS_AT_POINTS = 300
_ENOUGH = 1e-12  # error of a value that says something, relative to it or for 0
_LARGEST = 1e6  # argument of exp and gamma, size of exponents


class Undefined(ValueError):
    """The expression has no value at the point."""


class Ball(NamedTuple):
    """A value and a bound of its error, to first order."""

    value: Number
    error: Number


@cache
def _context() -> Any:
    import mpmath

    return mpmath.mp.clone()


def _finite(value: Number) -> Number:
    if not _context().isfinite(value):
        raise Undefined
    return value


def _call(name: str, args: list[Number], log_base: int) -> Number:
    mp = _context()
    x = args[0]
    if name in ("^", "gamma", "!", "binomial", "exp", "!!") and any(
        abs(each) > 1e300 for each in args[1:] or args
    ):
        raise TooLarge("a value is too large")
    if name == "^":
        return _power(x, args[1])
    if name in ("!", "!!", "binomial"):
        if any(abs(each) > _LARGEST for each in args):
            raise TooLarge("a factorial is too large")
        if name == "binomial":
            return mp.binomial(*args)
        return mp.factorial(x) if name == "!" else mp.fac2(x)
    if name == "log":
        if len(args) == 2:
            return mp.log(x) / mp.log(args[1])
        return mp.log(x) if log_base == 0 else mp.log10(x)
    if name in ("sin", "cos", "tan", "cot", "sec", "csc") and abs(x) > 1e60:
        raise TooLarge("an angle is too large")
    if name in ("sinh", "cosh", "tanh") and abs(x) > _LARGEST:
        raise TooLarge("a value is too large")
    if name == "abs":
        return abs(x)
    if name in ("floor", "ceil", "max", "min") and any(mp.im(each) for each in args):
        raise Undefined
    if name in ("floor", "ceil"):
        near = mp.nint(x)
        if abs(x - near) < mp.mpf(10) ** (-mp.dps // 2):
            return near
        return mp.floor(x) if name == "floor" else mp.ceil(x)
    if name in ("max", "min"):
        return max(args) if name == "max" else min(args)
    if name in _FUNCTIONS:
        return getattr(mp, _FUNCTIONS[name])(x)
    raise Undefined


_FUNCTIONS = {
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")},
    **{"arcsin": "asin", "arccos": "acos", "arctan": "atan", "coth": "coth", "conj": "conj"},
    **{"arsinh": "asinh", "arcosh": "acosh", "artanh": "atanh"},
    **{
        "re": "re",
        "im": "im",
        "arg": "arg",
        "sign": "sign",
        "arccot": "acot",
        "arcsec": "asec",
        "arccsc": "acsc",
    },
}


def _power(base: Number, exponent: Number) -> Number:
    mp = _context()
    if base == 0:
        if mp.im(exponent) or exponent <= 0:
            raise Undefined
        return base
    if abs(exponent) * max(1, abs(mp.log(abs(base)))) > _LARGEST:
        raise TooLarge("a power is too large")
    return mp.power(base, exponent)


def evaluate(expr: Expr, point: Point, digits: int, log_base: int = 0) -> Ball:
    """The value at a point.

    Args:
      log_base: base of `\\log` without one: 0 for the natural logarithm, or 10.

    Raises:
      Undefined: there is none.
      TooLarge: it is out of bounds.
    """
    mp = _context()
    mp.dps = digits + 10
    try:
        return _evaluate(expr, point, mp.mpf(10) ** (-digits), log_base)
    except (ValueError, ArithmeticError, TypeError, LookupError) as error:
        if isinstance(error, Undefined | TooLarge):
            raise
        raise Undefined from None


def _evaluate(expr: Expr, point: Point, epsilon: Number, log_base: int) -> Ball:
    mp = _context()
    op = expr.op
    if op == "number":
        value = mp.mpf(expr.value.numerator) / expr.value.denominator
        return Ball(value, abs(value) * epsilon)
    if op == "symbol":
        if expr.key not in point:
            raise Undefined
        value = mp.mpf(point[expr.key].numerator) / point[expr.key].denominator
        return Ball(value, abs(value) * epsilon)
    if op in ("pi", "e"):
        value = +mp.pi if op == "pi" else +mp.e
        return Ball(value, value * epsilon)
    if op == "i":
        return Ball(mp.mpc(0, 1), mp.mpf(0))
    if op == "infinity":
        raise Undefined
    args = [_evaluate(each, point, epsilon, log_base) for each in expr.args]
    if op == "+":
        value, error = mp.mpf(0), mp.mpf(0)
        for each in args:
            value += each.value
            error += each.error
        return Ball(value, error + abs(value) * epsilon)
    if op == "*":
        value, error = mp.mpf(1), mp.mpf(0)
        for each in args:
            error = error * (abs(each.value) + each.error) + abs(value) * each.error
            value *= each.value
        return Ball(value, error + abs(value) * epsilon)
    values = [each.value for each in args]
    if op == "^" and expr.args[1].op == "number" and expr.args[1].value.denominator % 2:
        exponent = expr.args[1].value
        if exponent.denominator > 1 and not mp.im(values[0]) and mp.re(values[0]) < 0:
            # The real root of an odd degree.
            root = _power(-mp.re(values[0]), values[1]) * (-1 if exponent.numerator % 2 else 1)
            spread = abs(root * values[1] / values[0]) * args[0].error
            return Ball(root, spread * 2 + abs(root) * epsilon)
    value = _finite(_call(op, values, log_base))
    error = abs(value) * epsilon
    for index, each in enumerate(args):
        if each.error and op not in ("floor", "ceil"):
            moved = list(values)
            moved[index] = each.value + each.error
            if op == "^" and index == 1 and values[1] == mp.nint(mp.re(values[1])):
                continue  # a whole exponent is exact
            error += 2 * abs(_call(op, moved, log_base) - value)
    return Ball(value, error)


def _size(expr: Expr, point: Point) -> float:
    """Decimal digits that the parts of an expression span: where its terms may cancel."""
    total = 0.0
    stack = [expr]
    while stack:
        each = stack.pop()
        stack.extend(each.args)
        if each.op == "number":
            total += (
                abs(each.value.numerator.bit_length() - each.value.denominator.bit_length()) * 0.3
            )
        elif each.op in ("tanh", "coth"):
            try:
                total += float(abs(evaluate(each.args[0], point, 15).value))
            except Undefined:
                pass
        elif each.op in ("^", "!", "binomial", "!!", "sinh", "cosh"):
            try:
                value = abs(evaluate(each, point, 15).value)
                total += abs(float(_context().log10(value))) if value else 0.0
            except Undefined:
                pass
    return total


@lru_cache(maxsize=4096)
def _has(expr: Expr, op: str) -> bool:
    return expr.op == op or any(_has(each, op) for each in expr.args)


def _log_bases(one: Expr, other: Expr) -> tuple[int, ...]:
    return (0, 10) if _has(one, "log") or _has(other, "log") else (0,)


def _compared(one: Ball, other: Ball) -> bool | None:
    """Whether two values agree within their errors; None if those are too large to tell."""
    error = one.error + other.error
    if abs(one.value - other.value) > error:
        return False
    size = max(abs(one.value), abs(other.value))
    if error <= size * _ENOUGH or (size <= error and error <= _ENOUGH):
        return True
    return None


def closed_equal(one: Expr, other: Expr) -> bool:
    """Whether two expressions without symbols have the same value.

    Rationals are compared exactly. Others differ as soon as their enclosures at 30 digits, or at
    the final precision, are apart. That precision is 60 digits beyond all that the sizes of
    their parts could hide (`1 + e^{-1000}` and 1 need 434); what is not apart then is equal.
    """
    if one.key == other.key:
        return True
    if one.op == other.op == "number" or one.huge or other.huge:
        return False
    if any(_has(each, "infinity") for each in (one, other)):
        return False
    for base in _log_bases(one, other):
        try:
            first = [evaluate(each, {}, _DIGITS, base) for each in (one, other)]
            if _compared(*first) is False:
                continue
            digits = 60 + int(2 * (_size(one, {}) + _size(other, {})))
            if digits > _MAX_DIGITS:
                continue
            if _compared(*(evaluate(each, {}, digits, base) for each in (one, other))):
                return True
        except (Undefined, TooLarge):
            continue
    return False


def exact(expr: Expr, point: Point) -> Fraction | None:
    """The rational value of a rational function at a point, None for any other expression.

    Raises:
      Undefined: a division by 0.
    """
    if expr.op == "number":
        return expr.value
    if expr.op == "symbol":
        return point.get(expr.key)
    if expr.op not in ("+", "*", "^"):
        return None
    args = []
    for each in expr.args:
        value = exact(each, point)
        if value is None:
            return None
        args.append(value)
    if expr.op == "^":
        base, exponent = args
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator != 1 or abs(exponent) * bits > MAX_BITS:
            return None
        if not base and exponent <= 0:
            raise Undefined
        return base**exponent.numerator
    return math.prod(args, start=Fraction(1)) if expr.op == "*" else sum(args, Fraction(0))


_SIZES = ((3, 0), (1, 0), (12, 0), (0, 0), (2, 1), (1, 1), (7, 1), (0, 0), (3, 1))
_CORNERS = 40  # points more where a function has corners


def points(symbols: frozenset[str], exprs: Sequence[Expr] = ()) -> Iterator[Point]:
    """Rational points: positive ones of several sizes, then with mixed signs. Always the same.

    Where one of the expressions has corners (absolute values, even roots, maxima, floors), many
    more follow: of sizes from 1e-3 to 1e9, and about the numbers in the expressions.
    """
    names = sorted(symbols)
    draw = random.Random(",".join(names))
    for size, mixed in _SIZES:
        if not size:  # whole numbers, where floors jump
            yield {name: Fraction(draw.randrange(2, 12)) for name in names}
            continue
        yield {
            name: Fraction(draw.randrange(1, size << 20), (1 << 20) - 3)
            * (-1 if mixed and draw.random() < 0.6 else 1)
            for name in names
        }
    parts = list(_all_parts(exprs))
    if not any(map(_has_corners, parts)):
        return
    sizes = [Fraction(1, 1000), *(Fraction(10) ** power for power in range(10))]
    sizes += [abs(each.value) for each in parts if each.op == "number" and each.value][:20]
    for _ in range(_CORNERS):
        yield {
            name: draw.choice(sizes)
            * Fraction(draw.randrange(1, 1 << 21), 1 << 20)
            * draw.choice((-1, 1))
            for name in names
        }


def _all_parts(exprs: Sequence[Expr]) -> Iterator[Expr]:
    stack = list(exprs)
    while stack:
        each = stack.pop()
        stack.extend(each.args)
        yield each


def _has_corners(expr: Expr) -> bool:
    if expr.op == "^":
        exponent = expr.args[1]
        return exponent.op == "number" and exponent.value.denominator % 2 == 0
    return expr.op in ("abs", "max", "min", "floor", "ceil", "sign")


def _real(ball: Ball) -> bool:
    return bool(abs(_context().im(ball.value)) <= ball.error)


def symbolic_equal(one: Expr, other: Expr) -> bool:
    """Whether two expressions agree wherever both are defined and real.

    By their values at fixed points of 20 random bits per symbol (Schwartz, 1980; Zippel, 1979):
    exactly for rational functions, to 30 digits for others. Two different ones agree at all points
    with a chance below 1e-20; where neither is ever real, complex values are compared.
    """
    if one.key == other.key:
        return True
    if one.huge or other.huge:
        return False
    return any(_agree(one, other, base) for base in _log_bases(one, other))


def _digits(*exprs: Expr) -> int:
    """Digits at which no number in the expressions is too small to be seen beside the others."""
    size = 0.0
    for each in _all_parts(exprs):
        if each.op == "number":
            bits = each.value.numerator.bit_length() - each.value.denominator.bit_length()
            size += abs(bits) * 0.3
    return min(_DIGITS + int(size), _MOST_DIGITS_AT_POINTS)


def _agree(one: Expr, other: Expr, log_base: int) -> bool:
    digits = _digits(one, other)
    agreed = complex_agreed = 0
    complex_apart = one_real = nonzero = False
    for point in points(one.symbols | other.symbols, (one, other)):
        try:
            left, right = exact(one, point), exact(other, point)
            if left is not None and right is not None:
                if left != right:
                    return False
                agreed += 1
                nonzero |= left != 0
                continue
            balls = [evaluate(each, point, _DIGITS, log_base) for each in (one, other)]
            if digits > _DIGITS and _compared(*balls):
                balls = [evaluate(each, point, digits, log_base) for each in (one, other)]
        except (Undefined, TooLarge):
            continue
        real = [_real(each) for each in balls]
        agree = _compared(*balls)
        if agree is None:
            continue
        differ = not agree
        if all(real):
            if differ:
                return False
            agreed += 1
            nonzero |= any(abs(each.value) > each.error for each in balls)
        elif not any(real):
            complex_agreed += not differ
            complex_apart |= differ
        else:
            one_real = True
    if one_real:  # where both are 0, `i x` is as real as `x`
        return agreed >= 2 and nonzero
    if agreed >= 2:
        return True
    return agreed + complex_agreed >= 2 and not complex_apart


def equal(one: Expr, other: Expr) -> bool:
    """Whether two expressions are equal."""
    if one.symbols or other.symbols:
        return symbolic_equal(one, other)
    return closed_equal(one, other)


def ratio_sign(one: Expr, other: Expr) -> int:
    """The sign of the constant c with `one = c * other`, 0 if there is none."""
    if one.huge or other.huge:
        return int(one.key == other.key)
    first: tuple[Number, Number] | None = None
    count, sign = 0, 0
    for point in points(one.symbols | other.symbols):
        try:
            left, right = (evaluate(each, point, _DIGITS) for each in (one, other))
        except (Undefined, TooLarge):
            continue
        zero = [abs(each.value) <= each.error for each in (left, right)]
        if any(zero):
            if not all(zero):
                return 0
            continue
        ratio = left.value / right.value
        error = abs(ratio) * (left.error / abs(left.value) + right.error / abs(right.value)) * 2
        if first is None:
            first = (ratio, error)
            sign = 1 if _context().re(ratio) > 0 else -1
        elif abs(ratio - first[0]) > error + first[1]:
            return 0
        count += 1
    return sign if count >= 2 else 0


@lru_cache(maxsize=4096)
def real_value(expr: Expr) -> Number:
    """A real closed value at 30 digits, infinities included.

    Raises:
      Undefined, TooLarge: it is not real, or not to be evaluated.
    """
    mp = _context()
    if expr.op == "infinity":
        return mp.inf
    if expr.key.endswith("infinity)") and expr.op == "*" and expr.args[0].key == "-1":
        return -mp.inf
    if expr.symbols or expr.huge:
        raise Undefined
    ball = evaluate(expr, {}, _DIGITS)
    if not _real(ball):
        raise Undefined
    return mp.re(ball.value)


def signature(expr: Expr) -> str:
    """A text that is equal for equal expressions: exact, or the value at a fixed point."""
    if expr.op == "number":
        return expr.key
    if expr.huge:
        return expr.key
    mp = _context()
    for point in islice(points(expr.symbols), 8 if expr.symbols else 1):
        try:
            value = exact(expr, point)
            if value is not None:
                return f"{','.join(sorted(expr.symbols))}:{number(value).key}"
            ball = evaluate(expr, point, 60)
        except (Undefined, TooLarge):
            continue
        if ball.error > abs(ball.value) * mp.mpf(10) ** -40:
            return "0" if abs(ball.value) <= ball.error else expr.key
        real, imaginary = (
            mp.nstr(part, 25) if abs(part) > ball.error else "0"
            for part in (mp.re(ball.value), mp.im(ball.value))
        )
        return f"{','.join(sorted(expr.symbols))}:{real},{imaginary}"
    return expr.key


def equation_signature(difference: Expr) -> str:
    """A text that is equal for equations whose sides' differences have a constant ratio."""
    try:
        first, second, *_ = points(difference.symbols)
        one, other = (evaluate(difference, each, 60).value for each in (first, second))
        ratio = one / other
        mp = _context()
        return f"equation {mp.nstr(mp.re(ratio), 25)},{mp.nstr(mp.im(ratio), 25)}"
    except (Undefined, TooLarge, ZeroDivisionError):
        return difference.key
