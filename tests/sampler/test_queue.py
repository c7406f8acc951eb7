"""Slots that are refilled: the samples are those of `generate`, whatever slots, pages and order."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from r1jax.models import Decoder, Execution, ModelConfig, init_params
from r1jax.models.decoder import decode_slots
from r1jax.models.paged_cache import PageList
from r1jax.models.paged_kernel_gpu import SlotPages, pages_of_slots
from r1jax.models.parameters import Params
from r1jax.sampler import Finish, GenerateOptions, Prompts, Sampling, generate
from r1jax.sampler.queue import (
    QueuedPrompt,
    QueueFigures,
    QueueSample,
    pieces_of_prompt,
    sample_queue,
)
from r1jax.sharding import Layout, single_device

VOCAB = 23
CONFIG = ModelConfig(
    "qwen3", VOCAB, 16, 32, 2, 4, 2, 8, tie_word_embeddings=True, initializer_range=0.5
)


@cache
def model_of(layers: int, scan: bool = False) -> tuple[Decoder, Params]:
    config = replace(CONFIG, num_hidden_layers=layers)
    execution = Execution(compute_dtype=np.float32, remat="none", scan_layers=scan)
    model = Decoder(config, execution, single_device())
    return model, init_params(jax.random.key(3), config, model.layout)


ONE_LAYER = model_of(1)
LENGTHS = [5, 8, 3, 7, 1, 6, 2, 4, 8]
EOS = (3, 7, 11)
OPTIONS = GenerateOptions(samples=3, max_new_tokens=24, seed=5, eos_ids=EOS, page=4, slots=4)


def queue(lengths: list[int] = LENGTHS) -> list[QueuedPrompt]:
    rows = np.random.default_rng(1).integers(0, VOCAB, (20, 8)).astype(np.int32)
    return [QueuedPrompt(rows[i, :n], id=10 + i) for i, n in enumerate(lengths)]


def run(
    prompts: list[QueuedPrompt],
    options: GenerateOptions,
    of: tuple[Decoder, Params] = ONE_LAYER,
    **more: Any,
) -> dict[tuple[int, int], QueueSample]:
    model, params = of
    found: dict[tuple[int, int], QueueSample] = {}
    for ended in sample_queue(params, prompts, model, options, prompt_tokens=8, **more):
        for sample in ended:
            assert (sample.prompt, sample.sample) not in found
            found[sample.prompt, sample.sample] = sample
    assert len(found) == len(prompts) * options.samples
    return found


def expected(
    prompts: list[QueuedPrompt],
    options: GenerateOptions,
    of: tuple[Decoder, Params] = ONE_LAYER,
) -> Any:
    model, params = of
    tokens = np.zeros((len(prompts), 8), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt.token_ids)] = prompt.token_ids
    lengths = np.asarray([len(prompt.token_ids) for prompt in prompts], np.int32)
    ids = np.asarray([prompt.id for prompt in prompts], np.uint32)
    return jax.device_get(generate(params, Prompts(tokens, lengths, ids), model, options))


def assert_same(found: dict[tuple[int, int], QueueSample], wanted: Any) -> None:
    for (i, j), sample in found.items():
        length = int(wanted.lengths[i, j])
        np.testing.assert_array_equal(sample.tokens, wanted.tokens[i, j, :length])
        assert sample.finish == wanted.finish[i, j]
        for name in ("policy_log_probs", "sampling_log_probs"):
            values = getattr(wanted, name)[i, j, :length]
            np.testing.assert_allclose(getattr(sample, name), values, atol=2e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_samples_are_those_of_a_batch(scan: bool) -> None:
    figures = QueueFigures()
    found = run(queue(), OPTIONS, model_of(2, scan), figures=figures)
    wanted = expected(queue(), OPTIONS, model_of(2))
    assert_same(found, wanted)
    assert {Finish.EOS, Finish.LENGTH} <= {sample.finish for sample in found.values()}
    assert figures.busy == sum(len(sample.tokens) for sample in found.values())
    assert figures.slot_use > 0.8  # 27 samples through 4 slots


def test_a_gpu_splits_layers_that_are_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = expected(queue(), OPTIONS, model_of(3))
    monkeypatch.setattr(Layout, "platform", "gpu")
    split: list[bool] = []

    def decode(layers: Params, *rest: Any, **more: Any) -> Any:
        split.append(isinstance(layers["layers"], tuple))
        return decode_slots(layers, *rest, **more)

    monkeypatch.setattr("r1jax.sampler.slots.decode_slots", decode)
    assert_same(run(queue(), OPTIONS, model_of(3, scan=True)), wanted)
    assert split and all(split)


def test_the_kernel_of_a_gpu_samples_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted; slots of a prompt read its page together."""
    config = replace(CONFIG, num_hidden_layers=2, head_dim=16)
    execution = Execution(compute_dtype=np.float32, remat="none", scan_layers=True)
    model = Decoder(config, execution, single_device())
    of = model, init_params(jax.random.key(3), config, model.layout)
    options = replace(OPTIONS, page=16, slots=6)
    by_kernel: list[SlotPages] = []

    def reads_of_kernel(reads: PageList, slots: int, tokens: int, model: Decoder) -> SlotPages:
        by_kernel.append(pages_of_slots(reads, slots, 2 * tokens))
        return by_kernel[-1]

    monkeypatch.setattr("r1jax.models.decoder.kernel_reads", reads_of_kernel)
    found = run(queue(), options, of)
    assert by_kernel and by_kernel[0].groups is not None
    assert_same(found, expected(queue(), options, of))


@pytest.mark.parametrize(
    "change",
    [
        {"slots": 1},
        {"slots": 27, "page": 16},
        {"page": 1},
        {"sync_every": 1},
        {"page": 8, "sync_every": 5, "slots": 7},
        {"cache_tokens": 68},
    ],
)
def test_a_sample_is_the_same_whatever_slots_pages_and_budget(change: dict[str, int]) -> None:
    assert_same(run(queue(), replace(OPTIONS, **change)), expected(queue(), OPTIONS))


def test_samples_that_give_their_pages_back_begin_again() -> None:
    options, figures = replace(OPTIONS, eos_ids=(3,), slots=6, cache_tokens=72), QueueFigures()
    found = run(queue(), options, figures=figures)
    assert_same(found, expected(queue(), options))
    assert figures.repeated > 0
    assert figures.busy == figures.repeated + sum(len(s.tokens) for s in found.values())


def test_the_order_of_the_queue_changes_no_sample() -> None:
    forward, backward = run(queue(), OPTIONS), run(queue()[::-1], OPTIONS)
    for (i, j), sample in forward.items():
        other = backward[len(LENGTHS) - 1 - i, j]
        np.testing.assert_array_equal(sample.tokens, other.tokens)


def test_further_samples_of_a_prompt_go_on_where_the_others_ended() -> None:
    prompts = [replace(prompt, first_sample=1) for prompt in queue()]
    later = run(prompts, replace(OPTIONS, samples=2))
    wanted = expected(queue(), OPTIONS)
    for (i, j), sample in later.items():
        length = int(wanted.lengths[i, j + 1])
        np.testing.assert_array_equal(sample.tokens, wanted.tokens[i, j + 1, :length])


@pytest.mark.parametrize(
    ("prompts", "samples", "shards", "pieces"),
    [
        (2, 8, 8, 4),  # a quarter of two prompts' samples for each
        (1, 8, 8, 8),
        (1, 4, 8, 4),  # more shards than samples
        (3, 6, 2, 2),  # one would have two prompts, and the other one
        (5, 16, 4, 4),
        (64, 16, 4, 1),
        (15, 64, 16, 1),  # one shard of sixteen has none
        (7, 8, 4, 4),  # with halves one shard would have three of fourteen, and others four
        (0, 8, 4, 1),
    ],
)
def test_few_prompts_are_split_over_the_shards(
    prompts: int, samples: int, shards: int, pieces: int
) -> None:
    assert pieces_of_prompt(prompts, samples, shards) == pieces


def test_samples_of_a_prompt_that_is_split_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = expected(queue(), OPTIONS)
    monkeypatch.setattr("r1jax.sampler.queue.pieces_of_prompt", lambda *_: OPTIONS.samples)
    prompts = [replace(prompt, first_sample=0) for prompt in queue()]
    assert_same(run(prompts, OPTIONS), wanted)
    later = run(
        [replace(prompt, first_sample=1) for prompt in prompts], replace(OPTIONS, samples=3)
    )
    for (i, j), sample in later.items():
        if j + 1 < OPTIONS.samples:
            length = int(wanted.lengths[i, j + 1])
            np.testing.assert_array_equal(sample.tokens, wanted.tokens[i, j + 1, :length])


def test_stop_strings_end_samples() -> None:
    def stop(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Behind the first two equal tokens in a row."""
        if tokens.shape[1] < 2:
            return np.full(len(tokens), -1)
        inside = np.arange(1, tokens.shape[1]) < lengths[:, None]
        equal = (tokens[:, 1:] == tokens[:, :-1]) & inside
        return np.where(equal.any(axis=1), equal.argmax(axis=1) + 2, -1)

    options = replace(OPTIONS, stop=stop, sync_every=3, eos_ids=(3,))
    found, wanted = run(queue(), options), expected(queue(), options)
    assert_same(found, wanted)
    assert Finish.STOP in {sample.finish for sample in found.values()}


def test_filters_and_greedy_sampling() -> None:
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=0.7, top_p=0.8, top_k=5)):
        options = replace(OPTIONS, sampling=sampling)
        assert_same(run(queue(), options), expected(queue(), options))


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_tokens = 20: .* has at least 52"):
        run(queue(), replace(OPTIONS, cache_tokens=20))
