r"""The paper's benchmarks by name, with its evaluation protocol.

    stages:
      - {name: aime, kind: evaluate, benchmark: aime_2024}

That stage reads the dataset `aime_2024`, is judged by the definition's reward and has its number of
samples. Whatever the config sets itself comes first, in the stage as in `data.aime_2024`, and one
option or field set leaves the others; the resolved config (`--dry-run`) shows what came of it. With
a `source` of one's own (JSON lines, TFDS, another hub dataset) neither `split` nor `options` are
filled in, and the columns are the hub's unless `fields` says otherwise.

DeepSeek-R1 (arXiv 2501.12948v2): temperature 0.6, top-p 0.95, at most 32,768 tokens, zero-shot, no
system prompt; pass@1 is the mean over k samples: 64 for AIME and GPQA Diamond, 16 for MATH-500, 8
for LiveCodeBench. GSM8K is not among its benchmarks.

"No system prompt" is what we add: a tokenizer's chat template may bring one of its own, as
Qwen2.5-Instruct's does. A base model without a template is asked with `data.NAME.template=plain`.

Not here: Codeforces' rating needs its judge and its contestants; AlpacaEval 2 and ArenaHard need
GPT-4 as theirs.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from r1jax.settings.data import DataSection
from r1jax.settings.rewards import RewardSection

MATHS_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""The paper's words; that they have a line of their own is a choice."""

CHOICE_SUFFIX = (
    "\n\nPlease reason step by step, and put the letter of your answer within \\boxed{}."
)
"""A choice: the letter in a box, as for maths, which is what the reward `choice` reads."""

MAX_NEW_TOKENS = 32_768


@dataclass(frozen=True)
class Benchmark:
    """A dataset with how it is asked and judged.

    Attributes:
        data: the dataset.
        reward: what judges a sample, by its registered name.
        samples: k, samples per problem.
        reward_section: options of the reward.
    """

    data: DataSection
    reward: str
    samples: int
    reward_section: RewardSection = field(default_factory=RewardSection)

    @property
    def deadline_seconds(self) -> float:
        """What a verifier needs for one sample: sympy, or all tests of a program and some more."""
        return float(self.reward_section.options.get("total_seconds", 5.0)) + 5.0


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        # 30 problems.
        "aime_2024": Benchmark(
            DataSection(
                source="hf:HuggingFaceH4/aime_2024",
                split="train",
                fields={"prompt": "problem", "answer": "answer"},
                prompt_suffix=MATHS_SUFFIX,
            ),
            reward="accuracy",
            samples=64,
        ),
        # 30 problems, of February 2025: after R1.
        "aime_2025": Benchmark(
            DataSection(
                source="hf:yentinglin/aime_2025",
                split="train",
                options={"config": "default"},
                fields={"prompt": "problem", "answer": "answer"},
                prompt_suffix=MATHS_SUFFIX,
            ),
            reward="accuracy",
            samples=64,
        ),
        "math_500": Benchmark(
            DataSection(
                source="hf:HuggingFaceH4/MATH-500",
                split="test",
                fields={"prompt": "problem", "answer": "answer"},
                prompt_suffix=MATHS_SUFFIX,
                max_prompt_tokens=2048,
            ),
            reward="accuracy",
            samples=16,
        ),
        # 198 questions; the hub asks to accept its terms, and for a login (`hf auth login`).
        "gpqa_diamond": Benchmark(
            DataSection(
                source="hf:Idavidrein/gpqa",
                split="train",
                options={"config": "gpqa_diamond"},
                fields={"prompt": "Question", "answer": "Correct Answer"},
                wrong_answers=["Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"],
                prompt_suffix=CHOICE_SUFFIX,
                max_prompt_tokens=4096,
            ),
            reward="choice",
            samples=64,
        ),
        # 1,319 problems. The paper: "k (typically between 4 and 64, depending on the test set
        # size)"; 4 is a choice.
        "gsm8k": Benchmark(
            DataSection(
                source="hf:openai/gsm8k",
                split="test",
                options={"config": "main"},
                fields={"prompt": "question", "answer": "answer"},
                answer_pattern=r"####\s*(.+)",
                prompt_suffix=MATHS_SUFFIX,
            ),
            reward="accuracy",
            samples=4,
        ),
        # The 268 problems that versions 4 and 5 brought; the paper's are of the same months, August
        # 2024 to January 2025. A copy of livecodebench/code_generation_lite, which itself can no
        # longer be loaded: it is a script. Each test has the six seconds of LiveCodeBench's own
        # judge; the other limits are choices.
        "livecodebench": Benchmark(
            DataSection(
                source="hf:lighteval/code_generation_lite",
                split="test",
                options={"config": "v4_v5"},
                row_format="livecodebench",
                max_prompt_tokens=8192,
            ),
            reward="code",
            samples=8,
            reward_section=RewardSection(
                options={
                    "stop_at_first_failure": True,
                    "seconds": 6.0,
                    "total_seconds": 180.0,
                    "memory_mb": 1024,
                    "output_kb": 16384,
                }
            ),
        ),
    }
)

Place = tuple[str | int, ...]


def fill_in(config: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    """Puts into a config, as read from YAML, what the benchmarks that it names define.

    What is not of a config's form is left for the schema to refuse.

    Yields:
      (key path, value and problem) for each unknown benchmark.
    """
    stages = config.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else ()):
        if not isinstance(stage, dict) or stage.get("kind") != "evaluate":
            continue
        name = stage.get("benchmark")
        if name is None:
            continue
        if problem := _unknown(name):
            yield ("stages", index, "benchmark"), problem
            continue
        _fill_stage(stage, name, BENCHMARKS[name])
        sections = config.setdefault("data", {})
        if isinstance(sections, dict) and isinstance(stage["data"], str):
            section = sections.setdefault(stage["data"], {})
            if isinstance(section, dict):
                section.setdefault("benchmark", name)
    sections = config.get("data")
    for key, section in sections.items() if isinstance(sections, dict) else ():
        name = section.get("benchmark") if isinstance(section, dict) else None
        if name is None:
            continue
        if problem := _unknown(name):
            yield ("data", key, "benchmark"), problem
            continue
        defined = BENCHMARKS[name].data.model_dump(mode="json", exclude_unset=True)
        if "source" in section:
            defined = {k: v for k, v in defined.items() if k not in ("split", "options")}
        _fill(section, defined)


def _fill_stage(stage: dict[str, Any], name: str, benchmark: Benchmark) -> None:
    stage.setdefault("data", name)
    judge = benchmark.reward_section.model_dump(mode="json", exclude_unset=True)
    rewards = stage.setdefault("rewards", {benchmark.reward: judge})
    if isinstance(rewards, dict) and isinstance(own := rewards.get(benchmark.reward), dict):
        _fill(own, judge)
    stage.setdefault("samples_per_problem", benchmark.samples)
    stage.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    # Not protocol but memory: 64 completions at once, whatever k is.
    stage.setdefault("problems_per_batch", 8)
    stage.setdefault("samples_per_batch", _part(stage["samples_per_problem"]))


def _fill(own: dict[str, Any], defined: Mapping[str, Any]) -> None:
    """Puts what is defined where there is nothing, in mappings within as well."""
    for key, value in defined.items():
        there = own.setdefault(key, value)
        if isinstance(there, dict) and isinstance(value, Mapping):
            _fill(there, value)


def evaluation_of(model: str, name: str, names: Sequence[str]) -> dict[str, Any]:
    """A config, as from YAML, that evaluates a model on these benchmarks one after the other.

    Args:
        model: a Hugging Face directory or a hub name.
        name: of what is evaluated; the run has it with `-eval`.
        names: of the benchmarks; unknown ones are left for `fill_in` to refuse.
    """
    known = [BENCHMARKS[each] for each in dict.fromkeys(names) if each in BENCHMARKS]
    return {
        "name": (re.sub(r"[^A-Za-z0-9_.\-]+", "-", name).lstrip("_.-") or "model") + "-eval",
        "title": f"{name} on {', '.join(dict.fromkeys(names))}",
        # Weights in the dtype that they are computed with: nothing is trained.
        "model": {"path": model, "param_dtype": "bfloat16"},
        "verifier": {
            "workers": max(1, (os.cpu_count() or 1) // 2),
            "deadline_seconds": max([each.deadline_seconds for each in known], default=10.0),
        },
        "trackers": [],
        "stages": [
            {"name": each, "kind": "evaluate", "benchmark": each} for each in dict.fromkeys(names)
        ],
    }


def _part(samples: Any) -> int | None:
    """8 samples of a problem at once, or all where they do not divide so."""
    return 8 if isinstance(samples, int) and samples % 8 == 0 else None


def _unknown(name: Any) -> str | None:
    if isinstance(name, str) and name in BENCHMARKS:
        return None
    near = difflib.get_close_matches(str(name), BENCHMARKS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(BENCHMARKS)}"
    return f"{name!r}: no such benchmark; {hint}"
