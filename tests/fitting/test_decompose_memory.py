"""What a fit allocates: a few times the weight, its factors, a Gram matrix and the metric."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from polyadic import decompose
from polyadic.testing import LiveBytes

# Groups of modes, rank and sweeps. Every sweep allocates what the first do, which the first two
# cases show; in the others one takes a second.
CASES = [
    pytest.param(((96,), (64,), (3, 3, 3)), 16, 8, id="kernel"),
    pytest.param(((4,), (2048,), (3,)), 40, 8, id="long-mode"),
    pytest.param(((8, 8), (8, 8)), 300, 2, id="rank-above-modes"),
    pytest.param(((64,), (48,), (3, 3)), 200, 2, id="rank-above-sides"),
    pytest.param(((16, 24), (16, 24)), 184, 2, id="matrix"),
]


@pytest.mark.parametrize("with_metric", [False, True], ids=["frobenius", "metric"])
@pytest.mark.parametrize(("shape", "rank", "sweeps"), CASES)
def test_peak(shape: Any, rank: int, sweeps: int, with_metric: bool) -> None:
    """Both starts of the race are alive, each with its factors and those before."""
    modes = [mode for group in shape for mode in group]
    weight, size = torch.randn(modes), math.prod(shape[0])
    inputs = torch.randn(2 * size, size)
    metric = inputs.t() @ inputs if with_metric else None
    with LiveBytes() as live:
        decompose(weight, shape, rank, metric=metric, iterations=sweeps)
    parts = weight.nbytes + 4 * rank * sum(modes) + 8 * rank * rank
    parts += 8 * size * size if with_metric else 0
    assert live.peak < 8 * parts


def test_a_large_kernel_takes_thrice_its_size() -> None:
    weight = torch.randn(128, 256, 3, 3)
    with LiveBytes() as live:
        decompose(weight, ((128,), (256,), (3, 3)), 24, iterations=8)
    assert live.peak < 3 * weight.nbytes


@pytest.mark.slow
def test_resident_memory_of_a_volume_kernel() -> None:
    """(512, 1024, 3, 3, 3) at rank 64 in less than 1 GB beside the weight."""
    code = """
import json, resource, torch
from pathlib import Path
from polyadic import decompose
torch.set_num_threads(1)
weight = torch.randn(512, 1024, 3, 3, 3)
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
found = decompose(weight, ((512,), (1024,), (3, 3, 3)), 64, iterations=7)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([peak - before, found.error]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, error = json.loads(done.stdout)
    assert 0 < peak < 1e9
    assert error < 1
