"""How a number is written: digits in groups, recurring decimals, mixed numbers, another base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from r1jax.rewards.answers import expressions as ex
from r1jax.rewards.answers.cursor import Cursor
from r1jax.rewards.answers.expressions import Expr
from r1jax.rewards.answers.text import MAX_DIGITS, Token, TooLarge, Unreadable
from r1jax.rewards.answers.values import Based, Scalar, Value


def read_based(cursor: Cursor) -> Value | None:
    r"""`213_5`, `-37_8`, `(213)_5`, `\text{A5}_{11}`."""
    index = cursor.position
    sign = ""
    if cursor.next_is("-"):
        sign = "-"
        index += 1
    digits = ""
    bracket = index < len(cursor.tokens) and cursor.tokens[index].text in ("(", "{")
    index += bracket
    while index < len(cursor.tokens) and cursor.tokens[index].kind in ("number", "letters", "text"):
        digits += cursor.tokens[index].text
        index += 1
    index += bracket
    rest = [each.text for each in cursor.tokens[index : index + 4]]
    if not re.fullmatch(r"[0-9A-Za-z]+(\.[0-9]+)?", digits) or rest[:1] != ["_"]:
        return None
    if not any(each.isdigit() for each in digits) or digits[0].islower():
        return None
    base, length = (
        (rest[2], 4) if rest[1:2] == ["{"] and rest[3:] == ["}"] else (rest[1:2] or [""], 2)
    )
    base = base if isinstance(base, str) else base[0]
    end = index + length
    if not base.isdigit() or len(base) > 2:
        return None
    if end < len(cursor.tokens) and not cursor.ends_side(end):
        return None
    cursor.position = end
    digits = digits.lstrip("0").upper() or "0"
    if int(base) == 10 and digits.isdigit():
        return Scalar(ex.number(int(sign + digits)))
    return Based(sign + digits, int(base))


def precision(found: Sequence[Token]) -> tuple[int | None, int]:
    """(decimal places, significant digits) of tokens that are one decimal; else (None, 0)."""
    span = [each for each in found if each.text not in ("-", "+", "approx")]
    if len(span) != 1 or "." not in span[0].text or not span[0].text[-1].isdigit():
        return None, 0
    spelling = span[0].text
    if "e" in spelling.casefold():
        return None, 0
    return len(spelling.partition(".")[2]), len(spelling.replace(".", "").lstrip("0"))


def whole_number(token: Token) -> int | None:
    """The value of a token of digits alone."""
    return int(token.text) if token.kind == "number" and token.text.isdigit() else None


def mixed_follows(cursor: Cursor) -> bool:
    """`1 1/2`: a whole number, then a fraction of whole numbers."""
    spelled = [cursor.peek(ahead) for ahead in (0, 1, 2)]
    return (
        cursor.tokens[cursor.position].space
        and all(each is not None for each in spelled)
        and spelled[1].text == "/"  # type: ignore[union-attr]
        and spelled[0].text.isdigit()  # type: ignore[union-attr]
        and spelled[2].text.isdigit()  # type: ignore[union-attr]
        and int(spelled[0].text) < int(spelled[2].text)  # type: ignore[union-attr]
    )


def read_number(cursor: Cursor, token: Token) -> Expr:
    """The number that starts with a token, which is behind the cursor.

    Raises:
      Unreadable: a decimal without an end that does not recur.
      TooLarge: it has too many digits.
    """
    spelling = token.text
    index = cursor.position - 1
    if spelling.isdigit() and len(spelling) <= 3 and spelling[0] != "0":
        while (
            cursor.commas_may_part_thousands(index)
            and cursor.next_is(",")
            and (after := cursor.peek(1)) is not None
            and after.kind == "number"
            and not after.space
            and re.fullmatch(r"[0-9]{3}(?:\.[0-9]*)?", after.text)
        ):
            spelling += after.text
            cursor.position += 2
    if len(spelling) > MAX_DIGITS:
        raise TooLarge(f"a number has over {MAX_DIGITS} digits")
    if "." in spelling:
        recurring = _recurring(cursor, spelling)
        if recurring is not None:
            return ex.number(recurring)
    return ex.number(Fraction(spelling.rstrip(".") if spelling[-1] == "." else spelling))


def _recurring(cursor: Cursor, spelling: str) -> Fraction | None:
    r"""`0.\overline{3}`, `0.\dot{3}`, `0.(3)`, `0.333...`."""
    block = ""
    if cursor.next_is("overline", "dot", "bar"):
        cursor.position += 1
        texts = []
        braces = cursor.take("{")
        while (token := cursor.peek()) is not None and token.kind == "number":
            texts.append(token.text)
            cursor.position += 1
        if braces:
            cursor.expect("}")
        block = "".join(texts)
    elif cursor.next_is("(") and not cursor.tokens[cursor.position].space:
        inner, close = cursor.peek(1), cursor.peek(2)
        if inner is None or inner.kind != "number" or close is None or close.text != ")":
            return None
        block = inner.text
        cursor.position += 3
    elif cursor.next_is("ldots"):
        match = re.search(r"\.[0-9]*?([0-9]{1,6}?)\1{2,}$|\.([0-9]{2,6})\2$", spelling)
        cursor.position += 1
        if match is None:
            raise Unreadable("a decimal without an end")
        block = match[1] or match[2]
    else:
        return None
    if not block.isdigit():
        raise Unreadable("a recurring decimal without digits")
    whole, _, decimals = spelling.partition(".")
    period = Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(decimals))
    return Fraction(f"{whole or '0'}.{decimals or '0'}") + period
