"""Scoring one completion, or a file of them (`r1jax score`)."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from r1jax.files import JsonObject, numbered_rows, written_whole
from r1jax.rewards.functions import load_reward
from r1jax.rewards.registry import REWARDS, Outcome, RewardInput, RewardOptions, Score
from r1jax.rewards.verifier import Pending, Verifier

if TYPE_CHECKING:
    from r1jax.settings.rewards import VerifierSection

_WINDOW = 4096  # rows; two windows are in memory at once


def score(
    completion: str,
    answer: str,
    reward: str = "accuracy",
    *,
    prompt: str = "",
    truncated: bool = False,
    options: RewardOptions | None = None,
    columns: Mapping[str, object] | None = None,
) -> Score:
    r"""Score one completion with a rule reward.

        score(r"So it is \boxed{0.5}.", r"\frac12").reward  # 1.0

    It runs in this process, without a deadline or a memory limit: for the completions of a model
    that you do not trust, use `Verifier`, whose workers have both.

    Args:
      completion: with a prefilled `<think>`, if the prompt ended in one.
      answer: the reference answer.
      reward: a registered name, `package.module:function` or `file.py:function`.
      prompt: for the rewards that read it.
      truncated: the model was cut off before it ended the completion itself.
      options: the reward's options.
      columns: of the dataset's row; `token_ids` or `length` is the completion's, in tokens.

    Raises:
      ValueError: an unknown reward, or options or a reference answer that it refuses.
    """
    given = {"prompt": prompt, "completion": completion, "answer": answer, "truncated": truncated}
    row = _reward_input({**(columns or {}), **given}, "score")
    result = load_reward(reward, options or {}).function(row, options or {})
    return Score.failed("the reward gives None") if result is None else result


def score_file(
    reward: str,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    options: RewardOptions | None = None,
    section: VerifierSection | None = None,
) -> dict[Outcome, int]:
    """Scores JSON lines and writes them with `reward`, `outcome` and `extracted` added.

    `detail` is added too where the reward gives more, or failed.

    Args:
      reward: a registered name, `package.module:function` or `file.py:function`.
      source: rows with `prompt`, `completion` (texts, or lists of messages) and, for rewards that
        compare with it, `answer` (text or a number); perhaps `domain`, `truncated`, and `token_ids`
        or `length` in tokens. The reward sees the other columns, which are kept.
      target: written whole or not at all; may be `source`. The reward of a row on which the
        verifier failed is null.
      options: the reward's options.
      section: how workers run; default: one per two cores.

    Returns:
      The number of rows with each of the four outcomes.

    Raises:
      ValueError: the first bad row, as `file:line: what is wrong`, before anything is scored;
        an unknown reward; options it refuses.
    """
    from r1jax.settings.rewards import RewardSection, VerifierSection

    source, target = Path(source), Path(target)
    if section is None:
        section = VerifierSection(workers=max(1, (os.cpu_count() or 1) // 2))
    needs_answer = reward in REWARDS and REWARDS[reward].reads_answer
    for _ in _rows(source, needs_answer):  # all are checked before the first is scored
        pass
    counts = Counter({outcome: 0 for outcome in Outcome})
    rewards = {reward: RewardSection(options=dict(options or {}))}
    with (
        Verifier(rewards, section) as verifier,
        written_whole(target) as partial,
        partial.open("wb") as out,
    ):
        waiting: list[tuple[list[JsonObject], Pending]] = []
        rows = _rows(source, needs_answer)
        while True:
            window = list(islice(rows, _WINDOW))
            if window:
                pending = verifier.submit([given for _, given in window])
                waiting.append(([row for row, _ in window], pending))
            if not waiting:
                break
            if window and len(waiting) < 2:
                continue  # the next window is read while this one is scored
            written, pending = waiting.pop(0)
            for row, score in zip(written, pending.result(), strict=True):
                counts[score.outcome] += 1
                row["reward"] = None if math.isnan(score.reward) else score.reward
                row["outcome"] = score.outcome.value
                row["extracted"] = score.extracted
                if (part := score.parts.get(reward)) is None:
                    row["detail"] = "the reward gives None"
                elif part.detail is not None:
                    row["detail"] = part.detail
                # Half of a surrogate pair, from a cut token, is written as its escape.
                line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")
                out.write(line + b"\n")
    return dict(counts)


def _rows(path: Path, needs_answer: bool) -> Iterator[tuple[JsonObject, RewardInput]]:
    for number, row in numbered_rows(path):
        yield row, _reward_input(row, f"{path}:{number}", needs_answer)


def _reward_input(row: JsonObject, where: str, needs_answer: bool = True) -> RewardInput:
    texts = {} if needs_answer or "answer" in row else {"answer": ""}
    for column in ("prompt", "completion", "answer"):
        if column in texts:
            continue
        if column not in row:
            raise ValueError(f"{where}: no column {column!r}; there are {sorted(row)}")
        value = row[column]
        if column == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
            value = json.dumps(value)
        if column != "answer" and isinstance(value, list):
            value = _content(value, f"{where}: {column}")
        if not isinstance(value, str):
            raise ValueError(f"{where}: {column} = {value!r}: must be text")
        texts[column] = value
    domain, truncated = row.get("domain", ""), row.get("truncated", False)
    if not isinstance(domain, str):
        raise ValueError(f"{where}: domain = {domain!r}: must be text")
    if not isinstance(truncated, bool):
        raise ValueError(f"{where}: truncated = {truncated!r}: must be true or false")
    tokens = row.get("token_ids", row.get("completion_ids", ()))
    if not isinstance(tokens, list | tuple) or not all(type(token) is int for token in tokens):
        raise ValueError(f"{where}: token_ids = {tokens!r}: must be a list of whole numbers")
    length = row.get("length", len(tokens) or None)
    if length is not None and type(length) is not int:
        length = None  # a column of the dataset's that is called so
    columns = {name: value for name, value in row.items() if name != "completion"}
    return RewardInput(
        texts["prompt"],
        texts["completion"],
        texts["answer"],
        domain=domain,
        truncated=truncated,
        columns=columns,
        token_ids=tokens,
        length=length,
    )


def _content(messages: list[object], where: str) -> str:
    """The contents of a list of messages, one below the other."""
    contents = [each.get("content") for each in messages if isinstance(each, dict)]
    if len(contents) < len(messages) or not all(isinstance(each, str) for each in contents):
        raise ValueError(f"{where} is a list; needs text, or messages {{role, content}} of text")
    return "\n".join(map(str, contents))
