"""Format reward: does the whole completion have the required shape, and nothing else?"""

from __future__ import annotations

import re

from r1jax.rewards.extraction import boxes, final_answer
from r1jax.rewards.registry import Answered, RewardOptions, Score, refuse_unknown, reward

STYLES = ("tags", "boxed", "think")

# No tag may occur inside of a part: that would be a second thought or a second answer.
_INSIDE = r"((?:(?!</?(?:think|answer)>).)*)"
_TAGS = re.compile(rf"\s*<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>\s*", flags=re.DOTALL)
_THINK = re.compile(rf"\s*<think>{_INSIDE}</think>{_INSIDE}", flags=re.DOTALL)
# What may follow the box: the end of its formula and of its sentence.
_AFTER_BOX = re.compile(r"(?:\s|\$|\\\)|\\\]|\.|\*)*")


def well_formed(completion: str, style: str) -> bool:
    r"""Whether the whole of `completion` (prefill included) has the shape of `style`.

    - `tags`: `<think>thought</think><answer>answer</answer>`, white space between.
    - `boxed`: `<think>thought</think>`, then text whose end is its only `\boxed{answer}`.
    - `think`: `<think>thought</think>`, then any text.

    Thought and answer are not blank, and no tag occurs twice or elsewhere.
    """
    match = (_TAGS if style == "tags" else _THINK).fullmatch(completion)
    if match is None or not all(part.strip() for part in match.groups()):
        return False
    if style == "boxed":
        found = boxes(match[2])
        return (
            len(found) == 1
            and match[2].count(r"\boxed") == 1
            and bool(found[0][2].strip())
            and _AFTER_BOX.fullmatch(match[2], found[0][1]) is not None
        )
    return True


def _check(options: RewardOptions) -> None:
    refuse_unknown("format", options, ("style",))
    style = options.get("style", "tags")
    if style not in STYLES:
        raise ValueError(f"rewards.format.options.style = {style!r}: not one of {list(STYLES)}")


@reward("format", check=_check)
def _format_reward(row: Answered, options: RewardOptions) -> Score:
    """1 if the completion is well formed and the model ended it itself, else 0.

    Options: `style`, one of `tags` (default), `boxed`, `think`; see `well_formed`.
    """
    good = not row.truncated and well_formed(row.completion, options.get("style", "tags"))
    return Score.binary(good, final_answer(row.completion))
