"""tltorch's own tests, run with ``polyadic.accelerate_tltorch`` on."""

from __future__ import annotations

from pathlib import Path

import pytest

from interop.their_tests import run_their_tests

tltorch = pytest.importorskip("tltorch")

OURS = ("cp_linear", "cp_conv", "cp_embedding")
THEIR_TESTS = (
    "functional/tests/test_factorized_linear.py",
    "factorized_layers/tests/test_factorized_linear.py",
    "factorized_layers/tests/test_factorized_convolution.py",
    "factorized_layers/tests/test_factorized_embedding.py",
)


def run(folder: Path, on: bool) -> tuple[set[str], dict[str, int]]:
    """Run their tests of CP formats."""
    return run_their_tests(
        folder,
        "tltorch",
        THEIR_TESTS,
        on,
        module="polyadic.interop.tltorch_layers",
        names=OURS,
        turn_on="polyadic.accelerate_tltorch()",
        select="CP or cp",
    )


@pytest.mark.slow
def test_their_own_tests_pass_with_it_on(tmp_path: Path) -> None:
    without, nothing = run(tmp_path, on=False)
    with_it, ran = run(tmp_path, on=True)
    assert not nothing
    assert len(without) >= 7
    assert without <= with_it
    assert ran.keys() == set(OURS)
