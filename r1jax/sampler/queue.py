"""Sampling a queue of prompts on the host's side: prefill what is next, collect what has ended.

What is decided here follows from the samples alone, never from the time that something takes: the
same prompts give the same calls of the same programs in the same order, in every process.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from r1jax.models.config import Decoder
from r1jax.models.parameters import Params
from r1jax.sampler.samples import Finish, GenerateOptions, StopSearch
from r1jax.sampler.scheduler import Assigned, Scheduler, rows_at_once
from r1jax.sampler.slot_state import NewPrompts, NewSuffixes, SlotLog, SlotShape, SlotState, Status
from r1jax.sampler.slot_suffixes import extend_prompts, release_pages
from r1jax.sampler.slots import add_prompts, decode_and_refill, drop_prompts, empty_slots
from r1jax.sharding import (
    Layout,
    batch_slices,
    from_process_rows,
    process_batch_parts,
    to_process_rows,
)

_SLOTS = 64  # of a shard: fewer leave a device idle
_STEPS = 32  # between two returns to the host
_LEAST_ROW = 16  # tokens that a row of prompts is padded to at least, where pages are kept
_KEPT = 6  # prompts for each slot that are kept for others, as far as there are pages
_LARGEST_SHARE = 1.1  # of a shard's work, by the mean of all


@dataclass(frozen=True)
class QueuedPrompt:
    """A prompt to sample.

    token_ids: int32 [length], of one token at least.
    id, first_sample: as of `Prompts`.
    extends: index in the queue of an earlier prompt of the same slice whose tokens it begins with;
        with `GenerateOptions.extended_by` their pages are shared.
    """

    token_ids: np.ndarray
    id: int
    first_sample: int = 0
    extends: int | None = None


@dataclass(frozen=True)
class PromptFeed:
    """Prompts that are given as a queue goes on.

    following: called before each return to the devices with whether all samples so far have ended
        and are read; gives further prompts of each slice of the batch, or None: the queue ends
        with what is under way. All processes have to give the same, by what they have in common;
        of the prompts of others' slices `extends` and the number of tokens count.
    at_once: prompts of a slice that the shapes of the programs are for.
    """

    following: Callable[[bool], Sequence[Sequence[QueuedPrompt]] | None]
    at_once: int


@dataclass(frozen=True)
class QueueSample:
    """A finished sample of prompt `prompt` (its index in the queue).

    sample: its index among the prompt's samples of this queue.
    tokens, policy_log_probs, sampling_log_probs: [length], see `Samples`.
    experts: [prompt + length, layers * k], or None; see `Samples`.
    drafted, accepted: see `Samples`.
    """

    prompt: int
    sample: int
    tokens: np.ndarray
    policy_log_probs: np.ndarray
    sampling_log_probs: np.ndarray
    finish: Finish
    experts: np.ndarray | None = None
    drafted: int = 0
    accepted: int = 0


@dataclass
class QueueFigures:
    """What sampling a queue took.

    steps: of the decode loop. slot_steps: slots x steps. busy: slot steps in which a slot had a
    sample. repeated: tokens that were sampled again for want of pages. dropped: tokens of samples
    that nobody wants any more. prefilled: tokens of prompts that were read; shared: those whose
    pages were there.
    page_tokens, live_tokens: summed over returns to the host, memory of the pages in use and of the
    current pages, and tokens in it.
    """

    steps: int = 0
    slot_steps: int = 0
    busy: int = 0
    repeated: int = 0
    dropped: int = 0
    prefilled: int = 0
    shared: int = 0
    page_tokens: int = 0
    live_tokens: int = 0

    @property
    def slot_use(self) -> float:
        """Completion tokens for each slot and step."""
        return (self.busy - self.repeated - self.dropped) / max(self.slot_steps, 1)


def default_slots(samples: int, at_once: int, shards: int) -> int:
    """Slots over all devices, where the settings do not say how many.

    A quarter of the samples, so that one that ends is followed by another; more where that leaves
    devices idle; never more than a batch of the stage, which its memory is planned for.
    """
    return min(at_once, max(_SLOTS * shards, samples // 4))


def pieces_of_prompt(prompts: int, samples: int, shards: int) -> int:
    """Into how many pieces of equally many samples each prompt of a queue is split.

    A piece stays in one shard, which computes the prompt's KV cache. There are more than one where
    the shards would else get unequal shares: few prompts leave some of them without any.

    Args:
      prompts: of a slice of the batch. shards: of that slice.
    """
    for pieces in range(1, samples + 1):
        share = prompts * pieces / shards
        if samples % pieces == 0 and math.ceil(share) <= _LARGEST_SHARE * share:
            return pieces
    return samples


def slot_shape(
    model: Decoder, options: GenerateOptions, *, prompts: int, prompt_tokens: int
) -> SlotShape:
    """Shapes of the slots for so many prompts of a shard, each of at most `prompt_tokens`.

    Raises:
      ValueError: the token budget of the KV cache is too small for one sample.
    """
    shards, group = model.layout.shards("slots"), options.samples
    page = options.page or (16 if model.layout.platform == "cpu" else 64)
    page += page % 2 if options.speculative else 0  # drafts come in pairs
    wanted = _SLOTS * shards if options.slots is None else options.slots
    slots = max(1, min(-(-wanted // shards), prompts * group))
    at_hand = min(prompts, 2 * slots + 2)
    keeps = options.extended_by and not (options.speculative or options.record_experts)
    # What follows the full pages of a prompt begins within a page.
    suffix_tokens = -(-(page - 1 + options.extended_by) // page) * page if keeps else 0
    shape = SlotShape(
        slots=slots,
        prompts=_KEPT * slots + at_hand if keeps else at_hand,
        pages=0,
        samples=group,
        prompt_tokens=prompt_tokens,
        max_new_tokens=options.max_new_tokens,
        page=page,
        steps=min(options.sync_every or _STEPS, options.max_new_tokens),
        record_experts=options.record_experts,
        speculative=options.speculative,
        suffix_tokens=suffix_tokens,
    )
    # Of the prompts at hand, most of whose samples have ended. Where that is too few, they wait.
    stored = min(at_hand, 8 * -(-slots // group) + 2)
    at_most = slots * shape.sample_pages + stored * shape.prompt_pages + 1
    pages = at_most
    if options.cache_tokens is not None:
        pages = min(at_most, options.cache_tokens // (shards * page) - slots)
    if pages < shape.least_pages:
        least = shards * page * (shape.least_pages + slots)
        raise ValueError(
            f"cache_tokens = {options.cache_tokens}: a KV cache for {shards} x {slots} slots and "
            f"one sample of {prompt_tokens} + {options.max_new_tokens} tokens has at least {least}"
        )
    return SlotShape(**{**vars(shape), "pages": pages})


def sample_queue(
    params: Params,
    prompts: Sequence[QueuedPrompt] | PromptFeed,
    model: Decoder,
    options: GenerateOptions,
    *,
    prompt_tokens: int,
    lengths_of_slices: Sequence[Sequence[int]] | None = None,
    figures: QueueFigures | None = None,
) -> Iterator[list[QueueSample]]:
    """Sample `options.samples` completions of every prompt; gives them as they end.

    Every process calls it with its slice of the prompts, and takes every value.

    Args:
      prompt_tokens: what prompts are padded to; each value compiles.
      lengths_of_slices: of the prompts of every slice of the batch, in the batch's order; default:
        this process has all prompts.
      figures: is added to.

    Raises:
      ValueError: `options.cache_tokens` is too small for one sample; `options.speculative`, and
        the model has no module for multi-token prediction; or a prompt extends one with which it
        does not begin.
    """
    options.check(model)
    figures = QueueFigures() if figures is None else figures
    if isinstance(prompts, PromptFeed):
        yield from _sample_queue(
            params, prompts, model, options, prompt_tokens, lengths_of_slices, figures
        )
        return
    lengths = lengths_of_slices or [[len(prompt.token_ids) for prompt in prompts]]
    whole = options.fixed_shape or options.extended_by  # pages of a piece are not shared
    pieces = 1 if whole else _pieces_of_slices(lengths, options.samples, model)
    samples = options.samples // pieces
    queued = [
        replace(prompt, first_sample=prompt.first_sample + piece * samples)
        for prompt in prompts
        for piece in range(pieces)
    ]
    of_pieces = None
    if lengths_of_slices is not None:
        of_pieces = [[length for length in of_slice for _ in range(pieces)] for of_slice in lengths]
    options = replace(options, samples=samples)
    for ended in _sample_queue(params, queued, model, options, prompt_tokens, of_pieces, figures):
        yield [
            replace(
                each,
                prompt=each.prompt // pieces,
                sample=each.prompt % pieces * samples + each.sample,
            )
            for each in ended
        ]


def _pieces_of_slices(lengths: Sequence[Sequence[int]], samples: int, model: Decoder) -> int:
    """`pieces_of_prompt` of the slice whose shards have most to do."""
    layout = model.layout
    split = layout.shards("slots") // layout.shards("batch")
    counts = zip(map(len, lengths), map(len, batch_slices(layout)), strict=True)
    _, count, parts = max((count / parts, count, parts) for count, parts in counts)
    return pieces_of_prompt(count, samples, parts * split)


def _sample_queue(
    params: Params,
    prompts: Sequence[QueuedPrompt] | PromptFeed,
    model: Decoder,
    options: GenerateOptions,
    prompt_tokens: int,
    lengths_of_slices: Sequence[Sequence[int]] | None,
    figures: QueueFigures,
) -> Iterator[list[QueueSample]]:
    """As `sample_queue`, of prompts all of whose samples stay in one shard."""
    layout = model.layout
    parts = batch_slices(layout)
    feed = prompts if isinstance(prompts, PromptFeed) else None
    queued = [] if isinstance(prompts, PromptFeed) else list(prompts)
    lengths: Sequence[Sequence[int]]
    if feed is not None:
        lengths, counts = [[] for _ in parts], [feed.at_once for _ in parts]
    else:
        lengths = lengths_of_slices or [[len(prompt.token_ids) for prompt in queued]]
        counts = [len(of_slice) for of_slice in lengths]
    slice_index = parts.index(process_batch_parts(layout))
    split = layout.shards("slots") // layout.shards("batch")  # shards of a part of the batch
    most = max(
        -(-count // (len(its_parts) * split))
        for count, its_parts in zip(counts, parts, strict=True)
    )
    if options.fixed_shape:
        most = sys.maxsize
    shape = slot_shape(model, options, prompts=most, prompt_tokens=prompt_tokens)
    schedulers = [
        Scheduler(shape, [part * split + i for part in its_parts for i in range(split)])
        for its_parts in parts
    ]
    for each, its_lengths in zip(schedulers, lengths, strict=True):
        known = queued if lengths_of_slices is None else []  # of other processes' no tokens
        extends = [prompt.extends for prompt in known] or [None] * len(its_lengths)
        each.add(its_lengths, extends)
    _check_beginnings(queued, len(queued))
    scheduler = schedulers[slice_index]
    shards = len(scheduler.shards)
    collector = _Collector(queued, shape, options.stop, figures, layout)
    draws = options.draws()

    def rows_to_devices(rows: np.ndarray) -> jax.Array:
        return from_process_rows(rows.reshape(-1, split, *rows.shape[1:]), layout)

    def without_released(state: SlotState) -> SlotState:
        first = np.full((layout.shards("slots"), shape.prompts), shape.prompt_pages, np.int32)
        for each in schedulers:
            each.released(first)
        if (first == shape.prompt_pages).all():
            return state
        if shape.suffix_tokens:
            return release_pages(state, first, model=model)
        return drop_prompts(state, first == 0, model=model)

    state = empty_slots(model=model, shape=shape)
    if layout.mesh.size == 1:  # as later states are, else programs are compiled for both
        state = jax.device_put(state, layout.replicated)
    stop = np.zeros((shards, shape.slots), bool)
    unread: tuple[SlotLog, list[list[int]]] | None = None
    while True:
        if feed is not None:
            idle = not any(each.busy() for each in schedulers)
            if idle and unread is not None:
                yield collector.read(*unread, stop)
                unread = None
            if (further := feed.following(idle)) is None:
                unused = [] if unread is None else collector.read(*unread, stop)
                tokens = sum(len(sample.tokens) for sample in unused) + collector.under_way()
                figures.dropped += len(parts) * tokens
                return
            for each, of_slice in zip(schedulers, further, strict=True):
                each.add(
                    [len(prompt.token_ids) for prompt in of_slice],
                    [prompt.extends for prompt in of_slice],
                )
            queued += further[slice_index]
            _check_beginnings(queued, len(further[slice_index]))
        for each in schedulers:
            each.end_prompts()
        state = without_released(state)
        while any(each.wants() for each in schedulers):
            assigned = [each.assign() for each in schedulers]
            state = without_released(state)  # what made room for them
            _count_prompts(figures, assigned, schedulers, shape)
            whole, suffixes = (_of_kind(assigned, suffix) for suffix in (False, True))
            if any(map(any, whole)):
                longest = max(each.longest(of) for each, of in zip(schedulers, whole, strict=True))
                rows = _prompt_rows(queued, whole[slice_index], shape, longest)
                new = NewPrompts(*(from_process_rows(leaf, layout) for leaf in rows))
                state, experts = add_prompts(params, state, new, draws, model=model, shape=shape)
                if experts is not None:
                    of_process = to_process_rows(experts, layout)
                    collector.keep_experts(whole[slice_index], of_process)
            if any(map(any, suffixes)):
                rows = _suffix_rows(queued, suffixes[slice_index], shape)
                *of_prompts, bases, pages = (from_process_rows(leaf, layout) for leaf in rows)
                behind = NewSuffixes(NewPrompts(*of_prompts), bases, pages)
                state = extend_prompts(params, state, behind, model=model, shape=shape)
        for each in schedulers:
            each.make_room()
        state = without_released(state)
        if not any(each.busy() for each in schedulers):
            break
        more = np.bool_(any(each.has_more() for each in schedulers))
        state, log, arrays = decode_and_refill(
            params, state, rows_to_devices(stop), more, draws, model=model, shape=shape
        )
        entries = [list(of_shard) for of_shard in scheduler.entries]
        if unread is not None:  # while the devices go on
            yield collector.read(*unread, stop)
        unread = log, entries
        status: Status = jax.device_get(arrays)
        _count(figures, status, shape)
        for each in schedulers:
            each.learn(status)
        if options.stop is not None:  # it decides which samples go on
            stop[:] = False
            yield collector.read(*unread, stop)
            unread = None
    if unread is not None:
        yield collector.read(*unread, stop)


def _of_kind(
    assigned: Sequence[Sequence[Sequence[Assigned]]], suffix: bool
) -> list[list[list[Assigned]]]:
    """Of each slice and shard the prompts of which a beginning is there, or the others."""
    return [
        [[row for row in of_shard if (row.begun.pages > 0) == suffix] for of_shard in of_slice]
        for of_slice in assigned
    ]


def _prompt_rows(
    prompts: Sequence[QueuedPrompt],
    assigned: Sequence[Sequence[Assigned]],
    shape: SlotShape,
    longest: int,
) -> list[np.ndarray]:
    """The rows to prefill: the arrays of `NewPrompts` on the host.

    They are padded to the longest prompt of the queue; where pages are kept, those that are read
    whole are mostly short: to a power of two then, each of which compiles once.
    """
    time = shape.prompt_tokens
    while shape.suffix_tokens and time >= 2 * max(longest, _LEAST_ROW // 2) and time % 2 == 0:
        time //= 2
    return _rows(prompts, assigned, shape, time)


def _suffix_rows(
    prompts: Sequence[QueuedPrompt], assigned: Sequence[Sequence[Assigned]], shape: SlotShape
) -> list[np.ndarray]:
    """The arrays of `NewSuffixes` on the host, those of its prompts first."""
    rows = _rows(prompts, assigned, shape, shape.suffix_tokens)
    bases, shared = np.zeros_like(rows[1]), np.zeros_like(rows[1])
    for shard, of_shard in enumerate(assigned):
        for row, each in enumerate(of_shard, start=shard * rows_at_once(shape)):
            bases[row], shared[row] = each.begun
    return [*rows, bases, shared]


def _rows(
    prompts: Sequence[QueuedPrompt],
    assigned: Sequence[Sequence[Assigned]],
    shape: SlotShape,
    time: int,
) -> list[np.ndarray]:
    """The arrays of `NewPrompts`, with so many tokens a row: those behind the pages there are."""
    count = rows_at_once(shape)
    size = len(assigned) * count
    tokens = np.zeros((size, time), np.int32)
    lengths, ids = np.ones(size, np.int32), np.zeros(size, np.uint32)
    firsts, entries = np.zeros(size, np.int32), np.full(size, shape.prompts, np.int32)
    for shard, of_shard in enumerate(assigned):
        for row, (index, entry, begun) in enumerate(of_shard, start=shard * count):
            prompt = prompts[index]
            read = prompt.token_ids[begun.pages * shape.page :]
            tokens[row, : len(read)] = read
            lengths[row] = len(prompt.token_ids)
            ids[row], firsts[row], entries[row] = prompt.id, prompt.first_sample, entry
    return [tokens, lengths, ids, firsts, entries]


def _check_beginnings(prompts: Sequence[QueuedPrompt], count: int) -> None:
    """Raises ValueError where one of the last `count` does not begin with what it extends."""
    for index in range(len(prompts) - count, len(prompts)):
        if (before := prompts[index].extends) is None:
            continue
        beginning = prompts[before].token_ids
        if not np.array_equal(prompts[index].token_ids[: len(beginning)], beginning):
            raise ValueError(f"prompt {index} does not begin with the tokens of prompt {before}")


def _count_prompts(
    figures: QueueFigures,
    assigned: Sequence[Sequence[Sequence[Assigned]]],
    schedulers: Sequence[Scheduler],
    shape: SlotShape,
) -> None:
    for scheduler, of_slice in zip(schedulers, assigned, strict=True):
        for row in (row for of_shard in of_slice for row in of_shard):
            shared = row.begun.pages * shape.page
            figures.shared += shared
            figures.prefilled += scheduler.known.lengths[row.prompt] - shared


def _count(figures: QueueFigures, status: Status, shape: SlotShape) -> None:
    shards = len(status.free)
    used = shards * (shape.pages + shape.slots) - int(status.free.sum())
    figures.steps += int(status.steps)
    figures.slot_steps += int(status.steps) * shards * shape.slots
    figures.busy += int(status.busy)
    figures.page_tokens += used * shape.page
    figures.live_tokens += int(status.live.sum())


@dataclass
class _Part:
    """What is known of the sample in a slot."""

    request: int = -1
    logs: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    steps: int = 0


class _Collector:
    """Puts completions together from the logs of the slots of this process's slice of the batch."""

    def __init__(
        self,
        prompts: Sequence[QueuedPrompt],
        shape: SlotShape,
        stop: StopSearch | None,
        figures: QueueFigures,
        layout: Layout,
    ) -> None:
        self._shape, self._stop, self._figures = shape, stop, figures
        self._layout = layout
        self._parts: dict[tuple[int, int], _Part] = {}
        self._prompts = prompts
        self._prompt_experts: dict[int, np.ndarray] = {}

    def keep_experts(self, assigned: Sequence[Sequence[Assigned]], experts: np.ndarray) -> None:
        count = rows_at_once(self._shape)
        for shard, of_shard in enumerate(assigned):
            for row, (prompt, *_) in enumerate(of_shard, start=shard * count):
                length = len(self._prompts[prompt].token_ids)
                self._prompt_experts[prompt] = experts[row, :length]

    def under_way(self) -> int:
        """Tokens of samples that have not ended."""
        return sum(part.steps for part in self._parts.values())

    def read(
        self, log: SlotLog, entries: Sequence[Sequence[int]], stop: np.ndarray
    ) -> list[QueueSample]:
        """The samples that ended; marks in `stop` [shards, slots] those that a stop string ends.

        Args:
          entries: the prompt of each entry when the log was written.
        """
        host: SlotLog = jax.tree.map(lambda leaf: to_process_rows(leaf, self._layout), log)
        drawn = (host.tokens, host.policy_log_probs, host.sampling_log_probs)
        arrays = [
            np.asarray(leaf) for leaf in (*drawn, host.experts, host.drafts) if leaf is not None
        ]
        last = self._shape.max_new_tokens - 1
        ended: list[QueueSample] = []
        going: list[tuple[int, int]] = []  # (shard, slot)
        for shard, slot in np.ndindex(*host.request.shape[:2]):
            request, index = host.request[shard, slot], host.index[shard, slot]
            steps = np.flatnonzero(request >= 0)
            if not len(steps):
                continue
            of_slot = index[steps] == 0
            cuts = np.flatnonzero(of_slot[1:]) + 1
            for piece in np.split(steps, cuts):
                part = self._parts.get((shard, slot))
                if part is None or index[piece[0]] == 0:
                    if part is not None:
                        self._figures.repeated += part.steps
                    part = self._parts[shard, slot] = _Part(int(request[piece[0]]))
                part.logs.append(tuple(leaf[shard, slot, piece] for leaf in arrays))
                drafts = None if host.drafts is None else host.drafts[shard, slot, piece]
                part.steps += len(piece) if drafts is None else int((drafts > 0).sum())
                eos = bool(host.ended[shard, slot, piece[-1]])
                if eos or index[piece[-1]] == last:
                    finish = Finish.EOS if eos else Finish.LENGTH
                    ended.append(self._sample(shard, slot, entries, finish))
            if (shard, slot) in self._parts:
                going.append((shard, slot))
        if self._stop is None:
            return ended
        return self._cut(ended, going, entries, stop)

    def _sample(
        self, shard: int, slot: int, entries: Sequence[Sequence[int]], finish: Finish
    ) -> QueueSample:
        part = self._parts.pop((shard, slot))
        entry, sample = divmod(part.request, self._shape.samples)
        prompt = entries[shard][entry]
        tokens, policy, drawn, *rest = map(np.concatenate, zip(*part.logs, strict=True))
        both = drafts = None
        if self._shape.record_experts:
            both = np.concatenate([self._prompt_experts[prompt], rest[0]])
        if self._shape.speculative:
            drafts = rest[-1]
        return QueueSample(
            prompt,
            sample,
            tokens,
            policy,
            drawn,
            finish,
            both,
            drafted=0 if drafts is None else int((drafts > 0).sum()),
            accepted=0 if drafts is None else int((drafts == 2).sum()),
        )

    def _cut(
        self,
        ended: list[QueueSample],
        going: Sequence[tuple[int, int]],
        entries: Sequence[Sequence[int]],
        stop: np.ndarray,
    ) -> list[QueueSample]:
        """Ends samples behind their first stop string."""
        assert self._stop is not None
        rows = [sample.tokens for sample in ended]
        rows += [np.concatenate([log[0] for log in self._parts[at].logs]) for at in going]
        if not rows:
            return ended
        lengths = np.asarray([len(row) for row in rows])
        padded = np.zeros((len(rows), lengths.max()), np.int32)
        for to, row in zip(padded, rows, strict=True):
            to[: len(row)] = row
        ends = self._stop(padded, lengths)
        results = [_shortened(sample, int(end)) for sample, end in zip(ended, ends, strict=False)]
        for (shard, slot), end in zip(going, ends[len(ended) :], strict=True):
            if end >= 0:
                stop[shard, slot] = True
                sample = self._sample(shard, slot, entries, Finish.STOP)
                results.append(_shortened(sample, int(end)))
        return results


def _shortened(sample: QueueSample, end: int) -> QueueSample:
    """The sample's first `end` tokens, ended by a stop string; all of it where `end` is -1."""
    if end < 0:
        return sample
    experts = sample.experts
    if experts is not None:
        experts = experts[: len(experts) - len(sample.tokens) + end]
    return replace(
        sample,
        tokens=sample.tokens[:end],
        policy_log_probs=sample.policy_log_probs[:end],
        sampling_log_probs=sample.sampling_log_probs[:end],
        finish=Finish.STOP,
        experts=experts,
    )
