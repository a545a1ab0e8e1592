"""The contracted form a layer takes for inference; ``polyadic.freeze`` chooses and installs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyadic.kernels.products import matmul_nn, matmul_nt


class Frozen(nn.Module):
    """Matrices contracted from factors, and a watch on the factors they came from.

    The matrices are buffers that no state dict holds, so that a frozen model saves and loads as it
    did before.

    Args:
        matrices: the contracted tensors, without gradient.
        layer: the layer they stand for; a change of its CP tensor's parameters, in place or by
            others, makes this stale.

    Attributes:
        trainable: by name, whether the layer's parameters required a gradient.
    """

    def __init__(self, matrices: Sequence[Tensor], layer: nn.Module) -> None:
        super().__init__()
        for i, matrix in enumerate(matrices):
            self.register_buffer(f"matrix{i}", matrix, persistent=False)
        self.trainable = {name: p.requires_grad for name, p in layer.named_parameters()}
        # What holds each parameter, and each part that holds one: a new one may take its place.
        # Modules and not their dicts are kept, since torch.export gives a module a new dict.
        cp = layer.get_submodule("cp")
        self._watched = [
            (module, name, parameter)
            for module in cp.modules()
            for name, parameter in module._parameters.items()
        ]
        self._watched_parts = [
            (module, name, part)
            for module in cp.modules()
            for name, part in module._modules.items()
        ]
        self._versions = self._versions_now()

    def _versions_now(self) -> list[tuple[Tensor, int]]:
        """The versions of all that have one; tensors made in inference mode have none."""
        parameters = [p for _, _, p in self._watched if p is not None and not p.is_inference()]
        return [(parameter, parameter._version) for parameter in parameters]

    def __getstate__(self) -> dict[str, Any]:
        self.check()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the copied parameters from the versions they start with."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._versions = self._versions_now()

    def check(self) -> None:
        """Raise a RuntimeError if a parameter was changed or replaced after freezing."""
        if torch.compiler.is_compiling():
            return
        replaced = any(m._parameters.get(name) is not p for m, name, p in self._watched) or any(
            m._modules.get(name) is not part for m, name, part in self._watched_parts
        )
        if replaced or any(p._version != version for p, version in self._versions):
            raise RuntimeError(
                "the factors of a frozen layer were changed (an optimizer step, or "
                "load_state_dict) or replaced; call polyadic.unfreeze(model), then freeze it again"
            )


class FrozenPair(Frozen):
    """y = (x KA) KCᵀ + b with the Khatri-Rao pair: matrix0 KA (M, R), matrix1 KC (N, R)."""

    matrix0: Tensor
    matrix1: Tensor

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., M) → (..., N)."""
        self.check()
        own, rows = self._buffers, x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = matmul_nt(matmul_nn(rows, own["matrix0"]), own["matrix1"], bias)  # type: ignore[arg-type]
        return y if rows is x else y.view(*x.shape[:-1], y.shape[1])


class FrozenWeight(Frozen):
    """y = x Wᵀ + b with the rebuilt weight: matrix0 W (N, M)."""

    matrix0: Tensor

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., M) → (..., N)."""
        self.check()
        if x.dim() != 2:
            return F.linear(x, self._buffers["matrix0"], bias)  # type: ignore[arg-type]
        return matmul_nt(x, self._buffers["matrix0"], bias)  # type: ignore[arg-type]


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
        groups: int,
    ) -> Tensor:
        """(B, Cin, *S) → (B, Cout, *S')."""
        self.check()
        dims = self.matrix0.dim() - 2
        convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        return convolve(x, self.matrix0, bias, stride, padding, dilation, groups)
