"""The pieces of docs/library.md run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_checkpoint import make_model

PAGE = Path(__file__).parents[2] / "docs" / "library.md"
PIECES = {
    title: code
    for title, code in re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```",
        PAGE.read_text(),
        re.DOTALL | re.MULTILINE,
    )
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory)
    return directory


def test_there_are_pieces() -> None:
    assert len(PIECES) == 8


@pytest.mark.parametrize("title", PIECES)
def test_a_piece_runs(title: str, model: Path) -> None:
    code = PIECES[title].replace("Qwen/Qwen2.5-1.5B", str(model))
    exec(compile(code, f"library.md: {title}", "exec"), {})
