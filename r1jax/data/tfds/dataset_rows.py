"""The TFDS builder of given rows, under a name given when it is made.

Unlike builders with a folder it is not registered: TFDS reads what it wrote from the files alone,
without this code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds

from r1jax.data.sources import Row


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """One split, `train`, of the columns of `r1jax.data.dataset_files.DatasetRow`, in order.

    `provenance` is JSON text.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def __init__(self, name: str, rows: Iterable[Row], data_dir: str) -> None:
        self.name = name
        self._rows = rows
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Completions of a model that were kept, each with where it came from.",
            features=tfds.features.FeaturesDict(
                {
                    "prompt": tfds.features.Text(),
                    "response": tfds.features.Text(),
                    "answer": tfds.features.Text(),
                    "domain": tfds.features.Text(),
                    "tokens": tfds.features.Scalar(dtype=np.int64),
                    # As bytes, or TFDS would round it to float32.
                    "reward": tfds.features.Tensor(shape=(), dtype=np.float64, encoding="bytes"),
                    "provenance": tfds.features.Text(),
                }
            ),
            # Shuffling would need the keys hashed into shards; the order is the index.
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, Row]]]:
        del dl_manager  # Nothing is downloaded.
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Row]]:
        yield from enumerate(self._rows)
