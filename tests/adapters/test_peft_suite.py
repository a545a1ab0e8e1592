"""PEFT's own tests, with CP adapters in their tables, still end as they are stored to end."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

pytest.importorskip("peft")

from adapters import peft_suite


@pytest.mark.long
def test_pefts_own_tests(tmp_path: Path) -> None:
    """Each test as it is stored: what passes passes, and what is skipped is skipped for as much."""
    found = importlib.metadata.version("peft")
    if found != peft_suite.VERSION:
        pytest.skip(f"they are PEFT {peft_suite.VERSION}'s, and {found} is installed")
    outcomes, stored = peft_suite.run(tmp_path), peft_suite.read()
    changed = {
        name: (stored.get(name, "absent"), outcomes.get(name, "absent"))
        for name in stored.keys() | outcomes.keys()
        if stored.get(name) != outcomes.get(name)
    }
    assert not changed, f"stored and found differ: {changed}"


def test_the_stored_outcomes_hide_nothing() -> None:
    """None failed, most passed, and what is skipped is not for CP adapters, by PEFT's own words."""
    outcomes = peft_suite.read()
    assert len(outcomes) > 2000
    assert "failed" not in outcomes.values()
    skipped = [outcome for outcome in outcomes.values() if outcome.startswith("skipped: ")]
    assert len(skipped) < 0.05 * len(outcomes)
    assert set(outcomes.values()) - set(skipped) == {"passed"}
