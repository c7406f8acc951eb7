"""Searching the problems of a dataset: steps of the sampler, values of a reward model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from r1jax.data.example import Example
from r1jax.data.prompts import Prompt, encode_prompt
from r1jax.data.steps import first_step_end
from r1jax.files import JsonObject, encode_line, read_rows
from r1jax.metrics.heartbeat import HEARTBEAT
from r1jax.metrics.progress import Progress
from r1jax.metrics.recorder import Recorder
from r1jax.models import Decoder
from r1jax.models.parameters import Params
from r1jax.processes import any_process, gather, process_batch_slice
from r1jax.rewards import equivalent_key, final_answer
from r1jax.rewards.process import solution_score
from r1jax.rollouts.sampling import (
    Completion,
    completion_texts,
    generate_options,
    text_search,
)
from r1jax.rollouts.scored_samples import SAMPLES, PromptPart, SampleMeans, slice_of_process
from r1jax.rollouts.scoring import (
    ProcessRewardModel,
    RewardModel,
    RewardScorer,
    ValueModel,
    check_domains,
    check_first_rewards,
    reward_scorer,
)
from r1jax.rollouts.search_queue import SearchQueue
from r1jax.run.models import LanguageModel
from r1jax.run.record import Clock
from r1jax.run.resolve import ResolvedRun, StageRun
from r1jax.run.seeds import seed_of
from r1jax.run.stop import Preempted
from r1jax.sampler import Finish, GenerateOptions
from r1jax.sampler.queue import QueueFigures, QueueSample, default_slots
from r1jax.search.beam import beam_search
from r1jax.search.choice import agreement, best_solution, ranked_solutions
from r1jax.search.monte_carlo import monte_carlo_search
from r1jax.search.rounds import RunningSearch, search_rounds
from r1jax.search.tree import SearchTree, Step, StepEnd
from r1jax.settings.names import nearest
from r1jax.settings.search import AnySearch, BeamSearch, DatasetSearch, critic_of_search
from r1jax.settings.section import SettingError
from r1jax.settings.stage import Stage
from r1jax.settings.steps import StepRule

TREES = "trees.jsonl"

# Values and log-probs differ by rounding between batches; stored and compared are these digits.
_DIGITS_OF_VALUES, _DIGITS_OF_LOG_PROBS = 6, 4

_ENDS: dict[Finish, StepEnd] = {Finish.EOS: "eos", Finish.LENGTH: "length", Finish.STOP: "step"}


def check_search(stage: Stage, wanted: DatasetSearch | None, run: ResolvedRun) -> None:
    """Raises ConfigError for a search that cannot be made as it is set."""
    if wanted is None:
        return
    search, max_new_tokens = wanted.search, wanted.max_new_tokens
    rewards = run.config.rewards_of(stage)
    with run.config.blaming("stages", stage.name, "search"):
        if search.max_step_tokens > max_new_tokens:
            raise SettingError(
                "max_step_tokens", f"more than the stage's max_new_tokens = {max_new_tokens}"
            )
        if (critic := critic_of_search(search)) is not None:
            _check_critic(critic, stage, run)
        if (name := search.scored_by) is None:
            return
        if name not in rewards:
            raise SettingError(
                "scored_by",
                f"no reward of this stage; {nearest(name, rewards)}there are {', '.join(rewards)}",
            )
        if rewards[name].model is None:
            raise SettingError(
                "scored_by",
                "a function compares with the reference answer, which a search must not know; name "
                "a reward that has a model",
            )
        if isinstance(search, BeamSearch) and _step_rule(name, stage, run) is None:
            raise SettingError(
                "scored_by",
                "this model reads whole solutions, and beams are chosen by their beginnings; name "
                "a reward with a process reward model",
            )


def _check_critic(source: str, stage: Stage, run: ResolvedRun) -> None:
    """Raises SettingError where a stage or model has no critic that reads the policy's tokens."""
    policy, critic = run.models.of(stage.name), run.models.of(source)
    trained = next((each for each in run.config.stages if each.name == source), None)
    if trained is None:
        there = critic.decoder.config.head == "scalar"
    else:
        there = trained.may_leave_critic()
    if not there:
        raise SettingError(
            "valued_by",
            f"{source} has no critic; name a stage with objective: {{kind: ppo}}, or in models the "
            "directory of a critic",
        )
    if critic.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise SettingError(
            "valued_by",
            "its tokenizer is another one than the policy's, whose tokens a critic reads; name a "
            "critic with the same vocab",
        )


def _step_rule(name: str, stage: Stage, run: ResolvedRun) -> StepRule | None:
    """That of a reward's process reward model; None: it has another model."""
    reward = run.config.rewards_of(stage)[name]
    formats = {each.name: each.reward_model_format() for each in run.config.stages}
    trained = formats.get(str(reward.model))
    steps = None if trained is None else trained.steps
    return reward.step_rule if steps is None else steps.rule


def search_slots(wanted: DatasetSearch, model: Decoder) -> int:
    """Slots of the sampler over all devices: the same in each round, so that a round of few
    beginnings uses the programs of one of many."""
    samples = wanted.batch * wanted.search.prefixes * wanted.search.expansions
    shards = model.layout.shards("slots")
    return wanted.sampling.slots or default_slots(samples, samples, shards)


class FoundSolutions(NamedTuple):
    """What a search has come to. nodes: of the solutions, the one that is given first."""

    prompt: Prompt
    tree: SearchTree
    nodes: list[int]


@dataclass(frozen=True)
class Searcher:
    """Searches problems with a model's weights.

    rule: where a step ends. model: whose values decide; None: agreement does. options: of the
    sampler of steps. figures: of all queues, added up.
    """

    sampler: LanguageModel
    params: Params
    search: AnySearch
    rule: StepRule
    model: RewardModel | ProcessRewardModel | ValueModel | None
    options: GenerateOptions
    solution_tokens: int
    stop: Sequence[str]
    figures: QueueFigures = field(default_factory=QueueFigures)

    def find(self, parts: Sequence[PromptPart], solutions: int = 1) -> list[FoundSolutions]:
        """Search this process's parts: prompts, each with which search of it this is.

        Every process calls it equally often.

        Args:
          solutions: of each search at most.
        """
        prompts = {prompt.id: prompt for prompt, _ in parts}
        texts = _Texts(self.sampler, prompts)
        trees = [
            SearchTree(prompt.id, number, self.solution_tokens, self.search.max_step_tokens)
            for prompt, number in parts
        ]
        searches = [(tree, self._search(tree, texts)) for tree in trees]
        agree = partial(any_process, layout=self.sampler.decoder.layout)
        SearchQueue(
            self.params,
            self.sampler,
            self.options,
            prompts,
            search_rounds(searches, partial(self._score, texts=texts), agree),
            self.solution_tokens - self.search.max_step_tokens,
            self._step,
            self.figures,
        ).run()
        found = []
        for (prompt, _), tree in zip(parts, trees, strict=True):
            if self.model is None:
                for node in tree.complete():
                    tree.nodes[node].value = round(agreement(tree, node, texts.answer), 6)
            best = best_solution(tree, self.search.choose, texts.answer)
            others = (node for node in ranked_solutions(tree) if node != best)
            found.append(FoundSolutions(prompt, tree, [best, *islice(others, solutions - 1)]))
        return found

    def completion(self, found: FoundSolutions, node: int, sample: int) -> Completion:
        """The solution of a node, as if it had been sampled at once."""
        end, state = found.tree.nodes[node].step.end, found.tree.nodes[node].state
        finish = Finish.EOS if end == "eos" else Finish.STOP
        ids = np.asarray(found.tree.token_ids(node), np.int32)
        finish = finish if state == "complete" else Finish.LENGTH
        (text,) = completion_texts(self.sampler, [(ids, finish)])
        return Completion(found.prompt, sample, ids, np.zeros(len(ids)), finish, text)

    def _search(self, tree: SearchTree, texts: _Texts) -> RunningSearch:
        search = self.search
        if isinstance(search, BeamSearch):
            return beam_search(tree, search)

        def value_of(tree: SearchTree, node: int) -> float:
            value = tree.nodes[node].value
            return agreement(tree, node, texts.answer) if value is None else value

        return monte_carlo_search(tree, search, value_of)

    def _step(self, sample: QueueSample, text: str) -> Step:
        ids, end = sample.tokens, _ENDS[sample.finish]
        if int(ids[-1]) in self.options.eos_ids:  # in whose text the rule may have ended a step
            end, (text,) = "eos", completion_texts(self.sampler, [(ids, Finish.EOS)])
        elif end == "step" and any(string in text for string in self.stop):
            end = "stop"
        log_prob = round(float(sample.sampling_log_probs.sum()), _DIGITS_OF_LOG_PROBS)
        return Step(tuple(ids.tolist()), text, log_prob, end)

    def _score(
        self, pairs: Sequence[tuple[SearchTree, int]], texts: _Texts
    ) -> Sequence[float | None]:
        if self.model is None:
            return [None] * len(pairs)
        if isinstance(self.model, ValueModel):
            read = [_read_by_critic(*pair, texts.prompts) for pair in pairs]
            cut = (min(1.0, max(0.0, value)) for value in self.model.values(read))
            return [round(value, _DIGITS_OF_VALUES) for value in cut]
        whole = isinstance(self.model, RewardModel)
        chosen = [
            i for i, (t, n) in enumerate(pairs) if not whole or t.nodes[n].state == "complete"
        ]
        questions = [texts.prompts[pairs[i][0].problem].question for i in chosen]
        responses = [texts.response(*pairs[i]) for i in chosen]
        values: list[float | None] = [None] * len(pairs)
        for i, value in zip(chosen, _values(self.model, questions, responses), strict=True):
            values[i] = round(value, _DIGITS_OF_VALUES)
        return values


def _read_by_critic(tree: SearchTree, node: int, prompts: Mapping[int, Prompt]) -> np.ndarray:
    """The tokens behind which a critic's value is that of a node.

    Behind the last token of a solution no value is trained: its value is that of the state in which
    this token, mostly EOS, was drawn.
    """
    ids = [*prompts[tree.problem].token_ids, *tree.token_ids(node)]
    return np.asarray(ids[:-1] if tree.nodes[node].state == "complete" else ids, np.int32)


def _values(
    model: RewardModel | ProcessRewardModel, questions: Sequence[str], responses: Sequence[str]
) -> list[float]:
    """In 0..1; 0 for what has no step, or nothing to read. Of a model of pairs, the probability
    that its reward is above 0, by Bradley and Terry."""
    if isinstance(model, ProcessRewardModel):
        steps = model.step_scores(questions, responses)
        return [solution_score(each, model.how) if each else 0.0 for each in steps]
    rewards = model.rewards(questions, responses)
    if not model.as_probability:
        rewards = [x if math.isnan(x) else 1 / (1 + math.exp(-max(-60.0, x))) for x in rewards]
    return [0.0 if math.isnan(reward) else reward for reward in rewards]


class _Texts:
    """The texts of beginnings, and the answers of solutions, of the searches of some problems."""

    def __init__(self, sampler: LanguageModel, prompts: dict[int, Prompt]) -> None:
        self.prompts = prompts
        self._sampler = sampler
        self._answers: dict[tuple[int, int, int], str | None] = {}

    def response(self, tree: SearchTree, node: int) -> str:
        ids = np.asarray(tree.token_ids(node), np.int32)
        finish = Finish.EOS if tree.nodes[node].step.end == "eos" else Finish.LENGTH
        (text,) = completion_texts(self._sampler, [(ids, finish)])
        return self.prompts[tree.problem].prefill + text

    def answer(self, tree: SearchTree, node: int) -> str | None:
        key = tree.problem, tree.search, node
        if key not in self._answers:
            answer = final_answer(self.response(tree, node))
            self._answers[key] = None if answer is None else equivalent_key(answer)
        return self._answers[key]


def make_searcher(
    stage: Stage, run: ResolvedRun, wanted: DatasetSearch, scorer: RewardScorer, seed: int
) -> Searcher:
    """Loads the weights of the stage; its reward models are those of the scorer."""
    search, sampler = wanted.search, run.models.sampler_of(stage.name)
    models = {model.name: model for model in scorer.models}
    name, rule, critic = search.scored_by, search.step_rule, critic_of_search(search)
    if rule is None and name is not None:
        rule = _step_rule(name, stage, run)
    rule = StepRule() if rule is None else rule
    slots = search_slots(wanted, sampler.decoder)
    stop = wanted.sampling.stop

    def is_end(text: str) -> bool:
        ended = first_step_end(text, rule) is not None
        return ended or any(string in text for string in stop)

    options = generate_options(
        sampler,
        wanted.sampling,
        samples=search.expansions,
        max_new_tokens=search.max_step_tokens,
        seed=seed,
    )
    value_model: RewardModel | ProcessRewardModel | ValueModel | None = None
    if name is not None:
        value_model = models[name]
    elif critic is not None:
        value_model = ValueModel.load(critic, run)
    return Searcher(
        sampler,
        run.models.weights(run.config.weights_of(stage.name), sampler),
        search,
        rule,
        value_model,
        replace(
            options,
            stop=text_search(sampler.tokenizer, is_end),
            slots=slots,
            fixed_shape=True,
            extended_by=search.max_step_tokens,
        ),
        wanted.max_new_tokens,
        stop,
    )


def store_searches(
    stage: Stage, run: StageRun, wanted: DatasetSearch, seed: int, share_name: str
) -> tuple[Clock, list[Prompt]]:
    """Search every prompt, score the solutions that are given, and store them and all trees.

    A line of `trees.jsonl` is a search; `samples.jsonl` has its solutions in the same order, with
    `generated_tokens` of the whole search. Resumes behind the last batch that is stored whole.

    Returns:
      The stage's clock, and the prompts.
    """
    sampler = run.models.sampler_of(stage.name)
    prompts, report = run.datasets.prompts(wanted.data, sampler.tokenizer, wanted.limit)
    check_domains(stage, {prompt.domain: wanted.data for prompt in prompts}, run.config)
    parts = [(prompt, number) for prompt in prompts for number in range(wanted.searches)]
    clock, process = Clock(run.record.seconds(stage.name)), jax.process_index()
    share = process_batch_slice(sampler.decoder.layout)
    done, offsets = _whole_batches(run.directory, len(parts), wanted.batch)
    means = SampleMeans()
    if done:
        means.add(_stored_answers(run.directory, done), _generated)
    with ExitStack() as opened:
        recorder = opened.enter_context(Recorder(run.directory, process_index=process))
        progress = opened.enter_context(
            Progress(run.label_of(stage), len(prompts), process_index=process)
        )
        scorer = opened.enter_context(reward_scorer(run.config.rewards_of(stage), run))
        progress.print(f"{stage.name}: {report}")
        recorder.rewind({SAMPLES: offsets[SAMPLES]})
        trees = None
        if process == 0:
            trees = opened.enter_context(open(run.directory / TREES, "ab"))
            trees.truncate(offsets[TREES])
        searcher = None
        clock.lap("setup")
        while done < len(parts):
            if searcher is None:
                searcher = make_searcher(stage, run, wanted, scorer, seed)
            batch = parts[done : done + wanted.batch]
            found = searcher.find(slice_of_process(batch, wanted.batch, share), wanted.solutions)
            stored = gather(_stored(searcher, scorer, found, wanted), sampler.decoder.layout)
            rows = [row for _, of_search in stored for row in of_search]
            if done == 0:
                check_first_rewards(rows, scorer.rewards)
            recorder.log_samples(rows)
            if trees is not None:  # behind the samples: a tree is only there with its solutions
                trees.write(b"".join(encode_line(tree) for tree, _ in stored))
                trees.flush()
            done += len(batch)
            whole = done // wanted.searches
            HEARTBEAT.set_step(whole)
            tokens = means.add((of_search[0] for _, of_search in stored), _generated)
            progress.update(
                whole,
                {
                    share_name: means.share_right,
                    "generated_tokens": means.mean_tokens,
                    "tokens_per_second": tokens / clock.lap(stage.kind),
                },
            )
            run.record.mark(stage, "running", clock.seconds)
            if run.stop.in_any_process() and done < len(parts):
                raise Preempted(f"{stage.name}: {whole} of {len(prompts)} prompts are stored")
    run.files.wait_for_files(stage.name)
    return clock, prompts


def search_question(
    stage: Stage, run: ResolvedRun, wanted: DatasetSearch, question: str
) -> tuple[str, JsonObject]:
    """The solution of one question, and the row of its tree; as problem 0 of the stage's data.

    Raises ValueError: the question does not fit into the data's template, or into the model.
    """
    sampler, name = run.models.sampler_of(stage.name), wanted.search.scored_by
    section = run.config.data[run.datasets.parts(wanted.data)[0]]
    prompt = encode_prompt(Example(0, question, ""), section, sampler.tokenizer)
    positions = sampler.decoder.config.max_position_embeddings
    if len(prompt.token_ids) + wanted.max_new_tokens > positions:
        raise ValueError(
            f"a prompt of {len(prompt.token_ids)} tokens with max_new_tokens = "
            f"{wanted.max_new_tokens}: the model has max_position_embeddings = {positions}"
        )
    rewards = run.config.rewards_of(stage)
    with reward_scorer({} if name is None else {name: rewards[name]}, run) as scorer:
        seed = seed_of(run.config.seed, "search")
        searcher = make_searcher(stage, run, replace(wanted, batch=1), scorer, seed)
        (found,) = searcher.find([(prompt, 0)])
    completion = searcher.completion(found, found.nodes[0], 0)
    return prompt.prefill + completion.text, tree_row(found, wanted.search)


def _stored(
    searcher: Searcher, scorer: RewardScorer, found: Sequence[FoundSolutions], wanted: DatasetSearch
) -> list[tuple[JsonObject, list[JsonObject]]]:
    """Of each search the row of its tree, and those of its solutions."""
    completions = [
        searcher.completion(each, node, each.tree.search * wanted.solutions + rank)
        for each in found
        for rank, node in enumerate(each.nodes)
    ]
    scores = scorer.submit(completions).result()
    rows = iter(
        completion.row(score, step=0) for completion, score in zip(completions, scores, strict=True)
    )
    stored = []
    for each in found:
        of_search = [
            {**row, "generated_tokens": each.tree.generated}
            for row in islice(rows, len(each.nodes))
        ]
        stored.append((tree_row(each, wanted.search), of_search))
    return stored


def tree_row(found: FoundSolutions, search: AnySearch) -> JsonObject:
    """A search as a line of `trees.jsonl`.

    `solutions` are the nodes that are given, the search's answer first; `nodes` the beginnings,
    each with the index of its `parent`, the question first.
    """
    return {
        "problem_id": found.prompt.id,
        "search": found.tree.search,
        "kind": search.kind,
        "prompt": found.prompt.text,
        "generated_tokens": found.tree.generated,
        "solutions": found.nodes,
        "nodes": found.tree.rows(),
    }


def _stored_answers(directory: Path, searches: int) -> Iterator[JsonObject]:
    """The answer of each of the first searches that are stored, the first of its solutions."""
    rows = read_rows(directory / SAMPLES)
    for tree in islice(read_rows(directory / TREES), searches):
        yield list(islice(rows, len(tree["solutions"])))[0]


def _generated(row: JsonObject) -> int:
    """Tokens of the whole search of a solution."""
    tokens: int = row["generated_tokens"]
    return tokens


def _whole_batches(directory: Path, parts: int, batch: int) -> tuple[int, dict[str, int]]:
    """Searches whose batch is stored completely, and the offsets behind them in bytes."""
    path = directory / TREES
    if not path.exists():
        return 0, {TREES: 0, SAMPLES: 0}
    rows = list(read_rows(path))
    done = parts if len(rows) >= parts else len(rows) - len(rows) % batch
    samples = sum(len(row["solutions"]) for row in rows[:done])
    lengths = {TREES: done, SAMPLES: samples}
    offsets = {}
    for name, count in lengths.items():
        with open(directory / name, "rb") as file:
            offsets[name] = sum(len(line) for line in islice(file, count))
    return done, offsets
