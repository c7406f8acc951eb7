"""Which prompts the entries of a shard hold, and whose pages they share: the host's side.

A prompt that goes on from an earlier one has the pages that this one has filled as its own first
ones, and reads nothing but what follows them. So all full pages of a tree of beginnings are there
once. A page that is not full is its prompt's alone, and is free as soon as its samples have ended:
what goes on from the prompt reads those tokens again, in places that would be padding otherwise.

Full pages are kept until they are wanted for something else; then those go first that were used
longest ago and that no other prompt builds on. All of it follows from figures that all processes
have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from r1jax.sampler.slot_state import SlotShape


@dataclass
class KnownPrompts:
    """The prompts of a queue, those that are still to come at the end.

    lengths: in tokens. extends: which earlier prompt begins each of them; -1: none does.
    """

    lengths: list[int] = field(default_factory=list)
    extends: list[int] = field(default_factory=list)

    def add(self, lengths: Sequence[int], extends: Sequence[int | None]) -> range:
        """Further prompts; gives their indices.

        Raises ValueError: a prompt goes on from one that is not before it, or is longer.
        """
        first = len(self.lengths)
        for index, (length, before) in enumerate(zip(lengths, extends, strict=True), start=first):
            if before is not None and not (0 <= before < index and self.lengths[before] <= length):
                raise ValueError(f"prompt {index} of {length} tokens cannot extend prompt {before}")
            self.lengths.append(length)
            self.extends.append(-1 if before is None else before)
        return range(first, len(self.lengths))

    def beginnings(self, prompt: int) -> Iterator[int]:
        """The prompts that this one goes on from, the longest first."""
        while (prompt := self.extends[prompt]) >= 0:
            yield prompt


class Begun(NamedTuple):
    """What a shard has of a prompt: the first `pages` pages of an entry's table."""

    entry: int = -1
    pages: int = 0


@dataclass
class _Entry:
    """A prompt that is on the devices.

    base: the entry whose pages its table begins with, `shared` of them; -1: none.
    pages: of its table. bases_of: entries whose base it is.
    live: whether its samples are under way, added to the number of such entries that build on it.
    used: when it was last built on.
    """

    prompt: int
    base: int
    shared: int
    pages: int
    used: int
    bases_of: int = 0
    live: int = 0
    active: bool = True

    @property
    def own(self) -> int:
        return self.pages - self.shared


class PromptPages:
    """The entries of a shard.

    entries: the prompt of each; -1: none. free: pages of the pool, as far as the host knows.
    """

    def __init__(self, shape: SlotShape, known: KnownPrompts) -> None:
        self.entries = [-1] * shape.prompts
        self.free = shape.pages
        self._shape, self._known = shape, known
        self._held: dict[int, _Entry] = {}
        self._of_prompt: dict[int, int] = {}
        self._released: dict[int, int] = {}
        self._clock = 0

    def active(self) -> list[int]:
        """The entries whose samples are under way."""
        return [entry for entry, each in self._held.items() if each.active]

    def begun(self, prompt: int) -> Begun:
        """Where pages of a prompt's beginning are, as far as it pays to go on from them."""
        if not self._shape.suffix_tokens:
            return Begun()
        length, page = self._known.lengths[prompt], self._shape.page
        for before in self._known.beginnings(prompt):
            if (entry := self._of_prompt.get(before)) is None:
                continue
            # One token at least is read: the samples begin with what is computed of it.
            pages = min(self._known.lengths[before], length - 1) // page
            if not pages or length - pages * page > self._shape.suffix_tokens:
                return Begun()
            while pages <= self._held[entry].shared:  # they are those of its base
                entry = self._held[entry].base
            return Begun(entry, pages)
        return Begun()

    def has_room(self, prompt: int, begun: Begun, reserve: int) -> bool:
        """Whether there are an entry and pages for it, where others that are done make room.

        reserve: pages that stay free where samples are under way.
        """
        wanted = self._pages(prompt) - begun.pages
        wanted += reserve if any(each.active for each in self._held.values()) else 0
        empty = -1 in self.entries
        if wanted <= self.free and empty:
            return True
        idle = {entry for entry, each in self._held.items() if not each.live}
        idle.difference_update(self._line(begun.entry))
        pages = self.free + sum(self._held[entry].own for entry in idle)
        return wanted <= pages and (empty or bool(idle))

    def add(self, prompt: int, begun: Begun) -> int:
        """The entry that the prompt is put in, for which there has to be room."""
        self._clock += 1
        for entry in self._line(begun.entry):
            self._held[entry].live += 1
            self._held[entry].used = self._clock
        own = self._pages(prompt) - begun.pages
        while own > self.free or -1 not in self.entries:
            self._drop(self._longest_unused())
        entry = self.entries.index(-1)
        self.entries[entry] = prompt
        self._held[entry] = _Entry(
            prompt, begun.entry, begun.pages, self._pages(prompt), self._clock, live=1
        )
        if begun.entry >= 0:
            self._held[begun.entry].bases_of += 1
        self._of_prompt[prompt] = entry
        self.free -= own
        return entry

    def end(self, entry: int) -> None:
        """All samples of the entry have ended: its full pages are kept, if any are."""
        held, full = self._held[entry], 0
        held.active = False
        for each in (entry, *self._line(held.base)):
            self._held[each].live -= 1
        if self._shape.suffix_tokens:
            full = self._known.lengths[held.prompt] // self._shape.page
        if not held.bases_of and (full <= held.shared or self._is_copy(held.prompt)):
            self._drop(entry)
        elif full < held.pages:
            self._release(entry, full)
            held.pages = full

    def make_room(self, pages: int) -> None:
        """Keep so many pages free, as far as those that are only kept suffice for it."""
        while self.free < pages and (entry := self._longest_unused()) >= 0:
            self._drop(entry)

    def released(self) -> dict[int, int]:
        """Entries whose pages are free now, from which page of their table on. Of each call, since
        the last one; the devices are told before anything is added."""
        released, self._released = self._released, {}
        return released

    def _pages(self, prompt: int) -> int:
        return -(-self._known.lengths[prompt] // self._shape.page)

    def _line(self, entry: int) -> Iterator[int]:
        """The entry, its base, and so on."""
        while entry >= 0:
            yield entry
            entry = self._held[entry].base

    def _is_copy(self, prompt: int) -> bool:
        """Whether the same tokens are there for a prompt before it, too."""
        before = self._known.extends[prompt]
        return before in self._of_prompt and (
            self._known.lengths[before] == self._known.lengths[prompt]
        )

    def _longest_unused(self) -> int:
        """The entry to drop next; -1: none can be."""
        unused = (
            (each.used, entry)
            for entry, each in self._held.items()
            if not each.live and not each.bases_of
        )
        return min(unused, default=(0, -1))[1]

    def _drop(self, entry: int) -> None:
        held = self._held.pop(entry)
        self.entries[entry] = -1
        del self._of_prompt[held.prompt]
        if held.base >= 0:
            self._held[held.base].bases_of -= 1
        self._release(entry, held.shared, held.pages)

    def _release(self, entry: int, first: int, pages: int | None = None) -> None:
        """Its pages from `first` on are free."""
        pages = self._held[entry].pages if pages is None else pages
        self.free += pages - first
        self._released[entry] = min(first, self._released.get(entry, first))
