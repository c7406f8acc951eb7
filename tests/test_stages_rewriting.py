"""How rejection sampling has kept completions rewritten: by rule, by a model, by an endpoint."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from r1jax.config.load import load_config
from r1jax.config.schema import RejectionSamplingStage
from r1jax.data.rewriting import Draft
from r1jax.stages.context import Context, RunError
from r1jax.stages.rejection_sampling import rewrite

TESTS = Path(__file__).parent
DRAFTS = [
    Draft("2+2=", "<think>2+2=4</think><answer>4</answer>", "4"),
    Draft("1+2=", "no thought", ""),
]


def staged(tmp_path: Path, section: dict[str, Any]) -> tuple[RejectionSamplingStage, Context]:
    setting = f"stages.sampled.rewrite={json.dumps(section)}"
    config = load_config(str(TESTS / "tiny_r1.yaml"), [setting, f"output={tmp_path}"])
    stage = config.stage("sampled")
    assert isinstance(stage, RejectionSamplingStage)
    return stage, Context.resolve(config)


def test_without_a_rewriter_the_completion_stays(tmp_path: Path) -> None:
    config = load_config(str(TESTS / "tiny_r1.yaml"), [f"output={tmp_path}"])
    stage = config.stage("sampled")
    assert isinstance(stage, RejectionSamplingStage)
    kept = rewrite(stage, Context.resolve(config), tmp_path, DRAFTS)
    assert kept == [each.completion for each in DRAFTS]


def test_a_rule_is_built_from_the_config(tmp_path: Path) -> None:
    section = {
        "kind": "rule",
        "template": "<think>{thought}</think><answer>{answer}</answer>",
        "style": "tags",
    }
    stage, context = staged(tmp_path, section)
    assert rewrite(stage, context, tmp_path, DRAFTS) == [DRAFTS[0].completion, None]


def test_a_model_of_the_run_is_asked_once_for_each_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The miniature's tokenizer has neither letters nor headings; its prompt is the question.
    monkeypatch.setattr(
        "r1jax.stages.rejection_sampling.instruction_prompt", lambda draft, _: draft.question
    )
    accepted = []

    def accept(draft: Draft, text: str, style: str) -> str:
        accepted.append((draft.question, text, style))
        return text

    monkeypatch.setattr("r1jax.stages.rejection_sampling.accept", accept)
    section = {
        "kind": "model",
        "weights": "model",
        "template": "plain",
        "max_new_tokens": 24,
        "drafts_per_batch": 2,
        "style": "tags",
    }
    stage, context = staged(tmp_path, section)
    drafts = [Draft(f"{n}+1=", "", "") for n in range(9)]
    texts = rewrite(stage, context, tmp_path, drafts)
    assert len(texts) == 9
    # What was cut off is None and is not looked at; the rest is accepted for its own draft.
    ended = [(each.question, text) for each, text in zip(drafts, texts, strict=True) if text]
    assert ended and [(question, text) for question, text, _ in accepted if text] == ended
    assert {style for _, _, style in accepted} == {"tags"}
    assert rewrite(stage, context, tmp_path, drafts) == texts


def test_an_endpoint_that_fails_is_told_and_loses_nothing(tmp_path: Path) -> None:
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            failing = len(asked) == 2
            text = "<think>so</think> It is \\boxed{4}."
            message = {"message": {"content": text}, "finish_reason": "stop"}
            body = json.dumps({"choices": [message]}).encode()
            self.send_response(400 if failing else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    section = {
        "kind": "endpoint",
        "url": f"http://127.0.0.1:{server.server_port}/v1",
        "model": "some-model",
        "concurrency": 1,
    }
    stage, context = staged(tmp_path, section)
    drafts = [Draft(f"{n}+{4 - n}=", "<think>so</think>\\boxed{4}", "4") for n in range(3)]
    with pytest.raises(RunError, match=r"sampled: .*some-model.*400.*run again"):
        rewrite(stage, context, tmp_path, drafts)
    before = len(asked)
    texts = rewrite(stage, context, tmp_path, drafts)
    assert texts == ["<think>so</think> It is \\boxed{4}."] * 3
    assert before + len(asked[before:]) == 4  # three drafts, one of them asked for twice
    server.shutdown()
