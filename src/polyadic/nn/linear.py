"""The linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyadic import functional
from polyadic._check import memory as check_memory
from polyadic._format import LinearFormat, factored_shape, positive_int, tensorize
from polyadic._plan import Memory
from polyadic.nn._layer import CPLayer, Rank


class CPLinear(CPLayer):
    """Linear layer y = x Wᵀ + b whose weight is in CP format and never built.

    Stands in for ``torch.nn.Linear``. Forward and backward are products with the Khatri-Rao
    products of the factors (see ``polyadic.functional.cp_linear``), 3·2·B·R·(M+N) FLOPs a training
    step against 3·2·B·M·N.

    Args:
        in_features: M.
        out_features: N.
        bias: own a bias (N,).
        rank: R as an int; a float in (0, 1], the fraction of the dense layer's parameters; or
            ``"break-even"``, the largest rank whose FLOPs do not exceed the dense layer's.
        order: D, modes per side, where ``in_shape`` or ``out_shape`` are not given.
        in_shape: in modes with product M; ``polyadic.tensorize`` by default.
        out_shape: out modes with product N; may differ in number from the in modes.
        memory: what may be kept for the backward: ``"fast"``, ``"balanced"`` or ``"least"``.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        cp: the ``CPTensor`` of shape (M, N) with tensorized shape (in_shape, out_shape).
        bias: (N,) or None.

    Shape:
        (..., M) → (..., N).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, the rank or a shape does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: Rank,
        order: int = 3,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        memory: Memory = "balanced",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = positive_int(in_features, "in_features")
        self.out_features = positive_int(out_features, "out_features")
        default_in, default_out = tensorize(in_features, out_features, order)
        self.in_shape = factored_shape(in_shape, self.in_features, default_in, "in_shape")
        self.out_shape = factored_shape(out_shape, self.out_features, default_out, "out_shape")
        self.memory = check_memory(memory)
        self._own(
            (self.in_shape, self.out_shape),
            rank,
            self.out_features if bias else None,
            device,
            dtype,
        )

    def _unit(self) -> LinearFormat:
        return LinearFormat(self.in_shape, self.out_shape, 1)

    def _fan_in(self) -> int:
        return self.in_features

    @property
    def weight(self) -> Tensor:
        """The dense weight (N, M) in torch's layout, built anew at each access; read-only."""
        return self.cp.to_matrix().t()

    def forward(self, x: Tensor) -> Tensor:
        """(..., M) → (..., N)."""
        if self.frozen is not None:
            y: Tensor = self.frozen(x, self.bias)
            return y
        in_factors, out_factors = self.cp.factor_groups()
        return functional.cp_linear(
            x, in_factors, out_factors, self.bias, weights=self.cp.weights, memory=self.memory
        )

    def extra_repr(self) -> str:
        """Shapes, rank and parameter ratio."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, in_shape={self.in_shape}, "
            f"out_shape={self.out_shape}, {self._ratio()}"
        )
