"""The reward for programs: what passes, what does not, and who cannot be fooled."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.rewards import REWARDS, Outcome, RewardInput, Score, Verifier, check_reward, score_file
from r1jax.rewards import code as module
from r1jax.rewards.code import (
    Options,
    Verdict,
    _same_output,
    _same_value,
    pack_tests,
    program_of,
    read_options,
    read_reference,
)
from r1jax.rewards.sandbox import Isolation, SandboxError, strongest
from r1jax.settings.rewards import RewardSection, VerifierSection

try:
    TIER = strongest(Isolation.NAMESPACES)
except SandboxError as error:
    NOT_ISOLATED: str | None = str(error)
else:
    NOT_ISOLATED = None
isolated = pytest.mark.skipif(NOT_ISOLATED is not None, reason=NOT_ISOLATED or "")


@pytest.fixture(autouse=True)
def _nothing_is_cached() -> None:
    module._cached_scores.clear()


SUM = [("1 2\n", "3\n"), ("3 4\n", "7\n"), ("10 -10\n", "0\n")]
RIGHT_SUM = "print(sum(map(int, input().split())))"


def prints_of(*pairs: tuple[str, str], language: str = "python") -> str:
    tests = [{"input": given, "output": expected} for given, expected in pairs]
    return json.dumps({"language": language, "tests": tests})


def calls_of(entry: str, *pairs: tuple[list[Any], Any]) -> str:
    tests = [{"arguments": arguments, "returns": returns} for arguments, returns in pairs]
    return json.dumps({"language": "python", "entry": entry, "tests": tests})


def answer(program: str, label: str = "python") -> str:
    return f"<think>Hm.</think>So:\n```{label}\n{program}\n```\n"


def score(program: str, reference: str, **options: Any) -> tuple[Score, dict[str, Any]]:
    # Generous: a crowded machine is no wrong answer.
    options = {"seconds": 10.0, "total_seconds": 60.0, **options}
    found = REWARDS["code"].function(RewardInput("p", answer(program), reference), options)
    detail = json.loads(found.detail or "{}")
    assert detail.pop("isolation", TIER) == TIER
    return found, detail


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("<think>a</think>\n```python\nprint(1)\n```", "print(1)\n"),
        ("```\nx\n```", "x\n"),
        ("~~~py\nx\n~~~", "x\n"),
        ("```python\nfirst\n```\nand\n```python\nsecond\n```\nbye", "second\n"),
        ("<think>\n```\nthought\n```\n</think>\nno block", None),
        ("<think>\n```\nnever closed\n```\n", None),
        ("no block", None),
        ("", None),
        ("inline ```x``` only", None),
        ("```python\ncut off", None),
        ("```\nwhole\n```\n```python\ncut off", "whole\n"),
        ("```\n```", ""),
        ("````md\n```\nx\n```\n````", "```\nx\n```\n"),
        # Of its language: not what it prints, nor a shell command.
        ("```python\nx\n```\nIt prints\n```\n42\n```", "x\n"),
        ("```py\nx\n```\n```bash\npython main.py\n```\n```text\n42\n```", "x\n"),
        ("```\nx\n```\n```console\n$ python main.py\n```", "x\n"),
        ("```python3\nfirst\n```\n```Python 3.11\nsecond\n```\n~~~output\n3\n~~~", "second\n"),
        ("``` {.python .numberLines}\nx\n```\n```\ny\n```", "x\n"),
        ("```python:main.py\nx\n```\n```main.py\ny\n```\n```pycon\n>>> 1\n```", "y\n"),
        ("```cpp\nx\n```", "x\n"),  # the label may be the mistake
        ("~~~\n```\nx\n~~~", "```\nx\n"),
        ("   ```\n  x\n  ```\n", "  x\n"),
        ("    ```\nx\n    ```", None),
        ("```python\nx\n```not the end\ny\n```", "x\n```not the end\ny\n"),
        ("<answer>```python\nx\n```</answer>", "x\n"),
        ("It is <answer> ```\nx\n``` </answer>.", "x\n"),
        ("```python\r\nx\r\n```\r\n", "x\r\n"),
        ("```python\n\n\nx\n\n```", "\n\nx\n\n"),
    ],
)
def test_program_is_the_last_whole_block_after_the_thought(
    completion: str, program: str | None
) -> None:
    assert program_of(completion, "python") == program


def test_a_program_is_found_by_its_language() -> None:
    text = "```c\none\n```\n```python\ntwo\n```\n```bash\nthree\n```\n```\nfour\n```"
    assert [program_of(text, each) for each in ("c", "cpp", "python", None)] == [
        "one\n",
        "one\n",
        "two\n",
        "two\n",
    ]
    assert program_of("```c\nx\n```\n```console\n$ ./main\n```\n```css\ny\n```", "c") == "x\n"
    assert program_of("```C++17\nx\n```", "cpp") == program_of("```GNU++20\nx\n```", "cpp") == "x\n"


def test_long_completions_are_read_in_linear_time() -> None:
    lines = ["<answer>" * 50_000, "`" * 200_000 + "`x`", "```", *["~~~"] * 50_000, "```"]
    assert program_of("\n".join(lines)) == "~~~\n" * 50_000


@pytest.mark.parametrize(
    ("expected", "output", "same"),
    [
        (b"1\n2\n3\n", b"1\n2\n3\n", True),
        (b"1\n2\n3\n", b"1\n2\n3", True),
        (b"1\n2\n3", b"1  \n2\t\r\n3\n\n \n", True),
        (b"1\n2\n3\n", b"1\n", False),  # the first line only
        (b"1\n2\n3\n", b"", False),
        (b"1\n", b"1\n2\n", False),
        (b"1\n2\n", b"1\n\n2\n", False),
        (b"1\n", b" 1\n", True),
        (b"1 2\n", b"1  2\n", True),
        (b"1\n2\n", b"1 2\n", False),
        (b"\n1", b"1", True),
        (b"a b", b"a  b", False),
        (b"0.5", b"0.500000", True),
        (b"0.5 -3\n1e3", b"+.50 -3.0\n1000", True),
        (b"0.5", b"0.5000001", False),
        (b"0.1 x", b"0.10 x", False),  # not a line of numbers
        (b"50000000000000000", b"50000000000000001", False),
        (b"5 5", b"5", False),
        (b"Yes", b"yes", False),
        (b"nan", b"nan", True),
        (b"1 nan", b"1.0 nan", False),
        (b"1", b"sNaN", False),
        (b"9" * 5000, b"9" * 5000 + b".0", True),
        (b"9" * 5000, b"9" * 4999 + b"8", False),
        (b"1e999999999", b"1e999999998", False),
        (b"", b"\n\n", True),
        (b"", b"x", False),
        ("ä".encode(), "ä".encode("latin-1"), False),
    ],
)
def test_outputs_are_compared_whole(expected: bytes, output: bytes, same: bool) -> None:
    assert _same_output(expected, output) is same


def test_a_benchmark_may_want_the_exact_output() -> None:
    for expected, output in ((b"0.5", b"0.50"), (b"1 2", b"1  2"), (b"1", b" 1"), (b"\n1", b"1")):
        assert _same_output(expected, output) and not _same_output(expected, output, exact=True)
    assert _same_output(b"1\n2", b"1 \r\n2\n\n", exact=True)


@given(st.lists(st.text("ab ", max_size=3).map(str.encode), max_size=5), st.data())
def test_no_part_of_an_output_is_the_output(lines: list[bytes], data: st.DataObject) -> None:
    whole = b"\n".join(lines)
    assert _same_output(whole, whole + data.draw(st.sampled_from([b"", b"\n", b" \n\n"])))
    shown = [line for line in lines if line.strip()]
    if shown:
        cut = b"\n".join(lines[: max(i for i, line in enumerate(lines) if line.strip())])
        assert not _same_output(whole, cut) and not _same_output(cut, whole)


@pytest.mark.parametrize(
    ("expected", "value", "same"),
    [
        (3, 3, True),
        (3, 4, False),
        (3, 3.0, True),
        (1, True, False),
        (True, 1.0, False),
        (0, False, False),
        (0, None, False),
        (0.3, 0.1 + 0.2, True),
        (0.3, 0.3001, False),
        (1.0, "1.0", False),
        (1, "1", False),
        (2**60, 2**60 + 1, False),
        (2.0, 10**400, False),
        (10**400, 2.0, False),
        # A whole number wants an equal one.
        (10**9 + 7, 10**9 + 7.4, False),
        (918273645546372819, 918273645546372819.0, False),
        (918273645546372819, 9.182736460e17, False),
        (2**53, float(2**53), True),
        (0, 1e-15, False),
        (0, -0.0, True),
        # No absolute tolerance, unless 0 is expected.
        (1e-13, 0.0, False),
        (1e-300, 0.0, False),
        (1e-13, 1.0000000001e-13, True),
        (0.0, 1e-15, True),
        (0.0, 1e-9, False),
        (2.5, 2, False),
        (2.0, 2, True),
        (0.0, False, False),
        (math.inf, math.inf, True),
        (math.nan, math.nan, False),
        ([1, [2, "x"]], [1, [2, "x"]], True),
        ([1, 2, 3], [1, 2], False),
        ([1, 2], [2, 1], False),
        ([1], 1, False),
        ([], {}, False),
        ({"a": [1.0], "b": None}, {"b": None, "a": [1]}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": 1}, {"a": True}, False),
        (None, None, True),
    ],
)
def test_values_are_compared_with_their_types(expected: Any, value: Any, same: bool) -> None:
    assert _same_value(expected, value) is same


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("print(1)", "reference: not valid JSON"),
        ("[" * 100_000, "reference: not valid JSON"),
        ("[1]", "reference: must be an object, not list"),
        ('{"tests": []}', r"reference.language = None: not one of \['c', 'cpp', 'python'\]"),
        ('{"language": "cobol"}', "reference.language = 'cobol'"),
        ('{"language": ["c"]}', r"reference.language = \['c'\]"),
        ('{"language": "python"}', "reference.tests: must be a list with at least one"),
        ('{"language": "python", "tests": []}', "reference.tests: must be a list"),
        ('{"language": "python", "tests": [1]}', r"tests\[0\]: must be an object with input and"),
        ('{"language": "c", "tests": [{"input": ""}]}', r"tests\[0\]: .*input and output"),
        (prints_of(("", 1)), r"tests\[0\].output = 1: must be text"),  # type: ignore[arg-type]
        (prints_of(("", ""), ("\ud800", "")), r"tests\[1\].input: .*surrogates"),
        ('{"language": "c", "test": []}', "reference.test: no such key"),
        ('{"language": "c", "entry": "f"}', "reference.entry: functions of c cannot be called"),
        (calls_of("a.b.c", ([], 1)), "reference.entry = 'a.b.c': must be the name"),
        (calls_of("a.", ([], 1)), "reference.entry = 'a.': must be the name"),
        (calls_of("a b", ([], 1)), "reference.entry = 'a b': must be the name"),
        ('{"language": "c", "tests": "eJw="}', "reference.tests: not what pack_tests makes"),
        ('{"language": "c", "tests": "?"}', "reference.tests: not what pack_tests makes"),
        ('{"language": "c", "prelude": 1, "tests": []}', "reference.prelude = 1: must be text"),
        (calls_of("f", (3, 1)), r"tests\[0\].arguments: must be a list"),  # type: ignore[arg-type]
        (
            prints_of(*SUM).replace('"language"', '"entry": "f", "language"'),
            "arguments and returns",
        ),
    ],
)
def test_a_bad_reference_is_an_error_and_not_a_wrong_answer(reference: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_reference(reference)
    # Also where there is no program to judge: all samples of a question fare alike.
    with pytest.raises(ValueError, match=message):
        REWARDS["code"].function(RewardInput("p", "no block", reference), {})
    assert re.search(message, REWARDS["code"].check_reference(reference, {}) or "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partal": True}, "rewards.code.options.partal: no such option.*partial"),
        ({"partial": 1}, "rewards.code.options.partial = 1: must be true or false"),
        ({"seconds": 0}, "rewards.code.options.seconds = 0: must be a number above 0"),
        ({"seconds": True}, "options.seconds = True: must be a number"),
        ({"seconds": math.nan}, "options.seconds = nan: must be a number"),
        ({"seconds": math.inf}, "options.seconds = inf: must be a number"),
        ({"memory_mb": 64.5}, "options.memory_mb = 64.5: must be a whole number"),
        ({"processes": "8"}, "options.processes = '8': must be a whole number"),
        ({"seconds": 5}, "seconds = 5 is more than total_seconds = 4"),
        ({"minimum_isolation": "docker"}, "= 'docker': not one of .*'bubblewrap', 'namespaces'"),
        ({"partial": True, "stop_at_first_failure": True}, "drop one"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_reward("code", options)


def test_options_are_read() -> None:
    assert read_options({}) == Options()
    read = read_options({"seconds": 1, "minimum_isolation": "limits", "partial": True})
    assert read == Options(partial=True, seconds=1, minimum_isolation=Isolation.LIMITS)


def test_without_isolation_it_refuses_and_says_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_works(minimum: Isolation) -> Isolation:
        if minimum is Isolation.LIMITS:
            return minimum
        raise SandboxError("bubblewrap: bwrap is not installed")

    monkeypatch.setattr(module, "strongest", nothing_works)
    with pytest.raises(ValueError) as refusal:
        check_reward("code", {})
    for part in (
        "rewards.code.options.minimum_isolation = 'namespaces'",
        "bwrap is not installed",
        "Install bubblewrap",
        "minimum_isolation: limits",
    ):
        assert part in str(refusal.value)
    check_reward("code", {"minimum_isolation": "limits"})
    # Nor does a row run in less than was asked for.
    with pytest.raises(SandboxError, match="not installed"):
        row = RewardInput("p", answer(RIGHT_SUM), prints_of(*SUM))
        REWARDS["code"].function(row, {})


@isolated
def test_deadlines_and_memory_that_cannot_be_kept_are_refused() -> None:
    check_reward("code", {}, VerifierSection())
    with pytest.raises(ValueError, match="deadline_seconds = 4.5: .*total_seconds = 4,.*least 5"):
        check_reward("code", {}, VerifierSection(deadline_seconds=4.5))
    with pytest.raises(ValueError, match="give at least 31"):
        check_reward("code", {"total_seconds": 30}, VerifierSection(deadline_seconds=30))
    check_reward("code", {"total_seconds": 30}, VerifierSection(deadline_seconds=31))
    with pytest.raises(ValueError, match="memory_mb = 512: .*verifier.memory_mb = 256"):
        check_reward("code", {}, VerifierSection(memory_mb=256))
    with pytest.raises(ValueError, match="deadline_seconds = 2"):  # at the start of a run
        Verifier({"code": RewardSection()}, VerifierSection(deadline_seconds=2.0))


@isolated
def test_every_fate_is_told_apart_and_costs_only_its_own_case() -> None:
    program = """
import os, sys, time
word = input()
if word == "sleep": time.sleep(600)
if word == "loop":
    while True: pass
if word == "crash": raise ValueError(word)
if word == "abort": os.abort()
if word == "exit": sys.exit(1)
if word == "memory": hoard = [bytes(1 << 20) for _ in range(10_000)]
if word == "flood":
    while True: print("x" * 1000)
if word == "bytes": sys.stdout.buffer.write(b"\\xff\\xfe\\n")
if word == "first": print("one")
if word == "silent": sys.exit(0)
if word == "right": print("one\\ntwo")
"""
    words = ["right", "sleep", "right", "loop", "crash", "abort", "exit", "memory", "flood"]
    words += ["bytes", "first", "silent", "right"]
    reference = prints_of(*[(word, "one\ntwo\n") for word in words])
    found, detail = score(program, reference, partial=True, seconds=1.2, memory_mb=256)
    assert detail == {
        "tests": 13,
        "passed": 3,
        "wrong": 3,
        "crash": 3,
        "time": 2,
        "memory": 1,
        "output": 1,
    }
    assert found.reward == pytest.approx(3 / 13)
    assert (found.outcome, found.extracted) == (Outcome.WRONG, program + "\n")

    first = [("right", "one\ntwo"), ("crash", ""), ("right", "one\ntwo")]
    found, detail = score(program, prints_of(*first))
    assert (found.reward, detail) == (0.0, {"tests": 3, "passed": 2, "crash": 1})
    found, detail = score(program, prints_of(*first), stop_at_first_failure=True)
    assert (found.reward, detail) == (0.0, {"tests": 3, "passed": 1, "crash": 1, "not_run": 1})
    found, detail = score(program, prints_of(first[0], first[2]))
    assert (found.reward, found.outcome, detail) == (1.0, "right", {"tests": 2, "passed": 2})


@isolated
def test_syntax_errors_are_found_before_any_test() -> None:
    for program in ("while True print(1)", "return 1", "\0", "x = '\ud800'", "(" * 500):
        found, detail = score(program, prints_of(*SUM), partial=True)
        assert (found.reward, found.outcome) == (0.0, Outcome.WRONG)
        assert detail == {"tests": 3, "compile_error": 3}


@isolated
def test_time_of_a_row_is_shared_and_what_it_leaves_out_has_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = "import time\nif input() == 'slow': time.sleep(600)\nprint(1)"
    found, detail = score(program, prints_of(*[("slow", "1")] * 9), seconds=0.5, total_seconds=0.5)
    assert (found.outcome, detail) == (Outcome.WRONG, {"tests": 9, "not_run": 9})

    # What is left for the compiler, and before each test.
    left = iter([60.0, 60.0, 0.3, 0.0, -1.0])
    monkeypatch.setattr(module._Program, "_left", lambda self: next(left))
    reference = prints_of(("fast", "1"), ("slow", "1"), ("fast", "1"), ("fast", "1"))
    found, detail = score(program, reference, partial=True)
    assert (found.reward, detail) == (0.25, {"tests": 4, "passed": 1, "not_run": 3})


@isolated
def test_functions_are_called() -> None:
    program = """
from dataclasses import dataclass
@dataclass
class Pair:
    first: int
    second: int
print("noise")
def add(a, b):
    print("more noise")
    pair = Pair(a, b)
    return pair.first + pair.second
if __name__ == "__main__":
    add(*map(int, input().split()))
"""
    reference = calls_of("add", ([1, 2], 3), (["x", "y"], "xy"), ([[1], [2]], [1, 2]))
    assert score(program, reference)[0].reward == 1.0
    assert score(program, calls_of("add", ([1, 2], 3), ([1, 2], 4)), partial=True)[0].reward == 0.5
    # Tuples are lists in JSON; a bool is no number.
    nest = "def f(x): return {'t': (x, None), 'b': x == 1}"
    assert score(nest, calls_of("f", ([1], {"t": [1, None], "b": True})))[0].reward == 1.0
    assert score(nest, calls_of("f", ([1], {"t": [1, None], "b": 1})))[0].reward == 0.0


@isolated
def test_methods_are_called_on_a_fresh_object() -> None:
    program = """
class Solution:
    def __init__(self):
        self.seen = []
    def add(self, a: List[int], b: int) -> int:
        self.seen.append(b)
        return len(a) + sum(self.seen)
"""
    reference = json.loads(calls_of("Solution.add", ([[1, 2], 3], 5), ([[], 4], 4)))
    # `List` is nowhere, as in the solutions of some contests, until the prelude brings it.
    assert score(program, json.dumps(reference))[1] == {"tests": 2, "crash": 2}
    reference["prelude"] = "from typing import *\n"
    assert score(program, json.dumps(reference))[0].reward == 1.0


@isolated
def test_integers_may_have_any_number_of_digits() -> None:
    large = 7**6000  # 5,071 digits
    with module._any_number_of_digits():
        digits = str(large)
        squares = calls_of("f", ([large], large**2))
    assert score("print(7**6000)", prints_of(("", digits)))[0].reward == 1.0
    assert score("print(int(input()) + 1)", prints_of((digits, digits[:-1] + "2")))[0].reward == 1.0
    assert score("def f(x): return x * x", squares)[0].reward == 1.0
    assert score("def f(x): return x * x + 1", squares)[0].reward == 0.0
    # It is not read, which would take seconds.
    huge = "import json\njson.dumps = lambda *_: '9' * 900_000\ndef f(x): return 0"
    begin = time.monotonic()
    assert score(huge, calls_of("f", ([1], 1)))[1] == {"tests": 1, "wrong": 1}
    assert time.monotonic() - begin < 10
    assert sys.get_int_max_str_digits() == 4300


@pytest.mark.parametrize(
    ("source", "whole"),
    [
        ("x", "P\nx"),
        ("from __future__ import annotations\nx", "from __future__ import annotations\n\nP\nx"),
        (
            '#!python\n"""Doc; string."""\n\nfrom __future__ import (\n  division,\n)  # why\n'
            "from __future__ import annotations; x\ny",
            '#!python\n"""Doc; string."""\n\nfrom __future__ import (\n  division,\n)  # why\n'
            "from __future__ import annotations;\nP\nx\ny",
        ),
        (
            "import os\nfrom __future__ import division",
            "P\nimport os\nfrom __future__ import division",
        ),
        ("s = '''\nfrom __future__ import x\n'''", "P\ns = '''\nfrom __future__ import x\n'''"),
        ("from __future__ import annotations", "from __future__ import annotations\nP\n"),
        ("# from __future__\n'''", "P\n# from __future__\n'''"),
    ],
)
def test_a_prelude_stands_behind_future_imports(source: str, whole: str) -> None:
    assert module._with_prelude("P\n", source) == whole


@isolated
def test_future_imports_hold_below_a_prelude() -> None:
    program = '"""Adds."""\nfrom __future__ import annotations\ndef f(x: Missing): return sqrt(x)'
    reference = {**json.loads(calls_of("f", ([4], 2))), "prelude": "from math import *\n"}
    assert score(program, json.dumps(reference))[0].reward == 1.0


def test_packed_tests_are_the_same_tests() -> None:
    reference = json.loads(prints_of(*SUM, ("1 " * 100_000, "\u00e4\n")))
    packed = json.dumps({**reference, "tests": pack_tests(reference["tests"])})
    assert read_reference(packed) == read_reference(json.dumps(reference))
    assert len(packed) < 3_000


@isolated
@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("import os; os._exit(0)", "crash"),
        ("raise SystemExit(0)", "crash"),
        ("def f(x): import os; print(2 * x); os._exit(0)", "crash"),
        ("def f(x): print(2 * x)", "wrong"),
        ("def g(x): return 2 * x", "crash"),
        ("def f(x): return lambda: 2 * x", "crash"),
        ("def f(x): return {2 * x}", "crash"),
        ("def f(x): return float('nan')", "wrong"),
        (
            "class F(int):\n __eq__ = lambda *_: True\n__hash__ = None\ndef f(x): return F(7)",
            "wrong",
        ),
        ("import json\njson.dumps = lambda *_: '2'\ndef f(x): return 0", "wrong"),
        # All descriptors, with every mark that the frames below hold but not the value.
        (
            "import os, sys\n"
            "mark = sys._getframe(1).f_locals['request']['mark']\n"
            "for d in range(3, 20):\n"
            "    try: os.write(d, (mark + 'true').encode())\n"
            "    except OSError: pass\n"
            "os._exit(0)",
            "wrong",
        ),
        ("def f(x): return '[' * 100_000", "wrong"),
        ("import os\nos.write(1, b'[' * 100_000)\ndef f(x): return 0", "wrong"),
        ("import json\njson.dumps = lambda *_: '[' * 100_000\ndef f(x): return 0", "wrong"),
    ],
)
def test_a_result_cannot_be_forged(program: str, verdict: str) -> None:
    reference = calls_of("f", ([1], 2), ([2], 4))
    found, detail = score(program, reference, partial=True)
    lucky = detail.get("passed", 0)  # a constant is the right value of one test
    assert lucky == ("'2'" in program) and detail.pop(verdict) == 2 - lucky
    assert found.reward == lucky / 2 and found.outcome is Outcome.WRONG


@isolated
def test_expected_values_never_enter_the_sandbox() -> None:
    program = """
import os, sys
sources = [sys.stdin.read(), repr(sys.argv), repr(os.environ)]
for folder in ("/program", "/tmp", "/proc/self", "/proc/1", f"/proc/{os.getppid()}"):
    for name in os.listdir(folder):
        try:
            with open(f"{folder}/{name}", "rb") as file: sources.append(repr(file.read(1 << 20)))
        except OSError: pass
print("".join(sources).count("decaf" + "bad"), len(sources) > 5)
"""
    # It looks for what the second test expects, and finds none.
    _, detail = score(program, prints_of(("", "0 True"), ("", "decafbad")), partial=True)
    assert detail == {"tests": 2, "passed": 1, "wrong": 1}


def needs(compiler: str) -> pytest.MarkDecorator:
    missing = shutil.which(compiler, path="/usr/local/bin:/usr/bin:/bin") is None
    return pytest.mark.skipif(missing, reason=f"{compiler} is not installed")


@isolated
@pytest.mark.parametrize(
    ("language", "program", "expected"),
    [
        pytest.param(
            "c",
            "#include <stdio.h>\n#include <math.h>\n"
            'int main() { double a, b; scanf("%lf %lf", &a, &b); printf("%g\\n", fabs(a + b)); }',
            {"passed": 3},
            marks=needs("gcc"),
        ),
        pytest.param("c", "int main() { return x; }", {"compile_error": 3}, marks=needs("gcc")),
        pytest.param("c", "int main() { *(int *)0 = 1; }", {"crash": 3}, marks=needs("gcc")),
        pytest.param("c", '#include "/etc/passwd"', {"compile_error": 3}, marks=needs("gcc")),
        pytest.param(
            "cpp",
            "#include <iostream>\n#include <vector>\nint main() { int a, b; std::cin >> a >> b;\n"
            "if (a == 3) return 1;\n"
            "std::vector<int> hoard; while (a == 10) hoard.push_back(a);\n"
            "std::cout << a + b << std::endl; }",
            {"passed": 1, "crash": 1, "memory": 1},
            marks=needs("g++"),
        ),
    ],
)
def test_compiled_languages(language: str, program: str, expected: dict[str, int]) -> None:
    _, detail = score(program, prints_of(*SUM, language=language))
    assert detail == {"tests": 3, **expected}


@isolated
def test_a_missing_compiler_is_nobodys_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    fortran = module.Language("main.f", run=("{folder}/main",), compile=("gfortran-0",))
    monkeypatch.setitem(module.LANGUAGES, "fortran", fortran)
    with pytest.raises(SandboxError, match="gfortran-0 is not installed"):
        score("end", prints_of(*SUM, language="fortran"))


def test_no_block_is_unparseable() -> None:
    score = REWARDS["code"].function(RewardInput("p", "print(3)", prints_of(*SUM)), {})
    assert (score.reward, score.outcome) == (0.0, Outcome.UNPARSEABLE)


class Runs:
    """Stands for `run_tests`: has the verdicts it is told, and the programs that were run."""

    def __init__(self, *verdicts: str) -> None:
        self.verdicts = [Verdict(verdict) for verdict in verdicts]
        self.programs: list[str] = []

    def __call__(self, source: str, reference: Any, options: Options) -> tuple[Any, str]:
        self.programs.append(source)
        return list(self.verdicts), "limits"


def judged(
    program: str, tests: Any = SUM, thought: str = "Hm.", **options: Any
) -> tuple[float, str | None]:
    completion = f"<think>{thought}</think>\n```\n{program}\n```"
    score = REWARDS["code"].function(RewardInput("p", completion, prints_of(*tests)), options)
    assert json.loads(score.detail or "")["isolation"] == "limits"
    return score.reward, score.extracted


def test_an_identical_program_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs("passed", "wrong", "passed", "passed")
    monkeypatch.setattr(module, "run_tests", runs)
    assert judged("x", partial=True) == (0.75, "x\n")
    assert judged("x", thought="Another.", partial=True) == (0.75, "x\n")
    assert judged("x", partial=True, seconds=2) == (0.75, "x\n")  # as by default
    assert len(runs.programs) == 1
    # Another program, other tests, other options.
    assert judged("x ", partial=True) == (0.75, "x \n")
    judged("x\ud800", partial=True)
    judged("x", SUM[:2], partial=True)
    assert judged("x") == (0.0, "x\n")
    judged("x", seconds=1.5)
    assert runs.programs == ["x\n", "x \n", "x\ud800\n", "x\n", "x\n", "x\n"]
    judged("x ", partial=True)
    assert len(runs.programs) == 6


STOPS = {"stop_at_first_failure": True}


@pytest.mark.parametrize(
    ("verdicts", "options", "remembered"),
    [
        ("passed passed", {}, True),
        ("wrong passed crash output", {}, True),
        ("compile_error compile_error", {}, True),
        ("compile_error compile_error", STOPS, True),
        ("passed time", {}, False),
        ("time wrong", {}, False),
        ("memory passed", {}, False),
        ("passed not_run", {}, False),
        ("wrong not_run", {}, False),
        ("not_run not_run", {}, False),
        ("passed passed", STOPS, True),
        ("passed wrong", STOPS, True),
        ("passed wrong not_run not_run", STOPS, True),
        ("crash not_run", STOPS, True),
        ("passed time not_run", STOPS, False),
        ("passed not_run not_run", STOPS, False),
        ("not_run not_run", STOPS, False),
    ],
)
def test_what_the_load_may_have_caused_is_not_cached(
    verdicts: str, options: dict[str, bool], remembered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(*verdicts.split())
    monkeypatch.setattr(module, "run_tests", runs)
    assert judged("x", **options) == judged("x", **options)
    assert len(runs.programs) == (1 if remembered else 2)


def test_the_programs_used_last_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_CACHED", 2)
    runs = Runs("passed")
    monkeypatch.setattr(module, "run_tests", runs)
    for program in "abbacab":  # c takes the place of b, and b that of c
        judged(program)
    assert runs.programs == ["a\n", "b\n", "c\n", "b\n"]
    assert len(module._cached_scores) == 2


def test_a_run_that_failed_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise SandboxError("no room")

    monkeypatch.setattr(module, "run_tests", fails)
    with pytest.raises(SandboxError):
        judged("x")
    monkeypatch.setattr(module, "run_tests", Runs("passed"))
    assert judged("x") == (1.0, "x\n")


@isolated
def test_a_cached_score_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = [RIGHT_SUM, "print(3)", "1/0", "("]
    first = [score(program, prints_of(*SUM), partial=True) for program in programs]
    monkeypatch.setattr(module, "run_tests", None)
    assert [score(program, prints_of(*SUM), partial=True) for program in programs] == first


def pool(**limits: Any) -> Verifier:
    options = {"seconds": 1.0, "total_seconds": 20.0, "memory_mb": 256}
    section = VerifierSection(deadline_seconds=30.0, **limits)
    return Verifier({"code": RewardSection(options=options)}, section)


@isolated
def test_rows_are_scored_in_worker_processes() -> None:
    reference = prints_of(*SUM)
    programs = [RIGHT_SUM, "print(3)", "import os; os.kill(os.getppid(), 9)"]
    rows = [RewardInput("p", answer(program), reference) for program in programs]
    rows += [RewardInput("p", answer("while True: pass"), prints_of(*SUM[:1]))]
    rows += [RewardInput("p", "none", reference), RewardInput("p", answer(RIGHT_SUM), "{}")]
    with pool(workers=2) as verifier:
        scores = verifier.submit(rows + rows[:1]).result()
        pids = verifier.pids
    outcomes = ["right", "wrong", "wrong", "wrong", "unparseable", "verifier_failed", "right"]
    assert [score.outcome for score in scores] == outcomes
    details = [json.loads(str(score.parts["code"].detail)) for score in scores[:4]]
    assert {detail["isolation"] for detail in details} == {str(TIER)}
    assert details[3]["time"] == 1
    assert "reference.language" in str(scores[5].parts["code"].detail)
    assert len(pids) == 2


@isolated
@pytest.mark.parametrize("end", ["close", "kill"])
def test_programs_die_with_their_worker(end: str) -> None:
    argument = f"27182.{os.getpid()}"
    program = f"import os\nif not os.fork(): os.setsid()\nos.execlp('sleep', 'sleep', '{argument}')"
    section = VerifierSection(deadline_seconds=600.0)
    options = {"seconds": 500.0, "total_seconds": 500.0}

    def running() -> int:
        count = 0
        for process in psutil.process_iter():
            try:
                living = process.status() != psutil.STATUS_ZOMBIE
                count += living and process.cmdline() == ["sleep", argument]
            except psutil.Error:
                pass
        return count

    def becomes(number: int) -> bool:
        for _ in range(400):
            if running() == number:
                return True
            time.sleep(0.025)
        return False

    with Verifier({"code": RewardSection(options=options)}, section) as verifier:
        verifier.submit([RewardInput("p", answer(program), prints_of(*SUM))])
        assert becomes(2)
        if end == "close":
            verifier.close()
        else:
            os.kill(verifier.pids[0], signal.SIGKILL)
        assert becomes(0)


@isolated
def test_a_scored_file_says_what_happened(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": answer(RIGHT_SUM), "answer": prints_of(*SUM)},
        {"prompt": "p", "completion": "none", "answer": prints_of(*SUM)},
        {"prompt": "p", "completion": answer(RIGHT_SUM), "answer": "?"},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = VerifierSection(deadline_seconds=30.0)
    counts = score_file("code", source, source, section=section)
    assert counts == {"right": 1, "wrong": 0, "unparseable": 1, "verifier_failed": 1}
    right, unparseable, failed = map(json.loads, source.read_text().splitlines())
    assert json.loads(right["detail"]) == {"isolation": TIER, "tests": 3, "passed": 3}
    assert "detail" not in unparseable
    assert failed["reward"] is None and "not valid JSON" in failed["detail"]
