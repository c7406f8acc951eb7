"""How rejection sampling has kept completions rewritten: by rule, by a model, by an endpoint."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1jax import recipe
from r1jax.config.load import load_config
from r1jax.data.rewriting import Draft
from r1jax.run.record import Record, RunFiles
from r1jax.run.resolve import StageRun, resolve
from r1jax.run.stop import Preempted, RunError, StopSignal
from r1jax.stages.rejection_sampling import rewriting
from r1jax.stages.rejection_sampling.rewriting import rewrite
from r1jax.stages.rejection_sampling.settings import RejectionSamplingStage

TESTS = Path(__file__).parents[1]
DRAFTS = [
    Draft("2+2=", "<think>2+2=4</think><answer>4</answer>", "4"),
    Draft("1+2=", "no thought", ""),
]


def staged(
    directory: Path, section: dict[str, Any] | None
) -> tuple[RejectionSamplingStage, StageRun]:
    setting = f"stages.sampled.rewrite={json.dumps(section)}"
    config = load_config(str(TESTS / "tiny_r1.yaml"), [setting, f"output={directory}"])
    stage, run = config.stage("sampled"), resolve(config)
    assert isinstance(stage, RejectionSamplingStage)
    record = Record(config, RunFiles.of(config), {"stages": {}})
    return stage, StageRun(**vars(run), directory=directory, record=record, stop=StopSignal())


def answer(request: BaseHTTPRequestHandler, text: str, status: int = 200) -> None:
    message = {"message": {"content": text}, "finish_reason": "stop"}
    body = json.dumps({"choices": [message]}).encode()
    request.send_response(status)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The url of a server in a thread."""
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_without_a_rewriter_the_completion_stays(tmp_path: Path) -> None:
    kept = rewrite(*staged(tmp_path, None), DRAFTS)
    assert kept == [each.completion for each in DRAFTS]


def test_a_rule_is_built_from_the_config(tmp_path: Path) -> None:
    section = {
        "kind": "rule",
        "template": "<think>{thought}</think><answer>{answer}</answer>",
        "style": "tags",
    }
    assert rewrite(*staged(tmp_path, section), DRAFTS) == [DRAFTS[0].completion, None]


def test_a_model_of_the_run_is_asked_once_for_each_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The miniature's tokenizer has neither letters nor headings; its prompt is the question.
    monkeypatch.setattr(
        "r1jax.stages.rejection_sampling.rewriting.instruction_prompt",
        lambda draft, _: draft.question,
    )
    accepted = []

    def accept(draft: Draft, text: str, style: str) -> str:
        accepted.append((draft.question, text, style))
        return text

    monkeypatch.setattr("r1jax.data.rewriting.accept", accept)
    section = {
        "kind": "model",
        "weights": "model",
        "template": "plain",
        "max_new_tokens": 24,
        "drafts_per_batch": 2,
        "style": "tags",
    }
    drafts = [Draft(f"{n}+1=", "", "") for n in range(9)]
    texts = rewrite(*staged(tmp_path, section), drafts)
    assert len(texts) == 9
    # What was cut off is None and is not looked at; the rest is accepted for its own draft.
    ended = [(each.question, text) for each, text in zip(drafts, texts, strict=True) if text]
    assert ended and [(question, text) for question, text, _ in accepted if text] == ended
    assert {style for _, _, style in accepted} == {"tags"}

    # Asked to stop in the third of five batches, it goes on with that queue of batches, whole.
    monkeypatch.setattr(rewriting, "QUEUE_BATCHES", 4)
    stage, run = staged(tmp_path / "elsewhere", section)
    whole_batches, sample_prompts = rewriting.whole_batches, rewriting.sample_prompts
    batches, queued = [], []

    def counted(*arguments: Any) -> Any:
        for batch in whole_batches(*arguments):
            batches.append([completion.prompt.text for completion in batch])
            run.stop.requested = len(batches) == 3
            yield batch

    def watched(params: Any, prompts: Any, *arguments: Any, **options: Any) -> Any:
        queued.append(len(prompts))
        return sample_prompts(params, prompts, *arguments, **options)

    monkeypatch.setattr(rewriting, "whole_batches", counted)
    monkeypatch.setattr(rewriting, "sample_prompts", watched)
    with pytest.raises(Preempted, match="sampled: 6 of 9 drafts are rewritten"):
        rewrite(stage, run, drafts)
    run.stop.requested = False
    assert rewrite(stage, run, drafts) == texts
    every = [[each.question for each in drafts[i : i + 2]] for i in range(0, 9, 2)]
    assert batches == [*every[:3], *every]
    # A whole log needs no model.
    assert rewrite(stage, run, drafts) == texts
    assert queued == [8, 8, 1]


def test_a_run_that_is_stopped_while_an_endpoint_rewrites_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked[self.rfile.read(int(self.headers["Content-Length"])).decode()] += 1
            if sum(asked.values()) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                stopping.wait(20)  # replies when the run knows, as a slow model would
            answer(self, "<think>1+1=2</think>2")

        def log_message(self, *_: Any) -> None: ...

    stopping = threading.Event()

    def see(stop: StopSignal, name: str, value: Any) -> None:
        object.__setattr__(stop, name, value)
        if value:
            stopping.set()

    monkeypatch.setattr(StopSignal, "__setattr__", see)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    whole = yaml.safe_load((TESTS / "tiny.yaml").read_text())
    stage = {
        "name": "sampled",
        "kind": "rejection_sampling",
        "weights": "model",
        "data": "train",
        "prompts": 8,
        "prompts_per_batch": 8,
        "samples_per_prompt": 2,
        "max_new_tokens": 24,
    }
    plan = tmp_path / "plan.yaml"
    with serving(Server) as url:
        stage["rewrite"] = {"kind": "endpoint", "url": url, "model": "m", "concurrency": 1}
        rewards = {"digits": {"function": "tiny_rewards:digits"}}
        plan.write_text(yaml.safe_dump({**whole, "rewards": rewards, "stages": [stage]}))
        config = load_config(str(plan), [f"output={tmp_path}"])
        assert recipe.run(config) == recipe.EXIT_PREEMPTED
        directory = tmp_path / "tiny-s0" / "stages" / "00-sampled"
        assert len((directory / "rewritten.jsonl").read_text().splitlines()) == 3
        assert not (directory / "dataset.jsonl").exists()
        assert recipe.run(config) == 0
    rows = [json.loads(line) for line in (directory / "dataset.jsonl").read_text().splitlines()]
    assert len(rows) == len(asked) > 4 and set(asked.values()) == {1}
    assert {row["response"] for row in rows} == {"<think>1+1=2</think>2"}


def test_an_endpoint_that_fails_is_told_and_loses_nothing(tmp_path: Path) -> None:
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            answer(self, "<think>so</think> It is \\boxed{4}.", 400 if len(asked) == 2 else 200)

        def log_message(self, *_: Any) -> None: ...

    drafts = [Draft(f"{n}+{4 - n}=", "<think>so</think>\\boxed{4}", "4") for n in range(3)]
    with serving(Server) as url:
        section = {"kind": "endpoint", "url": url, "model": "some-model", "concurrency": 1}
        stage, run = staged(tmp_path, section)
        with pytest.raises(RunError, match=r"sampled: .*some-model.*400.*run again"):
            rewrite(stage, run, drafts)
        before = len(asked)
        texts = rewrite(stage, run, drafts)
    assert texts == ["<think>so</think> It is \\boxed{4}."] * 3
    assert before + len(asked[before:]) == 4  # three drafts, one of them asked for twice
