"""Samples of several attempts at one question, with turns of the user between them.

An attempt is a completion whose prompt is all that stands before it, as token ids: those that were
sampled stay as they are. One that was truncated gets its next attempt all the same, behind the
text that closes a turn in the template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from r1jax.data.instructions import Instruction, encode_instruction
from r1jax.data.prompts import Prompt
from r1jax.models.parameters import Params
from r1jax.rewards import RowScore
from r1jax.rollouts.sampling import Completion, decode, sample_prompts
from r1jax.run.models import LanguageModel, stated_positions
from r1jax.run.resolve import ResolvedRun
from r1jax.run.seeds import seed_of
from r1jax.sampler import Finish, GenerateOptions
from r1jax.sampler.queue import QueueFigures
from r1jax.settings.section import SettingError
from r1jax.settings.stage import Stage
from r1jax.settings.turns import Turn, tokens_of_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Attempts:
    """limits: tokens of each attempt at most. instructions: between them, one fewer."""

    limits: tuple[int, ...]
    instructions: tuple[Instruction, ...] = ()

    @property
    def count(self) -> int:
        return len(self.limits)


def instructions_of(
    turns: Sequence[Turn], datasets: Sequence[str], run: ResolvedRun, model: LanguageModel
) -> tuple[Instruction, ...]:
    """The user's turns, in the template of the datasets, which must render them alike.

    Raises:
      SettingError: a template cannot hold them, they differ, or one is longer than its max_tokens.
    """
    parts = dict.fromkeys(part for data in datasets for part in run.datasets.parts(data))
    results = []
    for index, turn in enumerate(turns):
        if turn.role != "user":
            continue
        assert turn.text is not None
        rendered: dict[Instruction, str] = {}
        for part in parts:
            try:
                instruction = encode_instruction(
                    turn.text, run.config.data[part], model.tokenizer, model.eos_ids
                )
            except ValueError as error:
                raise SettingError(f"turns.{index}.text", f"as data.{part}: {error}") from error
            rendered.setdefault(instruction, part)
        if len(rendered) > 1:
            first, other, *_ = rendered.values()
            raise SettingError(
                f"turns.{index}.text",
                f"data.{first} and data.{other} have other templates for it; give them one",
            )
        (instruction,) = rendered
        if instruction.longest > turn.context_tokens:
            raise SettingError(
                f"turns.{index}.max_tokens",
                f"in the template of the data the text has {instruction.longest} tokens, more than "
                f"{turn.context_tokens}; raise it",
            )
        results.append(instruction)
    return tuple(results)


def check_turns(stage: Stage, turns: Sequence[Turn], max_new_tokens: int, run: ResolvedRun) -> None:
    """Raises ConfigError for a text that the template cannot hold, and samples that are too long.

    Args:
      max_new_tokens: the highest of the stage.
    """
    with run.config.blaming("stages", stage.name):
        model = run.models.of(stage.name)
        instructions_of(turns, stage.prompt_datasets(), run, model)
        positions = stated_positions(model.section)
        behind = tokens_of_turns(turns, max_new_tokens)
        if positions is not None and behind >= positions:
            raise SettingError(
                "turns",
                f"all attempts and the texts between them have up to {behind} tokens, and the "
                f"model max_position_embeddings = {positions}; lower max_new_tokens or max_tokens",
            )


def sample_attempts(
    params: Params,
    parts: Sequence[tuple[Prompt, int]],
    sampler: LanguageModel,
    options: GenerateOptions,
    attempts: Attempts,
    *,
    batch: int,
    figures: QueueFigures | None = None,
) -> Iterator[list[tuple[int, Completion]]]:
    """Sample all attempts at this process's prompts; gives them in the order in which they end.

    Every process takes as many lists. With one attempt it is `sample_prompts`. Each further attempt
    is a queue of the same slots, of whose prompts each has one sample. Its random numbers are
    functions of the seed, the attempt's number, prompt id and sample.

    Args:
      parts: prompts, each with the index of its first sample.
      batch, figures: as of `sample_prompts`.

    Returns:
      Each attempt with its index, (prompt * samples + sample) * attempts + number.
    """
    last: dict[int, Completion] = {}
    for number, limit in enumerate(attempts.limits):
        if number == 0:
            rounds = sample_prompts(
                params,
                [prompt for prompt, _ in parts],
                sampler,
                replace(options, max_new_tokens=limit),
                batch=batch,
                first_samples=[first for _, first in parts],
                figures=figures,
            )
        else:
            instruction = attempts.instructions[number - 1]
            before = [last[i] for i in range(len(parts) * options.samples)]
            rounds = sample_prompts(
                params,
                [following_prompt(each, instruction, sampler.tokenizer) for each in before],
                sampler,
                replace(
                    options,
                    samples=1,
                    max_new_tokens=limit,
                    seed=seed_of(options.seed, "attempt", number),
                ),
                batch=batch * options.samples,
                first_samples=[each.sample for each in before],
                figures=figures,
            )
        for ended in rounds:
            last |= dict(ended)
            yield [(i * attempts.count + number, each) for i, each in ended]


def following_prompt(
    attempt: Completion, instruction: Instruction, tokenizer: PreTrainedTokenizerBase
) -> Prompt:
    """What the next attempt continues: the prompt, this attempt and the instruction."""
    if attempt.finish == Finish.EOS:
        closing, ids = decode(tokenizer, attempt.token_ids[-1:]), instruction.token_ids
    else:
        closing, ids = instruction.end_text, instruction.end_ids + instruction.token_ids
    before = attempt.prompt
    return replace(
        before,
        text=before.text + attempt.text + closing + instruction.text,
        prefill=instruction.prefill,
        token_ids=np.concatenate([before.token_ids, attempt.token_ids, ids]).astype(np.int32),
    )


def with_earlier(
    attempts: Sequence[Completion], scores: Sequence[RowScore], count: int
) -> tuple[list[Completion], list[RowScore]]:
    """The last attempt of each sample with its score; it has the earlier ones with theirs.

    Args:
      attempts: `count` of each sample, in the order of `sample_attempts`.
    """
    if count == 1:
        return list(attempts), list(scores)
    pairs = list(zip(attempts, scores, strict=True))
    samples = [pairs[start : start + count] for start in range(0, len(pairs), count)]
    return (
        [replace(last, earlier=tuple(earlier)) for *earlier, (last, _) in samples],
        [score for *_, (_, score) in samples],
    )
