"""Five tables of irregular layers, which every law runs on.

A new case is a row in the table of its kind; a new kind is a module with a ``Case`` and a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cases import conv, conv_transpose, embedding, linear
from cases.conv import CONV
from cases.conv_transpose import CONV_TRANSPOSE
from cases.embedding import EMBEDDING, HEAD
from cases.joint import JOINT
from cases.linear import LINEAR
from cases.protocol import Case

CASES: list[Case] = [*LINEAR, *CONV, *CONV_TRANSPOSE, *EMBEDDING, *HEAD, *JOINT]
BY_ID = {case.id: case for case in CASES}
# Larger ones, whose weight is larger than any other tensor, for tests of counts alone.
COUNTED: list[Case] = [
    *linear.COUNTED, *conv.COUNTED, *conv_transpose.COUNTED, *embedding.COUNTED
]  # fmt: skip
# One or two of each kind, with options, for laws that take long to check.
FEW = [
    BY_ID[name]
    for name in (
        "linear-order3-primes-lambda",
        "linear-unequal-4-2",
        "conv-1d-k4-same",
        "conv-3x3-all-options",
        "conv-groups-circular",
        "conv-3d-2x3x2-same",
        "conv-transpose-2d-rectangular",
        "conv-transpose-groups",
        "embedding-order3-padding-last-lambda",
        "head-order3-lambda",
        "joint-linear",
        "joint-conv2d",
        "joint-embedding",
    )
]


def params(cases: Sequence[Case]) -> list[Any]:
    """The cases as parameters named by their ids."""
    return [pytest.param(case, id=case.id) for case in cases]


def over(which: Callable[[Case], bool]) -> Any:
    """Run a test on the cases of which this is true."""
    return pytest.mark.parametrize("case", params([case for case in CASES if which(case)]))


every_case = over(lambda case: True)
few_cases = pytest.mark.parametrize("case", params(FEW))
