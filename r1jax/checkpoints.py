"""Atomic checkpoints: the state of a train loop on disk, restorable onto any device layout.

A checkpoint holds all that a resumed run needs to equal one that was never killed: arrays (weights,
optimizer, keys) and a JSON mapping (data cursor, metrics cursor). Both are written by one
`orbax.checkpoint.CheckpointManager` call, into one directory:

    DIRECTORY/STEP.orbax-checkpoint-tmp/...   while it is written
    DIRECTORY/STEP/{arrays,metadata}/...      after one rename(2), which is the commit

(A bucket, `gs://...`, has no rename: there an object `commit_success.txt` is the commit.) A name
without the suffix is a finished checkpoint, whenever a process is killed. Older ones are removed
after the commit, oldest first, and what a killed process left when the directory is opened again.
Not every file is synced before the rename: surviving a power cut is up to the file system.

Every process of a `jax.distributed` run makes the same calls in the same order: Orbax writes each
process's shards, synchronises, and commits from process 0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from r1jax.bucket import locate, on_bucket
from r1jax.files import JsonObject

if TYPE_CHECKING:
    from jaxtyping import Array, PyTree

_ARRAYS = "arrays"
_METADATA = "metadata"


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
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    _ARRAYS: ocp.args.StandardSave(arrays),
                    _METADATA: ocp.args.JsonSave(_json_mapping(metadata)),
                }
            ),
        )

    def restore_latest(
        self, abstract: PyTree[jax.ShapeDtypeStruct]
    ) -> tuple[int, PyTree[Array], JsonObject] | None:
        """Reads the newest finished checkpoint onto the devices of the shardings in `abstract`.

        The devices may differ from those that saved. Returns (step, arrays, metadata), or None when
        there is none. Raises ValueError for leaves that are missing, unexpected, of another shape
        or dtype, or without a sharding (each is named).
        """
        step = self.latest_step
        if step is None:
            return None
        self._check(step, abstract)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    _ARRAYS: ocp.args.StandardRestore(abstract),
                    _METADATA: ocp.args.JsonRestore(),
                }
            ),
        )
        return step, restored[_ARRAYS], restored[_METADATA]

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

    def _check(self, step: int, abstract: PyTree) -> None:
        """Compares names, shapes and dtypes first: Orbax itself would cast a dtype silently."""
        saved = _named_leaves(self._manager.item_metadata(step)[_ARRAYS].tree)
        # None and empty containers are stored as entries without a shape.
        saved = {name: leaf for name, leaf in saved.items() if hasattr(leaf, "shape")}
        wanted = _named_leaves(abstract)
        problems = [f"{name}: not in the checkpoint" for name in wanted if name not in saved]
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
        if problems:
            shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
            raise ValueError(
                f"the checkpoint {self.directory / str(step)} does not fit this run:\n  "
                + "\n  ".join(shown)
                + "\nRun it with the config that wrote it, or start in an empty directory."
            )


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """The handler of each item: Orbax needs it for checkpoints that other processes wrote."""
    registry = ocp.DefaultCheckpointHandlerRegistry()
    for item, save, restore in (
        (_ARRAYS, ocp.args.StandardSave, ocp.args.StandardRestore),
        (_METADATA, ocp.args.JsonSave, ocp.args.JsonRestore),
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
