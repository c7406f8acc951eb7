"""Samples packed into the rows of an update: fixed shapes, and work for real tokens alone.

R1's samples have long-tailed lengths. Each row holds several samples, one after the other, packed
best-fit decreasing as in DeepSeek-R1's training (arXiv 2501.12948 v2, infrastructure). The rows are
as many as the longest samples could need, in small micro-batches, of which only those that hold
something are run. So one program is compiled for all phases, and its time follows the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax
import numpy as np

from r1jax.data.packing import best_fit_decreasing
from r1jax.data.padded_rows import round_up
from r1jax.grpo import GRPOBatch
from r1jax.processes import gather
from r1jax.rollouts.sampling import Completion
from r1jax.sampler import Finish
from r1jax.sharding import Layout, process_batch_parts
from r1jax.stages.grpo.groups import Group
from r1jax.stages.grpo.settings import GRPOStage

if TYPE_CHECKING:
    from jaxtyping import PyTree

# What a device computes at once, at least: fewer tokens do not keep it busy, and a micro-batch may
# gather all weights. A CPU's caches hold no more.
_LEAST_TOKENS, _LEAST_TOKENS_ON_CPU = 8192, 2048
# Micro-batches of an update, at least, where samples are as long as they can be: the last one that
# is run is half empty, on average. With real lengths a quarter of them, or fewer, is run.
_LEAST_MICRO_BATCHES = 128


@dataclass(frozen=True)
class PackedShape:
    """Of an update's rows, over all devices.

    samples: in an update. rows: of a micro-batch. micro_batches: at most. time: tokens of a row.
    """

    samples: int
    rows: int
    micro_batches: int
    time: int

    @property
    def all_rows(self) -> int:
        return self.rows * self.micro_batches


def packed_shape(
    stage: GRPOStage, longest_prompt: int, training: Layout, rollout: Layout, *, step: int | None
) -> PackedShape:
    """The rows of an update; a micro-batch has no more than the samples / stage.micro_batches.

    Args:
      longest_prompt: tokens that a prompt of the stage may have.
      step: for the limit of a completion that is in force there; None for the highest of all steps,
        which decides on the numbers of rows in any case.
    """
    samples = stage.questions_per_step * stage.outputs_per_question
    shards = training.shards("batch")

    def time(new_tokens: int) -> int:
        return round_up(longest_prompt + new_tokens, stage.length_bucket)

    longest = time(stage.longest_sample())
    tokens = _LEAST_TOKENS_ON_CPU if training.platform == "cpu" else _LEAST_TOKENS
    rows = max(-(-tokens // longest) * shards, samples // _LEAST_MICRO_BATCHES)
    rows = min(round_up(rows, shards), samples // stage.micro_batches)
    # All rows divide over the devices that sample, which may be split in another way.
    multiple = rollout.shards("batch") // math.gcd(rows, rollout.shards("batch"))
    micro_batches = round_up(-(-samples // rows), multiple)
    limit = longest if step is None else time(stage.sample_tokens_at(step))
    return PackedShape(samples, rows, micro_batches, limit)


def split_evenly(
    lengths: Sequence[int] | np.ndarray, parts: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Indices of samples, dealt to `parts` at random, each with its share of long and short ones.

    Of samples of neighbouring lengths each part gets one, so that the parts, and the processes that
    work on a part together, have equally many tokens, nearly. Every sample is as likely in each.
    """
    order = generator.permutation(len(lengths))
    order = order[np.argsort(-np.asarray(lengths)[order], kind="stable")]
    none = np.full(-len(order) % parts, -1, order.dtype)
    dealt = generator.permuted(np.concatenate([order, none]).reshape(-1, parts), axis=1)
    return [part[part >= 0] for part in dealt.T]


def expected_micro_batches(
    shape: PackedShape, lengths: Sequence[int], slices: int, updates: int = 1
) -> float:
    """Those of an update that hold something, on average over ways to deal samples to processes.

    Args:
      lengths: of the phase's samples, with their prompts.
      slices: of the batch, each of which packs samples of its own.
      updates: that the phase feeds.
    """
    per_slice = shape.all_rows // slices
    counts = []
    for seed in range(max(1, 8 // updates)):
        generator = np.random.default_rng(seed)
        dealt = generator.permutation(lengths).reshape(slices, -1)
        split = [split_evenly(of_slice, updates, generator) for of_slice in dealt]
        for update in range(updates):
            parts = (of[each[update]] for of, each in zip(dealt, split, strict=True))
            rows = max(len(best_fit_decreasing(part.tolist(), shape.time)) for part in parts)
            counts.append(-(-min(rows, per_slice) * slices // shape.rows))
    return float(np.mean(counts))


@dataclass(frozen=True)
class TrainingSample:
    """A sample as an update reads it; of several attempts, the last one.

    advantage: of all tokens of the completion, or float32 [length] of each.
    trained: False leaves it out of the loss. kl_coefficient: of the penalty on its tokens, where
    attempts have their own. earlier: the attempts before it, which its prompt holds; each is a
    sequence of the loss.
    """

    completion: Completion
    advantage: float | np.ndarray
    trained: bool
    kl_coefficient: float = 0.0
    earlier: tuple[TrainingSample, ...] = ()

    @property
    def sequences(self) -> tuple[TrainingSample, ...]:
        return (*self.earlier, self)

    @property
    def length(self) -> int:
        return len(self.completion.prompt.token_ids) + len(self.completion.token_ids)

    @property
    def trained_tokens(self) -> int:
        return len(self.completion.token_ids) if self.trained else 0


def mini_batches(
    samples: Sequence[TrainingSample], count: int, seed: int
) -> list[list[TrainingSample]]:
    """The samples of each update: all for one, else those of `split_evenly`."""
    if count == 1:
        return [list(samples)]
    split = split_evenly([each.length for each in samples], count, np.random.default_rng(seed))
    return [[samples[i] for i in part] for part in split]


def training_samples(
    stage: GRPOStage,
    groups: Sequence[Group],
    advantages: np.ndarray | Sequence[Sequence[float | np.ndarray]],
) -> list[TrainingSample]:
    """Samples with their advantages [groups, samples], of samples or of their tokens.

    Unscored samples of a stage with rewards, and truncated ones if the stage says so, are left out
    of the loss.

    Args:
      advantages: may have more rows, which are padding.
    """
    return [
        TrainingSample(
            completion,
            advantage if isinstance(advantage, np.ndarray) else float(advantage),
            not (stage.rewarded and np.isnan(reward))
            and not (stage.mask_truncated and completion.finish == Finish.LENGTH),
        )
        for group, of_group in zip(groups, advantages, strict=False)
        for completion, reward, advantage in zip(
            group.completions, group.rewards, of_group, strict=True
        )
    ]


@dataclass(frozen=True)
class PackedUpdates:
    """This process's rows of the updates of a phase, host arrays.

    rows_filled: real tokens / positions that are computed, over all updates and processes.
    """

    batches: list[GRPOBatch]
    rows_filled: float


def pack_updates(
    updates: Sequence[Sequence[TrainingSample]],
    shape: PackedShape,
    layout: Layout,
    *,
    keep_untrained: bool = False,
    experts: jax.ShapeDtypeStruct | None = None,
    attempts: bool = False,
) -> PackedUpdates:
    """Pack this process's samples of each update; all processes call it.

    Ids are those that were sampled, never re-encoded text.

    Args:
      layout: whose slice of the batch the samples are.
      keep_untrained: pack samples that are left out of the loss, too: the router of a mixture of
        experts counts their tokens.
      experts: like those of tokens, [..., layers * k], where samples have them.
      attempts: samples have several: the batches tell them apart by `segment_ids`, and have
        `kl_coefficients`.

    Raises:
      ValueError: a sample is longer than a row.
    """
    row_index, micro_batch = filling_order(shape, layout)
    kept = [
        [s for s in samples if keep_untrained or any(each.trained for each in s.sequences)]
        for samples in updates
    ]
    packed = [pack_samples(samples, shape.time) for samples in kept]
    facts = [
        {
            # At least 1: the update is run where there is nothing to train on, too.
            "used": 1 + int(micro_batch[max(len(rows) - 1, 0)]),
            "trained": sum(each.trained_tokens > 0 for s in samples for each in s.sequences),
            "samples": len(samples),
            "tokens": sum(sample.length for sample in samples),
        }
        for rows, samples in zip(packed, kept, strict=True)
    ]
    batches, tokens, positions = [], 0, 0
    for rows, *of_all in zip(packed, *gather([facts], layout), strict=True):
        used = max(each["used"] for each in of_all)
        tokens += sum(each["tokens"] for each in of_all)
        positions += used * shape.rows * shape.time
        scalars: dict[str, PyTree] = {
            "sequences": np.int32(sum(each["trained"] for each in of_all)),
            "samples": np.int32(sum(each["samples"] for each in of_all)),
            "used_micro_batches": np.int32(used),
        }
        arrays = row_arrays(rows, row_index, shape.time, experts)
        if attempts:
            arrays = replace(arrays, **attempt_arrays(rows, row_index, shape.time))
        batches.append(replace(arrays, **scalars))
    return PackedUpdates(batches, tokens / positions)


def pack_samples(samples: Sequence[TrainingSample], time: int) -> list[list[TrainingSample]]:
    """The samples of each row, the rows with most trained tokens first.

    Raises:
      ValueError: a sample is longer than `time`.
    """
    lengths = [sample.length for sample in samples]
    if max(lengths, default=0) > time:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit into rows of {time}")
    rows = [[samples[i] for i in items] for items in best_fit_decreasing(lengths, time)]
    return sorted(
        rows, key=lambda row: -sum(each.trained_tokens for s in row for each in s.sequences)
    )


def filling_order(shape: PackedShape, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """The order in which this process's rows are filled, and the micro-batch of each.

    One micro-batch after the other, and in each the devices in turn, there and back: neighbours in
    a list that is sorted by work, so that no device waits long for another.
    """
    size = shape.all_rows // layout.shards("batch")
    parts = np.asarray(process_batch_parts(layout))
    index = (parts[:, None] * size + np.arange(size)).reshape(-1)  # of all processes' rows
    micro_batch, device = index % shape.micro_batches, index // size
    turn = (index % size) // shape.micro_batches
    order = np.lexsort((np.where(turn % 2, -device, device), turn, micro_batch))
    return order, micro_batch[order]


def row_arrays(
    rows: Sequence[Sequence[TrainingSample]],
    row_index: np.ndarray,
    time: int,
    experts: jax.ShapeDtypeStruct | None,
) -> GRPOBatch:
    """Rows as arrays [len(row_index), time]; the n-th row is that of index row_index[n].

    Args:
      experts: see `pack_updates`.
    """
    shape = (len(row_index), time)
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    mask, sampler, advantages, lengths = (np.zeros(shape, np.float32) for _ in range(4))
    inputs = {"tokens": tokens, "positions": positions, "segment_ids": segment_ids}
    if experts is not None:
        inputs["experts"] = np.zeros((*shape, experts.shape[-1]), experts.dtype)
    steps = np.arange(time, dtype=np.int32)
    for samples, r in zip(rows, row_index.tolist(), strict=False):
        first = 0
        for segment, sample in enumerate(samples, start=1):
            completion = sample.completion
            start = first + len(completion.prompt.token_ids)
            end = start + len(completion.token_ids)
            tokens[r, first:start] = completion.prompt.token_ids
            tokens[r, start:end] = completion.token_ids
            positions[r, first:end] = steps[: end - first]
            segment_ids[r, first:end] = segment
            for each in sample.sequences:
                part = _tokens_of(each, first)
                sampler[r, part] = each.completion.sampler_log_probs
                mask[r, part] = each.trained
                advantages[r, part] = each.advantage
                lengths[r, part] = each.trained_tokens
            if completion.experts is not None:
                inputs["experts"][r, first : first + len(completion.experts)] = completion.experts
            first = end
    arrays: dict[str, PyTree] = {"mask": mask, "sampler_log_probs": sampler}
    arrays |= {"advantages": advantages, "lengths": lengths}
    return GRPOBatch(inputs=inputs, **arrays)


def attempt_arrays(
    rows: Sequence[Sequence[TrainingSample]], row_index: np.ndarray, time: int
) -> dict[str, PyTree]:
    """`segment_ids`, which tell the attempts of a row's samples apart, and `kl_coefficients`.

    A segment ends where its attempt does: what stands between two attempts is the later one's.
    """
    shape = (len(row_index), time)
    segment_ids, coefficients = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for samples, r in zip(rows, row_index.tolist(), strict=False):
        first = segment = 0
        for sample in samples:
            before = first
            for each in sample.sequences:
                part = _tokens_of(each, first)
                segment += 1
                segment_ids[r, before : part.stop] = segment
                coefficients[r, part] = each.kl_coefficient
                before = part.stop
            first = before
    return {"segment_ids": segment_ids, "kl_coefficients": coefficients}


def _tokens_of(sequence: TrainingSample, first: int) -> slice:
    """Where the tokens of a completion stand in a row, whose prompt begins at `first`."""
    start = first + len(sequence.completion.prompt.token_ids)
    return slice(start, start + len(sequence.completion.token_ids))
