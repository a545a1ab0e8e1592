"""The contracted form a layer takes for inference; ``polyadic.freeze`` chooses and installs it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from polyadic._torch import forward_mode_level, innermost, transforms_active
from polyadic.kernels.products import matmul_nn, matmul_nt


class Frozen(nn.Module):
    """Matrices contracted from factors, and a watch on the factors they came from.

    The matrices are buffers that no state dict holds, so that a frozen model saves and loads as it
    did before.

    Args:
        layer: the layer that the matrices stand for. They are stale once parameters of its CP
            tensor are changed in place or replaced.
        matrices: the contracted tensors by name, without gradient.

    Attributes:
        trainable: for each parameter of the layer, by name, whether it required a gradient.
    """

    def __init__(self, layer: nn.Module, **matrices: Tensor) -> None:
        super().__init__()
        for name, matrix in matrices.items():
            self.register_buffer(name, matrix, persistent=False)
        self.trainable = {name: p.requires_grad for name, p in layer.named_parameters()}
        # We keep modules and not their dicts, because torch.export gives a module a new dict. A
        # tuple holds the CP tensor, because torch registers a module that is an attribute.
        self._holder = (layer.get_submodule("cp"),)
        self._watch()

    def _watch(self) -> None:
        """Remember each parameter and each part of the CP tensor, with the place where it stands.

        ``check`` looks there again and sees when another object has taken its place.
        """
        cp = self._holder[0]
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
        self._values = dict(cp.named_parameters(remove_duplicate=False))
        self._versions = self._versions_now()

    def _versions_now(self) -> list[tuple[Tensor, int]]:
        """Return parameters with their version counters, which inference tensors do not have."""
        parameters = [p for _, _, p in self._watched if p is not None and not p.is_inference()]
        return [(parameter, parameter._version) for parameter in parameters]

    def __getstate__(self) -> dict[str, Any]:
        self.check()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the copied parameters from the versions they start with."""
        super().__setstate__(state)
        self._versions = self._versions_now()

    def check(self) -> None:
        """Raise a RuntimeError where the matrices are not what is asked for.

        They are stale if a parameter was changed, or replaced by other values. Hooks that offload
        parameters put one without values in the place of each, and later one with the values it
        had. And no derivative passes through the matrices to a parameter.
        """
        if torch.compiler.is_compiling():
            return
        replaced = any(m._modules.get(name) is not part for m, name, part in self._watched_parts)
        now = (
            [*self._holder[0].parameters()]
            if replaced
            else [module._parameters.get(name) for module, name, _ in self._watched]
        )
        if any(p is not None and _is_differentiated(p) for p in now):
            raise RuntimeError(
                "the factors of a frozen layer require gradients, or a transform of torch.func or "
                "forward mode was given them; a derivative by them would be lost, as they are "
                "contracted already: call polyadic.unfreeze(model), or set their requires_grad to "
                "False"
            )
        changed = any(p._version != version for p, version in self._versions)
        replaced = replaced or any(
            p is not old for p, (_, _, old) in zip(now, self._watched, strict=True)
        )
        if changed or (replaced and not self._same_values()):
            raise RuntimeError(
                "the factors of a frozen layer were changed (an optimizer step, or "
                "load_state_dict) or replaced; call polyadic.unfreeze(model), then freeze it again"
            )

    def _same_values(self) -> bool:
        """Whether the parameters there now hold the values that were contracted, or none at all."""
        now = dict(self._holder[0].named_parameters(remove_duplicate=False))
        if now.keys() != self._values.keys():
            return False
        present = [(p, self._values[name]) for name, p in now.items() if not p.is_meta]
        if not all(p is old or _equal(p, old) for p, old in present):
            return False
        if len(present) == len(now):
            self._watch()
        return True


def _is_differentiated(parameter: Tensor) -> bool:
    """Whether autograd, a transform of torch.func or forward mode asks for a derivative by it."""
    if parameter.requires_grad and torch.is_grad_enabled():
        return True
    if transforms_active() and innermost(parameter) is not parameter:
        return True
    if forward_mode_level() < 0:
        return False
    return forward_ad.unpack_dual(parameter).tangent is not None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.to(b.device), b)


class FrozenPair(Frozen):
    """y = (x KA) KCᵀ + b with the Khatri-Rao pair: ``ka`` is KA (M, R), ``kc`` is KC (N, R)."""

    ka: Tensor
    kc: Tensor

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., M) → (..., N)."""
        self.check()
        own: dict[str, Any] = self._buffers
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = matmul_nt(matmul_nn(rows, own["ka"]), own["kc"], bias)
        return y if rows is x else y.view(*x.shape[:-1], y.shape[1])


class FrozenWeight(Frozen):
    """y = x Wᵀ + b with the rebuilt weight: ``weight`` is W (N, M)."""

    weight: Tensor

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., M) → (..., N)."""
        self.check()
        own: dict[str, Any] = self._buffers
        product = matmul_nt if x.dim() == 2 else F.linear
        return product(x, own["weight"], bias)


class FrozenKernel(Frozen):
    """A convolution with the rebuilt kernel: ``kernel`` is (Cout, Cin/groups, *k)."""

    kernel: Tensor

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
        dims = self.kernel.dim() - 2
        convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        return convolve(x, self.kernel, bias, stride, padding, dilation, groups)
