"""The models of a run: what they compute, and where the weights of each stage come from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.config.run_config import RunConfig
from r1jax.data.tokenizers import load_tokenizer, stop_token_ids
from r1jax.files import JsonObject
from r1jax.models import (
    Decoder,
    Execution,
    ModelConfig,
    choose_attention,
    init_params,
)
from r1jax.models.parameters import Params, abstract_weights, declare, declare_head
from r1jax.processes import min_over_processes
from r1jax.run.chips import CHIPS, KINDS
from r1jax.run.record import RunFiles
from r1jax.run.seeds import seed_of
from r1jax.sampler import to_sample
from r1jax.settings.mesh import MeshSection, RolloutMesh
from r1jax.settings.model import MODEL, ModelSection
from r1jax.settings.stage import RewardHead
from r1jax.sharding import (
    Layout,
    StandIn,
    in_same_slices,
    make_layout,
    make_rollout_layout,
    split_devices,
)
from r1jax.weights import hugging_face

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Layouts(NamedTuple):
    """The devices, arranged for training and for sampling: the same ones, or two groups."""

    training: Layout
    rollout: Layout

    @property
    def apart(self) -> bool:
        """Whether some devices train and the others sample."""
        return self.training.apart

    @property
    def devices(self) -> int:
        return self.training.mesh.size + (self.rollout.mesh.size if self.apart else 0)


def make_layouts(
    section: MeshSection,
    devices: Sequence[jax.Device] | None = None,
    stands_for: StandIn | None = None,
) -> Layouts:
    """The devices (default: all), arranged as a config's mesh says.

    Raises:
      ValueError: it does not fit them.
    """
    if section.rollout is not None and section.rollout.devices is not None:
        return _two_groups(section, section.rollout, devices, stands_for)
    training = make_layout(section.axes, section.rules, devices)
    training = replace(training, stands_for=stands_for)
    if section.rollout is None:
        return Layouts(training, make_rollout_layout(training, inherited=section.rules))
    rollout = make_rollout_layout(
        training, section.rollout.axes, section.rollout.rules, inherited=section.rules
    )
    return Layouts(training, rollout)


def _two_groups(
    section: MeshSection,
    sampling: RolloutMesh,
    devices: Sequence[jax.Device] | None,
    stands_for: StandIn | None,
) -> Layouts:
    assert sampling.devices is not None
    to_train, to_sample = split_devices(devices or jax.devices(), sampling.devices)
    try:
        training = make_layout(section.axes, section.rules, to_train, in_order=True)
        training = replace(training, stands_for=stands_for, apart=True)
        rollout = make_rollout_layout(
            training, sampling.axes, sampling.rules, inherited=section.rules, devices=to_sample
        )
    except ValueError as error:
        groups = f"{len(to_train)} devices train and {sampling.devices} sample"
        raise ValueError(f"{error}. By mesh.rollout.devices {groups}") from error
    return Layouts(*in_same_slices(training, rollout))


def build_decoder(section: ModelSection, layout: Layout) -> tuple[Decoder, JsonObject | None]:
    """The model of a config, and the generation config beside its weights."""
    generation = None
    if section.path is not None:
        directory = hugging_face.resolve(section.path)
        raw: JsonObject = hugging_face.read_config(directory)
        hugging_face.is_quantised(raw)  # refuses what cannot be loaded, before a run begins
        generation = hugging_face.read_generation_config(directory)
    else:
        assert section.config is not None
        raw = section.config
    try:
        config = ModelConfig.from_hugging_face(raw)
    except ValueError as error:
        file = "" if section.path is None else f"{directory / 'config.json'}: "
        raise ValueError(f"{file}{error}") from error
    if section.path is not None:
        different = hugging_face.differences_from_published(section.path, config)
        if different:  # the model is right; plans of it are not
            what = f"{section.path} differs from the shape that r1jax plans with"
            warnings.warn(f"{what}: {'; '.join(different)}", stacklevel=2)
    return decoder_of(section, config, layout), generation


def stated_positions(section: ModelSection) -> int | None:
    """The most tokens of prompt and completion, by the section or the model's config.json."""
    if section.max_position_embeddings is not None:
        return section.max_position_embeddings
    raw = section.config
    if section.path is not None:
        raw = hugging_face.read_config(hugging_face.resolve(section.path))
    return (raw or {}).get("max_position_embeddings")


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
    if section.max_position_embeddings is not None:
        config = replace(config, max_position_embeddings=section.max_position_embeddings)
    # Of the mesh, not of this process: a run may be compiled for devices that are not attached.
    backend = layout.platform
    scan, chunk = section.scan_layers, section.log_prob_chunk
    execution = Execution(
        param_dtype=jnp.dtype(section.param_dtype),
        compute_dtype=jnp.dtype(section.compute_dtype),
        attention=choose_attention(section.attention, backend),
        remat=section.remat,
        device_memory=_memory_of(layout) if section.remat == "auto" else None,
        # Loops over stacked weights are slow on the CPU, whose models are small.
        scan_layers=(backend != "cpu") if scan == "auto" else scan,
        log_prob_chunk=256 if chunk == "auto" else chunk,
        log_prob_tokens=2048 if chunk == "auto" and backend == "gpu" else 1,
        sampler_attention=section.sampler_attention,
        expert_chunk=section.expert_chunk,
    )
    return Decoder(config, execution, layout)


def _memory_of(layout: Layout) -> int | None:
    """Bytes that a program may have of a device, the least of all processes', which decide alike;
    of devices that are not there by their kind. None where it is not known, as of a CPU."""
    if layout.stands_for is not None:
        return layout.stands_for.memory
    devices = list(layout.mesh.devices.flat)
    here = [each for each in devices if each in jax.local_devices()]
    if not here:
        chip = CHIPS.get(KINDS.get(devices[0].device_kind, ""))
        return None if chip is None else int(chip.hbm / chip.devices)
    stats = here[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return int(min_over_processes(stats["bytes_limit"], layout))


@jax.jit
def _finite(weights: list[jax.Array]) -> jax.Array:
    """Whether each array is finite, in all processes."""
    return jnp.stack([jnp.isfinite(weight).all() for weight in weights])


@dataclass(frozen=True)
class LanguageModel:
    """A model of the config, resolved: what it computes, and how text becomes its tokens."""

    section: ModelSection
    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    generation_config: JsonObject | None

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
        ids = list(tokenizer.get_vocab().values())
        if len(set(ids)) < len(ids) or max(ids, default=0) >= decoder.config.vocab_size:
            raise ValueError(
                f"the tokenizer of {named} gives two tokens one id, or one an id beyond "
                f"vocab_size = {decoder.config.vocab_size}; copy or download it again"
            )
        eos_ids = stop_token_ids(tokenizer, generation)
        return LanguageModel(section, decoder, tokenizer, eos_ids, generation)

    def load(self, directory: Path, *, new_head: int | None = None) -> Params:
        """The weights of a Hugging Face directory, on the mesh; with `new_head`, a seed, all but
        the head, which is drawn."""
        decoder = self.decoder
        params = hugging_face.load_params(
            directory,
            decoder.config,
            decoder.layout,
            decoder.execution.param_dtype,
            new_head=None if new_head is None else jax.random.key(new_head),
        )
        leaves = jax.tree.leaves_with_path(params)
        finite = np.asarray(_finite([leaf for _, leaf in leaves]))
        wrong = [
            jax.tree_util.keystr(path)
            for (path, _), ok in zip(leaves, finite, strict=True)
            if not ok
        ]
        if wrong:
            raise ValueError(
                f"{directory}: weights that are not finite in {', '.join(wrong[:3])}; the file is "
                "damaged, or the training that wrote it diverged"
            )
        return params

    def initial(self, seed: int) -> Params:
        """The weights that the config names: those of its path, or random ones."""
        if self.section.path is not None:
            path = hugging_face.resolve(self.section.path)
            new_head = None if self.decoder.config.head == "language" else seed
            return self.load(path, new_head=new_head)
        decoder = self.decoder
        return init_params(
            jax.random.key(seed), decoder.config, decoder.layout, decoder.execution.param_dtype
        )

    def with_head(self, head: RewardHead) -> LanguageModel:
        """The same model with a reward model's output in place of the next token."""
        config = replace(self.decoder.config, head=head, num_nextn_predict_layers=0)
        tokenizer = self.tokenizer
        if head == "scalar":  # read at the last token that is not padding
            tokenizer = hugging_face.with_padding(tokenizer, self.eos_ids)
        generation = self.generation_config
        if tokenizer is not self.tokenizer:  # its padding is another than that of samples
            generation = {k: v for k, v in (generation or {}).items() if k != "pad_token_id"}
        return replace(
            self,
            decoder=replace(self.decoder, config=config),
            tokenizer=tokenizer,
            generation_config=generation,
        )

    def export(self, directory: Path, params: Params) -> None:
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


def _with_zero_head(params: Params, critic: Decoder) -> Params:
    """The decoder of `params` under a critic's head that says 0."""
    head = {
        name: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in abstract_weights(critic).items()
        if name in declare_head(critic.config)
    }
    trunk = {name: params[name] for name in declare(critic.config) if name not in head}
    return {**trunk, **head}


@dataclass(frozen=True)
class Models:
    """The models that a run's stages use, by their name in the config.

    `files` has the weights that earlier stages left.
    """

    config: RunConfig
    layouts: Layouts
    files: RunFiles
    by_name: Mapping[str, LanguageModel]

    @staticmethod
    def resolve(config: RunConfig, layouts: Layouts, files: RunFiles) -> Models:
        """Looks only at models that a stage uses; ValueError for what does not fit together."""
        sources = [stage.name for stage in config.stages]
        sources += [use.source for stage in config.stages for use in stage.other_weights()]
        used = dict.fromkeys(map(config.model_of, sources))
        by_name = {}
        for name in used:
            section = config.section_of(name)
            try:
                by_name[name] = LanguageModel.resolve(section, layouts.training)
            except ValueError as error:
                where = (MODEL,) if name == MODEL else ("models", name)
                key = "config" if section.path is None else "path"
                raise config.refusal((*where, key), str(error)) from error
        return Models(config, layouts, files, by_name)

    def of(self, name: str) -> LanguageModel:
        """The model that the weights of a stage (or of a model, by its name) are of."""
        model = self.by_name[self.config.model_of(name)]
        heads = {stage.name: stage.DESCRIPTION.head for stage in self.config.stages}
        return model if (head := heads.get(name)) is None else model.with_head(head)

    def sampler_of(self, name: str) -> LanguageModel:
        """As `of`, arranged for sampling, its weights in the dtype that it computes in."""
        model = self.of(name)
        return replace(model, decoder=to_sample(model.decoder, self.layouts.rollout))

    def initial_weights(self, stage: str) -> Params:
        """The weights that a stage starts from."""
        source, model = self.config.weights_of(stage), self.of(stage)
        if model.decoder.config.head != "language" and source not in self.by_name:
            seed = seed_of(self.config.seed, "head", stage)
            return model.load(self.files.trained(source), new_head=seed)
        return self.weights(source, model)

    def critic_of(self, source: str) -> LanguageModel:
        """The value model that starts from the weights `source`: a train stage's, or a model's."""
        return self.of(source).with_head("scalar")

    def trained_critic(self, source: str) -> Params:
        """The critic that a stage left, or that a name in `models` has.

        Raises:
          ValueError: there is none.
        """
        model = self.critic_of(source)
        if source in self.by_name:
            language = self.by_name[source]
            if language.decoder.config.head != "scalar":
                raise ValueError(f"the weights of {source!r} are a decoder's, and no critic's")
            return model.load(hugging_face.resolve(str(language.section.path)))
        critic = self.files.trained_critic(source)
        if not (critic / "config.json").is_file():
            raise ValueError(f"{critic}: there is no critic of the stage {source!r}")
        return model.load(critic)

    def critic_weights(self, source: str, seed: int) -> Params:
        """The first weights of `critic_of(source)`: those of a critic that the stage left, or of a
        reward model, as they are; else a decoder's with a new head, which is 0."""
        model = self.critic_of(source)
        if source in self.by_name:
            language = self.by_name[source]
            if language.decoder.config.head == "scalar":
                return self.trained_critic(source)
            if language.section.path is None:
                return _with_zero_head(self.weights(source, language), model.decoder)
            params = model.initial(seed)
        else:
            critic, trained = self.files.trained_critic(source), self.files.trained(source)
            if (critic / "config.json").is_file():
                return model.load(critic)
            if self.of(source).decoder.config.head == "scalar":
                return model.load(trained)
            params = model.load(trained, new_head=seed)
        return _with_zero_head(params, model.decoder)

    def weights(self, source: str, model: LanguageModel) -> Params:
        """The weights of `model` that the train stage `source` left, or that the config names."""
        if source not in self.by_name:
            return model.load(self.files.trained(source))
        names = [] if source == MODEL else [source]
        return model.initial(seed_of(self.config.seed, "weights", *names))
