"""What `--dry-run` says that a run keeps in memory, by hand."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from r1jax.config.load import load_config
from r1jax.planner.dry_run import describe
from r1jax.planner.memory import planning_of
from r1jax.run.resolve import load_functions, resolve

TESTS = Path(__file__).parents[1]


def test_memory_is_what_the_programs_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run compiles nothing")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    monkeypatch.chdir(TESTS)
    monkeypatch.syspath_prepend(TESTS)
    halves = ["model.compute_dtype=bfloat16", "stages.rl.max_new_tokens=200"]
    described = describe(load_config("tiny_r1.yaml", [*halves, "mesh.axes={data: 1}"]))
    memory = {row["what"]: row["bytes"] for row in described["memory"]}

    # 1 layer, hidden 16, inner 32, 2 + 2 x 1 heads of 8 with biases, 20 tokens, tied; float32.
    weights = 4 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 20 * 16 + 3 * 16 + 16 + 2 * 8)
    assert memory["model.weights"] == weights
    assert memory["rl: gradients"] == memory["rl: reference policy"] == weights
    assert memory["rl: optimizer moments"] == 2 * weights + 2 * 4  # and two counters
    # The sampler has a copy in bfloat16.
    assert memory["rl: sampler's weights"] == memory["after: sampler's weights"] == weights / 2
    assert "student_after: sampler's weights" not in memory  # float32
    # Keys and values of 8 bfloat16 numbers, in pages of 16 tokens: of 2 questions, as padded, of 4
    # samples of each, which also fill one each, and one; with a flag for each token and page.
    prompt = 2 * 1024 // 16
    for stage, slots, of_sample in (("rl", 8, 13), ("after", 4, 1)):
        pages = prompt + slots * of_sample + 1
        tokens = 16 * (pages + slots)
        assert memory[f"{stage}: key-value cache"] == 2 * 2 * 8 * tokens + tokens + pages
    # A reward model has one vector in place of tokens to predict, and both are kept while sampling.
    scorer = weights + 4 * 16
    assert memory["helpful_model: gradients"] == scorer
    assert memory["rl: reward models"] == 2 * scorer
    assert "helpful_model: a chunk of logits" not in memory
    # Remat keeps everything: a layer's input, its products and attention's output, and what is
    # made of them, by estimate 4 numbers for each of the MLP's and 10 for each of the layer's.
    products = 2 * 16 + (2 * 8 + 2 * 8 + 2 * 8) + 2 * 32
    texts = 2 * 4 // 2  # pairs, in two micro-batches
    kept = products + 4 * 32 + 10 * 16
    assert memory["helpful_model: activations"] == texts * 64 * kept * 2
    assert memory["tuned: a chunk of logits"] == 2 * 8 * 20 * 4 * 2  # in float32, with gradients


def test_memory_of_slots_is_that_of_their_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS)
    monkeypatch.syspath_prepend(TESTS)
    slots = ["stages.rl.sampling={slots: 4, cache_tokens: 2048}", "mesh.axes={data: 1}"]
    described = describe(load_config("tiny_r1.yaml", slots))
    memory = {row["what"]: row["bytes"] for row in described["memory"]}
    # A budget of 128 pages of 16 tokens, of which each slot fills one; keys and values of 8 floats.
    entries = 128 * 16
    assert memory["rl: key-value cache"] == entries * 2 * 8 * 4 + entries + (128 - 4)
    assert memory["rl: state of the slots"] > 0 and memory["rl: log"] > 4 * 12 * 16


def test_the_most_that_dynamic_sampling_may_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS)
    monkeypatch.syspath_prepend(TESTS)
    for sampling in ("{}", "{slots: 4}"):
        changes = [f"stages.zero.sampling={sampling}"]
        config = load_config("tiny_dynamic.yaml", changes)
        (line,) = describe(config)["notes"]
        assert line.startswith("zero: dynamic sampling is planned at its limit, where a phase")
        assert "samples 12 questions for 4 groups, 3 times as many" in line
        stage = config.stage("zero")
        programs = load_functions(stage).programs(stage, planning_of(resolve(config))).programs
        (decode,) = [each for each in programs if each.name.startswith("decode")]
        plain = load_config("tiny_dynamic.yaml", [*changes, "stages.zero.dynamic_sampling=null"])
        stage = plain.stage("zero")
        programs = load_functions(stage).programs(stage, planning_of(resolve(plain))).programs
        (without,) = [each for each in programs if each.name == decode.name]
        assert decode.calls == 3 * without.calls
        assert describe(plain)["notes"] == []
