r"""Language consistency: is the thought written in the required language?

DeepSeek-R1 (arXiv 2501.12948v1, section 2.3.2) adds to the reward the share of the target
language's words in the chain of thought. How to tell a word's language is not reported; here its
script tells it. That parts English from Chinese, the languages that the paper's model mixed, but
not English from French.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from r1jax.rewards.extraction import final_answer, thought
from r1jax.rewards.registry import (
    Outcome,
    RewardInput,
    RewardOptions,
    Score,
    refuse_unknown,
    reward,
)
from r1jax.rewards.words import NUMBER, words
from r1jax.settings.names import nearest

SCRIPTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        **dict.fromkeys(("de", "en", "es", "fr", "it", "pt", "vi"), frozenset({"Latin"})),
        **dict.fromkeys(("ru", "uk"), frozenset({"Cyrillic"})),
        "ar": frozenset({"Arabic"}),
        "el": frozenset({"Greek"}),
        "he": frozenset({"Hebrew"}),
        "hi": frozenset({"Devanagari"}),
        "ja": frozenset({"Han", "Hiragana", "Katakana"}),
        "ko": frozenset({"Hangul"}),
        "th": frozenset({"Thai"}),
        "zh": frozenset({"Han", "Bopomofo"}),
    }
)
"""Language -> the scripts it is written in."""

# Every alternative stops where its like begins again, so that no text takes quadratic time.
_FORMAL = re.compile(
    r"""
      (?P<fence>`{3,}) .*? (?: (?P=fence) | \Z )     # a fence left open goes on to the end
    | ` [^`\n]* `
    | \$\$ (?: (?!\$\$) . )*+ \$\$
      # Pandoc's rule keeps prices apart: no space inside of the dollars, no digit after them.
    | \$ (?=[^\s$]) (?: \\[^\n] | [^$\n\\] )*+ (?<!\s) \$ (?!\d)
    | \\\( (?: [^\\] | \\[^()] )*+ \\\)
    | \\\[ (?: [^\\] | \\[^\[\]] )*+ \\\]
    | \\begin\{ (?P<block> (?:equation|align|alignat|gather|multline|eqnarray) \*? ) \}
      (?: (?! \\(?:begin|end)\{(?P=block)\} ) . )*+ \\end\{ (?P=block) \}
    | (?P<sign> \\(?:begin|end) \s* \{ [^{}\n]* \}
      | \\[A-Za-z]+ \*?
      | \\[\\$`]                                     # an escaped delimiter delimits nothing
      | </?(?:think|answer)>
      )
    """,
    re.DOTALL | re.VERBOSE,
)
_SIGNS = re.compile(
    r"\\(?:begin|end)\s*\{[^{}\n]*\}|\\[A-Za-z]+\*?|\\[\\$` ,;:!]|^`{3,}[A-Za-z0-9_+-]*(?=\n)|`"
)
# Where a formula or a program may change to prose: at lines, cells, and what a command holds.
_TEXT = re.compile(r"\\(?:text[a-z]*|mbox|mathrm)\s*\{([^{}]*)\}")
_UNIT_ENDS = re.compile(r"[\n{}&]|\\\\")
# The letters of variables, functions and keywords.
_FORMAL_SCRIPTS = frozenset({"Latin", "Greek", NUMBER})
_TOKEN = re.compile(r"([^\W\d_]{2,})(?!\w)|([,;.:!?](?=\s))|\w+|[^\w\s]")
_STATEMENT = re.compile(
    r"\s*(?:from\s+\S+\s+import\b.*|import\b.*"
    r"|(?:async\s+)?(?:for|while|if|elif|else|with|def|class|try|except|case|match)\b.*:)\s*(?:#.*)?"
)
_PROSE_WORDS = 4


def words_by_language(text: str, languages: Mapping[str, str] | None = None) -> Counter[str]:
    r"""The number of words of `text` in each language, as far as scripts show it.

    Numbers, punctuation, LaTeX commands and think and answer tags are not counted. Code (fenced by
    three backticks or more, or `inline`) and formulae (`$...$`, `$$...$$`, `\(...\)`, `\[...\]`,
    displayed environments) are known by what they hold: Latin and Greek letters are counted there
    only in prose (at least four words beside each other, and half of what there is), words of other
    scripts always. A lone letter such as `x`, `A` or `θ` is a variable or a label, so it is no word
    either; in scripts without case (Chinese) it is one.

    Args:
      languages: name -> characters, for languages that Unicode does not know, such as two toy
        languages with different letters. Their characters, digits and single letters too, count
        for them alone. They share them with formulae, so that in these nothing is counted.

    Returns:
      Words by name of the language of `languages`, else of the script (`Latin`, `Han`). Every
      Chinese character counts as a word.
    """
    languages = languages or {}

    def counted(match: re.Match[str]) -> str:
        return " " if languages or match["sign"] is not None else f" {_prose(match[0])} "

    return Counter(
        script
        for script, word in words(_FORMAL.sub(counted, text), tuple(languages.items()))
        if script in languages or not (script == NUMBER or _is_variable(word))
    )


def _prose(formal: str) -> str:
    """The words that are prose in code or a formula; all those of scripts that neither is of."""
    lines = _SIGNS.sub(" ", _TEXT.sub(r" \1 ", formal)).split("\n")
    text = "\n".join(line for line in lines if not _STATEMENT.fullmatch(line))
    if _is_prose(text):
        return text
    kept = []
    for unit in _UNIT_ENDS.split(text):
        if _is_prose(unit):
            kept.append(unit)
        elif not unit.isascii():
            kept += [word for script, word in words(unit) if script not in _FORMAL_SCRIPTS]
    return " ".join(kept)


def _is_prose(text: str) -> bool:
    """Whether most of a text are words with nothing but spaces, or a comma, between them."""
    tokens = [(match[1], match[2]) for match in _TOKEN.finditer(text)]
    are_words = [word is not None for word, comma in tokens if comma is None]
    neighbours = zip([False, *are_words], are_words, [*are_words[1:], False], strict=False)
    beside = sum(word and (before or after) for before, word, after in neighbours)
    return beside >= _PROSE_WORDS and 2 * beside >= len(tokens)


def _is_variable(word: str) -> bool:
    return len(word) == 1 and word.lower() != word.upper()


def language_share(
    text: str, target: str, languages: Mapping[str, str] | None = None
) -> float | None:
    """Share of the words of `text` that are in `target`, 0 .. 1; None if there are no words.

    Args:
      target: a name in `languages` or, if it is not there, in `SCRIPTS`.
      languages, and which words count: see `words_by_language`.

    Raises:
      ValueError: an unknown target.
    """
    return _share(words_by_language(text, languages), _scripts(target, languages or {}))


def _share(counted: Counter[str], scripts: frozenset[str]) -> float | None:
    total = counted.total()
    return sum(counted[script] for script in scripts) / total if total else None


def _scripts(target: str, languages: Mapping[str, str]) -> frozenset[str]:
    if target in languages:
        return frozenset({target})
    if target not in SCRIPTS:
        known = sorted({*languages, *SCRIPTS})
        raise ValueError(
            f"target = {target!r}: no language of this name; {nearest(target, known)}there are "
            f"{known}, and yours by `languages: {{name: characters}}`"
        )
    return SCRIPTS[target]


def check_languages(target: object, languages: object) -> None:
    """Checks the options `target` and `languages` as a config gives them.

    Raises:
      ValueError: the message begins with the option's name.
    """
    if not isinstance(languages, Mapping):
        raise ValueError(f"languages = {languages!r}: must map names to their characters")
    owner: dict[str, str] = {}
    for name, characters in languages.items():
        if not (isinstance(name, str) and name.islower()):
            raise ValueError(f"languages: the name {name!r} must be lower case; scripts are not")
        if not (isinstance(characters, str) and characters):
            raise ValueError(f"languages.{name} = {characters!r}: must be text, its characters")
        for character in characters:
            cut_off = character.isspace() or character in "$`\\"
            if cut_off or not list(words(character, ((name, character),))):
                raise ValueError(
                    f"languages.{name}: the character {character!r} cannot be part of a word"
                )
            if owner.setdefault(character, name) != name:
                raise ValueError(
                    f"languages.{name}: the character {character!r} is in {owner[character]!r} "
                    "too; a word of it would be in both"
                )
    if not isinstance(target, str):
        raise ValueError(f"target = {target!r}: must be the name of a language")
    _scripts(target, languages)


def _check(options: RewardOptions) -> None:
    refuse_unknown("language_consistency", options, ("target", "languages", "min_words"))
    least = options.get("min_words", 1)
    if type(least) is not int or least < 1:
        raise ValueError(
            f"rewards.language_consistency.options.min_words = {least!r}: must be a whole number "
            "of at least 1"
        )
    try:
        check_languages(options.get("target"), options.get("languages", {}))
    except ValueError as error:
        raise ValueError(f"rewards.language_consistency.options.{error}") from None


@reward("language_consistency", check=_check, reads_answer=False)
def language_consistency(row: RewardInput, options: RewardOptions) -> Score:
    """The share of the thought's words that are in the target language, 0 .. 1.

    Right if all are, else wrong. A thought that is absent, never closed, or with fewer words than
    `min_words` is unparseable and earns 0: nothing, an endless text, formulae alone or a mere `ok`
    are the cheapest ways to have no word in a wrong language.

    Options: `target`, such as `en` or `zh`; `languages`, name -> characters (see
    `words_by_language`); `min_words`, default 3, or 1 with `languages`.
    """
    text, languages = thought(row.completion), options.get("languages")
    counted = Counter[str]() if text is None else words_by_language(text, languages)
    share = _share(counted, _scripts(options["target"], languages or {}))
    extracted = final_answer(row.completion)
    if share is None or counted.total() < options.get("min_words", 1 if languages else 3):
        return Score(0.0, Outcome.UNPARSEABLE, extracted)
    return Score(share, Outcome.RIGHT if share == 1.0 else Outcome.WRONG, extracted)
