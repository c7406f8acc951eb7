"""Runs whose outputs are on Google Cloud Storage: `output=gs://BUCKET/FOLDER`.

An object store can only replace whole objects, so the files of a run are of two kinds:

- **Large ones are written to the bucket.** Checkpoints, by Orbax and TensorStore, whose last object
  says that they are complete; and Hugging Face directories, tensor by tensor, `config.json` last.
- **All others are written to a local `WorkingCopy`**, which is uploaded, object by object and
  `run.json` last, before each checkpoint and whenever the run's record changes. So a checkpoint
  never refers to lines that the bucket does not have, and a stage that `run.json` calls done has
  its results there.

A process may therefore be killed between any two writes: it leaves files at least as long as its
checkpoint says, which a resumed run cuts. The working copy is always made anew from the bucket.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import IO, Any, cast

_SCHEME = "gs://"
_RECORD = "run.json"
_PREFIX, _LOCK = "r1jax-run-", "lock"  # of working copies
# Folders that no working copy gets: weights, a dataset's second form, traces, and other runs.
_LARGE = ("checkpoints", "model", "exported", "tfds", "profile", "evaluations")
_PART_BYTES = 32 << 20  # of a request; several of them are under way at once


def locate(path: str | os.PathLike[str]) -> Path:
    """A local path as `Path`, and one on a bucket as `etils.epath.Path`, which has its methods.

    Raises ValueError for another scheme than gs://, ImportError without gcsfs.
    """
    text = os.fspath(path)
    scheme, separator, path_of_bucket = text.partition("://")
    if not separator:
        return Path(path)
    if scheme != "gs" or not path_of_bucket.strip("/"):
        problem = f"{scheme}:// is not known" if scheme != "gs" else "no bucket is named"
        raise ValueError(
            f"{text}: {problem}; give a local path, or gs://BUCKET/... for Google Cloud Storage"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError(f"{text}: Google Cloud Storage needs gcsfs: pip install 'r1jax[gcs]'")
    import fsspec
    from etils import epath

    # Orbax uses it, too. Other processes and TensorStore write to the same folders, so listings are
    # not cached. Uploads are cut into blocks.
    options = {"use_listings_cache": False, "block_size": _PART_BYTES}
    fsspec.config.conf["gs"] = options | fsspec.config.conf.get("gs", {})
    # gcsfs logs each error that it raises, with a traceback.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return cast(Path, epath.Path(text))


def on_bucket(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(_SCHEME)


def check_access(folder: str) -> None:
    """Looks at the bucket, and writes, lists, reads and deletes an object in this folder.

    Raises ValueError if one of these fails; names it and the bucket.
    """
    from google.cloud import storage

    files = _file_system(folder)
    folder = folder.rstrip("/")
    bucket = folder.removeprefix(_SCHEME).partition("/")[0]
    probe = f"{folder}/access-{uuid.uuid4().hex}"
    for operation, act in (
        # Orbax does this, too; access to the objects does not include access to the bucket.
        ("look at the bucket (storage.buckets.get)", lambda: storage.Client().get_bucket(bucket)),
        ("write (storage.objects.create)", lambda: files.pipe_file(probe, b"r1jax")),
        ("list (storage.objects.list)", lambda: files.find(probe)),
        ("read (storage.objects.get)", lambda: files.cat_file(probe)),
        ("delete (storage.objects.delete)", lambda: files.rm_file(probe)),
    ):
        try:
            act()
        except Exception as error:  # of several libraries, with no class in common
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{folder}: cannot {operation} gs://{bucket} ({reason}). Check the bucket's name, "
                "and that this machine's account has the roles roles/storage.objectAdmin and "
                "roles/storage.legacyBucketReader on it"
            ) from error


def check_readable(path: str | os.PathLike[str]) -> Path:
    """A path, as `locate`, whose bucket can be read; the path itself need not exist.

    Raises ValueError if it cannot be; names the bucket and the reason.
    """
    located = locate(path)
    if on_bucket(path):
        bucket = os.fspath(path).removeprefix(_SCHEME).partition("/")[0]
        try:
            located.exists()
        except Exception as error:  # of several libraries, with no class in common
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"cannot read gs://{bucket} ({reason}). Check the bucket's name, the network, and "
                "that this machine's account has the role roles/storage.objectViewer on it"
            ) from error
    return located


def read_range(path: Path, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of an object; large ranges in several requests at once."""
    starts = list(range(start, stop, _PART_BYTES))
    stops = [*starts[1:], stop]
    whole = [os.fspath(path)] * len(starts)
    parts = _file_system(path).cat_ranges(whole, starts, stops, on_error="raise")
    return b"".join(parts)


def download(folder: Path, patterns: Sequence[str], target: Path) -> None:
    """Copies the files of a folder whose names match one of the patterns."""
    for path in folder.iterdir():
        if any(path.match(pattern) for pattern in patterns):
            (target / path.name).write_bytes(path.read_bytes())


def copy_folder(source: Path, target: Path, last: str) -> None:
    """Copies a folder, local or on a bucket, to another; the file `last` after all others."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == last):
        if path.is_dir():
            copy_folder(path, target / path.name, last)
            continue
        with path.open("rb") as content, (target / path.name).open("wb") as copy:
            shutil.copyfileobj(content, copy, _PART_BYTES)


@contextmanager
def local_copy(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A local directory of a run: itself, or a working copy (no weights), uploaded at the end."""
    if not on_bucket(directory):
        yield Path(directory)
        return
    copy = WorkingCopy(os.fspath(directory))
    copy.pull()
    yield copy.directory
    copy.push()


class WorkingCopy:
    """The smaller files of a run on a bucket (`home`), as local files (`directory`).

    The copy is empty at first, and removed when this process ends or, if that is killed, by the
    next one.
    """

    def __init__(self, home: str) -> None:
        self.home = locate(home.rstrip("/"))
        self._files = _file_system(self.home)
        _remove_abandoned()
        self._scratch = TemporaryDirectory(prefix=_PREFIX)
        self._lock = _locked(Path(self._scratch.name))
        self.directory = Path(self._scratch.name) / self.home.name
        self.directory.mkdir()
        self._pulled: dict[str, Any] = {}  # name -> generation of the object
        self._pushed: dict[str, tuple[int, int]] = {}  # name -> state of the file

    def pull(self) -> None:
        """Downloads objects that are new on the bucket, or were replaced there."""
        prefix = f"{os.fspath(self.home).removeprefix(_SCHEME)}/"
        generations = {
            path.removeprefix(prefix): entry["generation"]
            for path, entry in self._files.find(f"{_SCHEME}{prefix}", detail=True).items()
            if not path.endswith("/")  # some tools make an object for a folder
        }
        small = {n: g for n, g in generations.items() if not {*n.split("/")} & {*_LARGE}}
        newer = {name: g for name, g in small.items() if self._pulled.get(name) != g}
        targets = [self.directory / name for name in newer]
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        self._files.get([self._object(name) for name in newer], [str(path) for path in targets])
        self._pulled |= newer
        self._pushed |= {name: _state(self.directory / name) for name in newer}

    def push(self) -> None:
        """Uploads changed files and deletes objects whose files were deleted; `run.json` last."""
        states: dict[str, tuple[int, int]] = {}
        contents: dict[str, bytes] = {}
        for path in self.directory.rglob("*"):
            name = path.relative_to(self.directory).as_posix()
            with suppress(FileNotFoundError):  # a tracker has removed its file meanwhile
                if path.is_file():
                    state = _state(path)
                    if self._pushed.get(name) != state:
                        contents[self._object(name)] = path.read_bytes()
                    states[name] = state
        record = contents.pop(self._object(_RECORD), None)
        if contents:
            self._files.pipe(contents)
        for name in self._pushed.keys() - states.keys():
            with suppress(FileNotFoundError):
                self._files.rm_file(self._object(name))
            del self._pushed[name]
        if record is not None:
            self._files.pipe_file(self._object(_RECORD), record)
        self._pushed = states

    def remote(self, path: Path) -> Path:
        """The path on the bucket of a path in the copy."""
        return self.home / path.relative_to(self.directory)

    def _object(self, name: str) -> str:
        return f"{os.fspath(self.home)}/{name}"


def _locked(scratch: Path) -> IO[str]:
    """A lock in this folder, held until it is closed or this process ends."""
    lock = open(scratch / "new-lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(lock.name, scratch / _LOCK)  # under this name it was always locked
    return lock


def _remove_abandoned() -> None:
    """Removes the working copies of processes that were killed, which could fill the disk."""
    for scratch in Path(gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError), open(scratch / _LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(scratch, ignore_errors=True)


def _file_system(path: str | os.PathLike[str]) -> Any:
    locate(path)  # configures it
    import fsspec

    return fsspec.filesystem("gs")


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size
