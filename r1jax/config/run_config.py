"""A whole run: one frozen, typed, validated tree read from one YAML file.

Every class refuses unknown keys. Cross-field rules are checked here, before any compute; checks
that need the model or the data (is the vocabulary large enough, does the file exist) happen when
the run is resolved, still before any compute.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1jax.settings.data import DataSection
from r1jax.settings.mesh import MeshSection
from r1jax.settings.model import MODEL, ModelSection
from r1jax.settings.rewards import RewardSection, VerifierSection
from r1jax.settings.sampling import SamplingSection
from r1jax.settings.section import Section
from r1jax.settings.stage import EpochStage
from r1jax.stages.evaluate.settings import EvaluateStage
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.stages.pretrain.settings import PretrainStage
from r1jax.stages.rejection_sampling.settings import ModelRewrite, RejectionSamplingStage
from r1jax.stages.reward_model.settings import RewardModelStage
from r1jax.stages.sft.settings import SFTStage

Stage = Annotated[
    PretrainStage
    | SFTStage
    | GRPOStage
    | RejectionSamplingStage
    | RewardModelStage
    | EvaluateStage,
    Field(discriminator="kind"),
]

TRAIN_KINDS = ("pretrain", "sft", "grpo")


class ComparisonSection(Section):
    """Checkpoints that the report puts side by side, such as a run with a reward and one without.

    Each row is an evaluation, with what its weights took to train since what all rows share.
    """

    title: str
    evaluations: list[str] = Field(min_length=2, description="Names of evaluate stages.")
    note: str = Field("", description="Shown below the table: what it says, and what it does not.")


class WatchdogSection(Section):
    """What a process says when it stands still: what it was doing, and the stacks of its threads.

    The time is longer than the first compilation of a large model takes.
    """

    seconds: float = Field(1800.0, gt=0, description="Without any progress, after which it speaks.")
    abort: bool = Field(
        False,
        description="Then end the process with status 134, after which tpu_scripts/ start again.",
    )


class RunConfig(Section):
    """A whole run: model, mesh, data, rewards, and an ordered list of stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")
    seed: int = Field(0, ge=0)
    output: str = Field(
        "runs", description="The run lives in OUTPUT/NAME-sSEED; gs://... is a bucket."
    )
    title: str = ""
    notes: str = Field("", description="Shown in the report: choices, deviations from the paper.")
    model: ModelSection
    models: dict[str, ModelSection] = Field(
        default_factory=dict, description="Further models, such as a student to distil into."
    )
    mesh: MeshSection = MeshSection()
    data: dict[str, DataSection]
    rewards: dict[str, RewardSection] = Field(default_factory=dict)
    verifier: VerifierSection = VerifierSection()
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    stages: list[Stage] = Field(min_length=1)
    comparisons: list[ComparisonSection] = Field(
        default_factory=list, description="Tables of the report beside the one of all stages."
    )
    watchdog: WatchdogSection | None = Field(
        WatchdogSection(), description="null: a process that stands still says nothing."
    )
    compilation_cache: str | None = Field(
        "auto",
        description="Where compiled programs are kept for later runs: a directory, which may be "
        "gs://..., or null for nowhere. `auto`: see r1jax.compilation_cache.",
    )

    @model_validator(mode="after")
    def _references(self) -> RunConfig:
        if MODEL in self.models:
            raise ValueError(f"models.{MODEL}: the name of the section model; choose another")
        for name, section in self.data.items():
            for part in section.mixture:
                if part not in self.data:
                    raise ValueError(
                        f"data.{name}.mixture.{part}: not one of the datasets {sorted(self.data)}"
                    )
                if self.data[part].mixture:
                    raise ValueError(
                        f"data.{name}.mixture.{part} is itself a mixture; name its parts"
                    )
        names = [stage.name for stage in self.stages]
        for index, stage in enumerate(self.stages):
            where = f"stages.{stage.name}"
            if names.count(stage.name) > 1 or stage.name in (MODEL, *self.models):
                raise ValueError(f"{where}: the name {stage.name!r} is used twice")
            for key, data in datasets_of(stage):
                if data not in self.data:
                    raise ValueError(
                        f"{where}.{key} = {data!r}: not one of the datasets {sorted(self.data)}"
                    )
                for source in self.source_stages(data):
                    self._check_source(where, key, data, source, index)
            trained = [s.name for s in self.stages[:index] if s.kind in TRAIN_KINDS]
            known = [*trained, MODEL, *self.models]
            if stage.weights is not None:
                _check_weights(f"{where}.weights", stage.weights, known)
            if isinstance(stage, RejectionSamplingStage) and isinstance(
                stage.rewrite, ModelRewrite
            ):
                _check_weights(f"{where}.rewrite.weights", stage.rewrite.weights, known)
            self._check_module(where, stage)
            if isinstance(stage, GRPOStage | EvaluateStage | RejectionSamplingStage):
                if not isinstance(stage.rewards, dict) and not self.rewards:
                    raise ValueError(f"{where} needs at least one entry in rewards")
                for reward in stage.rewards or ():
                    if reward not in self.rewards_of(stage.rewards):
                        raise ValueError(
                            f"{where}.rewards: {reward!r} is not one of {sorted(self.rewards)}"
                        )
                for name, reward_model in self.reward_stages(stage.rewards).items():
                    if reward_model not in names[:index]:
                        raise ValueError(
                            f"{where} is rewarded by rewards.{name}, whose model is the stage "
                            f"{reward_model}: that must come before, or {where}.rewards must "
                            "leave the reward out"
                        )
        self._check_comparisons()
        return self

    def _check_module(self, where: str, stage: Stage) -> None:
        """What needs a module for multi-token prediction is asked of a model that has one."""
        if isinstance(stage, PretrainStage | SFTStage) and stage.mtp_weight:
            self._needs_module(f"{where}.mtp_weight", stage.name)
        sampled: list[tuple[str, SamplingSection, str]] = []
        if isinstance(stage, GRPOStage | EvaluateStage | RejectionSamplingStage):
            sampled.append(("sampling", stage.sampling, stage.name))
        if isinstance(stage, GRPOStage):
            sampled.append(("held_out_sampling", stage.held_out_sampling, stage.name))
        if isinstance(stage, RejectionSamplingStage) and isinstance(stage.rewrite, ModelRewrite):
            sampled.append(("rewrite.sampling", stage.rewrite.sampling, stage.rewrite.weights))
        for key, section, weights in sampled:
            if section.speculative:
                self._needs_module(f"{where}.{key}.speculative", weights)

    def _needs_module(self, key: str, weights: str) -> None:
        model = self.model_of(weights)
        section = self.model if model == MODEL else self.models[model]
        if not section.multi_token_prediction:
            where = MODEL if model == MODEL else f"models.{model}"
            raise ValueError(
                f"{key} needs the module for multi-token prediction, which this run's model does "
                f"without; set {where}.multi_token_prediction to true, or leave {key} out"
            )

    def _check_comparisons(self) -> None:
        known = [stage.name for stage in self.stages if stage.kind == "evaluate"]
        for index, section in enumerate(self.comparisons):
            where = f"comparisons.{index}.evaluations"
            for name in section.evaluations:
                if name not in known:
                    raise ValueError(f"{where}: {name!r} is not one of the evaluate stages {known}")
                if section.evaluations.count(name) > 1:
                    raise ValueError(f"{where}: {name!r} is named twice; a row is enough")

    def _check_source(self, where: str, key: str, data: str, source: str, index: int) -> None:
        before = {s.name: s.kind for s in self.stages[:index]}
        if before.get(source) != "rejection_sampling":
            written = [name for name, kind in before.items() if kind == "rejection_sampling"]
            raise ValueError(
                f"{where}.{key}: data.{data} comes from stage:{source}, which is not a "
                f"rejection_sampling stage before {where}; there are {written}"
            )

    def source_stages(self, data: str) -> list[str]:
        """The rejection sampling stages that a dataset comes from."""
        section = self.data[data]
        if section.mixture:
            return [
                s for part in section.mixture if part in self.data for s in self.source_stages(part)
            ]
        kind, _, name = str(section.source).partition(":")
        return [name] if kind == "stage" else []

    def reward_stages(self, names: list[str] | dict[str, RewardSection] | None) -> dict[str, str]:
        """Reward -> reward_model stage, of those rewards that such a stage of this run gives."""
        trained = {stage.name for stage in self.stages if stage.kind == "reward_model"}
        found = {name: reward.model for name, reward in self.rewards_of(names).items()}
        return {name: model for name, model in found.items() if model in trained}

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def weights_of(self, name: str) -> str:
        """Where a stage's weights come from: the name of a train stage, or of a model."""
        before = MODEL
        for stage in self.stages:
            if stage.name == name:
                return stage.weights or before
            if stage.kind in TRAIN_KINDS:
                before = stage.name
        raise KeyError(name)

    def model_of(self, name: str) -> str:
        """The model (`model`, or a name in `models`) that a stage's weights are of.

        Args:
          name: of a stage or of a model.
        """
        while name != MODEL and name not in self.models:
            name = self.weights_of(name)
        return name

    def rewards_of(
        self, names: list[str] | dict[str, RewardSection] | None
    ) -> dict[str, RewardSection]:
        """A stage's rewards: its own, or those of these names in the config's order, or all."""
        if isinstance(names, dict):
            return names
        return {name: r for name, r in self.rewards.items() if names is None or name in names}


def _check_weights(where: str, weights: str, known: list[str]) -> None:
    if weights not in known:
        raise ValueError(
            f"{where} = {weights!r}: neither an earlier train stage nor a model; there are {known}"
        )


def datasets_of(stage: Stage) -> list[tuple[str, str]]:
    """(key, dataset) of all datasets that a stage reads."""
    found: list[tuple[str, str]] = []
    if isinstance(stage.data, str):
        found.append(("data", stage.data))
    else:
        found += [(f"data.{i}.data", change.data) for i, change in enumerate(stage.data)]
    if isinstance(stage, GRPOStage | EpochStage) and stage.held_out is not None:
        found.append(("held_out", stage.held_out))
    if isinstance(stage, RejectionSamplingStage):
        found += [("decontaminate", data) for data in stage.decontaminate]
    return found
