"""The questions of a stage, and what one phase leaves to the next: all of it in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from r1jax.data.order import DataCursor
from r1jax.data.prompts import Prompt, PromptStream
from r1jax.files import JsonObject
from r1jax.processes import process_batch_slice
from r1jax.run.resolve import StageRun
from r1jax.run.seeds import seed_of
from r1jax.run.train_loop import Snapshot
from r1jax.sharding import Layout
from r1jax.stages.grpo.groups import (
    Group,
    Phase,
    Question,
    decode_group,
    decode_phase,
    encode_group,
    encode_phase,
)
from r1jax.stages.grpo.selection import Draw, draw_questions
from r1jax.stages.grpo.settings import GRPOStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# In the data cursor, beside the names of datasets.
_CARRIED = "(carried over)"


class Questions:
    """The questions of a stage, from the dataset that is in force at a step.

    Each dataset has its own order; one that comes back later continues where it was left. All
    processes have the same.

    domains: of the prompts, each with a dataset that has it. longest: tokens of a prompt, at most.
    surplus: groups that a phase did not need. unfinished: groups with samples that go on.
    skip_until: the step from which on a question is due again. waiting: a phase that is sampled,
    and not yet trained on.
    """

    def __init__(
        self,
        stage: GRPOStage,
        run: StageRun,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
    ) -> None:
        self._stage, self._layout = stage, layout
        self.reports: list[str] = []
        self.domains: dict[str, str] = {}
        self.longest = 0
        self.surplus: list[Group] = []
        self.unfinished: list[Group] = []
        self.skip_until: dict[Question, int] = {}
        self.waiting: Phase | None = None
        self._streams: dict[str, PromptStream] = {}
        for name in dict.fromkeys(data for _, data in stage.training_datasets()):
            prompts, report = run.datasets.prompts(name, tokenizer)
            self.reports.append(report if isinstance(stage.data, str) else f"{name}: {report}")
            self.domains |= {prompt.domain: name for prompt in prompts}
            self.longest = max([self.longest, *(len(prompt.token_ids) for prompt in prompts)])
            self._streams[name] = PromptStream(prompts, seed=seed_of(run.config.seed, stage.name))

    def draw(self, count: int, step: int, passed: set[Question]) -> Draw[Question]:
        """The next questions; see `draw_questions`."""
        data = self._stage.data_at(step)

        def following() -> Question:
            return Question(data, self._streams[data].following())

        return draw_questions(following, count, self.skip_until, step, passed)

    def upcoming(self, step: int, passed: set[Question]) -> Callable[[], Question]:
        """Gives what `draw` would, one by one, and leaves the order where it is."""
        data, passed = self._stage.data_at(step), set(passed)
        stream = self._streams[data].fork()

        def following() -> Question:
            return Question(data, stream.following())

        def upcoming() -> Question:
            (question,) = draw_questions(following, 1, self.skip_until, step, passed).questions
            return question

        return upcoming

    def prompt(self, question: Question) -> Prompt:
        return self._streams[question.data].prompts[question.prompt]

    def snapshot(self) -> Snapshot:
        """The state of now."""
        streams = {name: stream.state() for name, stream in self._streams.items()}
        surplus, skip_until = list(self.surplus), dict(self.skip_until)
        unfinished, waiting = list(self.unfinished), self.waiting

        def state() -> DataCursor:
            carried: JsonObject = {}
            if self._stage.decides:
                carried["surplus"] = [encode_group(group) for group in surplus]
                carried["unfinished"] = [encode_group(group) for group in unfinished]
                carried["skip_until"] = [[*question, step] for question, step in skip_until.items()]
            if waiting is not None:
                carried["waiting"] = encode_phase(waiting, self._layout)
            return {**streams, _CARRIED: carried} if carried else streams

        return state

    def state(self) -> DataCursor:
        return self.snapshot()()

    def restore(self, state: DataCursor) -> None:
        for name, stream in self._streams.items():
            stream.restore(state[name])
        carried = state.get(_CARRIED, {})
        self.skip_until = {
            Question(data, prompt): step for data, prompt, step in carried.get("skip_until", [])
        }
        self.surplus, self.unfinished = (
            [decode_group(encoded, self.prompt) for encoded in carried.get(name, [])]
            for name in ("surplus", "unfinished")
        )
        self.waiting = None
        if "waiting" in carried:
            share = process_batch_slice(self._layout)
            self.waiting = decode_phase(carried["waiting"], share, self.prompt)
