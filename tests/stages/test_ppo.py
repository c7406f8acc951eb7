"""PPO with a critic: a whole run in miniature, killed and resumed; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params

from r1jax import recipe
from r1jax.checkpoints import kept_steps
from r1jax.config.load import ConfigError, load_config
from r1jax.metrics.recorder import Recorder
from r1jax.models import Decoder, Execution, ModelConfig, TokenRows
from r1jax.models.reward_head import token_values
from r1jax.planner.plan import planning_for
from r1jax.run.models import Models
from r1jax.run.resolve import check, load_functions, resolve
from r1jax.run.selection import Selection
from r1jax.run.train_loop import TrainLoop
from r1jax.sharding import single_device
from r1jax.stages.grpo.critic import Critic

TESTS = Path(__file__).parents[1]
CONFIG = str(TESTS / "tiny_ppo.yaml")


@dataclass
class Finished:
    """A run, and what its updates were given: of the policy, of the critic."""

    directory: Path
    policy: list[Any] = field(default_factory=list)
    critic: list[Any] = field(default_factory=list)

    def metrics(self, stage: str) -> list[dict[str, float]]:
        lines = (self.directory / "stages" / stage / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    output = tmp_path_factory.mktemp("ppo") / "whole"
    result = Finished(output / "tiny-ppo-s0")
    begin, update = TrainLoop.begin_update, Critic.update

    def policy_update(self: TrainLoop, batch: Any) -> Any:
        result.policy.append(batch)
        return begin(self, batch)

    def critic_update(self: Critic, loop: TrainLoop, batch: Any) -> Any:
        result.critic.append(batch)
        return update(self, loop, batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(TESTS))
        patched.setattr(TrainLoop, "begin_update", policy_update)
        patched.setattr(Critic, "update", critic_update)
        assert recipe.run(load_config(CONFIG, [f"output={output}"])) == 0
    yield result


@pytest.mark.slow
def test_advantages_are_of_the_values_before_the_phase(finished: Finished) -> None:
    assert len(finished.policy) == len(finished.critic) == 10
    for first in (0, 2, 4):  # phases of two updates
        raw, given = [], []
        for number in (first, first + 1):
            batch, learnt = finished.policy[number], finished.critic[number]
            ids, mask = (np.asarray(x) for x in (batch.segment_ids, batch.mask))
            values, returns = np.asarray(learnt.values), np.asarray(learnt.returns)
            assert (np.abs(values).max() > 0) == (first > 0)  # a new head is 0
            kl = np.asarray(batch.old_log_probs) - np.asarray(batch.reference_log_probs)
            expected = np.zeros(mask.shape)
            for row in range(len(mask)):
                for segment in range(1, ids.max() + 1):
                    trained = np.flatnonzero((ids[row] == segment) & (mask[row] > 0))
                    if not len(trained):
                        continue
                    # What is left is what the last token's reward must have been: 0 or 1.
                    last = trained[-1]
                    outcome = returns[row, last] + 0.2 * kl[row, last]
                    assert np.abs(outcome - np.round(outcome)) < 1e-5
                    after = advantage = 0.0
                    for t in trained[::-1]:
                        reward = (t == last) * np.round(outcome) - 0.2 * kl[row, t]
                        error = reward + after - values[row, t]
                        advantage = expected[row, t] = error + 0.9 * advantage
                        after = values[row, t]
            np.testing.assert_allclose((returns - values)[mask > 0], expected[mask > 0], atol=1e-5)
            raw.append(expected[mask > 0])
            given.append(np.asarray(batch.advantages)[mask > 0])
        of_phase = np.concatenate(raw)
        whitened = (of_phase - of_phase.mean()) / of_phase.std()
        np.testing.assert_allclose(np.concatenate(given), whitened, atol=1e-3)


@pytest.mark.slow
def test_the_critic_is_trained_alone_at_first_and_goes_on_in_the_next_stage(
    finished: Finished,
) -> None:
    rl, again = finished.metrics("00-rl"), finished.metrics("01-again")
    # Two steps of warm-up, and the third was sampled and begun with the weights of before.
    assert [row["policy/kl"] < 1e-6 for row in rl[:4]] == [True, True, True, False]
    assert [row["optimizer/learning_rate"] for row in rl] == pytest.approx([0.01] * 6)
    for row in [*rl, *again]:
        assert row["critic/finite"] == row["optimizer/finite"] == 1
        assert row["critic/loss"] > 0
    assert rl[0]["critic/grad_norm"] > 0 and again[0]["critic/grad_norm"] > 0
    assert [row["critic/explained_variance"] for row in rl[:2]] == [0, 0]
    assert any(row["critic/clip_fraction"] > 0 for row in rl)  # value_clip is 0.01
    assert again[0]["critic/explained_variance"] != 0  # rl's critic, and no new head
    # Groups of one sample teach, too: they are not reported as if they were lost.
    assert not any("groups/zero_variance" in row for row in [*rl, *again])
    assert any(row["optimizer/grad_norm"] > 1e-3 for row in again)
    for stage in ("00-rl", "01-again"):
        exported = json.loads(
            (finished.directory / "stages" / stage / "critic/config.json").read_text()
        )
        assert exported["architectures"] == ["Qwen2ForSequenceClassification"]


@pytest.mark.slow
def test_the_exported_critic_gives_the_values_of_the_last_phase_in_transformers(
    finished: Finished,
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    path = finished.directory / "stages" / "00-rl" / "critic"
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    learnt = finished.critic[6]  # the first batch of the next stage, which starts from it
    ids, mask = np.asarray(learnt.inputs["segment_ids"]), np.asarray(learnt.mask) > 0
    tokens, values = np.asarray(learnt.inputs["tokens"]), np.asarray(learnt.values)
    compared = 0
    for row, segment in sorted(
        {(r, int(each)) for r in range(len(ids)) for each in ids[r] if each}
    ):
        at = np.flatnonzero(ids[row] == segment)
        with torch.no_grad():
            hidden = model.model(torch.tensor(tokens[row, at][None].astype(np.int64)))
            scores = model.score(hidden.last_hidden_state)[0, :, 0].numpy()
        for index in np.flatnonzero(mask[row, at]):
            assert values[row, at[index]] == pytest.approx(scores[index - 1], abs=1e-5)
            compared += 1
    assert compared > 4


@pytest.mark.slow
def test_a_directory_with_a_trained_head_is_a_critic_as_it_is(finished: Finished) -> None:
    path = finished.directory / "stages" / "00-rl" / "critic"
    settings = ["output=/nonexistent", f"models={json.dumps({'value': {'path': str(path)}})}"]
    run = resolve(load_config(CONFIG, [*settings, "stages.rl.critic.weights=value"]))
    load_functions(run.config.stages[0]).check(run.config.stages[0], run)
    params = run.models.critic_weights("value", 0)
    assert np.asarray(params["score"]).any()
    changes = ["output=/nonexistent", "model.config=null", f"model.path={path.parent / 'model'}"]
    language = load_config(CONFIG, changes)
    fresh = resolve(language).models.critic_weights("model", 0)
    assert not np.asarray(fresh["score"]).any() and fresh.keys() == params.keys()


@pytest.mark.slow
def test_stopped_within_a_phase_and_resumed_ends_with_the_same_bytes(finished: Finished) -> None:
    output = finished.directory.parents[1] / "stopped"
    config = load_config(CONFIG, [f"output={output}"])
    log, calls = Recorder.log, []

    def dies(self: Recorder, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 6:  # of the phase that began at step 4, of which one update is logged
            raise OSError("the disk is full")
        log(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(TESTS))
        with (
            pytest.MonkeyPatch.context() as broken,
            pytest.raises(OSError, match="the disk is full"),
        ):
            broken.setattr(Recorder, "log", dies)
            recipe.run(config, Selection(last="rl"))
        assert kept_steps(output / "tiny-ppo-s0/stages/00-rl/checkpoints") == [2, 4]
        assert recipe.run(config, Selection(last="rl")) == 0
    compared = []
    for path in finished.directory.glob("stages/00-rl/**/*"):
        if path.suffix in (".jsonl", ".safetensors") and path.name != "timings.jsonl":
            name = path.relative_to(finished.directory)
            assert path.read_bytes() == (output / "tiny-ppo-s0" / name).read_bytes(), name
            compared.append(name.name)
    assert compared.count("model.safetensors") == 2  # of the policy, and of the critic


MODEL = ModelConfig("qwen2", 20, 16, 32, 2, 2, 1, 8, tie_word_embeddings=True, head="scalar")


def test_a_value_is_that_before_its_token_in_packed_rows_as_in_others() -> None:
    execution = Execution(
        compute_dtype=jnp.float32, remat="none", scan_layers=False, log_prob_chunk=5
    )
    model = Decoder(MODEL, execution, single_device())
    params = random_params(MODEL)
    texts = [np.arange(3, 3 + n) % 20 for n in (5, 4, 3)]
    packed = np.concatenate(texts)[None]
    ids = np.repeat([1, 2, 3], [5, 4, 3])[None]
    positions = np.concatenate([np.arange(len(each)) for each in texts])[None]
    values = jax.jit(token_values, static_argnames="model")
    got = values(params, TokenRows(packed, positions, ids), model)[0]

    def alone(text: np.ndarray) -> jax.Array:
        row = np.zeros((1, 5), np.int32)
        row[0, : len(text)] = text
        real = (np.arange(5) < len(text))[None].astype(np.int32)
        return values(params, TokenRows(row, np.arange(5)[None], real), model)[0]

    start = 0
    for text in texts:
        length, expected = len(text), alone(text)
        np.testing.assert_allclose(got[start + 1 : start + length], expected[1:length], atol=1e-6)
        # The token itself, and those behind it, are not read.
        changed = alone(np.concatenate([text[:2], (text[2:] + 5) % 20]))
        np.testing.assert_allclose(changed[1:3], expected[1:3], atol=1e-6)
        assert np.abs(changed[3:length] - expected[3:length]).min(initial=1) > 1e-6
        start += length
    language = Decoder(ModelConfig("qwen2", 20, 16, 32, 2, 2, 1, 8), execution, single_device())
    with pytest.raises(ValueError, match="head = 'language' gives no values"):
        token_values(params, TokenRows(packed, positions, ids), language)


def test_a_plan_has_the_critic_in_programs_and_memory() -> None:
    config = load_config(CONFIG, ["output=/nonexistent"])
    run = resolve(config)
    stage = config.stages[0]
    planned = load_functions(stage).programs(stage, planning_for(config, run.layouts)).programs
    by_name = {program.name: program for program in planned}
    assert [each.name for each in planned][-4:] == [
        "log-probs",
        "update",
        "values",
        "critic update",
    ]
    for name, others in (
        ("update", {"critic", "critic's optimizer", "reference"}),
        ("critic update", {"weights", "optimizer", "reference"}),
        ("values", {"critic's optimizer", "weights", "optimizer", "reference"}),
    ):
        assert others <= by_name[name].resident.keys()
        assert by_name[name].calls == 1 and by_name[name].useful_flops > 0
    by_name["critic update"].lower()
    rollout = [each for each in planned if "decode" in each.name or "slot" in each.name]
    assert all("critic" in each.resident for each in rollout)
    plain = load_config(CONFIG, ["output=x", "stages.rl.objective=null", "stages.rl.critic=null"])
    without = load_functions(stage).programs(plain.stages[0], planning_for(plain, run.layouts))
    assert not any("critic" in each.resident for each in without.programs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["rl.objective={kind: grpo}"], "critic belongs to objective.kind ppo, and this is grpo"),
        (["rl.critic.warmup_steps=6"], "critic.warmup_steps = 6 of steps = 6: the policy would"),
        (["rl.critic.weights=nobody"], "stages.rl.critic.weights = 'nobody': neither an earlier"),
        (["rl.objective.gae_lambda=1.5"], "gae_lambda = 1.5: must be in 0..1"),
        (["rl.objective.value_clip=0"], "value_clip = 0.0: must be positive, or null"),
        (
            ["again.objective={kind: rloo}", "again.critic=null"],
            "rewards are compared among the samples of a question by kind rloo",
        ),
        (["again.dynamic_sampling={}"], "outputs_per_question = 1 with dynamic_sampling"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, ["output=x", *(f"stages.{change}" for change in changes)])
    assert message in str(caught.value)


def test_a_critic_of_other_tokens_and_an_objective_without_one_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))

    def problem(*changes: str) -> str:
        config = load_config(CONFIG, ["output=/nonexistent", *changes])
        with pytest.raises(ConfigError) as caught:
            check(resolve(config))
        return str(caught.value)

    models = json.dumps({"other": {"tokenizer": "characters:bilingual", "config": config_of(96)}})
    told = problem(f"models={models}", "stages.rl.critic.weights=other")
    assert "critic.weights" in told and "its tokenizer is another one than the policy's" in told
    outside = "stages.rl.objective={kind: 'outside_objective:VALUE'}"
    assert "critic: objective unclipped has none" in problem(outside).replace("stages.rl.", "")


def config_of(vocab: int) -> dict[str, Any]:
    config = load_config(CONFIG, ["output=x"]).model.config
    assert config is not None
    return {**config, "vocab_size": vocab}


def test_weights_of_a_critic_are_those_of_a_decoder_under_a_head_of_0() -> None:
    models: Models = resolve(load_config(CONFIG, ["output=/nonexistent"])).models
    policy, critic = models.initial_weights("rl"), models.critic_weights("model", 0)
    assert not np.asarray(critic.pop("score")).any()
    assert critic.keys() == policy.keys()  # of a tied decoder
    jax.tree.map(np.testing.assert_array_equal, critic, policy)
