"""Writes a run directory that no run has made: quick, small, and with the awkward cases.

`python tests/fabricated_run.py DIRECTORY` writes one and its report, to look at.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from r1jax.evaluation import summarise

HOSTILE = "<script>alert('model text')</script> & \"quotes\""


def fabricate(
    directory: Path,
    *,
    problems: int = 40,
    samples: int = 8,
    steps: int = 200,
    until: str | None = None,
) -> Path:
    """A finished run of pretrain, evaluate, grpo, evaluate; or one that is at stage `until`."""
    rng = np.random.default_rng(0)
    config = _config(problems, samples, steps)
    names = [stage["name"] for stage in config["stages"]]
    reached = len(names) if until is None else names.index(until) + 1
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    stages: dict[str, Any] = {}
    for number, stage in enumerate(config["stages"][:reached]):
        path = directory / "stages" / f"{number:02d}-{stage['name']}"
        path.mkdir(parents=True)
        running = stage["name"] == until
        seconds = {
            "pretrain": {"update": 96.4, "compile": 11.2, "checkpoint": 0.9},
            "evaluate": {"rollout": 14.1, "score_wait": 0.3, "compile": 3.9},
            "grpo": {"rollout": 141.0, "score_wait": 1.7, "update": 88.2, "compile": 16.3},
        }[stage["kind"]]
        stages[stage["name"]] = {
            "kind": stage["kind"],
            "status": "running" if running else "done",
            "seconds": seconds,
        }
        shown = stage.get("steps", 0) // (3 if running else 1)
        if stage["kind"] == "pretrain":
            _lines(path / "metrics.jsonl", _pretrain(rng, shown))
        elif stage["kind"] == "grpo":
            _lines(path / "metrics.jsonl", _grpo(rng, shown, steps))
            _lines(path / "timings.jsonl", _timings(rng, shown))
            _lines(path / "samples.jsonl", _training_samples(rng, shown, steps))
        else:
            rows = _evaluation(rng, problems, samples, skill=0.3 if number < 2 else 0.96)
            if running:  # killed in the middle of a line
                _lines(path / "samples.jsonl", rows[: len(rows) // 3])
                with (path / "samples.jsonl").open("a") as file:
                    file.write('{"problem_id": 3, "samp')
            else:
                _lines(path / "samples.jsonl", rows)
                summary = summarise(rows, same_answer=str)
                (path / "summary.json").write_text(json.dumps(summary))
    info = {
        "name": config["name"],
        "seed": config["seed"],
        "started": "2025-01-22T09:30:00+00:00",
        "versions": {"r1jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.0", "python": "3.11.7"},
        "hardware": {"platform": "cpu", "devices": 1, "kind": "Made-up CPU @ 2.4 GHz", "cores": 2},
        "stages": stages,
    }
    (directory / "run.json").write_text(json.dumps(info))
    return directory


def _config(problems: int, samples: int, steps: int) -> dict[str, Any]:
    evaluate = {
        "kind": "evaluate",
        "data": "held_out",
        "problems": problems,
        "samples_per_problem": samples,
        "sampling": {"temperature": 0.6, "top_p": 0.95},
    }
    return {
        "name": "tiny-r1-zero",
        "seed": 0,
        "title": "R1-Zero on running totals",
        "notes": "The paper's settings, but for the learning rate: a model this small needs "
        "3e-4.\n\nThe reference is refreshed every 400 steps.",
        "model": {"config": {"hidden_size": 128, "num_hidden_layers": 4}, "path": None},
        "data": {"held_out": {"source": "task:running_total", "split": "held_out"}},
        "rewards": {"accuracy": {"weight": 1.0}, "format": {"weight": 1.0}},
        "stages": [
            {"name": "base", "kind": "pretrain", "data": "train", "steps": 300},
            {"name": "base-eval", **evaluate},
            {"name": "r1-zero", "kind": "grpo", "data": "train", "steps": steps},
            {"name": "final-eval", **evaluate},
        ],
    }


def _pretrain(rng: np.random.Generator, steps: int) -> Iterable[dict[str, Any]]:
    for step in range(0, steps, 10):
        yield {
            "step": step,
            "loss": 0.7 + 2.9 * math.exp(-step / 60) + 0.02 * rng.standard_normal(),
            "optimizer/grad_norm": 0.4 + math.exp(-step / 40) + 0.05 * rng.random(),
            "optimizer/learning_rate": 3e-3 * (1 - step / max(steps, 1)),
        }


def _grpo(rng: np.random.Generator, steps: int, total: int) -> Iterable[dict[str, Any]]:
    for step in range(steps):
        t = step / total
        right = 0.3 + 0.66 / (1 + math.exp(-12 * (t - 0.3))) + 0.03 * rng.standard_normal()
        formatted = 0.75 + 0.25 * (1 - math.exp(-9 * t)) - 0.02 * rng.random()
        yield {
            "step": step,
            "reward/mean": right + formatted,
            "reward/accuracy": right,
            "reward/format": formatted,
            "outcome/right": right,
            "outcome/wrong": 1 - right - 0.02,
            "outcome/unparseable": 0.02,
            "outcome/verifier_failed": 0.0,
            "length/mean": 14 + 26 / (1 + math.exp(-12 * (t - 0.3))) + rng.standard_normal(),
            "length/max": 64 - 20 * t + 6 * rng.random(),
            "length/truncated": max(0.0, 0.03 - 0.04 * t + 0.004 * rng.random()),
            "groups/zero_variance": 0.1 + 0.6 * t + 0.03 * rng.random(),
            "policy/entropy": 0.7 * math.exp(-3 * t) + 0.05 + 0.02 * rng.random(),
            # A run can write what JSON has no number for.
            "policy/kl": "nan" if step == 7 else 0.02 * t + 0.002 * rng.random(),
            "policy/clip_fraction": 0.002 * rng.random(),
            "sampler/gap_mean": 1e-6 * (1 + rng.random()),
            "sampler/gap_max": 2e-5 * (1 + rng.random()),
            "optimizer/grad_norm": 0.3 + 0.5 * math.exp(-4 * t) + 0.1 * rng.random(),
            "optimizer/learning_rate": 3e-4,
            "loss": 1e-3 * rng.standard_normal(),
            "experiment/surprise": rng.random(),
        }


def _timings(rng: np.random.Generator, steps: int) -> Iterable[dict[str, Any]]:
    for step in range(steps):
        yield {
            "step": step,
            "seconds/rollout": 0.7 + 0.1 * rng.random(),
            "seconds/update": 0.4 + 0.05 * rng.random(),
            "tokens_per_second/rollout": 21_000 + 1500 * rng.random(),
            "tokens_per_second/update": 48_000 + 2500 * rng.random(),
            "compile_count": 6,
            "memory_bytes": 4.1e8,
        }


def _sample(rng: np.random.Generator, problem: int, sample: int, skill: float) -> dict[str, Any]:
    terms = np.random.default_rng(problem).integers(1, 10, 4)
    prompt = "+".join(str(t) for t in terms) + "="
    right = bool(rng.random() < np.clip(skill + 0.15 * math.sin(problem), 0, 1))
    answer = int(terms.sum())
    said = answer if right else answer + int(rng.integers(1, 6))
    if skill > 0.5:
        sums = np.cumsum(terms)
        work = " ".join(f"{a}+{b}={a + b}" for a, b in zip(sums[:-1], terms[1:], strict=True))
    else:
        work = ""
    completion = f"<think>{work}</think><answer>{said}</answer>"
    outcome = "right" if right else "wrong"
    extracted: str | None = str(said)
    if problem == 0 and sample == 0:  # model text is hostile until proved otherwise
        completion, outcome, extracted = HOSTILE, "unparseable", None
    if problem == 1 and sample == 1:
        outcome = "verifier_failed"
    return {
        "problem_id": problem,
        "sample": sample,
        "prompt": prompt,
        "completion": completion,
        "answer": str(answer),
        "reward": 1.0 + right,
        "parts": {"accuracy": float(right), "format": 1.0},
        "outcome": outcome,
        "extracted": extracted,
        "length": len(completion) // 2,
        "finish_reason": "stop",
    }


def _evaluation(
    rng: np.random.Generator, problems: int, samples: int, skill: float
) -> list[dict[str, Any]]:
    return [
        {"step": 0, **_sample(rng, p, s, skill)} for p in range(problems) for s in range(samples)
    ]


def _training_samples(rng: np.random.Generator, steps: int, total: int) -> Iterable[dict[str, Any]]:
    for step in range(0, steps, 20):
        for problem in (100 + step, 99):
            for sample in range(2):
                yield {"step": step, **_sample(rng, problem, sample, 0.3 + 0.68 * step / total)}


def _lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    from r1jax.report import write_report

    until = sys.argv[2] if len(sys.argv) > 2 else None
    print(write_report(fabricate(Path(sys.argv[1]), until=until)))
