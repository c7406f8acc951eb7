r"""Whether a text shows anything: invisible characters and empty LaTeX do not."""

from __future__ import annotations

import re
import unicodedata

# Letters and signs by category that are drawn as nothing: Hangul fillers, the Braille pattern
# without dots, a note without a head. Others without a shape are of an invisible category.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800\U0001d159")
# Control, format, private and unassigned characters, halves of surrogate pairs, spaces, and marks,
# which need a character to stand on.
_INVISIBLE = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zs", "Zl", "Zp", "Mn", "Mc", "Me"})
_EMPTY_LATEX = re.compile(
    r"""
      \\[vh]?phantom \s* \{ [^{}]* \}
    | \\[hvm]?(?:space|skip|kern) \*? (?: \s* \{ [^{}]* \} | \s* -?[\d.]+ \s* [a-z]{2} )?
    | \\(?: left | right ) \s* \.
    | \\(?: begin | end | color | textcolor ) \s* \{ [^{}]* \}
    | \\(?: q?quad | enspace | thinspace | medspace | thickspace | neg[a-z]+space | nobreakspace
        | text(?:bf|it|rm|sf|tt|sc|md|up|sl|normal)? | math(?:bf|it|rm|sf|tt|bb|cal|frak|scr|normal)
        | mbox | hbox | fbox | boxed | boldsymbol | bm | bf | rm | it | displaystyle | textstyle
        | scriptstyle | strut | null | relax | ensuremath | operatorname ) (?![A-Za-z]) \*?
    | \\[,;:!>\s()\[\]\\/]
    | [{}$~&]
    """,
    re.VERBOSE,
)


def is_blank(text: str) -> bool:
    r"""Whether `text` shows nothing to a reader: white space, invisible characters, `\text{\;}`."""
    if not _shows(text):
        return True
    if "\\" not in text and _shows(text.translate(_GROUPING)):
        return False
    return not _shows(_EMPTY_LATEX.sub("", text))


_GROUPING = dict.fromkeys(map(ord, "{}$~&"))


def _shows(text: str) -> bool:
    return any(
        character not in _BLANK and unicodedata.category(character) not in _INVISIBLE
        for character in text
    )
