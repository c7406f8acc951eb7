"""Lengths as a distribution: against draws, and against queues that are played out."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from r1jax.programs.lengths import CutLognormal, normal_maximum, slot_steps

R1 = CutLognormal.of(8000, 32000, 31744)


def draw(lengths: CutLognormal, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    normal = np.random.default_rng(seed).normal(lengths.mu, lengths.sigma, shape)
    return np.minimum(np.exp(normal), lengths.limit)


def test_a_lognormal_of_a_mean_and_a_99th_percentile() -> None:
    uncut = CutLognormal.of(8000, 32000, 10**9)
    drawn = draw(uncut, (400_000,))
    assert drawn.mean() == pytest.approx(8000, rel=0.01)
    assert np.quantile(drawn, 0.99) == pytest.approx(32000, rel=0.02)
    assert uncut.mean == pytest.approx(8000)


def test_moments_and_maxima_of_cut_lengths() -> None:
    for lengths in (R1, CutLognormal.of(300, 900, 400)):
        drawn = draw(lengths, (4000, 256))
        for power in (1, 2, 3):
            expected = (drawn**power).mean()
            assert lengths.moment(power) == pytest.approx(expected, rel=0.01)
        for count in (1, 8, 256):
            found = drawn[:, :count].max(axis=1).mean()
            assert lengths.longest(count) == pytest.approx(found, rel=0.02)
        assert np.mean(lengths.sample(512)) == pytest.approx(lengths.mean, rel=0.01)
    equal = CutLognormal.equal(200)
    assert (equal.mean, equal.moment(2), equal.sample(3)) == (200, 40000, [200] * 3)
    assert equal.longest(7) == pytest.approx(200, rel=0.001)
    assert equal.remaining(1) == pytest.approx(100, rel=0.001)  # anywhere in it


def test_the_largest_of_normal_values() -> None:
    assert normal_maximum(1) == pytest.approx(0, abs=1e-6)
    assert normal_maximum(2) == pytest.approx(np.pi**-0.5, rel=1e-3)
    drawn = np.random.default_rng(0).normal(size=(50_000, 16)).max(axis=1).mean()
    assert normal_maximum(16) == pytest.approx(drawn, rel=0.01)


def play(lengths: np.ndarray, slots: int) -> float:
    """Steps of a queue: each length goes to the slot that is free first."""
    ends = [0.0] * slots
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


@pytest.mark.parametrize(
    ("samples", "slots", "shards"), [(512, 200, 4), (512, 64, 16), (64, 64, 2), (2048, 16, 1)]
)
def test_steps_of_slots_are_those_of_a_queue(samples: int, slots: int, shards: int) -> None:
    for lengths in (R1, CutLognormal.of(300, 900, 512)):
        drawn = draw(lengths, (20, shards, samples))
        played = [max(play(of_shard, slots) for of_shard in phase) for phase in drawn]
        found = slot_steps(lengths, samples, slots, shards)
        assert found.steps == pytest.approx(np.mean(played), rel=0.05)
        assert found.use == pytest.approx(drawn[0].sum() / shards / slots / found.steps, rel=0.05)


def test_equal_lengths_take_whole_rounds() -> None:
    found = slot_steps(CutLognormal.equal(100), 64, 16, 2)
    assert (found.steps, found.use) == (400, 1)
    assert slot_steps(CutLognormal.equal(100), 66, 16, 2).steps == 500
    assert slot_steps(CutLognormal.equal(100), 16, 64, 2).use == 1
