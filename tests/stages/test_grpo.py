"""The pieces of the train loops, without a model."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.config.load import load_config
from r1jax.data.prompts import Prompt
from r1jax.data.tokenizers import load_tokenizer
from r1jax.recipe import Selection, run
from r1jax.rewards import Outcome, RowScore, Score
from r1jax.rewards.verifier import combine
from r1jax.rollouts.sampling import Completion, pad_prompts, stop_search
from r1jax.run.record import Record, RunFiles, open_record
from r1jax.run.resolve import StageRun, check, resolve
from r1jax.run.stop import RunError, StopSignal
from r1jax.run.train_loop import train_loop
from r1jax.sampler import Finish
from r1jax.settings.optimizer import OptimizerSection
from r1jax.settings.reflection import compile_patterns
from r1jax.settings.stage import LengthChange
from r1jax.stages.grpo.metrics import rollout_metrics, sample_facts
from r1jax.stages.grpo.settings import GRPOStage

TINY = Path(__file__).parents[1] / "tiny.yaml"


def stage(**changes: Any) -> GRPOStage:
    settings = {"data": "train", "steps": 4, "optimizer": OptimizerSection(learning_rate=1.0)}
    return GRPOStage(name="rl", length_bucket=4, **settings, **changes)


def completion(ids: list[int], finish: Finish, prompt: list[int], sample: int = 0) -> Completion:
    asked = Prompt(
        id=7,
        text="?<think>",
        prefill="<think>",
        token_ids=np.asarray(prompt, np.int32),
        question="?",
        answer="1",
        domain="",
    )
    log_probs = -np.arange(1, len(ids) + 1, dtype=np.float32)
    return Completion(asked, sample, np.asarray(ids, np.int32), log_probs, finish, "x")


def scored(reward: float, outcome: Outcome = Outcome.RIGHT) -> RowScore:
    return RowScore(reward, not math.isnan(reward), {"accuracy": Score(reward, outcome)})


def test_a_stored_sample_says_its_domain_and_rewards() -> None:
    sample = completion([4, 5, 1], Finish.EOS, [8, 9], 3)
    sample = replace(sample, prompt=replace(sample.prompt, domain="maths"))
    row = sample.row(scored(1.0), step=2)
    place = {name: row[name] for name in ("step", "problem_id", "sample", "domain")}
    assert place == {"step": 2, "problem_id": 7, "sample": 3, "domain": "maths"}
    assert row["parts"] == {"accuracy": 1.0} and row["length"] == 3


def test_rollout_metrics_leave_out_what_nobody_scored() -> None:
    completions = [completion([4] * n, Finish.EOS, [8]) for n in (1, 2, 6)]
    scores = [scored(1.0), scored(0.0, Outcome.WRONG), scored(math.nan, Outcome.VERIFIER_FAILED)]
    facts = rollout_metrics(sample_facts(completions, scores), [True, False])
    assert facts["reward/mean"] == facts["reward/accuracy"] == 0.5
    assert facts["outcome/verifier_failed"] == pytest.approx(1 / 3)
    assert (facts["length/mean"], facts["length/max"]) == (3, 6)
    assert facts["groups/zero_variance"] == 0.5
    assert not any(name.startswith("deadline") for name in facts)


def test_reflections_of_a_phase_are_counted() -> None:
    texts = ["wait, wait", "no", "But why", ""]
    completions = [replace(completion([4], Finish.EOS, [8]), text=text) for text in texts]
    patterns = compile_patterns([r"\b(wait|but)\b"])
    facts = rollout_metrics(sample_facts(completions, [scored(1.0)] * 4, patterns), [True])
    assert facts["reflection/per_completion"] == 3 / 4 and facts["reflection/share"] == 2 / 4


def test_deadlines_are_counted_by_their_cause() -> None:
    completions = [completion([4], Finish.EOS, [8]) for _ in range(4)]
    late = [Score(0.0, Outcome.WRONG, deadline="answer")] * 2
    late += [Score(math.nan, Outcome.VERIFIER_FAILED, deadline="reference")]
    late += [Score.binary(True, detail="(cause: answer)")]  # a text of the reward's
    scores = [combine({"accuracy": score}, {"accuracy": 1.0}) for score in late]
    facts = rollout_metrics(sample_facts(completions, scores), [False])
    assert facts["deadline/answer"] == 0.5 and facts["deadline/reference"] == 0.25
    assert facts["reward/mean"] == pytest.approx(1 / 3) and facts["outcome/wrong"] == 0.5


def test_rewards_see_the_prefilled_think() -> None:
    assert completion([4], Finish.EOS, [8]).reward_input().completion == "<think>x"
    assert completion([4], Finish.LENGTH, [8]).reward_input().truncated
    row = completion([4, 5], Finish.EOS, [8]).reward_input()
    assert json.loads(json.dumps(row.message(whole=True)))["token_ids"] == [4, 5]
    assert "token_ids" not in row.message(whole=False)


def test_length_limit_changes_at_its_step() -> None:
    changes = [LengthChange(step=0, tokens=8), LengthChange(step=10, tokens=16)]
    changing = stage(max_new_tokens=changes)
    assert [changing.max_new_tokens_at(step) for step in (0, 9, 10, 99)] == [8, 8, 16, 16]
    assert stage(max_new_tokens=5).max_new_tokens_at(3) == 5
    with pytest.raises(ValueError, match="steps must start at 0"):
        stage(max_new_tokens=changes[1:])


def test_stop_strings_end_at_the_token_that_completes_them() -> None:
    tokenizer = load_tokenizer("characters:running_total")
    ids = np.asarray(tokenizer("1+2=3 4+5=9", add_special_tokens=False)["input_ids"])
    stop = stop_search(tokenizer, ["=3 ", "zzz"])
    ends = stop(np.stack([ids, ids, ids]), np.asarray([len(ids), 5, 6]))
    assert ends.tolist() == [6, -1, 6]


def test_prompts_are_padded_to_few_sizes() -> None:
    config = load_config(str(TINY))
    model = resolve(config).models.of("model").decoder
    prompts = [completion([1], Finish.EOS, list(range(n))).prompt for n in (3, 17)]
    arrays = pad_prompts(prompts, model, rows=4)
    assert arrays.tokens.shape == (4, 32)
    assert arrays.lengths.tolist() == [3, 17, 17, 17]


class Stream:
    """Data without a position."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None: ...


def loop_of(directory: Path, update: Any, *changes: str) -> Any:
    """A train loop of the first stage of tests/tiny.yaml."""
    config = load_config(str(TINY), [f"output={directory}", *changes])
    run, record = resolve(config), Record(config, RunFiles.of(config), {"stages": {}})
    stage_run = StageRun(**vars(run), directory=directory, record=record, stop=StopSignal())
    stage: Any = config.stages[0]
    return train_loop(stage, stage_run, optax.sgd(1.0), update, Stream(), steps=10)


def test_non_finite_updates_are_kept_and_stop_the_run(tmp_path: Path) -> None:
    def update(state: Any, batch: Any) -> Any:
        finite = jnp.isfinite(batch.sum()).astype(jnp.float32)
        return state, {"optimizer/finite": finite}

    bad, good = np.full((2, 2), np.nan, np.float32), np.ones((2, 2), np.float32)
    with loop_of(tmp_path / "stage", update, "stages.base.max_bad_steps=2") as loop:
        for batch in (bad, good, bad):  # never two in a row
            loop.update(loop.to_devices(batch))
        with pytest.raises(RunError, match=r"2 updates in a row .*learning_rate"):
            loop.update(loop.to_devices(bad))
    saved = sorted((tmp_path / "stage" / "bad_batches").iterdir())
    assert [path.name for path in saved] == [f"step-{n:06d}.npz" for n in (1, 3, 4)]
    (array,) = np.load(saved[0]).values()
    assert np.isnan(array).all()


def test_what_is_compiled_again_behind_the_first_steps_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def update(state: Any, batch: Any) -> Any:
        return state, {"optimizer/finite": jnp.float32(1), "sum": batch["tokens"].sum()}

    said = []
    (tmp_path / "stage" / "tiny-s0").mkdir(parents=True)  # the run's, for its record
    with loop_of(tmp_path / "stage", update) as loop:
        capsys.readouterr()
        for tokens in (8, 16, 24, 24, 32, 40):
            if tokens == 32:  # a checkpoint's checksums compile for each shape, and are not said
                loop.save_if_due(Stream())  # at step 4
            loop.update({"tokens": np.ones((2, tokens)), "weights": np.ones(2)})
            loop.log_timings({})
            said.append(capsys.readouterr().out)
    assert ["compiled again" in text for text in said] == [False] * 4 + [True, False]
    assert "base: step 5 compiled again: update " in said[4]
    assert "(batches of [2, 32])" in said[4]
    rows = [json.loads(x) for x in (tmp_path / "stage" / "timings.jsonl").read_text().splitlines()]
    counts = [row["compile_count"] for row in rows]
    new = [b - a for a, b in itertools.pairwise(counts)]
    assert new[:3] == [1, 1, 0] and new[3] > 2 and new[4] == 1  # the fourth has the checkpoint's
    named = {"compile_seconds", "cache_hits", "cache_misses", "memory_bytes", "memory_peak_bytes"}
    assert all(row.keys() >= named for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.config.vocab_size=10", "vocab_size = 10 is smaller than the tokenizer's 20"),
        ("data.train.template=r1zero", "did you mean 'r1_zero'"),
        ("data.train.source=jsonl:/no/such/file", "/no/such/file"),
        ("model.attention=splash", "model.attention = 'splash' needs a tpu"),
        ("mesh.axes={data: 3}", "mesh.axes"),
    ],
)
def test_what_cannot_work_is_refused_before_any_compute(
    change: str, message: str, tmp_path: Path
) -> None:
    config = load_config(str(TINY), [f"output={tmp_path}", change])
    with pytest.raises((ValueError, OSError), match=message):
        check(resolve(config))


def test_settings_of_a_finished_stage_cannot_change_those_of_later_ones_can(tmp_path: Path) -> None:
    def begin(*changes: str) -> Record:
        config = load_config(str(TINY), [f"output={tmp_path}", *changes])
        return open_record(config, RunFiles.of(config))

    first = begin()
    base, before = (first.config.stage(name) for name in ("base", "before"))
    first.mark(base, "done", {})
    # Not begun yet, or without a say in the result: taken over.
    later = begin("stages.zero.steps=10", "trackers=[tensorboard]", "verifier.workers=2")
    assert "steps: 10" in (later.files.directory / "config.yaml").read_text()
    for change, difference in (
        ("stages.base.steps=7", r"stages\.base\.steps: 6 -> 7"),
        ("data.train.limit=499", r"data\.train\.limit: 500 -> 499"),
        ("model.config.hidden_size=32", r"model\.config\.hidden_size: 16 -> 32"),
    ):
        with pytest.raises(ValueError, match=rf"stage base is finished .*{difference}"):
            begin(change)
    # What a stage is made of includes the stages before it.
    del later.content["stages"]["base"]
    later.mark(before, "done", {})
    with pytest.raises(
        ValueError, match=r"stage before is finished .*\(stages\.base\.steps: 6 -> 7\)"
    ):
        begin("stages.base.steps=7")


def test_selections_name_stages_and_need_what_comes_before(tmp_path: Path) -> None:
    config = load_config(str(TINY), [f"output={tmp_path}"])
    assert Selection(first="before").stages(config) == ["before", "zero"]
    assert Selection(last="before").stages(config) == ["base", "before"]
    assert Selection(only="zero").stages(config) == ["zero"]
    for selection, message in (
        (Selection(only="zeroo"), "--only zeroo: no such stage; did you mean zero"),
        (Selection(first="zero", last="base"), "--from zero comes after --until base"),
        (Selection(only="zero", last="base"), "--only does not go with"),
    ):
        with pytest.raises(ValueError, match=message):
            selection.stages(config)
    with pytest.raises(ValueError, match="the stage zero needs base, which is not finished"):
        run(config, Selection(only="zero"))
