"""A sample is the same on every mesh, for a dense model and for one of latents and experts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from compiled_programs import devices

SCRIPT = Path(__file__).parents[1] / "queue_on_a_mesh.py"
ONE = {"data": 1}
# kind, training mesh, sampling mesh, its rules, scanned layers, slots, prompts
CASES: list[list[Any]] = [
    ["dense", ONE, ONE, {}, False, None],
    # Splits of prompts, of their samples and of heads.
    ["dense", {"data": 4, "tensor": 2}, {"data": 2, "part": 2, "tensor": 2}, {"sample": "part"}]
    + [False, 12],
    # Three prompts, four shards in each half of the batch: the samples of a prompt are split.
    ["dense", {"data": 8}, {"data": 2, "part": 4}, {"sample": "part"}, False, 8, 3],
    ["experts", ONE, ONE, {}, False, None],
    ["experts", {"data": 2, "expert": 4}, {"data": 2, "expert": 4}, {}, True, 16],
]


@pytest.mark.slow  # a program is compiled for each of many meshes
def test_a_sample_is_the_same_on_every_mesh() -> None:
    done = forked.run(str(SCRIPT), json.dumps(CASES), env=os.environ | devices(8))
    assert done.returncode == 0, done.stderr[-3000:]
    dense, mesh, few, experts, with_experts = json.loads(done.stdout.splitlines()[-1])
    pairs = [(dense, mesh), (dense, few), (experts, with_experts)]
    for expected, found in pairs:
        assert found["tokens"] == expected["tokens"][: len(found["tokens"])]
        for name in ("log_probs", "experts"):
            for a, b in zip(found[name], expected[name], strict=False):
                np.testing.assert_allclose(a, b, atol=1e-4)
    # Six samples, each alone in one of eight slots.
    assert len(few["tokens"]) == 6
    assert few["steps"] == max(len(tokens) for tokens in few["tokens"])
    assert len({len(tokens) for tokens in dense["tokens"]}) > 3
