r"""The spelling of an answer: Unicode to LaTeX, what carries no meaning left out, tokens.

All patterns are linear in the text's length.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache, lru_cache
from typing import NamedTuple

MAX_CHARACTERS = 4000
MAX_DIGITS = 4000  # of one number; Python's int() refuses more than 4300


class Unreadable(ValueError):
    """A text that is no answer; the message says why."""


class TooLarge(Unreadable):
    """A text or value beyond the bounds: it is not evaluated."""


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")


def _pairs(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


_GREEK = _pairs(
    r"α alpha β beta γ gamma δ delta ε epsilon ζ zeta η eta θ theta ι iota κ kappa λ "
    r"lambda μ mu ν nu ξ xi π pi ρ rho σ sigma τ tau φ phi ϕ phi χ chi ψ psi ω omega Γ "
    r"Gamma Δ Delta Θ Theta Λ Lambda Ξ Xi Π Pi Σ Sigma Φ Phi Ψ Psi Ω Omega"
)
_SIGNS = _pairs(
    r"− - – - ‐ - ‑ - × \times · \cdot ⋅ \cdot ∙ \cdot ∗ * ÷ / ⁄ / ∕ / ± \pm ∓ \mp ≤ \le ≥ "
    r"\ge ⩽ \le ⩾ \ge ≦ \le ≧ \ge ≠ \ne ≈ \approx ≡ \equiv ∈ \in ∉ \notin ∪ \cup ∩ \cap ∖ "
    r"\setminus ∅ \emptyset ∞ \infty ℝ \mathbb{R} ℤ \mathbb{Z} ℕ \mathbb{N} ℚ \mathbb{Q} ℂ "
    r"\mathbb{C} ° ^\circ ′ ' ’ ' ″ '' ∠ \angle △ \triangle ∣ | ⟨ \langle ⟩ \rangle 〈 "
    r"\langle 〉 \rangle ⌊ \lfloor ⌋ \rfloor ⌈ \lceil ⌉ \rceil … \ldots ⋯ \ldots → \to ¬ "
    r"\neg 、 \listsep 。 . ， , ； ; ： : 【 [ 】 ] ％ % ＄ \$ ￥ ¥ 或 \text{or} 和 \text{and} 且 "
    r"\text{and}"
)
_TABLE = str.maketrans(
    {
        **{sign: f"\\{name} " for sign, name in _GREEK.items()},
        **{sign: f"{new} " if new[-1:].isalpha() else new for sign, new in _SIGNS.items()},
        **dict.fromkeys("\u00a0\u202f\u2009\u3000\t\r", " "),
        **dict.fromkeys(
            "\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\ufe0e\ufe0f\ufeff\u00ad"
        ),
    }
)
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_ROOT = re.compile(r"([√∛∜])\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z])?")
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}


def _fraction(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _ascii(text: str) -> str:
    """Maths in Unicode as LaTeX: `√2`, `½`, `x²`, `１２`, `（1，2）`."""
    if text.isascii():
        return text
    text = _RAISED.sub(lambda found: f"^{{{found[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _LOWERED.sub(lambda found: f"_{{{found[0].translate(_SUBSCRIPTS)}}}", text)
    text = _VULGAR.sub(_fraction, text)
    text = _ROOT.sub(lambda found: _ROOTS[found[1]] + (f"{{{found[2]}}}" if found[2] else ""), text)
    return unicodedata.normalize("NFKC", text.translate(_TABLE))


_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:final\s+)?answers?\s*(?:is|are|:|=)\s*:?"
    r"|(?:所以|因此|故)?\s*(?:最终|最后)?的?答案\s*(?:是|为|:|=)?\s*:?|(?:解|答)\s*:",
    re.IGNORECASE,
)
_STOPS = " .,;:"
_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]")
_SIZES = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|phantom(?:\{[^{}]*\})?"
    r"|nolimits|hline|rm|bf|it|(?:text)?color\s*\{[^{}]*\})(?![A-Za-z])\.?"
)
_SPACES = re.compile(r"(?<!\\)\\(?:[,;:!>\s]|q?quad|thinspace(?![A-Za-z])|hspace\*?\{[^{}]*\})|~")
_GROUPS = re.compile(r"(?<=[0-9])(?:(?:,|\{,\})?\s*\\!|\\[, ]|\{,\})\s*(?=[0-9]{3}(?![0-9]))")
_DOUBLED = re.compile(
    r"\\\\(?=(?:[dt]?frac|sqrt|text|pi|cup|infty|left|right|boxed|leq?|geq?|neq?|pm|cdot|times|in|circ"
    r"|theta|alpha|mathbb|quad)(?![a-z]))"
)
_ANGLE = re.compile(
    r"([0-9.]+)\s*\^\s*\{?\s*\\circ\s*\}?\s*([0-9.]+)\s*(?:\^\s*\{?\s*\\prime\s*\}?|')(?!')"
    r"(?:\s*([0-9.]+)\s*(?:\^\s*\{?\s*\\prime\s*\\prime\s*\}?|''))?"
)
_BASES = "two three four five six seven eight nine ten eleven twelve".split()
_IN_BASE = re.compile(
    r"([0-9A-Z]+)\s*(?:\\text\s*\{)?\s*\(?(?:in\s+)?base[\s-]*([0-9]{1,2}|"
    + "|".join(_BASES)
    + r")"
    r"\s*\)?\s*\}?$"
)
_BASE_NAME = re.compile(r"_\{?\s*\\?(?:text|mathrm)?\{?(" + "|".join(_BASES) + r")\}*$")


@lru_cache(maxsize=512)
def tidy(text: str) -> str:
    """LaTeX without what never carries meaning: delimiters, sizes, a lead-in, a full stop."""
    text = _ascii(text).strip()
    if len(text) > 1 and text.startswith("$") and text[1] in "0123456789" and text.count("$") == 1:
        text = "\\" + text
    text = re.sub(r"(?<![\\$])\$\s*\n\s*\$(?!\$)", ", ", text)  # formulae on lines of their own
    text = re.sub(r"(?<!\\)\$", " ", text).strip()
    bold = re.fullmatch(r"\*\*([^*]+)\*\*[ .,;:]*", text)
    text = bold[1] if bold else text
    if "\\" in text:
        text = _SIZES.sub("", _DELIMITERS.sub("", text))
        if r"\begin" not in text:
            text = _DOUBLED.sub(r"\\", text)
    text = _GROUPS.sub("", text)
    if "circ" in text:
        text = _ANGLE.sub(_angle, text)
    wrapped = re.match(r"\\text\s*\{([^{}]*)\}", text)
    if wrapped is not None and _LEAD.fullmatch(wrapped[1].strip()):
        text = text[wrapped.end() :]
    if ".m" in text or ". m" in text:
        text = re.sub(r"\b([apAP])\.\s?([mM])\b\.?", r"\1\2", text)
    lead = _LEAD.match(text.strip())
    if lead is not None:
        text = text.strip()[lead.end() :]
    text = " ".join(text.split())
    if text.endswith("\\") and not text.endswith("\\\\"):
        text = text[:-1]
    while text[-1:] in _STOPS and text and not text.endswith("..."):
        text = text[:-1].rstrip()
        if text.endswith("\\") and not text.endswith("\\\\"):
            text = text[:-1]
    if text.startswith("{") and text.find("}") == len(text) - 1 and not re.search("[,;]", text):
        text = text[1:-1].strip()  # braces round all of it say nothing
    if "base" in text:
        text = _IN_BASE.sub(lambda found: f"{found[1]}_{{{_base(found[2])}}}", text)
    return _BASE_NAME.sub(lambda found: f"_{{{_base(found[1])}}}", text)


def _angle(match: re.Match[str]) -> str:
    """Degrees, minutes and seconds as degrees."""
    return rf"(({match[1]})+({match[2]})/60+({match[3] or 0})/3600)^\circ "


def _base(name: str) -> str:
    return str(_BASES.index(name) + 2) if name in _BASES else name


_WORDS_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf)|[mh]box|operatorname|boldsymbol|bm)\s*\{([^{}]*)\}"
)


def without_word_commands(text: str) -> str:
    r"""`\text{...}` and its like become their words; lines stay apart."""
    return _WORDS_COMMAND.sub(r" \1 ", text)


def plain(text: str) -> str:
    r"""`tidy`, and words taken out of their commands: `3\text{ cm}` is `3 cm`."""
    text = _SPACES.sub(" ", without_word_commands(tidy(text)))
    return " ".join(text.split()).rstrip(" .,;:")


class Token(NamedTuple):
    r"""Kinds: number, letters (a run), command (`\name`), text (of `\text{}`), sign, and, or."""

    kind: str
    text: str
    space: bool = False  # white space before it


WORDS = _pairs(
    "arccot arccot arcsec arcsec arccsc arccsc arsinh arsinh arcosh arcosh artanh artanh coth coth "
    "pi pi sin sin cos cos tan tan cot cot sec sec csc csc ln ln log log lg lg sqrt sqrt exp exp "
    "infty infty sinh sinh cosh cosh tanh tanh binom binom gcd gcd lcm lcm max max min min arcsin "
    "arcsin arccos arccos arctan arctan theta theta mod mod alpha alpha beta beta gamma gamma "
    "lambda lambda omega omega sigma sigma phi phi oo infty inf infty infinity infty asin arcsin "
    "acos arccos atan arctan cbrt cbrt abs abs floor floor ceil ceil union cup cup cup Infinity "
    "infty"
)
_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<skip>\\[,;:!>\s]|\\q?quad|\\thinspace(?![A-Za-z])|~)"
    r"|(?P<row>\\\\(?:\[[^\]]*\])?)"
    r"|\\(?P<words>text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|it|sf)|[mh]box|operatorname\*?)\s*(?=\{)"
    r"|\\(?P<env>begin|end)\s*\{(?P<name>[A-Za-z]+\*?)\}"
    r"|\\(?P<command>[A-Za-z]+|[^A-Za-z])|(?P<letters>[A-Za-z]+)"
    r"|(?P<number>(?:[0-9]+(?:\.[0-9]+|\.(?!\.))?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z{^(]))?)"
    r"|(?P<cjk>[\u3040-\u9fff]+)|(?P<sign>\*\*|<=|>=|!=|==|->|:=|\+-|\.\.\.|.)",
    re.DOTALL,
)
_SAME = _pairs(
    "dfrac frac nicefrac frac sfrac frac tfrac frac cfrac frac leq le geq ge lt < leqslant le "
    "geqslant ge gt > neq ne lbrace { rbrace } varnothing emptyset tbinom binom dbinom binom "
    "operatorname text cdots ldots dots ldots varphi phi varepsilon epsilon lvert | rvert | vert "
    "| lbrack [ rbrack ] degree circ simeq approx thickapprox approx backslash setminus "
    "smallsetminus setminus tg tan ctg cot cosec csc arctg arctan bmod mod star cdot ast cdot "
    "colon : lor or land and vee or wedge and div / mid | prime ' infin infty lang langle rang "
    "rangle"
)
LETTER_UNITS = set("m s g h L N J W V A K C F T".split())
# In `\\mathrm{}`: a product, unless it is a unit.
_FEW_LETTERS = re.compile(
    r"(?!cm|mm|km|kg|mg|ml|mL|ft|in|mi|hr|oz|lb|Hz|Pa|eV|kJ|kW|pm|am)[A-Za-z]{2}"
)
_SIGN_NAMES = {"<=": "le", ">=": "ge", "!=": "ne", "+-": "pm", "...": "ldots", "->": "to"}
MAX_TOKENS = 1500


def tokens(text: str, nesting: int = 0) -> list[Token]:
    r"""The tokens of a tidied text; `nesting` is that of `\text` in `\text`.

    Raises:
      Unreadable: braces of a `\text` without an end, or too many tokens.
    """
    if nesting > 5:
        raise TooLarge("it is nested too deep")
    if len(text) > MAX_CHARACTERS:
        raise TooLarge(f"it has over {MAX_CHARACTERS} characters")
    found: list[Token] = []
    position, space = 0, False
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match is not None
        position = match.end()
        if match["space"] or match["skip"]:
            space = True
            continue
        if match["words"]:
            end = _closing(text, position)
            inner = text[position + 1 : end]
            if found and found[-1].kind == "number" and "\\" in _SPACES.sub("", inner):
                raise Unreadable("a formula in the words behind a number")
            if match["words"].startswith("math") and _FEW_LETTERS.fullmatch(inner):
                found.append(Token("letters", inner, space))
            else:
                found.extend(_text_tokens(inner, space, nesting + 1))
            position = end + 1
        else:
            found.extend(_token(match, space, found[-1] if found else None))
        space = False
        if len(found) > MAX_TOKENS:
            raise TooLarge(f"it has over {MAX_TOKENS} tokens")
    return found


def _closing(text: str, opening: int) -> int:
    """Index of the brace that closes the one at `opening`."""
    depth = 0
    for position in range(opening, len(text)):
        if text[position] in "{}" and text[position - 1] != "\\":
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return position
    raise Unreadable("a brace is not closed")


def _token(match: re.Match[str], space: bool, before: Token | None) -> list[Token]:
    if match["row"] is not None:
        return [Token("sign", r"\\", space)]
    if match["env"]:
        return [Token(match["env"], match["name"], space)]
    if match["number"]:
        return [Token("number", match["number"], space)]
    if match["letters"]:
        return _letter_tokens(match["letters"], space, before)
    if match["cjk"]:
        return [Token("text", match["cjk"], space)]
    name = match["command"] or _SIGN_NAMES.get(match["sign"], "")
    if not name:
        sign = match["sign"]
        return [Token("sign", {"**": "^", "==": "=", ":=": "="}.get(sign, sign), space)]
    name = _SAME.get(name, name)
    if name in ("and", "or"):
        return [Token(name, name, space)]
    if match["command"] in ("{", "}", "lbrace", "rbrace"):
        return [Token("sign", "\\" + name, space)]
    if not name.isalpha():
        return [Token("sign", name, space)]
    return [Token("command", name, space)]


def _letter_tokens(run: str, space: bool, before: Token | None) -> list[Token]:
    for word in ("or", "and"):
        after_value = before is not None and (before.kind == "number" or before.text in ")]}|")
        if run == word or (after_value and not space and run.startswith(word)):
            rest = run[len(word) :]
            return [Token(word, word, space), *([Token("letters", rest)] if rest else [])]
    if run == "min" and before is not None and before.kind == "number":
        return [Token("letters", run, space)]
    if run == "to" and before is not None and before.kind == "number":
        return [Token("sign", ":", space)]
    if run in WORDS:
        return [Token("command", WORDS[run], space)]
    for name in ("arcsin", "arccos", "arctan", "sqrt", "sin", "cos", "tan", "ln", "log", "pi"):
        if run.startswith(name) and len(run) - len(name) == 1:
            return [Token("command", WORDS[name], space), Token("letters", run[len(name) :])]
    return [Token("letters", run, space)]


def _text_tokens(inner: str, space: bool, nesting: int) -> list[Token]:
    words = " ".join(_SPACES.sub(" ", inner).split())
    if words.strip(" ,;.").casefold() in ("and", "or"):
        word = words.strip(" ,;.").casefold()
        return [Token(word, word, space)]
    if "\\" in words:  # formulae in it
        return tokens(inner, nesting)
    if words == "to":
        return [Token("sign", ":", space)]
    runs = re.findall("[A-Za-z]+", words)
    clock = re.fullmatch(r"[AaPp]\.?\s?[Mm]\.?", words)
    if not clock and words != "min" and all(len(run) == 1 or run in WORDS for run in runs):
        # `\text{13}`, `\mathrm{e}`, `\text{(E)}`, `\operatorname{arcsin}`
        inside = tokens(inner, nesting)
        apart = space or inner[:1].isspace() or (words in LETTER_UNITS and words != "K")
        return [
            Token(each.kind, each.text, each.space or (apart and not index))
            for index, each in enumerate(inside)
        ]
    if "," in words and re.fullmatch(r"[A-Za-z](?:\s*,\s*(?:and\s+)?[A-Za-z])+", words):
        return tokens(inner, nesting)
    parts = re.split(r"\s*([,;])\s*(?:and\s+|or\s+)?|\s+(and|or)\s+", words)
    if len(parts) > 1 and all(len(part.split()) <= 3 for part in parts[::3]):
        found: list[Token] = []
        for index, part in enumerate(parts):
            if part and index % 3 == 0:
                found.extend(_text_tokens(part, space, nesting) if part != words else [])
            elif part and index % 3:
                found.append(Token("sign" if part in ",;" else part, part))
        return found
    return [Token("text", words, space)]


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


def _has_another(text: str, letter: str, letters: str) -> bool:
    """Whether another option is labelled in the same way: `A. 12 B. 13`, but not `B. Both (A)`."""
    if re.match(r"\(?\w[.:)]+\s*(?:both|all|neither|none|either|only)\b", text, re.IGNORECASE):
        return False
    label = r"\(\s*(\w)\s*\)" if text.startswith("(") else r"(?<![\w(])(\w)[.)](?=\s)"
    if re.match(r"\(?\s*\w\s*[.:)]+(?:\s*\(\w\)$|[\s,]*(?:or|and)\b)", text):
        return True
    others = {found.upper() for found in re.findall(label, text)}
    return bool(others & set(letters) - {letter})


def read_choice(text: str, *, letters: str = "ABCDE", with_text: bool = False) -> str | None:
    """The letter if `text` is a choice: `B`, `(b)`, `B.`; `with_text` also `(B) 12`, `B: 12`.

    `letters` are those of the options. Maths has few: beyond E, a letter may be a quantity.
    """
    alone, and_text = _choice_patterns(letters)
    text = _OPTION.sub("", plain(text))
    match = alone.fullmatch(text)
    if match is None and with_text:
        match = and_text.fullmatch(text)
        if match and _has_another(text, (match[1] or match[2]).upper(), letters):
            return None
    return (match[1] or match[2]).upper() if match else None
