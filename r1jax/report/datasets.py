"""A dataset that a stage sampled: what was kept, what was removed and why, and some texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from r1jax.evaluation.metrics import Summary
from r1jax.evaluation.run_directory import StageRecord
from r1jax.files import JsonObject
from r1jax.report.completions import split_thought
from r1jax.report.plots import short
from r1jax.report.wording import shortened

_TEXTS_SHOWN = 4
_ROWS_READ = 10_000  # a set of real size is not read to its end for a few texts


@dataclass(frozen=True)
class Bar:
    """How many samples were kept, or removed for one reason; `width` in per cent of the longest."""

    name: str
    count: str
    share: str
    width: float


@dataclass(frozen=True)
class Text:
    """A row of the dataset; `thought` ends with `</think>`."""

    domain: str
    prompt: str
    answer: str
    thought: str
    rest: str
    tokens: str


@dataclass(frozen=True)
class WrittenDataset:
    """A stage's dataset for the template.

    Attributes:
      bars: of the kept samples, then of the removed.
      domains: name, rows, mean tokens.
    """

    total: str
    bars: list[Bar]
    domains: list[tuple[str, str, str]]
    texts: list[Text]


def written_dataset(stage: StageRecord) -> WrittenDataset | None:
    """The dataset of a stage that leaves one; None for other stages, and before its end."""
    if stage.description.leaves != "dataset" or stage.summary is None:
        return None
    samples = stage.summary.get("samples")
    counts: dict[str, int] = {"kept": 0, **samples} if isinstance(samples, Mapping) else {}
    total = sum(counts.values())
    bars = sorted(counts.items(), key=lambda item: (item[0] != "kept", -item[1], item[0]))
    largest = max(counts.values(), default=0)

    def bar(name: str, count: int) -> Bar:
        share = f"{100 * count / total:.1f} %" if total else "–"
        width = 100 * count / largest if largest else 0.0
        return Bar(name.replace("_", " "), f"{count:,}", share, width)

    return WrittenDataset(
        total=f"{total:,}",
        bars=[bar(name, count) for name, count in bars],
        domains=_domains(stage.summary),
        texts=_texts(stage, stage.summary),
    )


def _domains(summary: Summary) -> list[tuple[str, str, str]]:
    """Rows and mean tokens by domain and in all, as in DeepSeek-R1's table of its 800K set."""
    domains = dict(summary.get("domains") or {})
    parts = [(name or "no domain", part) for name, part in domains.items()]
    if len(parts) != 1 and "rows" in summary:
        parts.append(("all", summary))
    return [
        (
            name,
            f"{part.get('rows', 0):,}",
            "–" if part.get("mean_tokens") is None else short(part["mean_tokens"]),
        )
        for name, part in parts
    ]


def _texts(stage: StageRecord, summary: Summary) -> list[Text]:
    """The first kept text of each domain, then further first ones."""

    def rows(limit: int) -> Iterator[JsonObject]:
        rows = islice(stage.rows("dataset.jsonl"), limit)
        return (row for row in rows if "prompt" in row and "response" in row)

    firsts: dict[str, JsonObject] = {}
    domains = len(summary.get("domains") or {})
    for row in rows(_ROWS_READ):
        firsts.setdefault(str(row.get("domain") or ""), row)
        if len(firsts) >= min(_TEXTS_SHOWN, domains):
            break
    rest = [row for row in rows(_TEXTS_SHOWN) if row not in firsts.values()]
    return [_text(row) for row in [*firsts.values(), *rest][:_TEXTS_SHOWN]]


def _text(row: JsonObject) -> Text:
    thought, rest = split_thought(shortened(str(row["response"])))
    return Text(
        domain=str(row.get("domain") or ""),
        prompt=shortened(str(row["prompt"])),
        answer=shortened(str(row.get("answer") or "")),
        thought=thought,
        rest=rest,
        tokens=str(row.get("tokens", "")),
    )
