"""What a run shows while it samples, and the prompt that it proposes at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from r1jax import recipe
from r1jax.config.load import load_config
from r1jax.config.run_config import RunConfig
from r1jax.files import JsonObject, encode_line, read_rows
from r1jax.metrics.progress import Progress
from r1jax.rollouts import scored_samples
from r1jax.rollouts.scored_samples import SAMPLES, SampleMeans
from r1jax.rollouts.searching import TREES, _generated, _stored_answers
from r1jax.run.example_prompt import example_prompt, reads_questions
from r1jax.run.resolve import resolve
from r1jax.run.stop import RunError

TESTS = Path(__file__).parents[1]
EVALUATE = """[{name: all, kind: evaluate, data: held_out, problems: 6, samples_per_problem: 1,
  problems_per_batch: 1, max_new_tokens: 8}]"""


def tiny(output: Path, *changes: str) -> RunConfig:
    return load_config(str(TESTS / "tiny.yaml"), [f"output={output}", *changes])


def test_the_bar_shows_means_over_all_samples_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, Mapping[str, float]]] = []
    scored, update = scored_samples.scored_batches, Progress.update
    stop_at = [3]

    def every_third_is_right(*arguments: Any) -> Iterator[list[JsonObject]]:
        for rows in scored(*arguments):
            for row in rows:
                row["outcome"] = "right" if row["problem_id"] % 3 == 0 else "wrong"
                row["length"] = 2 * row["problem_id"]
            yield rows

    def noted(self: Progress, step: int, figures: Mapping[str, float]) -> None:
        shown.append((step, dict(figures)))
        update(self, step, figures)
        if step in stop_at:
            raise RunError

    monkeypatch.setattr(scored_samples, "scored_batches", every_third_is_right)
    monkeypatch.setattr(scored_samples, "QUEUE_BATCHES", 2)
    monkeypatch.setattr(Progress, "update", noted)
    config = tiny(tmp_path, f"stages={EVALUATE}", "data.held_out.limit=6")
    with pytest.raises(RunError):
        recipe.run(config)
    stop_at.clear()
    assert recipe.run(config) == 0  # goes on behind what is stored
    (path,) = tmp_path.glob("tiny-s0/stages/00-all/samples.jsonl")
    rows = list(read_rows(path))
    assert len(rows) == 6 and len({step for step, _ in shown}) == 6
    assert len(shown) < 12, "it began anew"
    for step, figures in shown:
        share = sum(row["outcome"] == "right" for row in rows[:step]) / step
        assert figures["accuracy"] == pytest.approx(share)
        assert figures["length"] == pytest.approx(sum(r["length"] for r in rows[:step]) / step)


def test_of_a_search_the_answers_count(tmp_path: Path) -> None:
    trees = [{"solutions": [4, 2]}, {"solutions": [1]}, {"solutions": [5, 6]}]
    outcomes = ["right", "wrong", "wrong", "right", "wrong"]
    samples = [
        {"outcome": outcome, "generated_tokens": 10 * index}
        for index, outcome in enumerate(outcomes)
    ]
    (tmp_path / TREES).write_bytes(b"".join(map(encode_line, trees)))
    (tmp_path / SAMPLES).write_bytes(b"".join(map(encode_line, samples)))
    means = SampleMeans()
    assert means.add(_stored_answers(tmp_path, 3), _generated) == 0 + 20 + 30
    assert (means.share_right, means.mean_tokens) == (2 / 3, 50 / 3)
    means = SampleMeans()
    means.add(_stored_answers(tmp_path, 2), _generated)
    assert means.share_right == 0.5


def test_the_prompt_to_try_is_one_of_the_data_that_the_tokenizer_knows(tmp_path: Path) -> None:
    run = resolve(tiny(tmp_path))
    template, prompt = example_prompt(run) or ("", "")
    assert template == "plain"
    assert prompt in {example.prompt for example in run.datasets.examples("train")}
    # A tokenizer of digits and signs knows no other template, and no question in words.
    words = [f"data.{name}.template=r1_zero" for name in ("train", "held_out")]
    assert example_prompt(resolve(tiny(tmp_path, *words))) is None
    assert not reads_questions(run)


def test_a_long_prompt_is_not_proposed(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    asked = ["1+" * 40 + "1=", "1+1=\n2+2=", "4+5="]
    file.write_bytes(b"".join(encode_line({"prompt": each, "answer": "9"}) for each in asked))
    source = f"data.held_out={{source: 'jsonl:{file}', template: plain}}"
    stages = EVALUATE.replace("problems: 6", "problems: 3")
    run = resolve(tiny(tmp_path, source, f"stages={stages}"))
    assert example_prompt(run) == ("plain", "4+5=")
