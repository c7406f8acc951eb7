"""The TFDS builder of the procedural tasks.

It is built and read without TensorFlow: ArrayRecord files, read through `as_data_source`. TFDS
names a dataset after the folder of its builder, which is why this one has a folder of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import tensorflow_datasets as tfds

from r1jax.data.example import Split
from r1jax.data.tasks import TASKS

_COLUMNS = ("prompt", "answer", "text", "domain")


@dataclasses.dataclass(eq=False)
class _TaskConfig(tfds.core.BuilderConfig):
    """A task with its default options.

    Attributes:
        train, held_out: Examples in each split. No problem is in both.
    """

    train: int = 20_000
    held_out: int = 2_000


class Builder(tfds.core.GeneratorBasedBuilder):
    """`r1jax_tasks/NAME`: prompt, answer, text and domain of the examples of a task."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    BUILDER_CONFIGS = [
        _TaskConfig(name=name, description=str(task.__doc__).splitlines()[0])
        for name, task in TASKS.items()
    ]

    def __init__(self, *args: object, **kwargs: object) -> None:
        # The format that can be read by index, unless the caller chooses another.
        super().__init__(*args, **{"file_format": "array_record", **kwargs})

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in _COLUMNS}),
            supervised_keys=None,
            # Shuffling would need the keys hashed into shards; the order is the index.
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        del dl_manager  # Nothing is downloaded.
        return {
            "train": self._generate_examples("train", self.builder_config.train),
            "held_out": self._generate_examples("held_out", self.builder_config.held_out),
        }

    def _generate_examples(self, split: Split, count: int) -> Iterator[tuple[int, dict[str, str]]]:
        task = TASKS[self.builder_config.name]()
        for index in range(count):
            example = task.example(index, split)
            yield index, {name: getattr(example, name) or "" for name in _COLUMNS}
