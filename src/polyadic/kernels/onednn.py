"""What oneDNN does on this CPU, and where it does better than what torch would take."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

from polyadic._torch import not_traced


@not_traced
def in_onednn(dtype: torch.dtype) -> bool:
    """Whether convolutions of this dtype run in oneDNN; torch's own depthwise ones are slow."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


@not_traced
def faster_products() -> bool:
    """Whether oneDNN multiplies large float32 matrices faster than torch's BLAS does.

    Where that is MKL, on AMD's processors: it reads operands that are not in the cache at three
    quarters of oneDNN's rate there.
    """
    return _beside_mkl_on_amd()


@functools.cache
def _beside_mkl_on_amd() -> bool:
    return (
        torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and _vendor() == "AuthenticAMD"
    )


def _vendor() -> str:
    """Vendor of the processor, as it names itself."""
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return platform.processor().rpartition(" ")[2]
