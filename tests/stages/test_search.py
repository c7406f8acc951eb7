"""Searches of a random policy with a random process reward model, from end to end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from html_page import Page
from typer.testing import CliRunner

from r1jax import recipe
from r1jax.cli import app
from r1jax.config.load import ConfigError, load_config
from r1jax.config.run_config import RunConfig
from r1jax.data.prompts import Prompt
from r1jax.data.steps import cut_steps, first_step_end
from r1jax.planner.dry_run import describe
from r1jax.planner.memory import planning_of, sizes_of
from r1jax.rollouts import searching
from r1jax.rollouts.scoring import ValueModel
from r1jax.run.resolve import check, load_functions, resolve
from r1jax.sampler.queue import QueueFigures
from r1jax.search.tree import SearchTree, Step, path_of
from r1jax.settings.steps import StepRule
from r1jax.stages.evaluate.settings import EvaluateStage

TESTS = Path(__file__).parents[1]
CONFIG = str(TESTS / "tiny_search.yaml")
SEPARATORS = [" ", "=", "+", "-", "1", "2", "3", "4"]
RULE = StepRule(separators=SEPARATORS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random policy, and a random process reward model in `prm`."""
    folder = tmp_path_factory.mktemp("search")
    changes = [
        f"stages.{each}.{key}"
        for each in ("kept", "labels")
        for key in ("search=null", "rewards=[even]")
    ]
    sampled = load_config(CONFIG, changes)
    stages = [each for each in sampled.stages if each.dataset_search() is None]
    run = resolve(sampled.model_copy(update={"stages": stages}))
    model = run.models.of("sampled")
    model.export(folder / "policy", model.initial(5))
    model = model.with_head("token_labels")
    model.export(folder / "prm", model.initial(3))
    return folder


def process_reward(directory: Path) -> str:
    model = (
        f"{{model: {directory / 'prm'}, template: plain, step_rule: {{separators: {SEPARATORS}}}}}"
    )
    return f"rewards.process={model}"


def config(directory: Path, output: str, *changes: str) -> RunConfig:
    return load_config(
        CONFIG, [f"output={directory / output}", process_reward(directory), *changes]
    )


@pytest.fixture(scope="module")
def finished(directory: Path) -> Path:
    plan = config(directory, "whole")
    assert recipe.run(plan) == 0
    return directory / "whole" / "tiny-search-s0"


def rows(run: Path, stage: str, file: str = "samples.jsonl") -> list[dict[str, Any]]:
    (path,) = run.glob(f"stages/*-{stage}/{file}")
    return [json.loads(line) for line in path.read_text().splitlines()]


SEARCHES = ("beam", "mcts", "agreement", "kept", "labels")


def text_of(tree: dict[str, Any], node: int) -> str:
    texts = []
    while node > 0:
        texts.append(tree["nodes"][node]["text"])
        node = tree["nodes"][node]["parent"]
    return "".join(texts[::-1])


@pytest.mark.slow
@pytest.mark.parametrize("stage", SEARCHES)
def test_trees_are_whole_and_within_their_budget(finished: Path, stage: str) -> None:
    trees, samples = rows(finished, stage, "trees.jsonl"), iter(rows(finished, stage))
    assert len(trees) == (12 if stage == "beam" else 6)
    assert len({(tree["problem_id"], tree["search"]) for tree in trees}) == len(trees)
    states = set()
    for tree in trees:
        nodes = tree["nodes"]
        sampled = sum(node["tokens"] * node["samples"] for node in nodes[1:])
        assert 16 <= tree["generated_tokens"] == sampled <= 120
        for index, node in enumerate(nodes[1:], start=1):
            states.add(node["state"])
            assert node["parent"] < index and 1 <= node["tokens"] <= 8
            # A step goes to the first end of the rule, and no further.
            end = first_step_end(node["text"], RULE)
            assert end in (None, len(node["text"]))
            if end is None:
                assert node["state"] == "complete" or node["tokens"] == 8
        for parent in {node["parent"] for node in nodes[1:]}:
            siblings = [node for node in nodes[1:] if node["parent"] == parent]
            assert sum(node["prior"] for node in siblings) == pytest.approx(1, abs=1e-4)
            assert nodes[parent]["state"] == "open"
        for node in tree["solutions"]:
            row = next(samples)
            assert row["completion"] == text_of(tree, node)
            assert row["generated_tokens"] == tree["generated_tokens"]
            assert (row["finish_reason"] == "length") == (nodes[node]["state"] != "complete")
            if stage != "agreement":  # the value is what the reward says of the whole solution
                value = row["parts"]["process"] if cut_steps(row["completion"], RULE) else 0
                assert nodes[node]["value"] == pytest.approx(value, abs=1e-5)
    assert next(samples, None) is None and "complete" in states


@pytest.mark.slow
def test_generated_tokens_are_in_the_summary(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    summaries = {each["stage"]: each for each in results["evaluations"]}
    for stage in ("beam", "mcts", "agreement"):
        tokens = [tree["generated_tokens"] for tree in rows(finished, stage, "trees.jsonl")]
        mean = summaries[stage]["generated_tokens"]["value"]
        assert mean == pytest.approx(sum(tokens) / len(tokens))
    assert summaries["beam"]["samples"] == 2 and "generated_tokens" not in summaries["sampled"]
    # What training did is said by samples, not by searches.
    assert results["after"]["stage"] == "sampled"


@pytest.mark.slow
def test_solutions_of_searches_become_a_dataset(finished: Path) -> None:
    kept = rows(finished, "kept", "dataset.jsonl")
    by_problem = {row["problem_id"]: row for row in rows(finished, "kept")}
    assert kept and {row["provenance"]["problem_id"] for row in kept} <= set(by_problem)
    assert all(sum(c.isdigit() for c in row["response"]) % 2 == 0 for row in kept)


@pytest.mark.slow
def test_labels_of_steps_are_shares_of_the_solutions_behind_them(finished: Path) -> None:
    samples = iter(rows(finished, "labels"))
    written = {(r["prompt"], r["response"]): r for r in rows(finished, "labels", "dataset.jsonl")}
    assert len(written) > 6
    compared, labels = 0, set[float]()
    for tree in rows(finished, "labels", "trees.jsonl"):
        solved = [(node, next(samples)) for node in tree["solutions"]]
        whole = [
            (row["completion"], row["outcome"] == "right", tree["nodes"][node]["samples"])
            for node, row in solved
            if tree["nodes"][node]["state"] == "complete"
        ]
        cut = {  # within a step, by max_step_tokens
            tree["nodes"][node]["parent"]
            for node in range(1, len(tree["nodes"]))
            if first_step_end(tree["nodes"][tree["nodes"][node]["parent"]]["text"], RULE) is None
        } - {0}
        for node, solution in solved:
            text = solution["completion"]
            if tree["nodes"][node]["state"] != "complete" or cut & set(
                path_of(tree["nodes"], node)
            ):
                compared += (tree["prompt"], text) in written
                continue
            if (row := written.get((tree["prompt"], text))) is None:
                continue
            assert row["completions"] == cut_steps(text, RULE)
            beginning = ""
            for step, label in zip(row["completions"][:-1], row["labels"], strict=False):
                beginning += step  # the random policy's steps all end with a separator
                behind = [(right, n) for other, right, n in whole if other.startswith(beginning)]
                share = sum(n for right, n in behind if right) / sum(n for _, n in behind)
                assert label == pytest.approx(share)
                labels.add(label)
            compared += 1
    assert compared == len(written) and len(labels) > 1


@pytest.mark.slow
def test_the_tree_is_the_same_in_any_batch(directory: Path, finished: Path) -> None:
    changes = [f"stages.{stage}.problems_per_batch=1" for stage in ("beam", "mcts")]
    for stage in ("beam", "mcts"):
        plan = config(directory, "small", *changes)
        assert recipe.run(plan, recipe.Selection(only=stage)) == 0
        assert_same_trees(directory / "small" / finished.name, finished, stage)


def assert_same_trees(run: Path, other: Path, stage: str) -> None:
    trees = rows(run, stage, "trees.jsonl"), rows(other, stage, "trees.jsonl")
    for one, two in zip(*trees, strict=True):
        assert [n["text"] for n in one["nodes"]] == [n["text"] for n in two["nodes"]]
        assert [n["visits"] for n in one["nodes"]] == [n["visits"] for n in two["nodes"]]
        assert one["solutions"] == two["solutions"]


def with_options(patch: pytest.MonkeyPatch, **changes: int) -> QueueFigures:
    """Searchers get these options of the sampler; their figures, added up."""
    figures, make = QueueFigures(), searching.make_searcher

    def made(*args: Any) -> searching.Searcher:
        searcher = make(*args)
        return replace(searcher, options=replace(searcher.options, **changes), figures=figures)

    patch.setattr(searching, "make_searcher", made)
    return figures


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["beam", "mcts"])
def test_trees_of_pages_that_are_kept_are_those_without(
    directory: Path, finished: Path, stage: str
) -> None:
    """The prompt is read once for all searches of a problem, and each step that is gone on from
    once."""
    figures = {}
    for name, extended_by in (("kept", 8), ("unkept", 0)):
        with pytest.MonkeyPatch.context() as patch:
            figures[name] = with_options(patch, page=1, extended_by=extended_by)
            assert recipe.run(config(directory, name), recipe.Selection(only=stage)) == 0
        assert_same_trees(directory / name / finished.name, finished, stage)
    kept, unkept = figures["kept"], figures["unkept"]
    assert unkept.shared == 0 and kept.shared + kept.prefilled == unkept.prefilled
    questions, steps, begun = dict[int, int](), 0, 0
    for tree in rows(finished, stage, "trees.jsonl"):
        questions[tree["problem_id"]] = len(tree["prompt"])  # a token for each character
        expanded = {node["parent"] for node in tree["nodes"][1:]} - {0}
        steps += sum(tree["nodes"][node]["tokens"] for node in expanded)
        begun += 2 if stage == "beam" else 1  # expansions of the question, each of `expansions`
    further = begun - len(questions)  # which read the question's last token
    assert kept.prefilled == sum(questions.values()) + steps + further
    assert kept.shared > kept.prefilled


@pytest.mark.slow
def test_two_processes_make_the_trees_of_one(directory: Path, finished: Path) -> None:
    """Of a batch each has its problems, and half of the slots; the rounds of one may go on when
    the other's have ended."""
    longer = ["stages.mcts.max_new_tokens=64", "stages.mcts.search.budget_tokens=240"]
    with pytest.MonkeyPatch.context() as patch:
        figures = with_options(patch)
        plan = config(directory, "one", *longer)
        assert recipe.run(plan, recipe.Selection(only="mcts")) == 0
    assert figures.shared > 100  # in pages of 16 tokens
    written = yaml.safe_load(Path(CONFIG).read_text())
    written["stages"] = [each for each in written["stages"] if each["name"] == "mcts"]
    written["rewards"]["even"]["function"] = "tiny_rewards:even_digits"
    path = directory / "two.yaml"
    path.write_text(yaml.safe_dump(written))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    changes = [process_reward(directory), "mesh.axes={data: 2}", "mesh.cpu_devices=1"]
    changes += longer
    command = [str(path), f"output={directory / 'two'}", *changes]
    started = [
        subprocess.Popen(
            [sys.executable, "one_of_many.py", str(port), "2", str(index), *command],
            env=environment,
            cwd=TESTS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=900)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    assert_same_trees(directory / "two" / finished.name, directory / "one" / finished.name, "mcts")


@pytest.mark.slow
def test_what_is_stored_whole_is_not_searched_again(directory: Path, finished: Path) -> None:
    """Cut off in the second batch, a run ends with the same bytes."""
    run = directory / "again" / finished.name
    shutil.copytree(finished, run)
    (path,) = run.glob("stages/*-beam/trees.jsonl")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]) + lines[6][:40])
    samples = path.with_name("samples.jsonl")
    before = samples.read_bytes()
    samples.write_bytes(b"".join(before.splitlines(keepends=True)[:9]))
    record = json.loads((run / "run.json").read_text())
    record["stages"]["beam"]["status"] = "running"
    (run / "run.json").write_text(json.dumps(record))
    assert recipe.run(config(directory, "again"), recipe.Selection(only="beam")) == 0
    assert path.read_bytes() == whole and samples.read_bytes() == before


@pytest.mark.slow
def test_with_a_perfect_scorer_searches_beat_samples(
    directory: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows that an even number of digits is right, and not which answers are stored."""

    def even(_: object, __: object, responses: Sequence[str]) -> list[float]:
        return [1.0 - sum(c.isdigit() for c in text) % 2 for text in responses]

    monkeypatch.setattr(searching, "_values", even)
    shares = {}
    for stage in ("beam", "mcts"):
        plan = config(directory, "perfect")
        assert recipe.run(plan, recipe.Selection(only=stage)) == 0
        samples = rows(directory / "perfect" / "tiny-search-s0", stage)
        shares[stage] = sum(row["outcome"] == "right" for row in samples) / len(samples)
    sampled = rows(finished, "sampled")
    plain = sum(row["outcome"] == "right" for row in sampled) / len(sampled)
    assert min(shares.values()) > plain + 0.15


@pytest.mark.slow
def test_the_report_draws_a_tree(finished: Path) -> None:
    page = Page.read(finished / "report.html")
    assert page.html.count('<svg class="tree"') == 5
    assert "Search tree of stage mcts" in page.text
    assert "Accuracy against generated tokens" in page.text
    assert "beam by process" in page.text and "majority vote" in page.text


@pytest.mark.slow
def test_a_question_is_searched_from_the_command_line(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    given = ["--config", CONFIG, "--stage", "beam", process_reward(directory)]
    results = [
        CliRunner().invoke(app, ["search", "policy", *given, "--prompt", question])
        for question in ("7+5-3=", "7+5-3=", "1+1=")
    ]
    assert [each.exit_code for each in results] == [0, 0, 0], results[0].output
    written = directory / "searches.jsonl"
    trees = [json.loads(line) for line in written.read_text().splitlines()]
    assert [tree["prompt"] for tree in trees] == ["7+5-3=", "7+5-3=", "1+1="]
    assert trees[0] == trees[1] and trees[0]["generated_tokens"] <= 120
    assert results[0].stdout.startswith(text_of(trees[0], trees[0]["solutions"][0]))
    refused = CliRunner().invoke(app, ["search", "policy", *given[:-1], "--stage", "sampled"])
    assert refused.exit_code == 2


def test_a_plan_has_the_programs_of_a_search(directory: Path) -> None:
    described = describe(config(directory, "planned"))
    lines = [each["what"] for each in described["memory"]]
    assert "beam: key-value cache" in lines and "mcts: state of the slots" in lines


def test_a_search_keeps_its_cache_while_its_steps_are_scored(directory: Path) -> None:
    run = resolve(config(directory, "planned"))
    beam = next(each for each in run.config.stages if each.name == "beam")
    programs = {
        each.name: each for each in load_functions(beam).programs(beam, planning_of(run)).programs
    }
    assert [*programs] == [
        "steps: prefill",
        "steps: prefill of suffixes",
        "steps: decode and refill",
        "reward process",
    ]
    sizes = {name: sizes_of(program) for name, program in programs.items()}
    assert len({each["cache"] for each in sizes.values()}) == 1 and sizes["reward process"]["cache"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["stages.beam.search.budget_tokens=15"],
            "budget_tokens = 15 is smaller than one step: expansions x max_step_tokens = 2 x 8",
        ),
        (
            ["stages.mcts.search.valued_by=value"],
            "scored_by = 'process' and valued_by = 'value': the values of a search come from one",
        ),
        (
            ["stages.mcts.search.scored_by=null", "stages.mcts.search.valued_by=nobody"],
            "stages.mcts.search.valued_by = 'nobody': neither an earlier train stage nor a model",
        ),
        (["stages.beam.search.kind=best_first"], "stages.beam.search.kind"),
        (["stages.beam.search.wdth=2"], "did you mean width"),
        (["stages.mcts.search.exploration=-1"], "stages.mcts.search.exploration"),
        (["stages.beam.samples_per_batch=2"], "with search each sample is a search of its own"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    directory: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(directory, "refused", *changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stages.beam.search.scored_by=proces"], "did you mean 'process'?"),
        (
            ["stages.mcts.search.scored_by=even"],
            "a function compares with the reference answer, which a search must not know",
        ),
        (
            ["stages.mcts.search.scored_by=null", "stages.mcts.search.valued_by=model"],
            'stages.mcts.search.valued_by = "model": model has no critic; name a stage with obj',
        ),
        (
            ["stages.beam.search.max_step_tokens=30", "stages.beam.max_new_tokens=24"],
            "more than the stage's max_new_tokens = 24",
        ),
        (  # of a beginning of 16 + 24 - 8 tokens, and a step
            ["stages.mcts.sampling.cache_tokens=70"],
            "cache_tokens = 70: a KV cache for 1 x 1 slots and one sample of 32 "
            "+ 8 tokens has at least 80",
        ),
    ],
)
def test_what_a_search_could_not_use_is_refused_before_any_compute(
    directory: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        check(resolve(config(directory, "refused", *changes)))
    assert message in str(caught.value) and "stages." in str(caught.value)


def test_values_of_a_critic_by_hand() -> None:
    """Of a beginning behind its last token, of a solution before it; cut to 0..1."""
    read: list[list[int]] = []

    def outputs(texts: Sequence[np.ndarray]) -> list[float]:
        read.extend(text.tolist() for text in texts)
        return [1.5, -0.25, 0.12345678]

    tree = SearchTree(7, 0, solution_tokens=8, step_tokens=3)
    steps = [((5, 6), "step"), ((5, 2), "eos"), ((8, 9, 1), "stop")]
    first, done, stopped = tree.add(0, [Step(ids, "", -1.0, end) for ids, end in steps])
    (later,) = tree.add(first, [Step((4,), "", -1.0, "step")])
    prompt = Prompt(7, "", "", np.asarray([3, 1], np.int32), "", "")
    searcher = SimpleNamespace(model=ValueModel(SimpleNamespace(outputs=outputs)))  # type: ignore[arg-type]
    texts = SimpleNamespace(prompts={7: prompt})
    pairs = [(tree, done), (tree, stopped), (tree, later)]
    found = searching.Searcher._score(searcher, pairs, texts)  # type: ignore[arg-type]
    assert read == [[3, 1, 5], [3, 1, 8, 9], [3, 1, 5, 6, 4]]
    assert found == [1.0, 0.0, 0.123457]


def test_a_search_is_made_once_of_each_problem_by_default() -> None:
    fields = {"name": "x", "data": "d", "search": {"kind": "beam", "scored_by": "p"}}
    assert EvaluateStage.fill_in(fields, {}) == {} and fields["samples_per_problem"] == 1


def test_the_first_step_ends_where_the_rule_cuts() -> None:
    for text in ("7+5=12 ", "  \n12 3", "a", " ", "", "12"):
        steps = cut_steps(text, StepRule(separators=[" "]))
        end = first_step_end(text, StepRule(separators=[" "]))
        assert end == (len(steps[0]) if steps and steps[0].endswith(" ") else None)
    assert first_step_end("a.b.", StepRule(pattern=r"[^.]+\.")) == 2
