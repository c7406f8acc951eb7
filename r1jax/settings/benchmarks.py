"""The paper's benchmarks by name, with its evaluation protocol.

    stages:
      - {name: aime, kind: evaluate, benchmark: aime_2024}

That stage reads the dataset `aime_2024`, is scored by the benchmark's reward and has its number of
samples. What the config sets itself comes first, in the stage as in `data.aime_2024`. With a
`source` of your own neither `split` nor `options` are filled in.

DeepSeek-R1 (arXiv 2501.12948v2): temperature 0.6, top-p 0.95, at most 32,768 tokens, zero-shot, no
system prompt; pass@1 is the mean over k samples: 64 for AIME and GPQA Diamond, 16 for MATH-500, 8
for LiveCodeBench. GSM8K is not among its benchmarks.

A tokenizer's chat template may bring a system prompt of its own, as Qwen2.5-Instruct's does. A base
model has no chat template: give `data.NAME.template=plain`. Not here: Codeforces (needs its judge
and contestants), AlpacaEval 2 and ArenaHard (need GPT-4).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from r1jax.files import JsonObject, JsonValue
from r1jax.settings.names import nearest

MATHS_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""The paper's words; that they have a line of their own is a choice."""

CHOICE_SUFFIX = (
    "\n\nPlease reason step by step, and put the letter of your answer within \\boxed{}."
)
"""A choice: the letter in a box, as for maths, which is what the reward `choice` reads."""

MAX_NEW_TOKENS = 32_768


@dataclass(frozen=True)
class _Benchmark:
    """A dataset, and how a model is evaluated on it.

    data: settings of the dataset, as in a config.
    reward: the registered name of the reward that scores a sample.
    samples: k, samples per problem.
    """

    data: JsonObject
    reward: str
    samples: int
    reward_options: JsonObject = field(default_factory=dict)


def _maths(source: str, split: str, samples: int, **data: JsonValue) -> _Benchmark:
    """A benchmark whose answer is in a box, with settings of its dataset beside the usual ones."""
    fields: JsonObject = {"prompt": "problem", "answer": "answer"}
    usual = {"source": source, "split": split, "fields": fields, "prompt_suffix": MATHS_SUFFIX}
    return _Benchmark({**usual, **data}, "accuracy", samples)


BENCHMARKS: Mapping[str, _Benchmark] = MappingProxyType(
    {
        # 30 problems.
        "aime_2024": _maths("hf:HuggingFaceH4/aime_2024", "train", 64),
        # 30 problems, of February 2025: after R1.
        "aime_2025": _maths("hf:yentinglin/aime_2025", "train", 64, options={"config": "default"}),
        "math_500": _maths("hf:HuggingFaceH4/MATH-500", "test", 16, max_prompt_tokens=2048),
        # 198 questions; the hub asks to accept its terms, and for a login (`hf auth login`).
        "gpqa_diamond": _Benchmark(
            {
                "source": "hf:Idavidrein/gpqa",
                "split": "train",
                "options": {"config": "gpqa_diamond"},
                "fields": {"prompt": "Question", "answer": "Correct Answer"},
                "wrong_answers": ["Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"],
                "prompt_suffix": CHOICE_SUFFIX,
                "max_prompt_tokens": 4096,
            },
            "choice",
            samples=64,
        ),
        # 1,319 problems. The paper: "k (typically between 4 and 64, depending on the test set
        # size)"; 4 is a choice.
        "gsm8k": _maths(
            "hf:openai/gsm8k",
            "test",
            4,
            options={"config": "main"},
            fields={"prompt": "question", "answer": "answer"},
            answer_pattern=r"####\s*(.+)",
        ),
        # The 268 problems that versions 4 and 5 brought; the paper's are of the same months, August
        # 2024 to January 2025. A copy of livecodebench/code_generation_lite, which itself can no
        # longer be loaded: it is a script. Each test has the six seconds of LiveCodeBench's own
        # judge; the other limits are choices.
        "livecodebench": _Benchmark(
            {
                "source": "hf:lighteval/code_generation_lite",
                "split": "test",
                "options": {"config": "v4_v5"},
                "row_format": "livecodebench",
                "max_prompt_tokens": 8192,
            },
            "code",
            samples=8,
            reward_options={
                "stop_at_first_failure": True,
                "seconds": 6.0,
                "total_seconds": 180.0,
                "memory_mb": 1024,
                "output_kb": 16384,
            },
        ),
    }
)


def find_benchmark(name: object) -> _Benchmark:
    """The benchmark of this name; raises ValueError where there is none."""
    if isinstance(name, str) and name in BENCHMARKS:
        return BENCHMARKS[name]
    hint = nearest(str(name), BENCHMARKS) or f"there are {', '.join(BENCHMARKS)}"
    raise ValueError(f"no such benchmark; {hint.rstrip()}")


def fill_in(section: JsonObject, defaults: JsonObject) -> None:
    """Put defaults into a section where it has no value, and into the mappings in it."""
    for key, value in copy.deepcopy(defaults).items():
        present = section.setdefault(key, value)
        if isinstance(present, dict) and isinstance(value, dict):
            fill_in(present, value)
