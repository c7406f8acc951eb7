"""How long completions are, and what that makes of a rollout: what a plan counts with.

Lengths are lognormal, as those of reasoning models nearly are, and cut at a limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from statistics import NormalDist

_NORMAL = NormalDist()
_GRID = 4096  # intervals of numerical integration


@dataclass(frozen=True)
class CutLognormal:
    """min(exp(N(mu, sigma^2)), limit), in tokens. With sigma 0 all lengths are the limit."""

    mu: float
    sigma: float
    limit: int

    @classmethod
    def equal(cls, length: int) -> CutLognormal:
        return cls(math.log(length), 0.0, length)

    @classmethod
    def of(cls, mean: float, p99: float, limit: int) -> CutLognormal:
        """By the mean, and the 99th percentile, of the lengths before the limit cuts them.

        Args:
          p99: at least the mean, and at most 14.9 times as much: no lognormal has more.
        """
        z, ratio = _NORMAL.inv_cdf(0.99), math.log(p99 / mean)
        sigma = z - math.sqrt(z * z - 2 * ratio)
        return cls(math.log(mean) - sigma * sigma / 2, sigma, limit)

    @cached_property
    def mean(self) -> float:
        return self.moment(1)

    def moment(self, power: int) -> float:
        """E[length^power]."""
        if not self.sigma:
            return float(self.limit**power)
        cut = (math.log(self.limit) - self.mu) / self.sigma
        below = math.exp(power * self.mu + (power * self.sigma) ** 2 / 2)
        return below * _NORMAL.cdf(cut - power * self.sigma) + self.limit**power * _NORMAL.cdf(-cut)

    def sample(self, count: int) -> list[int]:
        """So many lengths that stand for all: the middles of equally likely parts."""
        z = [_NORMAL.inv_cdf((i + 0.5) / count) for i in range(count)]
        return [max(1, min(self.limit, round(math.exp(self.mu + self.sigma * x)))) for x in z]

    def longest(self, count: int) -> float:
        """The expected longest of so many samples."""
        return self._integral([1 - (1 - x) ** count for x in self._above])

    def remaining(self, count: int) -> float:
        """The expected longest rest of so many samples that are under way at any moment.

        A sample under way is of length x with a density that is proportional to x, and as likely at
        each of its tokens, so its rest r has the density P(length > r) / mean.
        """
        pairs = zip(self._above, self._above[1:], strict=False)
        # P(rest <= r), by the integral of its density.
        below = list(accumulate(((a + b) / 2 for a, b in pairs), initial=0.0))
        return self._integral([1 - (x / below[-1]) ** count for x in below])

    @cached_property
    def _above(self) -> list[float]:
        """P(length > x), on a grid from 0 to the limit."""
        if not self.sigma:
            return [1.0] * (_GRID + 1)
        grid = [self.limit * i / _GRID for i in range(_GRID)]
        above = [1 - _NORMAL.cdf((math.log(x) - self.mu) / self.sigma) for x in grid[1:]]
        return [1.0, *above, 0.0]

    def _integral(self, values: Sequence[float]) -> float:
        """From 0 to the limit, of values on the grid."""
        return (sum(values) - (values[0] + values[-1]) / 2) * self.limit / _GRID


def normal_maximum(count: int) -> float:
    """The expected largest of so many standard normal values."""
    step = 1 / 256
    grid = [step * i for i in range(-8 * 256, 8 * 256 + 1)]
    return sum((x > 0) - _NORMAL.cdf(x) ** count for x in grid) * step + step / 2


@dataclass(frozen=True)
class SlotSteps:
    """What sampling a queue through slots takes, on average.

    steps: of decoding. use: completion tokens for each slot and step.
    """

    steps: float
    use: float


def slot_steps(lengths: CutLognormal, samples: int, slots: int, shards: int) -> SlotSteps:
    """Steps until the last of `samples` has ended, of a shard with that many slots.

    All slots are busy until nothing waits; then those under way end, of all shards the last one
    alone. No phase is shorter than its longest sample.
    """
    slots = min(slots, samples)
    longest = lengths.longest(samples * shards)
    if not lengths.sigma:
        steps = float(-(-samples // slots) * lengths.limit)
    elif slots == samples:
        steps = longest
    else:
        # The tokens of the samples under way are counted among all, so their rest comes off.
        rest = lengths.moment(2) / (2 * lengths.mean)
        tail = lengths.remaining(slots * shards) - rest
        steps = max(longest, samples * lengths.mean / slots + max(0.0, tail))
    return SlotSteps(steps, samples * lengths.mean / (slots * steps))
