"""Slots in which drafts are verified: the samples are those of `generate`, whatever the slots."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from models_with_modules import GROUPED, LATENT, VOCAB

from r1jax.models import Decoder, Execution, ModelConfig, init_params
from r1jax.models.parameters import Params
from r1jax.sampler import Finish, GenerateOptions, Prompts, generate
from r1jax.sampler.queue import QueuedPrompt, QueueFigures, QueueSample, sample_queue
from r1jax.sharding import single_device

LENGTHS = [5, 8, 3, 7, 1, 6, 2]
OPTIONS = GenerateOptions(
    samples=3, max_new_tokens=9, seed=5, eos_ids=(4,), page=4, slots=4, speculative=True
)


@cache
def model_of(config: ModelConfig, scan: bool = False) -> tuple[Decoder, Params]:
    execution = Execution(compute_dtype=np.float32, remat="none", scan_layers=scan)
    model = Decoder(config, execution, single_device())
    return model, init_params(jax.random.key(3), config, model.layout)


def queue() -> list[QueuedPrompt]:
    rows = np.random.default_rng(1).integers(0, VOCAB, (len(LENGTHS), 8)).astype(np.int32)
    return [QueuedPrompt(rows[i, :n], id=10 + i) for i, n in enumerate(LENGTHS)]


def run(
    options: GenerateOptions, config: ModelConfig = GROUPED, scan: bool = False, **more: Any
) -> dict[tuple[int, int], QueueSample]:
    model, params = model_of(config, scan)
    rounds = sample_queue(params, queue(), model, options, prompt_tokens=8, **more)
    found = {(each.prompt, each.sample): each for ended in rounds for each in ended}
    assert len(found) == len(LENGTHS) * options.samples
    return found


@cache
def expected(options: GenerateOptions, config: ModelConfig = GROUPED) -> Any:
    tokens = np.zeros((len(LENGTHS), 8), np.int32)
    for row, prompt in zip(tokens, queue(), strict=True):
        row[: len(prompt.token_ids)] = prompt.token_ids
    ids = np.arange(10, 10 + len(LENGTHS), dtype=np.uint32)
    prompts = Prompts(tokens, np.asarray(LENGTHS, np.int32), ids)
    model, params = model_of(config)
    return jax.device_get(generate(params, prompts, model, options))


def assert_same(
    found: dict[tuple[int, int], QueueSample], options: GenerateOptions, config: ModelConfig
) -> None:
    wanted = expected(replace(options, slots=None, page=None, cache_tokens=None), config)
    for (i, j), sample in found.items():
        length = int(wanted.lengths[i, j])
        np.testing.assert_array_equal(sample.tokens, wanted.tokens[i, j, :length])
        assert sample.finish == wanted.finish[i, j]
        for name in ("policy_log_probs", "sampling_log_probs"):
            values = getattr(wanted, name)[i, j, :length]
            np.testing.assert_allclose(getattr(sample, name), values, atol=2e-4)
        if sample.finish != Finish.STOP:  # after which drafts may have gone on
            assert (sample.drafted, sample.accepted) == (
                wanted.drafted[i, j],
                wanted.accepted[i, j],
            )


@pytest.mark.parametrize(("config", "scan"), [(GROUPED, False), (LATENT, True)])
def test_samples_are_those_of_a_batch(config: ModelConfig, scan: bool) -> None:
    figures = QueueFigures()
    found = run(OPTIONS, config, scan, figures=figures)
    assert_same(found, OPTIONS, config)
    # Some end with their first token, before any draft; and some drafts are accepted.
    assert {0} < {sample.drafted for sample in found.values()}
    assert {0} < {sample.accepted for sample in found.values()}
    assert figures.busy < sum(len(sample.tokens) for sample in found.values())


@pytest.mark.parametrize(
    "change",
    [
        {"slots": 1, "page": 2, "sync_every": 5},
        {"slots": 21, "page": 1, "max_new_tokens": 1},
        {"slots": 7, "cache_tokens": 60, "eos_ids": ()},
    ],
)
def test_a_sample_is_the_same_whatever_slots_pages_and_budget(change: dict[str, Any]) -> None:
    options, figures = replace(OPTIONS, **change), QueueFigures()
    assert_same(run(options, figures=figures), options, GROUPED)
    if "cache_tokens" in change:
        assert figures.repeated > 0


def test_stop_strings_end_samples() -> None:
    def stop(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Behind the first two equal tokens in a row."""
        inside = np.arange(1, tokens.shape[1]) < lengths[:, None]
        equal = (tokens[:, 1:] == tokens[:, :-1]) & inside
        return np.where(equal.any(axis=1), equal.argmax(axis=1) + 2, -1)

    options = replace(OPTIONS, stop=stop, sync_every=3, eos_ids=(4,))
    found = run(options)
    assert_same(found, options, GROUPED)
    assert Finish.STOP in {sample.finish for sample in found.values()}


def test_a_model_without_the_module_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has no module for multi-token prediction"):
        run(OPTIONS, replace(GROUPED, num_nextn_predict_layers=0))
