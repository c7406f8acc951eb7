"""Completions on the host, and the rows of samples.jsonl."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from r1jax.data import Prompt
from r1jax.files import JsonObject
from r1jax.rewards import Answered, RowScore
from r1jax.sampler import Finish

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

    def row(self, score: RowScore, step: int) -> JsonObject:
        """The row of samples.jsonl; `details` only where a reward has something to say.

        Of a long reference answer it holds the beginning; the dataset has the whole.
        """
        details = {n: part.detail for n, part in score.parts.items() if part.detail is not None}
        return {
            "step": step,
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
