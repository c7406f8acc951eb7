"""Reward for programs: does the answer's program pass the tests that the model has not seen?

The reference answer (`RewardInput.answer`) is a JSON object:

    {"language": "python", "tests": [{"input": "1 2\\n", "output": "3\\n"}, ...]}
    {"language": "python", "entry": "add", "tests": [{"arguments": [1, 2], "returns": 3}, ...]}

In the first form a program reads standard input and writes standard output; in the second (Python)
one of its functions is called, or with `"entry": "Solution.add"` a method of a fresh object of one
of its classes. `prelude`, optional, is source text put before every program (in Python, behind its
`__future__` imports). Tests of many megabytes may be packed (`pack_tests`), and are then one text.

Outputs are compared as LiveCodeBench compares them (`_same_output`), values of functions as numbers
of their kind (`_same_value`).

Every test is a process of its own in `r1jax.rewards.sandbox`;
expected values never go in there, so that a program can earn a pass only with the right value.

Deadlines. A test has `seconds` from the program's start; the compiler and all tests of one row have
`total_seconds`, and a test that is not run in that time has not passed. Both end with a score.
`verifier.deadline_seconds` ends without one (the row is masked), so it must come later: a run whose
deadline is not more than a second after `total_seconds` is refused.

Many samples of a group are the same program after different thoughts. A worker process keeps the
scores of its last programs and does not run them again, except where the load of the machine may
have changed the result: a program that ran out of time or memory runs again. So a program that uses
random numbers is run once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import itertools
import json
import math
import re
import secrets
import shutil
import sys
import time
import tokenize
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1jax.files import JsonValue
from r1jax.rewards.extraction import ANSWER, END_ANSWER, after_thinking
from r1jax.rewards.registry import (
    Outcome,
    RewardInput,
    RewardOptions,
    Score,
    refuse_unknown,
    reward,
)
from r1jax.rewards.sandbox import (
    PATH,
    End,
    Ended,
    Isolation,
    Limits,
    Sandbox,
    SandboxError,
    strongest,
)

if TYPE_CHECKING:  # workers start sooner without pydantic
    from r1jax.settings.rewards import VerifierSection

# Between the end of `total_seconds` and the worker's answer: a last kill, the folder's removal.
_MARGIN_SECONDS = 1.0


@dataclass(frozen=True)
class Language:
    """How programs of a language are run. `{python}` and `{folder}` stand for paths.

    Attributes:
      source: name of the file that the program is written to, in `{folder}`.
      run: the command that runs it.
      compile: a command that must succeed before; it may leave files in `{folder}`.
      call: runs `r1jax.rewards.function_call` on it; empty: functions cannot be called.
      labels: pattern of the labels that fenced blocks of this language have, in lower case.
      out_of_memory: what its run time says when it gets no more memory.
    """

    source: str
    run: tuple[str, ...]
    compile: tuple[str, ...]
    call: tuple[str, ...] = ()
    labels: str = ""
    out_of_memory: bytes = b""


# -s -P: nothing but the standard library is importable; -B: the folder is read-only. Integers may
# have any number of digits.
_PYTHON = ("{python}", "-B", "-s", "-P", "-X", "int_max_str_digits=0")
_PYTHON_COMPILE = "import sys; compile(open(sys.argv[1], 'rb').read(), 'main.py', 'exec')"
# The labels of C and C++ are often mixed up.
_C_LABELS = r"(c|cc|cpp|cxx|gnu|[cg]\+\+|gnu\+\+)(\d\w)?|.*\.(c|cc|cpp)"
_CALL = Path(__file__).with_name("function_call.py").read_text(encoding="utf-8")

LANGUAGES: dict[str, Language] = {
    "python": Language(
        source="main.py",
        compile=(*_PYTHON, "-c", _PYTHON_COMPILE, "{folder}/main.py"),
        run=(*_PYTHON, "{folder}/main.py"),
        labels=r"(python|py|pypy)[\d.]*|.*\.py",
        call=(*_PYTHON, "-c", _CALL, "{folder}/main.py"),
        out_of_memory=b"MemoryError",
    ),
    "c": Language(
        source="main.c",
        compile=("gcc", "-O2", "-std=gnu17", "-o", "{folder}/main", "{folder}/main.c", "-lm"),
        run=("{folder}/main",),
        labels=_C_LABELS,
    ),
    "cpp": Language(
        source="main.cpp",
        compile=("g++", "-O2", "-std=gnu++17", "-o", "{folder}/main", "{folder}/main.cpp"),
        run=("{folder}/main",),
        labels=_C_LABELS,
        out_of_memory=b"std::bad_alloc",
    ),
}


class Verdict(StrEnum):
    """The result of one test case."""

    PASSED = "passed"
    WRONG = "wrong"  # it ended well, with another output or value
    CRASH = "crash"  # an exit status that is not 0, a signal, or no value returned
    TIME = "time"
    MEMORY = "memory"
    OUTPUT = "output"  # it wrote more than it may
    COMPILE_ERROR = "compile_error"
    NOT_RUN = "not_run"  # `total_seconds` were over before it ended, or an earlier one failed


@dataclass(frozen=True)
class Options:
    """The options of the reward `code`.

    Attributes:
      partial: the reward is the share of tests passed, not 1 only if all pass.
      exact_output: lines of standard output are compared as text, but for white space at their end
        and empty lines at the end of the output; for a benchmark that wants it so.
      stop_at_first_failure: run no further test then; not with `partial`.
      seconds: of each test, by the clock and of CPU.
      total_seconds: of the compiler and all tests of a row together, by the clock.
      memory_mb: address space of each process; times `processes` is the most that a test takes.
      output_kb: standard output of each test.
      processes: processes and threads of a test, all together.
      minimum_isolation: the weakest tier (`r1jax.rewards.sandbox.Isolation`) to run in; the
        strongest one that works is taken.
    """

    partial: bool = False
    exact_output: bool = False
    stop_at_first_failure: bool = False
    seconds: float = 2.0
    total_seconds: float = 4.0
    memory_mb: int = 512
    output_kb: int = 1024
    processes: int = 16
    minimum_isolation: Isolation = Isolation.NAMESPACES


def read_options(options: RewardOptions) -> Options:
    """The options of a config, checked.

    Raises:
      ValueError: names the option, its value and what is allowed.
    """
    refuse_unknown("code", options, tuple(field.name for field in fields(Options)))
    read: dict[str, Any] = {}
    for field in fields(Options):
        if field.name not in options:
            continue
        value = options[field.name]
        where = f"rewards.code.options.{field.name} = {value!r}"
        if isinstance(field.default, bool):
            if not isinstance(value, bool):
                raise ValueError(f"{where}: must be true or false")
        elif isinstance(field.default, Isolation):
            if value not in list(Isolation):
                raise ValueError(f"{where}: not one of {[str(tier) for tier in Isolation]}")
            value = Isolation(value)
        else:
            whole = isinstance(field.default, int)
            number = isinstance(value, int if whole else int | float)
            if isinstance(value, bool) or not number or not 0 < value < math.inf:
                raise ValueError(f"{where}: must be a {'whole ' if whole else ''}number above 0")
        read[field.name] = value
    result = Options(**read)
    if result.seconds > result.total_seconds:
        raise ValueError(
            f"rewards.code.options.seconds = {result.seconds:g} is more than total_seconds = "
            f"{result.total_seconds:g}, which all tests of a row share"
        )
    if result.partial and result.stop_at_first_failure:
        raise ValueError(
            "rewards.code.options: partial counts every test, stop_at_first_failure does not run "
            "them; drop one"
        )
    return result


@contextmanager
def _any_number_of_digits() -> Iterator[None]:
    """Integers of JSON may have more digits than Python reads by default (4,300)."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(limit)


@dataclass(frozen=True)
class Case:
    """One hidden test.

    Attributes:
      given: standard input; or the arguments of the call.
      expected: standard output; or the value returned.
    """

    given: JsonValue
    expected: JsonValue


@dataclass(frozen=True)
class _Reference:
    """The hidden tests of a problem.

    Attributes:
      language: a key of `LANGUAGES`.
      cases: at least one.
      entry: the function or `Class.method` to call; None: tests are of standard input and output.
      prelude: what stands before every program.
    """

    language: str
    cases: tuple[Case, ...]
    entry: str | None = None
    prelude: str = ""


def pack_tests(tests: Sequence[Mapping[str, JsonValue]]) -> str:
    """The `tests` of a reference as one text, many times smaller where inputs are long."""
    # The fastest level: a benchmark's tests are gigabytes.
    return base64.b64encode(zlib.compress(json.dumps(list(tests)).encode(), level=1)).decode()


def _unpack_tests(packed: str) -> JsonValue:
    try:
        return json.loads(zlib.decompress(base64.b64decode(packed, validate=True)))
    except (binascii.Error, zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f"reference.tests: not what pack_tests makes: {error}") from None


@_any_number_of_digits()
def _read_outer(answer: str) -> tuple[dict[str, Any], str]:
    """The object of a reference, with packed tests as they are, and its language."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"reference: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"reference: must be an object, not {type(value).__name__}")
    for key in value:
        if key not in ("language", "entry", "prelude", "tests"):
            raise ValueError(
                f"reference.{key}: no such key; there are language, entry, prelude, tests"
            )
    language = value.get("language")
    if not isinstance(language, str) or language not in LANGUAGES:
        raise ValueError(f"reference.language = {language!r}: not one of {sorted(LANGUAGES)}")
    return value, language


@_any_number_of_digits()
def read_reference(answer: str) -> _Reference:
    """Reads the JSON of a reference answer; the module's docstring has its two forms.

    Raises:
      ValueError: what is wrong with it: the row cannot be scored.
    """
    value, language = _read_outer(answer)
    entry, tests, prelude = value.get("entry"), value.get("tests"), value.get("prelude", "")
    if not isinstance(prelude, str):
        raise ValueError(f"reference.prelude = {prelude!r}: must be text")
    if entry is not None:
        names = entry.split(".") if isinstance(entry, str) else []
        if not 1 <= len(names) <= 2 or not all(name.isidentifier() for name in names):
            raise ValueError(
                f"reference.entry = {entry!r}: must be the name of a function or Class.method"
            )
        if not LANGUAGES[language].call:
            raise ValueError(f"reference.entry: functions of {language} cannot be called")
    if isinstance(tests, str):
        tests = _unpack_tests(tests)
    if not isinstance(tests, list) or not tests:
        raise ValueError("reference.tests: must be a list with at least one test")
    keys = ("input", "output") if entry is None else ("arguments", "returns")
    cases = []
    for index, test in enumerate(tests):
        where = f"reference.tests[{index}]"
        if not isinstance(test, dict) or set(test) != set(keys):
            raise ValueError(f"{where}: must be an object with {keys[0]} and {keys[1]}")
        given, expected = test[keys[0]], test[keys[1]]
        if entry is None:
            for key, text in test.items():
                if not isinstance(text, str):
                    raise ValueError(f"{where}.{key} = {text!r}: must be text")
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"{where}.{key}: {error}") from None
        elif not isinstance(given, list):
            raise ValueError(f"{where}.arguments: must be a list")
        cases.append(Case(given, expected))
    return _Reference(language, tuple(cases), entry, prelude)


_OPENING = re.compile(rf"(?:.*{ANSWER}[ \t]*)? {{0,3}}(`{{3,}}(?=[^`]*$)|~{{3,}})(.*)")
_LABEL = re.compile(r"[\s{.]*(?:lang(?:uage)?-)?([^\s{}:,;]*)")  # of "python", "{.python}", "py:x"
_CLOSING = re.compile(rf" {{0,3}}(`{{3,}}|~{{3,}})\s*(?:{END_ANSWER}.*)?")


def program_of(completion: str, language: str | None = None) -> str | None:
    """The last complete fenced code block of a language after the last `</think>`, or None.

    It is not a shell command behind the program, nor what it prints: if no block has a label of the
    language, it is the last one without a label, and only without such, the last one.

    Fences are Markdown's: three backticks or tildes or more, closed by as many of the same at
    least; an answer tag may stand around them on their line. A block without its end was cut off.

    Args:
      language: a key of `LANGUAGES`; None: any of them.
    """
    tail = after_thinking(completion)
    if tail is None:
        return None
    known = [each.labels for name, each in LANGUAGES.items() if language in (None, name)]
    labels = re.compile("|".join(known))
    labelled = unlabelled = program = None
    fence = label = ""
    lines: list[str] = []
    for line in tail.split("\n"):
        if not fence:
            opening = _OPENING.fullmatch(line.rstrip("\r"))
            if opening is not None:
                found = _LABEL.match(opening[2])
                fence, label, lines = opening[1], found[1].lower() if found else "", []
            continue
        closing = _CLOSING.fullmatch(line)
        if closing is None or not closing[1].startswith(fence):
            lines.append(line)
            continue
        program, fence = "".join(each + "\n" for each in lines), ""
        if labels.fullmatch(label):
            labelled = program
        elif not label:
            unlabelled = program
    return next((each for each in (labelled, unlabelled) if each is not None), program)


def _with_prelude(prelude: str, source: str) -> str:
    """A Python program with the prelude behind its docstring and its `__future__` imports."""
    end, rest, statement = 0, source, []
    if prelude and "__future__" in source:
        starts = [0, *itertools.accumulate(len(line) + 1 for line in source.split("\n"))]
        try:
            for token in tokenize.generate_tokens(io.StringIO(source).readline):
                if token.type in (tokenize.COMMENT, tokenize.NL):
                    continue
                if token.type != tokenize.NEWLINE and token.string != ";":
                    statement.append(token)
                    continue
                if [part.string for part in statement[:2]] == ["from", "__future__"]:
                    end = starts[token.end[0] - 1] + token.end[1]
                    rest = source[end:]
                    if token.string == ";":
                        rest = rest.lstrip(" \t")
                elif end or [part.type for part in statement] != [tokenize.STRING]:
                    break
                statement = []
        except (tokenize.TokenError, SyntaxError):  # the compiler will say so
            pass
    return f"{source[:end]}\n{prelude}{rest}" if end else prelude + source


def _same_output(expected: bytes, output: bytes, *, exact: bool = False) -> bool:
    """Whether two outputs are equal, line for line, from the first to the last.

    As LiveCodeBench's `grade_stdio` has it: white space around the output and around each line
    does not count, and two lines of decimal numbers are equal if the numbers are: `1.50  2e3` is
    `1.5 2000`.

    Args:
      exact: only white space at the end of a line and of the output does not count.
    """
    texts = [side.decode(errors="surrogateescape") for side in (expected, output)]
    if exact:
        first, second = ([line.rstrip() for line in text.rstrip().split("\n")] for text in texts)
        return first == second
    first, second = ([line.strip() for line in text.strip().split("\n")] for text in texts)
    return len(first) == len(second) and all(map(_same_line, first, second))


def _same_line(expected: str, line: str) -> bool:
    if expected == line:
        return True
    try:
        numbers = [Decimal(token) for token in line.split()]
        return [Decimal(token) for token in expected.split()] == numbers
    except InvalidOperation:  # text; or a signalling nan, which is equal to nothing
        return False


def _same_value(expected: JsonValue, value: JsonValue) -> bool:
    """Whether two JSON values are equal. True is not 1; 2.0 is 2.

    A whole number wants an equal number. If a float is expected, a relative error of 1e-9 is
    allowed (a choice): the order of a sum is not part of the question; where it is 0, an absolute
    one of 1e-12.
    """
    if isinstance(expected, list) and isinstance(value, list):
        return len(expected) == len(value) and all(map(_same_value, expected, value))
    if isinstance(expected, dict) and isinstance(value, dict):
        return expected.keys() == value.keys() and all(
            _same_value(expected[key], value[key]) for key in expected
        )
    if type(expected) is type(value) and expected == value:
        return True
    if isinstance(expected, bool) or isinstance(value, bool):
        return False
    if not isinstance(expected, int | float) or not isinstance(value, int | float):
        return False
    if isinstance(expected, int):
        return expected == value
    try:
        return math.isclose(expected, value, rel_tol=1e-9, abs_tol=0.0 if expected else 1e-12)
    except OverflowError:  # a whole number beyond all floats
        return False


def _verdict(ended: Ended, language: Language) -> Verdict | None:
    """The verdict that follows from how the program ended; None if it ended well."""
    if ended.end is End.TIME:
        return Verdict.TIME
    if ended.end is End.OUTPUT:
        return Verdict.OUTPUT
    if ended.code == 0:
        return None
    if language.out_of_memory and language.out_of_memory in ended.errors:
        return Verdict.MEMORY
    return Verdict.CRASH


class _Program:
    """A program in its sandbox, and the end of its row's time."""

    def __init__(self, sandbox: Sandbox, reference: _Reference, options: Options) -> None:
        self._sandbox = sandbox
        self._entry = reference.entry
        self._language = LANGUAGES[reference.language]
        self._options = options
        self._until = time.monotonic() + options.total_seconds

    def _left(self) -> float:
        return self._until - time.monotonic()

    def _command(self, parts: tuple[str, ...]) -> list[str]:
        names = {"{python}": self._sandbox.python, "{folder}": self._sandbox.folder}
        command = []
        for part in parts:
            for name, path in names.items():
                part = part.replace(name, path)
            command.append(part)
        return command

    def _limits(self, seconds: float, processes: int | None) -> Limits:
        options = self._options
        return Limits(
            seconds=seconds,
            memory_bytes=options.memory_mb << 20,
            output_bytes=options.output_kb << 10,
            processes=processes,
        )

    def compile(self, source: str) -> Verdict | None:
        """Compiles the program; None if that succeeds."""
        compiler = self._language.compile[0]
        if not compiler.startswith("{") and shutil.which(compiler, path=PATH) is None:
            raise SandboxError(f"{compiler} is not installed")
        # Half of a surrogate pair, from a cut token, is no text: the compiler refuses it.
        self._sandbox.write(self._language.source, source.encode(errors="surrogatepass"))
        ended = self._sandbox.run(
            self._command(self._language.compile),
            self._limits(self._left(), processes=None),
            keeps_files=True,
        )
        if ended.end is End.TIME:  # and so nothing is left for the tests
            return Verdict.NOT_RUN
        return None if _verdict(ended, self._language) is None else Verdict.COMPILE_ERROR

    def passes(self, case: Case) -> Verdict:
        """Runs one test."""
        seconds = min(self._options.seconds, self._left())
        if seconds <= 0:
            return Verdict.NOT_RUN
        limits = self._limits(seconds, self._options.processes)
        verdict = self._prints(case, limits) if self._entry is None else self._returns(case, limits)
        if verdict is Verdict.TIME and seconds < self._options.seconds:
            return Verdict.NOT_RUN  # it had less than its time
        return verdict

    def _prints(self, case: Case, limits: Limits) -> Verdict:
        ended = self._sandbox.run(
            self._command(self._language.run), limits, str(case.given).encode()
        )
        verdict = _verdict(ended, self._language)
        if verdict is not None:
            return verdict
        expected, exact = str(case.expected).encode(), self._options.exact_output
        same = _same_output(expected, ended.output, exact=exact)
        return Verdict.PASSED if same else Verdict.WRONG

    @_any_number_of_digits()
    def _returns(self, case: Case, limits: Limits) -> Verdict:
        mark = secrets.token_hex(16)
        call = {"entry": self._entry, "arguments": case.given, "mark": mark}
        command = self._command(self._language.call)
        ended = self._sandbox.run(command, limits, json.dumps(call).encode())
        verdict = _verdict(ended, self._language)
        if verdict is not None:
            return verdict
        if not ended.output.startswith(mark.encode()):
            return Verdict.CRASH
        # Reading an integer takes the square of its length: one that is too long to be right is not
        # read. A float that is expected may be equal to 309 digits.
        longest = len(json.dumps(case.expected)) + 310
        try:
            value = json.loads(
                ended.output[len(mark) :],
                parse_int=lambda digits: int(digits) if len(digits) <= longest else math.nan,
            )
            same = _same_value(case.expected, value)
        except (ValueError, RecursionError):
            return Verdict.WRONG
        return Verdict.PASSED if same else Verdict.WRONG


def run_tests(source: str, reference: _Reference, options: Options) -> tuple[list[Verdict], str]:
    """A verdict per test, in order, and the tier of isolation that they ran in.

    Raises:
      SandboxError: no tier that is strong enough works, no compiler, or a run that failed.
    """
    isolation = strongest(options.minimum_isolation)
    verdicts: list[Verdict] = []
    with Sandbox(isolation) as sandbox:
        program = _Program(sandbox, reference, options)
        if reference.language == "python":
            source = _with_prelude(reference.prelude, source)
        else:
            source = reference.prelude + source
        refused = program.compile(source)
        if refused is not None:
            return [refused] * len(reference.cases), isolation
        for case in reference.cases:
            verdicts.append(program.passes(case))
            if options.stop_at_first_failure and verdicts[-1] is not Verdict.PASSED:
                break
    return verdicts + [Verdict.NOT_RUN] * (len(reference.cases) - len(verdicts)), isolation


# Verdicts that do not depend on the load of the machine.
_LASTING = frozenset(
    {Verdict.PASSED, Verdict.WRONG, Verdict.CRASH, Verdict.OUTPUT, Verdict.COMPILE_ERROR}
)


def _lasting(verdicts: Sequence[Verdict], options: Options) -> bool:
    """Whether another run of the program would have the same verdicts."""
    if options.stop_at_first_failure:  # what has not run after it would not run again either
        passed = sum(1 for _ in itertools.takewhile(Verdict.PASSED.__eq__, verdicts))
        verdicts = verdicts[: passed + 1]
    return _LASTING.issuperset(verdicts)


_MOST_CACHED = 4096  # under 1 KB each: neither programs nor tests are kept
_cached_scores: dict[tuple[bytes, Options], Score] = {}
"""(digest of program and reference, options) -> score; the last one used is at the end."""


def _digest(*texts: str) -> bytes:
    # As JSON, half of a surrogate pair is text, too.
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()


def _run_and_score(source: str, reference: _Reference, options: Options) -> tuple[Score, bool]:
    """The score, and whether it may be cached."""
    verdicts, isolation = run_tests(source, reference, options)
    counts = Counter(verdicts)
    passed = counts[Verdict.PASSED]
    right = passed == len(verdicts)
    by_verdict = {str(verdict): counts[verdict] for verdict in Verdict if counts[verdict]}
    score = Score(
        reward=passed / len(verdicts) if options.partial else float(right),
        outcome=Outcome.RIGHT if right else Outcome.WRONG,
        detail=json.dumps({"isolation": isolation, "tests": len(verdicts), **by_verdict}),
    )
    return score, _lasting(verdicts, options)


def _check(options: RewardOptions) -> None:
    minimum = read_options(options).minimum_isolation
    try:
        strongest(minimum)
    except SandboxError as error:
        weaker = (
            ""
            if minimum is Isolation.LIMITS
            else ", or accept with minimum_isolation: limits that programs may reach the user's "
            "files and processes where the kernel has no Landlock"
        )
        raise ValueError(
            f"rewards.code.options.minimum_isolation = {str(minimum)!r}: programs cannot be "
            f"isolated so here. {error}. Install bubblewrap 0.8 or newer (r1jax[sandbox] brings "
            f"it) and allow user namespaces{weaker}"
        ) from None


def _check_section(options: RewardOptions, section: VerifierSection) -> None:
    read = read_options(options)
    needed = read.total_seconds + _MARGIN_SECONDS
    if section.deadline_seconds < needed:
        raise ValueError(
            f"verifier.deadline_seconds = {section.deadline_seconds:g}: the reward code takes up "
            f"to rewards.code.options.total_seconds = {read.total_seconds:g}, and a worker that is "
            f"killed scores nothing; give at least {needed:g}"
        )
    if section.memory_mb < read.memory_mb:
        raise ValueError(
            f"rewards.code.options.memory_mb = {read.memory_mb}: programs cannot have more than "
            f"their worker's verifier.memory_mb = {section.memory_mb}"
        )


def _unreadable(answer: str, options: RewardOptions) -> str | None:
    try:
        read_reference(answer)
    except ValueError as error:
        return str(error)
    return None


@reward("code", check=_check, check_section=_check_section, check_reference=_unreadable)
def code(row: RewardInput, options: RewardOptions) -> Score:
    """1 if the program, the last code block of its language, passes all hidden tests, else 0.

    Options: see `Options`. `Score.detail` is a JSON object: `isolation`, the number of `tests`, and
    how many had each `Verdict`.
    """
    read = read_options(options)
    source = program_of(row.completion, _read_outer(row.answer)[1])
    if source is None:
        read_reference(row.answer)  # a bad reference is not the model's mistake
        return Score(0.0, Outcome.UNPARSEABLE)
    key = (_digest(source, row.answer), read)
    score = _cached_scores.pop(key, None)
    lasting = score is not None
    if score is None:
        score, lasting = _run_and_score(source, read_reference(row.answer), read)
    if lasting:
        if len(_cached_scores) >= _MOST_CACHED:
            del _cached_scores[next(iter(_cached_scores))]
        _cached_scores[key] = score
    return replace(score, extracted=source)
