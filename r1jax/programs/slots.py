"""What sampling through slots compiles: prefill of the next prompts, and decoding with refills."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.data.padded_rows import bucket
from r1jax.models import Decoder
from r1jax.models.paged_attention import PAGE_CHUNKS, pages_at_once
from r1jax.models.paged_cache import page_axes
from r1jax.models.paged_kernel import GROUP_KERNEL, PAGE_KERNEL
from r1jax.models.parameters import abstract_weights
from r1jax.programs.lengths import CutLognormal, normal_maximum, slot_steps
from r1jax.programs.program import Program, batch_array, expected_flops, forward_flops
from r1jax.sampler import GenerateOptions
from r1jax.sampler.queue import default_slots, pieces_of_prompt, slot_shape
from r1jax.sampler.scheduler import rows_at_once
from r1jax.sampler.slot_state import NewPrompts, NewSuffixes, SlotShape, SlotState
from r1jax.sampler.slot_suffixes import SUFFIX_PAGES, extend_prompts
from r1jax.sampler.slots import (
    END,
    TAKE,
    WITHIN_PAGE,
    add_prompts,
    decode_and_refill,
    empty_log,
    empty_slots,
)
from r1jax.settings.sampling import SamplingSection

if TYPE_CHECKING:
    from jaxtyping import PyTree

    from r1jax.programs.program import AbstractTree


@dataclass(frozen=True)
class SlotWork:
    """What a queue takes, of each shard.

    running: slots that have pages for samples of such lengths.
    steps: of decoding. use: completion tokens for each slot and step.
    pages: that a step reads, on the shard with most of them, on average. of_prompts: those of them
        that are of prompts, once for each slot. shared: once for each prompt, as a GPU reads them.
    chunks: in which they are read. prefills: calls.
    """

    running: int
    steps: float
    use: float
    pages: float
    of_prompts: float
    shared: float
    chunks: float
    prefills: float


@dataclass(frozen=True)
class SlotRollout:
    """A queue of prompts that is sampled through slots, as programs.

    at_once: prompts of a batch of the stage. samples: of each prompt.
    prompt_tokens, new_tokens: at most.
    queue: prompts over all devices; None where their number depends on the data, of which a batch
        is planned. fixed_shape, extended_by: see `GenerateOptions`. With `extended_by` a queue goes
        through several rounds; what is planned is one in which all prompts extend others.
    """

    model: Decoder
    at_once: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    sampling: SamplingSection
    lengths: CutLognormal
    queue: int | None = None
    record_experts: bool = False
    fixed_shape: bool = False
    extended_by: int = 0

    def programs(
        self, resident: Mapping[str, AbstractTree], calls: float, prefix: str = ""
    ) -> Iterator[Program]:
        """Prefill, and decoding.

        Args:
          resident: what is in memory beside the sampler's weights and the cache.
          calls: queues in a step of the stage; 0 where that depends on the data.
          prefix: of the programs' names.
        """
        config, mesh, shape, work = self.model.config, self.model.layout.mesh, self.shape, self.work
        weights, state = abstract_weights(self.model), self.state
        arguments = {
            "weights": weights,
            "cache": state.cache,
            "slots": vars(state) | {"cache": None},
        }
        new, draws = self.new_prompts, jax.eval_shape(self.options.draws)
        static = {"model": self.model, "shape": shape}
        prefills = calls * work.prefills
        suffixes = self.new_suffixes if shape.suffix_tokens else None
        yield Program(
            f"{prefix}prefill",
            mesh.shape,
            partial(add_prompts.lower, weights, state, new, draws, **static),
            {**arguments, "batch": new},
            resident,
            prefills if suffixes is None else 0.0,
            useful_flops=forward_flops(config, self.prompts, self.prompt_tokens) / work.prefills,
        )
        if suffixes is not None:
            pages = shape.suffix_tokens // shape.page
            read = rows_at_once(shape) * shape.prompt_pages
            chunk = pages_at_once(shape.page, self.model.layout.platform, shape.page)
            start = max(0, self.prompt_tokens - self.extended_by)
            of_all = forward_flops(config, self.prompts, self.extended_by, start)
            yield Program(
                f"{prefix}prefill of suffixes",
                mesh.shape,
                partial(extend_prompts.lower, weights, state, suffixes, **static),
                {**arguments, "batch": suffixes},
                resident,
                prefills,
                turns=pages,
                useful_flops=of_all / work.prefills,
                prepare=partial(prepare_suffixes, shape=shape),
                trial_turns=pages,
                scopes={PAGE_CHUNKS: read / chunk + 0.5, PAGE_KERNEL: read, SUFFIX_PAGES: pages},
            )
        decodes = work.steps / shape.steps
        section, on_gpu = self.sampling, self.model.layout.platform == "gpu"
        with_filters = section.top_p < 1 or section.top_k > 0 or section.min_p > 0
        of_all = expected_flops(
            config, self.prompts * self.samples, self.lengths, start=self.prompt_tokens
        )
        filled_pages = 1 + (shape.steps - 1) * shape.entries / shape.page
        end_in_a_step = 1 - math.exp(-self.prompts * self.samples / work.steps)
        yield Program(
            f"{prefix}decode and refill",
            mesh.shape,
            partial(decode_and_refill.lower, weights, state, *self.decode_arguments, **static),
            arguments,
            resident,
            calls * decodes,
            makes="log",
            turns=filled_pages,
            larger_branch=with_filters,
            useful_flops=of_all / decodes,
            prepare=partial(prepare_slots, shape=shape, pages=round(self.pages_of_sample)),
            temporaries={"log": self.log_bytes},
            trial_turns=filled_pages,
            scopes={
                PAGE_CHUNKS: work.chunks,
                PAGE_KERNEL: work.pages - (work.of_prompts if on_gpu else 0.0),
                GROUP_KERNEL: work.shared,
                TAKE: end_in_a_step,
                END: end_in_a_step,
                WITHIN_PAGE: shape.steps / filled_pages,
            },
        )

    def notes(self) -> list[str]:
        """What a plan says about them beside the programs."""
        shape, work, shards = self.shape, self.work, self.shards
        return [
            f"{shards} x {shape.slots} slots, {work.running} of which have pages at once; "
            f"{shards} x {shape.pages:,} pages of {shape.page} tokens",
            f"{work.steps:,.0f} decode steps for {self.prompts * self.samples:,} samples of "
            f"{self.lengths.mean:,.0f} tokens, {100 * work.use:.0f} % of the slots' steps give a "
            f"token; a step reads {work.pages:,.0f} pages, {work.chunks:.1f} chunks",
        ]

    @property
    def prompts(self) -> int:
        return self.at_once if self.queue is None else self.queue

    @property
    def slots(self) -> int:
        if self.sampling.slots is not None:
            return self.sampling.slots
        at_once = self.at_once * self.samples
        if self.queue is None:  # there may be more of them
            return at_once
        return default_slots(self.queue * self.samples, at_once, self.shards)

    @property
    def log_bytes(self) -> int:
        """On a device, of what the slots draw between two returns to the host."""
        log = jax.eval_shape(partial(empty_log, self.model, self.shape))
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(log))
        return size // self.model.layout.shards("batch")

    @property
    def shards(self) -> int:
        return self.model.layout.shards("slots")

    @cached_property
    def pieces(self) -> int:
        """Of each prompt, see `pieces_of_prompt`."""
        if self.fixed_shape:
            return 1
        parts = self.model.layout.shards("batch")
        prompts = -(-self.prompts // parts)  # as many in each part
        return pieces_of_prompt(prompts, self.samples, self.shards // parts)

    @property
    def prompts_of_shard(self) -> int:
        """Pieces of prompts that a shard takes, at most."""
        return -(-self.prompts * self.pieces // self.shards)

    @cached_property
    def options(self) -> GenerateOptions:
        return GenerateOptions(
            self.samples // self.pieces,
            self.new_tokens,
            seed=0,
            record_experts=self.record_experts,
            speculative=self.sampling.speculative,
            slots=self.slots,
            cache_tokens=self.sampling.cache_tokens,
            fixed_shape=self.fixed_shape,
            extended_by=self.extended_by,
        )

    @cached_property
    def shape(self) -> SlotShape:
        """With prompts at their longest. A budget of the cache that is too small for those is
        planned as large as they need: real prompts may be shorter."""
        prompts, time = self.prompts_of_shard, bucket(self.prompt_tokens)
        prompts = sys.maxsize if self.fixed_shape else prompts
        unlimited = replace(self.options, cache_tokens=None)
        shape = slot_shape(self.model, unlimited, prompts=prompts, prompt_tokens=time)
        if self.options.cache_tokens is None:
            return shape
        least = self.shards * shape.page * (shape.least_pages + shape.slots)
        options = replace(self.options, cache_tokens=max(least, self.options.cache_tokens))
        return slot_shape(self.model, options, prompts=prompts, prompt_tokens=time)

    @cached_property
    def pages_of_sample(self) -> float:
        """In the pool, of a sample that is under way, on average."""
        done = self.lengths.moment(2) / (2 * self.lengths.mean)
        return max(0.0, done * self.shape.entries / self.shape.page - 0.5)

    @cached_property
    def work(self) -> SlotWork:
        shape, lengths, shards = self.shape, self.lengths, self.shards
        group = self.options.samples
        samples = self.prompts_of_shard * group
        prompt_pages = -(-self.prompt_tokens // shape.page)
        # Each slot has a part of its prompt, some of whose samples have ended, and fills a page.
        wanted = self.pages_of_sample + 1 + 2 * prompt_pages / group
        running = max(1, min(shape.slots, int(shape.pages / wanted)))
        taken = slot_steps(lengths, samples, running, shards)
        # Of drafts none stays, as a plan counts them: each step fills two entries for one token.
        page = shape.page / shape.entries
        read = (prompt_pages - 0.5) * lengths.mean + lengths.moment(2) / (2 * page)
        # Shards go on together, so each step takes as long as that with most pages.
        done = lengths.moment(2) / (2 * lengths.mean)
        variance = lengths.moment(3) / (3 * lengths.mean) - done**2
        spread = math.sqrt(running * variance) / page * taken.use * normal_maximum(shards)
        pages = samples * max(0.0, read) / taken.steps + spread
        of_prompts = samples * prompt_pages * lengths.mean / taken.steps
        shared = min(of_prompts, 2 * running * prompt_pages / group)
        chunk = pages_at_once(shape.page, self.model.layout.platform)
        chunks = min(pages / chunk + 0.5, self.state.reads.pages.shape[1] / chunk)
        # The first prompts fill the slots; then a shard prefills when its queue is short, and all
        # others with it, at a return to the host.
        at_once = rows_at_once(shape)
        first = min(samples, running) / group
        later = max(0.0, samples / group - first)
        returns = taken.steps / shape.steps
        none = (1 - min(1.0, later / returns)) ** shards
        prefills = max(1.0, first / at_once) + returns * (1 - none)
        of_prompts, shared = min(pages, of_prompts), min(pages, shared)
        return SlotWork(
            running, taken.steps, taken.use, pages, of_prompts, shared, chunks, prefills
        )

    @cached_property
    def state(self) -> SlotState:
        """As the functions lay it out: slots over the devices, heads as their rule says."""
        layout = self.model.layout
        shapes = jax.eval_shape(partial(empty_slots, model=self.model, shape=self.shape))

        def placed(leaf: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> PyTree:
            sharding = layout.sharding(axes)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        def over_shards(leaf: jax.ShapeDtypeStruct) -> PyTree:
            return placed(leaf, ("slots", *(None,) * (leaf.ndim - 1)) if leaf.ndim else ())

        def of_pages(leaf: jax.ShapeDtypeStruct) -> PyTree:
            axes = page_axes(self.model)
            return placed(leaf, ("layers",) * (leaf.ndim - len(axes)) + axes)

        state: SlotState = jax.tree.map(over_shards, shapes)
        cache = replace(
            state.cache,
            pages=jax.tree.map(of_pages, shapes.cache.pages),
            current=jax.tree.map(of_pages, shapes.cache.current),
        )
        return replace(state, cache=cache)

    @cached_property
    def new_prompts(self) -> NewPrompts:
        """The rows of a prefill."""
        return self._rows(self.shape.prompt_tokens)

    @cached_property
    def new_suffixes(self) -> NewSuffixes:
        """The rows of a prefill of suffixes."""
        prompts = self._rows(self.shape.suffix_tokens)
        return NewSuffixes(prompts, prompts.lengths, prompts.lengths)

    def _rows(self, tokens: int) -> NewPrompts:
        rows = self.shards * rows_at_once(self.shape)

        def row(dtype: type[np.generic], *rest: int) -> PyTree:
            return batch_array(self.model, (rows, *rest), dtype)

        return NewPrompts(
            row(np.int32, tokens), row(np.int32), row(np.uint32), row(np.int32), row(np.int32)
        )

    @cached_property
    def decode_arguments(self) -> tuple[AbstractTree, ...]:
        """Those behind weights and state."""
        batch = self.model.layout.shards("batch")
        stop = batch_array(self.model, (batch, self.shards // batch, self.shape.slots), jnp.bool_)
        more = jax.ShapeDtypeStruct((), jnp.bool_, sharding=self.model.layout.replicated)
        return stop, more, jax.eval_shape(self.options.draws)


def prepare_slots(arguments: PyTree, shape: SlotShape, pages: int) -> PyTree:
    """Arguments for `shape.steps` steps in which no sample ends, each of so many pages."""
    weights, state, stop, more, draws = arguments
    room = (shape.pages - shape.slots) // shape.slots  # each takes one more
    pages = max(
        0, min(pages, room, shape.sample_pages - -(-shape.steps * shape.entries // shape.page) - 1)
    )
    slot = jnp.arange(shape.slots)[:, None]
    entry = jnp.arange(shape.sample_pages)
    table = jnp.where(entry < pages, slot * pages + entry, -1)
    used = jnp.arange(shape.pages) < shape.slots * pages
    like = state.tables
    state = replace(
        state,
        running=jnp.ones_like(state.running),
        request=jnp.zeros_like(state.request),
        lengths=jnp.full_like(state.lengths, pages * shape.page // shape.entries),
        tables=jnp.broadcast_to(table.astype(like.dtype), like.shape),
        cache=replace(state.cache, used=jnp.broadcast_to(used, state.cache.used.shape)),
        queued=jnp.zeros_like(state.queued),
    )
    one = jnp.ones_like(draws.sampling.temperature)
    sampling = draws.sampling.replace(temperature=one, top_p=one)
    draws = draws.replace(sampling=sampling, eos_ids=jnp.full_like(draws.eos_ids, -1))
    return weights, state, jnp.zeros_like(stop), jnp.zeros_like(more), draws


def prepare_suffixes(arguments: PyTree, shape: SlotShape) -> PyTree:
    """Arguments for suffixes at their longest, behind as many pages as a prompt may have."""
    weights, state, new = arguments
    pages = shape.suffix_tokens // shape.page
    shared = max(0, shape.prompt_pages - pages)
    columns = jnp.arange(shape.prompt_pages)
    tables = jnp.where(columns < shared, columns, -1)
    used = jnp.arange(shape.pages) < shared
    like = state.prompts.tables
    state = replace(
        state,
        prompts=replace(
            state.prompts, tables=jnp.broadcast_to(tables.astype(like.dtype), like.shape)
        ),
        cache=replace(state.cache, used=jnp.broadcast_to(used, state.cache.used.shape)),
    )
    lengths = jnp.full_like(new.shared, (shared + pages) * shape.page)
    prompts = replace(new.prompts, lengths=lengths, entry=jnp.zeros_like(new.prompts.entry))
    return (
        weights,
        state,
        NewSuffixes(prompts, jnp.zeros_like(new.bases), jnp.full_like(new.shared, shared)),
    )
