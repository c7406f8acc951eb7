"""Anyone's function as a reward: loaded by its name, and called as its parameters' names say.

- `f(row, options)` or `f(row)`: a `RewardInput` and the reward's options. The names may be others
  where none is that of a field or of an option, and the second is named or annotated as options are
  (`opts`, `config`, `Mapping`). What could be meant otherwise, as `(text, target)`, is refused.
- `f(prompts, completions, **columns)`: as TRL's `GRPOTrainer` calls it, with lists. Of these names
  (`completion_ids`, `trainer_state`, `log_extra` and `log_metric` too) and the dataset's columns it
  gets those that it takes. Prompts and completions are texts or, where the dataset's prompt is a
  list of messages or the annotation says so, lists of messages. One call has the samples of one
  prompt, at most 64.
- `f(completion, answer, ...)`: the fields of a `RewardInput` and columns, one row a call.

Each may be a coroutine function. What is returned for a row is a `Score`, a number (right at 1 or
more), or None: no reward, and the row's other rewards count. TRL's form gives a list of these.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

from r1jax.rewards.registry import (
    REWARDS,
    BatchFunction,
    Outcome,
    RewardEntry,
    RewardInput,
    RewardOptions,
    Score,
    check_reward,
)

IMPORT_REMEDY = (
    "a module must only define its functions when it is imported: put what it does as a program "
    "under if __name__ == '__main__'"
)
_BATCH_NAMES = {"prompts", "completions", "completion_ids"}
_ROW_FIELDS = {field.name for field in fields(RewardInput)}
# Of TRL's form: what `_lists` gives whatever the columns are, and the columns that it leaves out.
_LIST_NAMES = _BATCH_NAMES | {"trainer_state", "log_extra", "log_metric"}
_ROW_COLUMNS = ("answer", "domain", "truncated", "length")
_NOT_IN_LISTS = ("prompt", "completion", "completion_ids", "token_ids")
FIELD_OF: Mapping[str, str] = {
    **dict.fromkeys(("solution_str", "response", "generation", "output", "text"), "completion"),
    **dict.fromkeys(("ground_truth", "target", "label", "reference", "solution"), "answer"),
    "data_source": "domain",
}
"""What verl and others call the fields of a row -> their names here."""
_FORMS = (
    "(row, options), (prompts, completions, **columns), or names of fields such as "
    f"(completion, answer, **columns); fields: {sorted(_ROW_FIELDS)}"
)


def load_reward(name: str, options: RewardOptions, folder: str | None = None) -> RewardEntry:
    """The entry of a name; imports the module or file of a function that is not registered.

    Args:
      folder: where a file or module is looked for first: beside the config. Then in the working
        directory, then as Python looks for modules.

    Raises:
      ValueError: as `check_reward`; the module or the function does not exist; the function does
        not take the options.
    """
    check_reward(name, options)
    if name in REWARDS:
        return REWARDS[name]
    module_name, _, function_name = name.rpartition(":")
    folders = [Path(folder or "."), Path.cwd()]
    try:
        module = _import(module_name, folders)
    except (Exception, SystemExit) as error:
        remedy = f"is it in {folders[0].absolute()}, or is its directory on PYTHONPATH?"
        if isinstance(error, SystemExit):
            remedy = IMPORT_REMEDY
        raise ValueError(
            f"rewards.{name}: importing {module_name} failed: {type(error).__name__}: {error}; "
            f"{remedy}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"rewards.{name}: {module_name} has no function {function_name!r}")
    return as_reward(function, name, options)


def _import(name: str, folders: Sequence[Path]) -> ModuleType:
    """A module by its name or file, which may import what lies beside it."""
    file = Path(name if name.endswith(".py") else f"{name}.py").expanduser()
    for path in (folder / file for folder in folders):
        if path.is_file():
            path = path.resolve()
            loaded = sys.modules.get(path.stem)
            if loaded is not None and getattr(loaded, "__file__", None) == str(path):
                return loaded
            sys.path.append(str(path.parent))  # last, so that it hides nothing
            module_name = path.stem if loaded is None else f"{path.stem}_of_config"
            spec = importlib.util.spec_from_file_location(module_name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            spec.loader.exec_module(module)
            return module
    if name.endswith(".py"):
        raise FileNotFoundError(f"no file {folders[0] / file}")
    sys.path.extend(str(folder.absolute()) for folder in folders)  # for a package beside the config
    return importlib.import_module(name)


def as_reward(function: Callable[..., object], name: str, options: RewardOptions) -> RewardEntry:
    """The entry of a function of any of the forms; ValueError for options that it cannot take."""
    signature = None
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a built-in function
        pass
    parameters = [] if signature is None else list(signature.parameters.values())
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in parameters if p.name in names and p.default is p.empty]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    in_lists = bool(_BATCH_NAMES & set(names))
    if not in_lists and _by_position(parameters, options):
        if len(needed) > 2 or not _may_be_row(parameters) or not _may_be_options(parameters):
            hints = [f"{each} is {FIELD_OF[each]} here" for each in names if each in FIELD_OF]
            raise ValueError(
                f"rewards.{name}: the function's parameters {names} are of no form that is "
                f"accepted: {'; '.join([_FORMS, *hints])}"
            )
        takes_options = len(names) != 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
        _check_call(signature, name, ["row", "options"] if takes_options else ["row"], {})

        def by_position(row: RewardInput, options: RewardOptions) -> Score | None:
            return as_score(_awaited(function(row, options) if takes_options else function(row)))

        return RewardEntry(by_position, reads_answer=False, reads_columns=True)
    unknown = [key for key in options if key not in names and not any_name]
    if unknown:
        raise ValueError(
            f"rewards.{name}.options.{unknown[0]}: the function has no such parameter; it has "
            f"{names}"
        )
    _check_call(signature, name, [], dict.fromkeys(needed))
    given = {*options, *(_LIST_NAMES.union(_ROW_COLUMNS) if in_lists else _ROW_FIELDS)}
    columns = tuple(key for key in needed if key not in given)
    call = _Call(function, names, needed, any_name)
    if not in_lists:
        return RewardEntry(call.row, reads_answer=False, reads_columns=True, columns=columns)
    for key in columns:
        if key in _NOT_IN_LISTS:
            raise ValueError(
                f"rewards.{name}: a function of lists is given no {key!r}; take prompts, "
                "completions or completion_ids"
            )
    annotation = next((str(p.annotation) for p in parameters if p.name == "completions"), "")
    batch = _in_lists(call, _forms_of(annotation))

    def alone(row: RewardInput, options: RewardOptions) -> Score | None:
        return batch([row], options)[0]

    return RewardEntry(alone, reads_answer=False, reads_columns=True, batch=batch, columns=columns)


def _by_position(parameters: Sequence[inspect.Parameter], options: RewardOptions) -> bool:
    """Whether a function may get a row and options, whatever its parameters are called."""
    names = [parameter.name for parameter in parameters]
    if not names or names[0] == "row" or "options" in names[1:2]:
        return True
    is_row = "RewardInput" in str(parameters[0].annotation)
    return is_row or not _ROW_FIELDS.union(options) & set(names)


def _may_be_row(parameters: Sequence[inspect.Parameter]) -> bool:
    """Whether nothing says that a first parameter is a part of a row."""
    one = next(iter(parameters), None)
    part = r"\b(str|int|float|bool|list|Sequence)\b"
    return one is None or not (one.name in FIELD_OF or re.search(part, str(one.annotation)))


def _may_be_options(parameters: Sequence[inspect.Parameter]) -> bool:
    """Whether there is no second parameter, or its name or annotation is that of options."""
    two = next((p for p in parameters[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)), None)
    if two is None or re.search(r"(?i)mapping|dict|options", str(two.annotation)):
        return True
    return bool(re.fullmatch(r"_\w*|o|(?i:\w*(opt|conf|cfg|param|setting|arg)\w*)", two.name))


def _check_call(
    signature: inspect.Signature | None,
    name: str,
    positional: Sequence[str],
    named: Mapping[str, None],
) -> None:
    """Raises ValueError for a function that cannot be called with these arguments."""
    try:
        if signature is not None:
            signature.bind(*positional, **named)
    except TypeError as error:
        raise ValueError(
            f"rewards.{name}: the function {signature} cannot be called with "
            f"({', '.join([*positional, *(f'{key}=...' for key in named)])}): {error}; forms that "
            f"are accepted: {_FORMS}"
        ) from None


def as_score(value: object) -> Score | None:
    """What a reward function may return for a row, as a Score or None.

    Raises:
      TypeError: it is neither Score, number nor None.
    """
    if value is None or isinstance(value, Score):
        return value
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if not isinstance(value, int | float):
        raise TypeError(f"returned {type(value).__name__}; needs a Score, a number or None")
    return Score(float(value), Outcome.RIGHT if value >= 1 else Outcome.WRONG)


def _awaited(value: object) -> object:
    async def result(awaitable: Awaitable[object]) -> object:
        return await awaitable

    return asyncio.run(result(value)) if inspect.isawaitable(value) else value


class _Call:
    """A function that is called with those of the values that it has parameters for."""

    def __init__(
        self,
        function: Callable[..., object],
        names: Sequence[str],
        needed: Sequence[str],
        any_name: bool,
    ) -> None:
        self._function, self._any_name = function, any_name
        self._names, self._needed = set(names), needed

    def __call__(self, values: Mapping[str, object]) -> object:
        for name in self._needed:
            if name not in values:
                raise ValueError(
                    f"the function's parameter {name!r} is no column of the dataset; there are "
                    f"{sorted(values)}"
                )
        taken = {k: v for k, v in values.items() if self._any_name or k in self._names}
        return _awaited(self._function(**taken))

    def row(self, row: RewardInput, options: RewardOptions) -> Score | None:
        """One row by the names of its fields, which go before columns."""
        of_row = {name: getattr(row, name) for name in _ROW_FIELDS}
        return as_score(self({**row.columns, **of_row, **options}))


def _forms_of(annotation: str) -> tuple[bool, ...] | None:
    """Whether completions are messages, by their annotation; None where that does not say."""
    if any(word in annotation.lower() for word in ("dict", "mapping", "message")):
        return (True,)
    return (False,) if "str" in annotation else None


def _in_lists(call: _Call, forms: tuple[bool, ...] | None) -> BatchFunction:
    """TRL's form as a function of rows.

    Where nothing says whether texts or messages are meant, the other form is tried if the likely
    one raises an error of types.
    """

    def batch(rows: Sequence[RewardInput], options: RewardOptions) -> list[Score | None]:
        likely = any(isinstance(row.columns.get("prompt"), list) for row in rows)
        values: object = None
        first: Exception | None = None
        for messages in forms or (likely, not likely):
            try:
                values = call({**_lists(rows, messages), **options})
                break
            except (TypeError, AttributeError, KeyError) as error:
                if first is not None or forms is not None:
                    raise (first or error) from None
                first = error
        if hasattr(values, "tolist"):  # an array of numpy or torch
            values = values.tolist()
        if not isinstance(values, Sequence):
            raise TypeError(f"returned {type(values).__name__}, not a list")
        if len(values) != len(rows):
            raise ValueError(f"returned {len(values)} rewards for {len(rows)} completions")
        return [as_score(value) for value in values]

    return batch


def _lists(rows: Sequence[RewardInput], messages: bool) -> dict[str, object]:
    """The arguments of TRL's form; columns as the dataset has them, `answer` where it has none."""
    names = dict.fromkeys(name for row in rows for name in row.columns)
    columns = {name: [row.columns.get(name) for row in rows] for name in names}
    for own in _NOT_IN_LISTS:
        columns.pop(own, None)
    fallback: dict[str, object] = {
        name: [getattr(row, name) for row in rows] for name in _ROW_COLUMNS
    }
    return {
        **fallback,
        **columns,
        "prompts": [_prompt(row, messages) for row in rows],
        "completions": [
            [{"role": "assistant", "content": row.completion}] if messages else row.completion
            for row in rows
        ],
        "completion_ids": [list(row.token_ids) for row in rows],
        "trainer_state": SimpleNamespace(global_step=rows[0].step, max_steps=rows[0].max_steps),
        "log_extra": _ignored,
        "log_metric": _ignored,
    }


def _prompt(row: RewardInput, messages: bool) -> object:
    given = row.columns.get("prompt")
    if messages and isinstance(given, list):
        return given
    text = row.prompt if row.question is None else row.question
    return [{"role": "user", "content": text}] if messages else text


def _ignored(*values: object) -> None:
    """TRL's `log_extra` and `log_metric`: there are no such tables here."""
