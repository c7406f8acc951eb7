"""Sampling batches of prompts: from the host's prompts to the device's samples and back."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from r1jax.data.padded_rows import bucket
from r1jax.data.prompts import Prompt
from r1jax.files import JsonObject
from r1jax.metrics.heartbeat import span
from r1jax.models import Decoder
from r1jax.models.parameters import Params
from r1jax.processes import (
    gather,
    max_over_processes,
    min_over_processes,
    process_batch_slice,
)
from r1jax.rewards import RewardInput, RowScore
from r1jax.run.models import LanguageModel
from r1jax.sampler import Finish, GenerateOptions, Prompts, Sampling, StopSearch
from r1jax.sampler.queue import (
    PromptFeed,
    QueuedPrompt,
    QueueFigures,
    QueueSample,
    default_slots,
    sample_queue,
)
from r1jax.settings.sampling import SamplingSection
from r1jax.sharding import Layout, batch_slices, from_process_rows, process_batch_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Hidden tests of a program may be megabytes, and would be stored with each of its samples.
_STORED_CHARACTERS = 4000


@dataclass(frozen=True)
class Completion:
    """One sample of one prompt.

    token_ids, sampler_log_probs: [length], EOS included; the log-probs are those of the
        distribution that was drawn from.
    drafted, accepted: tokens that were drafted for it, and those of them that stayed.
    experts: int [prompt + length, layers * k], which each token of the prompt and of the completion
        went to, where they were recorded.
    earlier: attempts before it at the same question, which the prompt holds, with their scores.
    """

    prompt: Prompt
    sample: int
    token_ids: np.ndarray
    sampler_log_probs: np.ndarray
    finish: Finish
    text: str
    drafted: int = 0
    accepted: int = 0
    experts: np.ndarray | None = None
    earlier: tuple[tuple[Completion, RowScore], ...] = ()

    def reward_input(self, step: int = 0, max_steps: int = 0) -> RewardInput:
        """The row that rewards see: the prompt's prefilled `<think>` belongs to the answer."""
        return RewardInput(
            prompt=self.prompt.text,
            completion=self.prompt.prefill + self.text,
            answer=self.prompt.answer,
            domain=self.prompt.domain,
            truncated=self.finish == Finish.LENGTH,
            question=self.prompt.question,
            columns=self.prompt.columns,
            token_ids=self.token_ids.data,  # a list only where a reward reads it
            length=len(self.token_ids),
            step=step,
            max_steps=max_steps,
        )

    def row(self, score: RowScore, step: int) -> JsonObject:
        """The row of samples.jsonl; `details` only where a reward has something to say.

        Of a long reference answer it holds the beginning; the dataset has the whole. Of several
        attempts it is the last one's, behind the question's prompt, and `turns` has all of them.
        """
        first = self.earlier[0][0].prompt if self.earlier else self.prompt
        details = {n: part.detail for n, part in score.parts.items() if part.detail is not None}
        return {
            "step": step,
            "problem_id": self.prompt.id,
            "sample": self.sample,
            "domain": self.prompt.domain,
            "prompt": first.text,
            "completion": self.text,
            "answer": self.prompt.answer[:_STORED_CHARACTERS],
            "reward": score.reward,
            "parts": {name: part.reward for name, part in score.parts.items()},
            "outcome": str(score.outcome),
            "extracted": score.extracted,
            **({"details": details} if details else {}),
            "length": len(self.token_ids),
            "finish_reason": self.finish.name.lower(),
            **({"turns": self._turns(score)} if self.earlier else {}),
        }

    def _turns(self, score: RowScore) -> list[JsonObject]:
        """All attempts, and the text that stands between them as the model reads it."""
        turns: list[JsonObject] = []
        before: Completion | None = None
        for attempt, its_score in (*self.earlier, (self, score)):
            if before is not None:
                text = attempt.prompt.text[len(before.prompt.text) + len(before.text) :]
                turns.append({"role": "user", "text": text})
            before = attempt
            turns.append(
                {
                    "role": "assistant",
                    "text": attempt.text,
                    "reward": its_score.reward,
                    "outcome": str(its_score.outcome),
                    "extracted": its_score.extracted,
                    "length": len(attempt.token_ids),
                    "finish_reason": attempt.finish.name.lower(),
                }
            )
        return turns


def stop_search(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> StopSearch:
    """Finds where stop strings end, in tokens."""
    return text_search(tokenizer, lambda text: any(string in text for string in strings))


def text_search(tokenizer: PreTrainedTokenizerBase, is_end: Callable[[str], bool]) -> StopSearch:
    """Finds the first tokens whose text ends a sample; text is only looked at, ids are never
    re-encoded.

    is_end: of a text; whatever follows it, the answer stays the same.
    """

    def contains(tokens: np.ndarray) -> bool:
        return is_end(decode(tokenizer, tokens))

    def end(tokens: np.ndarray) -> int:
        if not contains(tokens):
            return -1
        low, high = 0, len(tokens)  # a prefix of `high` tokens contains one, of `low` none
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if contains(tokens[:middle]) else (middle, high)
        return high

    def search(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Per row [time] the number of tokens up to the first end, or -1."""
        ends = [end(row[:n]) for row, n in zip(tokens, lengths, strict=True)]
        return np.asarray(ends, np.int32)

    return search


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray) -> str:
    """The text of token ids [time]."""
    return str(tokenizer.decode(token_ids.tolist(), clean_up_tokenization_spaces=False))


def generate_options(
    sampler: LanguageModel,
    section: SamplingSection,
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    step: int = 0,
    record_experts: bool = False,
) -> GenerateOptions:
    """Options of the sampler for a model and the sampling settings of a config."""
    return GenerateOptions(
        samples=samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        step=step,
        sampling=Sampling(section.temperature, section.top_p, section.top_k, section.min_p),
        eos_ids=sampler.eos_ids,
        stop=stop_search(sampler.tokenizer, section.stop) if section.stop else None,
        speculative=section.speculative,
        record_experts=record_experts,
        slots=section.slots,
        cache_tokens=section.cache_tokens,
    )


def pad_prompts(
    prompts: Sequence[Prompt],
    model: Decoder,
    rows: int | None = None,
    first_samples: Sequence[int] | None = None,
) -> Prompts:
    """Right-padded arrays on the mesh.

    The last prompt is repeated up to `rows`, and up to a multiple of the mesh's split. Every
    process gives its own share of the prompts, all of them equally many.

    Args:
      first_samples: index of each prompt's first sample; default: 0.
    """
    layout = model.layout
    shards = layout.shards("batch") // process_batch_slice(layout).count
    count = -(-max(len(prompts), rows or 0) // shards) * shards
    filled = [*prompts, *[prompts[-1]] * (count - len(prompts))]
    time = bucket(max_over_processes(max(len(p.token_ids) for p in filled), layout))
    tokens = np.zeros((count, time), np.int32)
    for row, prompt in zip(tokens, filled, strict=True):
        row[: len(prompt.token_ids)] = prompt.token_ids
    lengths = np.asarray([len(p.token_ids) for p in filled], np.int32)
    ids = np.asarray([p.id for p in filled], np.uint32)
    firsts = np.zeros(count, np.int32)
    if first_samples:
        firsts[: len(first_samples)] = first_samples
    return Prompts(*(from_process_rows(leaf, layout) for leaf in (tokens, lengths, ids, firsts)))


QUEUE_BATCHES = 8
"""Batches of a queue, where a stage can resume behind a queue.

How the sums over a sample's keys are split depends on when it was given a slot, and with it their
rounding. So what a run resumes with is a whole queue, of the same prompts as before.
"""


def sample_prompts(
    params: Params,
    prompts: Sequence[Prompt],
    sampler: LanguageModel,
    options: GenerateOptions,
    *,
    batch: int,
    first_samples: Sequence[int] | None = None,
    figures: QueueFigures | None = None,
) -> Iterator[list[tuple[int, Completion]]]:
    """Sample this process's prompts; gives completions in the order in which they end.

    Every process takes as many lists, some of which may be empty.

    Args:
      batch: prompts of this process whose samples the memory is planned for, all at once.
      first_samples: see `pad_prompts`.
      figures: is added to.

    Returns:
      Each completion with its index, prompt * samples + sample.
    """
    firsts = [0] * len(prompts) if first_samples is None else first_samples
    model, count = sampler.decoder, max_over_processes(len(prompts), sampler.decoder.layout)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    rounds = sample_queue(
        params,
        [_queued(prompt, first) for prompt, first in zip(prompts, firsts, strict=True)],
        model,
        _with_slots(options, model, count, batch),
        prompt_tokens=bucket(max_over_processes(max(lengths, default=1), model.layout)),
        lengths_of_slices=gather([lengths], model.layout),
        figures=figures,
    )
    return _completions(rounds, list(zip(prompts, firsts, strict=True)), sampler, options.samples)


@dataclass(frozen=True)
class FollowingPrompts:
    """Prompts that are decided on as their queue goes on, each with the index of its first sample.

    take: as `PromptFeed.following`. at_once: prompts of a process at first; which slots there are
    follows from it, see `sample_prompts` for `batch`. longest: tokens of a prompt.
    """

    take: Callable[[bool], Sequence[Sequence[tuple[Prompt, int]]] | None]
    at_once: int
    batch: int
    longest: int


def sample_following(
    params: Params,
    following: FollowingPrompts,
    sampler: LanguageModel,
    options: GenerateOptions,
    *,
    figures: QueueFigures | None = None,
) -> Iterator[list[tuple[int, Completion]]]:
    """As `sample_prompts`, of prompts that follow; of this process they have the indices."""
    model = sampler.decoder
    own = batch_slices(model.layout).index(process_batch_parts(model.layout))
    prompts: list[tuple[Prompt, int]] = []

    def take(idle: bool) -> list[list[QueuedPrompt]] | None:
        slices = following.take(idle)
        if slices is None:
            return None
        prompts.extend(slices[own])
        return [[_queued(*each) for each in of_slice] for of_slice in slices]

    rounds = sample_queue(
        params,
        PromptFeed(take, following.at_once),
        model,
        _with_slots(options, model, following.at_once, following.batch),
        prompt_tokens=bucket(following.longest),
        figures=figures,
    )
    return _completions(rounds, prompts, sampler, options.samples)


def _with_slots(
    options: GenerateOptions, model: Decoder, prompts: int, batch: int
) -> GenerateOptions:
    """Options with slots for so many prompts of a process, where they do not say how many."""
    if options.slots is not None:
        return options
    processes = process_batch_slice(model.layout).count
    everywhere, at_once = (n * processes * options.samples for n in (prompts, batch))
    slots = default_slots(everywhere, at_once, model.layout.shards("slots"))
    return replace(options, slots=slots)


def _queued(prompt: Prompt, first: int) -> QueuedPrompt:
    return QueuedPrompt(np.asarray(prompt.token_ids, np.int32), prompt.id, first)


def _completions(
    rounds: Iterator[list[QueueSample]],
    prompts: Sequence[tuple[Prompt, int]],
    sampler: LanguageModel,
    samples: int,
) -> Iterator[list[tuple[int, Completion]]]:
    """Completions of the samples of a queue of prompts, each with the index of its first sample."""
    while True:
        with span("rollout"):
            ended = next(rounds, None)
        if ended is None:
            return
        texts = completion_texts(sampler, [(sample.tokens, sample.finish) for sample in ended])
        yield [
            (
                sample.prompt * samples + sample.sample,
                Completion(
                    prompts[sample.prompt][0],
                    prompts[sample.prompt][1] + sample.sample,
                    sample.tokens,
                    sample.sampling_log_probs,
                    sample.finish,
                    text,
                    drafted=sample.drafted,
                    accepted=sample.accepted,
                    experts=sample.experts,
                ),
            )
            for sample, text in zip(ended, texts, strict=True)
        ]


def completion_texts(
    sampler: LanguageModel, samples: Sequence[tuple[np.ndarray, Finish]]
) -> list[str]:
    """The texts of token ids [length], each with why it ended; an EOS is not part of them."""
    without_eos = [ids[: len(ids) - (finish == Finish.EOS)].tolist() for ids, finish in samples]
    if not without_eos:
        return []
    return sampler.tokenizer.batch_decode(without_eos, clean_up_tokenization_spaces=False)


def whole_batches(
    rounds: Iterator[list[tuple[int, Completion]]], sizes: Sequence[int], layout: Layout
) -> Iterator[list[Completion]]:
    """Consecutive completions, each batch as soon as all processes have it and all before it.

    Args:
      rounds: from `sample_prompts`.
      sizes: of the batches, in completions of this process.
    """
    ends = list(accumulate(sizes))
    waiting: dict[int, Completion] = {}
    whole = given = 0  # completions without a gap from the first on; batches
    for ended in rounds:
        waiting |= dict(ended)
        while whole in waiting:
            whole += 1
        complete = int(min_over_processes(bisect_right(ends, whole), layout))
        for number in range(given, complete):
            first = ends[number - 1] if number else 0
            yield [waiting.pop(i) for i in range(first, ends[number])]
        given = complete
