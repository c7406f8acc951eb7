"""The words of a text, and the script that each is written in, from the Unicode database alone."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

NUMBER = "Number"
"""What stands for the script of digits and other numerals."""

Alphabets = tuple[tuple[str, str], ...]
"""(name, characters) of scripts that Unicode does not know, such as those of a toy language."""

# Written without spaces: each character is taken for a word.
_UNSPACED = {"Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar"}
_HAN = {"Cjk", "Ideographic"}
# Letters by category that are signs by meaning: the R of the reals, a bold x, the n of 2 to the n.
_SIGNS = ("<font>", "<super>", "<sub>")
_FIRST_SIGN = 0xE000  # of the private use area: no letter of any text is there
_RUN = re.compile(r"([^ ])\1*")


def words(text: str, alphabets: Alphabets = ()) -> Iterator[tuple[str, str]]:
    """(script, word) for each word of `text`, in order.

    A word is a run of characters of one script; in scripts that are written without spaces
    (Chinese, kana, Thai) it is one character. `3rd` is two words, `用Python写` three. Combining
    accents and apostrophes do not part their word and are left out of it (`don't` gives `dont`);
    other punctuation and signs part words. A script is named by the first word of its characters'
    Unicode names (`Latin`, `Han`, `Cyrillic`); numerals are `Number`. The characters of
    `alphabets` belong to the script of that name instead, whatever they are.
    """
    signs = _signs(alphabets)
    text = text.translate(_JOINED)
    for match in _RUN.finditer(text.translate(signs)):
        script = signs.scripts[ord(match[1]) - _FIRST_SIGN]
        word = text[match.start() : match.end()]
        if script in _UNSPACED:
            for character in word:
                yield script, character
        else:
            yield script, word


def _script(character: str) -> str | None:
    """The script of a letter or numeral; None for whatever parts words."""
    category = unicodedata.category(character)
    if category[0] == "N":
        return NUMBER
    if category[0] != "L" or unicodedata.decomposition(character).startswith(_SIGNS):
        return None
    # The name of a full-width or compatibility letter is that of the letter it stands for.
    name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "")
    script = re.split("[ -]", name)[0].title()
    return "Han" if script in _HAN else script or None


class _Joined(dict[int, int | None]):
    """For `str.translate`: deletes what belongs to the letters around it. Filled as it is used."""

    def __missing__(self, point: int) -> int | None:
        category = unicodedata.category(chr(point))
        modifier = category == "Lm" and unicodedata.name(chr(point), "").startswith("MODIFIER")
        self[point] = None if category[0] == "M" or category == "Cf" or modifier else point
        return self[point]


_JOINED = _Joined({ord("'"): None, ord("\u2019"): None})


class _Signs(dict[int, str]):
    """For `str.translate`: one sign per script, and a space for what parts words."""

    def __init__(self, alphabets: Alphabets) -> None:
        super().__init__()
        self.scripts: list[str] = []  # in the order of their signs
        for name, characters in alphabets:
            for character in characters:
                self[ord(character)] = self._sign(name)

    def __missing__(self, point: int) -> str:
        script = _script(chr(point))
        self[point] = " " if script is None else self._sign(script)
        return self[point]

    def _sign(self, script: str) -> str:
        if script not in self.scripts:
            self.scripts.append(script)
        return chr(_FIRST_SIGN + self.scripts.index(script))


@lru_cache(maxsize=32)
def _signs(alphabets: Alphabets) -> _Signs:
    return _Signs(alphabets)
