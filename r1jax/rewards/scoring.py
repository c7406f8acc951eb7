"""Scoring one completion, or a file of them (`r1jax score`)."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from r1jax.files import JsonObject, numbered_rows, written_whole
from r1jax.rewards.registry import Answered, Outcome, RewardOptions, Score, load_reward
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
) -> Score:
    r"""Score one completion with a rule reward.

        score(r"So it is \boxed{0.5}.", r"\frac12").reward  # 1.0

    It runs in this process, without a deadline or a memory limit: for the completions of a model
    that you do not trust, use `Verifier`, whose workers have both.

    Args:
      completion: with a prefilled `<think>`, if the prompt ended in one.
      answer: the reference answer.
      reward: a registered name or `package.module:function`.
      prompt: for the rewards that read it.
      truncated: the model was cut off before it ended the completion itself.
      options: the reward's options.

    Raises:
      ValueError: an unknown reward, or options or a reference answer that it refuses.
    """
    row = Answered(prompt, completion, answer, truncated=truncated)
    return load_reward(reward, options or {}).function(row, options or {})


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
      reward: a registered name or `package.module:function`.
      source: rows with `prompt`, `completion` and `answer` (text; `answer` may be a number), and
        perhaps `domain` and `truncated`. Other columns are kept.
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
    for _ in _rows(source):  # all are checked before the first is scored
        pass
    counts = Counter({outcome: 0 for outcome in Outcome})
    rewards = {reward: RewardSection(options=dict(options or {}))}
    with (
        Verifier(rewards, section) as verifier,
        written_whole(target) as partial,
        partial.open("wb") as out,
    ):
        waiting: list[tuple[list[JsonObject], Pending]] = []
        rows = _rows(source)
        while True:
            window = list(islice(rows, _WINDOW))
            if window:
                pending = verifier.submit([answered for _, answered in window])
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
                if score.parts[reward].detail is not None:
                    row["detail"] = score.parts[reward].detail
                # Half of a surrogate pair, from a cut token, is written as its escape.
                line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")
                out.write(line + b"\n")
    return dict(counts)


def _rows(path: Path) -> Iterator[tuple[JsonObject, Answered]]:
    for number, row in numbered_rows(path):
        yield row, _answered(row, f"{path}:{number}")


def _answered(row: JsonObject, where: str) -> Answered:
    texts = {}
    for column in ("prompt", "completion", "answer"):
        if column not in row:
            raise ValueError(f"{where}: no column {column!r}; there are {sorted(row)}")
        value = row[column]
        if column == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
            value = json.dumps(value)
        if not isinstance(value, str):
            raise ValueError(f"{where}: {column} = {value!r}: must be text")
        texts[column] = value
    domain, truncated = row.get("domain", ""), row.get("truncated", False)
    if not isinstance(domain, str):
        raise ValueError(f"{where}: domain = {domain!r}: must be text")
    if not isinstance(truncated, bool):
        raise ValueError(f"{where}: truncated = {truncated!r}: must be true or false")
    return Answered(**texts, domain=domain, truncated=truncated)
