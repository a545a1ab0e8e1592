"""What processes say in a step: formulas agree with counts, to the byte, and the page with both."""

from __future__ import annotations

import json

import pytest

from benchmarks.communication import formulas
from benchmarks.communication.__main__ import CELLS, PAGE, RECORD, counted, tables
from benchmarks.pages import between

ROWS = 6


def odd(rank: int | None) -> list[list[formulas.Layer]]:
    """Modes and features that are no multiples of the processes, and blocks that differ."""
    return [formulas.block(60, rank), formulas.block(60, None if rank is None else 2 * rank)]


@pytest.mark.parametrize("cell", CELLS, ids=[c[0] for c in CELLS])
def test_formulas_are_what_is_counted(cell: tuple[object, ...]) -> None:
    layout, shape, ranks, formula = cell
    for rank in ranks:
        blocks = odd(None if rank is None else 8)
        found = counted(blocks, layout, shape, ROWS)
        assert {name: nbytes for name, (_, nbytes) in found.items()} == formula(blocks, ROWS)


def test_the_record_and_the_page() -> None:
    lines = [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]
    cells = [line for line in lines if line["kind"] == "communication"]
    assert len(cells) == sum(len(ranks) for _, _, ranks, _ in CELLS)
    for cell in cells:
        assert {name: said for name, (_, said) in cell["counted"].items()} == cell["formula"]
    page = PAGE.read_text(encoding="utf-8")
    assert between(page, "communication", tables()) == page


def test_data_parallel_says_the_ratio_of_the_weights() -> None:
    """For any number of processes."""
    dense, small = formulas.block(512), formulas.block(512, 64)
    ratio = formulas.parameters(dense) / formulas.parameters(small)
    for many in (2, 8, 4096):
        said = [formulas.sent(formulas.data_parallel([b], many)) for b in (dense, small)]
        assert said[0] / said[1] == pytest.approx(ratio, rel=1e-12)
