"""What every train loop needs around its steps: state, checkpoints, metrics, stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax.checkpoints import Checkpoints
from r1jax.data.order import DataCursor
from r1jax.metrics import (
    HEARTBEAT,
    CompilationCounter,
    Progress,
    Recorder,
    StepProfiler,
    memory,
    span,
)
from r1jax.processes import any_process
from r1jax.run.context import Clock, Context, Preempted, RunError
from r1jax.settings.stage import TrainStage
from r1jax.sharding import Layout, from_process_rows, move_rows, to_process_rows
from r1jax.train_step import TrainState, abstract_train_state, create_train_state, jit_update

_WARM_UP = 3  # rows of timings in which everything may be compiled


class Resumable(Protocol):
    """A data stream that can continue from its saved position."""

    def state(self) -> DataCursor: ...

    def restore(self, state: DataCursor) -> None: ...


class TrainLoop:
    """The state of one train loop and its one atomic checkpoint.

    A checkpoint holds weights, optimizer, step, the data cursor, the reference policy and the
    metrics cursor. Random numbers are functions of (seed, step, ids), so there is no key to keep.
    `state` and `reference` exist once `restore` was called: a resumed loop never makes the initial
    ones, which would be in memory twice for a moment.
    """

    state: TrainState
    reference: Any

    def __init__(
        self,
        stage: TrainStage,
        context: Context,
        directory: Path,
        steps: int,
        optimizer: optax.GradientTransformation,
        update: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
        *,
        with_reference: bool = False,
    ) -> None:
        self._stage, self._context, self._directory = stage, context, directory
        self._steps = steps
        self._optimizer, self._with_reference = optimizer, with_reference
        self._layout = context.layout
        self._model = context.model_of(stage.name)
        self._abstract = abstract_train_state(
            self._model.abstract_params(), optimizer, self._layout
        )
        self._update = jit_update(update, self._abstract)
        self.step = 0
        self._bad_in_a_row = 0
        config = context.config
        self.recorder = Recorder(
            directory,
            config.trackers,
            run_name=f"{context.directory.name}/{stage.name}",
            config=config.model_dump(mode="json"),
            process_index=jax.process_index(),
        )
        checkpoints = context.home(directory / "checkpoints")
        self.checkpoints = Checkpoints(checkpoints, keep=stage.keep_checkpoints)
        self.compilations = CompilationCounter()
        self._timed = 0  # rows of timings in this process
        self._warned = False
        self._batch_shape: tuple[int, ...] = ()
        self._profiler = StepProfiler(context.profiled_steps(stage.name), directory / "profile")
        self.clock = Clock()

    def __enter__(self) -> TrainLoop:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._profiler.close()
        if self._profiler.wrote:
            self._context.profiles.append(self._profiler.directory)
        if hasattr(self, "progress"):
            self.progress.__exit__(kind, error, trace)
        self.compilations.close()
        self.recorder.close()
        self.checkpoints.close()

    @span("setup")
    def restore(self, data: Resumable) -> None:
        """Go to the newest checkpoint, or to the start; metric files are cut to match."""
        abstract = {"state": self._abstract}
        if self._with_reference:
            abstract["reference"] = self._abstract.params
        found = self.checkpoints.restore_latest(abstract)
        if found is None:
            params = self._context.initial_weights(self._stage.name)
            # A copy of its own: the update donates the policy's arrays.
            self.reference = jax.tree.map(jnp.copy, params) if self._with_reference else None
            self.state = create_train_state(params, self._optimizer, self._abstract)
            self.recorder.rewind({})
        else:
            self.step, arrays, metadata = found
            self.state = arrays["state"]
            self.reference = arrays.get("reference")
            data.restore(metadata["data"])
            self.recorder.rewind(metadata["metrics"])
            self._bad_in_a_row = metadata["bad_in_a_row"]
            self.clock = Clock(metadata["seconds"])
        HEARTBEAT.set_step(self.step)
        self.progress = Progress(
            self._stage.name,
            self._steps,
            start=self.step,
            process_index=jax.process_index(),
        )
        self.progress.__enter__()
        if found is not None:
            self.progress.print(f"{self._stage.name}: resumed at step {self.step}")
        self.clock.lap("setup")

    def begin_round(self, updates: int = 1) -> None:
        """Call it where the work for the next `updates` steps begins."""
        self._profiler.begin_round(self.step, updates)

    @span("place")
    def place(self, batch: Any, share: Layout | None = None) -> Any:
        """This process's rows [n, ...] onto the mesh, split along the batch.

        Args:
          share: whose share of the batch the rows are; default: the mesh's that trains.
        """
        share = share or self._layout
        placed = jax.tree.map(lambda rows: from_process_rows(rows, share), batch)
        return placed if share == self._layout else move_rows(placed, self._layout)

    def update(self, batch: Any) -> dict[str, Any]:
        """One update. A non-finite one was skipped: its batch is saved, too many in a row stop."""
        with span("update"):
            self._batch_shape = max((x.shape for x in jax.tree.leaves(batch)), key=math.prod)
            self.state, metrics = self._update(self.state, batch)
            self.step += 1
            finite = bool(float(metrics["optimizer/finite"]))  # waits for the devices
        HEARTBEAT.set_step(self.step)
        self._profiler.end_step(self.step)
        if finite:
            self._bad_in_a_row = 0
            return metrics
        self._bad_in_a_row += 1
        suffix = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._directory / "bad_batches" / f"step-{self.step:06d}{suffix}.npz"
        path.parent.mkdir(exist_ok=True)
        leaves = jax.tree.leaves_with_path(batch)
        rows: dict[str, Any] = {jax.tree_util.keystr(k): to_process_rows(x) for k, x in leaves}
        np.savez(path, **rows)
        self.progress.print(
            f"step {self.step}: loss or gradient not finite, update skipped "
            f"({self._context.home(path)})"
        )
        if self._bad_in_a_row >= self._stage.max_bad_steps:
            raise RunError(
                f"{self._stage.name}: {self._bad_in_a_row} updates in a row were not finite, the "
                f"last at step {self.step}; their batches are in "
                f"{self._context.home(path.parent)}. Lower "
                "optimizer.learning_rate or optimizer.max_grad_norm, use compute_dtype: float32 to "
                "see whether it is a matter of range, and look at sampler/gap_max in metrics.jsonl"
            )
        return metrics

    def log_timings(self, timings: Mapping[str, Any]) -> None:
        """Figures that differ from run to run stay out of metrics.jsonl."""
        figures = {**self.compilations.figures(), **memory()}
        self.recorder.log_timings(self.step, {**timings, **figures})
        self._tell_compilations()

    def _tell_compilations(self) -> None:
        """Once what the cache has saved; once, behind the first steps, what is compiled again."""
        self._timed += 1
        again, counted = self.compilations.recompiled(), self.compilations
        asked = counted.cache_hits + counted.cache_misses
        if self._timed == 1 and asked:
            self.progress.print(
                f"{self._stage.name}: {counted.count} programs compiled in "
                f"{counted.seconds:.0f} s; the cache had {counted.cache_hits} of {asked}"
            )
        if self._timed > _WARM_UP and again and not self._warned:
            self._warned = True
            functions = ", ".join(f"{name} {again[name]:.1f} s" for name in list(again)[:3])
            self.progress.print(
                f"{self._stage.name}: step {self.step} compiled again: {functions} (batches of "
                f"{list(self._batch_shape)}). A new length costs this once; if compile_count in "
                "timings.jsonl keeps growing, raise length_bucket. JAX_LOG_COMPILES=1 shows shapes"
            )

    @span("checkpoint")
    def save(self, place: Mapping[str, Any]) -> None:
        if self.checkpoints.latest_step == self.step:
            return
        arrays: dict[str, Any] = {"state": self.state}
        if self.reference is not None:
            arrays["reference"] = self.reference
        metadata = {
            "data": place,
            "metrics": self.recorder.cursor(),
            "bad_in_a_row": self._bad_in_a_row,
            "seconds": self.clock.seconds,
        }
        # First the lines that the metrics' cursor counts on, then the checkpoint that has it.
        self._context.push()
        self.checkpoints.save(self.step, arrays, metadata)
        self.clock.lap("checkpoint")

    def save_if_due(self, data: Resumable) -> None:
        """Save on schedule, at the end, and when asked to stop (then raise `Preempted`)."""
        stop = any_process(self._context.stop_requested)
        if stop or self.step % self._stage.checkpoint_every == 0 or self.step == self._steps:
            self._save_and_mark(data.state())
        if stop and self.step < self._steps:
            raise Preempted(f"{self._stage.name}: saved at step {self.step}")

    def leave_if_asked(self, place: Mapping[str, Any]) -> None:
        """When asked to stop, save and raise `Preempted`.

        For work between two steps that leaves no trace until it is done: a resumed run begins with
        it again, where `place` (what the data's `state` was before that work) says.
        """
        if any_process(self._context.stop_requested):
            self._save_and_mark(place)
            raise Preempted(f"{self._stage.name}: saved at step {self.step}")

    def _save_and_mark(self, place: Mapping[str, Any]) -> None:
        self.save(place)
        self._context.mark(self._stage.name, self._stage.kind, "running", self.clock.seconds)

    @span("export")
    def finish(self) -> None:
        """Export the weights as a Hugging Face directory, from where later stages take them."""
        self._model.export(self._context.trained(self._stage.name), self.state.params)
        self.clock.lap("export")
        self._context.mark(self._stage.name, self._stage.kind, "done", self.clock.seconds)
