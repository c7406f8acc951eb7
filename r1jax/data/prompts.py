"""Prompts ready for the sampler, and the order in which a run visits them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from r1jax.data.chat_template import Prompt, check_template, render_text, to_prompt
from r1jax.data.example import Example
from r1jax.data.order import Walk, fingerprint, id_bytes
from r1jax.data.tokenizers import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1jax.settings.data import DataSection

_BATCH = 4096  # Texts per tokenizer call: large enough to be fast, small enough for memory.


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What became of a dataset's examples.

    Attributes:
        total: Examples that were rendered.
        too_long: Those dropped for having more than `max_prompt_tokens` tokens.
        longest: Tokens of the longest example, dropped ones included.
    """

    total: int
    too_long: int
    longest: int

    def __str__(self) -> str:
        kept = f"{self.total - self.too_long} of {self.total} prompts"
        if not self.too_long:
            return f"{kept}, the longest has {self.longest} tokens"
        return f"{kept}; {self.too_long} too long (the longest has {self.longest} tokens)"


def encode_prompts(
    examples: Sequence[Example], section: DataSection, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], PromptReport]:
    """Renders and encodes every example; drops and counts those that are too long.

    Returns:
        The prompts in the order of `examples`, each of 1 .. `section.max_prompt_tokens` tokens.

    Raises:
        ValueError: all prompts are too long, one has no tokens, or a template does not apply.
    """
    check_template(section)
    prompts: list[Prompt] = []
    longest = total = 0
    for start in range(0, len(examples), _BATCH):
        batch = [examples[i] for i in range(start, min(start + _BATCH, len(examples)))]
        rendered = [render_text(example, section, tokenizer) for example in batch]
        encoded = encode_texts([text for text, _ in rendered], tokenizer)
        for example, (text, prefill), ids in zip(batch, rendered, encoded, strict=True):
            if not ids:
                raise ValueError(
                    f"{section.source}: row {example.id} has an empty prompt; the sampler needs at "
                    "least one token. Use another template or remove the row."
                )
            total, longest = total + 1, max(longest, len(ids))
            if len(ids) <= section.max_prompt_tokens:
                prompts.append(to_prompt(example, text, prefill, ids))
    if not total:
        raise ValueError(f"{section.source}: there are no examples to make prompts of")
    if not prompts:
        raise ValueError(
            f"{section.source}: all {total} prompts have more than max_prompt_tokens = "
            f"{section.max_prompt_tokens} tokens (the longest has {longest})"
        )
    return prompts, PromptReport(total=total, too_long=total - len(prompts), longest=longest)


class Taken(NamedTuple):
    """Prompts, and for each how often it occurs before in the same take, on any process.

    A take that crosses the end of an epoch, or is longer than one, holds some prompts twice; they
    must not be given the same random numbers.
    """

    prompts: list[Prompt]
    repeats: list[int]


class PromptIterator:
    """An endless, seeded, resumable walk over prompts, sharded by process (see `Walk`)."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """
        Args:
            prompts: The same on every process.
            seed: Decides the order; at least 0.
            process_index, process_count: Which contiguous slice of each take is this process's.
        """
        if not prompts:
            raise ValueError("PromptIterator needs at least one prompt")
        self._prompts = prompts
        self._walk = Walk(
            len(prompts),
            seed=seed,
            fingerprint=fingerprint(
                (prompt.id, (id_bytes(prompt.token_ids), prompt.answer.encode()))
                for prompt in prompts
            ),
            process_index=process_index,
            process_count=process_count,
        )

    def take(self, n_global: int) -> Taken:
        """The next `n_global` prompts of the global order; returns this process's slice of them.

        Raises:
            ValueError: `n_global` is not a positive multiple of the process count.
        """
        taken, own = self._walk.take(n_global)
        seen: Counter[int] = Counter()
        repeats = []
        for index in taken:
            repeats.append(seen[index])
            seen[index] += 1
        return Taken([self._prompts[i] for i in taken[own]], repeats[own])

    def state(self) -> dict[str, Any]:
        """Where the walk is, as JSON; the same on every process."""
        return self._walk.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
            ValueError: the state belongs to other prompts or another seed.
        """
        self._walk.restore(state)
