"""Checkpoints: atomic under SIGKILL, restorable onto other devices, strict about what they hold."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import forked
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.checkpoints import Checkpoints, DamagedError, MisfitError, kept_steps, restore_part
from r1jax.checksums import checksums


def run_state(value: float) -> Any:
    """What a trainer saves: weights, optimizer state with named tuples and None, key data."""
    params = {
        "embed": jnp.full((4, 6), value, jnp.float32),
        "layers": [{"scale": jnp.full((6,), value, jnp.bfloat16)}, None],
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "params": params,
        "optimizer": optimizer.init(params),
        "key": jax.random.key_data(jax.random.key(int(value))),
        "step": jnp.int32(value),
    }


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def run_python(script: str, *arguments: Any, timeout: float = 120) -> str:
    done = forked.run("-c", textwrap.dedent(script), *map(str, arguments), timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_restores_what_was_saved(tmp_path: Path) -> None:
    metadata = {"data": {"epoch": 1, "position": 7}, "big": 2**63, "third": 1 / 3, "none": None}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore_latest(abstract(run_state(0))) is None
        checkpoints.save(5, run_state(5), metadata)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore_latest(abstract(run_state(0)))
    assert restored is not None
    step, arrays, restored_metadata = restored
    assert step == 5
    assert restored_metadata == metadata
    assert_same(arrays, run_state(5))


def test_arrays_may_be_donated_after_save(tmp_path: Path) -> None:
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x = jnp.arange(1 << 16, dtype=jnp.float32)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"x": x}, {})
        shape = abstract({"x": x})
        for _ in range(4):
            x = overwrite(x)
        checkpoints.wait()
        restored = checkpoints.restore_latest(shape)
    assert restored is not None
    np.testing.assert_array_equal(restored[1]["x"], np.arange(1 << 16, dtype=np.float32))


def test_keep_prunes_the_oldest(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 3, 10):
            checkpoints.save(step, {"x": jnp.float32(step)}, {"step": step})
        assert checkpoints.steps() == [3, 10]
    # Opened with a smaller keep, nothing goes before a newer one is finished.
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [3, 10]
        checkpoints.save(11, {"x": jnp.float32(11)}, {"step": 11})
        assert checkpoints.steps() == [11] and checkpoints.latest_step == 11
    assert not (tmp_path / "3").exists() and not (tmp_path / "10").exists()
    with pytest.raises(ValueError, match="keep = 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_step_is_saved_once_and_in_order(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(4, {"x": jnp.float32(1)}, {})
        for step in (3, 4):
            with pytest.raises(ValueError, match=f"step = {step} is not newer than .* 4"):
                checkpoints.save(step, {"x": jnp.float32(2)}, {})


def test_misfit_names_every_leaf(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, run_state(1), {})
        wanted = abstract(run_state(1))
        wanted["params"]["embed"] = jax.ShapeDtypeStruct(
            (4, 7), jnp.bfloat16, sharding=wanted["key"].sharding
        )
        wanted["extra"] = wanted.pop("step")
        wanted["key"] = jax.ShapeDtypeStruct(wanted["key"].shape, wanted["key"].dtype)
        with pytest.raises(ValueError) as caught:
            checkpoints.restore_latest(wanted)
    message = str(caught.value)
    assert str(tmp_path / "1") in message
    assert "params/embed: saved (4, 6), requested (4, 7)" in message
    assert "params/embed: saved float32, requested bfloat16" in message
    assert "extra: not in the checkpoint" in message
    assert "step: only in the checkpoint" in message
    assert "key: requested without a sharding" in message


@pytest.mark.parametrize(
    "arrays, metadata, message",
    [
        ({"a": {"b": 3}}, {}, "a/b is a int"),
        ({"k": jax.random.key(0)}, {}, "k is a typed key"),
        ({}, {"x": np.float32(1)}, "metadata is not JSON"),
        ({}, {"x": {1: 2}}, r"metadata\['x'\] has a key that is not a string"),
    ],
)
def test_refuses_what_would_not_come_back(
    tmp_path: Path, arrays: Any, metadata: Any, message: str
) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(TypeError, match=message):
            checkpoints.save(1, arrays | {"x": jnp.ones(1)}, metadata)
        assert checkpoints.steps() == []


def test_half_written_directories_are_ignored_and_removed(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, run_state(1), {"step": 1})
        checkpoints.save(2, run_state(2), {"step": 2})
    # As a process killed before the rename leaves it: nearly complete, or empty.
    nearly = tmp_path / "7.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "2", nearly)
    (tmp_path / "8.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        restored = checkpoints.restore_latest(abstract(run_state(0)))
        assert restored is not None and restored[0] == 2 and restored[2] == {"step": 2}
        assert_same(restored[1], run_state(2))
        checkpoints.save(7, run_state(7), {"step": 7})
        assert checkpoints.steps() == [1, 2, 7]
    assert not list(tmp_path.glob("*orbax-checkpoint-tmp*"))


# A child saves 1 and 2 in peace and is killed by its own hand at the n-th file operation of saving
# 3, or by a timer, which also hits the C++ writers. One interpreter forks all children before it
# initialises its own backend, because importing is the slow part.
KILLED = """
import json, os, signal, sys, threading, time
import jax, jax.numpy as jnp
from r1jax.checkpoints import Checkpoints

root = sys.argv[1]
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree"}

def state(step):
    return {"w": jnp.full((64, 64), step, jnp.float32), "n": {"c": jnp.int32(step)}}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def child(directory, operation, seconds):
    checkpoints = Checkpoints(directory, keep=1)
    for step in (1, 2):
        checkpoints.save(step, state(step), {"step": step})
    seen = []
    def hook(event, arguments):
        if event in OPERATIONS and str(arguments[0]).startswith(directory):
            seen.append(event)
            if len(seen) == operation:
                die()
    if operation is not None:
        sys.addaudithook(hook)
    else:
        def timer():
            time.sleep(seconds)
            die()
        threading.Thread(target=timer, daemon=True).start()
    checkpoints.save(3, state(3), {"step": 3})
    with open(os.path.join(root, "operations"), "w") as file:
        file.write(str(len(seen)))

def run(name, operation=None, seconds=0.0):
    directory = os.path.join(root, name)
    pid = os.fork()
    if pid == 0:
        try:
            child(directory, operation, seconds)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

assert not run("uninterrupted", operation=10**9)
total = int(open(os.path.join(root, "operations")).read())
kills = {"uninterrupted": False}
points = sorted({1 + (total - 1) * i // 11 for i in range(12)})
for n in points:
    kills[f"operation-{n}"] = run(f"operation-{n}", operation=n)
for milliseconds in (1, 10, 25, 50, 80, 120):
    kills[f"after-{milliseconds}ms"] = run(f"after-{milliseconds}ms", seconds=milliseconds / 1e3)

results = {}
for name, killed in kills.items():
    directory = os.path.join(root, name)
    left = sorted(os.listdir(directory))
    with Checkpoints(directory, keep=1) as checkpoints:
        want = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
        )
        step, arrays, metadata = checkpoints.restore_latest(want)
        whole = all(bool((leaf == step).all()) for leaf in jax.tree.leaves(arrays))
        checkpoints.save(4, state(4), {"step": 4})
        after = checkpoints.steps()
    results[name] = dict(
        killed=killed, step=step, metadata=metadata, whole=whole, after=after, left=left,
        names=sorted(os.listdir(directory)),
    )
print(json.dumps(results))
"""


def test_killed_while_saving_the_former_checkpoint_stays(tmp_path: Path) -> None:
    results = json.loads(run_python(KILLED, tmp_path))
    for name, result in results.items():
        assert result["killed"] or not name.startswith("operation"), name
        assert result["step"] in (2, 3), (name, result)
        assert result["metadata"] == {"step": result["step"]}, (name, result)
        assert result["whole"], (name, result)
        # Life goes on: the next save works and leaves nothing of the dead process behind.
        assert result["after"] == [4] and result["names"] == ["4"], (name, result)
    # The kills must have hit both sides of the commit, or the test shows nothing.
    steps = [result["step"] for name, result in results.items() if name.startswith("operation")]
    assert set(steps) == {2, 3} and len(steps) >= 8
    assert results["uninterrupted"]["step"] == 3


RESHARDED = """
import os, sys
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
from r1jax.checkpoints import Checkpoints
from r1jax.checksums import checksums

assert len(jax.devices()) == 8
values = {"w": np.arange(64.0, dtype=np.float32).reshape(8, 8), "b": np.arange(8, dtype=np.int32)}
one = {name: SingleDeviceSharding(jax.devices()[0]) for name in values}
mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tensor"))
four = {
    "w": NamedSharding(mesh, P("fsdp", "tensor")),
    "b": NamedSharding(mesh, P(("fsdp", "tensor"))),
}
eight = Mesh(np.array(jax.devices()), ("fsdp",))
more = {"w": NamedSharding(eight, P(None, "fsdp")), "b": NamedSharding(eight, P())}

for number, (saved, wanted) in enumerate([(one, four), (four, one), (four, more), (more, four)]):
    with Checkpoints(os.path.join(sys.argv[1], str(number)), keep=1) as checkpoints:
        checkpoints.save(1, jax.tree.map(jax.device_put, values, saved), {})
        want = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), values, wanted
        )
        _, arrays, _ = checkpoints.restore_latest(want)
    for name, array in arrays.items():
        assert array.sharding == wanted[name], (number, name, array.sharding)
        alone = jax.device_put(values[name], jax.devices()[0])
        assert checksums([array]) == checksums([alone]), (number, name)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), values[name][shard.index])
print("done")
"""


def test_restores_onto_other_devices(tmp_path: Path) -> None:
    assert run_python(RESHARDED, tmp_path).strip() == "done"


def saved_twice(directory: Path) -> Any:
    """Checkpoints 1 and 2, of values 1 and 2; gives what to restore."""
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, run_state(step) | {"w": values(step)}, {"cursor": step})
    return abstract(run_state(0) | {"w": values(0)})


def values(seed: int) -> Any:
    return jax.random.normal(jax.random.key(seed), (64, 96))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "bit":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif how == "directory":
        path.unlink()
        path.mkdir()
    else:
        path.unlink()


FILES = ["arrays/_METADATA", "arrays/manifest.ocdbt", "metadata/metadata", "checksums/metadata"]


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("data", "bit"),  # which Orbax does not see
        ("data", "cut"),
        ("data", "gone"),
        *[(name, how) for name in FILES for how in ("cut", "directory")],
        ("metadata/metadata", "bit"),
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_in_a_line(
    tmp_path: Path, file: str, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = saved_twice(tmp_path)
    newest = tmp_path / "2"
    data = sorted(newest.glob("arrays/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    damage(data[-1] if file == "data" else newest / file, how)
    lines: list[str] = []
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore_latest(wanted, lines.append)
        assert restored is not None and restored[0] == 1 and restored[2] == {"cursor": 1}
        np.testing.assert_array_equal(restored[1]["w"], values(1))
        # It is out of the way of the next save, and not lost.
        assert checkpoints.steps() == [1] and (tmp_path / "2.damaged").is_dir()
        checkpoints.save(2, run_state(2) | {"w": values(2)}, {"cursor": 2})
        assert checkpoints.steps() == [1, 2]
    assert len(lines) == 1 and "\n" not in lines[0]
    assert f"{newest} is damaged" in lines[0] and "Going on from 1" in lines[0]
    assert "Traceback" not in capfd.readouterr().err


def test_an_empty_directory_named_like_a_checkpoint_is_damaged(tmp_path: Path) -> None:
    wanted = saved_twice(tmp_path)
    (tmp_path / "999").mkdir()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.warns(UserWarning, match="999 is damaged .* Going on from 2"):
            restored = checkpoints.restore_latest(wanted)
    assert restored is not None and restored[0] == 2


def test_without_an_intact_one_there_is_one_error(tmp_path: Path) -> None:
    wanted = saved_twice(tmp_path)
    for step in (1, 2):
        damage(tmp_path / str(step) / "metadata" / "metadata", "cut")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(DamagedError) as caught:
            checkpoints.restore_latest(wanted)
        assert checkpoints.steps() == [1, 2]  # nothing was moved
    message = str(caught.value)
    assert all(str(tmp_path / step) in message for step in ("1", "2")) and "--restart" in message


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(tmp_path: Path) -> None:
    wanted = saved_twice(tmp_path)
    shutil.rmtree(tmp_path / "2" / "checksums")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore_latest(wanted)
    assert restored is not None and restored[0] == 2
    np.testing.assert_array_equal(restored[1]["w"], values(2))


def test_some_arrays_of_any_kept_checkpoint(tmp_path: Path) -> None:
    wanted = saved_twice(tmp_path)
    part = {"params": wanted["params"], "w": wanted["w"]}
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # another process writes it
    assert kept_steps(tmp_path) == [1, 2]
    arrays = restore_part(tmp_path, 1, part)
    assert_same(arrays["params"], run_state(1)["params"])
    np.testing.assert_array_equal(arrays["w"], values(1))
    with pytest.raises(MisfitError, match="v: not in the checkpoint"):
        restore_part(tmp_path, 1, {"v": wanted["w"]})
    assert (tmp_path / "3.orbax-checkpoint-tmp").is_dir()


def test_checksums_know_values_and_order_but_not_the_mesh() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, jnp.bfloat16, np.int32, np.uint8, np.bool_):
        array = jnp.asarray(rng.integers(0, 2, (6, 5)), dtype)
        (whole,) = checksums([array])
        changed = array.at[2, 3].set(array[2, 3] == 0)
        assert checksums([array, array[:1]])[0] == whole  # whatever else is saved
        assert len({whole, *checksums([array[::-1], array.T, changed])}) == 4
    assert checksums([jnp.zeros(3)]) != checksums([jnp.zeros(3).at[1].set(-0.0)])
    assert checksums([]) == [] and len(checksums([jnp.zeros((0, 2)), jnp.float32(3)])) == 2
