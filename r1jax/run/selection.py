"""Which stages of a run to run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from r1jax.config.run_config import RunConfig


@dataclass(frozen=True)
class Selection:
    """All stages of a run, one, or from one to another (both included).

    Finished stages are skipped, selected or not. Those in `restart` are run from their start.
    """

    only: str | None = None
    first: str | None = None
    last: str | None = None
    restart: tuple[str, ...] = ()

    def stages(self, config: RunConfig) -> list[str]:
        """The names of the selected stages, in order; ValueError for a name that is not there."""
        names = [stage.name for stage in config.stages]
        options = [("--only", self.only), ("--from", self.first), ("--until", self.last)]
        for option, name in (*options, *(("--restart", name) for name in self.restart)):
            if name is not None and name not in names:
                raise ValueError(f"{option} {name}: no such stage; {likely_name(name, names)}")
        if self.only is not None:
            if self.first is not None or self.last is not None:
                raise ValueError("--only does not go with --from or --until")
            return [self.only]
        start = 0 if self.first is None else names.index(self.first)
        end = len(names) if self.last is None else names.index(self.last) + 1
        if start >= end:
            raise ValueError(f"--from {self.first} comes after --until {self.last}")
        return names[start:end]


EVERYTHING = Selection()


def likely_name(name: str, names: Sequence[str]) -> str:
    """What a mistyped name may have been."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
