"""What a phase of sampling looked like, as metrics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from r1jax.data.reflection import count_reflections
from r1jax.files import JsonObject
from r1jax.rewards import Outcome, RowScore
from r1jax.rollouts.sampling import Completion
from r1jax.sampler import Finish
from r1jax.stages.grpo.selection import GroupResult


def sample_facts(
    completions: Sequence[Completion],
    scores: Sequence[RowScore],
    reflections: Sequence[re.Pattern[str]] = (),
) -> list[JsonObject]:
    """What `rollout_metrics` reads of each sample, as JSON.

    Args:
      reflections: patterns whose matches are counted in each completion.
    """
    return [
        {
            "length": len(completion.token_ids),
            "truncated": completion.finish == Finish.LENGTH,
            "outcome": str(score.outcome),
            "deadline": score.deadline,
            "domain": completion.prompt.domain,
            "reward": score.reward if score.scored else None,
            "parts": {name: part.reward for name, part in score.parts.items()},
            "details": {
                name: part.detail
                for name, part in score.parts.items()
                if part.outcome is Outcome.VERIFIER_FAILED
            },
            "drafted": completion.drafted,
            "accepted": completion.accepted,
            "reflections": count_reflections(completion.text, reflections),
            **_attempts(completion, score),
        }
        for completion, score in zip(completions, scores, strict=True)
    ]


def _attempts(completion: Completion, score: RowScore) -> JsonObject:
    """The outcomes of all attempts, where there are several."""
    if not completion.earlier:
        return {}
    earlier = [str(each.outcome) for _, each in completion.earlier]
    return {"attempts": [*earlier, str(score.outcome)]}


def rollout_metrics(
    samples: Sequence[JsonObject], zero_variance: Sequence[bool]
) -> dict[str, float]:
    """What a rollout phase looked like; rewards are means over scored samples."""
    lengths = [sample["length"] for sample in samples]
    reflections = [sample.get("reflections", 0) for sample in samples]
    outcomes = Counter(sample["outcome"] for sample in samples)
    deadlines = Counter(filter(None, (sample.get("deadline") for sample in samples)))
    scored = [sample for sample in samples if sample["reward"] is not None]

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if values else float("nan")

    return {
        "reward/mean": mean([sample["reward"] for sample in scored]),
        **{
            f"reward/{name}": mean([s["parts"][name] for s in scored if name in s["parts"]])
            for name in dict.fromkeys(name for sample in samples for name in sample["parts"])
        },
        **{
            f"outcome/{name}": outcomes[name] / max(len(samples), 1)
            for name in ("right", "wrong", "unparseable", "verifier_failed")
        },
        # By cause, and only where there were some.
        **{f"deadline/{cause}": count / len(samples) for cause, count in deadlines.items()},
        "length/mean": mean(lengths),
        "length/max": float(max(lengths, default=0)),
        "length/truncated": mean([sample["truncated"] for sample in samples]),
        "reflection/per_completion": mean(reflections),
        "reflection/share": mean([count > 0 for count in reflections]),
        "groups/zero_variance": mean(zero_variance),
        **attempt_metrics(samples),
        **_by_domain(scored),
        **_by_drafts(samples),
    }


def attempt_metrics(samples: Sequence[JsonObject]) -> dict[str, float]:
    """Accuracy of each attempt, the change from the first to the last, and the shares of samples
    that the later attempts mended and spoilt; over samples all of whose attempts were scored.

    Args:
      samples: of `sample_facts`, where `attempts` has the outcomes of each sample's.
    """
    outcomes = [sample["attempts"] for sample in samples if "attempts" in sample]
    if not outcomes:
        return {}
    scored = [each for each in outcomes if "verifier_failed" not in each]
    right = np.array([[outcome == "right" for outcome in each] for each in scored], float)
    if not scored:
        right = np.full((1, len(outcomes[0])), np.nan)
    first, last = right[:, 0], right[:, -1]
    return {
        **{f"attempts/right_{k + 1}": float(right[:, k].mean()) for k in range(right.shape[1])},
        "attempts/difference": float((last - first).mean()),
        "attempts/mended": float((last * (1 - first)).mean()),
        "attempts/spoilt": float((first * (1 - last)).mean()),
    }


def _by_drafts(samples: Sequence[JsonObject]) -> dict[str, float]:
    """Of speculative samples: drafts that stayed, and tokens for each reading of the weights."""
    drafted = sum(sample["drafted"] for sample in samples)
    if not drafted:
        return {}
    tokens = sum(sample["length"] - 1 for sample in samples)  # the first comes of the prompt
    return {
        "speculative/acceptance": sum(sample["accepted"] for sample in samples) / drafted,
        "speculative/tokens_per_step": tokens / drafted,
    }


def _by_domain(scored: Sequence[JsonObject]) -> dict[str, float]:
    """Mean reward of each domain, where there are several."""
    rewards: dict[str, list[float]] = {}
    for sample in scored:
        rewards.setdefault(sample["domain"], []).append(sample["reward"])
    if len(rewards) < 2:
        return {}
    return {f"domain/{name or 'none'}": float(np.mean(x)) for name, x in sorted(rewards.items())}


def group_result(facts: Sequence[JsonObject]) -> GroupResult:
    """What a group earned, of the facts of its samples."""
    scored = [sample for sample in facts if sample["reward"] is not None]
    right = sum(sample["outcome"] == Outcome.RIGHT for sample in scored)
    return GroupResult(tuple(sample["reward"] for sample in scored), right)
