r"""Reads an answer (LaTeX, plain text or Unicode) into one value: a recursive descent, no eval.

From the outside in: a listing of parts; a part is a chain of sides with relations between them; a
side is a set operation on sums; then products, powers and what a number or bracket starts. Each
level is a function of a `Cursor`, which it moves; all are in this file, because a bracket or a
matrix has parts inside it. What needs no other level is in `numerals.py` and `words.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from r1jax.rewards.answers import expressions as ex
from r1jax.rewards.answers import numerals, sets, units, words
from r1jax.rewards.answers.arithmetic import (
    Node,
    added,
    application,
    apply,
    as_expr,
    determinant,
    letter_symbol,
    matrix_power,
    multiplied,
    negated,
    rounded,
)
from r1jax.rewards.answers.cursor import Cursor
from r1jax.rewards.answers.expressions import Expr
from r1jax.rewards.answers.forms import both_signs, chain, is_set, listing, set_of, set_operation
from r1jax.rewards.answers.text import LETTER_UNITS, Token, TooLarge, Unreadable, tidy, tokens
from r1jax.rewards.answers.values import (
    Colon,
    Either,
    Group,
    Labelled,
    Listing,
    Matrix,
    Operation,
    Relation,
    Residue,
    Scalar,
    Value,
)
from r1jax.rewards.answers.vocabulary import (
    ACCENTS,
    CLOSERS,
    CLOSINGS,
    CONSTANTS,
    CURRENCIES,
    FUNCTIONS,
    JOINTS,
    MATRICES,
    NO_FACTORS,
    OPENINGS,
    PLUS_MINUS,
    RELATIONS,
    ROWS,
    UNIT_SIGNS,
    WRAPPERS,
)


@lru_cache(maxsize=512)
def read(text: str, trusted: bool = False) -> Value:
    """The value that a text is.

    Args:
      trusted: the text is a reference: any words behind a number are taken for its unit.

    Raises:
      Unreadable: it is none, and no words either.
      TooLarge: it is beyond the bounds.
    """
    text = tidy(text)
    if not text:
        raise Unreadable("it is empty")
    if re.fullmatch(r"[+-]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?", text):
        text = text.replace(" ", "")
    found: list[Token] = []
    try:
        found = tokens(text)
        return _whole(Cursor(found, trusted))
    except TooLarge:
        raise
    except ZeroDivisionError:
        raise TooLarge("a division by zero") from None
    except (ValueError, ArithmeticError, LookupError, RecursionError) as error:
        as_text = words.as_words(found) if found else None
        if as_text is None:
            raise Unreadable(str(error) or "it has no value") from None
        return as_text


def _whole(cursor: Cursor) -> Value:
    if cursor.next_is("="):
        raise Unreadable("it starts with =")
    items, joints = _items(cursor, ())
    if cursor.position < len(cursor.tokens):
        raise Unreadable(f"{cursor.tokens[cursor.position].text!r} is not understood")
    value = listing(*both_signs(items, joints))
    return _loose_reading(cursor.tokens, value)


def _loose_reading(found: Sequence[Token], value: Value) -> Value:
    """The second reading of `100,200` as a list, and of `5 m` as a quantity."""
    spelled = [each.text for each in found]
    if not isinstance(value, Scalar):
        return value
    numbers = spelled[0::2]
    if len(spelled) > 2 and set(spelled[1::2]) == {","} and all(each.isdigit() for each in numbers):
        items = tuple(Scalar(ex.number(int(each))) for each in numbers)
        return Either(value, Listing(items), loose=False)
    at = next((index for index, each in enumerate(found) if each.kind in ("letters", "rest")), 0)
    tail = found[at:]
    if (
        at
        and tail[0].space
        and all(each.kind == "number" or each.text in "+-./" for each in found[:at])
        and all(each.text in LETTER_UNITS or each.text in UNIT_SIGNS for each in tail)
    ):
        read = units.read_tail("".join(" " * each.space + each.text for each in tail))
        try:
            number = _whole(Cursor(found[:at], False))
        except (Unreadable, ZeroDivisionError):
            return value
        if read is not None and isinstance(number, Scalar) and number.expr.op == "number":
            return Either(value, replace(number, unit=read.unit), loose=True)
    return value


# -- listings


def _items(cursor: Cursor, closers: Sequence[str]) -> tuple[list[Value], list[str]]:
    """Parts up to a closing sign, and what stands between them."""
    items: list[Value] = []
    joints: list[str] = []
    while cursor.peek() is not None and not cursor.next_is(*closers):
        if cursor.next_is(*JOINTS):
            joint = cursor.tokens[cursor.position].text
            cursor.position += 1
            if len(joints) == len(items):  # `2, and 3`
                if items and joint in (",", ";") and joints[-1] in (",", ";"):
                    raise Unreadable("nothing between two commas")
                if not items and joint not in ("and", "or"):
                    raise Unreadable(f"{joint} without an answer before it")
                if joints:
                    joints[-1] = joint if joint in ("and", "or") else joints[-1]
            else:
                joints.append(joint)
            continue
        if items and len(joints) < len(items):
            raise Unreadable(f"{cursor.tokens[cursor.position].text!r} is not understood")
        items.append(_part(cursor))
    if not items and not closers:
        raise Unreadable("it is empty")
    return items, joints


# -- parts


def _part(cursor: Cursor) -> Value:
    """A chain of sides with relations between them."""
    start = cursor.position
    cursor.take("approx")
    if cursor.next_is("neg"):
        raise Unreadable("a negation")
    sides = [_side(cursor)]
    spans = [(start, cursor.position)]
    signs: list[str] = []
    while (token := cursor.peek()) is not None and token.kind in ("sign", "command"):
        sign = RELATIONS.get(token.text)
        if sign is None:
            break
        cursor.position += 1
        if sign in ("<", ">") and cursor.take("="):
            sign += "="
        at = cursor.position
        signs.append(sign)
        sides.append(_side(cursor))
        spans.append((at, cursor.position))
    modulus = _modulus(cursor)
    if modulus is not None:
        if not signs:
            return Residue(sides[0], modulus)
        sides = [sides[0], Residue(sides[-1], modulus)]
        signs, spans = ["="], [spans[0], spans[-1]]
    if not signs:
        return sides[0]
    names = [words.name_before_sign(cursor.tokens[start:end]) for start, end in spans]
    return chain(sides, signs, names)


def _modulus(cursor: Cursor) -> Expr | None:
    if cursor.take("pmod"):
        return as_expr(_argument(cursor))
    bracket = cursor.next_is("(") and cursor.next_is("mod", ahead=1)
    if bracket:
        cursor.position += 1
    if cursor.take("mod"):
        modulus = as_expr(_sum(cursor))
        if bracket:
            cursor.expect(")")
        return modulus
    return None


# -- sides


def _side(cursor: Cursor) -> Value:
    value = words.read_words(cursor)
    if value is not None:
        return value
    value = numerals.read_based(cursor)
    if value is not None:
        return value
    value = _set_term(cursor)
    while (token := cursor.peek()) is not None and token.kind in ("command", "letters"):
        name = "cup" if token.text == "U" and is_set(value) and token.space else token.text
        if name not in ("cup", "cap", "setminus"):
            break
        cursor.position += 1
        parts = [value, _set_term(cursor)]
        while cursor.take(name):  # all at once: each union sorts
            parts.append(_set_term(cursor))
        value = set_operation(name, parts)
    if not cursor.next_is(":", "@"):
        return value
    items = [value]
    clock = True
    while cursor.take(":", "@"):
        field = cursor.peek()
        clock &= field is not None and re.fullmatch("[0-5][0-9]", field.text) is not None
        items.append(_set_term(cursor))
    suffix = words.tail_text(cursor)
    last = items[-1]
    if not suffix and isinstance(last, Scalar) and last.unit in ((("pm", 1),), (("am", 1),)):
        suffix = last.unit[0][0]
        items[-1] = replace(last, unit=())
    return Colon(tuple(items), re.sub("[^a-z]", "", suffix.casefold()), clock)


def _set_term(cursor: Cursor) -> Value:
    """A sum with its currency, percent sign or unit."""
    start = cursor.position
    money = ""
    for at in (0, 1):
        token = cursor.peek(at)
        if token is not None and token.text in CURRENCIES and (at == 0 or cursor.next_is("-")):
            money = token.text
            cursor.remove(at)
            break
    node = _sum(cursor)
    value = node if not isinstance(node, Expr) else Scalar(node)
    if not isinstance(value, Scalar):
        return value
    places, digits = numerals.precision(cursor.tokens[start : cursor.position])
    value = replace(value, places=places, digits=digits)
    if money:
        value = replace(value, unit=((money, 1),))
    tail_at = cursor.position
    text = words.tail_text(cursor)
    if text:
        tail = units.read_tail(text, trusted=cursor.trusted, one=value.expr.key == "1")
        if tail is None:
            cursor.position = tail_at
            raise Unreadable(f"{text!r} is no unit")
        if money and tail.unit not in ((), value.unit):
            raise Unreadable("two units")
        unit = tail.unit or value.unit
        expr = ex.multiply(value.expr, ex.number(tail.factor))
        value = Scalar(expr, value.places, value.digits, tail.percent, unit)
    return value


# -- arithmetic


def _sum(cursor: Cursor) -> Node:
    with cursor.nested():
        terms: list[Node] = []
        while not terms or cursor.next_is("+", "-", "pm", "mp"):
            sign, both = "", ""
            while cursor.next_is("+", "-", "pm", "mp"):
                new = cursor.tokens[cursor.position].text
                cursor.position += 1
                if new == "+" and (sign or both) or new[-1] in "mp" and both:
                    raise Unreadable("two signs")
                if new in ("pm", "mp"):
                    both = new
                elif new == "-":
                    sign = "" if sign else "-"
            term = _product(cursor)
            if sign and not both and terms and is_set(last := terms[-1]):
                other = Scalar(term) if isinstance(term, Expr) else term
                terms[-1] = set_operation("setminus", [last, other])
                continue
            if sign:
                term = negated(term)
            if both:
                # A factor that is 1 and -1 in turn at the end of the part.
                term = ex.multiply(PLUS_MINUS[both], as_expr(term))
            terms.append(term)
        total = terms[0] if len(terms) == 1 else added(terms)
        if cursor.take("over"):
            return ex.divide(as_expr(total), as_expr(_sum(cursor)))
        if cursor.take("choose"):
            return ex.binomial(as_expr(total), as_expr(_sum(cursor)))
        return total


def _product(cursor: Cursor) -> Node:
    node = _factor(cursor)
    while (token := cursor.peek()) is not None:
        if token.text in ("*", "cdot", "times") and token.kind in ("sign", "command"):
            cursor.position += 1
            node = multiplied(node, _signed_factor(cursor))
        elif token.text == "/" and token.kind == "sign":
            cursor.position += 1
            divisor = as_expr(_signed_factor(cursor))
            node = multiplied(node, ex.power(divisor, ex.MINUS_ONE))
        elif token.text == "%" and not _percent_ends(cursor):
            cursor.position += 1
            node = multiplied(node, ex.number(Fraction(1, 100)))
        elif _starts_factor(cursor, token):
            node = _implicit(cursor, node)
        else:
            return node
    return node


def _percent_ends(cursor: Cursor) -> bool:
    return cursor.position + 1 >= len(cursor.tokens) or cursor.ends_side(cursor.position + 1)


def _implicit(cursor: Cursor, node: Node) -> Node:
    before = cursor.tokens[cursor.position - 1]
    token = cursor.tokens[cursor.position]
    if token.kind == "number" and before.kind == "number":
        if not numerals.mixed_follows(cursor):
            raise Unreadable("two numbers without a sign between them")
        whole = numerals.whole_number(before)
        fraction = as_expr(_factor(cursor))
        cursor.expect("/")
        fraction = ex.divide(fraction, as_expr(_factor(cursor)))
        return ex.add(as_expr(node), fraction) if whole is not None else node
    mixed = (
        before.kind == "number"
        and token.text == "frac"
        and numerals.whole_number(before) is not None
        and isinstance(node, Expr)
        and node.op == "number"
        and not cursor.next_is("^", ahead=-2)
    )
    at = cursor.position
    following = _factor(cursor)
    if mixed and isinstance(following, Expr) and following.op == "number" and following.value > 0:
        return ex.add(as_expr(node), following)
    if isinstance(node, Expr) and token.text == "(" and before.kind in ("letters", "rest"):
        if before.text.isupper() and isinstance(following, Group) and node.op == "symbol":
            if cursor.peek() is None or cursor.ends_side(cursor.position):  # a point `P(1, 2)`
                return Labelled(before.text, following, True, Relation((), ("listing",)))
        name = application(before.text, following)
        if name:
            factors = node.args if node.op == "*" else (node,)
            others = [each for each in factors if each.key != before.text]
            return ex.multiply(*others, ex.symbol(name))
        if not isinstance(following, Expr | Scalar | Matrix):  # `P(X = 5)`
            inner = "".join(each.text for each in cursor.tokens[at : cursor.position])
            return ex.symbol(f"{node.key}{inner}")
    return multiplied(node, following)


def _starts_factor(cursor: Cursor, token: Token) -> bool:
    if token.kind == "number" or token.kind in ("begin", "rest"):
        return True
    if token.kind == "letters":
        if token.text == "U" and token.space:
            return False
        before = cursor.tokens[cursor.position - 1]
        wordy = len(token.text) > 1 and units.is_word(token.text)
        return not (wordy and (token.space or before.kind == "number" or before.text == "}"))
    if token.kind == "command":
        return token.text not in NO_FACTORS and token.text not in RELATIONS
    if token.kind == "sign":
        if token.text == "|":
            return not cursor.bars
        if token.text == "(":
            inner = cursor.peek(1)
            return not (inner is not None and (inner.text == "mod" or inner.kind == "text"))
        return token.text in ("{", "[", "\\{")
    return False


def _signed_factor(cursor: Cursor) -> Node:
    sign = 1
    while cursor.next_is("+", "-"):
        sign = -sign if cursor.tokens[cursor.position].text == "-" else sign
        cursor.position += 1
    factor = _factor(cursor)
    return factor if sign > 0 else negated(factor)


def _factor(cursor: Cursor) -> Node:
    """What a number, name or bracket starts, with powers, factorials and subscripts."""
    with cursor.nested():
        node = _primary(cursor)
        while True:
            if cursor.next_is("!"):
                count = 0
                while cursor.take("!"):
                    count += 1
                if count > 2:
                    raise TooLarge("a factorial of a factorial")
                node = ex.factorial(as_expr(node), count)
            elif cursor.next_is_degree():
                at = cursor.position
                cursor.skip_degree()
                if cursor.in_function:
                    node = ex.multiply(as_expr(node), ex.PI, ex.number(Fraction(1, 180)))
                elif cursor.peek() is None or cursor.ends_side(cursor.position):
                    cursor.position = at
                    return node
            elif cursor.take("^"):
                node = _raised(cursor, node)
            elif cursor.next_is("'") and isinstance(node, Expr):
                cursor.position += 1
                node = ex.symbol(node.key + "'")
            elif cursor.next_is("_"):
                node = _subscripted(cursor, node)
            else:
                return node


def _raised(cursor: Cursor, node: Node) -> Node:
    braces = cursor.next_is("{") and cursor.next_is("'", ahead=1)
    if braces or cursor.next_is("'"):
        cursor.position += braces
        primes = 0
        while cursor.take("'"):
            primes += 1
        if braces:
            cursor.expect("}")
        return ex.symbol(as_expr(node).key + "'" * primes)
    if isinstance(node, Matrix):
        return matrix_power(node, _argument(cursor, sign=True))
    exponent = _argument(cursor, sign=True)
    if (
        isinstance(exponent, Expr)
        and exponent.key in ("T", "c", "C")
        and not isinstance(node, Expr)
    ):
        return Operation("^", (node, Scalar(exponent)))
    return ex.power(as_expr(node), as_expr(exponent))


def _subscripted(cursor: Cursor, node: Node) -> Node:
    cursor.expect("_")
    start = cursor.position
    if cursor.take("{"):
        depth = 1
        while depth:
            token = cursor.peek()
            if token is None:
                raise Unreadable("a brace is not closed")
            depth += (token.text == "{") - (token.text == "}")
            cursor.position += 1
    else:
        token = cursor.peek()
        if token is None:
            raise Unreadable("a subscript is missing")
        if token.kind == "letters" and len(token.text) > 1:
            cursor.split_letters(token)
        cursor.position += 1
    inner = "".join(each.text for each in cursor.tokens[start : cursor.position])
    expr = as_expr(node)
    if expr.op == "number" or expr.op not in ("symbol", "i", "e"):
        raise Unreadable("a subscript of a number")
    return ex.symbol(f"{expr.key}_{inner.strip('{}')}")


def _argument(cursor: Cursor, *, sign: bool = False, digit: bool = False) -> Node:
    r"""The argument of a command: a group, or one token; `\frac12` has one digit each."""
    with cursor.nested():
        token = cursor.peek()
        if token is None:
            raise Unreadable("an argument is missing")
        if sign and token.text in ("-", "+"):
            cursor.position += 1
            signed = _argument(cursor)
            return negated(signed) if token.text == "-" else signed
        if token.text == "{" and token.kind == "sign":
            return _primary(cursor)
        if token.kind in ("letters", "rest"):
            if len(token.text) > 1:
                cursor.split_letters(token)
            cursor.position += 1
            return letter_symbol(token.text[0])
        if token.kind == "number" and digit and len(token.text) > 1:
            if token.text[1:] == ".":
                cursor.position += 1
            else:
                cursor.tokens[cursor.position] = Token("number", token.text[1:])
            if token.text[0] == ".":
                raise Unreadable("a fraction with a bare point")
            return ex.number(int(token.text[0]))
        return _primary(cursor)


# -- numbers, names, brackets, commands


def _primary(cursor: Cursor) -> Node:
    token = cursor.peek()
    if token is None:
        raise Unreadable("it ends too early")
    cursor.position += 1
    if token.kind == "number":
        return numerals.read_number(cursor, token)
    if token.kind in ("letters", "rest"):
        return _letters(cursor, token)
    if token.kind == "begin":
        return _environment(cursor, token.text)
    if token.kind == "command":
        return _command(cursor, token.text)
    if token.kind == "sign":
        if token.text in CLOSERS:
            return _group(cursor, token.text)
        if token.text == "|":
            return _absolute(cursor)
    raise Unreadable(f"{token.text!r} is not understood")


def _letters(cursor: Cursor, token: Token) -> Expr:
    if len(token.text) > 4 and len(re.findall("[aeiou]", token.text)) > 1:
        raise Unreadable(f"the word {token.text}")
    if len(token.text) > 1:
        cursor.position -= 1
        cursor.split_letters(token)
        cursor.position += 1
    letter = token.text[0]
    follower = cursor.peek()
    if (
        len(token.text) == 1
        and follower is not None
        and follower.kind == "number"
        and not follower.space
        and follower.text.isdigit()
        and letter not in "ei"
    ):
        cursor.position += 1
        return ex.symbol(f"{letter}_{follower.text}")
    return letter_symbol(letter)


def _group(cursor: Cursor, opening: str) -> Node:
    with cursor.nested():
        bars, cursor.bars = cursor.bars, 0
        inside = cursor.in_function
        cursor.in_function = inside if opening in "({[" else 0
        cursor.brackets += opening != "{"
        if opening == "\\{":
            _mark_condition(cursor)
        items, joints = _items(cursor, tuple(CLOSERS[opening]))
        token = cursor.peek()
        cursor.expect(*CLOSERS[opening])
        cursor.bars, cursor.in_function = bars, inside
        cursor.brackets -= opening != "{"
        closing = token.text if token is not None else ""
        if len(items) > 1 or opening == "\\{":
            items, joints = both_signs(items, joints)
        if opening == "\\{":
            return set_of(items, joints)
        if opening == "langle":
            return Group("()", tuple(items))
        if opening == "{" and len(items) != 1:
            return Group("{}", tuple(items))
        if len(items) == 1:
            if (opening, closing) in (("(", "]"), ("[", ")")):
                raise Unreadable("brackets of two kinds round one value")
            item = items[0]
            if isinstance(item, Scalar) and not (item.unit or item.percent):
                return item.expr
            if isinstance(item, Scalar) and item.percent:
                return ex.multiply(item.expr, ex.number(Fraction(1, 100)))
            return item
        if not items:
            raise Unreadable("empty brackets")
        return Group(opening + closing, tuple(items))


def _mark_condition(cursor: Cursor) -> None:
    r"""The sign between element and condition of `\{x | x > 0\}` gets a name of its own."""
    depth, bars, index = 0, [], cursor.position
    while index < len(cursor.tokens) and depth >= 0:
        text = cursor.tokens[index].text
        depth += (text in OPENINGS) - (text in CLOSINGS)
        if depth == 0 and text in ("|", ":"):
            bars.append(index)
        index += 1
    if len(bars) % 2:
        cursor.tokens[bars[0]] = Token("sign", "suchthat")


def _absolute(cursor: Cursor) -> Expr:
    with cursor.nested():
        cursor.bars += 1
        node = _sum(cursor)
        cursor.expect("|")
        cursor.bars -= 1
        if isinstance(node, Matrix):
            return determinant(node)
        return ex.function("abs", as_expr(node))


def _command(cursor: Cursor, name: str) -> Node:
    with cursor.nested():
        if name == "frac":
            top = _argument(cursor, sign=False, digit=True)
            bottom = _argument(cursor, digit=True)
            return multiplied(top, ex.power(as_expr(bottom), ex.MINUS_ONE))
        if name in ("sqrt", "cbrt"):
            degree = ex.number(3 if name == "cbrt" else 2)
            if cursor.take("["):
                degree = as_expr(_sum(cursor))
                cursor.expect("]")
            radicand = as_expr(_argument(cursor) if not cursor.next_is("(") else _primary(cursor))
            return ex.power(radicand, ex.power(degree, ex.MINUS_ONE))
        if name == "binom":
            return ex.binomial(
                as_expr(_argument(cursor, digit=True)), as_expr(_argument(cursor, digit=True))
            )
        if name in CONSTANTS:
            return CONSTANTS[name]
        if name in FUNCTIONS:
            return _function(cursor, name)
        if name in ("lfloor", "lceil"):
            inner = as_expr(_sum(cursor))
            cursor.expect("rfloor" if name == "lfloor" else "rceil")
            return rounded("floor" if name == "lfloor" else "ceil", inner)
        if name == "langle":
            return _group(cursor, "langle")
        if name == "mathbb":
            letter = as_expr(_argument(cursor)).key
            return sets.REALS if letter == "R" else ex.symbol(f"set {letter}")
        if name == "emptyset":
            return sets.EMPTY
        if name in WRAPPERS:
            return _argument(cursor)
        if name in ACCENTS:
            inner = as_expr(_argument(cursor))
            if name == "underline" and inner.op == "number":
                return inner
            return ex.symbol(f"{name} {inner.key}")
        if name in ("angle", "triangle"):
            letters = []
            while (token := cursor.peek()) is not None and token.kind in ("letters", "rest"):
                letters.append(token.text)
                cursor.position += 1
            return ex.symbol(f"{name} {''.join(letters)}")
        if name in NO_FACTORS or name in RELATIONS:
            raise Unreadable(f"\\{name} is out of place")
        return ex.symbol(f"\\{name}")


def _function(cursor: Cursor, name: str) -> Expr:
    with cursor.nested():
        exponent: Expr | None = None
        base: Expr | None = None
        for _ in range(2):
            if cursor.take("^"):
                exponent = as_expr(_argument(cursor, sign=True))
            elif cursor.take("_"):
                base = as_expr(_argument(cursor))
        cursor.in_function += name not in ("ln", "log", "exp")
        args = _arguments(cursor)
        cursor.in_function -= name not in ("ln", "log", "exp")
        inverse = ("ar" if name.endswith("h") else "arc") + name
        if exponent is not None and exponent.key == "-1" and inverse in FUNCTIONS:
            return ex.function(inverse, *args)
        value = apply(name, args, base)
        return value if exponent is None else ex.power(value, exponent)


def _arguments(cursor: Cursor) -> list[Expr]:
    r"""`(x)`, `{x}`, or the product that follows: `\sin 5x \cos x` is `\sin(5x) \cos(x)`."""
    if cursor.next_is("(", "{", "["):
        node = _primary(cursor)
        if isinstance(node, Group):
            return [as_expr(each) for each in node.items]
        if not cursor.next_is_degree():
            return [as_expr(node)]
        cursor.skip_degree()
        return [ex.multiply(as_expr(node), ex.PI, ex.number(Fraction(1, 180)))]
    negative = cursor.take("-")
    node = _factor(cursor)
    while (token := cursor.peek()) is not None and (
        (_starts_factor(cursor, token) and token.text not in FUNCTIONS and token.text != "(")
        or token.text == "/"
    ):
        if cursor.take("/"):
            node = ex.divide(as_expr(node), as_expr(_factor(cursor)))
        else:
            node = _implicit(cursor, node)
    return [ex.negative(as_expr(node)) if negative else as_expr(node)]


def _environment(cursor: Cursor, name: str) -> Node:
    with cursor.nested():
        if name.rstrip("*") not in MATRICES | ROWS:
            raise Unreadable(f"an environment {name}")
        if name in ("array", "alignedat"):
            _skip_columns(cursor)
        rows: list[list[Value]] = [[]]
        bars, cursor.bars = cursor.bars, 0
        while not _next_is_end(cursor, name):
            if cursor.take(r"\\"):
                rows.append([])
            elif cursor.take("&"):
                if not rows[-1]:
                    rows[-1].append(Scalar(ex.symbol("")))
            elif cursor.take(",", ";", "or", "and", "listsep") and name.rstrip("*") in ROWS:
                continue
            else:
                rows[-1].append(_part(cursor))
        cursor.position += 1
        cursor.bars = bars
        kept = [tuple(row) for row in rows if row]
        if not kept:
            raise Unreadable("an empty environment")
        if name.rstrip("*") in ROWS:
            cells = [row[0] if len(row) == 1 else Operation("case", row) for row in kept]
            return listing(cells, ["and"] * (len(cells) - 1))
        if len({len(row) for row in kept}) > 1:
            raise Unreadable("a matrix with rows of several lengths")
        matrix = Matrix(tuple(kept))
        return determinant(matrix) if name == "vmatrix" else matrix


def _next_is_end(cursor: Cursor, name: str) -> bool:
    token = cursor.peek()
    if token is None:
        raise Unreadable(f"an environment {name} without an end")
    return token.kind == "end" and token.text == name


def _skip_columns(cursor: Cursor) -> None:
    if cursor.take("["):
        while cursor.peek() is not None and not cursor.take("]"):
            cursor.position += 1
    if cursor.take("{"):
        while cursor.peek() is not None and not cursor.take("}"):
            cursor.position += 1
