"""Between the device's samples and the host's rows: sampling batches of prompts, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from r1jax.data import Prompt
from r1jax.metrics import span
from r1jax.models import Decoder
from r1jax.processes import max_over_processes, process_batch_slice
from r1jax.rewards import Answered, RowScore
from r1jax.sampler import Finish, GenerateOptions, Prompts, Sampling, StopSearch, generate
from r1jax.settings.rewards import RewardSection
from r1jax.settings.sampling import SamplingSection
from r1jax.sharding import from_process_rows, move_rows, to_process_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Hidden tests of a program may be megabytes, and would be stored with each of its samples.
_STORED_CHARACTERS = 4000


@dataclass(frozen=True)
class Completion:
    """One sample of one prompt, on the host.

    token_ids, sampler_log_probs: [length], EOS included; the log-probs are those of the
    distribution that was drawn from.
    drafted, accepted: how many tokens were drafted for it, and how many of them stayed.
    experts: int [prompt + length, layers * k], which each token of the prompt and of the completion
        went to, where they were recorded.
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

    def answered(self) -> Answered:
        """The row that rewards see: the prompt's prefilled `<think>` belongs to the answer."""
        return Answered(
            prompt=self.prompt.text,
            completion=self.prompt.prefill + self.text,
            answer=self.prompt.answer,
            domain=self.prompt.domain,
            truncated=self.finish == Finish.LENGTH,
        )

    def row(self, score: RowScore, **extra: Any) -> dict[str, Any]:
        """The row of samples.jsonl; `details` only where a reward has something to say.

        Of a long reference answer it holds the beginning; the dataset has the whole.
        """
        details = {n: part.detail for n, part in score.parts.items() if part.detail is not None}
        return {
            **extra,
            "problem_id": self.prompt.id,
            "sample": self.sample,
            "domain": self.prompt.domain,
            "prompt": self.prompt.text,
            "completion": self.text,
            "answer": self.prompt.answer[:_STORED_CHARACTERS],
            "reward": score.reward,
            "parts": {name: part.reward for name, part in score.parts.items()},
            "outcome": str(score.outcome),
            "extracted": score.extracted,
            **({"details": details} if details else {}),
            "length": len(self.token_ids),
            "finish_reason": self.finish.name.lower(),
        }


def to_sampling(section: SamplingSection) -> Sampling:
    return Sampling(section.temperature, section.top_p, section.top_k, section.min_p)


def check_domains(
    stage: str, domains: Mapping[str, str], rewards: Mapping[str, RewardSection]
) -> None:
    """Raises ValueError for a domain (given with its dataset) that no reward judges."""
    limits = {name: reward.domains for name, reward in rewards.items()}
    for domain, data in domains.items():
        if not any(only is None or domain in only for only in limits.values()):
            raise ValueError(
                f"stages.{stage}: no reward is for the domain {domain!r} of data.{data}; add it to "
                f"the domains of one; there are {limits}"
            )


class StopStrings:
    """Finds where stop strings end, in tokens; text is only looked at, ids are never re-encoded."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = tuple(strings)

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        ends = [self._end(row[:n]) for row, n in zip(tokens, lengths, strict=True)]
        return np.asarray(ends, np.int32)

    def _end(self, tokens: np.ndarray) -> int:
        if not self._contains(tokens):
            return -1
        low, high = 0, len(tokens)  # a prefix of `high` tokens contains one, of `low` none
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._contains(tokens[:middle]) else (middle, high)
        return high

    def _contains(self, tokens: np.ndarray) -> bool:
        text = decode(self._tokenizer, tokens)
        return any(string in text for string in self._strings)


def stop_search(tokenizer: PreTrainedTokenizerBase, section: SamplingSection) -> StopSearch | None:
    return StopStrings(tokenizer, section.stop) if section.stop else None


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray) -> str:
    return str(tokenizer.decode(token_ids.tolist(), clean_up_tokenization_spaces=False))


def bucket(length: int, smallest: int = 16) -> int:
    """The next power of two: few distinct sizes, each of which compiles once."""
    size = smallest
    while size < length:
        size *= 2
    return size


def pad_prompts(
    prompts: Sequence[Prompt],
    model: Decoder,
    rows: int | None = None,
    firsts: Sequence[int] | None = None,
) -> Prompts:
    """Right-padded arrays on the mesh.

    The last prompt is repeated up to `rows`, and up to a multiple of the mesh's split. Every
    process gives its own share of the prompts, all of them equally many.

    Args:
      firsts: index of each prompt's first sample; default: 0.
    """
    layout = model.layout
    shards = layout.shards("batch") // process_batch_slice(layout).count
    count = -(-max(len(prompts), rows or 0) // shards) * shards
    filled = [*prompts, *[prompts[-1]] * (count - len(prompts))]
    time = bucket(max_over_processes(max(len(p.token_ids) for p in filled)))
    tokens = np.zeros((count, time), np.int32)
    for row, prompt in zip(tokens, filled, strict=True):
        row[: len(prompt.token_ids)] = prompt.token_ids
    lengths = np.asarray([len(p.token_ids) for p in filled], np.int32)
    ids = np.asarray([p.id for p in filled], np.uint32)
    starts = np.zeros(count, np.int32)
    starts[: len(prompts)] = 0 if firsts is None else firsts
    return Prompts(*(from_process_rows(leaf, layout) for leaf in (tokens, lengths, ids, starts)))


@span("rollout")
def sample_batch(
    params: Any,
    prompts: Sequence[Prompt],
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    options: GenerateOptions,
    *,
    rows: int | None = None,
    firsts: Sequence[int] | None = None,
) -> list[Completion]:
    """Sample every prompt and bring the completions to its process's host, prompt by prompt.

    Args:
      rows: pad the batch to so many prompts (a smaller last batch compiles nothing new).
      firsts: index of each prompt's first sample; default: 0.
    """
    samples = generate(params, pad_prompts(prompts, model, rows, firsts), model, options)
    if model.layout.shards("sample") > 1:  # a process's devices may hold some samples of a prompt
        samples = move_rows(samples, model.layout)
    tokens, lengths, finish, log_probs = (
        to_process_rows(leaf)
        for leaf in (samples.tokens, samples.lengths, samples.finish, samples.sampling_log_probs)
    )
    drafted, accepted = (
        np.zeros_like(lengths) if leaf is None else to_process_rows(leaf)
        for leaf in (samples.drafted, samples.accepted)
    )
    experts = [
        None if leaf is None else to_process_rows(leaf)
        for leaf in (samples.prompt_experts, samples.experts)
    ]
    kept, texts_of = [], []
    for i in range(len(prompts)):
        for j in range(tokens.shape[1]):
            n, reason = int(lengths[i, j]), Finish(int(finish[i, j]))
            kept.append((i, j, n, reason))
            texts_of.append(tokens[i, j, : n - (reason == Finish.EOS)].tolist())

    def start(prompt: int) -> int:
        return 0 if firsts is None else firsts[prompt]

    def experts_of(prompt: int, sample: int, length: int) -> np.ndarray | None:
        asked, answered = experts
        if asked is None or answered is None:
            return None
        read = asked[prompt, : len(prompts[prompt].token_ids)]
        return np.concatenate([read, answered[prompt, sample, :length]])

    texts = tokenizer.batch_decode(texts_of, clean_up_tokenization_spaces=False)
    return [
        Completion(
            prompts[i],
            start(i) + j,
            tokens[i, j, :n],
            log_probs[i, j, :n],
            reason,
            text,
            drafted=int(drafted[i, j]),
            accepted=int(accepted[i, j]),
            experts=experts_of(i, j, n),
        )
        for (i, j, n, reason), text in zip(kept, texts, strict=True)
    ]
