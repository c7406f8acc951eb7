"""Atomic checkpoints: the state of a train loop on disk, restorable onto any device layout.

A checkpoint holds all that a resumed run needs to equal one that was never killed: arrays (weights,
optimizer, keys) and a JSON mapping (data cursor, metrics cursor). Both are written by one
`orbax.checkpoint.CheckpointManager` call, into one directory:

    DIRECTORY/STEP.orbax-checkpoint-tmp/...            while it is written
    DIRECTORY/STEP/{arrays,metadata,checksums}/...     after one rename(2), which is the commit
    DIRECTORY/STEP.damaged/...                         what could not be restored, set aside

(A bucket, `gs://...`, has no rename: there an object `commit_success.txt` is the commit.) A name
without the suffix is a finished checkpoint, whenever a process is killed. Older ones are removed
after the commit, oldest first, and what a killed process left when the directory is opened again.
Not every file is synced before the rename, so a power cut may damage the newest one. Each array
has a checksum of its values (`r1jax.checksums`), which a restore compares, and the metadata another
one; where they differ, or a file cannot be read, the checkpoint before it is restored. Checkpoints
without checksums were written by an earlier version, and are accepted.

Every process of a `jax.distributed` run makes the same calls in the same order: Orbax writes each
process's shards, synchronises, and commits from process 0.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from r1jax.bucket import locate, on_bucket
from r1jax.checksums import checksums
from r1jax.files import JsonObject
from r1jax.processes import any_process, wait_for_all

if TYPE_CHECKING:
    from jaxtyping import Array, PyTree

OptionalArrays: TypeAlias = "Mapping[str, Callable[[], PyTree[jax.ShapeDtypeStruct]]]"
"""Entries of a checkpoint that not every one has; called where it does."""

_ARRAYS = "arrays"
_METADATA = "metadata"
_CHECKSUMS = "checksums"


class MisfitError(ValueError):
    """A checkpoint that does not have the arrays that are wanted."""


class DamagedError(ValueError):
    """A checkpoint that cannot be read, or whose values are no longer those that were saved."""


class Checkpoints:
    """The newest checkpoints of one stage.

    Args:
      directory: made if it is missing; shared by all processes of a run; local or on a bucket.
        Opening it removes what a killed process left, so only one run may write to it at a time.
      keep: how many finished checkpoints stay, at least 1.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least the newest checkpoint has to stay")
        path = locate(directory)
        self.directory = path if on_bucket(path) else Path(os.path.abspath(path))
        self._manager = ocp.CheckpointManager(
            self.directory,
            handler_registry=_handlers(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                # The train loop decides when to save; every call saves.
                save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
                # Synchronous: the update step donates its arrays, so nothing may still read them
                # when save() returns, and a clean exit has nothing to wait for.
                enable_async_checkpointing=False,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, or None."""
        step = self._manager.latest_step()
        return None if step is None else int(step)

    def steps(self) -> list[int]:
        """Steps of all finished checkpoints, oldest first."""
        return sorted(int(step) for step in self._manager.all_steps())

    def save(self, step: int, arrays: PyTree[Array], metadata: JsonObject) -> None:
        """Writes arrays and metadata as one atomic item and removes checkpoints beyond `keep`.

        `step` is larger than that of every checkpoint in the directory (else ValueError); `arrays`
        a pytree of jax or numpy arrays, sharded in any way, or None; `metadata` JSON. Raises
        TypeError for a leaf that is not a plain array (it is named), or metadata that is not JSON.
        """
        newest = self.latest_step
        if newest is not None and step <= newest:
            raise ValueError(
                f"step = {step} is not newer than the newest checkpoint, {newest}, in "
                f"{self.directory}: skip the save, or use an empty directory"
            )
        for name, leaf in _named_leaves(arrays).items():
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
                raise TypeError(
                    f"{name} is a {type(leaf).__name__}, not an array: put it in the metadata, or "
                    "wrap it in jnp.asarray"
                )
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                raise TypeError(f"{name} is a typed key: save jax.random.key_data of it")
        plain = _json_mapping(metadata)
        sums = {_ARRAYS: _checksums(arrays), _METADATA: _json_checksum(plain)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    _ARRAYS: ocp.args.StandardSave(arrays),
                    _METADATA: ocp.args.JsonSave(plain),
                    _CHECKSUMS: ocp.args.JsonSave(sums),
                }
            ),
        )

    def restore_latest(
        self,
        abstract: PyTree[jax.ShapeDtypeStruct],
        report: Callable[[str], None] = warnings.warn,
        optional: OptionalArrays = MappingProxyType({}),
    ) -> tuple[int, PyTree[Array], JsonObject] | None:
        """Reads the newest intact checkpoint onto the devices of the shardings in `abstract`.

        The devices may differ from those that saved. Returns (step, arrays, metadata), or None when
        there is none. Damaged ones that are newer are set aside, with a line to `report`.

        Args:
          optional: further entries of the mapping `abstract`, of which those are read that the
            checkpoint has.

        Raises:
          MisfitError: leaves are missing, unexpected, of another shape or dtype, or without a
            sharding (each is named).
          DamagedError: there are checkpoints, and none is intact.
        """
        problems: dict[int, ValueError] = {}
        for step in reversed(self.steps()):
            try:
                path = self.directory / str(step)
                arrays, metadata = _restore(path, abstract, optional=optional)
            except (MisfitError, DamagedError) as error:
                problems[step] = error
                continue
            for damaged, problem in problems.items():
                kept = self._set_aside(damaged)
                report(f"{problem}. Going on from {step}; {kept}")
            return step, arrays, metadata
        if not problems:
            return None
        newest = next(iter(problems.values()))
        if isinstance(newest, MisfitError):
            raise newest
        raise DamagedError(
            "; ".join(map(str, problems.values())) + ". No checkpoint is intact: put one back from "
            "a copy, or run the stage from its start with --restart"
        )

    def wait(self) -> None:
        """Returns once everything passed to `save` is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait`, and releases the directory; not to be used afterwards."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _set_aside(self, step: int) -> str:
        """Takes a damaged checkpoint out of the way of the next save; says where it is now."""
        path = self.directory / str(step)
        if on_bucket(path):  # which has no rename
            self._manager.delete(step)
            return f"{path} was removed"
        aside = path.with_name(f"{step}.damaged")
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        wait_for_all(f"set aside {step}")
        self._manager.reload()
        return f"the damaged one is now {aside}, and can be deleted"


def kept_steps(directory: Path) -> list[int]:
    """Steps of the finished checkpoints of a directory, oldest first, which nothing is changed in:
    another process may write there."""
    names = [path.name for path in directory.glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def restore_part(
    directory: Path, step: int, abstract: PyTree[jax.ShapeDtypeStruct]
) -> PyTree[Array]:
    """Reads some arrays of one checkpoint: those that `abstract` names.

    Raises MisfitError for leaves that it does not have so, DamagedError where it is damaged.
    """
    if not on_bucket(directory):  # TensorStore takes no relative path
        directory = Path(os.path.abspath(directory))
    return _restore(directory / str(step), abstract, part=True)[0]


def _restore(
    path: Path,
    abstract: PyTree[jax.ShapeDtypeStruct],
    *,
    part: bool = False,
    optional: OptionalArrays = MappingProxyType({}),
) -> tuple[PyTree[Array], JsonObject]:
    """The arrays and the metadata of one checkpoint; all processes find it damaged, or none."""
    problem = misfit = ""
    arrays, metadata, sums = None, {}, {}
    try:
        metadata, sums = _read_json(path, _METADATA), _read_json(path, _CHECKSUMS)
        with _quiet():
            saved = _saved_arrays(path)
            tops = {name.partition("/")[0] for name in saved}
            if present := {name: of() for name, of in optional.items() if name in tops}:
                abstract = {**abstract, **present}
            misfit = _misfit(path, saved, abstract, part=part)
            if not misfit:
                arrays = _read_arrays(_path(path / _ARRAYS), abstract, part=part)
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # the checkpoint is not to blame
    except Exception as error:  # Orbax and TensorStore raise any kind, Exception itself too
        text = " ".join(str(error).split()).partition(" See full TensorStore")[0]
        problem = f"{type(error).__name__}: {text[:160]}"
    # The files may be unreadable for one process alone.
    if any_process(bool(problem), None):
        raise DamagedError(f"{path} is damaged ({problem or 'as another process says'})")
    if misfit:
        raise MisfitError(misfit)
    if sums:
        now = {**_checksums(arrays), _METADATA: _json_checksum(metadata)}
        saved = {**sums[_ARRAYS], _METADATA: sums[_METADATA]}
        changed = [name for name, value in now.items() if saved.get(name) != value]
        if any_process(bool(changed), None):
            names = ", ".join(changed[:3]) or "another process"
            raise DamagedError(f"{path} is damaged (values of {names} are not those saved)")
    return arrays, metadata


def _read_json(path: Path, item: str) -> JsonObject:
    """A JSON item of a checkpoint; an earlier version wrote no checksums, which gives none."""
    folder = _path(path / item)
    if item == _CHECKSUMS and not folder.exists():
        return {}
    value = json.loads((folder / "metadata").read_text())
    expected = {_ARRAYS: dict, _METADATA: str} if item == _CHECKSUMS else {}
    if not isinstance(value, dict) or any(
        not isinstance(value.get(key), kind) for key, kind in expected.items()
    ):
        raise ValueError(f"{item} is not what was saved")
    return value


def _saved_arrays(path: Path) -> dict[str, Any]:
    """Name -> what has the shape and dtype of a saved array."""
    tree = ocp.StandardCheckpointHandler().metadata(_path(path / _ARRAYS))
    # None and empty containers are stored as entries without a shape.
    return {name: leaf for name, leaf in _named_leaves(tree.tree).items() if hasattr(leaf, "shape")}


def _misfit(path: Path, saved: Mapping[str, Any], abstract: PyTree, *, part: bool) -> str:
    """Names, shapes and dtypes that differ: Orbax itself would cast a dtype silently."""
    wanted = _named_leaves(abstract)
    problems = [f"{name}: not in the checkpoint" for name in wanted if name not in saved]
    if not part:
        problems += [f"{name}: only in the checkpoint" for name in saved if name not in wanted]
    for name, leaf in wanted.items():
        if leaf.sharding is None:
            problems.append(f"{name}: requested without a sharding")
        if name not in saved:
            continue
        if tuple(saved[name].shape) != tuple(leaf.shape):
            problems.append(f"{name}: saved {tuple(saved[name].shape)}, requested {leaf.shape}")
        if np.dtype(saved[name].dtype) != np.dtype(leaf.dtype):
            problems.append(f"{name}: saved {saved[name].dtype}, requested {leaf.dtype}")
    if not problems:
        return ""
    shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
    return (
        f"the checkpoint {path} does not fit this run:\n  "
        + "\n  ".join(shown)
        + "\nRun it with the config that wrote it, or start in an empty directory."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off the screen what Orbax's other reads say once the first of them has failed: their
    event loop is closed, or nobody waits for them. The error itself is raised."""
    hooks = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda *_: None
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception:
        time.sleep(0.2)
        gc.collect()
        raise
    finally:
        sys.excepthook, sys.unraisablehook = hooks


def _read_arrays(folder: epath.Path, abstract: PyTree, *, part: bool) -> PyTree[Array]:
    """By the handler alone: a checkpointer waits for all processes, and one of them may fail."""
    if not part:
        return ocp.StandardCheckpointHandler().restore(
            folder, args=ocp.args.StandardRestore(abstract)
        )
    wanted = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    return ocp.PyTreeCheckpointHandler().restore(folder, args=wanted)


def _path(path: Path) -> epath.Path:
    return epath.Path(os.fspath(path))


def _checksums(arrays: PyTree[Array]) -> dict[str, str]:
    """The checksum of each array, by its name."""
    leaves = _named_leaves(arrays)
    return dict(zip(leaves, checksums(list(leaves.values())), strict=True))


def _json_checksum(value: JsonObject) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """The handler of each item: Orbax needs it for checkpoints that other processes wrote."""
    registry = ocp.DefaultCheckpointHandlerRegistry()
    for item, save, restore in (
        (_ARRAYS, ocp.args.StandardSave, ocp.args.StandardRestore),
        (_METADATA, ocp.args.JsonSave, ocp.args.JsonRestore),
        (_CHECKSUMS, ocp.args.JsonSave, ocp.args.JsonRestore),
    ):
        registry.add(item, save)
        registry.add(item, restore)
    return registry


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, `opt/0/mu/layers/wq`: the same whether a node is a dict or a named tuple."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _json_mapping(metadata: JsonObject) -> JsonObject:
    """A plain copy of `metadata`, or TypeError: checked before the first byte is written."""
    copy = dict(metadata)
    try:
        restored = json.loads(json.dumps(copy))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata is not JSON: {error}") from error
    for key, value in copy.items():
        # {1: 2} would come back as {"1": 2}; only exact round trips are state.
        if key not in restored or _keys(value) != _keys(restored[key]):
            raise TypeError(f"metadata[{key!r}] has a key that is not a string")
    return restored


def _keys(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [(key, _keys(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_keys(item) for item in value]
    return []
