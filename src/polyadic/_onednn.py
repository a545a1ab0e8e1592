"""Which dtypes torch hands to oneDNN on this CPU."""

from __future__ import annotations

import torch


def in_onednn(dtype: torch.dtype) -> bool:
    """Whether convolutions of this dtype run in oneDNN; torch's own depthwise ones are slow."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


# A constant of the processor, which torch.compile need not look into.
in_onednn._dynamo_marked_constant = True  # type: ignore[attr-defined]
