"""tltorch's own tests, run with ``polyadic.accelerate_tltorch`` on."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

tltorch = pytest.importorskip("tltorch")

# Their tests draw unseeded and some then fail now and then: both runs get the same numbers.
PLUGIN = """
import collections, json, os, numpy, polyadic, torch
from polyadic.interop import tltorch_layers
ran = collections.Counter()
def counted(name):
    function = getattr(tltorch_layers, name)
    def call(*args, **kwargs):
        ran[name] += 1
        return function(*args, **kwargs)
    return call
def pytest_runtest_call(item):
    torch.manual_seed(0)
    numpy.random.seed(0)
def pytest_configure(config):
    if os.environ["ON"] == "1":
        for name in ("cp_linear", "cp_conv", "cp_embedding"):
            setattr(tltorch_layers, name, counted(name))
        polyadic.accelerate_tltorch()
def pytest_unconfigure(config):
    with open(os.environ["REPORT"], "w") as file:
        json.dump(ran, file)
"""
THEIR_TESTS = (
    "functional/tests/test_factorized_linear.py",
    "factorized_layers/tests/test_factorized_linear.py",
    "factorized_layers/tests/test_factorized_convolution.py",
    "factorized_layers/tests/test_factorized_embedding.py",
)


def run_their_tests(folder: Path, on: bool) -> tuple[set[str], dict[str, int]]:
    """Run the installed package's tests in CP format; which passed, and which functions ran."""
    spec = importlib.util.find_spec("tltorch")
    assert spec is not None
    assert spec.origin is not None
    package, report = Path(spec.origin).parent, folder / f"taken{int(on)}.json"
    files = [package / test for test in THEIR_TESTS]
    if not all(file.exists() for file in files):
        pytest.skip("this tltorch was installed without its tests")
    (folder / "accelerated.py").write_text(PLUGIN)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-v", "-p", "accelerated", "-p", "no:cacheprovider"]
    command += [
        "-c",
        os.devnull,
        "--rootdir",
        str(package.parent),
        "-k",
        "CP or cp",
        "-W",
        "ignore",
    ]
    env = os.environ | {"ON": str(int(on)), "REPORT": str(report), "PYTHONPATH": path}
    done = subprocess.run(
        [*command, *map(str, files)], capture_output=True, text=True, cwd=folder, env=env,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return set(re.findall(r"^(\S+) PASSED", done.stdout, re.M)), json.loads(report.read_text())


@pytest.mark.slow
def test_their_own_tests_pass_with_it_on(tmp_path: Path) -> None:
    without, nothing = run_their_tests(tmp_path, on=False)
    with_it, ran = run_their_tests(tmp_path, on=True)
    assert not nothing
    assert len(without) >= 7
    assert without <= with_it
    assert ran.keys() == {"cp_linear", "cp_conv", "cp_embedding"}
