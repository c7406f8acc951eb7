"""Sets of real numbers: unions of intervals, kept apart and in order."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cmp_to_key

from r1jax.rewards.answers.expressions import INFINITY, Expr, negative
from r1jax.rewards.answers.numeric import Undefined, closed_equal, real_value
from r1jax.rewards.answers.text import TooLarge, Unreadable
from r1jax.rewards.answers.values import Group, Interval, Region, Scalar, Value

REALS = Region((Interval(negative(INFINITY), INFINITY, False, False),))
EMPTY = Region(())
_MAX_PIECES = 100


def as_region(value: Value) -> Region | None:
    """An interval or a set of numbers as a region; None for whatever is none."""
    if isinstance(value, Region):
        return value
    if not isinstance(value, Group):
        return None
    exprs = [each.expr for each in value.items if isinstance(each, Scalar) and not each.percent]
    if len(exprs) != len(value.items) or any(each.symbols for each in exprs):
        return None
    try:
        if value.brackets == "{}":
            return union(Interval(each, each, True, True) for each in exprs)
        if len(exprs) == 2 and value.brackets in ("()", "[]", "(]", "[)"):
            if _below(*exprs) >= 0:  # a pair, not an interval without elements
                return None
            return interval(exprs[0], value.brackets[0] == "[", exprs[1], value.brackets[1] == "]")
    except Unreadable:
        return None
    return None


def interval(low: Expr, has_low: bool, high: Expr, has_high: bool) -> Region:
    """The interval; empty if its ends are in the wrong order.

    Raises:
      Unreadable: an end is not real.
    """
    return union([Interval(low, high, has_low, has_high)])


def _below(one: Expr, other: Expr) -> int:
    """-1, 0, 1 as `one` is below, at or above `other`."""
    try:
        left, right = real_value(one), real_value(other)
    except (Undefined, TooLarge) as error:
        raise Unreadable("the end of an interval is not a real number") from error
    if one.key == other.key or (abs(left - right) < abs(left) * 1e-15 and closed_equal(one, other)):
        return 0
    return -1 if left < right else 1


def union(pieces: Iterable[Interval]) -> Region:
    """The union; touching intervals are joined.

    Raises:
      Unreadable: an end is not real.
    """
    kept: list[Interval] = []
    for each in pieces:
        if len(kept) >= _MAX_PIECES:
            raise TooLarge(f"a union of over {_MAX_PIECES} sets")
        order = _below(each.low, each.high)
        if order < 0 or (order == 0 and each.has_low and each.has_high):
            kept.append(each)

    def compare(one: Interval, other: Interval) -> int:
        return _below(one.low, other.low) or int(other.has_low) - int(one.has_low)

    joined: list[Interval] = []
    for each in sorted(kept, key=cmp_to_key(compare)):
        if joined:
            last = joined[-1]
            order = _below(each.low, last.high)
            if order < 0 or (order == 0 and (each.has_low or last.has_high)):
                end = _below(last.high, each.high)
                joined[-1] = Interval(
                    last.low,
                    each.high if end < 0 else last.high,
                    last.has_low,
                    each.has_high if end < 0 else last.has_high or (end == 0 and each.has_high),
                )
                continue
        joined.append(each)
    return Region(tuple(joined))


def complement(region: Region) -> Region:
    """All other real numbers."""
    pieces = []
    low, has_low = negative(INFINITY), False
    for each in region.pieces:
        pieces.append(Interval(low, each.low, has_low, not each.has_low))
        low, has_low = each.high, not each.has_high
    pieces.append(Interval(low, INFINITY, has_low, False))
    return union(
        Interval(each.low, each.high, each.has_low, each.has_high)
        for each in pieces
        if not (each.low.op == "infinity" or each.high.key == REALS.pieces[0].low.key)
    )


def intersection(one: Region, other: Region) -> Region:
    """What is in both."""
    return complement(union([*complement(one).pieces, *complement(other).pieces]))


def difference(one: Region, other: Region) -> Region:
    """What is in the first only."""
    return intersection(one, complement(other))


def mirrored(piece: Interval) -> Interval:
    """The interval of the negative numbers."""
    return Interval(negative(piece.high), negative(piece.low), piece.has_high, piece.has_low)
