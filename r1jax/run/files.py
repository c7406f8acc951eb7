"""Where a run's files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax

from r1jax.bucket import WorkingCopy, locate, on_bucket
from r1jax.config.run_config import RunConfig
from r1jax.processes import wait_for_all


@dataclass(frozen=True)
class RunFiles:
    """The directory of a run, and of each of its `stages`.

    directory: where files are written; of a run on a bucket, the working copy.
    copy: that working copy; None where the output is a local folder.
    """

    directory: Path
    stages: tuple[str, ...]
    copy: WorkingCopy | None = None

    @staticmethod
    def of(config: RunConfig) -> RunFiles:
        """The files of a run in `output/NAME-sSEED`."""
        home = locate(config.output) / f"{config.name}-s{config.seed}"
        copy = WorkingCopy(str(home)) if on_bucket(home) else None
        names = tuple(stage.name for stage in config.stages)
        return RunFiles(home if copy is None else copy.directory, names, copy)

    def home(self, path: Path) -> Path:
        """Where a path in the run's directory lasts: the path, or its address on the bucket."""
        return path if self.copy is None else self.copy.remote(path)

    def push(self) -> None:
        """Brings what was written so far to where it lasts."""
        if self.copy is not None:
            self.copy.push()

    def pull(self) -> None:
        """Brings what other processes or former runs left on the bucket here."""
        if self.copy is not None:
            self.copy.pull()

    def wait_for_files(self, where: str) -> None:
        """Returns once every process has arrived and sees the files that process 0 wrote."""
        if jax.process_index() == 0:
            self.push()
        wait_for_all(where)
        if jax.process_index() > 0:
            self.pull()

    def stage_directory(self, name: str) -> Path:
        """`stages/NN-name`; the number stays what it was when the stage began."""
        stages = self.directory / "stages"
        for path in sorted(stages.glob("*-*")):
            if path.name.partition("-")[2] == name:
                return path
        return stages / f"{self.stages.index(name):02d}-{name}"

    def trained(self, stage: str) -> Path:
        """The Hugging Face directory that a train stage leaves."""
        return self.home(self.stage_directory(stage) / "model")
