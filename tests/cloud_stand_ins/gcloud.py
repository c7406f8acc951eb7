"""Stands in for gcloud and kubectl: logs its words, and answers from a scenario.

$CLOUD/log.jsonl      one JSON list of words for each call
$CLOUD/scenario.json  what this cloud is like (the tests' `Cloud`); changed by the calls
$CLOUD/NODE-WORKER/   the home directory of a worker, where commands that are sent to it really run
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ["CLOUD"])
WORDS = sys.argv[1:]
FLAGS = dict(word.split("=", 1) for word in WORDS if word.startswith("--") and "=" in word)


def next_of(answers: list) -> object:
    """The next answer; the last one stays."""
    return answers.pop(0) if len(answers) > 1 else answers[0]


def refuse(message: str) -> None:
    print(f"ERROR: {message}", file=sys.stderr)
    raise SystemExit(1)


def queue(scenario: dict, verb: str) -> None:
    lives = scenario["lives"]
    if verb == "create":
        if scenario["create_error"]:
            refuse(scenario["create_error"])
        lives.pop(0)
    elif verb == "delete":
        lives[0] = {"queue": [""]}
        (CLOUD / "suspended").unlink(missing_ok=True)
        for home in CLOUD.glob("r1*-[0-9]"):  # the disks go, and what ran there
            try:
                os.killpg(os.getpgid(int((home / "r1jax/pid").read_text())), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                pass
            shutil.rmtree(home)
    elif verb == "describe":
        print(scenario["failure"])
    elif verb == "list":
        if scenario["list_error"]:
            refuse(scenario["list_error"])
        print("SUSPENDED" if (CLOUD / "suspended").exists() else next_of(lives[0]["queue"]))


def nodes(scenario: dict) -> None:
    states = next_of(scenario["lives"][0].get("nodes", [{}]))
    for node in scenario["nodes"]:
        state = states.get(node, "READY")
        if state:
            print(f"{node}\t{state}")


def workers(scenario: dict) -> list[int]:
    chosen = FLAGS["--worker"]
    return list(range(scenario["workers"])) if chosen == "all" else [int(chosen)]


def ssh(scenario: dict, node: str) -> int:
    # gcloud splits the command at spaces, and ssh joins the words again.
    command = " ".join(FLAGS["--command"].split(" "))
    first = 0
    for worker in workers(scenario):
        if f"{node}/{worker}" in scenario["unreachable"]:
            print(f"ssh: worker {worker} of {node} does not answer", file=sys.stderr)
            first = first or 255
            continue
        home = CLOUD / f"{node}-{worker}"
        home.mkdir(exist_ok=True)
        run = subprocess.run(
            ["bash", "-c", command],
            cwd=home,
            env=os.environ | {"HOME": str(home), "AT": f"{node}/{worker}"},
        )
        first = first or run.returncode
    return first


def scp(scenario: dict, source: str, destination: str) -> None:
    node, _, folder = destination.partition(":")
    for worker in workers(scenario):
        target = CLOUD / f"{node}-{worker}" / folder / Path(source).name
        shutil.copytree(source, target, dirs_exist_ok=True)


def kubectl(scenario: dict) -> int:
    verb = next(word for word in WORDS if not word.startswith("-"))
    if verb == "get":
        print(scenario["jobset"], end="")
    elif verb == "apply":
        if scenario["apply_error"]:
            refuse(scenario["apply_error"])
        (CLOUD / "applied.yaml").write_text(sys.stdin.read())
    return 0


def main() -> int:
    name = Path(sys.argv[0]).name
    with open(CLOUD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(CLOUD / "log.jsonl", "a") as log:
            log.write(json.dumps([name, *WORDS]) + "\n")
        path = CLOUD / "scenario.json"
        scenario = json.loads(path.read_text())
        if name == "kubectl":
            return kubectl(scenario)
        what, rest = WORDS[:3], WORDS[3:]
        if what == ["compute", "tpus", "queued-resources"]:
            try:
                queue(scenario, rest[0])
            finally:
                path.write_text(json.dumps(scenario))
        elif what == ["compute", "tpus", "tpu-vm"] and rest[0] == "list":
            nodes(scenario)
            path.write_text(json.dumps(scenario))
        elif what == ["storage", "buckets", "describe"]:
            if not scenario["bucket"]:
                refuse("gs://a-bucket not found: 404.")
            print(scenario["bucket"])
    if what == ["compute", "tpus", "tpu-vm"] and rest[0] == "ssh":
        return ssh(scenario, rest[1])
    if what == ["compute", "tpus", "tpu-vm"] and rest[0] == "scp":
        scp(scenario, rest[1], rest[2])
    return 0


raise SystemExit(main())
