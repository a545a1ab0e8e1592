"""docs/decompose.md says what the stored records say, defeats included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.decompose.report import tables
from benchmarks.pages import between
from benchmarks.records import ROOT


def test_the_page_is_made_from_the_newest_records() -> None:
    newest = sorted((ROOT / "benchmarks" / "results").glob("decompose-*.jsonl"))[-1]
    page = (ROOT / "docs" / "decompose.md").read_text(encoding="utf-8")
    assert between(page, "benchmark", tables(newest)) == page


def fit(cell: str, contestant: str, error: float, seconds: float) -> dict[str, Any]:
    return {
        "kind": "fit",
        "cell": cell,
        "rank": 3,
        "contestant": contestant,
        "seed": 0,
        "status": "fitted",
        "error": error,
        "growth": 1.0,
        "seconds": seconds,
        "curve": [[seconds / 2, error * 1.5], [seconds, error]],
    }


def test_a_defeat_is_told(tmp_path: Path) -> None:
    environment = {
        "kind": "environment",
        "cpu": "one",
        "cores": 1,
        "threads": 1,
        "load": None,
        "dtype": "float32",
        "torch": "2",
        "versions": {"tensorly": "0", "tensorly-torch": "0"},
        "date": "2026-01-01",
        "commit": "none",
        "limit": 8.0,
        "seed_limit": 2.0,
    }
    others = ("tensorly svd", "tensorly random", "tltorch")
    records = [environment]
    for cell, ours in (("won", 0.1), ("level", 0.2001), ("lost", 0.3)):
        records.append(fit(cell, "polyadic", ours, 1.0))
        records += [fit(cell, name, 0.2, 1.0) for name in others]
    path = tmp_path / "decompose-2026-01-01.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    text = tables(path)
    assert "smallest error in 1 of 3 cells" in text
    assert "in 1 more (level); another is better in 1 (lost)" in text
    assert "level at 10 of 15 moments" in text
    assert "- lost, 1 s: 0.3 against 0.2" in text
    assert "| lost | 3 | 0.3000 (1.00) 1.0 s | **0.2000** (1.00) 1.0 s |" in text


@pytest.mark.parametrize("kind", ["fit", "seed", "outputs", "memory"])
def test_every_kind_of_record_is_stored(kind: str) -> None:
    newest = sorted((ROOT / "benchmarks" / "results").glob("decompose-*.jsonl"))[-1]
    assert f'"kind": "{kind}"' in newest.read_text(encoding="utf-8")
