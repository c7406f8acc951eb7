"""Filters of cold start and rejection sampling: which sampled texts may be trained on.

DeepSeek-R1 (arXiv 2501.12948v1, sections 2.3.1 and 2.3.3) keeps readable answers: for the cold
start it filters out repetition and mixed languages, for the 800K set thoughts with mixed languages,
long paragraphs and code blocks. The thresholds are not reported; the defaults here are choices.

    filters = load_filters({"format": {"style": "think"}, "language_mixing": {"target": "en"}})
    rejected = Counter(apply_filters(text, filters) for text in texts)  # None: kept
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from r1jax.rewards.extraction import ANSWER, END_ANSWER, END_THINK, THINK, thought
from r1jax.rewards.format import STYLES, well_formed
from r1jax.rewards.language import check_languages, language_share
from r1jax.rewards.words import words
from r1jax.settings.names import nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    IntArray: TypeAlias = NDArray[np.int64] | NDArray[np.uint32]

FilterOptions: TypeAlias = Mapping[str, Any]
"""The options of a filter as a config has them; the filter checks them as it is made."""


class TextFilter(Protocol):
    """A frozen dataclass whose fields are the filter's options, checked as it is made.

    Its ValueErrors begin with the name of the option.
    """

    def keeps(self, text: str) -> bool:
        """Whether a completion, with its prefilled `<think>`, may be trained on."""
        ...


@dataclass(frozen=True, slots=True)
class _Repetition:
    """Refuses loops, and texts that repeat much of what they say, in words and in characters.

    Attributes:
        n: Words in an n-gram.
        max_share: Share of the text's n-grams that an earlier one equals, at most; also of the
            n-grams of 2 n characters of a long run without a space.
        max_repeats: How often in a row a phrase may occur, at most.
        phrase_words: The longest phrase, in words, that counts as repeated.
        max_characters: A string of up to 32 characters, spaces left out, may fill so many by more
            repeats than `max_repeats`: a line of hyphens is no loop.
    """

    n: int = 10
    max_share: float = 0.2
    max_repeats: int = 20
    phrase_words: int = 32
    max_characters: int = 100

    def __post_init__(self) -> None:
        _whole("n", self.n, least=1)
        _share("max_share", self.max_share)
        _whole("max_repeats", self.max_repeats, least=1)
        _whole("phrase_words", self.phrase_words, least=1)
        _whole("max_characters", self.max_characters, least=1)

    def keeps(self, text: str) -> bool:
        tokens = _words(text)
        if _repeated_share(tokens, self.n) > self.max_share:
            return False
        if _longest_loop(tokens, self.phrase_words, self.max_repeats + 1) > self.max_repeats:
            return False
        if _loops(text, self.max_repeats, self.max_characters):
            return False
        runs = (run for run in text.split() if len(run) > _LONG_RUN)
        return all(_repeated_share(run, 2 * self.n) <= self.max_share for run in runs)


_LONG_RUN = 200  # characters without a space: no word, and few formulae
_PERIODS = 32


def _loops(text: str, max_repeats: int, max_characters: int) -> bool:
    """Whether one string of characters, repeated, fills a long part of the text without spaces."""
    import numpy as np  # here, because workers that do not need it should start without it

    characters = "".join(text.split()).casefold().encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(characters, np.uint32)
    for period in range(1, min(_PERIODS, len(codes) // 2) + 1):
        filled = _longest_stretch(codes, period) + period
        if filled > max_characters and filled // period > max_repeats:
            return True
    return False


def _repeated_share(tokens: Sequence[str], n: int) -> float:
    """Share of the n-grams of a text's words that an earlier one equals; 0 if there are none."""
    ngrams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _longest_loop(tokens: Sequence[str], phrase_words: int, enough: int) -> int:
    """How often a phrase of 1 .. phrase_words words occurs in a row, at most; 0 without words.

    Stops at the first phrase that occurs `enough` times in a row.
    """
    import numpy as np  # here, because workers that do not need it should start without it

    number: dict[str, int] = {}
    ids = np.array([number.setdefault(word, len(number)) for word in tokens], np.int64)
    most = min(len(ids), 1)
    for period in range(1, min(phrase_words, len(ids) // 2) + 1):
        # In r phrases in a row, (r - 1) * period words equal the word one period later.
        most = max(most, 1 + _longest_stretch(ids, period) // period)
        if most >= enough:
            break
    return most


def _longest_stretch(ids: IntArray, period: int) -> int:
    """How many ids in a row, at most, equal the one that stands `period` later."""
    import numpy as np

    unequal = np.flatnonzero(ids[period:] != ids[:-period])
    ends = np.concatenate(([-1], unequal, [len(ids) - period]))
    return int(np.diff(ends).max() - 1)


@dataclass(frozen=True, slots=True)
class _LanguageMixing:
    """Refuses thoughts with too many words of other languages; no thought is not mixed.

    Attributes:
        target: Language of the thought, such as `en` or `zh`.
        min_share: Share of its words in that language, at least.
        languages: Name -> characters of languages that Unicode does not know.
    """

    target: str
    min_share: float = 0.95
    languages: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_languages(self.target, self.languages)
        _share("min_share", self.min_share)

    def keeps(self, text: str) -> bool:
        share = language_share(thought(text) or "", self.target, self.languages)
        return share is None or share >= self.min_share


@dataclass(frozen=True, slots=True)
class _Format:
    """Refuses texts that are not well formed; a thought without an end is not.

    Attributes:
        style: `tags`, `boxed` or `think`; see `r1jax.rewards.format.well_formed`.
    """

    style: str = "tags"

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style = {self.style!r}: not one of {list(STYLES)}")

    def keeps(self, text: str) -> bool:
        return well_formed(text, self.style)


@dataclass(frozen=True, slots=True)
class _LongParagraphs:
    """Refuses texts with an overlong paragraph; blank lines part paragraphs.

    Attributes:
        max_words: Words in a paragraph, at most; a Chinese character counts as a word.
    """

    max_words: int = 300

    def __post_init__(self) -> None:
        _whole("max_words", self.max_words, least=1)

    def keeps(self, text: str) -> bool:
        return all(len(_words(part)) <= self.max_words for part in _BLANK_LINES.split(text))


_BLANK_LINES = re.compile(r"\n[^\S\n]*(?=\n)")


@dataclass(frozen=True, slots=True)
class _CodeBlocks:
    """Refuses thoughts with a block of code; in the answer, one is welcome.

    A block is fenced (three backticks anywhere, or three tildes at the start of a line), HTML
    (`<pre>`, `<code>`), or, as Markdown has it, indented by four spaces or a tab behind a blank
    line, unless it goes on with an item of a list.
    """

    def keeps(self, text: str) -> bool:
        inside = thought(text) or ""
        return _CODE.search(inside) is None and not _has_indented_block(inside)


_CODE = re.compile(r"```|^[^\S\n]*~~~|<(?:pre|code)\b", re.IGNORECASE | re.MULTILINE)
_LIST_ITEM = re.compile(r"\s{0,3}(?:[-*+\u2022]|\d{1,9}[.)])(?:\s|$)")


def _has_indented_block(text: str) -> bool:
    behind_blank, in_list = True, False
    for line in text.expandtabs(4).split("\n"):
        if not line.strip():
            behind_blank = True
            continue
        indented = line.startswith("    ")
        if indented and behind_blank and not in_list:
            return True
        if not indented:
            in_list = bool(_LIST_ITEM.match(line)) or (in_list and not behind_blank)
        behind_blank = False
    return False


@dataclass(frozen=True, slots=True)
class _Length:
    """Refuses texts that are too short or too long.

    Attributes:
        min_words, max_words: Bounds (inclusive); a Chinese character counts as a word.
    """

    min_words: int = 0
    max_words: int | None = None

    def __post_init__(self) -> None:
        _whole("min_words", self.min_words, least=0)
        if self.max_words is not None:
            _whole("max_words", self.max_words, least=self.min_words)

    def keeps(self, text: str) -> bool:
        count = len(_words(text))
        return self.min_words <= count and (self.max_words is None or count <= self.max_words)


FILTERS: Mapping[str, type[TextFilter]] = MappingProxyType(
    {
        "code_blocks": _CodeBlocks,
        "format": _Format,
        "language_mixing": _LanguageMixing,
        "length": _Length,
        "long_paragraphs": _LongParagraphs,
        "repetition": _Repetition,
    }
)
"""Name in a config -> the filter."""


def load_filters(options: Mapping[str, FilterOptions]) -> dict[str, TextFilter]:
    """Makes filters of a config's `name: options`, in its order.

    Raises:
        ValueError: a name or option is unknown (the message has the nearest one), missing, or has
            a bad value.
    """
    return {name: _load_filter(name, given) for name, given in options.items()}


def _load_filter(name: str, given: FilterOptions) -> TextFilter:
    if name not in FILTERS:
        hint = nearest(name, FILTERS) or f"there are {sorted(FILTERS)}"
        raise ValueError(f"filters.{name}: no filter of this name; {hint}".rstrip())
    kind = FILTERS[name]
    fields = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for option in given:
        if option not in fields:
            hint = nearest(option, fields) or f"there are {sorted(fields)}"
            raise ValueError(f"filters.{name}.{option}: no such option; {hint}".rstrip())
    for option, each in fields.items():
        default = (each.default, each.default_factory)
        if option not in given and default == (dataclasses.MISSING, dataclasses.MISSING):
            raise ValueError(f"filters.{name}.{option} is missing; it has no default")
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"filters.{name}.{error}") from None


def apply_filters(text: str, filters: Mapping[str, TextFilter]) -> str | None:
    """The name of the first filter that refuses `text`, for counts; None if all keep it."""
    return next((name for name, each in filters.items() if not each.keeps(text)), None)


def _words(text: str) -> list[str]:
    for tag in (THINK, END_THINK, ANSWER, END_ANSWER):
        text = text.replace(tag, " ")
    return [word.casefold() for _, word in words(text)]


def _whole(option: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{option} = {value!r}: must be a whole number of at least {least}")


def _share(option: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(f"{option} = {value!r}: a share is in 0 .. 1")
