"""What the slots of the sampler consist of: shapes, and arrays on the devices.

The first dimension of all arrays is the shard: the devices of a shard have a queue, slots and pages
of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.models.paged_cache import PagedCache, PageList

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt32


@dataclass(frozen=True)
class SlotShape:
    """What is static in the programs of the slots: each value compiles one.

    slots, prompts, pages: of a shard, and as many prompts as are there at once.
    samples: of each prompt.
    prompt_tokens, max_new_tokens: at most.
    page: tokens of a page.
    steps: between two returns to the host.
    speculative: the module for multi-token prediction drafts.
    suffix_tokens: that are read of a prompt whose other pages are there, at most, in whole pages;
        0: no pages are kept for further prompts.
    """

    slots: int
    prompts: int
    pages: int
    samples: int
    prompt_tokens: int
    max_new_tokens: int
    page: int
    steps: int
    record_experts: bool = False
    speculative: bool = False
    suffix_tokens: int = 0

    @property
    def entries(self) -> int:
        """Of the current pages, that a step fills."""
        return 2 if self.speculative else 1

    @property
    def columns(self) -> int:
        """Tokens that a step gives at most: with a draft two, after the first of a sample."""
        return 3 if self.speculative else 1

    @property
    def prompt_pages(self) -> int:
        return -(-self.prompt_tokens // self.page)

    @property
    def sample_pages(self) -> int:
        """Full pages of a sample: it may begin and end within a page."""
        return -(-self.entries * self.max_new_tokens // self.page)

    @property
    def least_pages(self) -> int:
        """With which a single slot can decode any sample of any prompt."""
        return self.prompt_pages + self.sample_pages + 1


@struct.dataclass
class DrawnTokens:
    """Tokens, and their log-probs as of `Samples`."""

    tokens: Int[Array, "*shape"]
    policy_log_probs: Float[Array, "*shape"]
    sampling_log_probs: Float[Array, "*shape"]


@struct.dataclass
class PromptEntries:
    """The prompts that are on the devices now; an entry is free before and after.

    tables: pages of the KV cache; -1 behind them.
    hidden: activations that the first token of every sample is drawn from.
    done: samples that have ended.
    first_tokens: of each sample, where drafts follow them.
    """

    tables: Int[Array, "shards prompts pages"]
    lengths: Int[Array, "shards prompts"]
    hidden: Float[Array, "shards prompts hidden"]
    ids: UInt32[Array, "shards prompts"]
    first_samples: Int[Array, "shards prompts"]
    done: Int[Array, "shards prompts"]
    first_tokens: DrawnTokens | None = None


@struct.dataclass
class Drafting:
    """Of each slot, what the module for multi-token prediction goes on from.

    tokens: what the last step gave. The second counts if `accepted`; the last that counts is the
        token that the decoder has not yet read.
    hidden: the decoder's activations before each of `tokens`.
    accepted: whether the last step's draft was accepted.
    started: the sample has its first token alone, which is not yet in the log.
    """

    tokens: Int[Array, "shards slots 2"]
    hidden: Float[Array, "shards slots 2 hidden"]
    accepted: Bool[Array, "shards slots"]
    started: Bool[Array, "shards slots"]


@struct.dataclass
class SlotState:
    """Between two steps.

    step: since the beginning; the entry of the current pages that it writes first is
        (step * shape.entries) % page.
    hidden: activations that the next token of each slot is drawn from.
    running: whether a slot has a sample to go on with.
    request: prompt entry * samples + sample of the prompt.
    lengths: tokens that a slot's sample has.
    tables: its pages of the KV cache; -1 behind them.
    queue: requests that wait; in a ring, from `head` on.
    """

    step: Int[Array, ""]
    hidden: Float[Array, "shards slots hidden"]
    keys: Key[Array, "shards slots"]
    running: Bool[Array, "shards slots"]
    request: Int[Array, "shards slots"]
    lengths: Int[Array, "shards slots"]
    tables: Int[Array, "shards slots pages"]
    reads: PageList
    cache: PagedCache
    prompts: PromptEntries
    queue: Int[Array, "shards requests"]
    head: Int[Array, " shards"]
    queued: Int[Array, " shards"]
    drafting: Drafting | None = None


@struct.dataclass
class SlotLog:
    """What the slots drew, [shards, slots, steps * shape.columns].

    request: as of `SlotState`; -1 where a slot had none, or drew no token.
    index: of the token in its sample. 0 after a higher one: the sample began again.
    tokens, policy_log_probs, sampling_log_probs: as of `Samples`.
    ended: by an EOS.
    experts: of each token, where they are recorded.
    drafts: 1 where a draft was replaced by this token, 2 where it is the draft, else 0; where the
        module drafts.
    """

    request: Int[Array, "shards slots columns"]
    index: Int[Array, "shards slots columns"]
    tokens: Int[Array, "shards slots columns"]
    policy_log_probs: Float[Array, "shards slots columns"]
    sampling_log_probs: Float[Array, "shards slots columns"]
    ended: Bool[Array, "shards slots columns"]
    experts: Int[Array, "shards slots columns layers_k"] | None = None
    drafts: Int[Array, "shards slots columns"] | None = None


@struct.dataclass
class Status:
    """What the host reads to go on, the same in all processes.

    steps: that were made. busy: slots that had a sample, summed over them.
    done: ended samples of each prompt entry. running, queued: samples.
    free, live: pages of the pool that are free; tokens in the cache.
    """

    steps: Int[Array, ""]
    busy: Int[Array, ""]
    done: Int[Array, "shards prompts"]
    running: Int[Array, " shards"]
    queued: Int[Array, " shards"]
    free: Int[Array, " shards"]
    live: Int[Array, " shards"]


@struct.dataclass
class NewPrompts:
    """Prompts to prefill, equally many rows for each shard, shard by shard.

    tokens: right-padded.
    entry: where they go; a row whose entry is not below the number of entries holds no prompt.
    """

    tokens: Int[Array, "shards_rows time"]
    lengths: Int[Array, " shards_rows"]
    ids: UInt32[Array, " shards_rows"]
    first_samples: Int[Array, " shards_rows"]
    entry: Int[Array, " shards_rows"]


@struct.dataclass
class NewSuffixes:
    """Prompts whose first pages are those of others.

    prompts: `tokens` are those behind these pages, `lengths` are of the whole prompts.
    bases: the entry that each has its first pages from. shared: how many.
    """

    prompts: NewPrompts
    bases: Int[Array, " shards_rows"]
    shared: Int[Array, " shards_rows"]


def of_prompt(
    rows: Shaped[Array, "shards prompts *row"], state: SlotState, shape: SlotShape
) -> Shaped[Array, "shards slots *row"]:
    """Rows of prompts, of the prompt of each slot's sample."""
    entry = jnp.maximum(state.request, 0) // shape.samples
    return jax.vmap(lambda rows, entry: rows[entry])(rows, entry)
