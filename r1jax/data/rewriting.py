"""Rewriting of kept completions into texts to train on, for the cold start.

DeepSeek-R1 (arXiv 2501.12948, section 2.3.1) rewrites what R1-Zero got right into one language, the
first person, and its output format: the reasoning process, then a summary. `rewrite_by_rules` does
so for toy texts, `EndpointRewriter` by a model behind an OpenAI-compatible server.
"""

from __future__ import annotations

import hashlib
import html
import http.client
import json
import os
import random
import re
import socket
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path

from r1jax.files import JsonValue, encode_line, end_of_last_line
from r1jax.rewards.code import program_of
from r1jax.rewards.extraction import after_thinking, final_answer, thought
from r1jax.rewards.format import well_formed
from r1jax.rewards.maths import equivalent_key
from r1jax.rewards.words import words
from r1jax.settings.names import nearest
from r1jax.settings.rewriting import EndpointRewrite, RuleRewrite


@dataclass(frozen=True, slots=True)
class Draft:
    """A kept completion, before it is rewritten: the question without template, the prefill of the
    prompt with what the model wrote, and its answer as a reward extracted it (or empty).
    """

    question: str
    completion: str
    answer: str


INSTRUCTION = r"""You edit solutions so that people like to read them. Below are a question, a
draft that solves it, and the draft's final answer. Write the solution anew:

- Begin with <think>, then the whole reasoning of the draft in the first person, as somebody who
  thinks aloud: every step that matters, doubts and checks too, in the draft's order. Add no step of
  your own. Close it with </think>.
- Then write a short summary for the reader: how it is solved, and the final answer, unchanged,
  inside \boxed{}. (A program stays in its fenced code block instead.)
- Use one language throughout, that of the question. Break long paragraphs up.
- Write nothing before <think>, and use neither tag a second time."""
"""The default instruction to a model; the paper does not report its wording."""


def instruction_prompt(draft: Draft, instruction: str) -> str:
    """The prompt of a rewriting model: the instruction, then the draft under headings."""
    parts = {
        "Question": draft.question,
        "Draft": draft.completion,
        "Final answer": draft.answer or "(none)",
    }
    sections = [f"## {title}\n\n{text.strip()}" for title, text in parts.items()]
    return "\n\n".join([instruction.strip(), *sections])


def accept(draft: Draft, text: str, style: str = "think") -> str | None:
    r"""`text` without outer white space, if it may replace the draft; else None.

    It must be well formed, in a `style` of `r1jax.rewards.format.well_formed`, and keep the draft's
    answer. A marked answer (`\boxed{...}`, an answer tag) must have the draft's exact meaning, by
    `equivalent_key`. Without a mark the answer must occur in what follows the thought, word for
    word, which is not enough for a draft that had a mark. Where the draft's answer is a program
    (its last fenced block after the thought), the text's last fenced block must be the same.
    """
    text = text.strip()
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which no tokenizer takes
        return None
    return text if well_formed(text, style) and _keeps_answer(draft, text) else None


def _program(draft: Draft) -> str | None:
    """The program that is the draft's answer, or None.

    A block beside another answer, such as a calculation above a box, is no answer. Nothing need be
    extracted: not every reward reads programs.
    """
    program = program_of(draft.completion)
    if program is None or not draft.answer.strip():
        return program
    # The reward `code` extracts the program, others the fences and what else is in an answer tag.
    is_answer = draft.answer.strip() == program.strip() or program_of(draft.answer) == program
    return program if is_answer else None


def _keeps_answer(draft: Draft, text: str) -> bool:
    program = _program(draft)
    if program is not None:
        return program_of(text) == program
    if not draft.answer.strip():
        return True
    drafted, given = final_answer(draft.completion), final_answer(text)
    if given is not None:
        # A reward may have extracted a normal form, such as the letter of an option with its text.
        wanted = [draft.answer] if drafted is None else [draft.answer, drafted]
        return equivalent_key(given) in map(equivalent_key, wanted)
    return drafted is None and _occurs(draft.answer, after_thinking(text) or "")


def _occurs(answer: str, text: str) -> bool:
    """Whether `answer` occurs in `text`, but for white space; no 5 occurs in 15, -5 or 2.5."""
    answer, text = " ".join(answer.split()), " ".join(text.split())
    pattern = re.escape(answer)
    if answer[0].isdigit():
        pattern = rf"(?<![-\u2212])(?<!\d[.,]){pattern}"
    if answer[-1].isdigit():
        pattern = rf"{pattern}(?![.,]\d)"
    return any(_whole(text, *match.span()) for match in re.finditer(pattern, text))


_WITHIN = 32  # Characters around a position; the next letter of a word is that near.


def _whole(text: str, start: int, end: int) -> bool:
    """Whether no word of `text` goes on across `start` or `end`; words as in `rewards.words`."""
    for at in (start, end):
        before, after = text[max(at - _WITHIN, 0) : at], text[at : at + _WITHIN]
        if unicodedata.category(after[:1] or " ").startswith("M"):
            return False  # an accent of the letter before
        parted = sum(1 for part in (before, after) for _ in words(part))
        if sum(1 for _ in words(before + after)) < parted:
            return False
    return True


def _replace_words(text: str, replacements: Mapping[str, str]) -> str:
    """`text` with whole words or phrases replaced: the longest match, from left to right.

    A replacement is not looked at again. Words are those of `rewards.words`: a Chinese character
    is one, and so are both parts of `7plus`; `don` is none in `don't`.
    """
    if not replacements:
        return text
    keys = sorted(replacements, key=len, reverse=True)
    candidate = re.compile("|".join(map(re.escape, keys)))
    done: list[str] = []
    position = start = 0
    while match := candidate.search(text, start):
        start = match.start()
        for key in keys:
            end = start + len(key)
            if text.startswith(key, start) and _whole(text, start, end):
                done += text[position:start], replacements[key]
                position = start = end
                break
        else:
            start += 1
    return "".join(done) + text[position:]


_PLACEHOLDER = re.compile(r"(\\[A-Za-z]+)?\{([A-Za-z_]\w*)\}")


def rewrite_by_rules(rules: RuleRewrite, drafts: Sequence[Draft]) -> list[str | None]:
    r"""The text to train on for each draft, in order.

    The summary replaces everything but the thought, which loses outer white space, so that a
    prefilled `<think>\n` and a bare `<think>` give the same text. None for a draft without a closed
    thought, with a blank one, or with neither answer nor program, and where `accept` refuses it.
    """
    texts: list[str | None] = []
    for draft in drafts:
        inner = (thought(draft.completion) or "").strip()
        usable = inner and (draft.answer.strip() or _program(draft) is not None)
        texts.append(accept(draft, _text(rules, draft, inner), rules.style) if usable else None)
    return texts


def check_rules(rules: RuleRewrite) -> None:
    """Raises ValueError, beginning with the key, for rules that no text could come out of."""
    template, style = rules.template, rules.style
    defaults = {key: field.default for key, field in RuleRewrite.model_fields.items()}
    custom_program_summary = rules.program_summary != defaults["program_summary"]
    used = _placeholders("template", template, ("thought", "summary", "question", "answer"))
    if "summary" in used:
        used |= _placeholders("summary", rules.summary, ("thought", "question", "answer"))
    elif rules.summary != defaults["summary"] or custom_program_summary:
        raise ValueError(f"template = {template!r}: has no {{summary}}, but one is set")
    where = f"template = {template!r}, summary = {rules.summary!r}"
    for needed in ("thought", "answer"):
        if needed not in used:
            raise ValueError(f"{where}: {{{needed}}} is missing")
    known = ("question", "program")
    if "program" not in _placeholders("program_summary", rules.program_summary, known):
        raise ValueError(f"program_summary = {rules.program_summary!r}: {{program}} is missing")
    if "" in rules.replacements:
        raise ValueError("replacements: '': needs words with their words")
    sample = _text(rules, Draft("1+6=", "<think>So 7.</think>7", "7"), "So 7.")
    if accept(Draft("1+6=", "", "7"), sample, style) is None:
        raise ValueError(
            f"{where}: the result, such as {sample!r}, is not of style {style!r} or has "
            "no answer that can be read"
        )
    # Not every template can hold the default, and most runs have no programs.
    program = Draft("Write 7.", "<think>So 7.</think>```\nprint(7)\n```", "")
    sample = _text(rules, program, "So 7.")
    if custom_program_summary and accept(program, sample, style) is None:
        raise ValueError(
            f"template = {template!r}, program_summary = {rules.program_summary!r}: the "
            f"result, such as {sample!r}, is not of style {style!r} or has no program "
            "that can be read; fences need lines of their own"
        )


def _text(rules: RuleRewrite, draft: Draft, inner: str) -> str:
    values = {
        "thought": _replace_words(inner, rules.replacements),
        "question": draft.question.strip(),
        "answer": draft.answer.strip(),
    }
    program = _program(draft)
    if program is None:
        values["summary"] = _filled(rules.summary, values)
    else:
        values["summary"] = _filled(rules.program_summary, {**values, "program": program})
    return _filled(rules.template, values)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """In one pass: a question may well say `{answer}`, and formulae have braces of their own."""
    return _PLACEHOLDER.sub(lambda match: values[match[2]], template)


def _placeholders(name: str, template: str, known: Sequence[str]) -> set[str]:
    for command, found in _PLACEHOLDER.findall(template):
        if found not in known:
            placeholders = [f"{{{each}}}" for each in known]
            hint = nearest(f"{{{found}}}", placeholders)
            raise ValueError(
                f"{name}: {{{found}}} is not a placeholder; {hint}there are "
                f"{', '.join(placeholders)}"
            )
        if command:
            raise ValueError(
                f"{name}: {command}{{{found}}} would lose its braces; "
                f"write {command}{{{{{found}}}}}"
            )
    return {found for _, found in _PLACEHOLDER.findall(template)}


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer of a model to an instruction: unchanged, None if it gave none; and whether it was
    cut off before it ended.
    """

    text: str | None
    truncated: bool = False

    def accepted(self, draft: Draft, style: str) -> str | None:
        """The text to train on, if `accept` takes it; None for an answer that was cut off."""
        if self.text is None or self.truncated:
            return None
        return accept(draft, self.text, style)


class RewriteLog:
    """The replies so far, as JSON lines from which a later run continues; for one process.

    A reply is written before the next request of its thread, unchanged, so that another style or a
    better check needs no new ones. A line that a killed process left unfinished is cut off.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the log, or makes it. Raises ValueError for a line that is not a reply."""
        self.path = Path(path)
        self._lock = threading.Lock()
        self._replies: dict[str, Reply] = {}
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        os.truncate(self.path, end_of_last_line(self.path))
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    self._replies[row["key"]] = Reply(row["text"], row["truncated"])
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self.path}:{number}: not a line of a rewrite log; remove the line, and "
                        "its draft is requested again"
                    ) from error

    @staticmethod
    def key(draft: Draft, settings: Mapping[str, JsonValue]) -> str:
        """A key that is equal for equal drafts and settings (JSON) of a rewriter."""
        parts = [draft.question, draft.completion, draft.answer, settings]
        text = json.dumps(parts, sort_keys=True)  # pure ASCII, whatever is in the texts
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def __contains__(self, key: str) -> bool:
        return key in self._replies

    def __getitem__(self, key: str) -> Reply:
        return self._replies[key]

    def add(self, key: str, reply: Reply) -> None:
        """Appends a reply to the file; from any thread."""
        row = {"key": key, "text": reply.text, "truncated": reply.truncated}
        with self._lock, self.path.open("ab") as file:
            file.write(encode_line(row))
            self._replies[key] = reply


class Stopped(Exception):
    """A rewriter stopped on request before it had every reply; those so far are in its log."""


class EndpointError(RuntimeError):
    """An endpoint does not answer, or not usably; the replies so far are in the log."""


_LONGEST_BACKOFF = 60.0  # seconds
_POLL_SECONDS = 1.0  # between two checks whether to stop, during a wait
_LONGEST_WAIT = 600.0  # seconds; if a server demands more, the run ends with an error
_TIMES_TIMEOUT = 3  # for a whole answer
_BYTES, _BYTES_OF_TOKEN = 1 << 20, 256  # that an answer may have
_PART_OF_KEY = 8  # characters
_LONGEST_BODY = 200  # characters of a server's message in an error


@dataclass(frozen=True, kw_only=True)
class EndpointRewriter:
    """Asks a model behind an OpenAI-compatible server, one request for each draft.

    log: Stores the replies. A draft is not requested again with the same model, instruction,
        max_new_tokens and temperature; the url may change.
    backoff_seconds: Wait before the first retry. It doubles with each, up to a minute, with jitter;
        a longer Retry-After of the server is respected.
    stop_requested: Called before each request, from several threads. Once it returns true, no more
        requests are sent; replies to open ones are waited for, and stored.
    """

    settings: EndpointRewrite
    log: RewriteLog
    backoff_seconds: float = 1.0
    stop_requested: Callable[[], bool] = lambda: False

    def rewrite(self, drafts: Sequence[Draft]) -> list[str | None]:
        """The text to train on for each draft, or None, in order. Equal drafts are requested once.

        Raises EndpointError: a request failed; Stopped: `stop_requested` returned true. Open
        requests are waited for, and every reply is in the log: the next call requests the rest.
        """
        settings = self.settings
        decides = settings.model_dump(include={"model", "max_new_tokens", "temperature"})
        decides["instruction"] = settings.instruction or INSTRUCTION
        keys = [self.log.key(draft, decides) for draft in drafts]
        distinct = dict(zip(keys, drafts, strict=True))
        missing = {key: draft for key, draft in distinct.items() if key not in self.log}
        try:
            self._request_all(missing)
        except _Failure as failure:
            known = sum(key in self.log for key in distinct)
            raise EndpointError(
                f"{settings.url}: model {settings.model!r}: {failure}. {failure.remedy}. "
                f"{known} of {len(distinct)} replies are in {self.log.path}; run again to request "
                "the rest"
            ) from failure
        known = sum(key in self.log for key in distinct)
        if known < len(distinct):
            raise Stopped(f"{known} of {len(distinct)} replies are in {self.log.path}")
        replies = [self.log[key] for key in keys]
        return [r.accepted(draft, settings.style) for r, draft in zip(replies, drafts, strict=True)]

    def _request_all(self, missing: Mapping[str, Draft]) -> None:
        stop = threading.Event()
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            try:
                futures = [
                    pool.submit(self._request_and_log, key, draft, stop)
                    for key, draft in missing.items()
                ]
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                stop.set()  # the others do not begin; those that have begun are waited for
                raise

    def _request_and_log(self, key: str, draft: Draft, stop: threading.Event) -> None:
        try:
            self._request_until_answered(key, draft, stop)
        except BaseException:
            stop.set()  # here, so that this thread does not begin with another draft
            raise

    def _request_until_answered(self, key: str, draft: Draft, stop: threading.Event) -> None:
        for attempt in range(self.settings.retries + 1):
            if self._stopped(stop):
                return
            try:
                self.log.add(key, self._request(draft))
                return
            except _Failure as failure:
                if not failure.temporary:
                    raise
                if attempt == self.settings.retries:
                    failure.add(f"{attempt + 1} attempts")
                    raise
                wait = _wait_seconds(attempt, self.backoff_seconds, failure.retry_after)
                if wait > _LONGEST_WAIT:
                    failure.add(f"the server asks to wait {wait:.0f} seconds")
                    raise
                end = time.monotonic() + wait
                while (left := end - time.monotonic()) > 0 and not self._stopped(stop):
                    stop.wait(min(left, _POLL_SECONDS))

    def _stopped(self, stop: threading.Event) -> bool:
        return stop.is_set() or self.stop_requested()

    def _request(self, draft: Draft) -> Reply:
        settings = self.settings
        content = instruction_prompt(draft, settings.instruction or INSTRUCTION)
        body = {
            "model": settings.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
        }
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(settings.api_key_env, "").strip():
            headers["Authorization"] = f"Bearer {key}"
        url = settings.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            reply = self._answer(request)
        except _Failure as failure:  # it may quote what the server said
            failure.args = (_without_key(str(failure), key),)
            failure.remedy = _without_key(failure.remedy, key)
            raise failure from None
        if len(key) >= 2 * _PART_OF_KEY and key in (reply.text or ""):
            raise _Failure(
                "the answer repeats the key, and was not stored",
                "See what answers at url",
                temporary=False,
            )
        return reply

    def _answer(self, request: urllib.request.Request) -> Reply:
        """The server's reply, in limited time and size."""
        settings = self.settings
        longest = _TIMES_TIMEOUT * settings.timeout_seconds
        largest = _BYTES + _BYTES_OF_TOKEN * settings.max_new_tokens
        with _Deadline(longest) as deadline:
            try:
                with _OPENER.open(request, timeout=settings.timeout_seconds) as response:
                    answer = response.read(largest + 1)
            except urllib.error.HTTPError as error:
                with error:
                    said = _body(error)
                if error.code in (400, 413, 422) and _TOO_LONG.search(said):
                    return Reply(None)
                raise self._refused(error, said) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = getattr(error, "reason", error)
                what = f"no answer: {type(reason).__name__}: {reason}"
                if deadline.passed:
                    what = f"no whole answer within {longest:g} seconds"
                raise _Failure(
                    what,
                    "See that the server is up, and give it more timeout_seconds if it is slow",
                    temporary=True,
                ) from None
        if deadline.passed or len(answer) > largest:
            limit = f"{longest:g} seconds" if deadline.passed else f"{largest:,} bytes"
            raise _Failure(
                f"no whole answer within {limit}",
                "See what answers at url, and that it keeps to max_tokens",
                temporary=True,
            )
        return _read_reply(answer)

    def _refused(self, error: urllib.error.HTTPError, said: str) -> _Failure:
        status = error.code
        try:
            phrase = HTTPStatus(status).phrase
        except ValueError:
            phrase = ""
        if status in (401, 403):
            remedy = f"Put a valid key into the environment variable {self.settings.api_key_env}"
        elif status == 404:
            remedy = "See that url ends in the version (often /v1), and that the model is served"
        elif status in (408, 429):
            remedy = "Lower concurrency, or raise retries; see that the account has credit left"
        elif status >= 500:
            remedy = "See what the server's own log says"
        elif status < 400:
            remedy = f"Give the address that it moved to as url: {error.headers.get('Location')}"
        else:
            remedy = "See that the model takes max_tokens = max_new_tokens and the temperature"
        return _Failure(
            f"HTTP {status} {phrase}".rstrip() + (f": {said[:_LONGEST_BODY]}" if said else ""),
            remedy,
            temporary=status in (408, 429) or status >= 500,
            retry_after=_read_retry_after(error.headers.get("Retry-After")),
        )


class _Failure(Exception):
    """A request that failed: the reason, a remedy, and whether the failure may be temporary."""

    def __init__(
        self, what: str, remedy: str, *, temporary: bool, retry_after: float | None = None
    ) -> None:
        super().__init__(what)
        self.remedy = remedy
        self.temporary = temporary
        self.retry_after = retry_after

    def add(self, detail: str) -> None:
        self.args = (f"{self} ({detail})",)


def _wait_seconds(attempt: int, backoff: float, retry_after: float | None) -> float:
    """Seconds to wait after the attempt-th failure (from 0) before the next attempt."""
    longest = min(backoff * 2.0 ** min(attempt, 32), _LONGEST_BACKOFF)
    # With jitter, so that requests that failed together are not repeated together.
    return max(longest * random.uniform(0.5, 1.0), retry_after or 0.0)


def _read_retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After, which may be a date; None without one that can be read."""
    if header is None:
        return None
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", header):
        return float(header)
    try:
        return max(parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _read_reply(answer: bytes) -> Reply:
    try:
        choice = json.loads(answer)["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
        if text is not None and not isinstance(text, str):
            raise TypeError(f"content is a {type(text).__name__}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        said = answer[:_LONGEST_BODY].decode(errors="replace")
        raise _Failure(
            f"not an answer of /chat/completions: {said!r}",
            "See that an OpenAI-compatible server answers at url",
            temporary=True,
        ) from None
    return Reply(text, truncated=finish == "length")


# Signs that a server refuses a draft for its length; there is no standard code for it.
_TOO_LONG = re.compile(r"context_length_exceeded|maximum context length")


def _body(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read(_BYTES).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):
        return ""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to whatever host it names."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


class _Deadline:
    """Shuts the sockets that this thread opens in the block once its seconds are over.

    A time-out is of one read, and a server that sends a byte now and then would never end.
    """

    _of_thread = threading.local()

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._end)
        self._timer.daemon = True

    @classmethod
    def note(cls, opened: socket.socket) -> None:
        """Adds a socket to the block that this thread is in."""
        cls._of_thread.current._sockets.append(opened)

    def _end(self) -> None:
        self.passed = True
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> _Deadline:
        type(self)._of_thread.current = self
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _Deadline.note(self.sock)


class _SecureConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _Deadline.note(self.sock)


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, request)


_OPENER = urllib.request.build_opener(_NoRedirects, _Http, _Https)


def _without_key(text: str, key: str) -> str:
    """A message without the key; without what the server says, behind its first colon, where that
    holds a part of the key, or an escaped form."""
    if not key:
        return text
    text = text.replace(key, "***")
    if len(key) < 2 * _PART_OF_KEY:  # such as EMPTY, for servers without keys
        return text
    escaped = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    plain = html.unescape(urllib.parse.unquote(escaped))
    parts = {key[at : at + _PART_OF_KEY] for at in range(len(key) - _PART_OF_KEY + 1)}
    if any(part in form for part in parts for form in (text, plain)):
        return f"{text.partition(': ')[0]}: what the server says holds a part of the key"
    return text
