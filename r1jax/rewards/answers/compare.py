"""Whether two answers are equal, by their kinds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from r1jax.rewards.answers import expressions as ex
from r1jax.rewards.answers import sets
from r1jax.rewards.answers.expressions import Expr
from r1jax.rewards.answers.numeric import (
    Undefined,
    equal,
    equation_signature,
    evaluate,
    ratio_sign,
    signature,
)
from r1jax.rewards.answers.text import TooLarge
from r1jax.rewards.answers.units import units_agree
from r1jax.rewards.answers.values import (
    Based,
    Colon,
    Either,
    Group,
    Labelled,
    Listing,
    Matrix,
    Operation,
    Region,
    Relation,
    Residue,
    Scalar,
    Value,
    Words,
)

_TRUTH_VALUES = {"t", "f", "true", "false", "yes", "no", "y", "n"}
_NOTHING = {"no solution", "no solutions", "no real solution", "no real solutions", "empty set"}
_NOTHING |= {"none", "empty", "the empty set", "null set"}
_REVERSED = {"yx", "ba", "zyx", "cba", "nm", "qp", "vu", "ts"}
_DIGITS_THAT_ROUND = 6
_MAX_MATCHES = 200  # items of lists that are compared without an order


def same_value(reference: Value, answer: Value) -> bool:
    """Whether the answer has the reference's value. A set of one is its element."""
    one, other = _only_element(reference), _only_element(answer)
    if (one is None) != (other is None):
        return same(one or reference, other or answer)
    return same(reference, answer)


def _only_element(value: Value) -> Value | None:
    if isinstance(value, Group) and value.brackets == "{}" and len(value.items) == 1:
        element = value.items[0]
        if not isinstance(element, Region) and getattr(element, "brackets", "") != "{}":
            return element
    return None


def same(reference: Value, answer: Value) -> bool:
    """Whether two values, or parts of them, are equal. Kinds that differ are not."""
    if isinstance(reference, Either) or isinstance(answer, Either):
        return _same_reading(reference, answer)
    if _has_condition(reference) != _has_condition(answer):
        return same(_without_condition(reference), _without_condition(answer))
    if isinstance(reference, Labelled) or isinstance(answer, Labelled):
        return _same_labelled(reference, answer)
    if isinstance(reference, Scalar) and isinstance(answer, Scalar):
        return _same_scalar(reference, answer)
    if isinstance(reference, Relation) and isinstance(answer, Relation):
        return same_relation(reference, answer)
    if isinstance(reference, Words) or isinstance(answer, Words):
        return _same_words(reference, answer)
    if isinstance(reference, Based) and isinstance(answer, Based):
        return reference == answer
    if isinstance(reference, Colon) and isinstance(answer, Colon):
        return _same_colon(reference, answer)
    if isinstance(reference, Matrix):
        answer = _as_matrix(answer)
    elif isinstance(answer, Matrix):
        reference = _as_matrix(reference)
    if isinstance(reference, Matrix) and isinstance(answer, Matrix):
        return [len(row) for row in reference.rows] == [len(row) for row in answer.rows] and all(
            _in_order(one, other) for one, other in zip(reference.rows, answer.rows, strict=True)
        )
    if isinstance(reference, Residue) and isinstance(answer, Residue):
        return _same_residue(reference, answer)
    if isinstance(reference, Region) or isinstance(answer, Region):
        left, right = _region(reference), _region(answer)
        return left is not None and right is not None and _same_region(left, right)
    if isinstance(reference, Operation) and isinstance(answer, Operation):
        if reference.name != answer.name:
            return False
        if reference.name in ("cup", "cap"):
            return _any_order(reference.items, answer.items)
        return _in_order(reference.items, answer.items)
    return _same_items(reference, answer)


def _region(value: Value) -> Region | None:
    """Intervals that `or` or commas part are their union."""
    if not isinstance(value, Listing):
        return sets.as_region(value)
    regions = [sets.as_region(each) for each in value.items]
    pieces = [piece for each in regions if each is not None for piece in each.pieces]
    return None if None in regions else sets.union(pieces)


def _has_condition(value: Value) -> bool:
    """Whether the last part says which set a parameter is from: `k\\pi, k \\in \\mathbb{Z}`."""
    if not isinstance(value, Listing) or len(value.items) != 2:
        return False
    last = value.items[-1]
    return isinstance(last, Labelled) and last.relation.signs == ("in",)


def _without_condition(value: Value) -> Value:
    return value.items[0] if isinstance(value, Listing) and _has_condition(value) else value


def _same_reading(reference: Value, answer: Value) -> bool:
    one = (reference.first, reference.second) if isinstance(reference, Either) else (reference,)
    other = (answer.first, answer.second) if isinstance(answer, Either) else (answer,)
    if len(one) == len(other):
        return any(same(a, b) for a, b in zip(one, other, strict=True))
    either = reference if isinstance(reference, Either) else answer
    assert isinstance(either, Either)
    if same(one[0], other[0]):
        return True
    return either.loose and same(one[-1], other[-1])


# -- numbers and expressions


def _same_scalar(reference: Scalar, answer: Scalar) -> bool:
    if not units_agree(reference.unit, answer.unit):
        return False
    if reference.letters and answer.letters:
        return _same_letters(reference.letters, answer.letters)
    one, other = reference.expr, answer.expr
    if reference.percent != answer.percent:
        if reference.unit or answer.unit:
            return False
        # `10%` is both 10 and 0.1 where the other side has no percent sign.
        percent, plain = (one, other) if reference.percent else (other, one)
        return equal(plain, percent) or equal(
            plain, ex.multiply(percent, ex.number(Fraction(1, 100)))
        )
    return equal(one, other) or _rounds_to(reference, answer) or _rounds_to(answer, reference)


def _same_letters(one: str, other: str) -> bool:
    """Bare letters are a sequence, not a product: `ACBD` is not `ABCD`."""
    if one == other:
        return True
    return len(one) > 2 and one.casefold() == other.casefold() and one.isupper() == other.isupper()


def _rounds_to(decimal: Scalar, other: Scalar) -> bool:
    """`0.333333` stands for 1/3: six digits or more, and rounding at its last place gives it."""
    if decimal.places is None or decimal.digits < _DIGITS_THAT_ROUND or other.expr.symbols:
        return False
    if other.places is not None and other.places <= decimal.places:
        return False
    if other.expr.op == "number" and _terminates(other.expr.value.denominator):
        if other.places is None:
            return False
    difference = ex.add(decimal.expr, ex.negative(other.expr))
    half = ex.number(Fraction(1, 2 * 10**decimal.places))
    if difference.op == "number":
        return abs(difference.value) <= half.value
    try:
        left, right = evaluate(difference, {}, 30), evaluate(half, {}, 30)
    except (Undefined, TooLarge):
        return False
    return bool(abs(left.value) <= right.value + left.error)


def _terminates(denominator: int) -> bool:
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


# -- words


def _folded(text: str) -> str:
    words = " ".join(text.casefold().replace("-", " ").split()).strip(" .!")
    return re.sub("^(?:an?|the) ", "", words)


def _same_words(reference: Value, answer: Value) -> bool:
    one, other = _spelling(reference), _spelling(answer)
    if one is not None and other is not None:
        if _folded(one) == _folded(other):
            return True
        if one.isalpha() and other.isalpha() and len(one) == 1:
            return one == other
        return bool(set(map(_folded, (one, other))) <= _NOTHING)
    if one is not None or other is not None:
        words, value = (one, answer) if one is not None else (other, reference)
        return _folded(words or "") in _NOTHING and sets.as_region(value) == sets.EMPTY
    return False


def _spelling(value: Value) -> str | None:
    if isinstance(value, Words):
        return value.text
    if isinstance(value, Scalar):
        if value.letters:
            return value.letters
        return value.expr.key if value.expr.op == "symbol" else None
    return None


# -- named values, equations and inequalities


def _same_labelled(reference: Value, answer: Value) -> bool:
    if isinstance(reference, Labelled) and isinstance(answer, Labelled):
        if reference.label == answer.label:
            if len(reference.relation.sides) == len(answer.relation.sides) > 2:
                return same_relation(reference.relation, answer.relation)
            return same(reference.value, answer.value)
        # `x \\in [0, 1)` has the name of a member, `D = [0, 1)` that of the set.
        signs = {reference.relation.signs[:1], answer.relation.signs[:1]}
        if len(signs) > 1 and ("=",) in signs and sets.as_region(reference.value) is not None:
            return same(reference.value, answer.value)
        return _is_equation(reference.relation) and same_relation(
            reference.relation, answer.relation
        )
    if isinstance(reference, Labelled):
        if isinstance(answer, Relation):
            return same_relation(reference.relation, answer)
        if isinstance(answer, Listing) and isinstance(reference.value, Group):
            return _same_listed(reference, answer)
        if isinstance(answer, Listing) and any(
            isinstance(each, Labelled)
            and re.sub(r"_\{?[0-9]+\}?$", "", each.label) != reference.label
            for each in answer.items
        ):
            return False
        return reference.droppable and same(reference.value, answer)
    assert isinstance(answer, Labelled)
    if isinstance(reference, Listing) and answer.label.startswith("("):
        if _same_listed(answer, reference):
            return True
    if answer.label.startswith("(") and isinstance(answer.value, Group):
        names = answer.label.strip("()").split(",")
        if len(set(names)) != len(answer.value.items) or "".join(names) in _REVERSED:
            return False  # `(y,x) = (1,2)` is not `(1,2)`
    if isinstance(reference, Group) and isinstance(answer.value, Listing):
        return False  # several solutions are no tuple
    if isinstance(reference, Relation):
        return same_relation(reference, answer.relation)
    return same(reference, answer.value)


def _same_listed(named: Labelled, listing: Listing) -> bool:
    """`(a,b) = (2,5)` and `a = 2, b = 5`."""
    names = named.label.strip("()").split(",")
    if not isinstance(named.value, Group) or len(names) != len(named.value.items):
        return named.droppable and same(named.value, listing)
    given = {each.label: each.value for each in listing.items if isinstance(each, Labelled)}
    if sorted(given) != sorted(names):
        return named.droppable and same(named.value, listing)
    return all(
        same(value, given[name]) for name, value in zip(names, named.value.items, strict=True)
    )


def _is_equation(relation: Relation) -> bool:
    return len(relation.signs) == 1 and relation.signs[0] in ("=", "<", ">", "<=", ">=", "!=")


def same_relation(reference: Relation, answer: Relation) -> bool:
    """Equations and inequalities that differ by a constant factor, or have equal sides."""
    if _is_equation(reference) and _is_equation(answer):
        one, other = _difference(reference), _difference(answer)
        if one is not None and other is not None:
            if _turned(reference.signs[0])[0] != _turned(answer.signs[0])[0]:
                return False
            if one.symbols or other.symbols:
                sign = ratio_sign(one, other)
                return bool(sign) if reference.signs[0] in ("=", "!=") else sign > 0
    for sides, signs in ((answer.sides, answer.signs), _reversed(answer)):
        if signs == reference.signs and _in_order(reference.sides, sides):
            return True
    return False


def _reversed(relation: Relation) -> tuple[tuple[Value, ...], tuple[str, ...]]:
    flip = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
    signs = tuple(flip.get(sign, sign) for sign in reversed(relation.signs))
    if "in" in signs or "to" in signs:
        return (), ()
    return tuple(reversed(relation.sides)), signs


def _turned(sign: str) -> tuple[str, int]:
    """A comparison as one of `<`, `<=`, and the sign of its difference."""
    return (sign.replace(">", "<"), -1) if sign[0] == ">" else (sign, 1)


def _difference(relation: Relation) -> Expr | None:
    left, right = relation.sides
    if not isinstance(left, Scalar) or not isinstance(right, Scalar):
        return None
    difference = ex.add(left.expr, ex.negative(right.expr))
    return ex.negative(difference) if _turned(relation.signs[0])[1] < 0 else difference


def _same_residue(reference: Residue, answer: Residue) -> bool:
    if reference.modulus.key != answer.modulus.key:
        return False
    one, other = reference.value, answer.value
    if isinstance(one, Scalar) and isinstance(other, Scalar):
        difference = ex.add(one.expr, ex.negative(other.expr))
        if difference.op == "number" and reference.modulus.op == "number":
            modulus = reference.modulus.value
            return not modulus and not difference.value or not difference.value % modulus
    return same(one, other)


# -- several values


def _in_order(one: Sequence[Value], other: Sequence[Value]) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


def _any_order(one: Sequence[Value], other: Sequence[Value]) -> bool:
    if len(one) != len(other) or len(one) > _MAX_MATCHES:
        return len(one) == len(other) and _in_order(one, other)
    left = list(other)
    waiting = []
    for each in one:  # equal keys first: most lists are done then
        if each in left:
            left.remove(each)
        else:
            waiting.append(each)
    for each in waiting:
        twin = next((index for index, given in enumerate(left) if same(each, given)), None)
        if twin is None:
            return False
        del left[twin]
    return True


def _distinct(items: Sequence[Value]) -> list[Value]:
    kept: list[Value] = []
    for each in items[:_MAX_MATCHES]:
        if not any(each == other or same(each, other) for other in kept):
            kept.append(each)
    return kept + list(items[_MAX_MATCHES:])


def _same_items(reference: Value, answer: Value) -> bool:
    """Tuples, intervals, sets and lists."""
    brackets, items = _items(reference)
    given_brackets, given = _items(answer)
    kinds = {brackets, given_brackets}
    if None in kinds:
        return False
    if kinds == {"", "{}"} and (isinstance(reference, Scalar) or isinstance(answer, Scalar)):
        return False
    if kinds == {"", "{}"} or kinds == {"{}"}:
        return _any_order(_distinct(items), _distinct(given))
    if "{}" in kinds or (len(kinds) > 1 and kinds != {"", "()"}):
        return False
    if kinds == {""}:
        if _is_ordered(items):
            return _in_order(items, given)
        named = [sum(isinstance(each, Labelled) for each in side) for side in (items, given)]
        if named[0] and not named[1]:
            # `1, 2` for `x = 1, y = 2` leaves it to the order which is which.
            return _in_order(items, given)
        if named[1] and not named[0] and _in_order(items, _by_name(given)):
            return True
        return _any_order(items, given)
    return _in_order(items, _by_name(given))


def _by_name(items: Sequence[Value]) -> Sequence[Value]:
    """`y = 2, x = 1` in the order of a tuple `(x, y)`."""
    named = [each for each in items if isinstance(each, Labelled)]
    if len(named) < len(items) or "".join(each.label for each in named) not in _REVERSED:
        return items
    return sorted(named, key=lambda each: each.label)


def _items(value: Value) -> tuple[str | None, tuple[Value, ...]]:
    if isinstance(value, Group):
        return value.brackets, value.items
    if isinstance(value, Listing):
        return "", value.items
    if isinstance(value, Scalar):
        return "", (value,)
    return None, ()


def _is_ordered(items: Sequence[Value]) -> bool:
    """Truth values, and letters that are not in the order of the alphabet."""
    if _are_truth_values(items):
        return True
    letters = [each for each in map(_spelling, items) if each is not None]
    if len(letters) != len(items) or not letters:
        return False
    single = [each for each in letters if len(each) == 1 and each.isupper()]
    return len(single) == len(letters) and single != sorted(single)


def _are_truth_values(items: Sequence[Value]) -> bool:
    spellings = [(_spelling(each) or "").casefold() for each in items]
    return bool(spellings) and _TRUTH_VALUES.issuperset(spellings)


def _same_colon(reference: Colon, answer: Colon) -> bool:
    if reference.suffix and answer.suffix and reference.suffix != answer.suffix:
        return False
    if _in_order(reference.items, answer.items):
        return reference.clock == answer.clock
    one, other = (
        [each.expr for each in side.items if isinstance(each, Scalar) and each.expr.key != "0"]
        for side in (reference, answer)
    )
    if not len(reference.items) == len(one) == len(other) == len(answer.items):
        return False
    return not reference.clock and all(
        equal(ex.multiply(a, other[0]), ex.multiply(b, one[0]))
        for a, b in zip(one[1:], other[1:], strict=True)
    )


def _as_matrix(value: Value) -> Value:
    """`[[1, 2], [3, 4]]` as a matrix."""
    if isinstance(value, Group) and value.brackets == "[]":
        rows = [each for each in value.items if isinstance(each, Group) and each.brackets == "[]"]
        if rows and len(rows) == len(value.items):
            return Matrix(tuple(each.items for each in rows))
    return value


def _same_region(one: Region, other: Region) -> bool:
    return len(one.pieces) == len(other.pieces) and all(
        (a.has_low, a.has_high) == (b.has_low, b.has_high)
        and equal(a.low, b.low)
        and equal(a.high, b.high)
        for a, b in zip(one.pieces, other.pieces, strict=True)
    )


# -- keys for votes


def key(value: Value) -> str:
    """A text that is equal for equal values: names, units and the order of lists are left out."""
    if isinstance(value, Scalar):
        if value.letters:
            return value.letters
        expr = value.expr
        if value.percent:
            expr = ex.multiply(expr, ex.number(Fraction(1, 100)))
        return signature(expr)
    if isinstance(value, Words):
        return value.text if value.text.isupper() else _folded(value.text)
    if isinstance(value, Labelled):
        return key(value.value)
    if isinstance(value, Either):
        return key(value.second if value.loose else value.first)
    if isinstance(value, Group | Region):
        region = sets.as_region(value)
        if region is not None and not region.pieces:
            return "{}"
        if isinstance(value, Region) or (
            region is not None and value.brackets not in ("()", "[]", "{}")
        ):
            assert region is not None
            return "|".join(
                f"{'(['[each.has_low]}{signature(each.low)},{signature(each.high)}{')]'[each.has_high]}"
                for each in region.pieces
            )
        keys = [key(each) for each in value.items]
        if value.brackets == "{}":
            keys = sorted(set(keys))
        return f"{value.brackets[0]}{','.join(keys)}{value.brackets[1]}"
    if isinstance(value, Listing):
        named = len({each.label for each in value.items if isinstance(each, Labelled)}) > 1
        keys = [
            f"{each.label}={key(each)}" if named and isinstance(each, Labelled) else key(each)
            for each in value.items
        ]
        if not _are_truth_values(value.items):
            keys.sort()
        return f"{{{','.join(keys)}}}"
    if isinstance(value, Matrix):
        return ";".join(",".join(map(key, row)) for row in value.rows).join("[]")
    if isinstance(value, Colon):
        return ":".join(map(key, value.items))
    if isinstance(value, Operation):
        return f"{value.name}({','.join(map(key, value.items))})"
    if isinstance(value, Residue):
        inner, modulus = value.value, value.modulus
        if isinstance(inner, Scalar) and inner.expr.op == modulus.op == "number" and modulus.value:
            return f"{inner.expr.value % modulus.value} mod {modulus.key}"
        return f"{key(inner)} mod {modulus.key}"
    if isinstance(value, Based):
        return f"{value.digits}_{value.base}"
    difference = _difference(value) if value.signs == ("=",) else None
    if difference is not None and difference.symbols:
        return equation_signature(difference)
    return "".join(
        f"{key(side)}{sign}" for side, sign in zip(value.sides, (*value.signs, ""), strict=True)
    )
