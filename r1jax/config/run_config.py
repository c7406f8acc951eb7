"""A whole run: one frozen, typed, validated tree read from one YAML file.

Every class refuses unknown keys. Rules between fields are checked here; checks that need the model
or the data happen when the run is resolved, still before any compute.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, to_jsonable_python

from r1jax.config.yaml_file import ConfigError, show
from r1jax.settings.data import DataSection
from r1jax.settings.kinds import load_kind
from r1jax.settings.mesh import MeshSection
from r1jax.settings.model import MODEL, ModelSection
from r1jax.settings.reflection import compile_patterns
from r1jax.settings.rewards import RewardSection, VerifierSection
from r1jax.settings.section import Section, SettingError
from r1jax.settings.stage import REFERENCE, Leaves, Stage, WeightsUse


def _of_its_kind(stage: object) -> object:
    """A stage as read from YAML, validated by the settings of its kind."""
    if not isinstance(stage, dict):
        return stage
    try:
        kind = load_kind(str(stage.get("kind", "")))
    except ValueError as error:
        wrong = PydanticCustomError("kind", "{problem}", {"problem": str(error)})
        details = InitErrorDetails(type=wrong, loc=("kind",), input=stage.get("kind"))
        raise ValidationError.from_exception_data("stage", [details]) from None
    # As JSON, so that it is read as strictly as the whole config is.
    return kind.model_validate_json(json.dumps(stage), strict=True)


class _ComparisonSection(Section):
    """Checkpoints that the report puts side by side, as of a run with a reward and one without."""

    title: str = Field(description="Of the table.")
    evaluations: list[str] = Field(min_length=2, description="Names of evaluate stages.")
    note: str = Field("", description="Shown below the table: what it says, and what it does not.")


class _WatchdogSection(Section):
    """What a process says when it stands still: what it was doing, and its threads' stacks."""

    seconds: float = Field(1800.0, gt=0, description="Without any progress, after which it speaks.")
    abort: bool = Field(
        False,
        description="Then end the process with status 134, after which tpu_scripts/ start again.",
    )


class RunConfig(Section):
    """A whole run: model, mesh, data, rewards, and an ordered list of stages."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$", description="Of the run, and of its directory."
    )
    seed: int = Field(
        0, ge=0, description="All random numbers are functions of it, a step and an id."
    )
    output: str = Field(
        "runs", description="The run lives in OUTPUT/NAME-sSEED; gs://... is a bucket."
    )
    title: str = Field("", description="Of the report, and in the list of configs.")
    notes: str = Field("", description="Shown in the report: choices, deviations from the paper.")
    model: ModelSection
    models: dict[str, ModelSection] = Field(
        default_factory=dict, description="Further models, such as a student to distil into."
    )
    mesh: MeshSection = Field(
        MeshSection.model_construct(),
        description="The devices as named axes, and what is split over them; or the name of a mesh "
        "in configs/mesh.",
    )
    data: dict[str, DataSection] = Field(description="The datasets, by names of your choice.")
    rewards: dict[str, RewardSection] = Field(
        default_factory=dict,
        description="The rewards by name; a stage adds up all, or those it names.",
    )
    verifier: VerifierSection = VerifierSection.model_construct()
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        ["tensorboard"], description="Where metrics are shown beside the run's own files."
    )
    stages: list[SerializeAsAny[Annotated[Stage, BeforeValidator(_of_its_kind)]]] = Field(
        min_length=1, description="What is run, in this order."
    )
    comparisons: list[_ComparisonSection] = Field(
        default_factory=list, description="Tables of the report beside the one of all stages."
    )
    reflections: list[str] = Field(
        [r"\b(wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b"],
        description="Regular expressions of reflective words, or steps, which are counted in the "
        "completions of RL and of evaluations; case does not matter. Default: the words that the "
        "paper counts (Extended Data Fig. 1).",
    )
    watchdog: _WatchdogSection | None = Field(
        _WatchdogSection.model_construct(),
        description="null: a process that stands still says nothing.",
    )
    compilation_cache: str | None = Field(
        "auto",
        description="Where compiled programs are kept for later runs: a directory, which may be "
        "gs://..., or null for nowhere. `auto`: see r1jax.compilation_cache.",
    )
    _folder: str | None = PrivateAttr(None)
    _places: Mapping[tuple[str, ...], str] = PrivateAttr(default_factory=dict)

    @property
    def folder(self) -> str | None:
        """Where the config was read from: files of reward functions are looked for there first."""
        return self._folder

    def model_post_init(self, context: object) -> None:
        if isinstance(context, dict):
            self._folder = context["folder"]
            self._places = context.get("places", {})

    def place(self, path: Sequence[str]) -> str:
        """`file:line: ` of a key, or of the section that it is missing in; "" where not known."""
        ends = [tuple(path[:end]) for end in range(len(path), 0, -1)]
        place = next((self._places[end] for end in ends if end in self._places), None)
        return "" if place is None else f"{place}: "

    def refusal(self, key: str | Sequence[str], problem: str) -> ConfigError:
        """The error of a setting: after its place in the file, and with its value.

        key: dotted, stages by name; or its parts, where a part may have dots itself.
        """
        path = tuple(key.split(".") if isinstance(key, str) else key)
        node: object = self
        for part in path:
            if isinstance(node, list):  # of stages, or of sections without a name
                at = {str(index): each for index, each in enumerate(node)}
                at |= {each.name: each for each in node if hasattr(each, "name")}
                node = at.get(part)
            else:
                node = node.get(part) if isinstance(node, dict) else getattr(node, part, None)
        plain = None if isinstance(node, Section) or not node and node != 0 else node
        value = (
            ""
            if plain is None or isinstance(plain, dict)
            else f" = {show(to_jsonable_python(plain))}"
        )
        return ConfigError([f"{self.place(path)}{'.'.join(path)}{value}: {problem}"])

    def with_output(self, output: str, place: str) -> RunConfig:
        """The config with another output, which `place` says, such as an option."""
        config = self.model_copy(update={"output": output})
        config._places = {**self._places, ("output",): place}
        return config

    @contextmanager
    def blaming(self, *section: str, reader: str = "") -> Iterator[None]:
        """Errors of the block are those of a section: of the setting that they name, or `source`.

        reader: the stage that the block is for.
        """
        for_whom = f" (read by stages.{reader})" if reader else ""
        try:
            yield
        except ConfigError:
            raise
        except SettingError as error:
            raise self.refusal(
                (*section, *error.key.split(".")), error.problem + for_whom
            ) from error
        except (ValueError, ImportError, OSError) as error:
            raise self.refusal((*section, "source"), f"{error}{for_whom}") from error

    def __eq__(self, other: object) -> bool:  # wherever it was read from
        return isinstance(other, RunConfig) and self.__dict__ == other.__dict__

    @field_validator("reflections")
    @classmethod
    def _are_patterns(cls, value: list[str]) -> list[str]:
        compile_patterns(value)
        return value

    @field_validator("compilation_cache")
    @classmethod
    def _is_a_directory(cls, value: str | None) -> str | None:
        scheme, separator, bucket = (value or "").partition("://")
        if value == "" or (separator and not (scheme == "gs" and bucket.strip("/"))):
            raise ValueError(
                f"{value!r} is no directory that JAX keeps programs in; give a local one, "
                "gs://BUCKET/FOLDER, auto, or null for nowhere"
            )
        return value

    @model_validator(mode="after")
    def _references(self) -> RunConfig:
        if MODEL in self.models:
            raise ValueError(f"models.{MODEL}: the name of the section model; choose another")
        for name, section in self.data.items():
            for part in section.mixture:
                where = f"data.{name}.mixture.{part}"
                if part not in self.data:
                    raise ValueError(f"{where}: not one of the datasets {sorted(self.data)}")
                if self.data[part].mixture:
                    raise ValueError(f"{where} is itself a mixture; name its parts")
        names = [stage.name for stage in self.stages]
        for index, stage in enumerate(self.stages):
            where = f"stages.{stage.name}"
            if names.count(stage.name) > 1 or stage.name in (MODEL, *self.models):
                raise ValueError(f"{where}: the name {stage.name!r} is used twice")
            for key, data in stage.datasets():
                if data not in self.data:
                    raise ValueError(
                        f"{where}.{key} = {data!r}: not one of the datasets {sorted(self.data)}"
                    )
                written = self._names("dataset", before=index)
                for source in self.source_stages(data):
                    if source not in written:
                        raise ValueError(
                            f"{where}.{key}: data.{data} comes from stage:{source}, which is not a "
                            f"stage before {where} that writes a dataset; there are {written}"
                        )
                    rows = self.stage(source).DESCRIPTION.dataset_rows
                    if rows != stage.dataset_rows_read():
                        raise ValueError(
                            f"{where}.{key}: data.{data} comes from stage:{source}, which writes "
                            f"{rows.replace('_', ' ')}; {where} reads "
                            f"{stage.dataset_rows_read().replace('_', ' ')}"
                        )
            uses = stage.other_weights()
            if stage.weights is not None:
                uses = [WeightsUse("weights", stage.weights, "weights"), *uses]
            for use in uses:
                known = [*self._names("weights", before=index), MODEL, *self.models]
                if use.rewards:
                    trained = [self.stage(n) for n in self._names("reward_model", before=index)]
                    known += [s.name for s in trained if s.DESCRIPTION.head == "scalar"]
                if use.source not in known:
                    raise ValueError(
                        f"{where}.{use.key} = {use.source!r}: neither an earlier train stage nor a "
                        f"model; there are {known}"
                    )
                if use.gives == REFERENCE and self.model_of(use.source) != self.model_of(
                    stage.name
                ):
                    raise ValueError(
                        f"{where}.{use.key} = {use.source!r} has weights of the model "
                        f"{self.model_of(use.source)!r}, and {where} trains "
                        f"{self.model_of(stage.name)!r}; name a stage of the same model"
                    )
            for key, weights in stage.prediction_module_uses():
                self._check_prediction_module(f"{where}.{key}", weights)
            self._check_rewards(where, stage, names[:index])
        self._check_rollout_devices()
        self._check_comparisons()
        return self

    def _names(self, leaves: Leaves, before: int | None = None) -> list[str]:
        """The stages with such a result, of all or of those before an index."""
        return [s.name for s in self.stages[:before] if s.DESCRIPTION.leaves == leaves]

    def _check_rewards(self, where: str, stage: Stage, before: list[str]) -> None:
        selection = stage.reward_selection()
        if selection is None and not self.rewards:
            raise ValueError(f"{where} needs at least one entry in rewards")
        selected = self.rewards_of(stage)
        if stage.needs_reward() and selected and not any(r.weight for r in selected.values()):
            raise ValueError(
                f"{where} trains on nothing: the weights of its rewards, {', '.join(selected)}, "
                "are all 0; give one another weight"
            )
        for reward in selection or ():
            if reward not in selected:
                raise ValueError(
                    f"{where}.rewards: {reward!r} is not one of {sorted(self.rewards)}"
                )
        for name, reward_model in self.reward_stages(stage).items():
            if reward_model not in before:
                raise ValueError(
                    f"{where} is rewarded by rewards.{name}, whose model is the stage "
                    f"{reward_model}: that must come before, or {where}.rewards must "
                    "leave the reward out"
                )

    def _check_prediction_module(self, key: str, weights: str) -> None:
        model = self.model_of(weights)
        if not self.section_of(model).multi_token_prediction:
            where = MODEL if model == MODEL else f"models.{model}"
            raise ValueError(
                f"{key} needs the module for multi-token prediction, which this run's model does "
                f"without; set {where}.multi_token_prediction to true, or leave {key} out"
            )

    def _check_rollout_devices(self) -> None:
        """Devices that only sample would wait for the others in a stage that samples in turn."""
        if self.mesh.rollout is None or self.mesh.rollout.devices is None:
            return
        where = f"mesh.rollout.devices = {self.mesh.rollout.devices}"
        ahead = {stage.name: stage.samples_ahead() for stage in self.stages}
        for name in (name for name, value in ahead.items() if value is False):
            raise ValueError(
                f"{where} with stages.{name}.phases_of_lag = 0: the devices that sample and those "
                "that train would wait for each other; set phases_of_lag to 1, or leave "
                "mesh.rollout.devices out"
            )
        if not any(ahead.values()):
            raise ValueError(
                f"{where}: no stage samples while it trains, as one of kind grpo does with "
                "phases_of_lag: 1; leave it out"
            )

    def _check_comparisons(self) -> None:
        known = self._names("evaluation")
        for index, section in enumerate(self.comparisons):
            where = f"comparisons.{index}.evaluations"
            for name in section.evaluations:
                if name not in known:
                    raise ValueError(f"{where}: {name!r} is not one of the evaluate stages {known}")
                if section.evaluations.count(name) > 1:
                    raise ValueError(f"{where}: {name!r} is named twice; a row is enough")

    def source_stages(self, data: str) -> list[str]:
        """The stages that wrote a dataset."""
        section = self.data[data]
        if section.mixture:
            parts = [part for part in section.mixture if part in self.data]
            return [source for part in parts for source in self.source_stages(part)]
        kind, _, name = str(section.source).partition(":")
        return [name] if kind == "stage" else []

    def reward_stages(self, stage: Stage) -> dict[str, str]:
        """Reward -> the stage of this run that trained its model, for those with such a model."""
        trained = self._names("reward_model")
        models = {name: reward.model for name, reward in self.rewards_of(stage).items()}
        return {name: model for name, model in models.items() if model in trained}

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def weights_of(self, name: str) -> str:
        """Where a stage's weights come from: the name of a train stage, or of a model."""
        before = MODEL
        for stage in self.stages:
            if stage.name == name:
                return stage.weights or before
            if stage.DESCRIPTION.leaves == "weights":
                before = stage.name
        raise KeyError(name)

    def model_of(self, name: str) -> str:
        """The model (`model`, or a name in `models`) of a stage's weights, or of that name."""
        while name != MODEL and name not in self.models:
            name = self.weights_of(name)
        return name

    def section_of(self, model: str) -> ModelSection:
        """The settings of `model`, or of a name in `models`."""
        return self.model if model == MODEL else self.models[model]

    def rewards_of(self, stage: Stage) -> dict[str, RewardSection]:
        """The rewards that score a stage's samples: its own, or those of the config, in order."""
        selection = stage.reward_selection()
        if isinstance(selection, dict):
            return selection
        return {n: r for n, r in self.rewards.items() if selection is None or n in selection}
