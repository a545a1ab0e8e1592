"""What stands around the package: the README of an index, citation, workflow, templates."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import polyadic
from hatch_build import for_an_index

ROOT = Path(__file__).parents[2]


def test_an_index_shows_no_link_into_the_repository() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\]\((?!\w+://)", text)
    without = for_an_index(text)
    assert not re.search(r"\]\((?!\w+://|#)", without)
    assert "A tour" in without
    assert for_an_index("[a](#b)") == for_an_index("[a](#b)", "https://doi.org/x") == "[a](#b)"
    assert for_an_index("[a](b.md) ![c](d.png) [e](https://doi.org/f)", "https://doi.org/x/") == (
        "[a](https://doi.org/x/blob/main/b.md) ![c](https://doi.org/x/raw/main/d.png) "
        "[e](https://doi.org/f)"
    )


def test_the_citation_knows_version_and_license() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {polyadic.__version__}\n" in text
    assert "\nlicense: BSD-3-Clause\n" in text


def test_the_workflow_runs_what_everyone_runs() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    script = ROOT / ".ci" / "run"
    assert "run: .ci/run" in text
    assert os.access(script, os.X_OK)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"run: make (\w+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_workflow_and_templates_are_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff"]
    assert len(files) >= 4
    for path in files:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path.name


def test_the_torch_of_the_tests_is_named_on_the_page() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    (pinned,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert re.search(rf"^\| {re.escape(pinned)} \| the whole suite", page, re.MULTILINE)


def missing(extra: str, required: Sequence[str]) -> set[str]:
    """What an extra asks for, itself or through other extras, and is not installed."""
    found: set[str] = set()
    for one in map(Requirement, required):
        if one.marker is None or not one.marker.evaluate({"extra": extra}):
            continue
        if one.name == "polyadic":
            found = found.union(*[missing(other, required) for other in one.extras])
            continue
        try:
            if not one.specifier.contains(version(one.name), prereleases=True):
                found.add(str(one))
        except PackageNotFoundError:
            found.add(str(one))
    return found


def test_what_the_tests_need_is_installed() -> None:
    """Tests of a package that is missing are skipped, so that a usual run would not show it."""
    assert missing("dev", requires("polyadic") or ()) == set()
    asked = ['polyadic[a]; extra == "dev"', 'no-such-package; extra == "a"', 'pytest; extra == "b"']
    assert missing("dev", asked) == {'no-such-package; extra == "a"'}
    assert missing("dev", ['pytest>=999; extra == "dev"'])
