"""How the report says figures, times, stages and long texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SHOWN_CHARACTERS = 3000

KINDS = {
    "pretrain": "pretraining",
    "sft": "supervised fine-tuning",
    "grpo": "reinforcement learning",
    "rejection_sampling": "rejection sampling",
    "reward_model": "reward model",
    "evaluate": "evaluation",
}


@dataclass(frozen=True)
class Figure:
    """A figure and its interval, in words."""

    value: str
    interval: str = ""


UNKNOWN = Figure("–")


def figure(estimate: Mapping[str, Any] | None, *, percent: bool = False, digits: int = 1) -> Figure:
    """`{"value", "low", "high"}` of a summary in words; a dash where there is none."""
    if not estimate or estimate.get("value") is None:
        return UNKNOWN
    scale = 100.0 if percent else 1.0
    value = _number(scale * estimate["value"], digits) + (" %" if percent else "")
    if estimate.get("low") is None or estimate.get("high") is None:
        return Figure(value, "interval unknown")
    low, high = (_number(scale * estimate[end], digits) for end in ("low", "high"))
    return Figure(value, f"{low} – {high}")


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def value_of(figures: Mapping[str, Any], name: str) -> float | None:
    """The value of a summary's figure, where there is one."""
    value = (figures.get(name) or {}).get("value")
    return None if value is None else float(value)


def votes(figures: Mapping[str, Any]) -> int:
    """The largest k of a summary's cons@k; 1 where there is none."""
    sizes = [int(name.rsplit("_", 1)[1]) for name in figures if name.startswith("cons_at_")]
    return max(sizes, default=1)


def duration(seconds: float) -> str:
    """Seconds as people say them: 41 s, 6 min 12 s, 3 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = math.floor(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def shortened(text: str) -> str:
    """The beginning and the end of a long text; the end is where the answer is."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n\n[… {left_out:,} characters left out …]\n\n{text[-half:]}"


def paragraphs(text: str) -> list[str]:
    """Parts of a text that blank lines keep apart."""
    return [part for part in text.split("\n\n") if part.strip()]


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as rows of dotted name and text."""
    if not isinstance(value, Mapping):
        return [] if value is None else [(prefix or "value", str(value))]
    return [
        row
        for key, inner in value.items()
        for row in flat(inner, f"{prefix}.{key}" if prefix else str(key))
    ]
