"""A process that tests fork is as one that Python starts."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import forked
import pytest

PROGRAM = """
import os, sys, jax
print(sys.argv[1:], os.getcwd(), os.environ["GIVEN"], "PATH" in os.environ, len(jax.devices()))
print("wrong", file=sys.stderr)
sys.exit(3)
"""


def test_arguments_environment_directory_outputs_and_status(tmp_path: Path) -> None:
    given = {"GIVEN": "x", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "3"}
    done = forked.run("-c", PROGRAM, "a", "b c", env=given, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (3, "wrong\n")
    assert done.stdout == f"['a', 'b c'] {tmp_path} x False 3\n"


def test_an_exception_is_told_and_signals_end_it() -> None:
    failed = forked.Process("-c", "raise KeyError('here')", one_output=True)
    assert "KeyError: 'here'" in failed.communicate(60)[0] and failed.returncode == 1
    sleeping = forked.Process("-c", "import time; time.sleep(600)")
    assert sleeping.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        sleeping.wait(0.1)
    sleeping.send_signal(signal.SIGTERM)
    assert sleeping.wait(60) == -signal.SIGTERM
