"""What all stages of a run share, resolved from the config before any compute."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from transformers import PreTrainedTokenizerBase

from r1jax.config.schema import ModelSection, RunConfig
from r1jax.data import Example, load_examples, load_tokenizer, stop_token_ids
from r1jax.models import Decoder, Execution, ModelConfig, choose_attention
from r1jax.processes import wait_for_all
from r1jax.sharding import Layout, make_layout, split_cpu
from r1jax.weights import hugging_face


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what would help."""


class Preempted(Exception):
    """SIGTERM arrived; the state is saved."""


def build_decoder(section: ModelSection, layout: Layout) -> tuple[Decoder, dict[str, Any] | None]:
    """The model of a config, and the generation config beside its weights."""
    generation = None
    if section.path is not None:
        directory = hugging_face.resolve(section.path)
        raw: Mapping[str, Any] = hugging_face.read_config(directory)
        generation = hugging_face.read_generation_config(directory)
    else:
        assert section.config is not None
        raw = section.config
    config = ModelConfig.from_hugging_face(raw)
    backend = jax.default_backend()
    scan = section.scan_layers
    execution = Execution(
        param_dtype=jnp.dtype(section.param_dtype),
        compute_dtype=jnp.dtype(section.compute_dtype),
        attention=choose_attention(section.attention, backend),
        remat=section.remat,
        # Loops over stacked weights are slow on the CPU, whose models are small.
        scan_layers=(backend != "cpu") if scan == "auto" else scan,
        log_prob_chunk=section.log_prob_chunk,
    )
    return Decoder(config, execution, layout), generation


@dataclass
class Context:
    """A run, resolved: where it lives, its model, tokenizer and the record of its stages."""

    config: RunConfig
    directory: Path
    model: Decoder
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    generation_config: dict[str, Any] | None
    record: dict[str, Any] = field(default_factory=dict)
    stop_requested: bool = False
    _examples: dict[str, Sequence[Example]] = field(default_factory=dict)

    @staticmethod
    def resolve(config: RunConfig) -> Context:
        """Everything that can be refused is refused here: model, mesh, tokenizer, vocabulary."""
        split_cpu(config.mesh.cpu_devices)
        layout = make_layout(config.mesh.axes, config.mesh.rules)
        model, generation = build_decoder(config.model, layout)
        named = config.model.tokenizer
        if named is None:  # the directory, not the hub name: its tokenizer.json is read as it is
            named = str(hugging_face.resolve(str(config.model.path)))
        tokenizer = load_tokenizer(named)
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"model vocab_size = {model.config.vocab_size} is smaller than the tokenizer's "
                f"{len(tokenizer)} tokens; use the tokenizer that belongs to the model"
            )
        eos_ids = stop_token_ids(tokenizer, generation)
        directory = Path(config.output) / f"{config.name}-s{config.seed}"
        return Context(config, directory, model, tokenizer, eos_ids, generation)

    def stage_directory(self, index: int) -> Path:
        return self.directory / "stages" / f"{index:02d}-{self.config.stages[index].name}"

    def seed(self, *parts: object) -> int:
        """A seed for one purpose: a function of the run's seed and the names given."""
        return zlib.crc32("/".join(map(str, (self.config.seed, *parts))).encode())

    def export(self, directory: Path, params: Any) -> None:
        """Write weights, configs and tokenizer as a Hugging Face directory (atomically)."""
        generation = dict(self.generation_config or {})
        generation["eos_token_id"] = list(self.eos_ids)
        hugging_face.export(
            directory,
            params,
            self.model.config,
            tokenizer=self.tokenizer,
            generation_config=generation,
        )

    def examples(self, data: str) -> Sequence[Example]:
        """The examples of a dataset of the config, read once for the check and all stages."""
        if data not in self._examples:
            self._examples[data] = load_examples(self.config.data[data])
        return self._examples[data]

    # The record: run.json.

    def open_record(self) -> None:
        """Create the run's directory, or continue in it if its config is the same.

        Process 0 writes; the others wait and read the same files.
        """
        if jax.process_index() > 0:
            wait_for_all("open_record")
        self.directory.mkdir(parents=True, exist_ok=True)
        plan = self.config.model_dump(mode="json", exclude={"output"})
        path = self.directory / "config.yaml"
        if path.exists():
            before = yaml.safe_load(path.read_text())
            changed = sorted(_differences(before, plan))
            if changed:
                shown = "; ".join(changed[:5])
                raise ValueError(
                    f"{self.directory} holds a run with another config ({shown}). Go on with the "
                    "config it began with, give the new run another name, or delete the directory"
                )
        elif jax.process_index() == 0:
            _write(path, yaml.safe_dump(plan, sort_keys=False, allow_unicode=True))
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
            wait_for_all("open_record")

    def mark(self, name: str, kind: str, status: str, seconds: Mapping[str, float]) -> None:
        """Note a stage's status and its seconds by phase in run.json."""
        self.record["stages"][name] = {"kind": kind, "status": status, "seconds": dict(seconds)}
        if jax.process_index() == 0:
            self._write_record()

    def _write_record(self) -> None:
        _write(self.directory / "run.json", json.dumps(self.record, indent=2) + "\n")

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


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            here = f"{path}.{key}" if path else str(key)
            yield from _differences(before.get(key), after.get(key), here)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from _differences(*pair, f"{path}.{index}")
    elif before != after:
        yield f"{path}: {before!r} -> {after!r}"


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
