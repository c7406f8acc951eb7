"""What rejection sampling kept, what it removed and why, and some of the kept texts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from r1jax.evaluation.run_directory import StageRecord
from r1jax.report.completions import split_thought
from r1jax.report.plots import short
from r1jax.report.wording import shortened

_TEXTS_SHOWN = 4
_ROWS_READ = 10_000  # a set of real size is not read to its end for a few texts


def written_dataset(stage: StageRecord) -> dict[str, Any] | None:
    """A rejection sampling stage for the template; None for others, and before its end."""
    if stage.kind != "rejection_sampling" or stage.summary is None:
        return None
    counts = dict(stage.summary.get("samples") or {})
    kept, total = counts.pop("kept", 0), 0
    total = kept + sum(counts.values())
    reasons = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    largest = max([kept, *counts.values()], default=0)

    def bar(name: str, count: int) -> dict[str, Any]:
        return {
            "name": name.replace("_", " "),
            "count": f"{count:,}",
            "share": f"{100 * count / total:.1f} %" if total else "–",
            "width": 100 * count / largest if largest else 0.0,
        }

    return {
        "total": f"{total:,}",
        "kept": bar("kept", kept),
        "removed": [bar(reason, count) for reason, count in reasons],
        "domains": _card(stage.summary),
        "texts": _texts(stage),
    }


def _card(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows and mean tokens by domain and in all, as in DeepSeek-R1's table of its 800K set."""
    domains = dict(summary.get("domains") or {})
    parts = [(name or "no domain", part) for name, part in domains.items()]
    if len(parts) != 1 and "rows" in summary:
        parts.append(("all", summary))
    return [
        {
            "name": name,
            "rows": f"{part.get('rows', 0):,}",
            "tokens": "–" if part.get("mean_tokens") is None else short(part["mean_tokens"]),
        }
        for name, part in parts
    ]


def _texts(stage: StageRecord) -> list[dict[str, str]]:
    """The first kept text of each domain, then further first ones."""
    rows = list(islice(stage.rows("dataset.jsonl"), _TEXTS_SHOWN))
    firsts: dict[str, dict[str, Any]] = {}
    domains = set((stage.summary or {}).get("domains") or {})
    for row in islice(stage.rows("dataset.jsonl"), _ROWS_READ):
        firsts.setdefault(str(row.get("domain") or ""), row)
        if len(firsts) >= min(_TEXTS_SHOWN, len(domains)):
            break
    chosen = [*firsts.values(), *(row for row in rows if row not in firsts.values())]
    shown = []
    for row in chosen[:_TEXTS_SHOWN]:
        thought, rest = split_thought(shortened(str(row["response"])))
        shown.append(
            {
                "domain": str(row.get("domain") or ""),
                "prompt": shortened(str(row["prompt"])),
                "answer": shortened(str(row.get("answer") or "")),
                "thought": thought,
                "rest": rest,
                "tokens": str(row.get("tokens", "")),
            }
        )
    return shown
