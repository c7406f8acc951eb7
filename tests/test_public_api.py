"""Public functions are typed, with no bare Any, no **options, and at most seven parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 7

# The options of a command are its parameters; tfds makes a builder with its own.
MAY_HAVE_MORE = {f"r1jax/commands/{name}.py" for name in ("run", "plan", "evaluate", "sample")}
MAY_HAVE_OPTIONS = {"r1jax/data/tfds/r1jax_tasks/r1jax_tasks_dataset_builder.py"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions() -> Iterator[tuple[str, Function]]:
    """Functions and methods whose names, and whose classes' and modules' names, are public."""

    def inside(body: list[ast.stmt], where: str) -> Iterator[tuple[str, Function]]:
        for node in body:
            if isinstance(node, Function | ast.ClassDef):
                public = not node.name.startswith("_") or node.name in ("__init__", "__call__")
                if isinstance(node, ast.ClassDef) and public:
                    yield from inside(node.body, f"{where}{node.name}.")
                elif isinstance(node, Function) and public:
                    yield f"{where}{node.name}", node

    for path in sorted((ROOT / "r1jax").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        yield from inside(ast.parse(path.read_text()).body, f"{name} ")


def annotations(function: Function) -> Iterator[tuple[str, ast.expr | None]]:
    parts = function.args
    for argument in [*parts.posonlyargs, *parts.args, *parts.kwonlyargs]:
        if argument.arg not in ("self", "cls"):
            yield argument.arg, argument.annotation
    if parts.vararg:
        yield "*" + parts.vararg.arg, parts.vararg.annotation
    if function.name != "__init__":
        yield "return", function.returns


def test_they_are_typed_without_any() -> None:
    untyped, with_any = [], set()
    for where, function in public_functions():
        for name, annotation in annotations(function):
            if annotation is None:
                untyped.append(f"{where}: {name}")
            elif any(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(annotation)):
                with_any.add(where)
    assert untyped == []
    assert with_any == set()


def test_none_takes_options_by_any_name() -> None:
    found = {where.split()[0] for where, function in public_functions() if function.args.kwarg}
    assert found <= MAY_HAVE_OPTIONS


def test_they_have_at_most_seven_parameters() -> None:
    too_many = {
        where
        for where, function in public_functions()
        if len([name for name, _ in annotations(function) if name != "return"]) > MOST
        if where.split()[0] not in MAY_HAVE_MORE
    }
    assert too_many == set()
