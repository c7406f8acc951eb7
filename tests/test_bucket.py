"""Runs on a bucket: the same as on a disk, wherever they are cut off."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import jax
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save
from safetensors.torch import save as save_torch
from typer.testing import CliRunner

from r1jax import recipe
from r1jax.bucket import WorkingCopy, check_access, locate, read_range
from r1jax.checkpoints import Checkpoints
from r1jax.cli import app
from r1jax.config.lineage import ingredients
from r1jax.config.load import load_config
from r1jax.data.sources import read_jsonl
from r1jax.data.tokenizers import load_tokenizer
from r1jax.evaluation.run_directory import language_models
from r1jax.metrics.heartbeat import HEARTBEAT
from r1jax.metrics.watchdog import Watchdog
from r1jax.models import ModelConfig, abstract_params
from r1jax.models.parameters import Params
from r1jax.sharding import Layout, make_layout, single_device
from r1jax.weights import hugging_face
from r1jax.weights.hugging_face import Tensors, export, load_params, resolve, tensor_files
from r1jax.weights.hugging_face.fp8 import read_values

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "cloud_stand_ins"))

from storage import Object, Storage  # noqa: E402

BUCKET = "a-bucket"
RUN = "gs://a-bucket/runs/tiny-s0"
CONFIG = ModelConfig(
    architecture="qwen2",
    vocab_size=24,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
COMMITTED = r"\d+/commit_success.txt"  # Orbax's sign of a finished checkpoint
# Times differ from run to run; a bucket has no lock.
VARY = ("lock", "timings.jsonl", "run.json", "results.json", "report.html")


@pytest.fixture(scope="module")
def serving() -> Iterator[Storage]:
    """One server for all tests, as the clients keep its address."""
    with Storage(BUCKET).serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def storage(serving: Storage) -> Storage:
    serving.objects[BUCKET].clear()
    serving.forbidden.clear()
    serving.last_write = None
    return serving


def lasting(files: dict[str, bytes]) -> dict[str, bytes]:
    """What must be the same wherever a run is, and however often it was cut off."""
    return {
        name: content
        for name, content in sorted(files.items())
        if Path(name).name not in VARY and "/checkpoints/" not in name
    }


def local(run: Path) -> dict[str, bytes]:
    found = (path for path in run.rglob("*") if path.is_file())
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in found}


def weights(seed: int, layout: Layout) -> Params:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding),
        abstract_params(CONFIG, layout, np.float32),
    )


# --- The working copy ---


def test_a_copy_made_later_has_the_same_files(storage: Storage) -> None:
    first = WorkingCopy(RUN)
    (first.directory / "stages" / "00-a" / "tensorboard").mkdir(parents=True)
    (first.directory / "run.json").write_text("{}")
    (first.directory / "stages/00-a/metrics.jsonl").write_text("1\n2\n")
    (first.directory / "stages/00-a/empty.jsonl").touch()
    (first.directory / "stages/00-a/tensorboard/events.1").write_text("old")
    first.push()
    assert storage.files(BUCKET, "runs/tiny-s0") == local(first.directory)

    # What is the same is not uploaded again; what was cut or removed is so there, too.
    before = storage.writes
    first.push()
    assert storage.writes == before
    (first.directory / "stages/00-a/tensorboard/events.1").unlink()
    (first.directory / "stages/00-a/tensorboard/events.2").write_text("new")
    os.truncate(first.directory / "stages/00-a/metrics.jsonl", 2)
    first.push()
    assert storage.writes == before + 3

    # Files of others may come and go in the meantime, here and there.
    (first.directory / "stages/00-a/dangling").symlink_to("nothing")
    (first.directory / "stages/00-a/empty.jsonl").unlink()
    del storage.objects[BUCKET]["runs/tiny-s0/stages/00-a/empty.jsonl"]
    first.push()
    (first.directory / "stages/00-a/dangling").unlink()
    (first.directory / "stages/00-a/empty.jsonl").touch()
    first.push()

    second = WorkingCopy(RUN)
    second.pull()
    assert local(second.directory) == local(first.directory)
    assert sorted(local(second.directory)) == [
        "run.json",
        "stages/00-a/empty.jsonl",
        "stages/00-a/metrics.jsonl",
        "stages/00-a/tensorboard/events.2",
    ]
    # A later pull gets what was written since, and only that.
    (first.directory / "run.json").write_text('{"a": 1}')
    first.push()
    (second.directory / "stages/00-a/metrics.jsonl").write_text("its own")
    second.pull()
    assert (second.directory / "run.json").read_text() == '{"a": 1}'
    assert (second.directory / "stages/00-a/metrics.jsonl").read_text() == "its own"
    assert second.remote(second.directory / "stages") == locate(f"{RUN}/stages")


def test_what_other_processes_write_is_seen(storage: Storage) -> None:
    copy = WorkingCopy(RUN)
    for number in range(3):
        copy.pull()
        assert len(local(copy.directory)) == number
        folder = locate(f"{RUN}/stages")
        assert len(list(folder.iterdir()) if folder.is_dir() else []) == number
        assert not (folder / f"{number}.json").is_file()
        storage.objects[BUCKET][f"runs/tiny-s0/stages/{number}.json"] = Object(b"1", number + 1)
        assert (folder / f"{number}.json").is_file()


def test_weights_and_neighbours_are_not_copied(storage: Storage) -> None:
    for name in (
        "tiny-s0/stages/00-a/metrics.jsonl",
        "tiny-s0/stages/00-a/model/config.json",
        "tiny-s0/stages/00-a/checkpoints/4/arrays/d/0",
        "tiny-s0/stages/01-b/tfds/rows",
        "tiny-s0/evaluations/tiny-eval-s0/run.json",
        "tiny-s01/run.json",
        "tiny-s0/stages/",
    ):
        storage.objects[BUCKET][f"runs/{name}"] = Object(b"1", 1)
    copy = WorkingCopy(RUN)
    copy.pull()
    assert list(local(copy.directory)) == ["stages/00-a/metrics.jsonl"]
    copy.push()
    assert len(storage.objects[BUCKET]) == 7  # what it has not is not deleted


def test_copies_of_killed_processes_are_removed(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    alive = WorkingCopy(RUN)
    script = (
        "import os, signal; from r1jax.bucket import WorkingCopy;"
        f"copy = WorkingCopy({RUN!r}); (copy.directory / 'large').touch(); print(copy.directory);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}; {script}"],
        capture_output=True,
        text=True,
    )
    left = Path(killed.stdout.strip())
    assert (left / "large").exists(), killed.stderr
    WorkingCopy(RUN)
    assert not left.exists() and not left.parent.exists()
    assert alive.directory.is_dir()


def test_the_record_is_the_last_to_be_replaced(storage: Storage) -> None:
    copy = WorkingCopy(RUN)
    names = ["run.json", *(f"stages/0{i}-{name}" for i in range(3) for name in ("a", "z"))]
    for name in names:
        (copy.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (copy.directory / name).write_text("old")
    copy.push()
    for name in names:
        (copy.directory / name).write_text("newer")
    for allowed in range(len(names)):
        storage.last_write = storage.writes + allowed
        with pytest.raises(OSError, match="dead"):
            copy.push()
        assert storage.files(BUCKET, "runs/tiny-s0")["run.json"] == b"old"
    storage.last_write = None
    copy.push()
    assert set(storage.files(BUCKET, "runs/tiny-s0").values()) == {b"newer"}


# --- Weights, tokenizers, data ---


def test_a_model_on_a_bucket_is_the_one_on_a_disk(storage: Storage, tmp_path: Path) -> None:
    layout = single_device()
    params = weights(0, layout)
    tokenizer = load_tokenizer("characters:running_total")
    for place in (tmp_path / "model", f"{RUN}/model"):
        export(place, params, CONFIG, tokenizer=tokenizer, max_shard_bytes=4000)
    assert storage.files(BUCKET, "runs/tiny-s0/model") == local(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2

    model = resolve(f"{RUN}/model")
    assert hugging_face.find_config(str(model)) == hugging_face.read_config(tmp_path / "model")
    for layout in (single_device(), make_layout({"data": 1, "fsdp": -1, "tensor": 1})):
        jax.tree.map(
            np.testing.assert_array_equal,
            load_params(model, CONFIG, layout),
            load_params(tmp_path / "model", CONFIG, layout),
        )
    assert load_tokenizer(str(model)).get_vocab() == tokenizer.get_vocab()


def test_boxes_of_tensors_are_read_as_from_a_file(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1jax.bucket._PART_BYTES", 10)  # a read is put together from many
    rng = np.random.default_rng(0)
    arrays = {
        "vector": rng.normal(size=7).astype(np.float16),
        "matrix": rng.normal(size=(6, 5)).astype(np.float32),
        "cube": rng.normal(size=(4, 3, 2)).astype(np.float32),
    }
    content = save(arrays)
    storage.objects[BUCKET]["m/model.safetensors"] = Object(content, 5)
    (tmp_path / "model.safetensors").write_bytes(content)
    here, there = Tensors(tmp_path), Tensors(locate("gs://a-bucket/m"))
    assert here.types == there.types
    for name, array in arrays.items():
        for _ in range(20):
            bounds = [sorted(rng.choice(size + 1, 2, replace=False)) for size in array.shape]
            box = tuple(slice(int(a), int(b)) for a, b in bounds)
            np.testing.assert_array_equal(there.read(name, box), array[box])
            np.testing.assert_array_equal(there.read(name, box), here.read(name, box))
    whole = read_range(locate("gs://a-bucket/m/model.safetensors"), 3, len(content))
    assert whole == content[3:]
    for cut in (4, 30, len(content) - 1):
        storage.objects[BUCKET]["m/model.safetensors"] = Object(content[:cut], 6)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            Tensors(locate("gs://a-bucket/m"))


def test_rows_of_which_devices_need_some_columns_are_read_once(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).normal(size=(140, 300)).astype(np.float32)
    codes, scales = hugging_face.quantise(values)
    weight = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
    content = save_torch({"w": weight, "w_scale_inv": torch.from_numpy(scales)})
    storage.objects[BUCKET]["m/model.safetensors"] = Object(content, 5)
    tensors = Tensors(locate("gs://a-bucket/m"))
    asked: list[int] = []

    def counted(path: Path, start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return read_range(path, start, stop)

    monkeypatch.setattr(tensor_files, "read_range", counted)
    whole = hugging_face.dequantise(codes, scales)
    for first in range(0, 300, 75):  # columns of four devices
        box = (slice(20, 140), slice(first, first + 75))
        np.testing.assert_array_equal(read_values(tensors, "w", box), whole[box])
    assert asked == [120 * 300, 2 * 3 * 4]  # the codes and the scales


def test_an_export_that_is_cut_off_leaves_no_model(storage: Storage) -> None:
    layout = single_device()
    tokenizer = load_tokenizer("characters:running_total")
    old, new = weights(0, layout), weights(1, layout)
    where = f"{RUN}/stages/00-a/model"
    before = storage.writes
    export(where, old, CONFIG, tokenizer=tokenizer, max_shard_bytes=4000)
    files = storage.files(BUCKET, "runs/tiny-s0/stages/00-a/model")
    assert storage.writes - before == len(files)
    assert language_models(RUN) == [locate(where)]
    deaths = 0
    while True:
        storage.last_write = storage.writes + deaths + 1
        try:
            export(where, new, CONFIG, tokenizer=tokenizer)
        except OSError as error:
            assert "dead" in str(error)
        else:
            break
        deaths += 1
        assert language_models(RUN) == []
        with pytest.raises(ValueError, match="has no config.json"):
            hugging_face.read_config(locate(where))
    assert deaths > 4
    # The new one has fewer files: the old shards are gone, or there would be two models in one.
    left = storage.files(BUCKET, "runs/tiny-s0/stages/00-a/model")
    assert sorted(set(files) - set(left)) == sorted(
        name for name in files if name.startswith("model-") or name.endswith("index.json")
    )
    jax.tree.map(np.testing.assert_array_equal, load_params(locate(where), CONFIG, layout), new)
    assert language_models(RUN) == [locate(where)]


def test_configs_and_data_may_lie_on_a_bucket(storage: Storage) -> None:
    text = (TESTS / "tiny.yaml").read_bytes()
    storage.objects[BUCKET]["configs/mine.yaml"] = Object(text, 1)
    storage.objects[BUCKET]["data/train.jsonl"] = Object(b'{"prompt": "1+1"}\n\n{"a": 2}\n', 2)
    assert load_config("gs://a-bucket/configs/mine.yaml", ["seed=3"]).seed == 3
    rows = read_jsonl("gs://a-bucket/data/train.jsonl", "train", {})
    assert list(rows.rows) == [{"prompt": "1+1"}, {"a": 2}]
    assert rows.label(1) == "gs://a-bucket/data/train.jsonl:3"
    with pytest.raises(FileNotFoundError, match="gs://a-bucket/data/other.jsonl"):
        read_jsonl("gs://a-bucket/data/other.jsonl", "train", {})


def test_a_dry_run_reads_the_record_on_the_bucket(storage: Storage) -> None:
    config = load_config(TESTS / "tiny.yaml", ["output=gs://a-bucket/runs"])
    copy = WorkingCopy(RUN)
    entry = {"kind": "pretrain", "status": "done", "seconds": {}}
    entry |= {"ingredients": ingredients(config, config.stages[0].name)}
    record = {"name": "tiny", "seed": 0, "stages": {config.stages[0].name: entry}}
    (copy.directory / "run.json").write_text(json.dumps(record))
    copy.push()
    before = storage.files(BUCKET, "runs/tiny-s0")
    left = [stage.name for stage in config.stages[1:]]
    assert [stage.name for stage in recipe.review(config)] == left
    rate = f"stages.{config.stages[0].name}.optimizer.learning_rate=0.5"
    command = ["run", str(TESTS / "tiny.yaml"), "output=gs://a-bucket/runs", rate, "--dry-run"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and refused.stdout == "", refused.output
    assert f"{RUN}: the stage {config.stages[0].name} is finished with other" in refused.stderr
    assert storage.files(BUCKET, "runs/tiny-s0") == before


def test_a_hang_is_told_on_the_bucket(storage: Storage) -> None:
    """At once, and not by a push: the thread that pushes is the one that hangs."""
    HEARTBEAT.begin_stage("")
    Watchdog(60.0, locate(f"{RUN}/hangs")).check(time.monotonic() + 600)
    ((name, content),) = storage.files(BUCKET, "runs/tiny-s0/hangs").items()
    assert name.startswith("process-0-") and b"no progress for 10 min" in content


# --- What is refused before any compute ---


@pytest.mark.parametrize(
    ("forbidden", "operation"),
    [
        ("BUCKET", r"look at the bucket \(storage.buckets.get\)"),
        ("POST", r"write \(storage.objects.create\)"),
        ("LIST", r"list \(storage.objects.list\)"),
        ("GET", r"read \(storage.objects.get\)"),
        ("DELETE", r"delete \(storage.objects.delete\)"),
    ],
)
def test_a_missing_permission_is_named(
    storage: Storage, forbidden: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_access("gs://a-bucket/runs")
    assert not storage.objects[BUCKET]  # no trace
    storage.forbidden.add(forbidden)
    monkeypatch.chdir(TESTS)
    monkeypatch.syspath_prepend(TESTS)
    config = load_config(str(TESTS / "tiny.yaml"), ["output=gs://a-bucket/runs"])
    with pytest.raises(ValueError, match=f"gs://a-bucket/runs: cannot {operation} gs://a-bucket"):
        recipe.run(config)


def test_a_bucket_that_is_not_there_is_named(storage: Storage) -> None:
    with pytest.raises(ValueError, match="look at the bucket .* gs://another .*does not exist"):
        check_access("gs://another/runs")


def test_a_model_is_missing_only_where_the_bucket_could_be_asked(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"model 'gs://.*/none': nothing on the bucket"):
        hugging_face.find_config(f"gs://{BUCKET}/none")

    def no_network(*_: object, **__: object) -> None:
        raise OSError("Cannot connect to host storage.googleapis.com")

    monkeypatch.setattr("gcsfs.GCSFileSystem._info", no_network)
    with pytest.raises(ValueError, match=r"cannot read gs://.*Cannot connect.*the network"):
        hugging_face.find_config(f"gs://{BUCKET}/none")


@pytest.mark.parametrize("path", ["gs://", "gs:///"])
def test_a_path_on_no_bucket_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path}: no bucket is named; .*gs://BUCKET"):
        locate(path)


@pytest.mark.parametrize("key", ["output", "model.path", "model.tokenizer"])
def test_other_schemes_are_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS)
    change = [f"{key}=s3://a/b"] + (["model.config=null"] if key == "model.path" else [])
    config = load_config(str(TESTS / "tiny.yaml"), change)
    with pytest.raises(ValueError, match=r"s3://a/b: s3:// is not known; .*gs://BUCKET"):
        recipe.run(config)


def test_without_gcsfs_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find(name)
    )
    done = CliRunner().invoke(app, ["report", "gs://a-bucket/runs/tiny-s0"])
    assert done.exit_code == 2
    assert "pip install 'r1jax[gcs]'" in done.output


def test_local_paths_import_nothing_for_buckets() -> None:
    script = "import sys; from r1jax.bucket import locate; locate('runs'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "r1jax" in loaded
    assert not loaded & {"gcsfs", "fsspec", "google", "etils", "jax"}


# --- Whole runs ---


def test_checkpoints_on_a_bucket_are_those_on_a_disk(storage: Storage) -> None:
    """Half-written ones are ignored and removed, and the newest is never at risk."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"w": jax.ShapeDtypeStruct((3,), np.float32, sharding=where)}

    def arrays(step: int) -> dict[str, jax.Array]:
        return {"w": jax.device_put(np.full(3, step, np.float32), where)}

    with Checkpoints(f"{RUN}/checkpoints", keep=2) as kept:
        for step in (1, 2):
            kept.save(step, arrays(step), {"at": step})
        before = storage.writes
        kept.save(3, arrays(3), {"at": 3})
        writes = storage.writes - before
        assert kept.steps() == [2, 3]
    newest = 3
    for allowed in range(1, writes, 3):
        storage.last_write = storage.writes + allowed
        try:
            with Checkpoints(f"{RUN}/checkpoints", keep=2) as kept:
                kept.save(newest + 1, arrays(newest + 1), {"at": newest + 1})
        except Exception as error:  # Orbax's, gcsfs's or TensorStore's
            assert "dead" in str(error)
        storage.last_write = None
        with Checkpoints(f"{RUN}/checkpoints", keep=2) as kept:
            found = kept.restore_latest(abstract)
            assert found is not None
            step, restored, metadata = found
            assert step in (newest, newest + 1) and metadata == {"at": step}
            np.testing.assert_array_equal(restored["w"], arrays(step)["w"])
            newest = step


@pytest.fixture
def pretrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | Path], None]:
    """The first stage of tiny.yaml, in this process."""
    monkeypatch.chdir(TESTS)
    monkeypatch.syspath_prepend(TESTS)

    def run(output: str | Path) -> None:
        config = load_config("tiny.yaml", [f"output={output}", "trackers=[tensorboard]"])
        assert recipe.run(config, recipe.Selection(only="base")) == 0

    return run


def without_events(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if "tensorboard" not in name}


@pytest.mark.slow
def test_between_any_two_writes_there_is_a_run_to_go_on_with(
    storage: Storage, tmp_path: Path, pretrain: Callable[[str | Path], None]
) -> None:
    pretrain(tmp_path)
    whole = without_events(lasting(local(tmp_path / "tiny-s0")))
    since = storage.writes
    pretrain("gs://a-bucket/runs")
    found = storage.files(BUCKET, "runs/tiny-s0")
    assert without_events(lasting(found)) == whole
    assert "stages/00-base/model/model.safetensors" in whole

    stage = "runs/tiny-s0/stages/00-base"
    newest, parts, seen = 0, 0, set()
    for state in storage.states(since):
        below = [name.removeprefix(f"{stage}/checkpoints/") for name in state if stage in name]
        done = [int(name.partition("/")[0]) for name in below if re.fullmatch(COMMITTED, name)]
        own = len([name for name in below if name.startswith(f"{max(done, default=0)}/")])
        # The newest checkpoint is as it was when it was committed, and counts on what is there.
        assert newest in (0, *done)
        if max(done, default=0) > newest:
            newest, parts = max(done), own
        assert own == parts
        if newest:
            metadata = json.loads(state[f"{stage}/checkpoints/{newest}/metadata/metadata"])
            for name, size in metadata["metrics"].items():
                assert len(state[f"{stage}/{name}"]) >= size
            kept = state[f"{stage}/metrics.jsonl"][: metadata["metrics"]["metrics.jsonl"]]
            assert [json.loads(line)["step"] for line in kept.splitlines()] == [
                *range(1, newest + 1)
            ]
        record = json.loads(state.get("runs/tiny-s0/run.json", b'{"stages": {}}'))
        status = record["stages"].get("base", {}).get("status")
        if status == "done":
            assert state[f"{stage}/model/config.json"] == whole["stages/00-base/model/config.json"]
        seen.add((newest, status))
    assert seen >= {(0, None), (0, "running"), (2, "running"), (6, "running"), (6, "done")}


@pytest.mark.slow
def test_cut_off_again_and_again_it_ends_the_same(
    storage: Storage, tmp_path: Path, pretrain: Callable[[str | Path], None]
) -> None:
    pretrain(tmp_path)
    whole = without_events(lasting(local(tmp_path / "tiny-s0")))
    for allowed in (1, 25, 40, 12):  # on one run, each time further on
        storage.last_write = storage.writes + allowed
        with pytest.raises(Exception, match="dead"):
            pretrain("gs://a-bucket/runs")
    storage.last_write = None
    pretrain("gs://a-bucket/runs")
    found = storage.files(BUCKET, "runs/tiny-s0")
    assert without_events(lasting(found)) == whole
    events = [name for name in found if "tensorboard" in name]
    assert len(events) == 1  # what a former process left is gone
    assert json.loads(found["run.json"])["stages"]["base"]["status"] == "done"

    # Other settings for what is done are refused, on the bucket as well.
    changed = ["output=gs://a-bucket/runs", "stages.base.row_tokens=32"]
    config = load_config("tiny.yaml", changed)
    with pytest.raises(
        ValueError, match=f"{RUN}: the stage base is finished with other settings.*--restart base"
    ):
        recipe.run(config)


def start(script: str, *arguments: object) -> forked.Process:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    words = map(str, arguments)
    return forked.Process(script, *words, env=environment, cwd=TESTS, one_output=True)


def ended(processes: list[forked.Process], status: int) -> str:
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [each.returncode for each in processes] == [status] * len(processes), "\n".join(said)
    return said[0]


@pytest.mark.slow
def test_a_run_killed_on_a_bucket_ends_as_one_on_a_disk(storage: Storage, tmp_path: Path) -> None:
    """All kinds of files: pretraining, an evaluation, GRPO with a reference policy."""

    def run(output: object, point: str, number: int) -> forked.Process:
        return start("killed_run.py", point, number, "tiny.yaml", f"output={output}")

    ended([run(tmp_path, "none", 0)], 0)
    ended([run("gs://a-bucket/runs", "samples", 2)], -signal.SIGKILL)
    # Behind a checkpoint of GRPO, in lines that no checkpoint has.
    ended([run("gs://a-bucket/runs", "log", 6)], -signal.SIGKILL)
    assert "stages/02-zero/model/config.json" not in storage.files(BUCKET, "runs/tiny-s0")
    said = ended([run("gs://a-bucket/runs", "none", 0)], 0)
    assert "zero: resumed at step 4" in said and f"Report: {RUN}/report.html" in said
    found = storage.files(BUCKET, "runs/tiny-s0")
    assert lasting(found) == lasting(local(tmp_path / "tiny-s0"))

    # The report can be made again, and the model evaluated, from there.
    del storage.objects[BUCKET]["runs/tiny-s0/report.html"]
    assert CliRunner().invoke(app, ["report", RUN]).output == f"report: {RUN}/report.html\n"
    again = storage.files(BUCKET, "runs/tiny-s0")
    assert lasting(again) == lasting(found) and "report.html" in again
    done = CliRunner().invoke(app, ["export", RUN, str(tmp_path / "exported")])
    assert done.exit_code == 0, done.output
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    last = tmp_path / "tiny-s0/stages/02-zero/model/model.safetensors"
    jax.tree.map(np.testing.assert_array_equal, exported, load_file(last))


@pytest.mark.slow
def test_two_processes_stopped_on_a_bucket_end_as_on_a_disk(
    storage: Storage, tmp_path: Path
) -> None:
    """Process 1 reads what process 0 wrote: samples, datasets, the record."""
    plan: dict[str, Any] = yaml.safe_load((TESTS / "tiny_processes.yaml").read_text())
    named = {stage["name"]: stage for stage in plan["stages"]}
    plan["stages"] = [named[name] for name in ("base", "by_rule", "distilled", "after")]
    plan["data"] = {
        name: plan["data"][name] for name in ("texts", "questions", "held_out", "by_rule")
    }
    plan["rewards"] = {"last_number": plan["rewards"]["last_number"]}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(plan))

    def run(output: object) -> list[forked.Process]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = (tmp_path / "two.yaml", f"output={output}", "mesh.cpu_devices=1")
        return [start("one_of_many.py", port, 2, index, *words) for index in (0, 1)]

    ended(run(tmp_path), 0)
    stopped = run("gs://a-bucket/runs")
    samples = "runs/tiny-processes-s0/stages/01-by_rule/samples.jsonl"
    while not (samples in storage.objects[BUCKET] and storage.objects[BUCKET][samples].content):
        assert all(process.poll() is None for process in stopped), stopped[0].communicate()[0]
        time.sleep(0.05)
    stopped[1].send_signal(signal.SIGTERM)
    ended(stopped, 143)
    ended(run("gs://a-bucket/runs"), 0)
    found = lasting(storage.files(BUCKET, "runs/tiny-processes-s0"))
    wanted = lasting(local(tmp_path / "tiny-processes-s0"))
    assert found.keys() == wanted.keys()
    # The TFDS form has the time in it.
    assert [n for n in found if "/tfds/" not in n and found[n] != wanted[n]] == []
    assert found["stages/01-by_rule/dataset.jsonl"]
