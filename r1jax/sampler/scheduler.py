"""Which prompt of a queue goes to which shard, and when: the host's decisions.

What is decided follows from the samples alone, so all processes decide the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from r1jax.sampler.prompt_pages import Begun, KnownPrompts, PromptPages
from r1jax.sampler.slot_state import SlotShape, Status


class Assigned(NamedTuple):
    """A prompt that is prefilled next, and the entry that it is put in."""

    prompt: int
    entry: int
    begun: Begun


class Scheduler:
    """Which prompt goes to which shard of a slice of the batch, and when.

    All processes follow all slices, by figures that all of them have.

    shards: indices of the slice's shards among all. known: the slice's prompts.
    """

    def __init__(self, shape: SlotShape, shards: Sequence[int]) -> None:
        self.shards = shards
        self.known = KnownPrompts()
        self._shape = shape
        self._held = [PromptPages(shape, self.known) for _ in shards]
        self._waiting: deque[int] = deque()
        self._done = np.zeros((len(shards), shape.prompts), int)
        self._queued = [0] * len(shards)
        self._running = [0] * len(shards)
        self._wanted = shape.slots  # samples that should wait in a queue

    @property
    def entries(self) -> list[list[int]]:
        """The prompt of each entry of each shard, -1: none."""
        return [held.entries for held in self._held]

    def add(self, lengths: Sequence[int], extends: Sequence[int | None]) -> None:
        """Prompts of these lengths, behind those that wait."""
        if self._shape.suffix_tokens and not self.busy():
            self._wanted = self._shape.slots  # the slots are to be filled anew
        self._waiting.extend(self.known.add(lengths, extends))

    def end_prompts(self) -> None:
        """Drop, or keep for others, the entries of which all samples have ended."""
        for held, done in zip(self._held, self._done, strict=True):
            for entry in held.active():
                if done[entry] == self._shape.samples:
                    held.end(entry)
                    done[entry] = 0

    def released(self, first: np.ndarray) -> None:
        """Put into [shards of the mesh, entries] from which page on their tables are free."""
        for held, shard in zip(self._held, self.shards, strict=True):
            for entry, page in held.released().items():
                first[shard, entry] = page

    def make_room(self) -> None:
        """Pages for all that the samples may fill until the next return: what is only kept never
        makes a sample wait, or begin again."""
        fills = -(-self._shape.steps * self._shape.entries // self._shape.page)
        for i, held in enumerate(self._held):
            samples = min(self._shape.slots, self._queued[i] + self._running[i])
            held.make_room(samples * (fills + 1))

    def _next(self, rows: Sequence[Sequence[Assigned]]) -> tuple[int, Begun] | None:
        """Where the next prompt goes, and what is there of it: of the shards that have room, one
        with the least to do. One that has to read more of the prompt than another only takes it if
        a slot of it has nothing to do."""
        if not self._waiting:
            return None
        prompt, slots = self._waiting[0], self._shape.slots
        reserve = self._shape.sample_pages + slots
        begun = [held.begun(prompt) for held in self._held]
        load = [sum(both) for both in zip(self._queued, self._running, strict=True)]
        most = max(each.pages for each in begun)

        def has_row(i: int) -> bool:
            suffix = begun[i].pages > 0
            alike = sum((row.begun.pages > 0) == suffix for row in rows[i])
            return alike < rows_at_once(self._shape)

        def has_room(i: int) -> bool:
            return (
                self._queued[i] < self._wanted
                and (begun[i].pages == most or load[i] < slots)
                and (most > 0 or has_row(i))
                and self._held[i].has_room(prompt, begun[i], reserve)
            )

        def order(i: int) -> tuple[bool, int, int]:
            return load[i] >= slots, -begun[i].pages, load[i]

        best = min(filter(has_room, range(len(self.shards))), key=order, default=None)
        if best is None or not has_row(best):
            return None
        # Suffixes that are read together cannot go on from each other.
        base = begun[best].entry
        if any(row.entry == base and row.begun.pages for row in rows[best]):
            return None
        return best, begun[best]

    def wants(self) -> bool:
        return self._next([[]] * len(self.shards)) is not None

    def assign(self) -> list[list[Assigned]]:
        """For each shard the next prompts to prefill."""
        rows: list[list[Assigned]] = [[] for _ in self.shards]
        while (following := self._next(rows)) is not None:
            i, begun = following
            prompt = self._waiting.popleft()
            entry = self._held[i].add(prompt, begun)
            self._queued[i] += self._shape.samples
            rows[i].append(Assigned(prompt, entry, begun))
        return rows

    def longest(self, rows: Sequence[Sequence[Assigned]]) -> int:
        """Tokens of the longest of these prompts."""
        return max((self.known.lengths[row.prompt] for of in rows for row in of), default=0)

    def busy(self) -> bool:
        return bool(self._waiting) or any(self._queued) or any(self._running)

    def has_more(self) -> bool:
        """Whether prompts wait for nothing but a shorter queue."""
        queued, self._queued = self._queued, [0] * len(self.shards)
        more = self.wants()
        self._queued = queued
        return more

    def learn(self, status: Status) -> None:
        """What the devices have come to."""
        taken = 0
        for i, shard in enumerate(self.shards):
            taken = max(taken, self._queued[i] - int(status.queued[shard]))
            self._done[i] = status.done[shard]
            self._held[i].free = int(status.free[shard])
            self._queued[i] = int(status.queued[shard])
            self._running[i] = int(status.running[shard])
        # As many as may end until the next return, with a margin: the shorter the queues, the more
        # evenly the shards end.
        self._wanted = max(1, taken + taken // 2)


def rows_at_once(shape: SlotShape) -> int:
    """Prompts of a shard that are prefilled together."""
    return -(-shape.slots // (2 * shape.samples))
