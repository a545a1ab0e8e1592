"""What an explicit forward hands to its backward is shown by its shapes."""

from __future__ import annotations

import torch

from polyadic.finetune import Recovery
from polyadic.functional import cp_conv_forward, cp_linear_forward


def test_saved_objects_print_shapes_and_the_plan() -> None:
    ins, outs = [torch.randn(4, 3), torch.randn(5, 3)], [torch.randn(6, 3)]
    _, saved = cp_linear_forward(torch.randn(7, 20), ins, outs)
    text = repr(saved)
    assert "x=7x20" in text
    assert "in_factors=[4x3, 5x3], out_factors=[6x3], weights=None" in text
    assert f"<{saved.plan}>, nbytes={saved.nbytes})" in text
    assert "tensor(" not in text
    _, kept = cp_conv_forward(torch.randn(2, 4, 8, 8), outs, ins[:1], [torch.randn(3, 3)] * 2)
    assert "x=2x4x8x8" in repr(kept)
    assert "tensor(" not in repr(kept)


def test_a_recovery_prints_a_line() -> None:
    recovery = Recovery(300, tuple(1 / (i + 1) for i in range(300)), (), 200, 0.5, False, 12.3)
    assert repr(recovery).startswith("Recovery(steps=300, losses=1 to 0.003333, best=0.5 after")
    assert len(repr(recovery)) < 200
