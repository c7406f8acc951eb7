"""Rows in LiveCodeBench's form: a program, and a method of a class."""

from __future__ import annotations

import base64
import json
import pickle
import zlib


def compressed(value: object) -> str:
    """As the dataset's authors write private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def cases(*pairs: tuple[str, str], kind: str = "stdin") -> list[dict[str, str]]:
    return [{"input": given, "output": output, "testtype": kind} for given, output in pairs]


PROGRAM: dict[str, str] = {
    "question_title": "Sum",
    "question_content": "Print the sum.\n",
    "platform": "atcoder",
    "starter_code": "",
    "public_test_cases": json.dumps(cases(("1 2\n", "3\n"))),
    "private_test_cases": compressed(json.dumps(cases(("3 4\n", "7\n"), ("0 0\n", "0\n")))),
    "metadata": "{}",
}
METHOD: dict[str, str] = {
    **PROGRAM,
    "question_content": "Add {n} to all.",
    "starter_code": "class Solution:\n    def add(self, xs: List[int], n: int):\n        ",
    "public_test_cases": json.dumps(cases(("[1, 2]\n3", "[4, 5]"), kind="functional")),
    "private_test_cases": json.dumps(cases(('["a"]\n"b"', '["ab"]'), kind="functional")),
    "metadata": '{"func_name": "add"}',
}
