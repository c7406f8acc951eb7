"""Checks of rewards before any compute: their options and functions, and the rows that they get."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence

from r1jax.config.run_config import RunConfig
from r1jax.config.yaml_file import ConfigError
from r1jax.data.chat_template import check_template, render_prompt
from r1jax.data.example import Example
from r1jax.data.prompts import check_prompts
from r1jax.models import ModelConfig
from r1jax.rewards import Verifier, VerifierError, check_reward, unreadable_references
from r1jax.rewards.functions import FIELD_OF
from r1jax.rewards.visible import is_blank
from r1jax.run.datasets import Datasets
from r1jax.run.models import LanguageModel, Models
from r1jax.settings.data import DataSection
from r1jax.settings.rewards import RewardSection
from r1jax.settings.section import SettingError
from r1jax.settings.stage import Stage
from r1jax.sharding import Layout

_EXAMPLES = 3  # lines that are shown of a dataset


def _rewards(config: RunConfig) -> dict[str, RewardSection]:
    """The rewards that are functions, with `function` set; those of a stage as `STAGE.NAME`."""
    rewards = _with_functions(config.rewards)
    for stage in config.stages:
        if isinstance(selection := stage.reward_selection(), dict):
            of_stage = _with_functions(selection)
            rewards |= {f"{stage.name}.{name}": reward for name, reward in of_stage.items()}
    return rewards


def _with_functions(rewards: Mapping[str, RewardSection]) -> dict[str, RewardSection]:
    return {
        name: reward.model_copy(update={"function": reward.function or name})
        for name, reward in rewards.items()
        if reward.model is None
    }


def check_rewards(config: RunConfig) -> None:
    """Raises ValueError for an unknown reward, and for options that it refuses."""
    for name, reward in _rewards(config).items():
        try:
            check_reward(str(reward.function), reward.options, config.verifier)
        except ValueError as error:
            raise ConfigError([f"{_place(config, name)}{error}"]) from error


def _key(config: RunConfig, name: str) -> tuple[str, ...]:
    """The key of a reward of `_rewards`."""
    if name in config.rewards:
        return ("rewards", name)
    stage, _, reward = name.partition(".")
    return ("stages", stage, "rewards", reward)


def _function(path: tuple[str, ...], function: str | None) -> tuple[str, ...]:
    """The key that names a reward's function: `function`, or where it is not set the reward's."""
    return path if function in (None, path[-1]) else (*path, "function")


def _place(config: RunConfig, name: str) -> str:
    """The place of a reward of `_rewards`."""
    return config.place(_key(config, name))


def check_functions(config: RunConfig) -> dict[str, list[str]]:
    """The columns that functions from outside need, by reward: see `check_columns`.

    Raises:
      ValueError: a function cannot be imported, in a worker, or not be called.
    """
    functions = {k: reward for k, reward in _rewards(config).items() if ":" in str(reward.function)}
    section = config.verifier.model_copy(update={"workers": 1})
    if not functions:
        return {}
    try:
        with Verifier(functions, section, config.folder) as verifier:
            return verifier.columns
    except VerifierError as error:
        if error.reward is None:
            raise ConfigError([f"{_place(config, next(iter(functions)))}{error}"]) from error
        path = _key(config, error.reward)
        function = functions[error.reward].function
        begin = f"rewards.{function}: "
        if not str(error).startswith(begin):  # about an option
            raise ConfigError([f"{config.place(path)}{error}"]) from error
        raise config.refusal(_function(path, function), str(error).removeprefix(begin)) from error


def check_columns(
    config: RunConfig, datasets: Datasets, columns: Mapping[str, Sequence[str]]
) -> None:
    """Raises ConfigError where a function needs a column that rows of a dataset do not have: more
    than `verifier.max_unreadable_share` of those that it scores.

    A reward of weight 0 only measures: its failures stop no run.

    Args:
      columns: of `check_functions`.
    """
    for stage in config.stages:
        of_stage = isinstance(stage.reward_selection(), dict)
        parts = (part for name in stage.prompt_datasets() for part in datasets.parts(name))
        for data in dict.fromkeys(parts):
            for name, reward in config.rewards_of(stage).items():
                key = f"{stage.name}.{name}" if of_stage else name
                needed = columns.get(key, ()) if reward.weight else ()
                if not needed:  # reading a task's rows makes them
                    continue
                rows = _scored_rows(config, datasets, data, reward)
                for column in needed:
                    lacking = [row for row, of_row in rows if column not in of_row]
                    if len(lacking) <= config.verifier.max_unreadable_share * len(rows):
                        continue
                    known = sorted({each for _, of_row in rows for each in of_row})
                    path = _key(config, key)
                    where, first = "no column of", lacking[0]
                    hint = f"It is {FIELD_OF[column]} here. " if column in FIELD_OF else ""
                    if first is not None and len(lacking) < len(rows):
                        label = datasets.label(data, first)
                        where = f"not in {len(lacking)} of {len(rows)} rows ({label}) of"
                    raise config.refusal(
                        _function(path, reward.function),
                        f"its parameter {column!r} is {where} data.{data}, which stage "
                        f"{stage.name} reads; there are {known}. {hint}Add the column, name the "
                        f"parameter as one of these, give it a default, or set "
                        f"{'.'.join(path)}.options.{column}; domains keeps a reward off rows",
                    )


def _scored_rows(
    config: RunConfig, datasets: Datasets, data: str, reward: RewardSection
) -> list[tuple[Example | None, Collection[str]]]:
    """Each row that a reward scores, with its columns; one stands for those that a stage of the run
    will write."""
    writers = config.source_stages(data)  # of a dataset that is no mixture: one, or none
    if not writers:
        rows = (each for each in datasets.examples(data) if _is_for(reward, each))
        return [(each, each.columns) for each in rows]
    columns = config.stage(writers[0]).DESCRIPTION.dataset_columns
    if not columns or (
        reward.domains is not None and not _domains(config, datasets, data) & set(reward.domains)
    ):
        return []
    return [(None, columns)]


def _domains(config: RunConfig, datasets: Datasets, data: str) -> set[str]:
    """The domains of a dataset's rows, also of those that a stage of the run will write."""
    if config.data[data].domain:
        return {str(config.data[data].domain)}
    writers = [config.stage(name) for name in config.source_stages(data)]
    if not writers:
        return set(datasets.domains(data))
    sources = (
        part for each in writers for name in each.prompt_datasets() for part in datasets.parts(name)
    )
    return {domain for part in sources for domain in _domains(config, datasets, part)}


def check_reward_models(config: RunConfig, layout: Layout) -> None:
    """Raises ConfigError for a reward model that cannot be used as it is set."""
    trained = {stage.name: form for stage in config.stages if (form := stage.reward_model_format())}
    rewards: dict[tuple[str, ...], RewardSection] = {
        ("rewards", name): reward for name, reward in config.rewards.items()
    }
    for stage in config.stages:
        if isinstance(selection := stage.reward_selection(), dict):
            for name, reward in selection.items():
                rewards["stages", stage.name, "rewards", name] = reward
    for place, reward in rewards.items():
        if reward.model is None:
            continue
        if (form := trained.get(reward.model)) is not None:
            if form.steps is None and (reward.step_rule or reward.solution_score):
                raise config.refusal(
                    (*place, "model"),
                    "this stage trains no process reward model, which alone has step_rule and "
                    "solution_score; remove them, or name a process_reward_model stage",
                )
            if form.steps is None and reward.per_step:
                raise config.refusal(
                    (*place, "model"),
                    "this stage trains no process reward model, which alone scores steps; remove "
                    "per_step, or name a process_reward_model stage",
                )
            if reward.step_rule is not None:
                raise config.refusal(
                    (*place, "step_rule"), f"that of stages.{reward.model} is used; remove it"
                )
            continue
        if reward.reads is None and reward.step_rule is None:
            raise config.refusal(
                (*place, "model"),
                "no reward_model stage of this run: a directory needs reads (summary or response), "
                "or, of a process reward model, step_rule",
            )
        with config.blaming(*place):
            data = DataSection(source="jsonl:-", template=reward.template or "chat")
            section = config.model.model_copy(update={"path": reward.model, "tokenizer": None})
            section = section.model_copy(update={"config": None, "multi_token_prediction": False})
            model = LanguageModel.resolve(section, layout)
            _check_head(model.decoder.config, reward)
            check_template(data)
            render_prompt("", data, model.tokenizer)


def _check_head(model: ModelConfig, reward: RewardSection) -> None:
    """Raises SettingError where a directory holds another kind of model than the reward needs."""
    head, what, remedy = "scalar", "sequence classification", "step_rule in place of reads"
    if reward.step_rule is not None:
        head, what, remedy = "token_labels", "token classification", "reads in place of step_rule"
    if model.head == head:
        return
    kinds = {"token_labels": "a process reward model", "scalar": "a reward model of whole texts"}
    found = kinds.get(model.head, "a language model")
    hint = "" if model.head == "language" else f", or give {remedy}"
    raise SettingError(
        "model",
        f"its config.json is that of {found}, no {what} ({kinds[head]}); name a directory that "
        f"{'process_reward_model' if head == 'token_labels' else 'reward_model'} stages or "
        f"transformers wrote for it{hint}",
    )


def check_rows(config: RunConfig, models: Models, datasets: Datasets) -> list[str]:
    """Prompts fit and are not blank, and reference answers can be read, of datasets from outside.

    Returns:
      A line for each dataset whose reference answers were read: how many cannot be.

    Raises:
      ValueError: more rows of a dataset are useless than the config allows, or none fits.
    """
    rewards: dict[str, dict[str, RewardSection]] = {}
    for stage in config.stages:
        tokenizer = models.of(stage.name).tokenizer
        parts = (part for name in stage.prompt_datasets() for part in datasets.parts(name))
        for data in dict.fromkeys(parts):
            if config.source_stages(data):
                continue
            with config.blaming("data", data, reader=stage.name):
                check_prompts(datasets.examples(data), config.data[data], tokenizer)
                if _reads_questions(config, stage):
                    _check_no_history(datasets.examples(data))
            if not datasets.is_generated(data):
                of_stage = {
                    f"{data} {json.dumps([r.function, r.options], sort_keys=True)}": r
                    for r in _with_functions(config.rewards_of(stage)).values()
                }
                rewards[data] = rewards.get(data, {}) | of_stage
    keyed = {key: reward for of_data in rewards.values() for key, reward in of_data.items()}
    answers = {
        key: [e.answer for e in datasets.examples(data) if _is_for(reward, e)]
        for data, of_data in rewards.items()
        for key, reward in of_data.items()
    }
    reasons = unreadable_references(answers, keyed, config.verifier)
    lines = []
    for data, of_data in rewards.items():
        examples = datasets.examples(data)
        useless: list[str] = []
        count = 0
        for example in examples:
            problem = "its prompt is blank" if is_blank(example.prompt) else None
            for key, reward in of_data.items():
                why = reasons.get(key, {}).get(example.answer) if _is_for(reward, example) else None
                if problem is None and why is not None:
                    problem = f"reference answer {example.answer[:100]!r}: {why}"
            if problem is not None:
                count += 1
                if len(useless) < _EXAMPLES:
                    useless.append(f"{datasets.label(data, example)}: {problem}")
        if not count and not any(key in reasons for key in of_data):
            continue
        line = f"data.{data}: {count} of {len(examples)} rows have a blank prompt or a reference "
        line = "\n  ".join([f"{line}answer that cannot be read", *useless])
        if count > config.verifier.max_unreadable_share * len(examples):
            raise ConfigError(
                [
                    f"{config.place(('data', data, 'source'))}{line}\n"
                    f"That is more than verifier.max_unreadable_share = "
                    f"{config.verifier.max_unreadable_share:g}: mend or remove these rows, or "
                    "raise it"
                ]
            )
        lines.append(line)
    return lines


def _reads_questions(config: RunConfig, stage: Stage) -> bool:
    """Whether the stage writes or rewards questions without what was said before them."""
    rewards = config.rewards_of(stage).values()
    return stage.DESCRIPTION.leaves == "dataset" or any(r.model is not None for r in rewards)


def _check_no_history(examples: Sequence[Example]) -> None:
    """Raises SettingError for a first row whose prompt is a conversation."""
    if examples and examples[0].history:
        raise SettingError(
            "fields.prompt",
            "its prompts are conversations, of which rejection_sampling and reward models know the "
            "last question alone; put what was said before into one message",
        )


def _is_for(reward: RewardSection, example: Example) -> bool:
    return reward.domains is None or example.domain in reward.domains
