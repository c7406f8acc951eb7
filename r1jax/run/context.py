"""What all stages of a run share, resolved from the config before any compute."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import yaml
from huggingface_hub.utils.tqdm import disable_progress_bars

from r1jax.bucket import WorkingCopy, locate, on_bucket
from r1jax.config.lineage import differences, ingredients
from r1jax.config.run_config import RunConfig
from r1jax.data import (
    Document,
    EncodedPreference,
    Example,
    Prompt,
    encode_conversations,
    encode_documents,
    encode_prompts,
    load_examples,
    load_tokenizer,
    stop_token_ids,
)
from r1jax.data.mixing import mixed_id, mixture_counts
from r1jax.files import write_text
from r1jax.metrics import ProfiledSteps
from r1jax.models import (
    Decoder,
    Execution,
    ModelConfig,
    abstract_params,
    choose_attention,
    init_params,
)
from r1jax.processes import wait_for_all
from r1jax.sampler import to_sample
from r1jax.settings.data import DataSection
from r1jax.settings.mesh import MeshSection
from r1jax.settings.model import MODEL, ModelSection
from r1jax.sharding import Layout, make_layout, make_rollout_layout, split_cpu
from r1jax.stages.rejection_sampling.settings import ModelRewrite, RejectionSamplingStage
from r1jax.weights import hugging_face

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A row of a dataset: the dataset's name and the row's index in it.
Place = tuple[str, int]
Encode = Callable[[Sequence[Place]], list[Document]]


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what would help."""


class Preempted(Exception):
    """SIGTERM arrived; the state is saved."""


def make_layouts(
    section: MeshSection, devices: Sequence[jax.Device] | None = None
) -> tuple[Layout, Layout]:
    """The devices (default: all) arranged for training, and for sampling."""
    training = make_layout(section.axes, section.rules, devices)
    if section.rollout is None:
        return training, make_rollout_layout(training, inherited=section.rules)
    return training, make_rollout_layout(
        training, section.rollout.axes, section.rollout.rules, inherited=section.rules
    )


def build_decoder(section: ModelSection, layout: Layout) -> tuple[Decoder, dict[str, Any] | None]:
    """The model of a config, and the generation config beside its weights."""
    generation = None
    if section.path is not None:
        directory = hugging_face.resolve(section.path)
        raw: Mapping[str, Any] = hugging_face.read_config(directory)
        hugging_face.is_quantised(raw)  # refuses what cannot be loaded, before a run begins
        generation = hugging_face.read_generation_config(directory)
    else:
        assert section.config is not None
        raw = section.config
    config = ModelConfig.from_hugging_face(raw)
    if section.path is not None:
        different = hugging_face.differences_from_published(section.path, config)
        if different:  # the model is right; plans of it are not
            warnings.warn(
                f"{section.path} differs from the shape that r1jax plans with: "
                f"{'; '.join(different)}",
                stacklevel=2,
            )
    return decoder_of(section, config, layout), generation


def decoder_of(section: ModelSection, config: ModelConfig, layout: Layout) -> Decoder:
    """A model of this shape, executed as the section says on the devices of the mesh.

    Raises:
      ValueError: the section wants a prediction module, and the model has none.
    """
    if not section.multi_token_prediction:
        config = replace(config, num_nextn_predict_layers=0)
    elif not config.num_nextn_predict_layers:
        raise ValueError(
            "model.multi_token_prediction = true, but the model's config has "
            "num_nextn_predict_layers = 0, so no such module; set multi_token_prediction to false "
            "(a model from scratch may have one: num_nextn_predict_layers = 1 in model.config)"
        )
    # Of the mesh, not of this process: a run may be compiled for devices that are not attached.
    backend = layout.mesh.devices.flat[0].platform
    scan = section.scan_layers
    execution = Execution(
        param_dtype=jnp.dtype(section.param_dtype),
        compute_dtype=jnp.dtype(section.compute_dtype),
        attention=choose_attention(section.attention, backend),
        remat=section.remat,
        # Loops over stacked weights are slow on the CPU, whose models are small.
        scan_layers=(backend != "cpu") if scan == "auto" else scan,
        log_prob_chunk=section.log_prob_chunk,
        expert_chunk=section.expert_chunk,
    )
    return Decoder(config, execution, layout)


@dataclass(frozen=True)
class LanguageModel:
    """A model of the config, resolved: what it computes, and how text becomes its tokens."""

    section: ModelSection
    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    generation_config: dict[str, Any] | None

    @staticmethod
    def resolve(section: ModelSection, layout: Layout) -> LanguageModel:
        """Raises ValueError for what does not fit together."""
        decoder, generation = build_decoder(section, layout)
        named = section.tokenizer
        if named is None:  # the directory, not the hub name: its tokenizer.json is read as it is
            named = str(hugging_face.resolve(str(section.path)))
        tokenizer = load_tokenizer(named)
        if len(tokenizer) > decoder.config.vocab_size:
            raise ValueError(
                f"model vocab_size = {decoder.config.vocab_size} is smaller than the tokenizer's "
                f"{len(tokenizer)} tokens; use the tokenizer that belongs to the model"
            )
        eos_ids = stop_token_ids(tokenizer, generation)
        return LanguageModel(section, decoder, tokenizer, eos_ids, generation)

    def abstract_params(self) -> Any:
        """The weights as `jax.ShapeDtypeStruct`s with shardings."""
        decoder = self.decoder
        return abstract_params(decoder.config, decoder.layout, decoder.execution.param_dtype)

    def load(self, directory: Path, *, new_head: int | None = None) -> Any:
        """The weights of a Hugging Face directory, on the mesh.

        Args:
          new_head: a seed; the directory has another head, and this model's is drawn.
        """
        decoder = self.decoder
        return hugging_face.load_params(
            directory,
            decoder.config,
            decoder.layout,
            decoder.execution.param_dtype,
            new_head=None if new_head is None else jax.random.key(new_head),
        )

    def initial(self, seed: int) -> Any:
        """The config's own weights: those of its path, or random ones."""
        if self.section.path is not None:
            path = hugging_face.resolve(self.section.path)
            return self.load(path, new_head=seed if self.decoder.config.head == "scalar" else None)
        decoder = self.decoder
        return init_params(
            jax.random.key(seed), decoder.config, decoder.layout, decoder.execution.param_dtype
        )

    def with_scalar_head(self) -> LanguageModel:
        """The same model with one number in place of the next token: a reward model."""
        config = replace(self.decoder.config, head="scalar", num_nextn_predict_layers=0)
        return replace(self, decoder=replace(self.decoder, config=config))

    def export(self, directory: Path, params: Any) -> None:
        """Write weights, configs and tokenizer as a Hugging Face directory (atomically)."""
        generation = dict(self.generation_config or {})
        generation["eos_token_id"] = list(self.eos_ids)
        hugging_face.export(
            directory,
            params,
            self.decoder.config,
            tokenizer=self.tokenizer,
            generation_config=generation,
        )


@dataclass
class Context:
    """A run, resolved: where it lives, its models, its data and the record of its stages.

    Attributes:
      directory: where its files are written; of a run on a bucket the working copy.
      copy: that working copy; None where the output is a local folder.
    """

    config: RunConfig
    directory: Path
    layout: Layout
    rollout_layout: Layout
    models: dict[str, LanguageModel]
    copy: WorkingCopy | None = None
    record: dict[str, Any] = field(default_factory=dict)
    stop_requested: bool = False
    _examples: dict[str, Sequence[Example]] = field(default_factory=dict)
    # Rows and report by (stage, dataset): the check encodes them, and the stage takes them over.
    preferences: dict[tuple[str, str], tuple[list[EncodedPreference], str]] = field(
        default_factory=dict
    )
    # What to trace, and the traces that were written.
    profile: ProfiledSteps | None = None
    profiles: list[Path] = field(default_factory=list)

    @staticmethod
    def resolve(config: RunConfig) -> Context:
        """Everything that can be refused is refused here: models, mesh, tokenizers, vocabularies.

        Only models that a stage uses are looked at.
        """
        split_cpu(config.mesh.cpu_devices)
        layout, rollout_layout = make_layouts(config.mesh)
        if jax.process_index() > 0:  # the bars of downloads are process 0's, as ours are
            disable_progress_bars()
            os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        used = dict.fromkeys(config.model_of(stage.name) for stage in config.stages)
        for stage in config.stages:
            if isinstance(stage, RejectionSamplingStage) and isinstance(
                stage.rewrite, ModelRewrite
            ):
                used[config.model_of(stage.rewrite.weights)] = None
        sections = {MODEL: config.model, **config.models}
        models = {name: LanguageModel.resolve(sections[name], layout) for name in used}
        home = locate(config.output) / f"{config.name}-s{config.seed}"
        copy = WorkingCopy(str(home)) if on_bucket(home) else None
        directory = home if copy is None else copy.directory
        return Context(config, directory, layout, rollout_layout, models, copy)

    def model_of(self, name: str) -> LanguageModel:
        """The model that the weights of a stage (or of a model, by its name) are of."""
        model = self.models[self.config.model_of(name)]
        kinds = {stage.name: stage.kind for stage in self.config.stages}
        return model.with_scalar_head() if kinds.get(name) == "reward_model" else model

    def sampler_of(self, name: str) -> LanguageModel:
        """As `model_of`, arranged for sampling, its weights in the dtype that it computes in."""
        model = self.model_of(name)
        return replace(model, decoder=to_sample(model.decoder, self.rollout_layout))

    def initial_weights(self, stage: str) -> Any:
        """The weights that a stage starts from."""
        source, model = self.config.weights_of(stage), self.model_of(stage)
        if self.config.stage(stage).kind == "reward_model" and source not in self.models:
            return model.load(self.trained(source), new_head=self.seed("head", stage))
        return self.weights(source, model)

    def weights(self, source: str, model: LanguageModel) -> Any:
        """The weights of `model` that a train stage left, or its own."""
        if source in self.models:
            return model.initial(self.seed("weights", *([] if source == MODEL else [source])))
        return model.load(self.trained(source))

    def trained(self, stage: str) -> Path:
        """The Hugging Face directory that a train stage leaves."""
        return self.home(self.stage_directory(stage) / "model")

    def home(self, path: Path) -> Path:
        """Where a path in the run's directory lasts: itself, or its place on the bucket."""
        return path if self.copy is None else self.copy.place(path)

    def push(self) -> None:
        """Brings what was written so far to where it lasts."""
        if self.copy is not None:
            self.copy.push()

    def wait_for_files(self, where: str) -> None:
        """Returns when every process has come here, and sees the files that process 0 wrote."""
        if jax.process_index() == 0:
            self.push()
        wait_for_all(where)
        if self.copy is not None and jax.process_index() > 0:
            self.copy.pull()

    def stage_directory(self, name: str) -> Path:
        """`stages/NN-name`; the number stays what it was when the stage began."""
        stages = self.directory / "stages"
        for path in sorted(stages.glob("*-*")):
            if path.name.partition("-")[2] == name:
                return path
        index = [stage.name for stage in self.config.stages].index(name)
        return stages / f"{index:02d}-{name}"

    def profiled_steps(self, stage: str) -> ProfiledSteps | None:
        """What to trace of a train stage in this process: process 0 traces, for all are alike."""
        wanted = self.profile
        if wanted is None or wanted.stage not in (None, stage) or jax.process_index() > 0:
            return None
        return wanted

    def seed(self, *parts: object) -> int:
        """A seed for one purpose: a function of the run's seed and the names given."""
        return zlib.crc32("/".join(map(str, (self.config.seed, *parts))).encode())

    def examples(self, data: str) -> Sequence[Example]:
        """The examples of a dataset that is no mixture, read once for the check and all stages."""
        if data not in self._examples:
            self._examples[data] = load_examples(self._on_disk(self.config.data[data]))
        return self._examples[data]

    def _on_disk(self, section: DataSection) -> DataSection:
        """`stage:NAME` as the file that the stage wrote."""
        kind, _, name = str(section.source).partition(":")
        if kind != "stage":
            return section
        written = self.stage_directory(name) / "dataset.jsonl"
        return section.model_copy(update={"source": f"jsonl:{written}"})

    def prompts(
        self, data: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
    ) -> tuple[list[Prompt], str]:
        """The prompts of a dataset or mixture, and what to tell of them.

        Args:
          limit: only so many examples, the first ones; of a mixture, at its shares.
        """
        section = self.config.data[data]
        if not section.mixture:
            examples = self.examples(data)
            if limit is not None and limit > len(examples):
                raise ValueError(f"data.{data} has {len(examples)} examples, fewer than {limit}")
            prompts, report = encode_prompts(examples[:limit], section, tokenizer)
            return prompts, str(report)
        parts = {part: self.prompts(part, tokenizer) for part in section.mixture}
        rows = {part: len(prompts) for part, (prompts, _) in parts.items()}
        counts = mixture_counts(rows, section.mixture, limit)
        mixed = [
            replace(prompt, id=mixed_id(prompt.id, index, len(parts)))
            for index, (part, (prompts, _)) in enumerate(parts.items())
            for prompt in prompts[: counts[part]]
        ]
        told = "; ".join(f"{part}: {counts[part]} of {parts[part][1]}" for part in parts)
        return mixed, told

    def conversations(self, data: str, model: LanguageModel) -> tuple[list[Place], Encode]:
        """Where the conversations of a dataset or mixture are, and what reads and encodes some."""

        def encode(part: str, examples: Sequence[Example]) -> list[Document]:
            section = self.config.data[part]
            return encode_conversations(
                examples, section=section, tokenizer=model.tokenizer, stop_ids=model.eos_ids
            )

        return self._documents(data, encode)

    def texts(self, data: str, model: LanguageModel) -> tuple[list[Place], Encode]:
        """Where the texts of a dataset or mixture are, and what reads and encodes some."""
        return self._documents(data, lambda _, rows: encode_documents(rows, model.tokenizer))

    def _documents(
        self, data: str, encode_part: Callable[[str, Sequence[Example]], list[Document]]
    ) -> tuple[list[Place], Encode]:
        section = self.config.data[data]
        parts = {part: self.examples(part) for part in section.mixture or [data]}
        rows = {part: len(examples) for part, examples in parts.items()}
        counts = mixture_counts(rows, section.mixture) if section.mixture else rows

        def encode(places: Sequence[Place]) -> list[Document]:
            documents: dict[Place, Document] = {}
            for part in parts:
                own = [place for place in places if place[0] == part]
                encoded = encode_part(part, [parts[part][index] for _, index in own])
                documents |= dict(zip(own, encoded, strict=True))
            return [documents[place] for place in places]

        return [(part, index) for part in parts for index in range(counts[part])], encode

    # The record: run.json.

    def open_record(self) -> None:
        """Create the run's directory, or continue in it if its results are still the config's.

        Process 0 writes; the others wait and read the same files.
        """
        if jax.process_index() > 0:
            wait_for_all("open_record")
        if self.copy is not None:
            self.copy.pull()
        self.directory.mkdir(parents=True, exist_ok=True)
        plan = self.config.model_dump(mode="json", exclude={"output"})
        path = self.directory / "config.yaml"
        record = self.directory / "run.json"
        self.record = (
            json.loads(record.read_text())
            if record.exists()
            else {
                "name": self.config.name,
                "seed": self.config.seed,
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "stages": {},
            }
        )
        self._refuse_stale()
        if jax.process_index() == 0:
            write_text(path, yaml.safe_dump(plan, sort_keys=False, allow_unicode=True))
        self.record["versions"] = {
            name: version(name) for name in ("r1jax", "jax", "flax", "optax", "transformers")
        } | {"python": platform.python_version()}
        devices = jax.devices()
        self.record["hardware"] = {
            "backend": jax.default_backend(),
            "device": devices[0].device_kind,
            "devices": len(devices),
            "cpu_cores": os.cpu_count(),
            "processes": jax.process_count(),
        }
        if jax.process_index() == 0:
            self._write_record()
            self.push()
            wait_for_all("open_record")
        if self.copy is not None:  # process 0 must not write on while the others read
            wait_for_all("pulled")

    def _refuse_stale(self) -> None:
        """A stage that has begun must still be what the config says it is.

        Settings of stages to come may change, and stages may be added.

        Raises:
          ValueError: with each difference, old and new.
        """
        for name, entry in self.record["stages"].items():
            if name not in [stage.name for stage in self.config.stages]:
                continue
            began_with = entry.get("ingredients", {})
            changed = list(differences(began_with, ingredients(self.config, name)))
            if changed:
                raise ValueError(
                    f"{self.home(self.directory)}: the stage {name} is {entry['status']} with "
                    "other settings "
                    f"({'; '.join(changed[:5])}). Put them back, give the new run another name, or "
                    f"delete {self.home(self.stage_directory(name))} and its entry in run.json to "
                    "run it anew"
                )

    def mark(self, name: str, kind: str, status: str, seconds: Mapping[str, float]) -> None:
        """Note a stage's status and its seconds by phase in run.json."""
        self.record["stages"][name] = {
            **self.record["stages"].get(name, {}),
            "kind": kind,
            "status": status,
            "seconds": dict(seconds),
            "ingredients": ingredients(self.config, name),
        }
        if jax.process_index() == 0:
            self._write_record()
        self.push()

    def note_machine(self, name: str, figures: Mapping[str, float]) -> None:
        """Note in run.json what a stage took of the machine, in the process that ended it."""
        self.record["stages"][name]["machine"] = dict(figures)
        if jax.process_index() == 0:
            self._write_record()

    def _write_record(self) -> None:
        write_text(self.directory / "run.json", json.dumps(self.record, indent=2) + "\n")

    def status(self, name: str) -> str | None:
        return self.record["stages"].get(name, {}).get("status")

    def seconds(self, name: str) -> dict[str, float]:
        """Seconds by phase that a stage has taken so far."""
        return dict(self.record["stages"].get(name, {}).get("seconds", {}))

    @contextmanager
    def stopping_on_sigterm(self) -> Iterator[None]:
        """SIGTERM asks the train loop to save and leave at the next step boundary."""

        def request(*_: object) -> None:
            self.stop_requested = True

        before = signal.signal(signal.SIGTERM, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


class Clock:
    """Seconds by phase of a stage; each `lap` books the time since the last one."""

    def __init__(self, spent: Mapping[str, float] | None = None) -> None:
        self.seconds = dict(spent or {})
        self._last = time.perf_counter()

    def lap(self, phase: str) -> float:
        now = time.perf_counter()
        spent = now - self._last
        self._last = now
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        return spent
