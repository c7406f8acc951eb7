"""Pages of the documentation that are made of the code; mkdocs itself runs in `make docs`."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from r1jax.cli import app
from r1jax.config.load import ConfigError, load_config, parse_config
from r1jax.config.other_names import OTHER_NAMES
from r1jax.config.reference import Setting, every_setting, explain
from r1jax.data import examples, step_labels
from r1jax.rewards import REWARDS
from r1jax.settings.data import FIELDS
from r1jax.settings.kinds import KINDS, load_kind
from r1jax.settings.objective import GRPOConfig
from r1jax.settings.section import Section

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(hooks: ModuleType) -> dict[str, str]:
    return dict(hooks.pages())


def sections(base: type[Section] = Section) -> Iterator[type[Section]]:
    for each in base.__subclasses__():
        if each.__module__.startswith("r1jax."):
            yield each
        yield from sections(each)


def test_every_key_has_a_type_and_a_meaning_and_is_on_the_page(pages: dict[str, str]) -> None:
    for kind in KINDS:
        load_kind(kind)
    names = {name for section in sections() for name in section.model_fields}
    names |= {each.name for each in dataclasses.fields(GRPOConfig)}
    assert len(names) > 100
    settings = every_setting()
    assert names <= {each.key.rpartition(".")[2] for each in settings}
    assert [each.key for each in settings if not (each.meaning and each.type)] == []
    rows = set(re.findall(r"^\| `([^`]+)` \|", pages["settings.md"], re.MULTILINE))
    # A further model has the keys of the model.
    wanted = {each.key for each in settings if not each.key.startswith("models.")}
    assert rows == wanted | {"models"}


def setting(key: str, kind: str = "") -> Setting:
    (found,) = (e for e in every_setting() if e.key == key and (not kind or kind in e.kinds))
    return found


def test_defaults_are_those_of_a_config() -> None:
    config = load_config("tiny/r1_zero")
    assert setting("verifier.deadline_seconds").default == str(config.verifier.deadline_seconds)
    assert setting("model.attention").default == f'"{config.model.attention}"'
    assert setting("stages.NAME.steps", "grpo").default == "required"
    assert setting("stages.NAME.kind", "grpo").default == "required"
    # A section may be given with another default than its class has.
    assert setting("stages.NAME.sampling.temperature", "grpo").default == "1.0"
    assert setting("stages.NAME.sampling.temperature", "evaluate").default == "0.6"
    assert setting("stages.NAME.rewrite.sampling.temperature").default == "0.6"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("stages.rl.loss.clip_low", "stages.NAME.loss.clip_low"),
        ("stages.NAME.loss.clip_low", "stages.NAME.loss.clip_low"),
        ("loss.clip_low", "stages.NAME.loss.clip_low"),
        ("importance_level=token", "stages.NAME.objective.importance_level"),
        ("data.questions.fields", "data.NAME.fields"),
        ("num_generations", "stages.NAME.outputs_per_question"),
        ("ppo_mini_batch_size", "stages.NAME.questions_per_step"),
        ("slices", "slices"),
    ],
)
def test_explain_finds_a_key_by_its_end_or_by_another_name(name: str, key: str) -> None:
    assert {each.key for each in explain(name)} == {key}


def test_explain_a_section_with_its_keys_and_refuses_what_there_is_not() -> None:
    keys = [each.key for each in explain("stages.rl.optimizer")]
    assert keys[0] == "stages.NAME.optimizer" and "stages.NAME.optimizer.beta2" in keys
    with pytest.raises(ConfigError, match="did you mean temperature"):
        explain("temprature")
    with pytest.raises(ConfigError, match="a sample is trained on once"):
        explain("ppo_epochs")


def test_explain_a_value_that_has_a_name() -> None:
    for kind in KINDS:
        first, *keys = explain(kind)
        assert first.key == f"kind: {kind}" and first.meaning
        assert {"stages.NAME.kind", "stages.NAME.name"} <= {each.key for each in keys}
        assert all(kind in each.kinds for each in keys)
    assert "stages.NAME.objective.kind" in {each.key for each in explain("gspo")}
    assert all("gspo" in each.kinds for each in explain("gspo"))
    for reward in (each for each in REWARDS if not each.startswith("_")):
        assert explain(reward)[0].meaning, reward
    for field in FIELDS:  # some of them are settings, too
        assert [each.key for each in explain(field)][-2:] == [field, "data.NAME.fields"]
    assert explain("domain")[0].key == "data.NAME.domain"
    for name, near in {"acuracy": "accuracy", "mesages": "messages", "grppo": "grpo"}.items():
        with pytest.raises(ConfigError, match=f"did you mean.* {near}"):
            explain(name)
    with pytest.raises(ConfigError):
        explain("_reference")


def test_every_field_that_is_read_has_a_meaning() -> None:
    read = {*examples._FIELDS, *step_labels._FIELDS, "chosen", "rejected", "safe"}
    assert read == set(FIELDS)
    meaning = setting("data.NAME.fields").meaning
    assert all(field in meaning for field in FIELDS)


def test_every_command_and_option_is_on_the_page(pages: dict[str, str]) -> None:
    names = [each.name or each.callback.__name__ for each in app.registered_commands]  # type: ignore[union-attr]
    assert len(names) > 8
    for name in names:
        assert f"\n## r1jax {name.replace('_', '-')}\n" in pages["commands.md"]
    for option in (
        "--restart",
        "--profile-steps",
        "--min-p",
        "--prompt, -p",
        "[KEY.PATH=VALUE]...",
    ):
        assert f"| `{option}` |" in pages["commands.md"]


def test_names_of_other_libraries_are_side_by_side(pages: dict[str, str]) -> None:
    for names in OTHER_NAMES.values():
        for name in names:
            assert f"| `{name}` | " in pages["moving.md"]
    assert "| `beta` | `stages.NAME.loss.kl_coefficient` |" in pages["moving.md"]


def test_links_lead_to_pages_and_headings(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        assert "<!-- " not in page, name
        for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", page, flags=re.DOTALL)):
            file, _, anchor = target.partition("#")
            if file.startswith("http"):
                continue
            if not file.endswith(".md"):
                assert (ROOT / "docs" / file).is_file(), (name, target)
                continue
            assert file in pages, (name, target)
            headings = re.findall(r"^#+ (.+)$", pages[file], re.MULTILINE)
            anchors = [re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") for text in headings]
            assert not anchor or anchor in anchors, (name, target)


def test_every_page_is_in_the_navigation(pages: dict[str, str]) -> None:
    listed: list[str] = []

    def collect(node: object) -> None:
        if isinstance(node, str):
            listed.append(node)
        elif isinstance(node, dict):
            for each in node.values():
                collect(each)
        elif isinstance(node, list):
            for each in node:
                collect(each)

    collect(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(pages)


def test_no_page_repeats_a_paragraph_of_another(pages: dict[str, str]) -> None:
    seen: dict[str, str] = {}
    for name, page in pages.items():
        for paragraph in re.split(r"\n\s*\n", page):
            text = " ".join(paragraph.split())
            if len(text) > 120:
                assert seen.setdefault(text, name) == name, (name, seen[text], text[:80])


def test_the_config_for_those_who_come_from_trl_is_one() -> None:
    page = (ROOT / "docs" / "moving.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (stage,) = parse_config(text, "moving.md").stages
    assert stage.name == "rl"


def test_a_marker_without_a_source_stops_the_build(hooks: ModuleType) -> None:
    for line in ("<!-- readme: Nowhere -->", "<!-- readme table: Nowhere -->", "<!-- nothing -->"):
        with pytest.raises(ValueError, match="Nowhere|nothing"):
            hooks.expand(line)
