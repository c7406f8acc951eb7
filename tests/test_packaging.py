"""The wheel has what a user without a checkout needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Hatchling itself, not pip, which would first make an environment to build in.
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def relative(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in folder.rglob(pattern) if path.is_file()}


def test_wheel_has_code_configs_and_templates(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = relative(ROOT / "configs", "*.yaml")
    templates = relative(ROOT / "r1jax/report", "*.j2") | relative(ROOT / "r1jax/report", "*.css")
    assert "configs/tiny/r1_zero.yaml" in configs and templates
    assert {f"r1jax/{name}" for name in configs} <= names
    assert relative(ROOT / "r1jax", "*.py") | templates | {"r1jax/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "configs/")) for name in names)


def test_configs_are_found_in_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import r1jax.config.load as load; print(load.__file__)\n"
        "print(load.load_config('tiny/r1_zero').name, load.find_config('tiny/r1_zero'))"
    )
    # -P and the working directory keep the checkout out of the way.
    run = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    module, found = run.stdout.splitlines()
    assert module.startswith(str(tmp_path))
    assert found.split()[1] == str(tmp_path / "r1jax/configs/tiny/r1_zero.yaml")


def run_time(node: ast.AST) -> Iterator[ast.AST]:
    """What is run, as opposed to read by the type checker."""
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        children = node.orelse
    for child in children:
        yield from run_time(child)


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        re.split(r"[^\w-]", requirement)[0].lower().replace("_", "-")
        for requirement in [
            *project["dependencies"],
            *extras["hf"],
            *extras["gcs"],
            *extras["gym"],
            *extras["wandb"],
        ]
    }
    declared.add("pydantic-core")  # by pydantic, in one exact version
    distributions = packages_distributions()
    undeclared = set()
    for path in (ROOT / "r1jax").rglob("*.py"):
        for node in run_time(ast.parse(path.read_text())):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in {name.split(".")[0] for name in modules} - sys.stdlib_module_names:
                names = [name.lower().replace("_", "-") for name in distributions.get(module, [])]
                if module != "r1jax" and not {*names, module.replace("_", "-")} & declared:
                    undeclared.add(f"{path}: {module}")
    assert not undeclared


def test_the_lock_file_meets_what_the_project_asks_for() -> None:
    lines = (ROOT / "requirements-dev.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # no addresses, no paths
    locked = {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["test"], *extras["docs"]]:
        requirement = Requirement(text)
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, text
    assert f"TORCH := torch=={locked['torch']}" in (ROOT / "Makefile").read_text()


def test_every_quick_test_is_there() -> None:
    for line in (ROOT / "tests/quick.txt").read_text().splitlines():
        assert (ROOT / line.removeprefix("--deselect=").partition("::")[0]).exists(), line
