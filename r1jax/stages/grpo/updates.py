"""The updates of a phase, and what is logged of it when they have ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from r1jax.policy_step import GRPOBatch
from r1jax.run.train_loop import PendingUpdate, TrainLoop
from r1jax.stages.distillation import DIVERGENCE
from r1jax.stages.grpo.groups import Phase
from r1jax.train_step import Metrics


@dataclass
class PhaseUpdates:
    """Updates that were begun, and that the devices may compute while the host goes on.

    facts: metrics of the phase's samples. learning_rate: of an update, by the steps before it.
    processes: that share a batch. trained_tokens: of this process.
    samples_due: whether to store samples. accuracy: held out, for the progress bar.
    apart: other devices sample at the same time.
    """

    loop: TrainLoop
    phase: Phase
    facts: Mapping[str, float]
    learning_rate: Callable[[int], float]
    processes: int
    trained_tokens: int
    rows_filled: float
    samples_due: bool
    accuracy: float | None
    apart: bool
    _pending: list[PendingUpdate] = field(default_factory=list)
    _seconds: float = 0.0
    _divergence: float | None = None  # to a teacher, in the last update

    def begin(self, rows: GRPOBatch, critic: Callable[[], Metrics] | None = None) -> None:
        """Begin an update, and behind it the critic's; it is finite where both are."""
        pending = self.loop.begin_update(rows)
        if critic is not None:
            metrics = pending.metrics | critic()
            metrics["optimizer/finite"] *= metrics["critic/finite"]
            pending = pending._replace(metrics=metrics)
        self._pending.append(pending)
        if not self.apart:
            self._end()

    def _end(self) -> None:
        """Wait for the updates, and log them."""
        while self._pending:
            step = self._pending[0].step
            metrics = self.loop.end_update(self._pending.pop(0))
            if DIVERGENCE in metrics:
                self._divergence = float(metrics[DIVERGENCE])
            rate = {"optimizer/learning_rate": self.learning_rate(step - 1)}
            self.loop.recorder.log(step, {**self.facts, **metrics, **rate})

    def all_begun(self) -> None:
        """What follows is sampling at the same time."""
        self._seconds += self.loop.clock.lap("update")

    def end(self) -> None:
        """Wait for the updates, and log them and the phase."""
        self._end()
        loop, phase = self.loop, self.phase
        self._seconds += loop.clock.lap("update")
        if self.samples_due:
            loop.recorder.log_samples(phase.rows)
        sampled = self.processes * phase.tokens
        timings = {
            "seconds/rollout": phase.rollout_seconds,
            "seconds/score_wait": phase.score_seconds,
            "seconds/update": self._seconds,
            "tokens_per_second/rollout": sampled / phase.rollout_seconds,
        }
        if not self.apart:  # else those seconds are what was left of them behind the sampling
            trained = self.processes * self.trained_tokens
            timings["tokens_per_second/update"] = trained / self._seconds
        timings["update/rows_filled"] = self.rows_filled
        if phase.figures.steps:
            timings["rollout/slot_use"] = phase.figures.slot_use
            timings["rollout/steps"] = phase.figures.steps
        if phase.dropped:
            timings["rollout/questions_dropped"] = phase.dropped
        loop.log_timings(timings)
        loop.progress.update(
            loop.step,
            {
                "reward": self.facts.get("reward/mean"),
                "divergence": self._divergence,
                "length": self.facts["length/mean"],
                "held_out": self.accuracy,
                "tokens_per_second": sampled / phase.rollout_seconds,
            },
        )
