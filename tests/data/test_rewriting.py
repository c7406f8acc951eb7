"""Rewriting drafts: by rules, and by a server that fails in every way that servers do."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from r1jax.data.rewriting import (
    INSTRUCTION,
    Draft,
    EndpointError,
    EndpointRewriter,
    Reply,
    RewriteLog,
    Stopped,
    _replace_words,
    _wait_seconds,
    accept,
    check_rules,
    instruction_prompt,
    rewrite_by_rules,
)
from r1jax.rewards.code import program_of
from r1jax.settings.rewriting import EndpointRewrite, RuleRewrite

BOXED = Draft("What is 6 + 6?", "<think>6 and 6, so 12.</think>It is \\boxed{12}.", "12")
PLAIN = Draft("Where is the Louvre?", "<think>In France.</think>In Paris.", "Paris")


FENCED = "```\nprint(3 * 4)\n```"
PROGRAM = Draft("Write 12.", f"<think>3 and 4.</think>\n<answer>{FENCED}</answer>", "")

# What a rewritten text must be.


@pytest.mark.parametrize(
    ("draft", "text", "kept"),
    [
        (BOXED, "\n <think>I add.</think>\n\nIt is \\boxed{12}. \n", True),
        (BOXED, "<think>I add.</think>It is \\boxed{12.0}.", True),  # the same number
        (BOXED, "<think>I add.</think>It is \\boxed{13}.", False),
        (BOXED, "<think>It is \\boxed{12}.</think>It is \\boxed{13}.", False),
        (BOXED, "<think>I add.</think>It is 12.", False),  # no longer marked
        (BOXED, "<think>So \\boxed{12}.</think>That is it.", False),
        (BOXED, "I add. It is \\boxed{12}.", False),
        (BOXED, "Sure! <think>I add.</think>It is \\boxed{12}.", False),
        (BOXED, "<think> </think>It is \\boxed{12}.", False),
        (BOXED, "<think>I add.</think><think>a</think>It is \\boxed{12}.", False),
        (BOXED, "<think>I add.</think>It is \\boxed{12}.\ud800", False),
        (BOXED, "", False),
        (PLAIN, "<think>I recall.</think>The Louvre is in Paris.", True),
        (PLAIN, "<think>I recall.</think>It is in \\boxed{Paris}.", True),
        (PLAIN, "<think>Paris.</think>It is in Rome.", False),
        (PLAIN, "<think>I recall.</think>It is full of Parisians.", False),
        (PLAIN, "<think>I recall.</think>It is in \\boxed{Rome}, not Paris.", False),
    ],
)
def test_accept(draft: Draft, text: str, kept: bool) -> None:
    assert accept(draft, text) == (text.strip() if kept else None)


@pytest.mark.parametrize(
    ("answer", "summary", "kept"),
    [
        ("5", "so 5.", True),
        ("5", "so x=5, done", True),
        ("5", "so 15", False),
        ("5", "so 2.5", False),
        ("5", "so 5.2", False),
        ("5", "so -5", False),
        ("-5", "so -5", True),
        ("5", "not 15 but 5", True),
        ("巴黎", "答案是巴黎。", True),
        ("print(1)\nprint(2)", "```python\nprint(1)\n\n  print(2)\n```", True),
        ("print(1)\nprint(2)", "```python\nprint(1)\nprint(22)\n```", False),
        ("a.*b", "it is aXb", False),
        ("", "anything", True),
        (" ", "anything", True),
    ],
)
def test_an_answer_without_a_mark_must_occur_by_itself(answer, summary, kept) -> None:
    draft = Draft("q", f"<think>t</think>{answer}", answer)
    assert (accept(draft, f"<think>t</think>{summary}") is not None) == kept


def test_an_answer_may_be_kept_in_the_form_it_had_in_the_draft() -> None:
    """What a reward extracts may be a normal form: the letter of an option with its text."""
    draft = Draft("q", "<think>t</think>\\boxed{(G) twelve}", "G")
    assert accept(draft, "<think>t</think>It is \\boxed{(G) twelve}") is not None
    assert accept(draft, "<think>t</think>It is \\boxed{G}") is not None
    assert accept(draft, "<think>t</think>It is \\boxed{(H) twelve}") is None


@pytest.mark.parametrize("extracted", ["", " ", "print(3 * 4)\n", FENCED, f"So:\n{FENCED}"])
@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"<think>t</think>\n\n{FENCED}", True),
        ("<think>t</think>So:\n~~~~python\nprint(3 * 4)\n~~~~\nIt prints 12.", True),
        (f"<think>t</think>Not\n```\nprint(34)\n```\nbut\n{FENCED}", True),
        (f"<think>t</think>{FENCED}\nor\n```\nprint(34)\n```", False),  # the last is the answer
        ("<think>t</think>```\nprint(3*4)\n```", False),
        ("<think>t</think>print(3 * 4)", False),  # occurs, but no reward reads it
        (f"<think>{FENCED}</think>It is above.", False),
        ("<think>t</think>It is \\boxed{print(3 * 4)}.", False),
        (f"{FENCED}", False),
    ],
)
def test_a_program_stays_as_it_is(text: str, kept: bool, extracted: str) -> None:
    """Whatever a reward has extracted: `code` the program, `format` what is in the tag."""
    draft = Draft(PROGRAM.question, PROGRAM.completion, extracted)
    assert accept(draft, text) == (text if kept else None)


def test_a_block_beside_the_answer_is_no_answer() -> None:
    draft = Draft("q", f"<think>t</think>{FENCED}\nso \\boxed{{12}}", "12")
    assert accept(draft, "<think>t</think>It is \\boxed{12}.") is not None
    assert accept(draft, f"<think>t</think>{FENCED}\nso \\boxed{{13}}") is None
    assert accept(draft, f"<think>t</think>{FENCED}") is None
    (text,) = rewrite_by_rules(RuleRewrite(), [draft])
    assert text == "<think>t</think>\n\nThe final answer is \\boxed{12}."


def test_accept_in_another_style() -> None:
    text = "<think>t</think><answer>12</answer>"
    assert accept(BOXED, text, "tags") == text
    assert accept(BOXED, text) is None


def test_instruction_prompt_has_the_whole_draft() -> None:
    prompt = instruction_prompt(BOXED, " Rewrite {answer}. ")
    assert prompt.startswith("Rewrite {answer}.\n\n## Question\n\nWhat is 6 + 6?\n\n## Draft\n\n")
    assert BOXED.completion in prompt and prompt.endswith("## Final answer\n\n12")
    assert instruction_prompt(Draft("q", "c", ""), "I").endswith("(none)")


# Rules.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plus plusx xplus plus", "add plusx xplus add"),
        ("7plus5", "7add5"),  # as the language reward counts words
        ("plus-plus", "add-add"),
        ("plus's", "plus's"),
        ("plus\u0301", "plus\u0301"),  # an accent belongs to its letter
        ("用plus加", "用add加"),
        ("因为他", "because他"),
        ("so far so", "thus so"),  # the longest
        ("so farther", "so farther"),  # else a shorter one
        ("by by", "so so"),  # what was put in is not looked at again
        ("a.b", "dot"),
        ("aXb", "aXb"),
        ("1+2", "1 and 2"),
        ("", ""),
    ],
)
def test_replace_words(text: str, expected: str) -> None:
    replacements = {
        "plus": "add",
        "因为": "because",
        "so far": "thus",
        "by": "so",
        "+": " and ",
        "a.b": "dot",
    }
    assert _replace_words(text, replacements) == expected


def test_the_longest_phrase_that_fits_is_replaced() -> None:
    replacements = {"so": "yes", "so far": "thus", "far": "away"}
    assert _replace_words("so far so", replacements) == "thus yes"
    assert _replace_words("so farther", replacements) == "yes farther"
    assert _replace_words("also far", replacements) == "also away"


WORDS = st.sampled_from(["ax", "by", "axby", "x", "c3", "ä", "b"])


@given(
    st.lists(st.tuples(WORDS, st.sampled_from([" ", ", ", "\n", " - "]))),
    st.dictionaries(WORDS, WORDS),
)
def test_replacing_single_words_is_a_map_over_the_words(parts, replacements) -> None:
    # "c3" is two words, so none of the others occurs in it; replacements of it are phrases.
    text = "".join(word + gap for word, gap in parts)
    expected = "".join(replacements.get(word, word) + gap for word, gap in parts)
    assert _replace_words(text, replacements) == expected


def test_rules_put_thought_and_answer_into_the_template() -> None:
    rules = RuleRewrite(replacements={"und": "and", "sind": "make", "Es": "It"})
    draft = Draft(
        "6+6=", "<think>\n 6 und 6 sind 12. \n</think>\n Es: <answer> 12 </answer>", "12 "
    )
    assert rewrite_by_rules(rules, [draft]) == [
        "<think>6 and 6 make 12.</think>\n\nThe final answer is \\boxed{12}."
    ]


def test_a_prefilled_tag_makes_no_difference() -> None:
    """The prompt may end in `<think>`, `<think>\\n` or no tag; the completion begins with it."""
    texts = rewrite_by_rules(
        RuleRewrite(),
        [Draft("q", f"{prefill}so 3</think>\\boxed{{3}}", "3") for prefill in PREFILLS],
    )
    assert texts == ["<think>so 3</think>\n\nThe final answer is \\boxed{3}."] * len(PREFILLS)


PREFILLS = ("<think>", "<think>\n", " <think> ", "")


def test_replacements_stay_inside_of_the_thought() -> None:
    rules = RuleRewrite(
        summary="{question} {answer}: \\boxed{{answer}}", replacements={"zwei": "two", "q": "Q"}
    )
    (text,) = rewrite_by_rules(rules, [Draft("q zwei", "<think>zwei</think>\\boxed{zwei}", "zwei")])
    assert text == "<think>two</think>\n\nq zwei zwei: \\boxed{zwei}"


def test_braces_of_texts_are_no_placeholders() -> None:
    draft = Draft(
        "{answer}", "<think>{summary} \\frac{1}{2} {x}</think>\\boxed{\\frac{1}{2}}", "0.5"
    )
    (text,) = rewrite_by_rules(
        RuleRewrite(summary="{question} \\frac{1}{2} \\boxed{{answer}}"), [draft]
    )
    assert text == (
        "<think>{summary} \\frac{1}{2} {x}</think>\n\n{answer} \\frac{1}{2} \\boxed{0.5}"
    )


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>never closed \\boxed{3}", "3"),
        ("no thought at all: \\boxed{3}", "3"),
        ("<think> \n</think>\\boxed{3}", "3"),
        ("<think>a</think><think>b</think>\\boxed{3}", "3"),
        ("<think>a <answer>3</answer></think>\\boxed{3}", "3"),
        ("<think>a</think>I do not know.", ""),
        ("<think>a</think>I do not know.", " "),
        ("<think>a</think>\\boxed{3}", "}3"),  # would not be read back
    ],
)
def test_drafts_without_a_text_are_none_and_the_others_keep_their_place(completion, answer) -> None:
    good = Draft("q", "<think>so 3</think>\\boxed{3}", "3")
    texts = rewrite_by_rules(RuleRewrite(), [good, Draft("q", completion, answer), good])
    assert texts[1] is None and texts[0] == texts[2] is not None


def test_rules_in_another_style() -> None:
    rules = RuleRewrite(template="<think>{thought}</think><answer>{answer}</answer>", style="tags")
    assert rewrite_by_rules(rules, [BOXED]) == ["<think>6 and 6, so 12.</think><answer>12</answer>"]


def test_a_program_has_a_summary_of_its_own() -> None:
    inner = "for each in x:\n    print('{question} {answer}')\n\n"
    drafts = [
        PROGRAM,
        BOXED,
        Draft("q", f"<think>t</think>~~~ python\n{inner}~~~", ""),
        Draft("q", f"<think>t</think>```{inner}", ""),  # no block, and so nothing
    ]
    assert rewrite_by_rules(RuleRewrite(), drafts) == [
        f"<think>3 and 4.</think>\n\n{FENCED}",
        "<think>6 and 6, so 12.</think>\n\nThe final answer is \\boxed{12}.",
        f"<think>t</think>\n\n```\n{inner}```",
        None,
    ]
    rules = RuleRewrite(program_summary="{question} Run this:\n```python\n{program}```\nDone.")
    assert rewrite_by_rules(rules, [PROGRAM]) == [
        "<think>3 and 4.</think>\n\nWrite 12. Run this:\n```python\nprint(3 * 4)\n```\nDone."
    ]
    tags = RuleRewrite(
        template="<think>{thought}</think><answer>{summary}</answer>",
        summary="{answer}",
        style="tags",
    )
    assert rewrite_by_rules(tags, [PROGRAM]) == [
        f"<think>3 and 4.</think><answer>{FENCED}</answer>"
    ]


def test_a_program_that_the_fences_would_cut_off_has_no_text() -> None:
    draft = Draft("q", "<think>t</think>~~~\nx = '''\n```\n'''\n~~~", "")
    assert rewrite_by_rules(RuleRewrite(), [draft]) == [None]
    (text,) = rewrite_by_rules(RuleRewrite(program_summary="~~~\n{program}~~~"), [draft])
    assert text is not None and text.endswith("\n```\n'''\n~~~")


def test_where_a_program_has_no_place_it_has_no_text() -> None:
    """Such rules are fine for runs without programs."""
    for settings in (
        {"template": r"<think>{thought}</think>\boxed{{answer}}"},
        {"style": "boxed"},
        {"template": "<think>{thought}</think>So: {summary}"},
    ):
        texts = rewrite_by_rules(RuleRewrite(**settings), [PROGRAM, BOXED])
        assert texts[0] is None and texts[1] is not None


@given(
    st.text(st.sampled_from("a`~ \n\r{}\\<>é")),
    st.sampled_from(["", "x", " "]),
    st.sampled_from(["```", "~~~", "`````"]),
)
def test_no_text_has_another_program_than_its_draft(program, before, fence) -> None:
    draft = Draft("q", f"<think>t</think>{before}\n{fence}\n{program}\n{fence}", "")
    (text,) = rewrite_by_rules(RuleRewrite(), [draft])
    assert text is None or program_of(text) == program_of(draft.completion)
    if "```" not in program:
        assert (text is None) == (program_of(draft.completion) is None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"template": "<think>{though}</think>{summary}"},
            "template: {though} is not a placeholder; did you mean '{thought}'? "
            "there are {thought}, {summary}, {question}, {answer}",
        ),
        ({"summary": "{summary}{answer}"}, "summary: {summary} is not a placeholder"),
        (
            {"summary": "\\boxed{answer}"},
            "\\boxed{answer} would lose its braces; write \\boxed{{answer}}",
        ),
        ({"summary": "Done."}, "{answer} is missing"),
        ({"template": "<think>so</think>{summary}"}, "{thought} is missing"),
        ({"template": "{thought}\n{summary}"}, "is not of style 'think'"),
        ({"template": "<think>{thought}{summary}</think>Done."}, "no answer that can be read"),
        ({"summary": "<answer>{answer}</answer>"}, "is not of style 'think'"),
        ({"template": "<think>{thought}</think>{answer}", "summary": "{answer}!"}, "no {summary}"),
        ({"program_summary": "```\n{answer}```"}, "program_summary: {answer} is not a placeholder"),
        ({"program_summary": "```\nprint(7)\n```"}, "{program} is missing"),
        ({"program_summary": "```{program}```"}, "fences need lines of their own"),
        ({"program_summary": "~~~\n{program}~~~", "style": "boxed"}, "is not of style 'boxed'"),
        (
            {
                "template": "<think>{thought}</think>{answer}",
                "program_summary": "~~~\n{program}~~~",
            },
            "no {summary}",
        ),
        ({"replacements": {"": "x"}}, "replacements: ''"),
    ],
)
def test_bad_rules_are_refused_when_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_rules(RuleRewrite(**settings))


# A server.

Answer = tuple[int, Any, dict[str, str]]
"""Status, body (JSON, or bytes as they are), headers."""


def replied(text: str | None, finish: str = "stop") -> Answer:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {"choices": [choice]}, {}


def failed(status: int, said: str = "no", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"error": {"message": said}}, named


class Server:
    """Answers with `answer(question, times asked before)`, and remembers all requests."""

    def __init__(self, answer: Callable[[str, int], Answer | None]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.asked: Counter[str] = Counter()
        self.most_at_a_time = self._now = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                (question,) = re.findall(r"## Question\n\n(.*)\n", body["messages"][0]["content"])
                with lock:
                    server.requests.append(body)
                    server.headers.append(dict(self.headers))
                    server.paths.append(self.path)
                    before = server.asked[question]
                    server.asked[question] += 1
                    server._now += 1
                    server.most_at_a_time = max(server.most_at_a_time, server._now)
                answered = answer(question, before)
                with lock:
                    server._now -= 1
                if answered is None:  # the connection breaks
                    return
                status, content, headers = answered
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # A client that has given up is no news.
        self.http.handle_error = lambda *args: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers: list[Server] = []

    def start(answer: Callable[[str, int], Answer | None]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


DRAFTS = [Draft(f"q{i}", f"<think>so {i}</think>\\boxed{{{i}}}", f"{i}") for i in range(8)]


def good(question: str) -> str:
    return f"<think>I say {question[1:]}.</think>\n\nIt is \\boxed{{{question[1:]}}}."


GOOD = [good(draft.question) for draft in DRAFTS]


def rewriter(server: Server, log: Path, **settings: Any) -> EndpointRewriter:
    quick = {"model": "m", "retries": 3, "timeout_seconds": 20.0}
    stop = {
        key: settings.pop(key) for key in ("stop_requested", "backoff_seconds") if key in settings
    }
    section = EndpointRewrite(**{"url": server.url, **quick, **settings})
    return EndpointRewriter(
        settings=section, log=RewriteLog(log), **{"backoff_seconds": 0.001, **stop}
    )


def test_answers_come_in_order_from_well_formed_requests(serve, tmp_path: Path) -> None:
    server = serve(lambda question, before: replied(good(question)))
    asks = rewriter(server, tmp_path / "log.jsonl", max_new_tokens=77, temperature=0.25)
    assert asks.rewrite(DRAFTS) == GOOD
    assert len(server.requests) == 8 and set(server.paths) == {"/v1/chat/completions"}
    by_question = {r["messages"][0]["content"]: r for r in server.requests}
    assert by_question[instruction_prompt(DRAFTS[3], INSTRUCTION)] == {
        "model": "m",
        "messages": [{"role": "user", "content": instruction_prompt(DRAFTS[3], INSTRUCTION)}],
        "max_tokens": 77,
        "temperature": 0.25,
    }
    assert {h["Content-Type"] for h in server.headers} == {"application/json"}
    assert not any("Authorization" in h for h in server.headers)
    assert asks.rewrite([]) == []


def test_the_key_comes_from_the_environment(serve, tmp_path: Path, monkeypatch) -> None:
    server = serve(lambda question, before: replied(good(question)))
    monkeypatch.setenv("MY_KEY", " secret\n")
    asks = rewriter(server, tmp_path / "log.jsonl", api_key_env="MY_KEY")
    asks.rewrite(DRAFTS[:1])
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in (tmp_path / "log.jsonl").read_text()


def test_at_most_so_many_requests_at_a_time(serve, tmp_path: Path) -> None:
    meet = threading.Barrier(3)

    def answer(question: str, before: int) -> Answer:
        meet.wait(20)  # breaks unless three requests are under way together
        return replied(good(question))

    server = serve(answer)
    asks = rewriter(server, tmp_path / "log.jsonl", concurrency=3)
    assert asks.rewrite((DRAFTS + MORE)[:9]) == GOOD + [good(MORE[0].question)]
    assert server.most_at_a_time == 3


MORE = [Draft("q8", "<think>so 8</think>\\boxed{8}", "8")]


def test_asked_to_stop_it_keeps_what_is_under_way_and_asks_nothing_twice(
    serve, tmp_path: Path
) -> None:
    stop = threading.Event()
    together = threading.Barrier(2)

    def answer(question: str, before: int) -> Answer:
        if not stop.is_set():
            together.wait(20)
            stop.set()  # while two requests are under way
        return replied(good(question))

    server = serve(answer)
    log = tmp_path / "log.jsonl"
    with pytest.raises(Stopped, match=f"2 of 8 replies are in {re.escape(str(log))}"):
        rewriter(server, log, concurrency=2, stop_requested=stop.is_set).rewrite(DRAFTS)
    assert len(log.read_text().splitlines()) == 2
    assert rewriter(server, log).rewrite(DRAFTS) == GOOD
    assert len(server.requests) == 8 and set(server.asked.values()) == {1}
    # Where nothing is left to ask for there is nothing to stop.
    assert rewriter(server, log, stop_requested=lambda: True).rewrite(DRAFTS) == GOOD


def test_asked_to_stop_it_does_not_sit_out_a_long_wait(serve, tmp_path: Path) -> None:
    stop = threading.Event()

    def answer(question: str, before: int) -> Answer:
        threading.Timer(0.1, stop.set).start()
        return failed(429, Retry_After="500")

    asks = rewriter(serve(answer), tmp_path / "log.jsonl", stop_requested=stop.is_set)
    with pytest.raises(Stopped, match="0 of 1"):
        asks.rewrite(DRAFTS[:1])


@pytest.mark.parametrize(
    "failure",
    [
        failed(429),
        failed(429, Retry_After="0"),
        failed(429, Retry_After=formatdate(0, usegmt=True)),  # long over
        failed(429, Retry_After="soon"),
        failed(408),
        failed(500),
        failed(503),
        failed(529),
        (200, b'{"choices": [', {}),
        (200, b"\xff<html>", {}),
        (200, {"choices": []}, {}),
        (200, {"error": {"message": "overloaded"}}, {}),
        (200, [1], {}),
        (200, {"choices": [{"message": {"content": 3}}]}, {}),
        (200, {"choices": [None]}, {}),
        (200, b"{}", {"Content-Length": "100"}),  # torn
        None,
    ],
)
def test_what_may_pass_is_tried_again(serve, tmp_path: Path, failure: Answer | None) -> None:
    def answer(question: str, before: int) -> Answer | None:
        return failure if before < 2 and question in ("q1", "q2") else replied(good(question))

    server = serve(answer)
    assert rewriter(server, tmp_path / "log.jsonl").rewrite(DRAFTS[:4]) == GOOD[:4]
    assert server.asked == {"q0": 1, "q1": 3, "q2": 3, "q3": 1}


def test_a_server_that_does_not_answer_in_time_is_tried_again(serve, tmp_path: Path) -> None:
    release = threading.Event()

    def answer(question: str, before: int) -> Answer | None:
        if before == 0:
            release.wait(20)
            return replied("Too late.")
        return replied(good(question))

    server = serve(answer)
    asks = rewriter(server, tmp_path / "log.jsonl", timeout_seconds=0.2, retries=50)
    assert asks.rewrite(DRAFTS[:2]) == GOOD[:2]
    release.set()
    assert server.asked["q0"] > 1 and server.asked["q1"] > 1


def test_a_run_that_fails_half_way_is_resumed_for_the_rest(serve, tmp_path: Path) -> None:
    broken = threading.Event()

    def answer(question: str, before: int) -> Answer:
        if int(question[1:]) >= 4 and not broken.is_set():
            return failed(503, "out for lunch")
        return replied(good(question))

    server = serve(answer)
    log = tmp_path / "log.jsonl"
    with pytest.raises(EndpointError) as error:
        rewriter(server, log, concurrency=1, retries=2).rewrite(DRAFTS)
    for part in (
        server.url,
        "model 'm'",
        "HTTP 503 Service Unavailable",
        "out for lunch",
        "(3 attempts)",
        f"4 of 8 replies are in {log}; run again to request the rest",
    ):
        assert part in str(error.value)
    assert server.asked == {"q0": 1, "q1": 1, "q2": 1, "q3": 1, "q4": 3}
    broken.set()
    server.asked.clear()
    # Another process would read the same file; in another order, from another address.
    again = rewriter(server, log, url=f"{server.url}/").rewrite(list(reversed(DRAFTS)))
    assert again == list(reversed(GOOD))
    assert server.asked == {"q4": 1, "q5": 1, "q6": 1, "q7": 1}
    server.asked.clear()
    assert rewriter(server, log).rewrite(DRAFTS) == GOOD
    assert not server.asked


def test_what_is_under_way_when_another_request_fails_is_kept(serve, tmp_path: Path) -> None:
    started, refused = threading.Event(), threading.Event()
    answered: list[str] = []

    def answer(question: str, before: int) -> Answer:
        if question == "q0":
            started.wait(20)
            refused.set()
            return failed(401)
        started.set()
        refused.wait(20)
        time.sleep(0.1)  # so that the client has most likely read the refusal
        answered.append(question)
        return replied(good(question))

    server = serve(answer)
    with pytest.raises(EndpointError) as error:
        rewriter(server, tmp_path / "log.jsonl", concurrency=2).rewrite(DRAFTS)
    kept = [json.loads(line)["text"] for line in (tmp_path / "log.jsonl").open()]
    assert kept == [good(question) for question in answered] and "q1" in answered
    assert f"{len(kept)} of 8 replies" in str(error.value)


def test_one_that_waits_for_its_retry_gives_up_when_another_fails(serve, tmp_path: Path) -> None:
    told = threading.Event()

    def answer(question: str, before: int) -> Answer:
        if question == "q0":
            told.set()
            return failed(429, Retry_After="30")
        told.wait(20)
        return failed(401)

    server = serve(answer)
    with pytest.raises(EndpointError, match="HTTP 401"):
        rewriter(server, tmp_path / "log.jsonl", concurrency=2).rewrite(DRAFTS[:2])
    assert server.asked == {"q0": 1, "q1": 1}


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (failed(401), "HTTP 401 Unauthorized.*Put a valid key .* variable OPENAI_API_KEY"),
        (failed(403), "HTTP 403 Forbidden.*Put a valid key"),
        (failed(404, "no model m"), "HTTP 404 Not Found: .*no model m.*See that url ends in"),
        (failed(400, "bad temperature"), "HTTP 400 Bad Request: .*bad temperature.*max_new_tokens"),
        (failed(307, "gone", Location="http://127.0.0.2/v1"), "moved to as url: http://127.0.0.2"),
        (failed(418), "HTTP 418"),
        (failed(429, "slow", Retry_After="86400"), "HTTP 429 .*asks to wait 86400 seconds.*Lower"),
        (
            failed(503, Retry_After=formatdate(time.time() + 86400, usegmt=True)),
            r"HTTP 503 .*asks to wait 8\d{4} seconds",
        ),
    ],
)
def test_what_cannot_pass_is_an_error_at_once(serve, tmp_path: Path, failure, message) -> None:
    server = serve(lambda question, before: failure)
    with pytest.raises(EndpointError, match=message):
        rewriter(server, tmp_path / "log.jsonl", concurrency=1).rewrite(DRAFTS)
    assert server.asked == {"q0": 1}


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (failed(429), r"HTTP 429 Too Many Requests.* \(4 attempts\).*Lower concurrency"),
        (failed(502), r"HTTP 502 Bad Gateway.* \(4 attempts\).*server's own log"),
        (failed(599), r"HTTP 599: .* \(4 attempts\)"),
        ((200, b"<html>", {}), r"not an answer of /chat/completions: '<html>' \(4 attempts\)"),
        (None, r"no answer: RemoteDisconnected.*timeout_seconds"),
    ],
)
def test_what_does_not_pass_is_an_error_in_the_end(serve, tmp_path: Path, failure, message) -> None:
    server = serve(lambda question, before: failure)
    with pytest.raises(EndpointError, match=message):
        rewriter(server, tmp_path / "log.jsonl", concurrency=1).rewrite(DRAFTS)
    assert server.asked == {"q0": 4}


def test_no_server_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    log = RewriteLog(tmp_path / "log.jsonl")
    section = EndpointRewrite(url="http://127.0.0.1:1/v1", model="m", retries=0)
    asks = EndpointRewriter(settings=section, log=log)
    message = r"http://127.0.0.1:1/v1: model 'm': no answer: ConnectionRefusedError.*0 of 8 replies"
    with pytest.raises(EndpointError, match=message):
        asks.rewrite(DRAFTS)


def test_an_error_does_not_repeat_the_key(serve, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = serve(lambda question, before: failed(401, "wrong key sk-secret"))
    with pytest.raises(EndpointError, match=r"wrong key \*\*\*"):
        rewriter(server, tmp_path / "log.jsonl").rewrite(DRAFTS[:1])


def test_a_redirect_is_not_followed(serve, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    other = serve(lambda question, before: replied(good(question)))
    for status in (302, 307, 308):
        server = serve(lambda question, before, s=status: failed(s, Location=other.url))
        with pytest.raises(EndpointError, match=f"HTTP {status}"):
            rewriter(server, tmp_path / f"{status}.jsonl").rewrite(DRAFTS[:1])
    assert not other.headers


@pytest.mark.parametrize(
    "answer",
    [
        replied(None),
        replied(""),
        replied("I cannot help with that."),
        replied(good("q9")),
        replied(good("q1"), finish="length"),
        replied("<think>\ud800</think>\\boxed{1}"),
        failed(400, "This model's maximum context length is 4096 tokens"),
        (400, {"error": {"code": "context_length_exceeded"}}, {}),
    ],
)
def test_a_draft_that_cannot_be_rewritten_is_none_and_not_asked_for_again(
    serve, tmp_path: Path, answer: Answer
) -> None:
    server = serve(lambda question, before: answer if question == "q1" else replied(good(question)))
    for _ in range(2):
        texts = rewriter(server, tmp_path / "log.jsonl").rewrite(DRAFTS[:3])
        assert texts == [GOOD[0], None, GOOD[2]]
    assert server.asked == {"q0": 1, "q1": 1, "q2": 1}


def test_equal_drafts_are_asked_for_once(serve, tmp_path: Path) -> None:
    server = serve(lambda question, before: replied(good(question)))
    drafts = [DRAFTS[0], DRAFTS[1], DRAFTS[0]]
    texts = rewriter(server, tmp_path / "log.jsonl").rewrite(drafts)
    assert texts == [GOOD[0], GOOD[1], GOOD[0]]
    assert server.asked == {"q0": 1, "q1": 1}


@pytest.mark.parametrize(
    ("settings", "asks_again"),
    [
        ({"model": "other"}, True),
        ({"instruction": "Rewrite."}, True),
        ({"max_new_tokens": 5}, True),
        ({"temperature": 0.0}, True),
        ({"concurrency": 1, "retries": 0, "timeout_seconds": 9.0, "style": "boxed"}, False),
    ],
)
def test_a_reply_is_for_a_draft_and_what_decides_it(serve, tmp_path, settings, asks_again) -> None:
    server = serve(lambda question, before: replied(good(question)))
    log = tmp_path / "log.jsonl"
    rewriter(server, log).rewrite(DRAFTS[:1])
    rewriter(server, log, **settings).rewrite(DRAFTS[:1])
    assert server.asked == {"q0": 1 + asks_again}


def test_another_style_is_applied_to_what_is_in_the_log(serve, tmp_path: Path) -> None:
    text = "<think>t</think><answer>0</answer>"
    server = serve(lambda question, before: replied(text))
    log = tmp_path / "log.jsonl"
    assert rewriter(server, log).rewrite(DRAFTS[:1]) == [None]
    assert rewriter(server, log, style="tags").rewrite(DRAFTS[:1]) == [text]
    assert server.asked == {"q0": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000/v1"}, "url = 'localhost:8000/v1': needs http://HOST/v1"),
        ({"url": "https:///v1"}, "needs http://HOST/v1"),
        ({"url": "http://h /v1"}, "needs http://HOST/v1"),
        ({"url": "http://me:pw@host/v1"}, "url: names a user for host"),
        ({"url": "http://h/v1/chat/completions/"}, "/chat/completions is added"),
        ({"url": "http://h/v1?key=3"}, "up to the version"),
    ],
)
def test_bad_addresses_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)) as error:
        EndpointRewrite(**{"url": "http://h/v1", "model": "m", **settings})
    assert "pw" not in error.value.errors()[0]["msg"]


def test_waits_double_up_to_a_minute_and_never_undercut_the_server() -> None:
    for attempt, longest in enumerate([1, 2, 4, 8, 16, 32, 60, 60]):
        waits = [_wait_seconds(attempt, 1.0, None) for _ in range(50)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
    assert _wait_seconds(10**6, 1.0, None) <= 60
    assert _wait_seconds(0, 1.0, 7.5) == 7.5
    assert _wait_seconds(3, 1.0, 1.0) >= 4.0


# The log.


def test_a_log_keeps_replies_and_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    log = RewriteLog(path)
    replies = {"a": Reply("é\u2028\ud800"), "b": Reply(None), "c": Reply("x", truncated=True)}
    for key, reply in replies.items():
        assert key not in log
        log.add(key, reply)
    with path.open("ab") as file:
        file.write(b'{"key": "d", "text": "y')
    again = RewriteLog(path)
    assert "d" not in again
    again.add("d", Reply("z"))
    last = RewriteLog(path)
    assert {key: last[key] for key in "abcd"} == {**replies, "d": Reply("z")}


@pytest.mark.parametrize("line", ["{", "[]", '{"key": "a"}', "3"])
def test_a_log_with_a_bad_line_names_it(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    RewriteLog(path).add("a", Reply("x"))
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"log\.jsonl:2: not a line of a rewrite log; remove"):
        RewriteLog(path)


def test_keys_tell_drafts_and_settings_apart() -> None:
    settings = {"model": "m", "temperature": 1.0}
    drafts = [BOXED, PLAIN, Draft("a", "b", "c"), Draft("ab", "", "c"), Draft("", "ab", "c")]
    keys = [RewriteLog.key(draft, settings) for draft in drafts]
    keys += [RewriteLog.key(BOXED, {**settings, "temperature": 0.5})]
    assert len(set(keys)) == len(keys)
    assert RewriteLog.key(BOXED, dict(reversed(settings.items()))) == keys[0]


def test_rewriting_loads_nothing_heavy() -> None:
    code = (
        "import sys, r1jax.data.rewriting as r\n"
        "r.rewrite_by_rules(r.RuleRewrite(), [r.Draft('q', '<think>a</think>\\\\boxed{3}', '3')])\n"
        "print({'jax', 'sympy', 'math_verify', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


KEY = "sk-SECRETKEY1234567890"


@pytest.mark.parametrize(
    ("status", "body", "headers", "message"),
    [
        (200, b"[" * 100_000, {}, "not an answer"),  # nested too deep
        (200, f"<html>Bearer {KEY}</html>".encode(), {}, "not an answer"),
        (302, b"", {"Location": f"http://x/?k={KEY}"}, "HTTP 302"),
        (401, f"bad key {KEY[:12]}...".encode(), {}, "HTTP 401 Unauthorized"),
        (401, KEY.replace("-", "\\u002d").encode(), {}, "HTTP 401 Unauthorized"),
        (401, KEY.replace("-", "%2d").encode(), {}, "HTTP 401 Unauthorized"),
        (200, b" " * 2_000_000, {}, "no whole answer within 1,"),
    ],
)
def test_no_message_shows_the_key_and_no_answer_breaks(
    serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status, body, headers, message
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda *_: (status, body, headers))
    asking = rewriter(server, tmp_path / "log", retries=0, max_new_tokens=16)
    with pytest.raises(EndpointError) as caught:
        asking.rewrite(DRAFTS[:1])
    assert message in str(caught.value)
    seen = str(caught.value) + (tmp_path / "log").read_text()
    assert not any(part in seen for part in (KEY, KEY[:12], KEY[3:]))


def test_an_answer_that_repeats_the_key_is_not_stored(
    serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    content = {"choices": [{"message": {"content": GOOD[0] + KEY}}]}
    with pytest.raises(EndpointError, match="repeats the key"):
        rewriter(serve(lambda *_: (200, content, {})), tmp_path / "log").rewrite(DRAFTS[:1])
    assert (tmp_path / "log").read_text() == ""


def test_a_body_that_drips_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Drips(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b" ")
                    time.sleep(0.05)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Drips) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        section = EndpointRewrite(url=url, model="m", retries=0, timeout_seconds=0.2)
        with pytest.raises(EndpointError, match="no whole answer within 0.6"):
            EndpointRewriter(settings=section, log=RewriteLog(tmp_path / "log")).rewrite(DRAFTS[:1])
        server.shutdown()
