"""Words among maths: a whole answer, a side, a name before `=`, a unit behind a number."""

from __future__ import annotations

import re
from collections.abc import Sequence

from r1jax.rewards.answers import expressions as ex
from r1jax.rewards.answers import sets, units
from r1jax.rewards.answers.arithmetic import letter_symbol
from r1jax.rewards.answers.cursor import Cursor
from r1jax.rewards.answers.text import Token
from r1jax.rewards.answers.values import Scalar, Value, Words
from r1jax.rewards.answers.vocabulary import ENDS, FUNCTIONS, KNOWN_WORDS, RELATIONS


def as_words(found: Sequence[Token]) -> Words | None:
    """The text of tokens some of which are words."""
    if not any(
        each.kind == "text"
        or (each.kind == "letters" and len(each.text) > 2)
        or (each.text == "." and index)
        for index, each in enumerate(found)
    ) and not all(each.kind == "number" for each in found):
        return None
    joined = "".join(" " * each.space + each.text for each in found).replace("$", "")
    return Words(" ".join(joined.split()))


def name_before_sign(found: Sequence[Token]) -> tuple[str, bool] | None:
    """(label, droppable in a reference) if the tokens are a name rather than an expression."""
    span = [each for each in found if each.text not in ("{", "}")]
    spelling = "".join(each.text for each in span)
    if re.fullmatch(r"[A-Za-z]'*\([0-9.,-]+\)", spelling):
        return spelling, True  # `f(2)`
    if not span or re.search(r"(?<![_0-9])[0-9](?!\w*_)", re.sub(r"_[0-9]+", "", spelling)):
        return None
    if (
        re.fullmatch(r"[A-Za-z]'*\([A-Za-z](,[A-Za-z])*\)", spelling)
        and not spelling[2:-1].isupper()
    ):
        return re.split(r"\(", spelling)[0] + "()", True
    letters = [each for each in span if each.kind in ("letters", "rest")]
    if any(each.kind == "text" for each in span):
        return spelling.casefold(), True
    if any(each.text == "^" for each in span) or re.fullmatch(r"\|[a-z]\|", spelling):
        return None  # an equation that could be solved
    if any(each.text in ("+", "-", "cdot", "*", "times") for each in span):
        single = all(len(each.text) == 1 for each in letters)
        distinct = {each.text for each in letters} - {"e", "i"}
        return (spelling, False) if single and len(distinct) > 1 else None
    if any(each.text in FUNCTIONS or each.text in ("sqrt", "infty") for each in span):
        return (spelling, True) if span[0].text == "det" else None
    body = re.sub(r"_(\{?\w+\}?)", "", spelling)
    if re.fullmatch(r"(?:[A-Za-z]|[a-z]{3,})'*", body) or spelling.startswith("("):
        return spelling, True
    if body.isalpha() and body.islower() and len(letters) == len(span):
        return spelling, False  # `xy = 6` is an equation
    return spelling, True  # `AB`, `P(A)`, `|AB|`, `\angle ABC`


def read_words(cursor: Cursor) -> Value | None:
    """A side of letters and words only: words, or two or more bare letters."""
    end = cursor.position
    while end < len(cursor.tokens):
        token = cursor.tokens[end]
        plain = token.text in "'-.!?" or (token.text == "(" and end == cursor.position)
        if token.kind not in ("letters", "text", "rest") and not (plain and end > cursor.position):
            break
        end += 1
    span = cursor.tokens[cursor.position : end]
    if not span or not (end == len(cursor.tokens) or cursor.ends_side(end)):
        return None
    if span[-1].text == "!" and len(span) == 2:
        return None
    texts = [each.text for each in span]
    joined = "".join(
        " " * (each.space and index > 0) + each.text for index, each in enumerate(span)
    )
    bare = "".join(texts)
    known = joined.casefold() in KNOWN_WORDS
    wordy = any(
        each.kind == "text" or (len(each.text) > 3 and units.is_word(each.text)) for each in span
    )
    if known or wordy:
        cursor.position = end
        if re.fullmatch(r"(?:the )?(?:set of )?(?:all )?real(?: numbers?|s)", joined.casefold()):
            return sets.REALS
        return Words(joined)
    if len(bare) > 1 and bare.isalpha():
        cursor.position = end
        product = ex.multiply(*(letter_symbol(each) for each in bare))
        return Scalar(product, letters=bare)
    return None


def tail_text(cursor: Cursor) -> str:
    """The words and signs behind a number up to the end of the side."""
    token = cursor.peek()
    if token is None or not (
        token.kind == "text"
        or (token.kind == "letters" and len(token.text) > 1 and units.is_word(token.text))
        or token.text in ("%", "€", "£", "¥", "₹", "$", "°", "percent")
        or cursor.next_is_degree()
        or (token.text == "(" and (inner := cursor.peek(1)) is not None and inner.kind == "text")
    ):
        return ""
    if token.kind == "letters" and not token.space and units.unit_name(token.text) is None:
        return ""
    pieces: list[str] = []
    depth = 0
    while (token := cursor.peek()) is not None and (depth or not _ends_tail(cursor, token)):
        depth += (token.text == "{") - (token.text == "}")
        if cursor.next_is_degree():
            cursor.skip_degree()
            pieces.append(" deg")
            continue
        pieces.append(" " * (token.space or token.kind == "text") + token.text)
        cursor.position += 1
    return "".join(pieces).strip()


def _ends_tail(cursor: Cursor, token: Token) -> bool:
    if token.kind in ("and", "or", "end"):
        return True
    if token.text in (")",) and not cursor.brackets:
        return False
    return token.text in ENDS or token.text in RELATIONS and token.text != "in"
