"""Prompts that go on from others share their pages: the samples are those of whole prompts."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import forked
import numpy as np
import pytest
from compiled_programs import devices
from prompts_in_rounds import LONGEST, OPTIONS, PAGE, STEP, Rounds, Samples, model_of, run

from r1jax.programs.lengths import CutLognormal
from r1jax.programs.program import bytes_on_device
from r1jax.programs.slots import SlotRollout
from r1jax.sampler.prompt_pages import Begun, KnownPrompts, PromptPages
from r1jax.sampler.queue import PromptFeed, QueuedPrompt, QueueFigures, sample_queue, slot_shape
from r1jax.sampler.scheduler import Scheduler
from r1jax.sampler.slot_state import Status
from r1jax.settings.sampling import SamplingSection

SCRIPT = Path(__file__).parents[1] / "prompts_in_rounds.py"


def assert_same(found: Samples, wanted: Samples) -> None:
    assert set(found) == set(wanted)
    for at, sample in found.items():
        np.testing.assert_array_equal(sample.tokens, wanted[at].tokens)
        assert sample.finish == wanted[at].finish
        for name in ("policy_log_probs", "sampling_log_probs"):
            one, other = getattr(sample, name), getattr(wanted[at], name)
            np.testing.assert_allclose(one, other, atol=2e-4)


@cache
def of_whole_prompts(rounds: int, kind: str = "dense") -> tuple[Samples, Rounds]:
    whole = Rounds(rounds, kept=False)
    return run(model_of(kind), whole), whole


def tokens_to_read(rounds: Rounds) -> int:
    """What follows the full pages of the beginning before, of each; one token at least."""
    read, lengths = 0, [len(each.token_ids) for each in rounds.given]
    for each, length in zip(rounds.given, lengths, strict=True):
        before = 0 if each.extends is None else min(lengths[each.extends], length - 1)
        read += length - before // PAGE * PAGE
    return read


@pytest.mark.parametrize(("kind", "scan"), [("dense", False), ("experts", True)])
def test_samples_are_those_of_whole_prompts(kind: str, scan: bool) -> None:
    """Of keys and values, and of latents with experts."""
    kept = Rounds(5, kept=True)
    found = run(model_of(kind, scan), kept)
    wanted, whole = of_whole_prompts(5, kind)
    assert_same(found, wanted)
    tokens = sum(len(each.token_ids) for each in kept.given)
    assert whole.figures.shared == 0 and whole.figures.prefilled == tokens
    assert kept.figures.prefilled == tokens_to_read(kept) < tokens / 2
    assert kept.figures.shared == tokens - kept.figures.prefilled


def test_with_pages_of_one_token_each_token_of_a_step_is_read_once() -> None:
    rounds = Rounds(4, kept=True, copies=1)
    found = run(model_of("dense"), rounds, replace(OPTIONS, page=1))
    wanted = Rounds(4, kept=False, copies=1)
    assert_same(found, run(model_of("dense"), wanted))
    steps = sum(len(found[i, i % 2].tokens) for i in range(len(rounds.given) - rounds.width))
    questions = sum(len(each.token_ids) for each in rounds.given[: rounds.width])
    assert rounds.figures.prefilled == questions + steps


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Scheduler]:
    """Whenever no sample is under way, the devices have as many free pages as the host believes;
    gives the scheduler at each of these times."""
    at, learn = list[Scheduler](), Scheduler.learn

    def learn_and_check(self: Scheduler, status: Status) -> None:
        learn(self, status)
        for i, shard in enumerate(self.shards):
            if not (status.queued[shard] or status.running[shard]):
                used = sum(each.own for each in self._held[i]._held.values())
                assert self._shape.pages - int(status.free[shard]) == used
                at.append(self)

    monkeypatch.setattr(Scheduler, "learn", learn_and_check)
    return at


def test_pages_are_there_once_and_all_of_them_are_free_in_the_end(
    checked: list[Scheduler],
) -> None:
    rounds = Rounds(6, kept=True, copies=1)
    run(model_of("dense"), rounds)
    assert len(checked) >= 6
    (held,) = checked[-1]._held
    checked[-1].end_prompts()
    full = {
        each.token_ids[:end].tobytes()
        for each in rounds.given
        for end in range(PAGE, len(each.token_ids) + 1, PAGE)
    }
    assert held._shape.pages - held.free == len(full)
    held.make_room(held._shape.pages)
    assert held.free == held._shape.pages and set(held.entries) == {-1} and not held._of_prompt


@pytest.mark.parametrize("cache_tokens", [92, 116])
def test_where_pages_are_short_what_is_kept_gives_way(
    cache_tokens: int, checked: list[Scheduler]
) -> None:
    """The least that is allowed, and a little more: some beginnings are read whole, as what they
    go on from is gone, and no sample waits for pages longer than without any that are kept."""
    options, of = replace(OPTIONS, cache_tokens=cache_tokens), model_of("dense")
    rounds, alone = Rounds(6, kept=True), Rounds(6, kept=False)
    wanted, _ = of_whole_prompts(6)
    assert_same(run(of, rounds, options), wanted)
    run(of, alone, replace(options, extended_by=0))
    figures = rounds.figures
    tokens = sum(len(each.token_ids) for each in rounds.given)
    assert tokens_to_read(rounds) < figures.prefilled < tokens == figures.prefilled + figures.shared
    assert figures.repeated <= alone.figures.repeated and figures.steps <= alone.figures.steps
    assert checked


@pytest.mark.parametrize(("extended_by", "shared"), [(8, 0), (24, 16)])
def test_a_suffix_that_is_too_long_is_read_with_its_beginning(
    extended_by: int, shared: int
) -> None:
    model, params = model_of("dense")
    rows, figures = np.arange(40, dtype=np.int32) % 20, QueueFigures()
    prompts = [QueuedPrompt(rows[:16], id=0), QueuedPrompt(rows, id=0, extends=0)]
    waiting = iter([[prompts[:1]], [prompts[1:]], None])
    feed = PromptFeed(lambda idle: next(waiting) if idle else [[]], 1)
    options = replace(OPTIONS, extended_by=extended_by)
    assert list(sample_queue(params, feed, model, options, prompt_tokens=LONGEST, figures=figures))
    assert figures.shared == shared and figures.prefilled == 56 - shared


def test_what_does_not_begin_with_a_prompt_cannot_extend_it() -> None:
    model, params = model_of("dense")
    rows = np.arange(12, dtype=np.int32)
    for second, message in (
        (QueuedPrompt(rows[1:], id=1, extends=0), "prompt 1 does not begin with the tokens of"),
        (QueuedPrompt(rows[:4], id=1, extends=0), "prompt 1 of 4 tokens cannot extend prompt 0"),
        (QueuedPrompt(rows, id=1, extends=1), "prompt 1 of 12 tokens cannot extend prompt 1"),
    ):
        queue = [QueuedPrompt(rows[:8], id=0), second]
        with pytest.raises(ValueError, match=message):
            next(sample_queue(params, queue, model, OPTIONS, prompt_tokens=LONGEST))


@pytest.mark.parametrize("change", [{"speculative": True}, {"record_experts": True}])
def test_with_drafts_and_recorded_experts_nothing_is_kept(change: dict[str, bool]) -> None:
    model, _ = model_of("dense")
    shape = slot_shape(model, replace(OPTIONS, **change), prompts=9, prompt_tokens=LONGEST)
    without = replace(OPTIONS, extended_by=0, **change)
    assert shape == slot_shape(model, without, prompts=9, prompt_tokens=LONGEST)


@pytest.mark.parametrize("scan", [False, True])
def test_the_pool_is_not_copied_where_suffixes_are_read(scan: bool) -> None:
    model, _ = model_of("dense", scan)
    lengths = CutLognormal.equal(STEP)
    planned = SlotRollout(model, 64, 4, 2000, STEP, SamplingSection(), lengths, extended_by=STEP)
    (program,) = (each for each in planned.programs({}, 1.0) if "suffixes" in each.name)
    memory = program.lower().compile().memory_analysis()
    assert memory.temp_size_in_bytes < bytes_on_device(planned.state.cache.pages) / 4


@pytest.mark.slow  # programs are compiled for eight devices
def test_shards_share_pages_of_their_own() -> None:
    cases = [
        [kind, scan, count, width, slots, kept]
        for kind, scan in (("dense", False), ("experts", True))
        for count, width, slots, kept in ((1, 6, 4, False), (8, 6, 16, True))
    ]
    done = forked.run(str(SCRIPT), json.dumps(cases), env=os.environ | devices(8))
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for whole, kept in (results[:2], results[2:]):
        assert kept["tokens"] == whole["tokens"]
        for a, b in zip(kept["log_probs"], whole["log_probs"], strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)
        figures = kept["figures"]
        assert figures["prefilled"] + figures["shared"] == sum(kept["lengths"])
        # Copies of a question begin on shards that have nothing to do; what follows stays there.
        assert figures["shared"] > figures["prefilled"]


# --- The host's side alone ------------------------------------------------------------------------


def pages_of(*lengths: int, extends: tuple[int | None, ...], pages: int = 20) -> PromptPages:
    model, _ = model_of("dense")
    options = replace(OPTIONS, slots=1)
    shape = slot_shape(model, options, prompts=9, prompt_tokens=LONGEST)
    known = KnownPrompts()
    known.add(lengths, extends)
    return PromptPages(replace(shape, pages=pages, prompts=4), known)


def put(held: PromptPages, prompt: int, *, ended: bool = True) -> int:
    begun = held.begun(prompt)
    assert held.has_room(prompt, begun, 0)
    entry = held.add(prompt, begun)
    if ended:
        held.end(entry)
    return entry


def test_a_chain_has_each_full_page_once() -> None:
    held = pages_of(10, 18, 19, 26, extends=(None, 0, 1, 2))
    assert put(held, 0) == 0 and held.free == 20 - 2  # of 3 pages the last was not full
    assert held.released() == {0: 2}
    assert held.begun(1) == Begun(0, 2)
    assert put(held, 1) == 1 and held.free == 20 - 4
    # The third has no full page of its own: what goes on from it goes on from the second.
    assert held.begun(2) == Begun(1, 4) and put(held, 2) == 2
    assert held.entries == [0, 1, -1, -1] and held.released() == {1: 4, 2: 4}
    assert held.begun(3) == Begun(1, 4) and put(held, 3) == 2 and held.free == 20 - 6


def test_a_copy_reads_its_last_page_and_is_not_kept() -> None:
    held = pages_of(8, 8, 9, extends=(None, 0, 1))
    first = put(held, 0, ended=False)
    assert held.begun(1) == Begun(first, 1)
    copy = put(held, 1, ended=False)
    assert held.free == 20 - 3
    held.end(copy)
    assert held.free == 20 - 2 and held.entries[copy] == -1
    assert held.begun(2) == Begun(first, 2)


def test_what_others_build_on_stays_and_the_longest_unused_goes() -> None:
    held = pages_of(8, 16, 8, 8, 12, 40, extends=(None, 0, None, None, 3, None), pages=12)
    for prompt in (0, 1, 2):
        put(held, prompt)
    assert held.free == 12 - 6
    last = put(held, 3, ended=False)
    held.make_room(5)
    assert held.entries == [0, -1, 2, last]  # the second, on which nothing builds
    held.make_room(7)
    assert held.entries == [-1, -1, 2, last] and held.begun(1) == Begun()
    held.make_room(12)
    assert held.entries == [-1, -1, -1, last] and held.free == 10  # its samples are under way
    child = put(held, 4, ended=False)
    held.end(last)
    held.make_room(12)
    assert held.entries[last] == 3 and held.free == 9  # a sample reads its pages
    assert not held.has_room(5, held.begun(5), 0)
    held.end(child)
    assert held.has_room(5, held.begun(5), 0)
    put(held, 5, ended=False)
    assert held.free == 0 and held.entries[last] == 3 and held.entries[child] == 5


def test_what_has_no_page_of_its_own_is_not_built_on() -> None:
    held = pages_of(8, 10, 11, extends=(None, 0, 1))
    first = put(held, 0)
    second = put(held, 1, ended=False)
    assert held.begun(2) == Begun(first, 2)
    put(held, 2, ended=False)
    held.end(second)
    assert held.entries[second] == -1


def test_what_a_prompt_goes_on_from_does_not_make_room_for_it() -> None:
    held = pages_of(40, 48, 52, extends=(None, 0, 0), pages=12)
    put(held, 0)
    assert held.has_room(1, held.begun(1), 0)
    assert not held.has_room(2, held.begun(2), 0)
