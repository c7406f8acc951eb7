"""The TFDS builder is built and read on a machine without TensorFlow."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from r1jax.data.examples import load_examples
from r1jax.data.tasks.running_total import RunningTotal
from r1jax.data.tfds.r1jax_tasks import Builder
from r1jax.settings.data import DataSection


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tfds")
    builder = tfds.builder("r1jax_tasks/running_total", data_dir=directory)
    assert isinstance(builder, Builder)
    few = tfds.download.DownloadConfig(max_examples_per_split=40)
    builder.download_and_prepare(download_config=few)
    return directory


def load(data_dir: Path, name: str = "r1jax_tasks/running_total", **settings):
    return load_examples(
        DataSection.model_validate(
            {"source": f"tfds:{name}", "options": {"data_dir": str(data_dir)}, **settings}
        )
    )


def test_the_source_reads_what_the_task_makes(data_dir: Path) -> None:
    task = RunningTotal()
    assert list(load(data_dir)) == [task.example(i, "train") for i in range(40)]
    assert list(load(data_dir, split="held_out", name="r1jax_tasks")) == [
        task.example(i, "held_out") for i in range(40)
    ]
    assert "tensorflow" not in sys.modules


def test_text_features_come_back_as_bytes_from_tfds_itself(data_dir: Path) -> None:
    """Why the source decodes; should this change, the decoding may go."""
    source = tfds.builder("r1jax_tasks", data_dir=data_dir).as_data_source("train")
    assert isinstance(source[0]["prompt"], bytes)


def test_own_splits_by_hash_of_a_tfds_split(data_dir: Path) -> None:
    train = load(data_dir, split="train", held_out_fraction=0.3)
    held_out = load(data_dir, split="held_out", held_out_fraction=0.3)
    assert len(train) + len(held_out) == 40 and len(held_out) > 0
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    # The task held these out by the same hash, so all of them are held out here as well.
    options = {"data_dir": str(data_dir), "from_split": "held_out"}
    again = load(data_dir, split="held_out", held_out_fraction=0.3, options=options)
    assert list(again) == [RunningTotal().example(i, "held_out") for i in range(40)]


def test_a_dataset_without_code_and_in_another_format(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "1.0.0"
    shutil.copytree(data_dir / "r1jax_tasks" / "running_total" / "1.0.0", folder)
    for file in folder.glob("r1jax_tasks-*"):
        file.rename(folder / file.name.replace("r1jax_tasks", "mine"))
    info = folder / "dataset_info.json"
    facts = json.loads(info.read_text()) | {"name": "mine", "configName": ""}
    info.write_text(json.dumps(facts))
    assert load(tmp_path, name="mine")[3] == RunningTotal().example(3, "train")
    info.write_text(json.dumps(facts | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="cannot be read by index; set options.data_dir"):
        load(tmp_path, name="mine")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("no_such_dataset", {}, "source: Dataset no_such_dataset not found"),
        ("r1jax_tasks/sums", {}, "BuilderConfig sums not found"),
        ("r1jax_tasks:9.9.9", {}, "cannot be loaded at version 9.9.9"),
        ("r1jax_tasks", {"split": "test"}, "split: the dataset has held_out, train"),
        ("r1jax_tasks", {"options": {"datadir": "x"}}, "did you mean 'data_dir'"),
    ],
)
def test_mistakes(data_dir: Path, name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(data_dir, name=name, **settings)


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "importlib_resources", None)
    with pytest.raises(ValueError, match="pip install tensorflow-datasets array_record"):
        load(Path("unused"))
