"""Kills runs at random times and starts them again: `python chaos.py [--kills 200] [--seed 0]`.

Runs of every kind of stage, in one process and in two, whose samples are decoded in batches and in
slots, are killed (SIGKILL) several times each, at random times or at a random time inside a random
span: a checkpoint, an export, a rollout, an update. The same command then goes on. Prints how many
runs ended with the same bytes as one that was never killed; ends with status 1 if any did not, and
leaves its directory.

Times are random by the seed, but what a run does at that time depends on the machine.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import compiled_programs  # noqa: E402

# JAX reads these when it is imported; workers of rewards look for tiny_rewards.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_FLAGS", compiled_programs.QUICK)
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
os.environ.update(compiled_programs.cache())

import jax  # noqa: E402
from forked import import_everything  # noqa: E402

from r1jax import recipe  # noqa: E402
from r1jax.config.load import load_config  # noqa: E402
from r1jax.metrics.heartbeat import HEARTBEAT  # noqa: E402
from r1jax.stages.rejection_sampling import rewriting  # noqa: E402

SPANS = ("checkpoint", "export", "rollout", "reward", "update", "held_out", "rewrite", "setup")
KILLS_A_RUN = 5
# What depends on time or on the number of starts. Weights are compared as they are exported.
VARIES = ("timings.jsonl", "run.json", "results.json", "report.html", "lock")


@dataclass(frozen=True)
class Kind:
    """A run that is killed: its config in tests/, changes to it, and how many processes it has."""

    name: str
    config: str
    changes: tuple[str, ...] = ()
    processes: int = 1


_SLOTS = ("stages.zero.sampling.slots=4", "stages.zero.held_out_sampling.slots=4")
KINDS = (
    Kind("batches", "tiny.yaml"),
    Kind("slots", "tiny.yaml", (*_SLOTS, "stages.before.sampling.slots=2")),
    Kind("every kind of stage", "tiny_r1.yaml"),
    Kind("two processes", "tiny_hosts.yaml", ("mesh.cpu_devices=1",), processes=2),
    Kind(
        "every kind of stage, two processes",
        "tiny_processes.yaml",
        ("mesh.cpu_devices=1", "stages.base.checkpoint_every=20"),
        processes=2,
    ),
)


ORDER = (0, 1, 3, 0, 1, 2, 0, 1, 3, 4)  # the small ones more often


class Process:
    """One process of a run, forked from this one, which has imported everything it needs."""

    def __init__(self, kind: Kind, output: Path, index: int, port: int) -> None:
        self._doing = mmap.mmap(-1, 200)
        self.status: int | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no thread of JAX runs before it sees devices
            self._pid = os.fork()
        if not self._pid:
            self._run(kind, output, index, port)

    def doing(self) -> str:
        """Such as `stage zero, step 12, in held_out > rollout`."""
        return self._doing[:].split(b"\0")[0].decode()

    def ended(self) -> bool:
        if self.status is None and (found := os.waitpid(self._pid, os.WNOHANG)) != (0, 0):
            self.status = os.waitstatus_to_exitcode(found[1])
        return self.status is not None

    def kill(self) -> None:
        if not self.ended():
            os.kill(self._pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _run(self, kind: Kind, output: Path, index: int, port: int) -> None:
        status = 1
        try:
            os.setsid()
            with open(output.parent / f"{output.name}.{index}.log", "ab", buffering=0) as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.chdir(TESTS)
            self._show()
            # The miniature's tokenizer has neither letters nor headings.
            rewriting.instruction_prompt = lambda draft, _: draft.question
            if kind.processes > 1:
                jax.distributed.initialize(f"127.0.0.1:{port}", kind.processes, index)
            status = recipe.run(
                load_config(kind.config, [f"output={output}", "verifier.workers=1", *kind.changes])
            )
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if status == 0 and kind.processes > 1:
                jax.distributed.shutdown()
            os._exit(status)

    def _show(self) -> None:
        beat = type(HEARTBEAT).beat

        def shown(heartbeat: object) -> None:
            beat(HEARTBEAT)
            self._doing[:] = str(heartbeat).encode()[:199].ljust(200, b"\0")

        type(HEARTBEAT).beat = shown  # type: ignore[method-assign,assignment]


def start(kind: Kind, output: Path) -> list[Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Process(kind, output, index, port) for index in range(kind.processes)]


def wait(processes: Sequence[Process], seconds: float, until: Callable[[], bool]) -> None:
    """Returns after the time, or when `until` holds, or when all processes have ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        if all([process.ended() for process in processes]):
            return
        time.sleep(0.002)


def finish(processes: Sequence[Process]) -> None:
    """Waits for the end of all. Raises SystemExit where one did not end with 0."""
    wait(processes, 900, lambda: False)
    statuses = [process.status for process in processes]
    for process in processes:
        process.kill()
    if statuses != [0] * len(statuses):
        raise SystemExit(f"exit statuses {statuses}")


def kill(processes: Sequence[Process], chance: random.Random, whole: float) -> str | None:
    """Kills all at a random time, a random one first; what it did, or None if the run ended."""
    victim = chance.choice(processes)
    wait(processes, chance.uniform(0, 0.2 * whole), lambda: False)
    if chance.random() < 0.5:
        span = chance.choice(SPANS)
        wait(processes, whole, lambda: victim.doing().split(" > ")[-1].endswith(span))
        wait(processes, chance.uniform(0, 0.03), lambda: False)
    if any([process.ended() for process in processes]):
        return None
    doing = victim.doing()
    victim.kill()
    wait(processes, chance.uniform(0, 0.5), lambda: False)  # the others go a little later
    for process in processes:
        process.kill()
    return doing or "before the first stage"


def result(output: Path) -> dict[str, bytes]:
    """Every file of the run but those that depend on when it was killed."""
    (run,) = output.iterdir()
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in VARIES and "checkpoints" not in path.parts
    }


def differing(first: dict[str, bytes], second: dict[str, bytes]) -> list[str]:
    return [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]


def say(text: str) -> None:
    print(text, flush=True)


def whole_run(kind: Kind, folder: Path) -> tuple[dict[str, bytes], float]:
    """The result of a run that is not killed, and the seconds that it takes when compiled."""
    results, seconds = [], 0.0
    for name in ("whole", "again"):
        begun = time.monotonic()
        output = folder / f"{kind.name.replace(' ', '-')}-{name}"
        finish(start(kind, output))
        seconds = time.monotonic() - begun
        results.append(result(output))
        shutil.rmtree(output)
    if wrong := differing(*results):
        raise SystemExit(f"two whole runs differ ({kind.name}): {', '.join(wrong)}")
    say(f"{kind.name}: {len(results[0])} files, {seconds:.1f} s when nothing kills it")
    return results[0], seconds


@dataclass
class Tally:
    """What has been done so far, of `wanted` kills; spans: in which of them runs were killed."""

    wanted: int
    kills: int = 0
    runs: int = 0
    equal: int = 0
    spans: Counter[str] = field(default_factory=Counter)


def one_run(
    kind: Kind,
    folder: Path,
    wholes: Mapping[Kind, tuple[dict[str, bytes], float]],
    tally: Tally,
    seed: int,
) -> None:
    """Starts a run, kills it up to KILLS_A_RUN times, lets it end, and compares its files."""
    chance = random.Random(f"{seed} {tally.runs}")
    output, killed = folder / f"run-{tally.runs}", 0
    wanted, seconds = wholes[kind]
    processes = start(kind, output)
    try:
        while killed < min(KILLS_A_RUN, tally.wanted - tally.kills):
            doing = kill(processes, chance, seconds)
            if doing is None:
                break
            killed += 1
            tally.spans[doing.rpartition(", ")[2].rpartition(" > ")[2].removeprefix("in ")] += 1
            processes = start(kind, output)
        finish(processes)
        problem = ", ".join(differing(wanted, result(output)))
    except SystemExit as error:
        problem = str(error)
    finally:
        for process in processes:
            process.kill()
    tally.kills, tally.runs = tally.kills + killed, tally.runs + 1
    tally.equal += not problem
    verdict = f"NOT EQUAL: {problem} ({output})" if problem else "byte-equal"
    say(
        f"run {tally.runs} ({kind.name}): {killed} kills, {verdict}  [{tally.kills} of "
        f"{tally.wanted} kills, {tally.equal} of {tally.runs} runs equal]"
    )
    if not problem:
        shutil.rmtree(output)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=int, nargs="*", help="Numbers of KINDS; default: all.")
    options = parser.parse_args()
    import_everything()  # so that a process which is started again does not
    kinds = [KINDS[i] for i in options.kinds or ORDER]
    folder = Path(tempfile.mkdtemp(prefix="r1jax-chaos-"))
    say(f"seed {options.seed}, in {folder}")
    wholes = {kind: whole_run(kind, folder) for kind in dict.fromkeys(kinds)}
    tally = Tally(options.kills)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while tally.kills < options.kills:
            one_run(kinds[tally.runs % len(kinds)], folder, wholes, tally, options.seed)
    except KeyboardInterrupt:
        say(f"stopped before {options.kills} kills")
    say(f"kills by what ran: {', '.join(f'{name} {n}' for name, n in tally.spans.most_common())}")
    say(
        f"{tally.kills} kills in {tally.runs} runs, seed {options.seed}: {tally.equal} of "
        f"{tally.runs} runs ended with the same bytes as a run that was never killed"
    )
    return int(tally.equal < tally.runs)


if __name__ == "__main__":
    raise SystemExit(main())
