"""What several sides or parts make together: named values, sets of numbers, lists, relations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TypeGuard

from r1jax.rewards.answers import expressions as ex
from r1jax.rewards.answers import sets
from r1jax.rewards.answers.arithmetic import Node, as_expr, substituted
from r1jax.rewards.answers.expressions import Expr
from r1jax.rewards.answers.numeric import Undefined, closed_equal, evaluate
from r1jax.rewards.answers.text import TooLarge, Unreadable
from r1jax.rewards.answers.values import (
    Either,
    Group,
    Labelled,
    Listing,
    Operation,
    Region,
    Relation,
    Scalar,
    Value,
)


def set_of(items: list[Value], joints: list[str]) -> Value:
    """A set by its elements, or by a condition behind `suchthat`."""
    if "suchthat" not in joints:
        return Group("{}", tuple(items))
    at = joints.index("suchthat") + 1
    if at >= len(items):
        raise Unreadable("a set without its condition")
    element, conditions = items[0] if at == 1 else Listing(tuple(items[:at])), items[at:]
    label = element.label if isinstance(element, Labelled) else ""
    if isinstance(element, Scalar) and element.expr.op == "symbol":
        label = element.expr.key
    inner = element.value if isinstance(element, Labelled) else sets.REALS
    whole = _conjunction(label, conditions) if label else None
    if isinstance(whole, Region) and isinstance(inner, Region):
        return sets.intersection(whole, inner)
    return Operation("suchthat", (element, *conditions))


def _conjunction(label: str, conditions: Sequence[Value]) -> Value | None:
    region = sets.REALS
    for each in conditions:
        if (
            not isinstance(each, Labelled)
            or each.label != label
            or not isinstance(each.value, Region)
        ):
            return None
        region = sets.intersection(region, each.value)
    return region


def is_set(value: Node) -> TypeGuard[Value]:
    """Whether set operations apply."""
    return isinstance(value, Group | Region) or (
        isinstance(value, Operation) and value.name != "case"
    )


def set_operation(name: str, parts: list[Value]) -> Value:
    """`cup`, `cap` or `setminus`: evaluated for sets of real numbers, else as it stands."""
    regions = [sets.as_region(each) for each in parts]
    known = [each for each in regions if each is not None]
    if len(known) < len(parts):
        if name == "setminus":
            return Operation(name, tuple(parts))
        flat = [
            part
            for each in parts
            for part in (
                each.items if isinstance(each, Operation) and each.name == name else [each]
            )
        ]
        return Operation(name, tuple(flat))
    if name == "cup":
        return sets.union(piece for each in known for piece in each.pieces)
    region = known[0]
    for each in known[1:]:
        region = (sets.intersection if name == "cap" else sets.difference)(region, each)
    return region


def listing(items: list[Value], joints: list[str]) -> Value:
    """Several parts as one value: solutions of one unknown, conditions on one, or a list."""
    if len(items) == 1:
        return items[0]
    if len(set(joints)) > 1 and (";" in joints or _repeats(items)):
        ends = (";",) if ";" in joints else ("and", "or")
        blocks: list[tuple[list[Value], list[str]]] = [([items[0]], [])]
        for joint, each in zip(joints, items[1:], strict=True):
            if joint in ends:
                blocks.append(([each], []))
            else:
                blocks[-1][0].append(each)
                blocks[-1][1].append(joint)
        solutions = [_solution(*block) for block in blocks]
        return listing(solutions, ["or"] * (len(solutions) - 1))
    first = items[0]
    if isinstance(first, Labelled) and all(
        isinstance(each, Labelled) and each.label == first.label for each in items
    ):
        labelled = [each for each in items if isinstance(each, Labelled)]
        regions = [each.value for each in labelled if isinstance(each.value, Region)]
        if len(regions) == len(items) and first.relation.signs[0] != "in":
            value: Value | None
            if "or" in joints:
                value = sets.union(piece for each in regions for piece in each.pieces)
            else:
                both = _conjunction(first.label, items)
                value = both
                if "and" not in joints and isinstance(both, Region) and not both.pieces:
                    value = sets.union(piece for each in regions for piece in each.pieces)
            if value is not None:
                return Labelled(first.label, value, True, Relation((value,), ("listing",)))
        return Labelled(
            first.label,
            Listing(tuple(each.value for each in labelled)),
            first.droppable,
            Relation((), ("listing",)),
        )
    unnamed = [each for each in items[1:] if not isinstance(each, Labelled | Relation)]
    if (
        isinstance(first, Labelled)
        and len(unnamed) == len(items) - 1
        and not isinstance(first.value, Region | Listing)
        and len(first.relation.sides) < 3
        and first.droppable
    ):
        return Labelled(
            first.label, Listing((first.value, *unnamed)), True, Relation((), ("listing",))
        )
    return Listing(tuple(items))


def _repeats(items: list[Value]) -> bool:
    """Whether names come again: `p = 5, q = 2 and p = 7, q = 2`."""
    names = [each.label for each in items if isinstance(each, Labelled)]
    return len(names) == len(items) and 1 < len(set(names)) < len(names)


def _solution(items: list[Value], joints: list[str]) -> Value:
    """`p = 5, q = 2` as one solution among several."""
    named = [each for each in items if isinstance(each, Labelled)]
    if len(named) < len(items) or len(items) < 2:
        return listing(items, joints)
    group = Group("()", tuple(each.value for each in named))
    label = f"({','.join(each.label for each in named)})"
    return Labelled(label, group, True, Relation((), ("listing",)))


def both_signs(items: list[Value], joints: list[str]) -> tuple[list[Value], list[str]]:
    """Each value with a plus-minus sign twice."""
    if not any(map(_has_sign, items)):
        return items, joints
    both: list[Value] = []
    between: list[str] = []
    for index, each in enumerate(items):
        between += joints[index - 1 : index] if index else []
        if _has_sign(each):
            both += [_with_sign(each, ex.ONE), _with_sign(each, ex.MINUS_ONE)]
            between.append("or")
        else:
            both.append(each)
    return both, between


def _has_sign(value: Value) -> bool:
    if isinstance(value, Labelled):
        return _has_sign(value.value)
    return isinstance(value, Scalar) and "\\pm" in value.expr.symbols


def _with_sign(value: Value, sign: Expr) -> Value:
    if isinstance(value, Labelled):
        changed = _with_sign(value.value, sign)
        relation = replace(value.relation, sides=(value.relation.sides[0], changed))
        return replace(value, value=changed, relation=relation)
    return (
        replace(value, expr=substituted(value.expr, sign)) if isinstance(value, Scalar) else value
    )


def _is_closed(value: Value) -> bool:
    return isinstance(value, Scalar) and not value.expr.symbols


def _close(one: Value, other: Value) -> bool:
    """Two closed numbers that are equal, or one of which rounds the other."""
    if not isinstance(one, Scalar) or not isinstance(other, Scalar):
        return False
    left, right = as_expr(one), as_expr(other)
    if closed_equal(left, right):
        return True
    for rounded, exact in ((one, other), (other, one)):
        if rounded.expr.op == "number":
            places = rounded.places or 0
            if places or rounded.expr.value.denominator == 1:
                try:
                    difference = evaluate(ex.add(left, ex.negative(right)), {}, 30).value
                except (Undefined, TooLarge):
                    return False
                unit = Fraction(1, 10**places) / (100 if rounded.percent else 1)
                if abs(difference) * 2 <= float(unit) * 1.0000001 and exact is not rounded:
                    return abs(difference) * 10 <= abs(evaluate(left, {}, 30).value)
    return False


def chain(sides: list[Value], signs: list[str], names: list[tuple[str, bool] | None]) -> Value:
    """A chain of relations as a named value, a set of numbers, a value, or a relation."""
    relation = Relation(tuple(sides), tuple(signs))
    kinds = set(signs)
    if kinds <= {"=", "~"}:
        closed = [each for each in sides if _is_closed(each)]
        if any(not _close(one, other) for one, other in zip(closed, closed[1:], strict=False)):
            return relation
        value = sides[-1]
        if len(closed) > 1:
            value = (
                closed[0]
                if "~" in kinds or any(_is_decimal(each) for each in closed[1:])
                else closed[-1]
            )
            if not closed_equal(as_expr(closed[0]), as_expr(closed[-1])):
                value = Either(closed[0], closed[-1], loose=True)
        if len(closed) == len(sides):
            return value
        if any(_mentions(each, sides[0]) for each in sides[1:]):
            return relation  # `x = 8 x = 7` names nothing
        if names[0] is not None and (not _is_closed(sides[0]) or len(names[0][0]) == 1):
            return Labelled(names[0][0], value, names[0][1], relation)
        if len(sides) == 2 and names[1] is not None and _is_closed(sides[0]):
            return Labelled(names[1][0], sides[0], names[1][1], relation)
        return relation
    if kinds == {"in"} and len(signs) == 1 and names[0] is not None:
        region = sets.as_region(sides[1])
        discrete = isinstance(sides[1], Group) and sides[1].brackets == "{}"
        value = sides[1] if region is None or discrete else region
        return Labelled(names[0][0], value, True, relation)
    if kinds <= {"<", ">", "<=", ">=", "!="}:
        return _inequality(relation, names)
    return relation


def _mentions(value: Value, name: Value) -> bool:
    if not isinstance(name, Scalar) or name.expr.op != "symbol" or not isinstance(value, Scalar):
        return False
    return name.expr.key in value.expr.symbols


def _is_decimal(value: Value) -> bool:
    return isinstance(value, Scalar) and value.places is not None


def _inequality(relation: Relation, names: list[tuple[str, bool] | None]) -> Value:
    sides, signs = relation.sides, relation.signs
    middle = [index for index, each in enumerate(sides) if not _is_closed(each)]
    if len(middle) != 1 or len(sides) > 3:
        return relation
    index, inside = middle[0], sides[middle[0]]
    name = (names[index] or ("", True))[0]
    absolute = isinstance(inside, Scalar) and inside.expr.op == "abs"
    if absolute and isinstance(inside, Scalar) and inside.expr.args[0].op == "symbol":
        name = inside.expr.args[0].key
    if not name:
        return relation
    region = sets.REALS
    try:
        for at, sign in enumerate(signs):
            if index not in (at, at + 1):
                return relation
            other = sides[at + 1 if at == index else at]
            bound = as_expr(other)
            if at + 1 == index:  # the bound is on the left
                sign = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(sign, sign)
            low, high = ex.negative(ex.INFINITY), ex.INFINITY
            if sign == "!=":
                piece = sets.complement(sets.interval(bound, True, bound, True))
            elif sign[0] == "<":
                piece = sets.interval(low, False, bound, sign == "<=")
            else:
                piece = sets.interval(bound, sign == ">=", high, False)
            region = sets.intersection(region, piece)
    except Unreadable:
        return relation
    if absolute:
        half = sets.intersection(region, sets.interval(ex.ZERO, True, ex.INFINITY, False))
        region = sets.union([*half.pieces, *map(sets.mirrored, half.pieces)])
    return Labelled(name, region, True, relation) if region.pieces else relation
