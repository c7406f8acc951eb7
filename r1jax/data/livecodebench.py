"""Rows of LiveCodeBench (arXiv 2403.07974) as prompts and hidden tests.

The columns of `code_generation_lite`, which any JSON lines may have as well:

    question_content     the problem
    starter_code         a class `Solution` with the method to fill in; empty: a whole program is
                         asked for, which reads standard input and writes standard output
    public_test_cases    JSON: [{"input": ..., "output": ..., "testtype": "stdin" | "functional"}]
    private_test_cases   the same, or compressed: base64(zlib(pickle(JSON)))
    metadata             JSON; `func_name` is the method's name

Input and output of a functional test are JSON, one argument a line. The instruction to write a
program is worded here, which is a choice.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Mapping

from r1jax.files import JsonObject
from r1jax.rewards.code import pack_tests

_TESTS = ("public_test_cases", "private_test_cases")
COLUMNS = ("question_content", "starter_code", *_TESTS, "metadata")

_PROGRAM = """

Write a Python program that reads the input from standard input and writes the answer to standard \
output. Give the whole program in one code block:
```python
# your program
```"""
_METHOD = """

Complete this Python class and give it whole in one code block:
```python
{starter}
```"""

# Solutions rely on the imports of LeetCode's Python, and LiveCodeBench's judge puts such imports
# before all of them. The last line restores pow and others that math replaces.
PRELUDE = """\
import sys
sys.setrecursionlimit(50_000)
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
import bisect, collections, functools, heapq, itertools, math, random, re, string
from builtins import *
"""


def prompt_and_answer(columns: Mapping[str, str]) -> tuple[str, str]:
    """A row's prompt (the texts of `COLUMNS`), and its answer in the form of `r1jax.rewards.code`.

    Raises ValueError, which names the column that cannot be read.
    """
    starter = columns["starter_code"].strip()
    tests = [test for column in _TESTS for test in _tests(columns[column], column)]
    reference: JsonObject = {"language": "python", "prelude": PRELUDE}
    if starter:
        reference["entry"] = f"Solution.{_method_name(columns['metadata'])}"
        tests = [_call(test, number) for number, test in enumerate(tests)]
        instruction = _METHOD.replace("{starter}", starter)  # a starter may hold braces
    else:
        tests = [{"input": test["input"], "output": test["output"]} for test in tests]
        instruction = _PROGRAM
    reference["tests"] = pack_tests(tests)
    return columns["question_content"].strip() + instruction, json.dumps(reference)


def _tests(text: str, column: str) -> list[dict[str, str]]:
    try:
        if not text.lstrip().startswith("["):
            text = _decompressed(text)
        tests = json.loads(text)
    except (ValueError, RecursionError, binascii.Error, zlib.error) as error:
        raise ValueError(
            f"column {column!r}: neither JSON nor base64(zlib(pickle(JSON))): {error}"
        ) from None
    for test in tests if isinstance(tests, list) else [tests]:
        parts = test if isinstance(test, dict) else {}
        if not all(isinstance(parts.get(key), str) for key in ("input", "output")):
            raise ValueError(f"column {column!r}: a test without the texts input and output")
    return list(tests)


# What Python writes for a text: its parts that hold one, and those around it.
_TEXT = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_AROUND = ("PROTO", "FRAME", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "STOP")
_MOST_BYTES = 1 << 29  # of the tests of a row


def _decompressed(text: str) -> str:
    """The pickled text. The pickle is read, not run: it could name any code, or any size."""
    stream = zlib.decompressobj()
    pickled = stream.decompress(base64.b64decode(text, validate=True), _MOST_BYTES)
    if stream.unconsumed_tail:
        raise ValueError(f"it is more than {_MOST_BYTES >> 20} MiB")
    texts: list[str] = []
    for code, argument, _ in pickletools.genops(pickled):
        if code.name in _TEXT:
            texts.append(str(argument))
        elif code.name not in _AROUND:
            raise ValueError(f"its pickle holds {code.name}, not only a text")
    if len(texts) != 1:
        raise ValueError(f"its pickle holds {len(texts)} texts, not one")
    return texts[0]


def _method_name(metadata: str) -> str:
    try:
        return str(json.loads(metadata)["func_name"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"column 'metadata': {metadata[:80]!r} has no func_name, but there is starter code"
        ) from None


def _call(test: Mapping[str, str], number: int) -> JsonObject:
    try:
        arguments = [json.loads(line) for line in test["input"].strip().split("\n")]
        return {"arguments": arguments, "returns": json.loads(test["output"])}
    except ValueError as error:
        raise ValueError(
            f"test {number} (public ones first) is functional, but not JSON: {error}"
        ) from None
