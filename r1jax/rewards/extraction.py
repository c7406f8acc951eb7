"""The final answer in a completion: text in, text out."""

from __future__ import annotations

import re

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def after_thinking(completion: str) -> str | None:
    """What follows the last `</think>`; None if a thought was opened and never closed.

    Numbers inside the thought are no answers, and a thought without an end has none. A completion
    without any think tag is all answer.
    """
    closed = completion.rfind(END_THINK)
    if completion.rfind(THINK) > closed:
        return None
    return completion if closed < 0 else completion[closed + len(END_THINK) :]


def thought(completion: str) -> str | None:
    """What is between the first `<think>` and the last `</think>`; None without a closed thought.

    Where the opening tag is missing, the thought begins with the completion. What is not thought
    and not between two thoughts is `after_thinking`.
    """
    closed = completion.rfind(END_THINK)
    if closed < 0 or completion.rfind(THINK) > closed:
        return None
    opened = completion.find(THINK, 0, closed)
    return completion[0 if opened < 0 else opened + len(THINK) : closed]


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Every outermost complete `\boxed{...}`: (start, end, contents), in order of the text.

    Braces nest; escaped ones (`\{`) do not count. A box cut off before its end is left out.
    """
    complete: list[tuple[int, int, str]] = []
    closing = _closing_braces(text)
    position = 0
    while True:
        match = _BOX.search(text, position)
        if match is None:
            return complete
        start, opening = match.start(), match.end() - 1
        end = closing.get(opening)
        if end is None:
            # The rest is inside of a box without an end; a complete one may still be in there.
            position = opening + 1
            continue
        complete.append((start, end + 1, text[opening + 1 : end]))
        position = end + 1


_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped character is skipped as a pair


def _closing_braces(text: str) -> dict[int, int]:
    """Index of each opening brace that is closed -> index of its closing one, in one pass."""
    closing: dict[int, int] = {}
    open_now: list[int] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            open_now.append(match.start())
        elif match[0] == "}" and open_now:
            closing[open_now.pop()] = match.start()
    return closing


def closing_brace(text: str, opening: int) -> int | None:
    """Index of the brace that closes the one at `opening`, or None."""
    return _closing_braces(text).get(opening)


def unboxed(text: str) -> str:
    """The contents of the last box of `text`, boxes in boxes opened; `text` itself without any."""
    while found := boxes(text):
        text = found[-1][2]
    return text


def final_answer(completion: str) -> str | None:
    r"""The text of the final answer, or None where there is none to read.

    Looks only after the last `</think>`, for the last `\boxed{...}` or `<answer>...</answer>`,
    whichever ends later; a box inside of an answer tag is the answer. An empty one is none.
    """
    tail = after_thinking(completion)
    if tail is None:
        return None
    found = boxes(tail)
    box_end = found[-1][1] if found else -1
    answer = unboxed(found[-1][2]) if found else None
    tag_end = tail.rfind(END_ANSWER)
    if tag_end >= box_end:
        tag = tail.rfind(ANSWER, 0, tag_end) if tag_end >= 0 else -1
        if tag >= 0:
            answer = unboxed(tail[tag + len(ANSWER) : tag_end])
    if answer is None or not answer.strip():
        return None
    return answer.strip()
