"""Pages of the documentation that are made of the code, while mkdocs builds the site.

A page may hold lines of its own that are replaced:

    <!-- readme: On a pod slice -->         that section of the README, without its heading
    <!-- readme table: Stage by stage -->   the first table behind this text of the README
    <!-- names: TRL -->                     a table of a library's settings and ours
    <!-- no counterparts -->, <!-- architectures -->, <!-- packaged configs -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that have no file."""
    from mkdocs.structure.files import File

    for name, page in GENERATED.items():
        files.append(File.generated(config, name, content=page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in what a page takes from elsewhere."""
    return expand(markdown)


def expand(markdown: str) -> str:
    """The page with its marked lines replaced, and links that leave docs/ as plain text."""
    filled = re.sub(r"^<!-- ([a-z ]+?)(?:: (.+))? -->$", _replacement, markdown, flags=re.MULTILINE)
    filled = filled.replace("](docs/", "](")  # of the README
    return re.sub(
        r"\[([^\]]+)\]\((?:\.\./|configs/|tpu_scripts/|CONTRIBUTING)[^)]*\)", r"\1", filled
    )


def _replacement(match: re.Match[str]) -> str:
    makers: dict[str, Callable[..., str]] = {
        "readme": readme_section,
        "readme table": readme_table,
        "names": names_table,
        "no counterparts": no_counterparts_table,
        "architectures": architectures_table,
        "packaged configs": packaged_table,
    }
    if match[1] not in makers:
        raise ValueError(f"{match[0]}: a page can take {', '.join(makers)} from elsewhere")
    return makers[match[1]](*([match[2]] if match[2] else []))


def readme_section(title: str) -> str:
    """The text below a heading of the README, up to the next one of its level."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, heading, rest = text.partition(f"\n## {title}\n")
    if not heading:
        raise ValueError(f"README.md has no section {title!r}")
    return rest.partition("\n## ")[0].strip() + "\n"


def readme_table(after: str) -> str:
    """The first table of the README that follows this text."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, found, rest = text.partition(after)
    table = re.search(r"^\|.*\n(?:\|.*\n)+", rest, re.MULTILINE)
    if not found or table is None:
        raise ValueError(f"README.md has no table after {after!r}")
    return table[0]


def settings_page() -> str:
    """Every key of a config, by section."""
    from r1jax.config.reference import every_setting
    from r1jax.settings.kinds import KINDS

    lines = [
        "# Every key of a config",
        "",
        "Made of the classes of the settings when the site is built; `r1jax explain KEY` says the "
        "same. NAME stands for a name that the config chooses, N for an index of a list.",
        "",
    ]
    settings = every_setting()
    plain = [each for each in settings if not each.key.startswith("stages.")]
    lines += ["## The run", "", *_settings_table([e for e in plain if "." not in e.key])]
    sections = [each for each in plain if "." in each.key and not each.key.startswith("models.")]
    for name, members in groupby(sections, lambda each: each.key.partition(".")[0]):
        also = " (and models.NAME)" if name == "model" else ""
        lines += [f"## {name}{also}", "", *_settings_table(list(members))]
    stages = [each for each in settings if each.key.startswith("stages.")]
    objectives = [each for each in stages if ".objective." in each.key]
    searches = [each for each in stages if ".search." in each.key]
    elsewhere = [*objectives, *searches]
    shared = [each for each in stages if len(each.kinds) > 1 and each not in elsewhere]
    lines += ["## Stages: keys of several kinds", "", *_settings_table(shared, with_kinds=True)]
    for kind in KINDS:
        alone = [e for e in stages if e.kinds == (kind,) and e not in elsewhere]
        lines += [f"## Stages: {kind}", "", *_settings_table(alone)]
    lines += ["## Stages: objective of a grpo stage", ""]
    lines += _settings_table(objectives, with_kinds=True)
    lines += ["## Stages: search of a stage that samples", ""]
    lines += _settings_table(searches, with_kinds=True)
    rewriters = [e for e in stages if ".rewrite." in e.key and len(e.kinds) == 1]
    lines += ["## Stages: rewrite of a rejection_sampling stage", ""]
    lines += _settings_table(rewriters, with_kinds=True)
    return "\n".join(lines)


def _settings_table(settings: list[Any], *, with_kinds: bool = False) -> list[str]:
    """A Markdown table with a row for each setting, and an empty line."""
    kinds = " kinds |" if with_kinds else ""
    lines = [
        f"| key |{kinds} type | default | meaning |",
        f"|---|{'---|' * with_kinds}---|---|---|",
    ]
    for each in settings:
        of = f" {', '.join(each.kinds)} |" if with_kinds else ""
        default = {"": "", "required": "required"}.get(each.default, f"`{each.default}`")
        lines.append(
            f"| `{each.key}` |{of} {_cell(each.type)} | {_cell(default)} | {_cell(each.meaning)} |"
        )
    return [*lines, ""]


def _cell(text: str) -> str:
    """Text in a cell of a table: no line breaks, bars, or tags outside of code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()).replace("|", "\\|"))
    escaped = [
        p if p.startswith("`") else p.replace("<", "&lt;").replace("*", "\\*") for p in parts
    ]
    return "".join(escaped)


def commands_page() -> str:
    """Every command with its arguments and options, from the command line itself."""
    import typer.main

    from r1jax.cli import app

    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = ["# Every command", ""]
    lines += ["Made of the command line itself; `r1jax COMMAND --help` says the same.", ""]
    for name, command in sorted(commands.items()):
        lines += [f"## r1jax {name}", "", _cell(command.help or ""), ""]
        lines += ["| argument or option | default | meaning |", "|---|---|---|"]
        for each in command.params:
            is_option = each.param_type_name == "option"
            shown = ", ".join(each.opts) if is_option else (each.metavar or each.name.upper())
            default = "required" if each.required else _default(each.default)
            meaning = _cell(getattr(each, "help", None) or "")
            lines.append(f"| `{shown}` | {_cell(default)} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _default(value: object) -> str:
    return "" if value in (None, False, (), []) or callable(value) else f"`{value}`"


def names_table(library: str) -> str:
    """A library's names of settings, and ours."""
    from r1jax.config.other_names import OTHER_NAMES

    lines = [f"| {library} | r1jax |", "|---|---|"]
    for theirs, ours in OTHER_NAMES[library].items():
        keys = re.sub(r"[a-z_.A-Z]*[._a-z]+(?=,|$| or | and )", lambda key: f"`{key[0]}`", ours)
        lines.append(f"| `{theirs}` | {keys} |")
    return "\n".join([*lines, ""])


def no_counterparts_table() -> str:
    """Settings of other libraries that have none here, and why."""
    from r1jax.config.other_names import NO_COUNTERPARTS

    rows = (f"| `{theirs}` | {_cell(why)} |" for theirs, why in NO_COUNTERPARTS.items())
    return "\n".join(["| theirs | why |", "|---|---|", *rows, ""])


def architectures_table() -> str:
    """The architectures that are read and written, and the shapes that come with r1jax."""
    from r1jax.models.config import architectures

    folder = ROOT / "configs" / "models"
    shapes: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.json")):
        kind = re.search(r'"model_type": "(\w+)"', path.read_text(encoding="utf-8"))
        assert kind is not None, path
        shapes.setdefault(kind[1], []).append(path.relative_to(folder).with_suffix("").as_posix())
    lines = ["| `model_type` | class in transformers | shapes in configs/models |", "|---|---|---|"]
    for name, family in architectures().items():
        lines.append(f"| `{name}` | `{family}ForCausalLM` | {', '.join(shapes.get(name, []))} |")
    return "\n".join([*lines, ""])


def packaged_table() -> str:
    """The configs that come with r1jax."""
    from r1jax.config.load import load_config, slices_of
    from r1jax.config.packaged import packaged_configs

    lines = ["| config | title | slices that it has settings for |", "|---|---|---|"]
    for name in packaged_configs():
        slices = ", ".join(slices_of(name))
        lines.append(f"| `{name}` | {_cell(load_config(name).title)} | {slices} |")
    return "\n".join([*lines, ""])


def notebook_page() -> str:
    """The notebook as a page: its text, its code, and a picture of what the run's report shows."""
    name = "tiny_r1_zero.ipynb"
    notebook = json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    parts.insert(1, f"This page is [a notebook]({name}) to download and run.")
    parts.append("![The report of such a run](report.png)")
    return "\n\n".join(parts) + "\n"


def pages() -> Iterator[tuple[str, str]]:
    """(name, Markdown as mkdocs renders it) of all pages."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        yield path.name, expand(path.read_text(encoding="utf-8"))
    for name, page in GENERATED.items():
        yield name, page()


GENERATED: dict[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "commands.md": commands_page,
    "tiny_r1_zero.md": notebook_page,
}
