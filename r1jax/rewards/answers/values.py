"""The kinds of answers. All are immutable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from r1jax.rewards.answers.expressions import Expr
from r1jax.rewards.answers.units import Unit


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number or expression, with what its spelling says.

    Attributes:
      expr: the value; of `10%` it is 10.
      places: digits behind the point of a decimal, else None.
      digits: significant digits of a decimal.
      percent: a percent sign follows.
      unit: what it is a number of; empty if nothing is said.
      letters: the spelling of two or more bare letters, such as `ACBD`.
    """

    expr: Expr
    places: int | None = None
    digits: int = 0
    percent: bool = False
    unit: Unit = ()
    letters: str = ""


@dataclass(frozen=True, slots=True)
class Words:
    """A text."""

    text: str


@dataclass(frozen=True, slots=True)
class Based:
    """A number with its base as a subscript."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Colon:
    """A ratio `3:5` or a time `4:51:06 p.m.`, whose fields have two digits (`clock`)."""

    items: tuple[Value, ...]
    suffix: str = ""
    clock: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """A tuple `()`, list `[]`, half-open interval, or set `{}`."""

    brackets: str
    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """Several answers, parted by commas, `and` or `or`."""

    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of entries; the kind of brackets does not matter."""

    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True, slots=True)
class Interval:
    """Of real numbers; a point has equal ends."""

    low: Expr
    high: Expr
    has_low: bool
    has_high: bool


@dataclass(frozen=True, slots=True)
class Region:
    """A set of real numbers: intervals apart from each other, in order."""

    pieces: tuple[Interval, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """What is not evaluated: a set operation or a set by a condition."""

    name: str
    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Residue:
    """A residue class."""

    value: Value
    modulus: Expr


@dataclass(frozen=True, slots=True)
class Relation:
    """An equation, an inequality or a chain of them."""

    sides: tuple[Value, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A value with its name: `x = 5`, `D = [0, 1)`, `x > 3`.

    Attributes:
      label: the name's canonical spelling.
      droppable: the value alone is the same answer, where the name is the reference's. A sum such
        as `x + y` names a value in an answer only: in a reference it makes an equation.
      relation: the equation or inequality as it was written.
    """

    label: str
    value: Value
    droppable: bool
    relation: Relation


@dataclass(frozen=True, slots=True)
class Either:
    """A spelling with two readings: `100,200`, or `5 m` (metres, or 5 times m).

    Attributes:
      loose: the second reading also counts against a value with one reading.
    """

    first: Value
    second: Value
    loose: bool


Value: TypeAlias = (
    Scalar
    | Words
    | Based
    | Colon
    | Group
    | Listing
    | Matrix
    | Region
    | Operation
    | Residue
    | Relation
    | Labelled
    | Either
)
