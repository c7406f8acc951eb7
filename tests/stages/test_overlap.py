"""Samples of older weights: a phase of lag, and samples that go on from phase to phase."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from r1jax import recipe
from r1jax.config.load import ConfigError, load_config
from r1jax.data.prompts import Prompt
from r1jax.data.tokenizers import load_tokenizer
from r1jax.models import TokenRows, token_log_probs
from r1jax.rollouts.sampling import Completion, stop_search
from r1jax.run.resolve import resolve
from r1jax.sampler import Finish
from r1jax.sampler.queue import QueueSample
from r1jax.stages.grpo.groups import is_unfinished, joined
from r1jax.stages.grpo.phase import PhaseSampler

TESTS = Path(__file__).parents[1]


def run(
    output: Path, monkeypatch: pytest.MonkeyPatch, *changes: str
) -> tuple[list[Any], dict[int, Any], dict[int, list[Completion]]]:
    """Metrics of each phase, and by its step the weights that sampled and whole groups' samples."""
    weights: dict[int, Any] = {}
    whole: dict[int, list[Completion]] = {}
    sample, add = PhaseSampler.sample, PhaseSampler._add

    def recorded(self: Any, params: Any, step: int, before: Any) -> Any:
        weights[step] = jax.tree.map(np.asarray, params)
        return sample(self, params, step, before)

    def added(self: Any, phase: Any, sampled: Any, scores: Any) -> None:
        whole.setdefault(phase.step, []).extend(sampled.completions)
        add(self, phase, sampled, scores)

    monkeypatch.setattr(PhaseSampler, "sample", recorded)
    monkeypatch.setattr(PhaseSampler, "_add", added)
    monkeypatch.chdir(TESTS)
    config = load_config("tiny_dynamic.yaml", [f"output={output}", *changes])
    assert recipe.run(config) == 0
    monkeypatch.undo()
    lines = (output / "tiny-dynamic-s0/stages/00-zero/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[::2]], weights, whole


def log_probs_under(params: Any, completion: Completion) -> np.ndarray:
    """By the model itself, of one row."""
    prompt = completion.prompt.token_ids
    tokens = np.concatenate([prompt, completion.token_ids])[None].astype(np.int32)
    padded = np.zeros((1, 32), np.int32)
    padded[:, : tokens.size] = tokens
    position = np.arange(32, dtype=np.int32)[None]
    inside = (position < tokens.size).astype(np.int32)
    rows = TokenRows(tokens=padded, positions=position * inside, segment_ids=inside)
    return np.asarray(_log_probs()(params, rows))[0, len(prompt) : tokens.size]


@cache
def _log_probs() -> Callable[[Any, TokenRows], jax.Array]:
    """Compiled once for all samples."""
    model = resolve(load_config(TESTS / "tiny_dynamic.yaml")).models.of("zero").decoder
    return jax.jit(lambda params, rows: token_log_probs(params, rows, model).log_probs)


def test_a_phase_of_lag_is_sampled_before_the_update_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["stages.zero.dynamic_sampling=null", "stages.zero.phases_of_lag=1"]
    metrics, weights, whole = run(tmp_path, monkeypatch, *changes)
    assert list(weights) == list(whole) == [0, 2, 4, 6]

    def equal(a: int, b: int) -> bool:
        leaves = zip(jax.tree.leaves(weights[a]), jax.tree.leaves(weights[b]), strict=True)
        return all(np.array_equal(x, y) for x, y in leaves)

    assert equal(0, 2) and not equal(2, 4) and not equal(4, 6)
    gaps = [row["sampler/gap_max"] for row in metrics]
    assert gaps[0] < 1e-5 and all(gap > 1e-3 for gap in gaps[1:])
    for step, completions in whole.items():
        for each in completions:
            expected = log_probs_under(weights[step], each)
            np.testing.assert_allclose(each.sampler_log_probs, expected, atol=1e-4)


def test_samples_go_on_with_new_weights_and_keep_their_log_probs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["stages.zero.dynamic_sampling=null", "stages.zero.tokens_per_phase=2"]
    changes += ["stages.zero.max_new_tokens=6", "stages.zero.steps=12"]
    metrics, weights, whole = run(tmp_path, monkeypatch, *changes)
    steps, parts_seen, open_ = sorted(weights), set[int](), 0
    assert steps == list(range(0, 12, 2))
    for phase, row in zip(steps, metrics, strict=True):
        completions = whole.get(phase, [])
        for group in (completions[i : i + 2] for i in range(0, len(completions), 2)):
            assert group[0].prompt is group[1].prompt
            assert [each.sample % 2 for each in group] == [0, 1]
            parts = [-(-len(each.token_ids) // 2) for each in group]
            for each, of_sample in zip(group, parts, strict=True):
                assert not is_unfinished(each, 6) and len(each.token_ids) <= 6
                # Part n was sampled n phases behind the group's first one.
                for n in range(of_sample):
                    params = weights[phase - 2 * (max(parts) - 1) + 2 * n]
                    part = slice(2 * n, 2 * n + 2)
                    expected = log_probs_under(params, each)[part]
                    np.testing.assert_allclose(each.sampler_log_probs[part], expected, atol=1e-4)
                parts_seen.add(of_sample)
        assert row["samples/continued"] == open_
        open_ = row["samples/unfinished"]
        assert row["groups/trained"] <= 4
    assert parts_seen == {1, 2, 3}
    assert metrics[0]["groups/trained"] < 4 and metrics[0]["samples/unfinished"] > 0
    assert any(row["groups/trained"] == 4 for row in metrics)
    timings = (tmp_path / "tiny-dynamic-s0/stages/00-zero/timings.jsonl").read_text().splitlines()
    counts = [json.loads(line)["compile_count"] for line in timings]
    assert counts[2] == counts[-1]  # whatever the number of samples that go on


def completion(tokens: list[int], finish: Finish = Finish.LENGTH) -> Completion:
    prompt = Prompt(7, "?", "", np.asarray([3, 4], np.int32), "?", "1")
    ids = np.asarray(tokens, np.int32)
    experts = np.arange(2 * (2 + len(tokens)), dtype=np.uint8).reshape(-1, 2)
    return Completion(prompt, 1, ids, -ids.astype(np.float32), finish, "x", experts=experts)


def rest(tokens: list[int], before: int, finish: Finish) -> QueueSample:
    ids = np.asarray(tokens, np.int32)
    experts = np.full((2 + before + len(tokens), 2), 99, np.uint8)
    return QueueSample(0, 0, ids, -ids * 1.0, -ids.astype(np.float32) - 0.5, finish, experts)


def test_parts_are_joined_by_hand() -> None:
    first = completion([5, 6])
    both = joined(first, rest([8, 1], 2, Finish.EOS), None)
    assert both.token_ids.tolist() == [5, 6, 8, 1] and both.finish is Finish.EOS
    assert both.sampler_log_probs.tolist() == [-5, -6, -8.5, -1.5] and both.sample == 1
    # The experts of the first part are those that it was sampled with.
    assert both.experts is not None and first.experts is not None
    assert both.experts.tolist() == [*first.experts.tolist(), [99, 99], [99, 99]]
    assert is_unfinished(first, 4) and not is_unfinished(first, 2)
    assert not is_unfinished(both, 8)


def test_a_stop_string_may_begin_in_one_part_and_end_in_the_next() -> None:
    tokenizer = load_tokenizer("characters:running_total")
    ids = tokenizer("1+2=3", add_special_tokens=False)["input_ids"]
    stop = stop_search(tokenizer, ["+2"])
    both = joined(completion(ids[:2]), rest(ids[2:], 2, Finish.LENGTH), stop)
    assert both.token_ids.tolist() == ids[:3] and both.finish is Finish.STOP
    assert len(both.sampler_log_probs) == 3 and both.experts is not None and len(both.experts) == 5
    without = joined(completion(ids[:2]), rest(ids[3:], 2, Finish.LENGTH), stop)
    assert len(without.token_ids) == 4 and without.finish is Finish.LENGTH


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases_of_lag": 2}, r"phases_of_lag.*0 or 1"),
        ({"phases_of_lag": 1, "loss": {"importance_cap": None}}, "phases_of_lag = 1 with loss.imp"),
        ({"tokens_per_phase": 5}, "max_new_tokens = 16 is not a multiple of tokens_per_phase = 5"),
        ({"tokens_per_phase": 32}, "max_new_tokens = 16 is not a multiple of tokens_per_phase"),
        ({"tokens_per_phase": 0}, "tokens_per_phase"),
        ({"tokens_per_phase": 4, "sampling": {"speculative": True}}, "with sampling.speculative"),
        (
            {"tokens_per_phase": 4, "sampling": {"slots": 4}, "loss": {"importance_cap": None}},
            "tokens_per_phase = 4 with loss.importance_cap = null",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_compute(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    plan = yaml.safe_load((TESTS / "tiny.yaml").read_text())
    plan |= {"output": str(tmp_path), "stages": [{**plan["stages"][2], **changes}]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(ConfigError, match=rf"config\.yaml:\d+: .*{message}"):
        load_config(tmp_path / "config.yaml")
