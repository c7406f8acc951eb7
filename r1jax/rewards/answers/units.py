"""Units and words of magnitude behind a number."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

Unit = tuple[tuple[str, int], ...]
"""(name, power), sorted: `m/s` is (("m", 1), ("s", -1))."""

_NAMES = """
m meter metre 米|cm centimeter centimetre 厘米|mm millimeter millimetre 毫米
km kilometer kilometre 千米 公里|dm decimeter 分米|nm nanometer|um micrometer micron
in inch inches|ft foot feet|yd yard|mi mile|s sec second 秒|min minute mins 分钟
h hr hour 小时|ms millisecond|day 天|week 周|month 个月|yr year 年 岁|g gram gramme 克
kg kilogram kilo 千克 公斤|mg milligram 毫克|t ton tonne 吨|lb lbs pound|oz ounce
L l liter litre 升|mL ml milliliter millilitre 毫升|gal gallon|qt quart|pint|cup|acre
hectare|$ dollar usd buck 美元|cent ¢|€ euro eur|£ gbp|¥ yuan rmb cny yen 元|₹ rupee inr|角
jiao|deg degree ° 度|rad radian|K kelvin|C celsius|F fahrenheit|mol mole|N newton
J joule|kJ kilojoule|W watt|kW kilowatt|V volt|A amp ampere|Hz hertz|Pa pascal|kPa|eV
MeV|GeV|cal calorie|kcal|T tesla|Ohm ohm|unit 单位|mph|kph|rpm|point pt|pm p.m. p.m
am a.m. a.m|bit|byte|people person 人|child children|man men|woman women
"""
UNITS: dict[str, str] = {
    name: line.split()[0] for line in _NAMES.replace("\n", "|").split("|") for name in line.split()
}
_MAGNITUDES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_MAGNITUDES |= {"trillion": 10**12, "dozen": 12, "gross": 144, "score": 20}
_MAGNITUDES |= {"百": 100, "千": 1000, "万": 10**4, "百万": 10**6, "亿": 10**8}
_ORDINALS = "half third quarter fourth fifth sixth seventh eighth ninth tenth hundredth thousandth"
_PARTS = dict(
    zip(_ORDINALS.split(), (2, 3, 4, 4, 5, 6, 7, 8, 9, 10, 100, 1000), strict=True), halve=2
)
# Counters of Chinese and Japanese: they say nothing but that things are counted.
_COUNTERS = set(
    "个個只本张條条名位件块塊颗朵辆辆种種组組次双把棵头套箱页題题道份場场班台袋瓶筐桶盒支枝盏座间家户"
)
# No things: a number with one of these is another value, or no value.
_NO_NOUNS = set(
    "less plus minus times negatives factorials wrongs is as its was has this yes does others "
    "squares cubes percents roots modulus radius focus logs sins cos tans bases powers".split()
)
_HARMLESS = {"total", "each", "old", "altogether", "away", "apart", "tall", "long", "wide"}


class Tail(NamedTuple):
    """What stands behind a number: a factor, a percent sign, a unit."""

    factor: Fraction = Fraction(1)
    percent: bool = False
    unit: Unit = ()


_TERM = re.compile(
    r"(?P<over>/|per(?=[\s}])|an?(?=\s))?\s*(?P<power>square|sq\.?|cubic|cu\.?)?\s*"
    r"(?P<name>[ap]\.m\.?|[A-Za-z]+|[€£¥₹$%°¢]|[\u3040-\u9fff]+)\.?\s*(?P<again>squared|cubed)?"
    r"\s*(?:\^\s*\{?\s*(?P<exponent>-?[0-9])\s*\}?)?\s*[-*.]?\s*"
)


def _singular(word: str) -> str:
    for ending, new in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("sses", "ss"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 1 and not word.endswith("ss"):
            return word[: -len(ending)] + new
    return word


def unit_name(word: str) -> str | None:
    """The name in the table of `km`, `Miles`, `米`; None if it is not there."""
    for each in (word, word.casefold(), _singular(word.casefold())):
        if each in UNITS and (len(each) > 1 or each == word):
            return UNITS[each]
    return None


def is_word(run: str) -> bool:
    """Whether letters behind a number are a word, not a product of variables."""
    folded = run.casefold()
    return (
        (len(run) > 1 and unit_name(run) is not None)
        or _singular(folded) in _MAGNITUDES
        or (len(run) > 3 and not run.isupper() and any(vowel in folded for vowel in "aeiouy"))
        or folded in ("per", "pct", "sq", "men", "of", "is", "percent")
    )


def read_tail(text: str, *, trusted: bool = False, one: bool = False) -> Tail | None:
    """Reads what stands behind a number; None if it is neither unit, magnitude nor things.

    Args:
      trusted: of a reference: any words are taken for things that are counted.
      one: the number is 1, so that what is counted need not be plural.
    """
    factor, percent = Fraction(1), False
    unit: dict[str, int] = {}
    nouns: list[str] = []
    position, sign = 0, 1
    text = text.strip(" .,;:()").replace("\\", "").replace("cdot", " ")
    if not text:
        return None
    if re.match(r"for (?:all|any|every|each)\b", text):
        return Tail()
    while position < len(text):
        match = _TERM.match(text, position)
        if match is None or match.end() == position:
            return None
        position = match.end()
        word = match["name"]
        folded = word.casefold()
        if match["over"] in ("/", "per"):
            sign = -1
        elif folded == "per" or (folded in ("of", "in", "the", "a", "an") and nouns):
            sign = -1 if folded == "per" else sign
            continue
        exponent = int(match["exponent"] or 1)
        if match["power"] or match["again"]:
            exponent *= 2 if (match["power"] or match["again"])[:2] == "sq" else 3
        singular = _singular(folded)
        name = unit_name(word)
        if folded in ("percent", "pct", "percents", "percentage", "%") and not unit and not percent:
            percent = True
        elif singular in _MAGNITUDES and not unit:
            factor *= _MAGNITUDES[singular]
        elif singular in _PARTS and not unit and not nouns:
            factor /= _PARTS[singular]
        elif name is not None:
            unit[name] = unit.get(name, 0) + sign * exponent
        elif folded in _HARMLESS and (unit or nouns or trusted or folded != "old"):
            continue
        elif not word.isascii():
            rest = _cjk(word, unit, sign)
            if rest is None:
                return None
            factor *= rest
        else:
            nouns.append(singular)
            good = folded[-1] == "s" and len(folded) > 3 or one
            if not trusted and (folded in _NO_NOUNS or (position >= len(text) and not good)):
                return None
    if nouns:
        unit[f"things:{' '.join(sorted(set(nouns)))}"] = 1
    return Tail(factor, percent, tuple(sorted((each, n) for each, n in unit.items() if n)))


def _cjk(word: str, unit: dict[str, int], sign: int) -> int | None:
    """`万元` multiplies and has a unit; `个` is a counter."""
    factor = 1
    while word:
        for length in range(min(3, len(word)), 0, -1):
            piece = word[:length]
            if piece in UNITS:
                unit[UNITS[piece]] = unit.get(UNITS[piece], 0) + sign
            elif piece in _MAGNITUDES:
                factor *= _MAGNITUDES[piece]
            elif piece in ("平方", "立方") and word[2:] in UNITS:
                unit[UNITS[word[2:]]] = 2 if piece == "平方" else 3
                return factor
            elif piece == "每":
                sign = -1
            elif piece not in _COUNTERS:
                continue
            word = word[length:]
            break
        else:
            return None
    return factor


def units_agree(one: Unit, other: Unit) -> bool:
    """A unit may be absent on one side, but never another one; of things one word must agree."""
    if not one or not other or one == other:
        return True
    things = [
        {word for name, _ in unit if name.startswith("things:") for word in name[7:].split()}
        for unit in (one, other)
    ]
    rest = [
        tuple(each for each in unit if not each[0].startswith("things:")) for unit in (one, other)
    ]
    if things[0] and things[1]:
        return rest[0] == rest[1] and bool(things[0] & things[1])
    # `20 square units` and `20 square tiles`; `5 kg of apples` and `5 kg`
    return bool(rest[0]) and rest[0] == rest[1]
