"""Arithmetic on what is being read: expressions, and matrices and tuples of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeAlias

from r1jax.rewards.answers import expressions as ex
from r1jax.rewards.answers.expressions import Expr
from r1jax.rewards.answers.text import Unreadable
from r1jax.rewards.answers.values import (
    Group,
    Matrix,
    Operation,
    Region,
    Scalar,
    Value,
)

Node: TypeAlias = Expr | Value
"""What a part of a text is while it is read."""


def letter_symbol(letter: str) -> Expr:
    """A symbol, or Euler's number or the imaginary unit."""
    return {"e": ex.E, "i": ex.IMAGINARY}.get(letter) or ex.symbol(letter)


def as_expr(node: Node) -> Expr:
    """The expression of a node.

    Raises:
      Unreadable: it is another kind of value.
    """
    if isinstance(node, Expr):
        return node
    if isinstance(node, Scalar):
        return ex.multiply(node.expr, ex.number(Fraction(1, 100))) if node.percent else node.expr
    raise Unreadable(f"arithmetic with a {type(node).__name__}")


def application(name: str, argument: Node) -> str:
    """The symbol that stands for `f(x)`, `g(1, 2)` or `I(0)`; empty if it is a product."""
    if isinstance(argument, Group) and all(isinstance(each, Scalar) for each in argument.items):
        return f"{name}({','.join(as_expr(each).key for each in argument.items)})"
    if isinstance(argument, Expr) and (name in ("f", "g", "h") or argument.key == "0"):
        return f"{name}({argument.key})"
    return ""


def negated(node: Node) -> Node:
    """The node times -1."""
    return multiplied(ex.MINUS_ONE, node)


def _entrywise(matrix: Matrix, change: Callable[[Expr], Expr]) -> Matrix:
    rows = [[Scalar(change(as_expr(each))) for each in row] for row in matrix.rows]
    return Matrix(tuple(map(tuple, rows)))


def _dot(row: Sequence[Value], column: Sequence[Value]) -> Scalar:
    pairs = zip(row, column, strict=True)
    return Scalar(ex.add(*(ex.multiply(as_expr(a), as_expr(b)) for a, b in pairs)))


def multiplied(one: Node, other: Node) -> Node:
    """The product of expressions, matrices, or a factor and a tuple.

    Raises:
      Unreadable: there is none.
    """
    if isinstance(one, Matrix) and isinstance(other, Matrix):
        if len(one.rows[0]) != len(other.rows) or len(one.rows) * len(other.rows[0]) > 36:
            return Operation("*", (one, other))
        columns = list(zip(*other.rows, strict=True))
        return Matrix(tuple(tuple(_dot(row, each) for each in columns) for row in one.rows))
    if isinstance(other, Matrix):
        one, other = other, one
    if isinstance(one, Matrix):
        if not isinstance(other, Expr | Scalar):
            return Operation("*", (one, other))
        factor = as_expr(other)
        return _entrywise(one, lambda each: ex.multiply(factor, each))
    for group, factor_node in ((one, other), (other, one)):
        if isinstance(group, Group) and group.brackets == "()" and isinstance(factor_node, Expr):
            return Group(
                "()", tuple(Scalar(ex.multiply(factor_node, as_expr(x))) for x in group.items)
            )
    if isinstance(one, Expr) and one.op == "symbol" and isinstance(other, Group | Region):
        return Operation("*", (Scalar(one), other))  # such as a union over an index
    return ex.multiply(as_expr(one), as_expr(other))


def added(terms: Sequence[Node]) -> Node:
    """The sum of expressions or matrices.

    Raises:
      Unreadable: there is none.
    """
    matrices = [each for each in terms if isinstance(each, Matrix)]
    if not matrices:
        return ex.add(*map(as_expr, terms))
    if len(matrices) < len(terms) or len({_shape(each) for each in matrices}) > 1:
        raise Unreadable("a sum of matrices of several shapes")
    rows = [
        [Scalar(ex.add(*map(as_expr, entries))) for entries in zip(*row, strict=True)]
        for row in zip(*(each.rows for each in matrices), strict=True)
    ]
    return Matrix(tuple(map(tuple, rows)))


def _shape(matrix: Matrix) -> tuple[int, ...]:
    return tuple(map(len, matrix.rows))


def matrix_power(matrix: Matrix, exponent: Node) -> Node:
    """A small whole power, or the transpose; any other power as it stands."""
    key = as_expr(exponent).key
    if key in ("T", "\\top", "\\intercal"):
        return Matrix(tuple(zip(*matrix.rows, strict=True)))
    if not key.isdigit() or not 1 <= int(key) <= 8:
        return Operation("^", (matrix, Scalar(as_expr(exponent))))
    result: Node = matrix
    for _ in range(int(key) - 1):
        result = multiplied(result, matrix)
    return result


def determinant(matrix: Matrix) -> Expr:
    """The determinant.

    Raises:
      Unreadable: the matrix is not square, or has over five rows.
    """
    entries = [[as_expr(each) for each in row] for row in matrix.rows]
    if len(entries) != len(entries[0]) or len(entries) > 5:
        raise Unreadable("a determinant of a matrix that is not square, or large")

    def minor(rows: list[list[Expr]]) -> Expr:
        if len(rows) == 1:
            return rows[0][0]
        return ex.add(
            *(
                ex.multiply(
                    ex.number((-1) ** column),
                    each,
                    minor([row[:column] + row[column + 1 :] for row in rows[1:]]),
                )
                for column, each in enumerate(rows[0])
            )
        )

    return minor(entries)


def rounded(name: str, inner: Expr) -> Expr:
    """`floor` or `ceil`."""
    if inner.op == "number":
        floor = inner.value.numerator // inner.value.denominator
        return ex.number(floor if name == "floor" else floor + (inner.value != floor))
    return ex.function(name, inner)


def apply(name: str, args: list[Expr], base: Expr | None) -> Expr:
    """A named function of arguments; `base` is that of a logarithm.

    Raises:
      Unreadable: there is no argument.
    """
    if not args:
        raise Unreadable(f"{name} of nothing")
    x = args[0]
    if name in ("ln", "lg"):
        return _logarithm(x, ex.E if name == "ln" else ex.number(10))
    if name == "log":
        return ex.function("log", x) if base is None else _logarithm(x, base)
    if name == "exp":
        return ex.power(ex.E, x)
    if name in ("floor", "ceil"):
        return rounded(name, x)
    if name == "abs" and x.op == "number":
        return ex.number(abs(x.value))
    if name in ("gcd", "lcm", "max", "min"):
        args = sorted(args, key=lambda each: each.key)
        whole = [each.value for each in args if each.op == "number"]
        if len(whole) == len(args) and (
            name in ("max", "min") or all(each.denominator == 1 for each in whole)
        ):
            if name in ("max", "min"):
                return ex.number(max(whole) if name == "max" else min(whole))
            combined = math.gcd if name == "gcd" else math.lcm
            return ex.number(combined(*(each.numerator for each in whole)))
    return ex.function(name, *args)


def _logarithm(x: Expr, base: Expr) -> Expr:
    if x.key == "1":
        return ex.ZERO
    if x.key == base.key:
        return ex.ONE
    return ex.function("log", x, base)


def substituted(expr: Expr, sign: Expr) -> Expr:
    """The expression with 1 or -1 for its plus-minus signs."""
    if expr.key == "\\pm":
        return sign
    if "\\pm" not in expr.symbols:
        return expr
    args = [substituted(each, sign) for each in expr.args]
    if expr.op == "+":
        return ex.add(*args)
    if expr.op == "*":
        return ex.multiply(*args)
    return ex.power(*args) if expr.op == "^" else ex.function(expr.op, *args)
