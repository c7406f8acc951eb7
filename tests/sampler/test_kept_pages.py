"""Prompts that go on from others share their pages: the samples are those of whole prompts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from on_a_mesh import CONFIGS
from tiny_models import random_params

from r1jax.models import Decoder, Execution
from r1jax.models.parameters import Params
from r1jax.sampler import GenerateOptions
from r1jax.sampler.queue import (
    PromptFeed,
    QueuedPrompt,
    QueueFigures,
    QueueSample,
    sample_queue,
)
from r1jax.sampler.scheduler import Scheduler
from r1jax.sampler.slot_state import Status
from r1jax.sharding import single_device

PAGE, STEP, LONGEST = 4, 8, 64
OPTIONS = GenerateOptions(
    samples=2, max_new_tokens=STEP, seed=5, eos_ids=(3, 7), page=PAGE, slots=4, extended_by=STEP
)


@cache
def model_of(kind: str, scan: bool) -> tuple[Decoder, Params]:
    config = replace(CONFIGS[kind], num_nextn_predict_layers=0)
    execution = Execution(compute_dtype=np.float32, remat="none", scan_layers=scan, expert_chunk=8)
    return Decoder(config, execution, single_device()), random_params(config)


@dataclass
class Rounds:
    """Rounds of beginnings: of each prompt a sample goes on, the others are left.

    kept: whether a beginning says what it goes on from. given: what was sampled, in order.
    """

    rounds: int
    kept: bool
    width: int = 3
    copies: int = 2
    given: list[QueuedPrompt] = field(default_factory=list)
    found: dict[tuple[int, int], QueueSample] = field(default_factory=dict)
    figures: QueueFigures = field(default_factory=QueueFigures)

    def following(self, idle: bool) -> list[list[QueuedPrompt]] | None:
        if not idle:
            return [[]]
        if not self.rounds:
            return None
        self.rounds -= 1
        new = self.first() if not self.given else list(self.next())
        self.last = range(len(self.given), len(self.given) + len(new))
        self.given += new
        if not self.kept:
            new = [replace(each, extends=None) for each in new]
        return [new]

    def first(self) -> list[QueuedPrompt]:
        rng = np.random.default_rng(1)
        rows = rng.integers(0, 20, (self.width, 16)).astype(np.int32)
        alone = [QueuedPrompt(row[: 3 + 5 * i], id=i) for i, row in enumerate(rows)]
        again = [
            replace(each, first_sample=10, extends=i)
            for _ in range(self.copies - 1)
            for i, each in enumerate(alone)
        ]
        return [*alone, *again]

    def next(self) -> Any:
        for index in self.last:
            before, step = self.given[index], self.found[index, index % 2].tokens
            ids = np.concatenate([before.token_ids, step])
            first = before.first_sample + 1
            yield QueuedPrompt(ids, before.id, first, extends=index)


def run(
    of: tuple[Decoder, Params], rounds: Rounds, options: GenerateOptions = OPTIONS
) -> dict[tuple[int, int], QueueSample]:
    model, params = of
    feed = PromptFeed(rounds.following, 6)
    for ended in sample_queue(
        params, feed, model, options, prompt_tokens=LONGEST, figures=rounds.figures
    ):
        rounds.found |= {(each.prompt, each.sample): each for each in ended}
    assert len(rounds.found) == len(rounds.given) * options.samples
    return rounds.found


def assert_same(
    found: dict[tuple[int, int], QueueSample], wanted: dict[tuple[int, int], QueueSample]
) -> None:
    assert set(found) == set(wanted)
    for at, sample in found.items():
        np.testing.assert_array_equal(sample.tokens, wanted[at].tokens)
        assert sample.finish == wanted[at].finish
        for name in ("policy_log_probs", "sampling_log_probs"):
            one, other = getattr(sample, name), getattr(wanted[at], name)
            np.testing.assert_allclose(one, other, atol=2e-4)


@pytest.mark.parametrize(("kind", "scan"), [("dense", False), ("experts", True)])
def test_samples_are_those_of_whole_prompts(kind: str, scan: bool) -> None:
    of = model_of(kind, scan)
    kept, whole = Rounds(5, kept=True), Rounds(5, kept=False)
    assert_same(run(of, kept), run(of, whole))
    lengths = [len(each.token_ids) for each in kept.given]
    assert whole.figures.shared == 0 and whole.figures.prefilled == sum(lengths)
    # Of a beginning what follows the full pages of the one before it; of a copy its last page.
    read = sum(lengths[:3])
    for each in kept.given[3:]:
        assert each.extends is not None
        length, before = len(each.token_ids), lengths[each.extends]
        read += length - min(before, length - 1) // PAGE * PAGE
    assert kept.figures.prefilled == read
    assert kept.figures.shared == sum(lengths) - read > 1.5 * read


@cache
def of_whole_prompts(rounds: int) -> tuple[dict[tuple[int, int], QueueSample], QueueFigures]:
    whole = Rounds(rounds, kept=False)
    return run(model_of("dense", False), whole), whole.figures


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whenever no sample is under way, the devices have as many free pages as the host believes;
    gives how many are used at each of these times."""
    used, learn = list[int](), Scheduler.learn

    def learn_and_check(self: Scheduler, status: Status) -> None:
        learn(self, status)
        for i, shard in enumerate(self.shards):
            if not (status.queued[shard] or status.running[shard]):
                of_entries = sum(each.own for each in self._held[i]._held.values())
                assert self._shape.pages - int(status.free[shard]) == of_entries
                used.append(of_entries)

    monkeypatch.setattr(Scheduler, "learn", learn_and_check)
    return used


def test_pages_are_there_once_and_all_of_them_are_free_in_the_end(checked: list[int]) -> None:
    rounds, of = Rounds(6, kept=True), model_of("dense", False)
    schedulers = []
    end = rounds.following

    def following(idle: bool) -> list[list[QueuedPrompt]] | None:
        schedulers[:] = made
        return end(idle)

    made: list[Scheduler] = []
    init = Scheduler.__init__

    def remembered(self: Scheduler, *args: Any) -> None:
        init(self, *args)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "__init__", remembered)
        found = run(of, rounds)
    assert_same(found, of_whole_prompts(6)[0])
    (scheduler,) = made
    (held,) = scheduler._held
    scheduler.end_prompts()
    full = {each.token_ids[: n + PAGE].tobytes() for each in rounds.given for n in starts(each)}
    assert len(checked) >= 6 and held._shape.pages - held.free == len(full)
    held.make_room(held._shape.pages)
    assert held.free == held._shape.pages and set(held.entries) == {-1} and not held._of_prompt


def starts(prompt: QueuedPrompt) -> range:
    """Where the full pages of a prompt begin."""
    return range(0, len(prompt.token_ids) // PAGE * PAGE, PAGE)


@pytest.mark.parametrize("cache_tokens", [92, 116])
def test_where_pages_are_short_what_is_kept_gives_way(
    cache_tokens: int, checked: list[int]
) -> None:
    rounds, options = Rounds(6, kept=True), replace(OPTIONS, cache_tokens=cache_tokens)
    of = model_of("dense", False)
    alone = Rounds(6, kept=False)
    assert_same(run(of, rounds, options), of_whole_prompts(6)[0])
    run(of, alone, replace(options, extended_by=0))
    figures, many = rounds.figures, Rounds(6, kept=True)
    run(of, many)
    # Some beginnings were read whole, as what they go on from was gone.
    assert 0 < figures.shared < many.figures.shared
    assert figures.shared + figures.prefilled == sum(len(each.token_ids) for each in rounds.given)
    assert figures.repeated <= alone.figures.repeated and figures.steps <= alone.figures.steps
    assert checked
