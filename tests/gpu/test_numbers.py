"""Every kernel's numbers, on a GPU or under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from check import FOLDER, names

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_a_table_holds(name: str) -> None:
    """The interpreter is chosen where kernels are defined, so the process must be fresh."""
    run = subprocess.run(
        [sys.executable, Path(FOLDER) / "check.py", name],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr
    assert "rows hold" in run.stdout
