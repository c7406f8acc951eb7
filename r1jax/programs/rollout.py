"""What sampling and scoring compile: prefill, decoding, growth of the KV cache, reward models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Lowered, Wrapped
from jax.typing import DTypeLike

from r1jax.data.preferences import pad_texts
from r1jax.models import Decoder
from r1jax.models.kv_cache import cache_arrays, prompt_cache_arrays
from r1jax.models.parameters import abstract_weights
from r1jax.programs.lengths import CutLognormal
from r1jax.programs.program import (
    NotPlanned,
    Planning,
    Program,
    StagePrograms,
    batch_array,
    batch_arrays_like,
    expected_flops,
    expert_choices,
    forward_flops,
    longest_prompt,
    round_up,
)
from r1jax.programs.slots import SlotRollout
from r1jax.rollouts.sampling import bucket
from r1jax.rollouts.scoring import make_score, row_tokens, rows_at_once
from r1jax.sampler import GenerateOptions, Prompts
from r1jax.sampler.generate import decode_until, grow, start
from r1jax.sampler.queue import default_slots
from r1jax.sampler.speculative import (
    decode_speculatively,
    grow_speculation,
    start_speculatively,
)
from r1jax.settings.sampling import DatasetSampling, LengthsSection, SamplingSection
from r1jax.settings.stage import Stage
from r1jax.sharding import Axes

if TYPE_CHECKING:
    from jaxtyping import PyTree

    from r1jax.programs.program import AbstractTree


# A reward's model, and whether its output becomes the probability of a safe response.
RewardModel = tuple[Decoder, bool]


def reward_models(stage: Stage, planning: Planning) -> dict[str, RewardModel]:
    """Reward -> its model, of the stage's rewards that have one."""
    formats = {each.name: each.reward_model_format() for each in planning.config.stages}
    models: dict[str, RewardModel] = {}
    for name, reward in planning.config.rewards_of(stage).items():
        if reward.model is not None:
            trained = formats.get(reward.model)
            labelled = trained is not None and trained.labelled
            models[name] = planning.decoder_of(reward.model), labelled
    return models


def reward_model_weights(models: Mapping[str, RewardModel]) -> dict[str, AbstractTree]:
    """What they keep in memory, for `Program.resident`."""
    return {"reward models": [abstract_weights(decoder) for decoder, _ in models.values()]}


def reward_programs(
    models: Mapping[str, RewardModel],
    tokens: int,
    samples: int,
    resident: Mapping[str, AbstractTree],
) -> Iterator[Program]:
    """Scores of that many samples of that many tokens, each of which every model reads."""
    for name, (model, as_probability) in models.items():
        rows = rows_at_once(model.layout)
        texts = [np.zeros(1, np.int32)] * rows
        inputs = batch_arrays_like(pad_texts(texts, row_tokens(tokens)), model)
        weights = abstract_weights(model)
        score = jax.jit(make_score(model, as_probability))
        others = {key: other for key, other in models.items() if key != name}
        yield Program(
            f"reward {name}",
            model.layout.mesh.shape,
            partial(score.lower, weights, inputs),
            {"reward models": weights, "batch": inputs},
            {**resident, **reward_model_weights(others)},
            calls=samples / rows,
            useful_flops=forward_flops(model.config, rows, tokens),
        )


_TRIAL_TOKENS = 32


@dataclass(frozen=True)
class Rollout:
    """A batch of prompts to sample, as programs.

    The cache doubles as it fills, and each of its sizes is a program of its own. Two are compiled,
    with the first and the last size: what a token costs is a constant and a share of the size, so
    each of the two gets as many tokens (`turns`) as make the sum right.

    prompts: in a batch. samples: of each. prompt_tokens, new_tokens: at most.
    output_specs: see `Planning`.
    lengths: of completions; default: all at most. A batch is decoded until its longest has ended.
    """

    model: Decoder
    prompts: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    sampling: SamplingSection
    output_specs: Callable[[Lowered], Sequence[PartitionSpec] | None]
    record_experts: bool = False
    lengths: CutLognormal | None = None

    def programs(
        self, resident: Mapping[str, AbstractTree], calls: float, prefix: str = ""
    ) -> Iterator[Program]:
        """Prefill, decoding, and growth of the cache where it grows.

        Args:
          resident: what is in memory beside the sampler's weights and the cache.
          calls: of the prefill in a step of the stage; 0 where that depends on the data.
          prefix: of the programs' names.
        """
        config, mesh, capacities = self.model.config, self.model.layout.mesh, self.capacities
        weights = abstract_weights(self.model)
        yield Program(
            f"{prefix}prefill",
            mesh.shape,
            lambda: self.prefill,
            {"weights": weights, "batch": self.arguments},
            resident,
            calls,
            makes="cache",
            useful_flops=forward_flops(config, self.prompts, self.prompt_tokens),
        )
        rows = self.prompts * self.samples
        lengths = self.lengths or CutLognormal.equal(self.new_tokens)
        decoding = expected_flops(config, rows, lengths, start=self.prompt_tokens)
        # Drafts: see `capacities`.
        tokens = min(lengths.longest(rows), capacities[-1])
        for capacity, turns in token_counts(capacities, tokens).items():
            yield Program(
                prefix + ("decode" if len(capacities) == 1 else f"decode, cache of {capacity}"),
                mesh.shape,
                partial(self.decode, capacity),
                {"weights": weights, "cache": [self.new_cache(capacity), self.prompt_cache]},
                resident,
                calls,
                turns=turns,
                larger_branch=self.sampling.top_p < 1 or self.sampling.top_k > 0,
                useful_flops=decoding * turns / tokens,
                prepare=partial(prepare_decoding, capacity=capacity),
                trial_turns=min(capacity, _TRIAL_TOKENS),
            )
        if len(capacities) > 1:
            before, last = capacities[-2:]
            moved = sum(a + b for a, b in zip(capacities, capacities[1:], strict=False))
            yield Program(
                f"{prefix}grow the cache",
                mesh.shape,
                lambda: self.grow(before, last),
                {"cache": self.new_cache(before)},
                {**resident, "weights": weights, "cache": self.prompt_cache},
                calls * moved / (last + before),
                makes="cache",
            )

    def notes(self) -> list[str]:
        """What a plan says about it beside the programs."""
        if self.lengths is None or not self.lengths.sigma:
            return []
        rows = self.prompts * self.samples
        return [
            f"batches of {rows:,} samples of {self.lengths.mean:,.0f} tokens, the longest of which "
            f"has {self.lengths.longest(rows):,.0f}"
        ]

    @cached_property
    def options(self) -> GenerateOptions:
        return GenerateOptions(
            self.samples,
            self.new_tokens,
            seed=0,
            speculative=self.sampling.speculative,
            record_experts=self.record_experts,
        )

    @cached_property
    def capacities(self) -> list[int]:
        # Drafts are planned for as if all were rejected: of memory the most, of time no gain.
        return self.options.capacities()

    @cached_property
    def rows(self) -> int:
        """Prompts, padded as `pad_prompts` pads them."""
        return round_up(self.prompts, self.model.layout.shards("batch"))

    @cached_property
    def arguments(self) -> Prompts:
        def row(dtype: DTypeLike, *shape: int) -> PyTree:
            return batch_array(self.model, (self.rows, *shape), dtype)

        time = bucket(self.prompt_tokens)
        return Prompts(row(jnp.int32, time), row(jnp.int32), row(jnp.uint32), row(jnp.int32))

    @cached_property
    def prefill(self) -> Lowered:
        function, arguments, options = self._prefill_call(self.capacities[0])
        return function.lower(*arguments, **options)

    def grow(self, before: int, after: int) -> Lowered:
        state, _ = self.started(before)
        if self.sampling.speculative:
            return grow_speculation.lower(state, after - before, self.model)
        return grow.lower(state.cache, after - before, self.model)

    def decode(self, capacity: int) -> Lowered:
        state, prompt_cache = self.started(capacity)
        function = decode_speculatively if self.sampling.speculative else decode_until
        return function.lower(
            abstract_weights(self.model),
            state,
            prompt_cache,
            jax.ShapeDtypeStruct((), jnp.int32),
            jax.eval_shape(self.options.draws),
            model=self.model,
        )

    def started(self, capacity: int) -> AbstractTree:
        """The sampler's state and the prompts' cache, as the prefill would leave them.

        Their shardings are the compiler's choice.

        Raises:
          NotPlanned: the prefill does not fit.
        """
        specs = self.output_specs(self.prefill)
        if specs is None:
            raise NotPlanned("what it reads is laid out by the prefill, which does not fit")
        function, arguments, options = self._prefill_call(capacity)
        shapes = jax.eval_shape(partial(function, **options), *arguments)
        leaves, structure = jax.tree.flatten(shapes)
        mesh = self.model.layout.mesh
        placed = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
            for leaf, spec in zip(leaves, specs, strict=True)
        ]
        return jax.tree.unflatten(structure, placed)

    def _prefill_call(
        self, capacity: int
    ) -> tuple[Wrapped, tuple[AbstractTree, ...], dict[str, object]]:
        """The sampler's first function, and what it is called with."""
        draws = jax.eval_shape(self.options.draws)
        arguments = (abstract_weights(self.model), self.arguments, draws)
        options = {"model": self.model, "shape": self.options.shape(capacity)}
        return start_speculatively if self.sampling.speculative else start, arguments, options

    def new_cache(self, capacity: int) -> list[jax.ShapeDtypeStruct]:
        """The cache of the new tokens, as the layout splits it."""
        entries = 2 * capacity if self.sampling.speculative else capacity
        arrays = cache_arrays(self.rows, self.samples, entries, self.model)
        return self._of_all_layers(arrays, (self.rows, self.samples, entries))

    @cached_property
    def prompt_cache(self) -> list[jax.ShapeDtypeStruct]:
        """The cache of the prompts, as the layout splits it."""
        time = bucket(self.prompt_tokens)
        arrays = prompt_cache_arrays(self.rows, time, self.model)
        return self._of_all_layers(arrays, (self.rows, time))

    def _of_all_layers(
        self, arrays: Sequence[tuple[tuple[int, ...], Axes]], tokens: tuple[int, ...]
    ) -> list[jax.ShapeDtypeStruct]:
        """A layer's arrays for each layer; with the experts of these tokens, where recorded."""
        config, dtype = self.model.config, self.model.execution.compute_dtype
        leaves = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=self.model.layout.sharding(axes))
            for shape, axes in arrays
        ] * (config.num_hidden_layers + self.sampling.speculative)
        return [*leaves, expert_choices(self.model, tokens)] if self.record_experts else leaves


def sampling_programs(stage: Stage, planning: Planning, wanted: DatasetSampling) -> StagePrograms:
    """The programs of a stage that samples and scores; a step is a batch of prompts."""
    model, prompt = planning.sampler_of(stage.name), longest_prompt(stage, planning.config)
    prompts, samples, new_tokens = wanted.batch, wanted.samples_at_once, wanted.max_new_tokens
    lengths = planned_lengths(wanted.lengths, new_tokens)
    batch = Rollout(
        model,
        prompts,
        samples,
        prompt,
        new_tokens,
        wanted.sampling,
        planning.output_specs,
        lengths=lengths,
    )
    # Of all prompts, as far as their number is known.
    queue = None
    if wanted.limit is not None:
        queue = max(prompts, wanted.limit * wanted.samples // samples)
    rollout = by_slots(batch, queue)
    calls = 1.0 if rollout is batch or queue is None else prompts / queue
    scorers = reward_models(stage, planning)
    resident = reward_model_weights(scorers)
    scoring = {**resident, "weights": abstract_weights(model)}
    programs = [
        *rollout.programs(resident, calls),
        *reward_programs(scorers, prompt + new_tokens, prompts * samples, scoring),
    ]
    tokens = round(prompts * samples * lengths.mean)
    return StagePrograms(tuple(programs), tokens, "batch", tuple(rollout.notes()))


def by_slots(batch: Rollout, prompts: int | None = None) -> Rollout | SlotRollout:
    """A queue of so many prompts in place of a batch; drafts are decoded a batch at a time.

    Args:
      prompts: None where their number depends on the data: at least a batch of them.
    """
    sampling = batch.sampling
    if sampling.speculative:
        return batch
    if sampling.slots is None:
        slots = at_once = batch.prompts * batch.samples
        if prompts is not None:
            shards = batch.model.layout.shards("slots")
            slots = default_slots(prompts * batch.samples, at_once, shards)
        sampling = sampling.model_copy(update={"slots": slots})
    return SlotRollout(
        batch.model,
        batch.prompts if prompts is None else prompts,
        batch.samples,
        batch.prompt_tokens,
        batch.new_tokens,
        sampling,
        batch.lengths or CutLognormal.equal(batch.new_tokens),
        batch.record_experts,
    )


def planned_lengths(given: LengthsSection | None, limit: int) -> CutLognormal:
    """Lengths of completions of at most `limit` tokens, as a plan counts them."""
    return (
        CutLognormal.equal(limit)
        if given is None
        else CutLognormal.of(given.mean, given.p99, limit)
    )


def prepare_decoding(arguments: PyTree, capacity: int) -> PyTree:
    """Arguments for some tokens of every sample, at the end of a full cache, where none ends."""
    weights, state, prompt_cache, until, draws = arguments
    first = capacity - min(capacity, _TRIAL_TOKENS)
    state = state.replace(step=jnp.full_like(state.step, first))
    one = jnp.ones_like(draws.sampling.temperature)
    sampling = draws.sampling.replace(temperature=one, top_p=one)
    draws = draws.replace(sampling=sampling, eos_ids=jnp.full_like(draws.eos_ids, -1))
    return weights, state, prompt_cache, jnp.full_like(until, capacity), draws


def token_counts(capacities: Sequence[int], tokens: float | None = None) -> dict[int, float]:
    """How many tokens to count for the first and for the last capacity of a cache.

    Args:
      capacities: rising; each token is decoded with the smallest cache that has room for it.
      tokens: that are decoded; default: as many as the last capacity says.

    Returns:
      Capacity -> tokens. With them, a sum of costs that are linear in the capacity is exact.
    """
    first, last = capacities[0], capacities[-1]
    tokens = float(last if tokens is None else tokens)
    if first == last:
        return {first: tokens}
    counts = {first: 0.0, last: 0.0}
    done = 0.0
    for capacity in capacities:
        until = min(capacity, tokens)
        of_capacity, done = until - done, until
        share = (capacity - first) / (last - first)
        counts[first] += of_capacity * (1 - share)
        counts[last] += of_capacity * share
    return counts
