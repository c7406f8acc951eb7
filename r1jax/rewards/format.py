"""Format reward: does the whole completion have the required shape, and nothing else?"""

from __future__ import annotations

import re
import unicodedata

from r1jax.rewards.extraction import boxes, final_answer
from r1jax.rewards.registry import RewardInput, RewardOptions, Score, refuse_unknown, reward
from r1jax.rewards.visible import is_blank

STYLES = ("tags", "boxed", "think")

# No tag may occur inside of a part: that would be a second thought or a second answer.
_INSIDE = r"((?:(?!</?(?:think|answer)>).)*)"
_TAGS = re.compile(rf"\s*<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>\s*", flags=re.DOTALL)
_THINK = re.compile(rf"\s*<think>{_INSIDE}</think>{_INSIDE}", flags=re.DOTALL)
# What may follow the box: the end of its formula and of its sentence, in any script.
_AFTER_BOX = re.compile(r"\\\)|\\\]|.", flags=re.DOTALL)
# Punctuation that is part of a value, joins it to another, or opens something.
_NO_STOP = re.compile(
    "PERCENT|PER MILLE|PER TEN|NUMBER SIGN|AMPERSAND|SOLIDUS|ASTERISM|PRIME|QUOTATION|APOSTROPHE|"
    "COMMERCIAL AT|COMMA|COLON|BULLET|DAGGER|SECTION SIGN|CARET|HYPHEN|INVERTED|MIDDLE DOT|"
    "INTERPUNCT|DECIMAL SEPARATOR|THOUSANDS SEPARATOR"
)


def well_formed(completion: str, style: str) -> bool:
    r"""Whether the whole of `completion` (prefill included) has the shape of `style`.

    - `tags`: `<think>thought</think><answer>answer</answer>`, white space between.
    - `boxed`: `<think>thought</think>`, then text whose end is its only `\boxed{answer}`.
    - `think`: `<think>thought</think>`, then any text.

    Thought and answer are not blank (`is_blank`), and no tag occurs twice or elsewhere.
    """
    match = (_TAGS if style == "tags" else _THINK).fullmatch(completion)
    if match is None or any(is_blank(part) for part in match.groups()):
        return False
    if style == "boxed":
        found = boxes(match[2])
        return (
            len(found) == 1
            and match[2].count(r"\boxed") == 1
            and not is_blank(found[0][2])
            and all(map(_ends, _AFTER_BOX.findall(match[2], found[0][1])))
        )
    return True


def _ends(text: str) -> bool:
    """Whether a character after a box only ends the formula or the sentence around it."""
    if len(text) > 1 or text.isspace() or text in "$*":
        return True
    category = unicodedata.category(text)
    stop = category == "Po" and not _NO_STOP.search(unicodedata.name(text, "")) and text != "\\"
    return stop or category == "Cf"


def _check(options: RewardOptions) -> None:
    refuse_unknown("format", options, ("style",))
    style = options.get("style", "tags")
    if style not in STYLES:
        raise ValueError(f"rewards.format.options.style = {style!r}: not one of {list(STYLES)}")


@reward("format", check=_check, reads_answer=False)
def _format_reward(row: RewardInput, options: RewardOptions) -> Score:
    """1 if the completion is well formed and the model ended it itself, else 0.

    Options: `style`, one of `tags` (default), `boxed`, `think`; see `well_formed`.
    """
    good = not row.truncated and well_formed(row.completion, options.get("style", "tags"))
    return Score.binary(good, final_answer(row.completion))
