"""Several attempts at a question: returns, masks, the loss of each attempt, and whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import jit, random_params

from r1jax.config.load import ConfigError, load_config
from r1jax.data.instructions import Instruction
from r1jax.data.prompts import Prompt
from r1jax.data.tokenizers import load_tokenizer
from r1jax.models import Decoder, Execution, ModelConfig, TokenRows, token_log_probs
from r1jax.objectives.objective import make_objective
from r1jax.planner.memory import planning_of
from r1jax.policy_step import GRPOBatch, batch_advantages, make_policy_step
from r1jax.rewards import Outcome, RowScore, Score
from r1jax.rollouts.sampling import Completion
from r1jax.rollouts.turns import following_prompt, with_earlier
from r1jax.run.resolve import check, load_functions, resolve
from r1jax.sampler import Finish
from r1jax.settings.objective import GRPO, GSPO, RLOO
from r1jax.settings.optimizer import OptimizerSection
from r1jax.settings.turns import TrainedTurn
from r1jax.sharding import single_device
from r1jax.stages.grpo.groups import Group, Question
from r1jax.stages.grpo.metrics import attempt_metrics, sample_facts
from r1jax.stages.grpo.rows import PackedShape, TrainingSample, pack_updates
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.stages.grpo.turns import turn_returns, turn_samples
from r1jax.train_step import init_train_state

TESTS = Path(__file__).parents[1]
CONFIG = str(TESTS / "tiny_turns.yaml")
RIGHT, WRONG = (RowScore(float(r), True, {"accuracy": Score.binary(r)}) for r in (True, False))
FAILED = RowScore(float("nan"), False, {"accuracy": Score(float("nan"), Outcome.VERIFIER_FAILED)})


def turns(*attempts: dict[str, Any]) -> list[TrainedTurn]:
    made = [TrainedTurn(role="assistant", **attempts[0])]
    for each in attempts[1:]:
        made += [TrainedTurn(role="user", text="=="), TrainedTurn(role="assistant", **each)]
    return made


def test_returns_by_hand() -> None:
    rewards = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]], np.float32)
    first_stage = turns({"weight": 0}, {})  # equation 3: the second attempt's reward alone
    np.testing.assert_array_equal(turn_returns(first_stage, rewards)[:, 0], [0, 0, 0, 0])
    np.testing.assert_array_equal(turn_returns(first_stage, rewards)[:, 1], [1, 1, 0, 0])
    second_stage = turns({}, {"improvement": 10})  # equation 4, and the bonus
    np.testing.assert_array_equal(turn_returns(second_stage, rewards)[:, 0], [1, 0, 1, 0])
    np.testing.assert_array_equal(turn_returns(second_stage, rewards)[:, 1], [1, 11, -10, 0])
    # 1 + 0.5 x 1, 0 + 0.5 x 11, ...
    discounted = turns({"discount": 0.5}, {"improvement": 10})
    np.testing.assert_array_equal(turn_returns(discounted, rewards)[:, 0], [1.5, 5.5, -4, 0])
    # A missing reward spoils what it is part of, and nothing else.
    missing = np.array([[np.nan, 1.0], [1.0, np.nan]], np.float32)
    np.testing.assert_array_equal(turn_returns(first_stage, missing), [[0, 1], [0, np.nan]])
    np.testing.assert_array_equal(turn_returns(second_stage, missing), [[np.nan] * 2, [1, np.nan]])


def attempt(prompt: list[int], new: list[int], finish: Finish = Finish.EOS) -> Completion:
    question = Prompt(1, "?", "", np.asarray(prompt, np.int32), "?", "1")
    log_probs = -np.asarray(new, np.float32) / 8 - 1
    return Completion(question, 0, np.asarray(new, np.int32), log_probs, finish, "x")


def two_attempts(
    prompt: list[int], first: list[int], between: list[int], second: list[int]
) -> tuple[Completion, Completion]:
    return attempt(prompt, first), attempt(prompt + first + between, second)


PAIRS = [
    two_attempts([3, 4], [5, 6, 1], [9, 9], [7, 1]),
    two_attempts([3, 4], [8], [1, 9, 9], [5, 5, 5, 1]),
    two_attempts([2], [6, 7], [9, 9], [4, 1]),
    two_attempts([2], [1], [9, 9], [3]),
]
SCORES = [(WRONG, RIGHT), (RIGHT, WRONG), (RIGHT, RIGHT), (FAILED, RIGHT)]


def groups() -> list[Group]:
    attempts = [each for pair in PAIRS for each in pair]
    scores = [each for pair in SCORES for each in pair]
    last, of_last = with_earlier(attempts, scores, 2)
    rewards = np.asarray([each.reward for each in of_last], np.float32)
    return [
        Group(Question("x", i), last[n : n + 2], rewards[n : n + 2]) for i, n in ((0, 0), (1, 2))
    ]


def stage(made: list[TrainedTurn], **changes: Any) -> GRPOStage:
    settings = {"data": "x", "steps": 2, "questions_per_step": 2, "outputs_per_question": 2}
    settings |= {"length_bucket": 4, "max_new_tokens": 4, "turns": made} | changes
    return GRPOStage(name="rl", optimizer=OptimizerSection(learning_rate=1e-2), **settings)


OBJECTIVE = make_objective(GRPO(advantage_scale="none", kl_coefficient=0.25))
SHAPE = PackedShape(samples=4, rows=1, micro_batches=4, time=24)
TURNS = turns({"kl_coefficient": 2.0}, {"improvement": 3.0})


def packed(samples: list[TrainingSample]) -> GRPOBatch:
    layout = single_device()
    (batch,) = pack_updates([samples], SHAPE, layout, attempts=True).batches
    return batch


def test_masks_advantages_and_segments_by_hand() -> None:
    samples = turn_samples(stage(TURNS), groups(), OBJECTIVE, 3)
    # Returns of the first question: attempts (0, 1), then 1 + 3 (1 - 0) and 0 + 3 (0 - 1).
    assert [each.advantage for each in samples[0].sequences] == [-0.5, 3.5]
    assert [each.advantage for each in samples[1].sequences] == [0.5, -3.5]
    # Of the second question one first attempt has no reward, and with it neither has a return.
    assert [each.trained for each in samples[3].sequences] == [False, False]
    assert [each.advantage for each in samples[2].sequences] == [0.0, 0.0]
    assert [each.kl_coefficient for each in samples[0].sequences] == [2.0, 0.25]
    batch = packed(samples[:2])
    rows = {int(row[0]): i for i, row in enumerate(batch.inputs["tokens"]) if row.any()}
    assert len(rows) == 1  # both in one row, the longer one first
    (r,) = rows.values()
    expected = {
        "tokens": [3, 4, 8, 1, 9, 9, 5, 5, 5, 1, 3, 4, 5, 6, 1, 9, 9, 7, 1],
        "mask": [0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1],
        "advantages": [0, 0, 0.5, 0, 0, 0, *[-3.5] * 4, 0, 0, *[-0.5] * 3, 0, 0, 3.5, 3.5],
        "kl_coefficients": [0, 0, 2, 0, 0, 0, *[0.25] * 4, 0, 0, 2, 2, 2, 0, 0, 0.25, 0.25],
        "lengths": [0, 0, 1, 0, 0, 0, 4, 4, 4, 4, 0, 0, 3, 3, 3, 0, 0, 2, 2],
        "segment_ids": [1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4],
    }
    for name, values in expected.items():
        array = batch.inputs[name] if name == "tokens" else getattr(batch, name)
        assert array[r, :19].tolist() == values, name
    # The model attends over all of a sample, its attempts' segments are the objective's.
    assert batch.inputs["segment_ids"][r, :19].tolist() == [1] * 10 + [2] * 9
    assert batch.inputs["positions"][r, 10:19].tolist() == list(range(9))
    sampled = batch.sampler_log_probs[r, :19]
    assert (sampled[np.asarray(expected["mask"]) == 0] == 0).all() and sampled[2] == -2
    assert (int(batch.sequences), int(batch.samples)) == (4, 2)
    untrained = turns({"trained": False}, {"improvement": 3.0})
    samples = turn_samples(stage(untrained, mask_truncated=True), groups(), OBJECTIVE, 2)
    assert [each.trained for each in samples[0].sequences] == [False, True]
    assert packed(samples).mask.sum() == 2 + 4 + 2


def test_a_truncated_attempt_is_left_out_alone_where_the_stage_says_so() -> None:
    first, second = PAIRS[0]
    pair = replace(first, finish=Finish.LENGTH), second
    last, scores = with_earlier([*pair, *PAIRS[1]], [WRONG, RIGHT, RIGHT, WRONG], 2)
    group = Group(Question("x", 0), last, np.asarray([s.reward for s in scores], np.float32))
    for masked in (False, True):
        made = turn_samples(stage(TURNS, mask_truncated=masked), [group], OBJECTIVE, 1)
        assert [each.trained for each in made[0].sequences] == [not masked, True]


def gradient_at_log_probs(batch: GRPOBatch) -> np.ndarray:
    """d loss / d log-prob of each position, read off an SGD step with rate 1."""
    optimizer = optax.sgd(1.0)
    params = jnp.full(batch.mask.shape, -1.0)
    step = make_policy_step(lambda params, batch: params, optimizer, OBJECTIVE)
    state, _ = jax.jit(step)(init_train_state(params, optimizer), batch)
    return np.asarray(params - state.params)


def test_the_gradient_is_each_attempts_and_none_of_the_instruction() -> None:
    samples = turn_samples(stage(TURNS), groups(), OBJECTIVE, 2)
    batch = packed(samples)
    rng = np.random.default_rng(0)
    reference = (-1 - rng.random(batch.mask.shape)).astype(np.float32)
    batch = replace(batch, reference_log_probs=reference, used_micro_batches=None)
    got = gradient_at_log_probs(replace(batch, sampler_log_probs=np.full_like(reference, -1)))
    mask = np.asarray(batch.mask) > 0
    assert (got[~mask] == 0).all() and (got[mask] != 0).all()
    # On policy: (-A + c (1 - pi_ref / pi)) / (length x sequences), in float64.
    kl = 1 - np.exp(reference.astype(np.float64) + 1)
    terms = -np.float64(batch.advantages) + np.float64(batch.kl_coefficients) * kl
    weights = 1 / np.maximum(np.float64(batch.lengths), 1) / int(batch.sequences)
    np.testing.assert_allclose(got[mask], (terms * weights)[mask], atol=2e-7)


def test_two_attempts_in_a_row_train_like_two_rows_with_their_context() -> None:
    objective = make_objective(GSPO(kl_coefficient=0.25))
    config = ModelConfig("qwen2", 20, 16, 32, 1, 2, 1, 8, tie_word_embeddings=True)
    execution = Execution(
        compute_dtype=jnp.float32, remat="none", scan_layers=False, log_prob_chunk=5
    )
    model = Decoder(config, execution, single_device())
    params, other = random_params(config), jax.tree.map(lambda x: 0.9 * x, random_params(config))

    def log_prob_fn(params: Any, batch: GRPOBatch) -> jax.Array:
        rows = TokenRows(**batch.inputs)
        return token_log_probs(params, rows, model, wanted=batch.mask > 0).log_probs

    def run(batch: GRPOBatch) -> Any:
        old = log_prob_fn(other, batch)
        batch = replace(batch, old_log_probs=old, reference_log_probs=old - 0.1)
        step = make_policy_step(log_prob_fn, optax.sgd(1.0), objective)
        state, metrics = step(init_train_state(params, optax.sgd(1.0)), batch)
        return jax.tree.map(jnp.subtract, params, state.params), metrics["loss"]

    samples = turn_samples(stage(TURNS), groups(), objective, 2)
    # Each attempt behind its context, as a sample of its own: of these nothing is new.
    alone = [replace(each, earlier=()) for sample in samples for each in sample.sequences]
    shape = replace(SHAPE, samples=8, micro_batches=8)
    compiled, results = jit(run), []
    for each in (samples, alone):
        (batch,) = pack_updates([each], shape, single_device(), attempts=True).batches
        results.append(compiled(replace(batch, used_micro_batches=None)))
    (gradients, loss), (expected, expected_loss) = results
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert abs(loss - expected_loss) < 2e-6
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 1e-3


def test_kl_in_the_reward_has_the_coefficient_of_its_attempt_and_stays_in_it() -> None:
    objective = make_objective(RLOO(kl_coefficient=0.3))
    batch = packed(turn_samples(stage(TURNS), groups(), objective, 2))
    rng = np.random.default_rng(0)
    kl = rng.random(batch.mask.shape).astype(np.float32)
    batch = replace(batch, old_log_probs=kl - 1, reference_log_probs=np.full_like(kl, -1))
    (got,) = jit(lambda batch: batch_advantages(objective, [batch]))(batch)
    ids, mask = np.asarray(batch.segment_ids), np.asarray(batch.mask) > 0
    for r, t in np.argwhere(mask):
        rest = mask[r] & (ids[r] == ids[r, t]) & (np.arange(len(mask[r])) >= t)
        first = batch.kl_coefficients[r, t] == 2
        penalty = (2.0 if first else 0.3) * kl[r, rest].sum()
        assert got.advantages[r, t] == pytest.approx(batch.advantages[r, t] - penalty, abs=1e-5)
    assert set(batch.kl_coefficients[mask]) == {np.float32(2), np.float32(0.3)}


def test_metrics_by_hand() -> None:
    last, scores = with_earlier(
        [each for pair in PAIRS for each in pair], [each for pair in SCORES for each in pair], 2
    )
    metrics = attempt_metrics(sample_facts(last, scores))
    assert metrics == {  # of three samples: one mended, one spoilt, one right at both
        "attempts/right_1": pytest.approx(2 / 3),
        "attempts/right_2": pytest.approx(2 / 3),
        "attempts/difference": 0.0,
        "attempts/mended": pytest.approx(1 / 3),
        "attempts/spoilt": pytest.approx(1 / 3),
    }
    assert attempt_metrics(sample_facts([PAIRS[0][0]], [RIGHT])) == {}


def test_what_the_next_attempt_continues() -> None:
    tokenizer = load_tokenizer("characters:running_total")
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in ("7", "=", "<eos>", "8")}
    instruction = Instruction("==", (ids["="],) * 2, "<eos>", (ids["<eos>"],), "")
    question = Prompt(1, "7=", "", np.asarray([ids["7"], ids["="]], np.int32), "7=", "8")
    ended = Completion(
        question, 3, np.asarray([ids["8"], ids["<eos>"]]), np.zeros(2), Finish.EOS, "8"
    )
    cut = replace(ended, token_ids=ended.token_ids[:1], finish=Finish.LENGTH)
    for each in (ended, cut, replace(cut, finish=Finish.STOP)):  # each gets its next attempt
        following = following_prompt(each, instruction, tokenizer)
        assert following.text == tokenizer.decode(following.token_ids) == "7=8<eos>=="
        assert (following.id, following.answer, following.question) == (1, "8", "7=")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("turns=[{role: user, text: a}]", "turns.0: role is user, and should be assistant"),
        ("turns=[{role: assistant}, {role: user, text: a}]", "the last turn is the user's"),
        ("turns=[{role: assistant}]", "one attempt alone needs no turns"),
        ("turns.1.text=' '", "text is empty"),
        ("turns.1.improvement=1", "improvement belongs to turns of role assistant"),
        ("turns.0.improvement=1", "turns.0.improvement: no attempt stands before"),
        ("turns.0.text=a", "text belongs to turns of role user"),
        ("dynamic_sampling={}", "do not go with dynamic_sampling"),
        ("phases_of_lag=1", "do not go with phases_of_lag"),
        ("tokens_per_phase=4", "do not go with tokens_per_phase"),
        ("distillation={teacher: model}", "do not go with distillation"),
        ("objective={kind: ppo, kl_coefficient: 0.1}", "choose a kind that compares samples"),
        ("sampling.speculative=true", "do not go with sampling.speculative = true"),
        ("objective={kind: reinforce_plus_plus, kl_coefficient: 0.1}", None),
        ("objective={kind: grpo, kl_coefficient: 0}", "there is no reference policy"),
        ("turns.1.text=what", 'turns.1.text = "what": as data.train: the tokenizer cannot encode'),
        ("turns.1.max_tokens=2", "the text has 3 tokens, more than 2"),
        ("max_new_tokens=48", "max_position_embeddings = 64"),
    ],
)
def test_what_cannot_be_is_refused_before_compute(change: str, message: str | None) -> None:
    changes = [f"stages.zero.{change}"]
    if message is None:  # an attempt without a return would get advantages
        changes, message = [*changes, "stages.zero.turns.0.weight=0"], "reinforce_plus_plus"
    with pytest.raises(ConfigError, match=message.replace("{", r"\{")):
        check(resolve(load_config(CONFIG, changes)))


def test_a_plan_has_the_programs_of_each_attempt_and_the_batch_of_an_update() -> None:
    run = resolve(load_config(CONFIG))
    planning = planning_of(run)
    zero, after = run.config.stages
    assert isinstance(zero, GRPOStage)
    planned = load_functions(zero).programs(zero, planning).programs
    names = [program.name for program in planned]
    for name in ("prefill", "attempt 2: prefill", "held-out attempt 2: decode and refill"):
        assert name in names
    evaluated = load_functions(after).programs(after, planning).programs
    assert "attempt 2: prefill" in [program.name for program in evaluated]
    # An update's rows hold a prompt, both attempts and the text between them.
    (update,) = (program for program in planned if program.name == "update")
    batch = update.arguments["batch"]
    assert batch.mask.shape[1] == 48  # 16 + 8 + 4 + 12, a multiple of 16
    made = packed(turn_samples(stage(TURNS), groups(), OBJECTIVE, 2))
    for name in ("kl_coefficients", "segment_ids", "lengths"):
        assert getattr(batch, name).dtype == getattr(made, name).dtype


def start(output: Path, point: str = "none", number: int = 0, *changes: str) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "JAX_COMPILATION_CACHE_DIR": str(output.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(TESTS / "killed_run.py"), point, str(number), CONFIG]
    done = subprocess.run(
        [*command, f"output={output}", *changes],
        env=environment,
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == (0 if point == "none" else -9), done.stderr[-3000:]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("turns") / "whole"
    start(output)
    return output / "tiny-turns-s0"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_whole_run_samples_scores_and_reports_every_attempt(finished: Path) -> None:
    zero, after = finished / "stages/00-zero", finished / "stages/01-after"
    metrics = rows(zero / "metrics.jsonl")
    assert len(metrics) == 4
    for row in metrics:
        assert row["optimizer/finite"] == 1
        change = row["attempts/right_2"] - row["attempts/right_1"]
        assert row["attempts/difference"] == pytest.approx(change)
        assert change == pytest.approx(row["attempts/mended"] - row["attempts/spoilt"])
        assert row["outcome/right"] == pytest.approx(row["attempts/right_2"])
    samples = rows(after / "samples.jsonl")
    assert len(samples) == 16
    finishes = set()
    for sample in rows(zero / "samples.jsonl") + samples:
        first, user, second = sample["turns"]
        # The reward by hand, of each attempt alone.
        for each in (first, second):
            even = sum(c.isdigit() for c in each["text"]) % 2 == 0
            assert (each["reward"], each["outcome"]) == (even, "right" if even else "wrong")
        assert [first["length"] <= 8, second["length"] <= 12] == [True, True]
        assert user == {"role": "user", "text": "<eos>=="}  # whatever the first one ended with
        finishes.add(first["finish_reason"])
        assert {k: second[k] for k in ("outcome", "reward", "extracted", "length")} == {
            k: sample[k] for k in ("outcome", "reward", "extracted", "length")
        }
        assert sample["completion"] == second["text"] and "==" not in sample["prompt"][:-1]
    assert "length" in finishes  # truncated, and gone on with
    summary = json.loads((after / "summary.json").read_text())
    attempts = summary["attempts"]
    right = np.array([[t["outcome"] == "right" for t in s["turns"][::2]] for s in samples])
    accuracies = [attempts[f"right_{k}"]["value"] for k in (1, 2)]
    assert accuracies == pytest.approx(right.mean(axis=0).tolist())
    assert attempts["mended"]["value"] == pytest.approx((right[:, 1] & ~right[:, 0]).mean())
    assert attempts["spoilt"]["value"] == pytest.approx((right[:, 0] & ~right[:, 1]).mean())
    assert [row["step"] for row in rows(zero / "held_out.jsonl")] == [0, 2, 4]
    assert all("attempts" in row for row in rows(zero / "held_out.jsonl"))
    page = (finished / "report.html").read_text()
    for text in ("Self-correction", "wrong, then right", "attempt 2", "Held-out self-correction"):
        assert text in page
    # The numbers of both attempts are those of the sample: none is drawn twice alike.
    assert any(s["turns"][0]["text"] != s["turns"][2]["text"] for s in samples)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    start(tmp_path / "killed", "log", 3)  # in the second phase
    start(tmp_path / "killed")
    stages = "00-zero/metrics", "00-zero/samples", "00-zero/held_out", "01-after/samples"
    for name in stages:
        resumed = tmp_path / f"killed/tiny-turns-s0/stages/{name}.jsonl"
        assert resumed.read_bytes() == (finished / f"stages/{name}.jsonl").read_bytes(), name


@pytest.mark.slow
def test_slots_change_no_sample(finished: Path, tmp_path: Path) -> None:
    fewer = ["steps=2", "held_out=null", "sampling.slots=3"]
    start(tmp_path / "slots", "none", 0, *(f"stages.zero.{each}" for each in fewer))
    got = rows(tmp_path / "slots/tiny-turns-s0/stages/00-zero/samples.jsonl")
    expected = rows(finished / "stages/00-zero/samples.jsonl")
    assert got and got == [row for row in expected if row["step"] <= 2]
