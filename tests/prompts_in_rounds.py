"""Rounds of prompts that go on from each other, through one queue; as a script, on a mesh.

Prints the samples, log-probs and figures of cases given as JSON, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from on_a_mesh import CONFIGS, small_buffers

from r1jax.models import Decoder, Execution, init_params
from r1jax.models.parameters import Params
from r1jax.sampler import GenerateOptions
from r1jax.sampler.queue import (
    PromptFeed,
    QueuedPrompt,
    QueueFigures,
    QueueSample,
    sample_queue,
)
from r1jax.sharding import make_layout

PAGE, STEP, LONGEST = 4, 8, 64
OPTIONS = GenerateOptions(
    samples=2, max_new_tokens=STEP, seed=5, eos_ids=(3, 7), page=PAGE, slots=4, extended_by=STEP
)
Samples = dict[tuple[int, int], QueueSample]


@cache
def model_of(kind: str, scan: bool = False, devices: int = 1) -> tuple[Decoder, Params]:
    config = replace(CONFIGS[kind], num_nextn_predict_layers=0)
    layout = make_layout({"data": devices}, devices=jax.devices()[:devices])
    execution = Execution(compute_dtype=jnp.float32, remat="none", scan_layers=scan, expert_chunk=8)
    return Decoder(config, execution, layout), init_params(jax.random.key(0), config, layout)


@dataclass
class Rounds:
    """Rounds of beginnings: of each one a sample goes on. In the first each is there `copies`
    times, with samples of its own.

    kept: whether a beginning says what it goes on from. given: what was sampled, in order.
    """

    rounds: int
    kept: bool
    width: int = 3
    copies: int = 2
    given: list[QueuedPrompt] = field(default_factory=list)
    found: Samples = field(default_factory=dict)
    figures: QueueFigures = field(default_factory=QueueFigures)
    last: range = range(0)

    def following(self, idle: bool) -> list[list[QueuedPrompt]] | None:
        if not idle:
            return [[]]
        if not self.rounds:
            return None
        self.rounds -= 1
        new = list(self._next()) if self.given else self._first()
        self.last = range(len(self.given), len(self.given) + len(new))
        self.given += new
        return [new if self.kept else [replace(each, extends=None) for each in new]]

    def _first(self) -> list[QueuedPrompt]:
        rows = np.random.default_rng(1).integers(0, 20, (self.width, 16)).astype(np.int32)
        alone = [QueuedPrompt(row[: 3 + 5 * i % 14], id=i) for i, row in enumerate(rows)]
        again = [
            replace(each, first_sample=10 * copy, extends=i)
            for copy in range(1, self.copies)
            for i, each in enumerate(alone)
        ]
        return [*alone, *again]

    def _next(self) -> Iterator[QueuedPrompt]:
        for index in self.last:
            before, step = self.given[index], self.found[index, index % 2].tokens
            ids = np.concatenate([before.token_ids, step])
            yield QueuedPrompt(ids, before.id, before.first_sample + 1, extends=index)


def run(of: tuple[Decoder, Params], rounds: Rounds, options: GenerateOptions = OPTIONS) -> Samples:
    model, params = of
    feed = PromptFeed(rounds.following, 6)
    for ended in sample_queue(
        params, feed, model, options, prompt_tokens=LONGEST, figures=rounds.figures
    ):
        assert rounds.figures.steps < 5000  # else it goes on for ever
        rounds.found |= {(each.prompt, each.sample): each for each in ended}
    assert len(rounds.found) == len(rounds.given) * options.samples
    return rounds.found


def main(kind: str, scan: bool, devices: int, width: int, slots: int, kept: bool) -> object:
    rounds = Rounds(4, kept=kept, width=width)
    found = run(model_of(kind, scan, devices), rounds, replace(OPTIONS, slots=slots))
    return {
        "tokens": [found[at].tokens.tolist() for at in sorted(found)],
        "log_probs": [found[at].policy_log_probs.tolist() for at in sorted(found)],
        "lengths": [len(each.token_ids) for each in rounds.given],
        "figures": asdict(rounds.figures),
    }


if __name__ == "__main__":
    small_buffers()
    print(json.dumps([main(*case) for case in json.loads(sys.argv[1])]))
