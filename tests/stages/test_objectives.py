"""Stages with other objectives than GRPO: what an update is given, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1jax import recipe
from r1jax.config.load import ConfigError, load_config
from r1jax.config.run_config import RunConfig
from r1jax.run.resolve import load_functions, resolve
from r1jax.run.train_loop import TrainLoop
from r1jax.settings.section import SettingError
from r1jax.stages.grpo.objective import stage_objective

TESTS = Path(__file__).parents[1]


def run(output: Path, monkeypatch: pytest.MonkeyPatch, *changes: str) -> Any:
    """tests/tiny_dynamic.yaml without dynamic sampling, four updates by two in a phase: the lines
    of metrics.jsonl, and of each update the packed rows and the batch that it was given."""
    packed, batches = [], []

    def to_devices(self: TrainLoop, batch: Any, layout: Any = None) -> Any:
        packed.append(batch)
        return original[0](self, batch, layout)

    def update(self: TrainLoop, batch: Any) -> Any:
        batches.append(batch)
        return original[1](self, batch)

    original = TrainLoop.to_devices, TrainLoop.begin_update
    monkeypatch.setattr(TrainLoop, "to_devices", to_devices)
    monkeypatch.setattr(TrainLoop, "begin_update", update)
    config = load(f"output={output}", *changes)
    assert recipe.run(config) == 0
    lines = (output / "tiny-dynamic-s0/stages/00-zero/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], packed, batches


def load(output: str, *changes: str) -> RunConfig:
    settings = ["dynamic_sampling=null", "steps=4", "outputs_per_question=4", *changes]
    overrides = [f"stages.zero.{each}" for each in settings]
    return load_config(TESTS / "tiny_dynamic.yaml", [output, *overrides])


@pytest.mark.slow
def test_kl_in_the_reward_is_subtracted_before_a_phase_is_whitened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, packed, batches = run(
        tmp_path, monkeypatch, "objective={kind: reinforce_plus_plus, kl_coefficient: 0.2}"
    )
    assert len(metrics) == len(packed) == len(batches) == 4
    for phase in (slice(0, 2), slice(2, 4)):
        given, expected = [], []
        for rows, batch in zip(packed[phase], batches[phase], strict=True):
            ids, mask = np.asarray(batch.segment_ids), np.asarray(batch.mask) > 0
            kl = np.asarray(batch.old_log_probs) - np.asarray(batch.reference_log_probs)
            counted = (ids[:, :, None] == ids[:, None, :]) & mask[:, None, :]
            counted &= np.arange(ids.shape[1]) >= np.arange(ids.shape[1])[:, None]
            penalty = np.einsum("rac,rc->ra", counted, kl)
            expected.append((rows.advantages - 0.2 * penalty)[mask])
            given.append(np.asarray(batch.advantages)[mask])
            assert set(np.unique(rows.advantages[mask])) <= {0.0, 1.0}  # the rewards
        of_phase = np.concatenate(expected)
        whitened = (of_phase - of_phase.mean()) / of_phase.std()
        np.testing.assert_allclose(np.concatenate(given), whitened, atol=1e-3)
    # The first phase's policy is its reference; the second's has moved away.
    assert np.abs(kl[mask]).max() > 1e-4
    assert all(line["optimizer/finite"] == 1 for line in metrics)
    assert "policy/sequence_clip_fraction" in metrics[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        "{kind: gspo, kl_coefficient: 0.1, kl_estimator: k2}",
        "{kind: gspo, form: token, importance_level: sequence}",
        "{kind: dr_grpo}",
        "{kind: dapo, entropy_coefficient: 0.01}",
        "{kind: cispo}",
        "{kind: sapo}",
        "{kind: gmpo}",
        "{kind: rloo, kl_coefficient: 0.1}",
        "{kind: reinforce_plus_plus, baseline: true}",
        "{kind: 'outside_objective:unclipped', options: {kl: 0.1}}",
    ],
)
def test_every_kind_trains_in_packed_rows_and_two_updates(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    metrics, _, batches = run(tmp_path, monkeypatch, f"objective={objective}")
    assert all(line["optimizer/finite"] == 1 for line in metrics)
    assert any(line["optimizer/grad_norm"] > 0 for line in metrics)
    with_reference = "kl" in objective
    assert all((b.reference_log_probs is not None) == with_reference for b in batches)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nowhere:mine", "importing nowhere failed: ModuleNotFoundError"),
        ("outside_objective:nobody", "nobody of outside_objective is NoneType, and no Objective"),
        ("outside_objective:NOTHING", "NOTHING of outside_objective is int, and no Objective"),
        ("outside_objective:fails", "objective.options: fails refuses them: no such thing"),
        ("outside_objective:NEEDS_VALUES", "it needs values, and a grpo stage has old_log_probs, "),
        ("outside_objective:CRITIC", "its advantages are None; give a function of rewards"),
    ],
)
def test_an_objective_that_a_stage_cannot_use_is_refused_before_compute(
    kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    run = resolve(load("output=/nonexistent", f"objective={{kind: '{kind}'}}"))
    with pytest.raises(ConfigError) as caught:
        load_functions(run.config.stages[0]).check(run.config.stages[0], run)
    (problem,) = caught.value.problems
    assert problem.startswith("command line: stages.zero.objective.") and message in problem


def test_samples_of_older_weights_need_a_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    changes = "objective={kind: 'outside_objective:UNCORRECTED'}", "phases_of_lag=1"
    stage: Any = load("output=x", *changes).stages[0]
    with pytest.raises(SettingError, match=r"no correction, and phases_of_lag = 1 trains on"):
        stage_objective(stage)
    given: Any = load("output=x", "objective={kind: 'outside_objective:unclipped'}").stages[0]
    assert stage_objective(given).name == "unclipped"
    with pytest.raises(SettingError, match="unclipped refuses them: .*beta"):
        stage_objective(
            load(
                "output=x", "objective={kind: 'outside_objective:unclipped', options: {beta: 1}}"
            ).stages[0]  # type: ignore[arg-type]
        )
    with pytest.raises(SettingError, match="VALUE is no function, and takes none"):
        stage_objective(
            load(
                "output=x", "objective={kind: 'outside_objective:VALUE', options: {kl: 1}}"
            ).stages[0]  # type: ignore[arg-type]
        )
