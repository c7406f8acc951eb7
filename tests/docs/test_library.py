"""The pieces of docs/library.md and those of the README run as they are written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import forked
import pytest
from tiny_checkpoint import make_model

from r1jax.rewards import Outcome, score

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "library.md"
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
    assert len(PIECES) == 10


@pytest.mark.parametrize("title", PIECES)
def test_a_piece_runs(title: str, model: Path) -> None:
    code = PIECES[title].replace("Qwen/Qwen2.5-1.5B", str(model))
    exec(compile(code, f"library.md: {title}", "exec"), {})


def test_the_readme_runs_from_top_to_bottom(model: Path, tmp_path: Path) -> None:
    """The second piece uses names of the first."""
    chat_model = shutil.copytree(model, tmp_path / "model")  # Qwen's tokenizer has a chat template
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (chat_model / "chat_template.jinja").write_text(template)
    pieces = re.findall(r"^```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert len(pieces) == 2
    code = "\n".join(pieces).replace("Qwen/Qwen2.5-1.5B", str(chat_model))
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["metrics"]["optimizer/finite"] == 1
    assert names["metrics"]["policy/kl"] != 0  # the reference stayed where it was
    # The last line is the step that stands above: it takes its batch.
    state = names["init_train_state"](names["reference"], names["optimizer"])
    names["step"](state, names["batch"])


def test_the_step_on_several_devices_is_compiled_once() -> None:
    (title,) = (each for each in PIECES if "several devices" in each)
    code = "import jax; assert jax.device_count() == 2\n" + PIECES[title]
    code += "assert state.params.sharding.is_fully_replicated and len(state.params.devices()) == 2"
    done = forked.run("-c", code, env={"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"})
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_reward_of_the_page_of_rewards_gives_the_answer_to_vote_on(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "rewards.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "extracted" in c)
    (tmp_path / "voted.py").write_text(code)
    reward = f"{tmp_path}/voted.py:last_number"
    right, wrong, none = (score(text, "19", reward) for text in ("It is 19", "It is 20", ""))
    assert (right.reward, right.extracted) == (1.0, "19")
    assert (wrong.outcome, wrong.extracted) == (Outcome.WRONG, "20")
    assert (none.reward, none.extracted) == (0.0, None)
