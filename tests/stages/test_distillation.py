"""Stages that learn a teacher's distribution, beside what transformers computes of both models."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from r1jax import recipe
from r1jax.config.lineage import Edge, edges, needs
from r1jax.config.load import ConfigError, load_config
from r1jax.config.run_config import RunConfig
from r1jax.planner.plan import planning_for
from r1jax.run.resolve import load_functions, resolve
from r1jax.run.selection import Selection
from r1jax.run.train_loop import TrainLoop

TESTS = Path(__file__).parents[1]
VOCAB = 20  # of the student; the teacher has rows for no token


def load(*changes: str) -> RunConfig:
    return load_config(TESTS / "tiny_distil.yaml", ["output=/nonexistent", *changes])


# --- Before compute ------------------------------------------------------------------------------


def test_a_teacher_is_part_of_the_schedule() -> None:
    config = load()
    for stage in ("offline", "alone", "beside"):
        assert Edge("teacher", stage, "teacher") in edges(config)
        assert "teacher" in needs(config, stage)
    alone: Any = config.stage("alone")
    assert alone.loss.kl_coefficient == 0  # no reference where none is given
    given: Any = load("stages.alone.loss.kl_coefficient=0.1").stage("alone")
    assert given.loss.kl_coefficient == 0.1
    beside: Any = config.stage("beside")
    assert beside.loss.kl_coefficient == 0.001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["alone.distillation=null"], "rewards = []: the stage would train on nothing"),
        (["alone.held_out=questions"], "held_out with rewards = []: it needs rewards"),
        (["alone.dynamic_sampling={}"], "dynamic_sampling with rewards = []"),
        (["beside.outputs_per_question=1"], "outputs_per_question = 1: rewards are compared"),
        (["alone.distillation.teacher=nobody"], "neither an earlier train stage nor a model"),
        (["alone.distillation.teacher=beside"], "neither an earlier train stage nor a model"),
        (["alone.distillation.beta=0.5"], "beta = 0.5 belongs to divergence 'jsd'"),
        (["beside.distillation.top_k=3"], "top_k = 3 with form 'advantage'"),
        (["beside.distillation.divergence=forward_kl"], "divergence = forward_kl with form"),
        (["alone.distillation.cross_entropy_coefficient=1"], "unknown key"),
        (["offline.mtp_weight=0.1"], "mtp_weight with distillation"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*(f"stages.{each}" for each in changes))
    assert any(message in problem for problem in caught.value.problems), caught.value.problems


def test_rewards_without_weight_are_only_shown() -> None:
    changes = ["stages.alone.rewards=null", "stages.alone.outputs_per_question=2"]
    assert load(*changes, "rewards.even.weight=0", "stages.beside.rewards=[even]")
    without = [*changes, "rewards.even.weight=0", "stages.alone.distillation=null"]
    with pytest.raises(ConfigError, match="trains on nothing"):
        load(*without)


def test_a_teacher_of_other_tokens_is_refused_before_compute(tmp_path: Path) -> None:
    from tiny_checkpoint import make_model

    make_model(tmp_path / "other")
    other = yaml.safe_dump({"path": str(tmp_path / "other")}, default_flow_style=True).strip()
    config = load(f"models.other={other}", "stages.alone.distillation.teacher=other")
    run = resolve(config)
    with pytest.raises(ConfigError) as caught:
        load_functions(config.stage("alone")).check(config.stage("alone"), run)
    (problem,) = caught.value.problems
    assert 'distillation.teacher = "other": its tokens are not the student\'s' in problem
    assert "(vocab_size = 20)" in problem and "(vocab_size = 272)" in problem
    assert "Name a teacher with the student's tokenizer" in problem
    config = load("stages.beside.objective={kind: gspo}")
    with pytest.raises(ConfigError, match="gspo has one for each sample; set form to 'loss'"):
        load_functions(config.stage("beside")).check(config.stage("beside"), resolve(config))
    config = load("stages.offline.distillation.top_k=21")
    with pytest.raises(ConfigError, match=r"distillation.top_k = 21: there are 20 tokens"):
        load_functions(config.stage("offline")).check(config.stage("offline"), resolve(config))


def test_a_plan_has_the_teacher_in_memory_and_its_work() -> None:
    config = load()
    planning = planning_for(config, resolve(config).layouts)

    def programs(stage: str, *changes: str) -> dict[str, Any]:
        chosen = load(*changes).stage(stage)
        made = load_functions(chosen).programs(chosen, planning)
        return {program.name: program for program in made.programs}

    for stage in ("offline", "alone"):
        update = programs(stage)["update"]
        plain = "stages.alone.rewards=null", "stages.alone.outputs_per_question=2"
        more = plain if stage == "alone" else ()
        without = programs(stage, f"stages.{stage}.distillation=null", *more)["update"]
        assert "teacher" in update.arguments and "teacher" not in update.resident
        assert "teacher" not in {**without.arguments, **without.resident}
    beside = programs("beside")
    assert "teacher" in beside["update"].resident and "teacher" not in beside["update"].arguments
    assert "teacher" in beside["teacher's log-probs"].arguments
    assert beside["teacher's log-probs"].calls == 1


# --- Whole runs ----------------------------------------------------------------------------------


class Finished(NamedTuple):
    """directory: of the run. batches: of each stage's updates."""

    directory: Path
    batches: dict[str, list[Any]]

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        (path,) = self.directory.glob(f"stages/*-{stage}/metrics.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def logits(self, stage: str, tokens: np.ndarray) -> np.ndarray:
        """Of one document, float64 [time, vocab], by transformers."""
        import torch
        from transformers import AutoModelForCausalLM

        (path,) = self.directory.glob(f"stages/*-{stage}/model")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(torch.tensor(tokens[None])).logits[0]
        return logits.double().numpy()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    output = tmp_path_factory.mktemp("distil")
    batches: dict[str, list[Any]] = defaultdict(list)
    original = TrainLoop.begin_update

    def begin_update(self: TrainLoop, batch: Any) -> Any:
        batches[self.stage.name].append(batch)
        return original(self, batch)

    config = load_config(TESTS / "tiny_distil.yaml", [f"output={output}/whole"])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TESTS))
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.setattr(TrainLoop, "begin_update", begin_update)
        assert recipe.run(config, Selection(last="sampled")) == 0
        shutil.copytree(output / "whole", output / "resumed")
        assert recipe.run(config) == 0
        # In two processes' turns: the second loads the teacher again.
        for steps in (1, 2):
            changes = [f"output={output}/resumed", f"stages.alone.steps={steps}"]
            again = load_config(TESTS / "tiny_distil.yaml", changes)
            assert recipe.run(again, Selection(only="alone")) == 0
    return Finished(output / "whole" / "tiny-distil-s0", batches)


def documents(inputs: Any, mask: Any) -> list[tuple[Any, np.ndarray]]:
    """(index of its tokens, trained tokens of it) of each document in packed rows."""
    ids, mask, found = np.asarray(inputs["segment_ids"]), np.asarray(mask) > 0, []
    for r in range(len(ids)):
        for segment in range(1, ids[r].max() + 1):
            (at,) = np.nonzero(ids[r] == segment)
            found.append(((r, at), mask[r, at]))
    return found


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Of the token behind each."""
    weights = np.exp(logits / temperature - (logits / temperature).max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def both(
    finished: Finished, tokens: np.ndarray, temperature: float = 1.0, rows: int = VOCAB
) -> Any:
    """Student's and teacher's probabilities of what stands at each token but the first.

    rows: of the vocabulary, at most.
    """
    return [
        probabilities(finished.logits(stage, tokens)[:, :rows], temperature)[:-1]
        for stage in ("base", "teacher")
    ]


@pytest.mark.slow
def test_alone_the_loss_is_the_divergence_at_the_students_samples(finished: Finished) -> None:
    batch, lines = finished.batches["alone"][0], finished.metrics("alone")
    assert batch.old_log_probs is None and batch.reference_log_probs is None
    assert not np.asarray(batch.advantages).any()
    by_sample, agreed = [], []
    for at, trained in documents(batch.inputs, batch.mask):
        p, q = both(finished, np.asarray(batch.inputs["tokens"])[at], temperature=0.8)
        kl = np.sum(p * np.log(p / q), axis=-1)[trained[1:]]
        by_sample.append(kl)
        agreed.append((p.argmax(-1) == q.argmax(-1))[trained[1:]])
    assert len(by_sample) == 4
    every = np.concatenate(by_sample)
    first = lines[0]
    assert first["distillation/divergence"] == pytest.approx(every.mean(), rel=1e-4)
    assert first["distillation/agreement"] == pytest.approx(np.concatenate(agreed).mean())
    # Normalised as the objective says: a mean over samples of their means.
    expected = 0.5 * np.mean([kl.mean() for kl in by_sample])
    assert first["loss"] == pytest.approx(expected, rel=1e-4)
    assert first["optimizer/grad_norm"] > 0
    names = {name.partition("/")[0] for name in first}
    assert not names & {"reward", "outcome", "groups"} and "length/mean" in first


@pytest.mark.slow
def test_offline_it_is_a_forward_kl_of_the_top_k_beside_cross_entropy(finished: Finished) -> None:
    batch, lines = finished.batches["offline"][0], finished.metrics("offline")
    losses, divergences = [], []
    for at, trained in documents(batch, batch["trained"]):
        tokens = np.asarray(batch["tokens"])[at]
        p, q = (x[trained[1:]] for x in both(finished, tokens))
        losses.append(-np.log(p[np.arange(len(p)), tokens[1:][trained[1:]]]))
        order = np.argsort(-q, axis=-1)[:, :5]
        p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
        p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
        divergences.append(np.sum(q * np.log(q / p), axis=-1))
    first, last = lines[0], lines[-1]
    loss, divergence = np.concatenate(losses).mean(), np.concatenate(divergences).mean()
    assert first["loss"] == pytest.approx(loss, rel=1e-4)
    assert first["distillation/divergence"] == pytest.approx(divergence, rel=1e-4)
    assert last["step"] == 2 and last["held_out/distillation/divergence"] > 0
    assert 0 < last["held_out/distillation/agreement"] < 1 and last["held_out/loss"] > 0


@pytest.mark.slow
def test_sampled_tokens_have_the_teachers_log_probs_as_advantages(finished: Finished) -> None:
    batch = finished.batches["beside"][0]
    assert len(finished.batches["beside"]) == 2
    divergences, seen = [], set()
    for at, trained in documents(batch.inputs, batch.mask):
        tokens = np.asarray(batch.inputs["tokens"])[at]
        log_p, log_q = (
            np.log(x[np.arange(len(x)), tokens[1:]])[trained[1:]]
            for x in both(finished, tokens, temperature=0.8, rows=24)  # each model's log-probs
        )
        np.testing.assert_allclose(
            np.asarray(batch.teacher_log_probs)[at][trained], log_q, atol=2e-4
        )
        of_group = np.asarray(batch.advantages)[at][trained] + 0.3 * (log_p - log_q)
        np.testing.assert_allclose(of_group, of_group[0], atol=2e-4)  # the sample's by its reward
        seen.add(round(float(of_group[0]), 2))
        divergences.append(log_p - log_q)
    assert len(seen) > 1
    first = finished.metrics("beside")[0]
    mean = np.concatenate(divergences).mean()
    assert first["distillation/divergence"] == pytest.approx(mean, abs=1e-4)
    assert "reward/mean" in first and "distillation/agreement" not in first


@pytest.mark.slow
def test_a_resumed_stage_loads_its_teacher_again(finished: Finished) -> None:
    resumed = finished.directory.parents[1] / "resumed" / finished.directory.name
    (one,), (other,) = (
        each.glob("stages/*-alone/metrics.jsonl") for each in (finished.directory, resumed)
    )
    assert one.read_bytes() == other.read_bytes()
    (one,), (other,) = (
        each.glob("stages/*-alone/model/*.safetensors") for each in (finished.directory, resumed)
    )
    assert one.read_bytes() == other.read_bytes()
