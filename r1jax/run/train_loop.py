"""What every train loop needs around its steps: state, checkpoints, metrics, stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax.checkpoints import Checkpoints
from r1jax.data.order import DataCursor
from r1jax.files import JsonObject
from r1jax.metrics.compilations import CompilationCounter, memory
from r1jax.metrics.heartbeat import HEARTBEAT, span
from r1jax.metrics.profiling import StepProfiler
from r1jax.metrics.progress import Progress
from r1jax.metrics.recorder import Recorder
from r1jax.models.parameters import Params, abstract_weights
from r1jax.run.record import Clock
from r1jax.run.resolve import StageRun
from r1jax.run.stop import Preempted, RunError
from r1jax.settings.stage import REFERENCE, TEACHER, TrainStage
from r1jax.sharding import Layout, from_process_rows, move_rows, to_process_rows
from r1jax.train_step import (
    Batch,
    Metrics,
    TrainState,
    TrainStep,
    abstract_train_state,
    create_train_state,
    jit_update,
)

if TYPE_CHECKING:
    from jaxtyping import PyTree

Snapshot = Callable[[], DataCursor]
"""Gives the data cursor of the moment at which it was taken, as JSON, if that is wanted at all."""

_SAMPLING = "sampling"  # the entry of a checkpoint

_WARM_UP = 3  # rows of timings in which everything may be compiled


class Resumable(Protocol):
    """A data stream whose position, the data cursor, is JSON."""

    def state(self) -> DataCursor: ...

    def restore(self, state: DataCursor) -> None: ...


class CriticStart(NamedTuple):
    """The train state of a critic: its shapes, and how the first one is made."""

    abstract: TrainState
    create: Callable[[], TrainState]


class Beside(NamedTuple):
    """What is kept beside the trained weights: the reference policy, the teacher that the stage
    names (an argument of its update), and a critic."""

    reference: bool = False
    teacher: bool = False
    critic: CriticStart | None = None


_ALONE = Beside()


class PendingUpdate(NamedTuple):
    """An update that the devices may still compute. step: the stage's, behind it."""

    step: int
    batch: PyTree
    metrics: Metrics


@dataclass
class TrainLoop:
    """The state of one train loop and its one atomic checkpoint; made by `train_loop`.

    A checkpoint holds weights, optimizer, step, the data cursor, the reference policy and the train
    state of the critic (if any) and the metrics cursor; that of a run that is stopped as it samples
    beside an update has the weights that sample, too. Random numbers are functions of (seed, step,
    ids): there is no key to keep.
    """

    stage: TrainStage
    run: StageRun
    steps: int
    step: int
    state: TrainState
    reference: Params | None
    recorder: Recorder
    checkpoints: Checkpoints
    progress: Progress
    clock: Clock
    _update: Callable[..., tuple[TrainState, Metrics]]
    _compilations: CompilationCounter
    _profiler: StepProfiler
    _bad_in_a_row: int
    # The step whose held-out evaluation is logged: a run that is stopped at its step goes on there.
    held_out_step: int | None
    # Weights that a phase is sampled with as the update runs: a run that is stopped there goes on
    # with them. None between two phases.
    sampling: Params | None = None
    # A teacher's weights, which are constants: of no checkpoint, and the update's last argument.
    teacher: Params | None = None
    critic: TrainState | None = None
    _timed: int = 0  # rows of timings in this process
    _warned: bool = False
    _batch_shape: tuple[int, ...] = ()

    def begin_round(self, updates: int = 1) -> None:
        """Call it where the work for the next `updates` steps begins."""
        self._profiler.begin_round(self.step, updates)

    @span("place")
    def to_devices(self, batch: Batch, layout: Layout | None = None) -> Batch:
        """This process's rows [n, ...], its share of the batch in `layout` (default: the training
        mesh's), onto the training mesh."""
        training = self.run.layouts.training
        layout = layout or training
        rows = jax.tree.map(lambda leaf: from_process_rows(leaf, layout), batch)
        return rows if layout == training else move_rows(rows, training)

    def update(self, batch: PyTree) -> Metrics:
        """One update. A non-finite one was skipped: its batch is saved, too many in a row stop."""
        return self.end_update(self.begin_update(batch))

    @span("update")
    def begin_update(self, batch: PyTree) -> PendingUpdate:
        """As `update`, without waiting for the devices; end it before anything is saved."""
        self._batch_shape = max((x.shape for x in jax.tree.leaves(batch)), key=math.prod)
        teacher = () if self.teacher is None else (self.teacher,)
        self.state, metrics = self._update(self.state, batch, *teacher)
        self.step += 1
        return PendingUpdate(self.step, batch, metrics)

    def end_update(self, pending: PendingUpdate) -> Metrics:
        with span("update"):
            finite = bool(float(pending.metrics["optimizer/finite"]))  # waits for the devices
        HEARTBEAT.set_step(pending.step)
        self._profiler.end_step(pending.step)
        self._bad_in_a_row = 0 if finite else self._bad_in_a_row + 1
        if not finite:
            self._keep_bad_batch(pending.batch, pending.step)
        return pending.metrics

    def _keep_bad_batch(self, batch: PyTree, step: int) -> None:
        suffix = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self.run.directory / "bad_batches" / f"step-{step:06d}{suffix}.npz"
        path.parent.mkdir(exist_ok=True)
        leaves = jax.tree.leaves_with_path(batch)
        layout = self.run.layouts.training
        rows = {jax.tree_util.keystr(key): to_process_rows(leaf, layout) for key, leaf in leaves}
        np.savez(path, **rows)  # type: ignore[arg-type]  # its stub takes the names for options
        home = self.run.files.home(path)
        self.progress.print(f"step {step}: loss or gradient not finite, update skipped ({home})")
        if self._bad_in_a_row >= self.stage.max_bad_steps:
            raise RunError(
                f"{self.stage.name}: {self._bad_in_a_row} updates in a row were not finite, the "
                f"last at step {step}; their batches are in {home.parent}. Lower "
                "optimizer.learning_rate or optimizer.max_grad_norm, use compute_dtype: float32 to "
                "see whether it is a matter of range, and look at sampler/gap_max in metrics.jsonl"
            )

    def log_timings(self, timings: Mapping[str, float]) -> None:
        """Figures that differ from run to run stay out of metrics.jsonl."""
        figures = {**self._compilations.figures(), **memory()}
        self.recorder.log_timings(self.step, {**timings, **figures})
        self._print_compilations()

    def _print_compilations(self) -> None:
        """Once what the cache has saved; once, behind the first steps, what is compiled again."""
        self._timed += 1
        again, counted = self._compilations.recompiled(), self._compilations
        lookups = counted.cache_hits + counted.cache_misses
        if self._timed == 1 and lookups:
            self.progress.print(
                f"{self.stage.name}: {counted.count} programs compiled in "
                f"{counted.seconds:.0f} s; the cache had {counted.cache_hits} of {lookups}"
            )
        if self._timed > _WARM_UP and again and not self._warned:
            self._warned = True
            functions = ", ".join(f"{name} {again[name]:.1f} s" for name in list(again)[:3])
            self.progress.print(
                f"{self.stage.name}: step {self.step} compiled again: {functions} (batches of "
                f"{list(self._batch_shape)}). A new length costs this once; if compile_count in "
                "timings.jsonl keeps growing, raise length_bucket. JAX_LOG_COMPILES=1 shows shapes"
            )

    def save_if_due(self, data: Resumable) -> None:
        """Save on schedule, at the end, and when told to stop (then raise `Preempted`)."""
        stop = self.run.stop.in_any_process()
        if stop or self.step % self.stage.checkpoint_every == 0 or self.step == self.steps:
            self._save(data.state())
        if stop and self.step < self.steps:
            raise Preempted(f"{self.stage.name}: saved at step {self.step}")

    def leave_if_stopped(self, before: Snapshot, *, end: Callable[[], None] | None = None) -> None:
        """When told to stop, save and raise `Preempted`.

        For work between two steps that leaves no trace until it is done: a resumed run begins with
        it again, at the data cursor `before()`, which is that before the work.

        Args:
          end: called before the save, to end what is under way.
        """
        if self.run.stop.in_any_process():
            if end is not None:
                end()
            self._save(before())
            raise Preempted(f"{self.stage.name}: saved at step {self.step}")

    @span("checkpoint")
    def _save(self, data_cursor: DataCursor) -> None:
        if self.checkpoints.latest_step != self.step:
            arrays: dict[str, PyTree] = {"state": self.state}
            if self.reference is not None:
                arrays["reference"] = self.reference
            if self.critic is not None:
                arrays["critic"] = self.critic
            if self.sampling is not None:
                arrays[_SAMPLING] = self.sampling
            metadata = {
                "data": data_cursor,
                "metrics": self.recorder.cursor(),
                "bad_in_a_row": self._bad_in_a_row,
                "held_out_step": self.held_out_step,
                "seconds": self.clock.seconds,
            }
            # First the lines that the metrics' cursor counts on, then the checkpoint that has it.
            self.run.files.push()
            self.checkpoints.save(self.step, arrays, metadata)
            self._compilations.recompiled()  # checksums of each shape, which are no new lengths
            self.clock.lap("checkpoint")
        self.run.record.mark(self.stage, "running", self.clock.seconds)

    @span("export")
    def finish(self) -> None:
        """Export the weights as a Hugging Face directory, from where later stages take them."""
        model = self.run.models.of(self.stage.name)
        model.export(self.run.files.trained(self.stage.name), self.state.params)
        self.clock.lap("export")
        self.run.record.mark(self.stage, "done", self.clock.seconds)


@contextmanager
def train_loop(
    stage: TrainStage,
    run: StageRun,
    optimizer: optax.GradientTransformation,
    update: TrainStep[Batch],
    data: Resumable,
    *,
    steps: int,
    beside: Beside = _ALONE,
) -> Iterator[TrainLoop]:
    """Gives the loop at its newest checkpoint, or at the start; metric files are cut to match.

    A resumed loop never makes the initial weights: they would be in memory twice for a moment.
    """
    clock, process = Clock(), jax.process_index()
    model = run.models.of(stage.name)
    abstract = abstract_train_state(
        abstract_weights(model.decoder), optimizer, run.layouts.training
    )
    with ExitStack() as stack:
        recorder = Recorder(
            run.directory,
            run.config.trackers,
            run_name=f"{run.files.directory.name}/{stage.name}",
            config=run.config.model_dump(mode="json"),
            process_index=process,
        )
        stack.enter_context(recorder)
        directory = run.files.home(run.directory / "checkpoints")
        checkpoints = stack.enter_context(Checkpoints(directory, keep=stage.keep_checkpoints))
        compilations = stack.enter_context(CompilationCounter())
        with span("setup"):
            wanted: dict[str, PyTree] = {"state": abstract}
            if beside.reference:
                wanted["reference"] = abstract.params
            if beside.critic is not None:
                wanted["critic"] = beside.critic.abstract
            notes: list[str] = []
            saved = checkpoints.restore_latest(
                wanted,
                notes.append,
                {_SAMPLING: lambda: abstract_weights(run.models.sampler_of(stage.name).decoder)},
            )
            arrays: dict[str, PyTree] = {}
            metadata: JsonObject = {"metrics": {}, "bad_in_a_row": 0}
            step = 0
            if saved is None:
                params = run.models.initial_weights(stage.name)
                if beside.reference:
                    arrays["reference"] = _weights_used(stage, run, REFERENCE, of=stage.name)
                    if arrays["reference"] is None:
                        arrays["reference"] = copy_weights(params)
                arrays["state"] = create_train_state(params, optimizer, abstract)
                del params
                if beside.critic is not None:
                    arrays["critic"] = beside.critic.create()
            else:
                step, arrays, metadata = saved
                data.restore(metadata["data"])
                clock = Clock(metadata["seconds"])
            recorder.rewind(metadata["metrics"])
            HEARTBEAT.set_step(step)
            progress = Progress(run.label_of(stage), steps, start=step, process_index=process)
            stack.enter_context(progress)
            for note in notes:
                progress.print(f"{stage.name}: {note}")
            if saved is not None:
                progress.print(f"{stage.name}: resumed at step {step}")
            profiler = StepProfiler(run.profile, run.directory / "profile")
            stack.callback(_end_profile, profiler, run, progress)
            clock.lap("setup")
        yield TrainLoop(
            stage,
            run,
            steps,
            step,
            arrays.pop("state"),  # only the loop keeps them: it replaces both
            arrays.pop("reference", None),
            recorder,
            checkpoints,
            progress,
            clock,
            jit_update(update, abstract),
            compilations,
            profiler,
            metadata["bad_in_a_row"],
            metadata.get("held_out_step"),
            arrays.pop(_SAMPLING, None),
            _weights_used(stage, run, TEACHER) if beside.teacher else None,
            arrays.pop("critic", None),
        )


def _weights_used(
    stage: TrainStage, run: StageRun, gives: str, of: str | None = None
) -> Params | None:
    """The weights that the stage has from others as `gives`, on the devices; None: it has none.

    Args:
      of: the stage whose model reads them; None: a model of their own.
    """
    for use in stage.other_weights():
        if use.gives == gives:
            return run.models.weights(use.source, run.models.of(of or use.source))
    return None


def copy_weights(params: Params) -> Params:
    """Arrays apart from those of the policy, which the update donates."""
    copy: Params = jax.tree.map(jnp.copy, params)
    return copy


def _end_profile(profiler: StepProfiler, run: StageRun, progress: Progress) -> None:
    profiler.close()
    if profiler.wrote:
        home = run.files.home(profiler.directory)
        progress.print(
            f"Profile: {home}; to look at it: pip install xprof, and xprof --logdir {home}"
        )
