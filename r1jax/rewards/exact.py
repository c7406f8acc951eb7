r"""Exact reading of plain answers: numbers, choices, and how an answer falls into parts.

Nothing here evaluates model text: every form is matched by a bounded pattern and turned into a
`fractions.Fraction`. Whatever does not match is not exact, and left to `r1jax.rewards.symbolic`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from r1jax.rewards.extraction import closing_brace

# A longer "number" is noise, and int() of very long digit strings is quadratic.
MAX_NUMBER_CHARACTERS = 200
# Nor is a longer text a list of answers; it is compared as a whole.
MAX_LIST_CHARACTERS = 4000

_REPLACED = {
    "\u2212": "-",
    "\u2013": "-",
    "\u00d7": r"\times ",
    "\u00b7": r"\cdot ",
    "\u00f7": "/",
    "\uff0c": ",",
    "\uff05": "%",
    "\u03c0": r"\pi ",
    "\u221e": r"\infty ",
    "\u00b0": r"^\circ ",
    "\u00a0": " ",
    "\u202f": " ",
}
_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:final\s+)?answers?\s*(?:is|are|:|=)\s*:?",
    re.IGNORECASE,
)
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle)(?![A-Za-z])")
_SPACES = re.compile(r"\\[,;:! ]|\\q?quad(?![A-Za-z])|~")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_WORDS_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}"
)


def tidy(text: str) -> str:
    """LaTeX without what never carries meaning: delimiters, spacing, sizes, a lead-in, a stop."""
    for old, new in _REPLACED.items():
        text = text.replace(old, new)
    text = text.replace(r"\$", "").replace("$", "").replace("{,}", ",").replace("**", "")
    text = re.sub(r"(?<!\\)\\[()\[\]]", "", text)
    text = _SIZES.sub("", text)
    # Spacing before a digit group (1\,000) vanishes with it; elsewhere it parts words.
    text = re.sub(r"(?<=[0-9])\\[,!](?=[0-9]{3}(?![0-9]))", "", text)
    text = _SPACES.sub(" ", text)
    text = _FRACTIONS.sub(r"\\frac", text)
    text = text.strip()
    lead = _LEAD.match(text)
    if lead is not None:
        text = text[lead.end() :]
    text = " ".join(text.split()).rstrip(" .,;:") if text.strip(" .,;:") else ""
    return _without_round_brackets(text)


def plain(text: str) -> str:
    r"""`tidy`, and words taken out of their commands: `3\text{ cm}` is `3 cm`."""
    return " ".join(without_word_commands(tidy(text)).split())


def without_word_commands(text: str) -> str:
    r"""`\text{...}` and its like become their words; lines stay apart."""
    return _WORDS_COMMAND.sub(r" \1 ", text)


def _without_round_brackets(text: str) -> str:
    """`(x+1)` is `x+1`, but `(1,2)`, `(x+1)(x+2)` and the choice `(A)` stay."""
    inner = text[1:-1].strip()
    if not (text.startswith("(") and text.endswith(")")) or (len(inner) == 1 and inner.isalpha()):
        return text
    brackets, parts = split(text)
    return parts[0] if brackets == "()" and len(parts) == 1 else text


@dataclass(frozen=True)
class Number:
    """An exact rational, with what its spelling says about its precision.

    Attributes:
      value: the number as written; `10%` has the value 10 and `percent`.
      places: digits after the decimal point, None if there is no point.
      digits: significant digits of the spelling.
      percent: a percent sign followed.
    """

    value: Fraction
    places: int | None = None
    digits: int = 0
    percent: bool = False


_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?"
_SIGNED = rf"[+-]?\s*{_UNSIGNED}"
_CURRENCY = "[\u20ac\u00a3\u00a5\u20b9]"
# Words that change the number they follow, so they are no units.
_NOT_UNITS = (
    "and|or|to|pi|in|mod|plus|minus|times|over|divided|squared|cubed|of|if|is|not|per|more|less|"
    "hundred|thousand|million|billion|trillion|dozen|half|halves|thirds?|quarters?|percent|"
    "sqrt|sin|cos|tan|log|ln|exp|base|than|at|least|most|about|mixed|root|degrees?"
)
_UNIT = rf"(?!(?:{_NOT_UNITS})\b)[A-Za-z]{{2,}}|cm|mm|km|kg|m|s|g|h|L"
_TAIL = re.compile(
    r"\s*(?:"
    r"(?P<percent>\\?%|per\s?cent\b)"
    r"|\^\s*\{?\s*\\circ\s*\}?|degrees?\b"
    rf"|{_CURRENCY}"
    rf"|(?<=[0-9}}\s])\s+(?:{_UNIT})\b(?:\s+(?:{_UNIT})\b)?(?:\s*\^\s*\{{?[23]\}}?)?"
    r")?\s*",
)
_BODY = re.compile(
    rf"(?P<sign>[+-]?)\s*{_CURRENCY}?\s*(?:"
    rf"(?P<whole>[0-9]+)?\s*\\frac\s*(?:\{{\s*(?P<top>{_SIGNED})\s*\}}|(?P<top1>[0-9]))\s*"
    rf"(?:\{{\s*(?P<bottom>{_SIGNED})\s*\}}|(?P<bottom1>[0-9]))"
    rf"|(?P<over>{_UNSIGNED})\s*/\s*(?P<under>{_SIGNED})"
    rf"|(?P<decimal>{_UNSIGNED})(?:"
    r"\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*(?P<power>[+-]?[0-9]{1,3})\s*\}|(?P<power1>[0-9]))"
    r"|[eE](?P<exponent>[+-]?[0-9]{1,3}))?"
    r")",
)


def _decimal(spelling: str) -> Fraction | None:
    spelling = re.sub(r"[\s,]", "", spelling)
    if not any(character.isdigit() for character in spelling):
        return None
    return Fraction(spelling if spelling[-1] != "." else spelling[:-1])


def read_number(text: str) -> Number | None:
    r"""The number that `text` is, or None.

    Integers, decimals, `a/b`, `\frac{a}{b}`, `\frac12`, mixed `1\frac12`, `1.5\times 10^{3}`,
    `1.5e3`; with thousands separators, a currency sign, a percent sign, degrees, or a unit in
    words (dropped: the reference seldom has one).
    """
    text = plain(text)
    if not text or len(text) > MAX_NUMBER_CHARACTERS:
        return None
    match = _BODY.match(text)
    if match is None:
        return None
    tail = _TAIL.fullmatch(text, match.end())
    if tail is None:
        return None
    places: int | None = None
    digits = 0
    if match["decimal"] is not None:
        value = _decimal(match["decimal"])
        power = int(match["power"] or match["power1"] or match["exponent"] or 0)
        if value is not None and power:
            value *= Fraction(10) ** power
        elif value is not None and "." in match["decimal"]:
            places = len(match["decimal"].partition(".")[2])
            digits = len(re.sub(r"[^0-9]", "", match["decimal"]).lstrip("0"))
    else:
        top = _decimal(match["top"] or match["top1"] or match["over"] or "")
        bottom = _decimal(match["bottom"] or match["bottom1"] or match["under"] or "")
        if top is None or not bottom:
            return None
        value = top / bottom
        if match["whole"] is not None:
            if value < 0:
                return None
            value += int(match["whole"])
    if value is None:
        return None
    return Number(
        value=-value if match["sign"] == "-" else value,
        places=places,
        digits=digits,
        percent=tail["percent"] is not None,
    )


def _rounds_to(decimal: Number, other: Number) -> bool:
    """`0.333333` stands for 1/3: six digits or more, and rounding at its last place gives it."""
    if decimal.places is None or decimal.digits < 6:
        return False
    if other.places is not None and other.places <= decimal.places:
        return False
    return abs(decimal.value - other.value) <= Fraction(1, 2 * 10**decimal.places)


def numbers_equal(left: Number, right: Number) -> bool:
    """Equal values; `10%` is both 10 and 0.1 where the other side has no percent sign."""
    if left.percent != right.percent:
        percent, other = (left, right) if left.percent else (right, left)
        return other.value in (percent.value, percent.value / 100)
    return left.value == right.value or _rounds_to(left, right) or _rounds_to(right, left)


_OPTION = re.compile(r"(?:option|choice)\s+", re.IGNORECASE)


@cache
def _choice_patterns(letters: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A choice alone, and one with its text; two choices (`(A) or (B)`) are neither."""
    upper, both = f"[{letters}]", f"[{letters}{letters.lower()}]"
    alone = rf"({upper})[.:)]?|\(\s*({both})\s*\)[.:]?"
    # A capital with a word after it is one too: `(B), I think`.
    bare = rf"{upper}(?![A-Za-z]|\s+[a-z])"
    another = rf"\s*(?:[,;/&]|(?:and|or)\b)\s*(?:\(\s*{both}\s*\)|{bare})"
    with_text = rf"(?:\(\s*({both})\s*\)|({upper})\s*[.:)])(?!{another})\s*\S.*"
    return re.compile(alone), re.compile(with_text, re.DOTALL)


def read_choice(text: str, *, letters: str = "ABCDE", with_text: bool = False) -> str | None:
    """The letter if `text` is a choice: `B`, `(b)`, `B.`; `with_text` also `(B) 12`, `B: 12`.

    `letters` are those of the options. Maths has few: beyond E, a letter may be a quantity.
    """
    alone, and_text = _choice_patterns(letters)
    text = _OPTION.sub("", plain(text))
    match = alone.fullmatch(text)
    if match is None and with_text:
        match = and_text.fullmatch(text)
    return (match[1] or match[2]).upper() if match else None


_CONJUNCTION = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}|\b(?:and|or)\b")
_OPENING = {"(": ")", "[": "]"}


def split(text: str) -> tuple[str, list[str]]:
    r"""Brackets and top-level parts of an answer that is already `tidy`.

    `(1, 2]` -> ("(]", ["1", "2"]); `\{1, 2\}` -> ("{}", ...); `1, 2`, `1 and 2` -> ("", ...);
    a part with `\pm` counts twice. Brackets are given only where one pair encloses everything.
    Matrices, and whatever is not balanced or very long, are one part.
    """
    if r"\begin" in text or len(text) > MAX_LIST_CHARACTERS:
        return "", [text]
    brackets = ""
    inner = text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        brackets, inner = "{}", text[2:-2]
    elif text.startswith("{") and text.endswith("}") and closing_brace(text, 0) == len(text) - 1:
        brackets, inner = "{}", text[1:-1]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        brackets, inner = text[0] + text[-1], text[1:-1]
    parts = _parts(inner)
    if brackets and parts is None:  # such as (1,2) \cup (3,4): the ends are not a pair
        brackets, parts = "", _parts(text)
    if parts is None:
        return "", [text]
    if brackets and len(parts) == 1 and brackets not in ("{}", "()"):
        return "", [text]
    return brackets, [expanded for part in parts for expanded in _both_signs(part)]


def _both_signs(part: str) -> list[str]:
    if part.count(r"\pm") != 1:
        return [part]
    plus = re.sub(r"\\pm(?![A-Za-z])\s*", "+", part).strip()
    minus = re.sub(r"\\pm(?![A-Za-z])\s*", "-", part).strip()
    return [plus.removeprefix("+"), minus]


def _parts(text: str) -> list[str] | None:
    """Splits at commas, semicolons, `and`, `or` outside of all brackets; None if unbalanced."""
    closers: list[str] = []
    parts = [""]
    position = 0
    while position < len(text):
        token = text[position]
        conjunction = None if closers else _CONJUNCTION.match(text, position)
        if conjunction is not None and (position == 0 or not text[position - 1].isalpha()):
            parts.append("")
            position = conjunction.end()
            continue
        if token == "\\" and position + 1 < len(text):
            token = text[position : position + 2]
        if token in ("(", "["):
            closers.append(_OPENING[token])
        elif token in ("{", r"\{"):
            closers.append("}" if token == "{" else r"\}")
        elif token in (")", "]", "}", r"\}"):
            # Half-open intervals close with the other kind.
            if not closers or ((token in ")]") != (closers[-1] in ")]")):
                return None
            if token in ("}", r"\}") and closers[-1] != token:
                return None
            closers.pop()
        if not closers and token in (",", ";") and not _inside_number(text, position):
            parts.append("")
        else:
            parts[-1] += token
        position += len(token)
    if closers:
        return None
    return [part.strip() for part in parts if part.strip()] or None


def _inside_number(text: str, comma: int) -> bool:
    """In `1,234, 5` the first comma groups thousands: the list's own commas have a space."""
    return (
        ", " in text
        and re.search(r"(?<![0-9,])[0-9]{1,3}(?:,[0-9]{3})*$", text[:comma]) is not None
        and re.match(r",[0-9]{3}(?![0-9])", text[comma:]) is not None
    )
