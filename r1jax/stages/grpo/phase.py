"""A phase of sampling: questions, their completions and rewards, and the groups to train on."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import numpy as np

from r1jax.data.instructions import Instruction
from r1jax.data.order import DataCursor, local_slice
from r1jax.data.padded_rows import bucket
from r1jax.data.steps import TokenSteps
from r1jax.files import JsonObject
from r1jax.models.parameters import Params
from r1jax.processes import BatchSlice, gather, process_batch_slice
from r1jax.rewards import RowScore
from r1jax.rollouts.sampling import (
    Completion,
    FollowingPrompts,
    completion_texts,
    generate_options,
    sample_following,
)
from r1jax.rollouts.scoring import PendingRewards, RewardScorer, check_first_rewards
from r1jax.rollouts.turns import Attempts, sample_attempts, with_earlier
from r1jax.run.models import LanguageModel
from r1jax.run.seeds import seed_of
from r1jax.run.train_loop import Snapshot, TrainLoop
from r1jax.sampler import GenerateOptions
from r1jax.sampler.queue import QueuedPrompt, default_slots, sample_queue
from r1jax.settings.steps import StepRule
from r1jax.sharding import Layout
from r1jax.stages.grpo.credit import scored_group
from r1jax.stages.grpo.groups import (
    Group,
    Phase,
    Question,
    SampledQuestions,
    decode_completions,
    decode_group,
    encode_completions,
    encode_group,
    is_unfinished,
    joined,
)
from r1jax.stages.grpo.metrics import group_result, rollout_metrics, sample_facts
from r1jax.stages.grpo.phase_queue import PhaseQueue
from r1jax.stages.grpo.questions import Questions
from r1jax.stages.grpo.selection import (
    Choice,
    Fate,
    note_settled,
    questions_to_sample,
    shares,
)
from r1jax.stages.grpo.settings import GRPOStage


def phase_metrics(phase: Phase, stage: GRPOStage) -> dict[str, float]:
    """What the phase's samples looked like and, with dynamic sampling, what became of them.

    `groups/surplus` is left over: for the next phase, or dropped.
    """
    choice = phase.choice
    metrics = rollout_metrics(phase.facts, [fate is Fate.NO_SPREAD for fate in choice.fates])
    if not stage.rewarded:
        of_rewards = ("reward/", "outcome/", "groups/")
        metrics = {name: x for name, x in metrics.items() if not name.startswith(of_rewards)}
    if not stage.decides:
        return metrics
    counts = {
        "questions/sampled": phase.sampled,
        "questions/skipped": phase.skipped,
        **{f"groups/{fate}": choice.fates.count(fate) for fate in Fate},
        "groups/from_surplus": choice.from_surplus,
        "groups/trained": len(choice.trained(stage)),
        "groups/surplus": len(choice.surplus(stage)),
    }
    if stage.tokens_per_phase is not None:
        counts["samples/continued"] = phase.continued
        counts["samples/unfinished"] = phase.unfinished
    return {**metrics, **{name: float(count) for name, count in counts.items()}}


def prompts_at_once(stage: GRPOStage, processes: int) -> int:
    """Prompts of a process whose samples the memory is planned for, all at once."""
    part = stage.questions_per_phase // stage.rollout_batches // processes
    if stage.goes_on:
        return part
    return math.gcd(part, stage.questions_at_once // processes)


@dataclass(frozen=True)
class PhaseSampler:
    """Samples the phases of a stage, and scores them."""

    stage: GRPOStage
    seed: int
    sampler: LanguageModel
    questions: Questions
    scorer: RewardScorer
    loop: TrainLoop
    reflections: Sequence[re.Pattern[str]] = ()  # counted in completions
    instructions: tuple[Instruction, ...] = ()  # between attempts at a question

    @cached_property
    def _tokens(self) -> TokenSteps:
        return TokenSteps(self.sampler.tokenizer, StepRule())

    @property
    def _layout(self) -> Layout:
        return self.sampler.decoder.layout

    @property
    def _share(self) -> BatchSlice:
        return process_batch_slice(self._layout)

    def snapshot(self) -> Snapshot:
        """The data cursor of now; it waits for the rewards of a phase that is not trained on."""
        waiting, carried = self.questions.waiting, self.questions.snapshot()

        def state() -> DataCursor:
            if waiting is not None:
                self.groups(waiting)
            return carried()

        return state

    def state(self) -> DataCursor:
        return self.snapshot()()

    def restore(self, state: DataCursor) -> None:
        self.questions.restore(state)

    def sample(self, weights: Params, step: int, leave_if_stopped: Callable[[], None]) -> Phase:
        """Sample and score until the phase has its groups, or is at its limit.

        Args:
          leave_if_stopped: of the loop, for a checkpoint without this phase.
        """
        with contextlib.ExitStack() as stack:
            if self.loop.run.layouts.apart:
                # Small arrays, too: on the default device they would wait for an update.
                device = self._layout.mesh.local_devices[0]
                stack.enter_context(jax.default_device(device))
            return self._sample(weights, step, leave_if_stopped)

    def _sample(self, weights: Params, step: int, leave_if_stopped: Callable[[], None]) -> Phase:
        stage = self.stage
        left = self.questions.surplus
        phase = Phase(step, Choice(len(left)), dict(enumerate(left)), [None] * len(left))
        if stage.goes_on:
            self._sample_until_enough(weights, phase, leave_if_stopped)
            self._choose(phase)
            return phase
        if self.questions.unfinished:
            phase.unscored.append(self._go_on(weights, phase, leave_if_stopped))
            self._score(phase)
        while count := questions_to_sample(stage, phase.choice, phase.sampled):
            phase.unscored.append(self._sample_some(weights, phase, count, leave_if_stopped))
            if not stage.decides:
                return phase
            self._score(phase)
        self._choose(phase)
        return phase

    def _options(self, phase: Phase) -> GenerateOptions:
        stage, limit = self.stage, self.stage.max_new_tokens_at(phase.step)
        return generate_options(
            self.sampler,
            stage.sampling,
            samples=stage.outputs_per_question,
            max_new_tokens=min(limit, stage.tokens_per_phase or limit),
            seed=seed_of(self.seed, stage.name, "rollout"),
            step=phase.step,
            record_experts=stage.replay_experts,
        )

    def _first_sample(self, phase: Phase, question: Question) -> int:
        """One question twice in a phase must not get the same random numbers."""
        phase.occurrences[question] += 1
        return (phase.occurrences[question] - 1) * self.stage.outputs_per_question

    def _sample_some(
        self, weights: Params, phase: Phase, count: int, leave_if_stopped: Callable[[], None]
    ) -> SampledQuestions:
        """Sample the next `count` questions over all processes."""
        stage, share, loop = self.stage, self._share, self.loop
        limit, samples = stage.max_new_tokens_at(phase.step), stage.outputs_per_question
        drawn = self.questions.draw(count, phase.step, phase.passed)
        phase.skipped += drawn.skipped
        firsts = [self._first_sample(phase, question) for question in drawn.questions]
        of_process = local_slice(count, share.index, share.count)
        questions = drawn.questions[of_process]
        sampled_at: dict[int, Completion] = {}
        whole: dict[int, list[tuple[int, Completion]]] = {i: [] for i in range(len(questions))}
        pending: list[tuple[list[int], PendingRewards]] = []
        # A preempted host has little time; a rollout may take an hour, and is done again.
        leave_if_stopped()
        options = self._options(phase)
        limits: tuple[int, ...] = (options.max_new_tokens,)
        if stage.turns is not None:
            limits = stage.attempt_limits_at(phase.step)
        prompts = [self.questions.prompt(each) for each in questions]
        for ended in sample_attempts(
            weights,
            list(zip(prompts, firsts[of_process], strict=True)),
            self.sampler,
            options,
            Attempts(limits, self.instructions),
            batch=prompts_at_once(stage, share.count),
            figures=phase.figures,
        ):
            sampled_at |= dict(ended)
            ready = ended
            if stage.tokens_per_phase is not None:  # scored when all samples of a group have ended
                ready = []
                for i, completion in ended:
                    if not is_unfinished(completion, limit):
                        whole[i // samples].append((i, completion))
                        if len(whole[i // samples]) == samples:
                            ready += whole[i // samples]
            rewards = self.scorer.submit([each for _, each in ready], phase.step, stage.steps)
            pending.append(([i for i, _ in ready], rewards))
            leave_if_stopped()
        completions = [sampled_at[i] for i in range(len(questions) * samples * stage.attempts)]
        phase.rollout_seconds += loop.clock.lap("rollout")
        phase.sampled += count
        phase.tokens += sum(len(each.token_ids) for each in completions)
        holders = [i // len(questions) for i in range(count)]
        if stage.tokens_per_phase is None:
            return SampledQuestions(drawn.questions, holders, completions, pending)
        groups = [completions[i : i + samples] for i in range(0, len(completions), samples)]
        has_ended = [len(whole[i]) == samples for i in range(len(groups))]
        nothing = np.full(samples, np.nan, np.float32)
        self._leave(
            phase,
            self._of_all_processes(
                [
                    Group(question, group, nothing)
                    for question, group, ended in zip(questions, groups, has_ended, strict=True)
                    if not ended
                ]
            ),
        )
        rank = np.cumsum(has_ended) - 1
        of_all = gather(has_ended, self._layout)
        return SampledQuestions(
            [each for each, ended in zip(drawn.questions, of_all, strict=True) if ended],
            [each for each, ended in zip(holders, of_all, strict=True) if ended],
            [each for i, group in enumerate(groups) if has_ended[i] for each in group],
            [
                ([int(rank[i // samples]) * samples + i % samples for i in indices], each)
                for indices, each in pending
            ],
        )

    def _sample_until_enough(
        self, weights: Params, phase: Phase, leave_if_stopped: Callable[[], None]
    ) -> None:
        """Sample one queue, to which questions are added as long as groups may be missing."""
        stage, share, loop = self.stage, self._share, self.loop
        queue = PhaseQueue(
            stage,
            self.questions,
            self.scorer,
            self._layout,
            share,
            loop.clock,
            phase,
            partial(self._record, phase),
            self.reflections,
        )
        following = FollowingPrompts(
            queue.take,
            at_once=stage.questions_per_phase // share.count,
            batch=prompts_at_once(stage, share.count),
            longest=self.questions.longest,
        )
        leave_if_stopped()
        for ended in sample_following(
            weights, following, self.sampler, self._options(phase), figures=phase.figures
        ):
            queue.ended(ended)
            leave_if_stopped()
        phase.dropped, tokens = queue.dropped()
        phase.figures.dropped += share.count * tokens

    def _go_on(
        self, weights: Params, phase: Phase, leave_if_stopped: Callable[[], None]
    ) -> SampledQuestions:
        """Sample on where the phases before left off; gives the groups that are now whole."""
        stage, share, layout, loop = self.stage, self._share, self._layout, self.loop
        limit, tokens = stage.max_new_tokens_at(phase.step), stage.tokens_per_phase
        assert tokens is not None
        groups, self.questions.unfinished = self.questions.unfinished, []
        firsts = [self._first_sample(phase, group.question) for group in groups]
        parts = [
            (g, n)
            for g, group in enumerate(groups)
            for n, each in enumerate(group.completions)
            if is_unfinished(each, limit)
        ]
        of_process = shares(parts, share.count)[share.index]
        options = replace(self._options(phase), samples=1, fixed_shape=True)
        if options.slots is None:  # as many as new questions have
            samples = share.count * stage.outputs_per_question
            at_once = prompts_at_once(stage, share.count) * samples
            of_phase = stage.questions_per_phase * stage.outputs_per_question
            slots = default_slots(of_phase, at_once, layout.shards("slots"))
            options = replace(options, slots=slots)
        queued = []
        for g, n in of_process:
            first = groups[g].completions[n]
            before_it = np.concatenate([first.prompt.token_ids, first.token_ids]).astype(np.int32)
            queued.append(QueuedPrompt(before_it, first.prompt.id, firsts[g] + n))
        longer: dict[tuple[int, int], Completion] = {}
        leave_if_stopped()
        for ended in sample_queue(
            weights,
            queued,
            self.sampler.decoder,
            options,
            prompt_tokens=bucket(self.questions.longest + stage.longest_completion - tokens),
            lengths_of_slices=gather([[len(each.token_ids) for each in queued]], layout),
            figures=phase.figures,
        ):
            for sample in ended:
                g, n = of_process[sample.prompt]
                phase.tokens += len(sample.tokens)
                longer[g, n] = joined(groups[g].completions[n], sample, options.stop)
            leave_if_stopped()
        phase.continued = len(parts)
        phase.rollout_seconds += loop.clock.lap("rollout")
        for g, n, completion in self._samples_of_all_processes(longer, groups):
            completions = list(groups[g].completions)
            completions[n] = completion
            groups[g] = replace(groups[g], completions=completions)
        whole: list[Group] = []
        left: list[Group] = []
        for group in groups:
            going = any(is_unfinished(each, limit) for each in group.completions)
            (left if going else whole).append(group)
        self._leave(phase, left)
        dealt = shares(whole, share.count)
        ended_here = [each for group in dealt[share.index] for each in group.completions]
        texts = completion_texts(
            self.sampler, [(each.token_ids, each.finish) for each in ended_here]
        )
        ended_here = [replace(c, text=text) for c, text in zip(ended_here, texts, strict=True)]
        rewards = self.scorer.submit(ended_here, phase.step, stage.steps)
        return SampledQuestions(
            [group.question for group in whole],
            [holder for holder, of_holder in enumerate(dealt) for _ in of_holder],
            ended_here,
            [(range(len(ended_here)), rewards)],
        )

    def _leave(self, phase: Phase, groups: Sequence[Group]) -> None:
        """Leave groups that are not whole to the next phase."""
        limit = self.stage.max_new_tokens_at(phase.step)
        self.questions.unfinished += groups
        phase.unfinished += sum(is_unfinished(c, limit) for g in groups for c in g.completions)

    def _samples_of_all_processes(
        self, samples: Mapping[tuple[int, int], Completion], groups: Sequence[Group]
    ) -> list[tuple[int, int, Completion]]:
        """Of groups, by index, and samples of these."""
        if self._share.count == 1:
            return [(g, n, each) for (g, n), each in samples.items()]
        rows: list[JsonObject] = [
            {"at": at, "completions": encode_completions([each])} for at, each in samples.items()
        ]
        result = []
        for row in gather(rows, self._layout):
            g, n = row["at"]
            prompt = groups[g].completions[n].prompt
            result.append((g, n, *decode_completions(row["completions"], prompt)))
        return result

    def _of_all_processes(self, groups: list[Group]) -> list[Group]:
        if self._share.count == 1:
            return groups
        rows = gather([encode_group(group) for group in groups], self._layout)
        return [decode_group(row, self.questions.prompt) for row in rows]

    def _score(self, phase: Phase) -> None:
        """Take the rewards that are computed, and decide on their groups."""
        while phase.unscored:
            sampled = phase.unscored.pop(0)
            scores = self.scorer.in_order(sampled.completions, sampled.pending)
            phase.score_seconds += self.loop.clock.lap("score_wait")
            last, scores = with_earlier(sampled.completions, scores, self.stage.attempts)
            self._add(phase, replace(sampled, completions=last), scores)

    def _add(self, phase: Phase, sampled: SampledQuestions, scores: Sequence[RowScore]) -> None:
        facts = gather(sample_facts(sampled.completions, scores, self.reflections), self._layout)
        if phase.step == 0 and facts and not phase.facts:  # not at the limit, after all of them
            check_first_rewards(facts, self.scorer.rewards)
        self._record(phase, sampled, scores, facts)

    def _record(
        self,
        phase: Phase,
        sampled: SampledQuestions,
        scores: Sequence[RowScore],
        facts: Sequence[JsonObject],
    ) -> None:
        """Decide on the next questions of a phase.

        Args:
          scores: of this process's samples. facts: of all samples, in the questions' order.
        """
        dynamic, samples = self.stage.dynamic_sampling, self.stage.outputs_per_question
        questions, completions = sampled.questions, sampled.completions
        if not phase.rows:
            trained_at = phase.step + self.stage.mini_batches_per_rollout
            pairs = zip(completions[:samples], scores, strict=False)
            phase.rows = [completion.row(score, step=trained_at) for completion, score in pairs]
        phase.facts += facts
        results = [group_result(facts[i : i + samples]) for i in range(0, len(facts), samples)]
        phase.choice.add(results, dynamic)
        if dynamic is not None and dynamic.look_again_after is not None:
            note_settled(
                self.questions.skip_until, questions, results, phase.step, dynamic.look_again_after
            )
        local = 0  # samples of this process
        for question, holder in zip(questions, sampled.holders, strict=True):
            number = len(phase.holders)
            phase.holders.append(holder)
            if holder == self._share.index:
                part = slice(local, local + samples)
                local += samples
                if number in phase.choice.kept:
                    phase.groups[number] = scored_group(
                        question, completions[part], scores[part], self.scorer.rewards, self._tokens
                    )

    def groups(self, phase: Phase) -> list[Group]:
        """This process's groups to train on, once all rewards are there."""
        if phase.trained is None:
            self._score(phase)
            self._choose(phase)
        assert phase.trained is not None
        return phase.trained

    def _choose(self, phase: Phase) -> None:
        """Take the phase's first groups, and leave the surplus to the next one.

        Each process gets as many, or one less, wherever they were sampled.
        """
        stage, share = self.stage, self._share
        dealt = shares(phase.choice.trained(stage), share.count)
        surplus = phase.choice.surplus(stage) if stage.keeps_surplus else []
        moved = surplus + [n for i, of_i in enumerate(dealt) for n in of_i if phase.holders[n] != i]
        if share.count > 1 and any(phase.holders[n] is not None for n in moved):
            held = {n: phase.groups[n] for n in moved if phase.holders[n] == share.index}
            phase.groups |= self._gathered(held)
        self.questions.surplus = [phase.groups[number] for number in surplus]
        phase.trained = [phase.groups[number] for number in dealt[share.index]]

    def _gathered(self, groups: Mapping[int, Group]) -> dict[int, Group]:
        """Groups of all processes."""
        rows: list[JsonObject] = [
            {"number": number, "group": encode_group(group)} for number, group in groups.items()
        ]
        return {
            row["number"]: decode_group(row["group"], self.questions.prompt)
            for row in gather(rows, self._layout)
        }
