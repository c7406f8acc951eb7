"""Writes run directories that no run has made: quick, small, and with the awkward cases.

`python tests/fabricated_run.py DIRECTORY [recipe] [STAGE]` writes one and its report, to look at;
with the name of a stage, one that has come so far; with `seeds`, three and their common report.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from html_page import Page

from r1jax.config.run_config import RunConfig
from r1jax.evaluation.metrics import summarise
from r1jax.files import JsonObject
from r1jax.stages.evaluate.settings import EvaluateStage
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.stages.sft.settings import SFTStage

HOSTILE = "<script>alert('model text')</script> & \"quotes\""
COMPARISON = "Distillation against reinforcement learning"
DOMAINS = ("code", "logic", "maths", "stem")


@dataclass(frozen=True)
class Size:
    """How large a run is, and how far it has come.

    Attributes:
      until: the stage that is still running; None: the run is finished.
      curves: the stages that have metrics; None: all. (Plots are most of the time of a page.)
    """

    problems: int = 40
    samples: int = 8
    steps: int = 200
    until: str | None = None
    curves: Collection[str] | None = None


def fabricate(directory: Path, size: Size = Size(), *, seed: int = 0) -> Path:
    """A run of pretrain, evaluate, grpo, evaluate."""
    return _write(directory, _config(size) | {"seed": seed}, size, ("",))


def fabricate_recipe(directory: Path, size: Size = Size(), *, seed: int = 0) -> Path:
    """The whole recipe: R1-Zero, cold start, reasoning, all scenarios, and a distilled student."""
    return _write(directory, _recipe(size) | {"seed": seed}, size, DOMAINS)


def _write(directory: Path, config: JsonObject, size: Size, domains: tuple[str, ...]) -> Path:
    rng = np.random.default_rng(config["seed"])
    resolved = RunConfig.model_validate(config)
    names = [stage.name for stage in resolved.stages]
    reached = len(names) if size.until is None else names.index(size.until) + 1
    directory.mkdir(parents=True)
    plan = resolved.model_dump(mode="json", exclude={"output"})
    (directory / "config.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))

    stages: JsonObject = {}
    for number, stage in enumerate(resolved.stages[:reached]):
        path = directory / "stages" / f"{number:02d}-{stage.name}"
        path.mkdir(parents=True)
        running = stage.name == size.until
        seconds = {
            "pretrain": {"update": 96.4, "compile": 11.2, "checkpoint": 0.9},
            "sft": {"update": 41.2, "compile": 9.8, "checkpoint": 0.7},
            "evaluate": {"rollout": 14.1, "score_wait": 0.3, "compile": 3.9},
            "rejection_sampling": {"rollout": 33.0, "score_wait": 0.8},
            "reward_model": {"update": 20.5, "compile": 5.1},
            "grpo": {"rollout": 141.0, "score_wait": 1.7, "update": 88.2, "compile": 16.3},
        }[stage.kind]
        stages[stage.name] = {
            "kind": stage.kind,
            "status": "running" if running else "done",
            "seconds": seconds,
            "machine": {
                "compile_count": 31,
                "compile_seconds": 12.2,
                "cache_hits": 8 if stage.kind == "grpo" else 0,
                "cache_misses": 23 if stage.kind == "grpo" else 0,
                "memory_peak_bytes": 3 * 2**30,
                **({"memory_limit_bytes": 16 * 2**30} if stage.kind == "grpo" else {}),
            },
        }
        steps = getattr(stage, "steps", None) or 60
        written = steps // (3 if running else 1)
        metrics: Iterable[JsonObject] = ()
        if stage.kind == "pretrain":
            metrics = _pretrain(rng, written)
        elif isinstance(stage, SFTStage):
            metrics = _fine_tuning(rng, written, stage.held_out)
        elif stage.kind == "reward_model":
            metrics = _preferences(rng, written)
        elif isinstance(stage, GRPOStage):
            metrics = list(_grpo(rng, written, steps))
            if stage.held_out is not None:
                write_lines(path / "held_out.jsonl", _held_out(stage, written, domains))
            write_lines(path / "timings.jsonl", _timings(rng, written))
            write_lines(path / "samples.jsonl", _training_samples(rng, written, steps, domains))
        elif isinstance(stage, EvaluateStage):
            assert stage.problems is not None
            skill = _SKILLS[resolved.weights_of(stage.name)]
            rows = _evaluation(rng, stage.problems, stage.samples_per_problem, skill, domains)
            if running:  # killed in the middle of a line
                write_lines(path / "samples.jsonl", rows[: len(rows) // 3])
                with (path / "samples.jsonl").open("a") as file:
                    file.write('{"problem_id": 3, "samp')
            else:
                write_lines(path / "samples.jsonl", rows)
                summary = summarise(rows, same_answer=str)
                (path / "summary.json").write_text(json.dumps(summary))
        elif not running:
            rows = _dataset(rng, stage.name, domains)
            write_lines(path / "dataset.jsonl", rows)
            (path / "summary.json").write_text(json.dumps(_card(rows)))
        if size.curves is None or stage.name in size.curves:
            write_lines(path / "metrics.jsonl", metrics)
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


_SKILLS = {  # of the weights: how often they are about right
    "base": 0.2,
    "r1-zero": 0.96,
    "zero": 0.72,
    "dev1": 0.55,
    "dev2": 0.78,
    "dev3": 0.8,
    "r1": 0.86,
    "student": 0.08,
    "distilled": 0.62,
}


def _config(size: Size) -> JsonObject:
    evaluate = {
        "kind": "evaluate",
        "data": "held_out",
        "problems": size.problems,
        "samples_per_problem": size.samples,
    }
    return {
        "name": "tiny-r1-zero",
        "seed": 0,
        "title": "R1-Zero on running totals",
        "notes": "The paper's settings, but for the learning rate: a model this small needs "
        "3e-4.\n\nThe reference is refreshed every 400 steps.",
        "model": _MODEL,
        "data": {
            "train": {"source": "task:running_total"},
            "held_out": {"source": "task:running_total", "split": "held_out"},
        },
        "rewards": {"accuracy": {}, "format": {}},
        "stages": [
            {"name": "base", "kind": "pretrain", "data": "train", "steps": 300, **_PACKED},
            {"name": "base-eval", **evaluate},
            {
                **{
                    "name": "r1-zero",
                    "kind": "grpo",
                    "data": "train",
                    "steps": size.steps,
                    **_ADAM,
                },
                **{"held_out": "held_out", "held_out_every": max(1, size.steps // 5)},
            },
            {"name": "final-eval", **evaluate},
        ],
    }


_MODEL = {
    "config": {"model_type": "qwen2", "hidden_size": 128, "num_hidden_layers": 4},
    "tokenizer": "characters:running_total",
}
_ADAM = {"optimizer": {"learning_rate": 3e-4}}
_PACKED = {"rows_per_step": 32, "row_tokens": 128, **_ADAM}


def _recipe(size: Size) -> JsonObject:
    rules = ["accuracy", "format", "language_consistency"]
    held_out = {name: {"source": f"jsonl:{name}.jsonl", "domain": name} for name in DOMAINS}
    # Base and R1-Zero know no chat yet: the same problems in another template.
    plain = {f"{name}_plain": {**data, "template": "plain"} for name, data in held_out.items()}

    def evaluation(weights: str, data: str = "held_out") -> JsonObject:
        return {
            "name": f"{weights}-eval",
            "kind": "evaluate",
            "weights": weights,
            "data": data,
            "rewards": rules,
            "problems": size.problems,
            "samples_per_problem": size.samples,
        }

    def learning(name: str, kind: str, weights: str, data: str, **settings: object) -> JsonObject:
        place = {"name": name, "kind": kind, "weights": weights, "data": data, "steps": size.steps}
        rest = {**_ADAM, "rewards": rules} if kind == "grpo" else _PACKED
        return {**place, **rest, **settings}

    def sampling(name: str, weights: str, **settings: object) -> JsonObject:
        place = {"name": name, "kind": "rejection_sampling", "weights": weights, "rewards": rules}
        return {**place, "data": "questions", "samples_per_prompt": 4, **settings}

    return {
        "name": "tiny-r1",
        "seed": 0,
        "title": "DeepSeek-R1 in miniature",
        "model": _MODEL,
        "models": {"student": _MODEL},
        "data": {
            "texts": {"source": "task:running_total"},
            "questions": {"source": "jsonl:questions.jsonl"},
            **held_out,
            **plain,
            "held_out": {"mixture": dict.fromkeys(held_out, 1.0)},
            "held_out_plain": {"mixture": dict.fromkeys(plain, 1.0)},
            "cold": {"source": "stage:cold-start"},
            "harvest": {"source": "stage:harvested"},
            "general": {"source": "jsonl:general.jsonl"},
            "all": {"mixture": {"harvest": 3.0, "general": 1.0}},
            "pairs": {"source": "jsonl:pairs.jsonl"},
        },
        "rewards": {**{name: {} for name in rules}, "helpful": {"model": "helpful-model"}},
        "stages": [
            learning("base", "pretrain", "model", "texts"),
            evaluation("base", "held_out_plain"),
            learning("zero", "grpo", "base", "questions", held_out="held_out_plain"),
            evaluation("zero", "held_out_plain"),
            sampling("cold-start", "zero", filters={"repetition": {}}),
            learning("dev1", "sft", "base", "cold", held_out="general"),
            evaluation("dev1"),
            learning("dev2", "grpo", "dev1", "questions"),
            evaluation("dev2"),
            sampling("harvested", "dev2", keep_per_prompt=2),
            learning("dev3", "sft", "base", "all", held_out="general"),
            evaluation("dev3"),
            {
                "name": "helpful-model",
                "kind": "reward_model",
                "weights": "dev3",
                "data": "pairs",
                "loss": "pairwise",
                "reads": "summary",
                "steps": 60,
                **_ADAM,
            },
            learning("r1", "grpo", "dev3", "questions", rewards=[*rules, "helpful"]),
            evaluation("r1"),
            evaluation("student"),
            learning("distilled", "sft", "student", "all"),
            evaluation("distilled"),
        ],
        "comparisons": [
            {
                "title": COMPARISON,
                "evaluations": ["dev2-eval", "distilled-eval"],
                "note": "The student learns from what dev2 wrote.\n\nOne run each.",
            }
        ],
    }


def _pretrain(rng: np.random.Generator, steps: int) -> Iterable[JsonObject]:
    for step in range(0, steps, 10):
        yield {
            "step": step,
            "loss": 0.7 + 2.9 * math.exp(-step / 60) + 0.02 * rng.standard_normal(),
            "optimizer/grad_norm": 0.4 + math.exp(-step / 40) + 0.05 * rng.random(),
            "optimizer/learning_rate": 3e-3 * (1 - step / max(steps, 1)),
        }


def _grpo(rng: np.random.Generator, steps: int, total: int) -> Iterable[JsonObject]:
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


def _held_out(stage: GRPOStage, steps: int, domains: tuple[str, ...]) -> Iterable[JsonObject]:
    def estimate(value: float, width: float) -> dict[str, float]:
        return {"value": value, "low": value - width, "high": value + width}

    for step in range(0, steps + 1, stage.held_out_every):
        t = step / stage.steps
        right = 0.25 + 0.5 * t
        figures = {
            "pass_at_1": estimate(right, 0.06),
            f"cons_at_{stage.held_out_samples}": estimate(right + 0.1, 0.06),
            "mean_length": estimate(100 + 400 * t, 30),
        }
        by_domain = {
            name: {"pass_at_1": estimate(right - 0.02 * i, 0.1)} for i, name in enumerate(domains)
        }
        yield {
            "step": step,
            **figures,
            "problems": 30,
            "samples": stage.held_out_samples,
            **({"by_domain": by_domain} if len(domains) > 1 else {}),
        }


def _fine_tuning(
    rng: np.random.Generator, steps: int, held_out: str | None
) -> Iterable[JsonObject]:
    for step in range(10, steps + 1, 10):
        measured = {"held_out/loss": 0.9 + math.exp(-step / 40)}
        yield {
            "step": step,
            "loss": 0.6 + 1.6 * math.exp(-step / 40) + 0.03 * rng.standard_normal(),
            **(measured if held_out is not None and step % 50 == 0 else {}),
            "tokens/trained": 2900.0,
            "optimizer/grad_norm": 0.5 + 0.1 * rng.random(),
            "optimizer/learning_rate": 5e-5 * (1 - 0.9 * step / max(steps, 1)),
        }


def _preferences(rng: np.random.Generator, steps: int) -> Iterable[JsonObject]:
    for step in range(1, steps + 1):
        t = step / steps
        held_out = {"held_out/loss": 0.68 - 0.3 * t, "held_out/accuracy": 0.55 + 0.3 * t}
        yield {
            "step": step,
            "loss": 0.69 - 0.4 * t + 0.03 * rng.standard_normal(),
            "accuracy": min(1.0, 0.52 + 0.4 * t + 0.05 * rng.random()),
            **(held_out if step % 20 == 0 else {}),
            "optimizer/grad_norm": 0.5 + 0.1 * rng.random(),
            "optimizer/learning_rate": 6e-6,
        }


def _timings(rng: np.random.Generator, steps: int) -> Iterable[JsonObject]:
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


def _sample(
    rng: np.random.Generator, problem: int, sample: int, skill: float, domains: tuple[str, ...]
) -> JsonObject:
    terms = np.random.default_rng(problem).integers(1, 10, 4)
    prompt = "+".join(str(t) for t in terms) + "="
    domain = domains[problem % len(domains)]
    ease = 0.15 * math.sin(problem) - 0.05 * (problem % len(domains))
    right = bool(rng.random() < np.clip(skill + ease, 0, 1))
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
        right, completion, outcome, extracted = False, HOSTILE, "unparseable", None
    parts: JsonObject = {"accuracy": float(right), "format": float(rng.random() < 0.5 + skill)}
    if domain:
        parts["language_consistency"] = float(np.clip(0.6 + 0.4 * skill * rng.random(), 0, 1))
    if problem == 1 and sample == 1:
        outcome, parts["accuracy"] = "verifier_failed", "nan"
    return {
        "problem_id": problem,
        "sample": sample,
        "domain": domain,
        "prompt": prompt,
        "completion": completion,
        "answer": str(answer),
        "reward": 1.0 + right,
        "parts": parts,
        "outcome": outcome,
        "extracted": extracted,
        "length": len(completion) // 2,
        "finish_reason": "stop",
    }


def _evaluation(
    rng: np.random.Generator, problems: int, samples: int, skill: float, domains: tuple[str, ...]
) -> list[JsonObject]:
    return [
        {"step": 0, **_sample(rng, p, s, skill, domains)}
        for p in range(problems)
        for s in range(samples)
    ]


def _training_samples(
    rng: np.random.Generator, steps: int, total: int, domains: tuple[str, ...]
) -> Iterable[JsonObject]:
    for step in range(0, steps, 20):
        for problem in (100 + step, 99):
            for sample in range(2):
                skill = 0.3 + 0.68 * step / total
                yield {"step": step, **_sample(rng, problem, sample, skill, domains)}


def _dataset(rng: np.random.Generator, stage: str, domains: tuple[str, ...]) -> list[JsonObject]:
    rows = []
    for problem in range(200, 300):
        sample = _sample(rng, problem, 0, 1.2, domains)
        rows.append(
            {
                "prompt": sample["prompt"],
                "response": HOSTILE if problem == 200 else sample["completion"],
                "answer": sample["answer"],
                "domain": sample["domain"],
                "tokens": sample["length"],
                "reward": sample["reward"],
                "provenance": {"stage": stage, "problem_id": problem, "sample": 0},
            }
        )
    return rows


def _card(rows: list[JsonObject]) -> JsonObject:
    def count(tokens: list[int]) -> JsonObject:
        return {"rows": len(tokens), "mean_tokens": sum(tokens) / len(tokens)}

    domains = sorted({row["domain"] for row in rows})
    removed = {"wrong": 231, "filter repetition": 41, "unparseable": 17, "duplicate": 8}
    return {
        "samples": {"kept": len(rows), **removed, "truncated": 3},
        **count([row["tokens"] for row in rows]),
        "domains": {
            d: count([row["tokens"] for row in rows if row["domain"] == d]) for d in domains
        },
    }


def check_comparison_costs(page: Page) -> None:
    """The comparison of the recipe, on the page of a run or of several seeds."""
    heading, *rows = page.table(f"<h2>{COMPARISON}")
    assert heading[-6:-4] == ["training wall time", "rejection sampling wall time"]
    # pretraining 108.5 s, SFT 51.7 s and RL 247.2 s; the student's SFT alone.
    for row, seconds in zip(rows, (("6 min 47 s", "34 s"), ("52 s", "34 s")), strict=True):
        assert all(cell.startswith(s) for cell, s in zip(row[-6:-4], seconds, strict=True))
    assert "of dev2: base, dev1, dev2 (samples of cold-start); of distilled: " in page.words
    assert "learns from what dev2 wrote. One run each." in page.words


def write_lines(path: Path, rows: Iterable[JsonObject]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    from r1jax.report.page import write_report
    from r1jax.report.seeds import write_seeds_report

    directory, *options = sys.argv[1:]
    make = fabricate_recipe if "recipe" in options else fabricate
    until = [option for option in options if option not in ("recipe", "seeds")]
    if "seeds" in options:
        runs = [make(Path(directory) / f"s{seed}", seed=seed) for seed in range(3)]
        print(*write_seeds_report(runs, Path(directory) / "seeds"))
    else:
        print(write_report(make(Path(directory), Size(until=until[0] if until else None))))
