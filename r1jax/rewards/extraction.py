"""The final answer in a completion: text in, text out."""

from __future__ import annotations

import re

from r1jax.rewards.visible import is_blank

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
    spans = _boxes(text, _closing_braces(text), 0, len(text))
    return [(start, end + 1, text[opening + 1 : end]) for start, opening, end in spans]


def _boxes(
    text: str, closing: dict[int, int], position: int, stop: int
) -> list[tuple[int, int, int]]:
    """(start, opening brace, closing brace) of the outermost complete boxes in a part of a text."""
    complete: list[tuple[int, int, int]] = []
    while (match := _BOX.search(text, position, stop)) is not None:
        start, opening = match.start(), match.end() - 1
        end = closing.get(opening)
        if end is None or end >= stop:
            # The rest is inside of a box without an end; a complete one may still be in there.
            position = opening + 1
            continue
        complete.append((start, opening, end))
        position = end + 1
    return complete


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


_SPACING = r"(?:\s|\$|\\[,;:!()\[\] ]|\\q?quad)*+"
_JOINT = re.compile(
    rf"{_SPACING}(?:[,;&\u3001\uff0c\uff1b\u548c\u6216]{_SPACING})*+"
    # Few words that end in `and`: `\boxed{1} apples and \boxed{2}`.
    rf"(?:(?:\\text\s*\{{)?[^.!?\n\\=0-9]{{0,30}}\b(?:and|or)\b[\s}},]*{_SPACING})?"
    rf"(?:[A-Za-z](?:_\{{?\w+\}}?)?\s*={_SPACING})?"
)
_LONGEST_JOINT, _MOST_BOXES = 60, 100


def unboxed(text: str) -> str:
    """The contents of the last boxes of `text`, boxes in boxes opened; `text` without any.

    Boxes that only commas, `and` or `or` part are one answer, whose parts are joined by commas.
    """
    return _unboxed(text)[0]


def _unboxed(text: str) -> tuple[str, int]:
    """As `unboxed`, with the end of the last outermost box; -1 without any."""
    closing = _closing_braces(text)
    start, stop, last_end = 0, len(text), -1
    while found := _boxes(text, closing, start, stop):
        group = [found[-1]]
        if last_end < 0:
            last_end = group[0][2] + 1
        while len(group) < min(len(found), _MOST_BOXES):
            before, after = found[-len(group) - 1], group[-1]
            between = text[before[2] + 1 : after[0]]
            if len(between) > _LONGEST_JOINT or not _JOINT.fullmatch(between):
                break
            # Boxes on lines of their own are an answer and its repetition.
            if "\n" in between and not re.search(r"[,;&\u3001]|\b(?:and|or)\b", between):
                break
            group.append(before)
        if len(group) > 1:
            contents = [text[opening + 1 : end].strip() for _, opening, end in reversed(group)]
            return ", ".join(dict.fromkeys(contents)), last_end
        start, stop = group[0][1] + 1, group[0][2]
    return text[start:stop], last_end


def final_answer(completion: str) -> str | None:
    r"""The text of the final answer, or None where there is none to read.

    Looks only after the last `</think>`, for the last `\boxed{...}` or `<answer>...</answer>`,
    whichever ends later; boxes inside of an answer tag are the answer. Several boxes that only
    commas, `and` or `or` part are one answer. An empty one is none.
    """
    tail = after_thinking(completion)
    if tail is None:
        return None
    contents, box_end = _unboxed(tail)
    answer = contents if box_end >= 0 else None
    tag_end = tail.rfind(END_ANSWER)
    if tag_end >= box_end:
        tag = tail.rfind(ANSWER, 0, tag_end) if tag_end >= 0 else -1
        if tag >= 0:
            answer = unboxed(tail[tag + len(ANSWER) : tag_end])
    if answer is None or is_blank(answer):
        return None
    return answer.strip()
