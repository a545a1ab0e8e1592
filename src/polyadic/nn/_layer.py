"""What layers share: a CP weight, a bias, and initialisation as the torch layer's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polyadic._format import Shape
from polyadic._plan import Memory
from polyadic.init import torch_bias_, torch_std
from polyadic.nn._frozen import Frozen
from polyadic.tensor import CPTensor

Rank = int | float | str


class CPLayer(nn.Module):
    """What layers share: a CP weight, a bias, and initialisation as the torch layer's."""

    cp: CPTensor
    bias: nn.Parameter | None
    memory: Memory
    frozen: Frozen | None
    _in_group, _out_group = 0, 1

    def _own(
        self,
        tensorized_shape: Sequence[Shape],
        rank: int,
        bias: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Create the parameters and fill them; ``bias`` is its length, or None."""
        self.frozen = None
        # Made without values: reset_parameters draws them, once.
        empty = CPTensor(tensorized_shape, rank, device="meta", dtype=dtype)
        self.cp = empty.to_empty(device=device or torch.get_default_device())
        values = None if bias is None else torch.empty(bias, device=device, dtype=dtype)
        self.register_parameter("bias", None if values is None else nn.Parameter(values))
        self.reset_parameters()

    def _fan_in(self) -> int:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw factors and bias anew with the output variance of the torch layer replaced.

        For inputs of independent entries with mean square q, Var(y) = fan_in · Var(W) · q + Var(b).
        torch draws W from U(−1/√fan_in, 1/√fan_in), so Var(W) = 1/(3 fan_in); the factors are drawn
        such that the entries of their CP tensor have that very variance
        (``polyadic.init.cp_orthonormal_``), and the bias as torch draws it.
        """
        fan_in = self._fan_in()
        self.cp.reset_parameters(torch_std(fan_in))
        if self.bias is not None:
            torch_bias_(self.bias, fan_in)

    @property
    def in_factors(self) -> tuple[Tensor, ...]:
        """Tensors (m_d, R) of the in modes."""
        return self.cp.factor_groups()[self._in_group]

    @property
    def out_factors(self) -> tuple[Tensor, ...]:
        """Tensors (n_d, R) of the out modes."""
        return self.cp.factor_groups()[self._out_group]

    @property
    def rank(self) -> int:
        """R, the number of rank-one components."""
        return self.cp.rank

    def _dense_parameters(self) -> int:
        """Number of entries of the dense weight this layer stands for."""
        return math.prod(self.cp.shape)

    def _ratio(self) -> str:
        own, dense = sum(f.numel() for f in self.cp.factors), self._dense_parameters()
        return f"rank={self.rank}, parameters={own} of {dense} ({dense / own:.1f}x fewer)"
