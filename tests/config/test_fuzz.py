"""Packaged configs with values that nobody meant: read, or refused in words; never a traceback."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import yaml

from r1jax.config.load import ConfigError, load_config
from r1jax.config.packaged import packaged_configs

BAD: list[Any] = [
    *(None, True, 0, -1, -(10**30), 10**30, 10**400, 1.5, float("nan"), -float("inf"), "", " "),
    *("x", "1e999999", "../../../etc/passwd", "s3://x", "\0", "\u202e", "a" * 10_000, [], {}),
    *([[]], [None], {"": 1}, {"a": {"b": {}}}, [1, "a", None, {}], "jsonl:", "stage:nope", "~"),
]


def paths(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            found += paths(child, (*at, key))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_broken_config_is_read_or_refused_in_words(seed: int, tmp_path: Any) -> None:
    rng = random.Random(seed)
    files = list(packaged_configs().values())
    path = tmp_path / "broken.yaml"
    for _ in range(15):
        text = rng.choice(files).read_text(encoding="utf-8")
        data = copy.deepcopy(yaml.safe_load(text))
        for _ in range(rng.choice([1, 1, 2])):
            *above, key = rng.choice(paths(data))
            node = data
            for part in above:
                node = node[part]
            node[key] = copy.deepcopy(rng.choice(BAD))
            if not isinstance(data, dict):
                break
        broken = yaml.safe_dump(data, sort_keys=False)
        if rng.random() < 0.3:  # the text itself
            cut = rng.randrange(len(broken))
            broken = (
                broken[:cut] + rng.choice(["", "\0", "\t", "*x ", "&a ", "}"]) + broken[cut + 1 :]
            )
        path.write_text(broken, encoding="utf-8")
        try:
            load_config(path)
        except ConfigError as error:
            assert "Traceback" not in str(error) and "pydantic" not in str(error).lower()
