"""The contracted form a layer takes for inference; ``polyadic.freeze`` chooses and installs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyadic.kernels.products import linear, times


class Frozen(nn.Module):
    """Matrices contracted from factors, and a watch on the factors they came from.

    The matrices are buffers that no state dict holds, so that a frozen model saves and loads as it
    did before.

    Args:
        matrices: the contracted tensors, without gradient.
        parameters: the layer's parameters; a change of one of them in place makes this stale.
    """

    def __init__(self, matrices: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        for i, matrix in enumerate(matrices):
            self.register_buffer(f"matrix{i}", matrix, persistent=False)
        self.trainable = [parameter.requires_grad for parameter in parameters]
        self._watched = list(parameters)
        self._versions = [parameter._version for parameter in parameters]

    def __getstate__(self) -> dict[str, Any]:
        self.check()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the copied parameters from the versions they start with."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._versions = [parameter._version for parameter in self._watched]

    def check(self) -> None:
        """Raise a RuntimeError if a parameter was changed after freezing."""
        if torch.compiler.is_compiling():
            return
        if [parameter._version for parameter in self._watched] != self._versions:
            raise RuntimeError(
                "the factors of a frozen layer were changed (an optimizer step, or "
                "load_state_dict); call polyadic.unfreeze(model), then freeze it again"
            )


class FrozenPair(Frozen):
    """y = (x KA) KCᵀ + b with the Khatri-Rao pair: matrix0 KA (M, R), matrix1 KC (N, R)."""

    matrix0: Tensor
    matrix1: Tensor

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., M) → (..., N)."""
        self.check()
        own, rows = self._buffers, x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = linear(times(rows, own["matrix0"]), own["matrix1"], bias)  # type: ignore[arg-type]
        return y if rows is x else y.view(*x.shape[:-1], y.shape[1])


class FrozenWeight(Frozen):
    """y = x Wᵀ + b with the rebuilt weight: matrix0 W (N, M)."""

    matrix0: Tensor

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., M) → (..., N)."""
        self.check()
        if x.dim() != 2:
            return F.linear(x, self._buffers["matrix0"], bias)  # type: ignore[arg-type]
        return linear(x, self._buffers["matrix0"], bias)  # type: ignore[arg-type]


class FrozenKernel(Frozen):
    """A convolution with the rebuilt kernel: matrix0 (Cout, Cin/groups, *k)."""

    matrix0: Tensor

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: str | tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> Tensor:
        """(B, Cin, *S) → (B, Cout, *S')."""
        self.check()
        dims = self.matrix0.dim() - 2
        groups = x.shape[-dims - 1] // self.matrix0.shape[1]
        convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        return convolve(x, self.matrix0, bias, stride, padding, dilation, groups)
