"""Settings of an evaluation, and the config of one on benchmarks."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from r1jax.files import JsonObject
from r1jax.settings.benchmarks import BENCHMARKS, MAX_NEW_TOKENS, fill_in, find_benchmark
from r1jax.settings.rewards import RewardSection
from r1jax.settings.sampling import DatasetSampling, EvaluationSampling, PlannedLengths
from r1jax.settings.search import DatasetSearch, Search
from r1jax.settings.stage import Divided, RewardSelection, Stage, StageDescription, check_multiple
from r1jax.settings.turns import Turn, check_order, check_supported, tokens_of_turns


class EvaluateStage(Stage):
    """pass@1, pass@k and cons@k on a dataset, every sample stored."""

    FUNCTIONS: ClassVar[str] = "r1jax.stages.evaluate.stage"
    DESCRIPTION: ClassVar[StageDescription] = StageDescription(
        title="evaluation",
        leaves="evaluation",
        less_memory="a smaller problems_per_batch or samples_per_batch",
    )

    kind: str = "evaluate"
    benchmark: str | None = Field(
        None,
        description="A name in r1jax.settings.benchmarks, which gives data, rewards and settings "
        "that are not set here.",
    )
    data: str = Field(description="The dataset of problems, a name in data.")
    rewards: (
        Annotated[list[str], Field(min_length=1)]
        | Annotated[dict[str, RewardSection], Field(min_length=1)]
        | None
    ) = Field(
        None,
        description="What samples are judged by: names of the config's rewards, or rewards of this "
        "stage alone; default: all of the config.",
    )
    chosen_by: list[str] = Field(
        default_factory=list,
        description="Rewards of the stage, such as reward models, by which the best of a problem's "
        "samples is chosen and its votes are weighted, for the summary.",
    )
    problems: int | None = Field(None, ge=1, description="Default: the whole dataset.")
    samples_per_problem: int = Field(
        16,
        ge=1,
        description="Completions of each problem, k; with search, searches, of which each gives "
        "one (default: 1).",
    )
    problems_per_batch: int = Field(
        32, ge=1, description="Problems that are sampled at once, over all processes."
    )
    samples_per_batch: int | None = Field(
        None,
        ge=1,
        description="Samples of a problem at once; default: all. Fewer take less memory, each part "
        "has a place in problems_per_batch, and the samples are the same.",
    )
    max_new_tokens: int = Field(1024, ge=1, description="Tokens of a completion at most.")
    sampling: EvaluationSampling = EvaluationSampling.model_construct()
    search: Search | None = Field(
        None, description="Search the steps of a solution, in place of sampling it at once."
    )
    lengths: PlannedLengths = None
    turns: list[Turn] | None = Field(
        None,
        description="Several attempts at each problem, with texts of the user between them; the "
        "last one counts, and the summary has the accuracy of each.",
    )

    @classmethod
    def fill_in(cls, stage: JsonObject, data: JsonObject) -> dict[str, str]:
        if stage.get("search") is not None:
            stage.setdefault("samples_per_problem", 1)
        name = stage.get("benchmark")
        if name is None:
            return {}
        try:
            benchmark = find_benchmark(name)
        except ValueError as error:
            return {"benchmark": str(error)}
        rewards = stage.setdefault("rewards", {benchmark.reward: {}})
        section = rewards.get(benchmark.reward) if isinstance(rewards, dict) else None
        if isinstance(section, dict) and benchmark.reward_options:
            fill_in(section, {"options": benchmark.reward_options})
        samples = stage.setdefault("samples_per_problem", benchmark.samples)
        # Not of the protocol: 64 completions at once take little memory, whatever k is.
        divisible = isinstance(samples, int) and samples % 8 == 0
        at_once = {"problems_per_batch": 8, "samples_per_batch": 8 if divisible else None}
        fill_in(stage, {"data": name, "max_new_tokens": MAX_NEW_TOKENS, **at_once})
        dataset = data.setdefault(str(stage["data"]), {})
        if isinstance(dataset, dict):
            dataset.setdefault("benchmark", name)
        return {}

    @model_validator(mode="after")
    def _divisible(self) -> EvaluateStage:
        samples, part = self.samples_per_problem, self.samples_at_once
        check_multiple("samples_per_problem", samples, "samples_per_batch", part)
        if self.search is not None and self.samples_per_batch not in (None, 1):
            raise ValueError(
                f"samples_per_batch = {self.samples_per_batch}: with search each sample is a "
                "search of its own, and problems_per_batch counts them; remove it"
            )
        if self.turns is not None:
            check_order(self.turns)
            check_supported(
                "turns",
                {"search": self.search, "sampling.speculative": self.sampling.speculative},
            )
        return self

    @property
    def samples_at_once(self) -> int:
        """Samples of a problem that are drawn together."""
        return self.samples_per_batch or self.samples_per_problem

    def dataset_sampling(self) -> DatasetSampling:
        return DatasetSampling(
            self.data,
            self.problems,
            self.samples_per_problem,
            self.samples_at_once,
            self.problems_per_batch,
            self.max_new_tokens,
            self.sampling,
            self.lengths,
            tuple(self.turns or ()),
        )

    def dataset_search(self) -> DatasetSearch | None:
        if self.search is None:
            return None
        return DatasetSearch(
            self.data,
            self.problems,
            self.samples_per_problem,
            1,
            self.problems_per_batch,
            self.max_new_tokens,
            self.sampling,
            self.search,
        )

    def datasets(self) -> list[tuple[str, str]]:
        return [("data", self.data)]

    def prompt_datasets(self) -> list[str]:
        return [self.data]

    def longest_sample(self) -> int:
        if self.turns is not None:
            return tokens_of_turns(self.turns, self.max_new_tokens)
        return self.max_new_tokens

    def reward_selection(self) -> RewardSelection:
        return self.rewards

    def prediction_module_uses(self) -> list[tuple[str, str]]:
        return [("sampling.speculative", self.name)] if self.sampling.speculative else []

    def divided(self) -> list[Divided]:
        return [Divided(".problems_per_batch", self.problems_per_batch, "processes")]

    def planning_key(self, reward_models: Sequence[str]) -> str | None:
        """Evaluations that differ in what is sampled, and how often, compile the same programs."""
        left_out = {"name", "benchmark", "data", "rewards", "problems", "samples_per_problem"}
        left_out |= {"chosen_by"}
        dump = self.model_dump(exclude=left_out)
        return f"{dump} {self.samples_at_once} {sorted(set(reward_models))}"


def evaluation_of(model: str, name: str, benchmarks: Sequence[str]) -> JsonObject:
    """A config, as read from YAML, that evaluates a model on benchmarks, one stage each.

    Args:
      model: a Hugging Face directory or a hub name.
      name: of the model, for titles; the run's name is this with `-eval`.
      benchmarks: their names; loading the config refuses unknown ones.
    """
    names = list(dict.fromkeys(benchmarks))
    seconds = [
        float(str(BENCHMARKS[each].reward_options.get("total_seconds", 5.0)))
        for each in names
        if each in BENCHMARKS
    ]
    return {
        "name": (re.sub(r"[^A-Za-z0-9_.\-]+", "-", name).lstrip("_.-") or "model") + "-eval",
        "title": f"{name} on {', '.join(names)}",
        # Weights in the dtype that they are computed with: nothing is trained.
        "model": {"path": model, "param_dtype": "bfloat16"},
        "verifier": {
            "workers": max(1, (os.cpu_count() or 1) // 2),
            # sympy, or all tests of a program, and some more.
            "deadline_seconds": max(seconds, default=5.0) + 5.0,
        },
        "trackers": [],
        "stages": [{"name": each, "kind": "evaluate", "benchmark": each} for each in names],
    }
