"""Imports point one way: packages stand in an order, and no module is part of a circle."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "r1jax"

# A package imports what stands on its own line or above. Modules of the root count as packages.
LAYERS = [
    "files settings",
    "sharding train_step objectives models sampler policy_step critic_step grpo",
    "lock checksums bucket processes peers compilation_cache checkpoints metrics config rewards",
    "data weights evaluation search",
    "run",
    "rollouts",
    "programs pretrained",
    "stages",
    "planner report",
    "recipe",
    "commands",
    "cli",
]
# For the type checker only: the protocol of a stage kind names what its functions return.
TYPES_OF_LATER = {("r1jax.run.resolve", "r1jax.programs")}

# Loaded in a process of its own, these may not bring in what a config does not need.
LIGHT = [
    "r1jax",
    "r1jax.settings.objective",
    "r1jax.settings.stage",
    "r1jax.config.load",
    "r1jax.rewards",
]
# A config is refused with these alone: what reads it, and what they need.
ENOUGH_FOR_A_CONFIG = {
    *("r1jax", "pydantic", "pydantic_core", "annotated_types", "typing_extensions"),
    *("typing_inspection", "yaml", "cython_runtime"),  # the last is part of yaml
    *("sitecustomize", "usercustomize"),
}
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "torch"}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """Modules of r1jax that a module imports: at its top, in functions, for the type checker."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                other = whole if whole in MODULES else str(node.module)
                if other in MODULES and (name, other) not in TYPES_OF_LATER:
                    yield other


def package(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_packages_import_only_what_stands_before_them() -> None:
    rank = {name: i for i, line in enumerate(LAYERS) for name in line.split()}
    unknown = {package(name) for name in MODULES} - {*rank, "r1jax", "__main__"}
    assert not unknown, "give them a line in LAYERS"
    wrong = {
        f"{name} imports {other}"
        for name in MODULES
        for other in imported(name)
        if package(name) in rank and package(other) in rank
        if package(name) != package(other) and rank[package(other)] > rank[package(name)]
    }
    assert wrong == set()


def test_no_package_is_part_of_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name in MODULES:
        seen = graph.setdefault(package(name), set())
        seen |= {package(other) for other in imported(name)} - {package(name), "r1jax"}
    graph["r1jax"] = set()  # its names are loaded when they are first used
    assert cycle(graph) == []


def test_no_module_is_part_of_a_circle() -> None:
    graph = {name: set(imported(name)) - {name} for name in MODULES}
    graph["r1jax"] = set()
    assert cycle(graph) == []


@pytest.mark.parametrize("module", LIGHT)
def test_settings_configs_and_rewards_load_no_jax(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY & set(run.stdout.split()) == set()
    assert run.stderr == ""


def test_a_mistake_in_a_config_is_told_before_anything_else_is_imported(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "{name: x, model: {path: x}, data: {d: {source: 'task:running_total'}},"
        " stages: [{name: e, kind: evaluate, data: d, samplng: {}}]}"
    )
    code = (
        "import atexit, runpy, sys\n"
        f"sys.argv = ['r1jax', 'run', {str(config)!r}, '--dry-run']\n"
        "atexit.register(lambda: print(*sys.modules))\n"
        "runpy.run_module('r1jax', run_name='__main__', alter_sys=True)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2 and "did you mean sampling" in run.stderr
    loaded = set(run.stdout.split())
    others = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert "pydantic" in others and "r1jax.settings.data" in loaded
    assert others <= ENOUGH_FOR_A_CONFIG | {name for name in others if name.startswith("_")}
    kinds = {name for name in loaded if name.startswith("r1jax.stages.")}
    assert kinds == {"r1jax.stages.evaluate", "r1jax.stages.evaluate.settings"}
    own = {name for name in loaded if name.startswith("r1jax.")} - kinds
    assert {package(name) for name in own} == {"config", "files", "settings", "stages"}
    # Each of these takes a tenth of the time of such a mistake, or more.
    assert not loaded & {"logging", "asyncio"}


def test_training_loads_no_pytorch() -> None:
    code = "import sys, r1jax.recipe, r1jax.stages.grpo.stage; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
