"""The notebook runs from its first cell to its last, on a run that is as small as can be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tiny_r1_zero.ipynb"
GIVEN = 'changes = ["output=runs", "trackers=[]"]'
SMALL = [
    "output=runs",
    "trackers=[]",
    "stages.base.steps=4",
    "stages.base.log_every=1",
    "stages.zero.steps=4",
    "stages.zero.questions_per_step=4",
    "stages.zero.outputs_per_question=4",
    "stages.zero.micro_batches=1",
    "stages.zero.samples_every=1",
    "stages.before.problems=4",
    "stages.after.problems=4",
    "mesh.cpu_devices=1",
]


def code() -> str:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    assert code().count(GIVEN) == 1


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    program = code().replace(GIVEN, f"changes = {SMALL!r}") + "\nfigure.savefig('curves.png')\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert "before: 0." in done.stdout and "after: 0." in done.stdout
    assert "step 1, " in done.stdout and "step 4, " in done.stdout
    assert (tmp_path / "runs" / "r1_zero_tiny-s0" / "report.html").is_file()
