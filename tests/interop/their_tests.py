"""Another library's own tests, run in a process of their own with an acceleration on or off."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

# Their tests draw unseeded and some then fail now and then: both runs get the same numbers.
PLUGIN = """
import collections, json, os, numpy, polyadic, torch
import {module} as functions_used
ran = collections.Counter()
def counted(name):
    function = getattr(functions_used, name)
    def call(*args, **kwargs):
        ran[name] += 1
        return function(*args, **kwargs)
    return call
def pytest_runtest_call(item):
    torch.manual_seed(0)
    numpy.random.seed(0)
def pytest_configure(config):
    {first}
    if os.environ["ON"] == "1":
        for name in {names}:
            setattr(functions_used, name, counted(name))
        {turn_on}
def pytest_unconfigure(config):
    with open(os.environ["REPORT"], "w") as file:
        json.dump(ran, file)
"""


def run_their_tests(
    folder: Path,
    package: str,
    tests: Sequence[str],
    on: bool,
    *,
    module: str,
    names: Sequence[str],
    turn_on: str,
    first: str = "pass",
    select: str = "",
) -> tuple[set[str], dict[str, int]]:
    """Which of the installed package's tests passed, and how often each function of ours ran.

    Args:
        folder: for files of this run.
        package: the other library.
        tests: paths of its tests in the package.
        on: whether the acceleration is on.
        module: our module that calls the functions of ``names``.
        names: functions of ours that are counted.
        turn_on: a line of Python that turns the acceleration on.
        first: a line of Python that runs before all else.
        select: which tests, as pytest's option -k.
    """
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    root, report = Path(spec.origin).parent, folder / f"taken{int(on)}.json"
    files = [root / test for test in tests]
    if not all(file.exists() for file in files):
        pytest.skip(f"this {package} was installed without its tests")
    plugin = PLUGIN.format(module=module, names=repr(tuple(names)), turn_on=turn_on, first=first)
    (folder / "accelerated.py").write_text(plugin)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-v", "-p", "accelerated", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, "--rootdir", str(root.parent), "-W", "ignore", "-k", select]
    env = os.environ | {"ON": str(int(on)), "REPORT": str(report), "PYTHONPATH": path}
    done = subprocess.run(
        [*command, *map(str, files)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=env,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return set(re.findall(r"^(\S+) PASSED", done.stdout, re.M)), json.loads(report.read_text())
