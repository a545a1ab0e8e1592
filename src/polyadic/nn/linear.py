"""The linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from polyadic import functional
from polyadic.checks import check_flag, check_memory
from polyadic.formats import LinearFormat, Rank, factored_shape, positive_int, tensorize
from polyadic.nn.convert import Exchangeable, FitOptions, Fitted, convert, revert
from polyadic.nn.inputs import by_rows, call_recorded
from polyadic.plans import Memory
from polyadic.tensor import CPTensor

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CPLinear(Exchangeable):
    """Linear layer y = x Wᵀ + b whose weight is in CP format.

    Stands in for ``torch.nn.Linear``. Forward and backward are products with the Khatri-Rao
    products of the factors (see ``polyadic.functional.cp_linear``), which take 3·2·B·R·(M+N) FLOPs
    a training step where the dense layer takes 3·2·B·M·N. For many rows and a high rank the planner
    may rebuild W for a pass; ``polyadic.explain`` says so.

    Args:
        in_features: M.
        out_features: N.
        bias: whether the layer has a bias (N,).
        rank: R as an int; a float in (0, 1], the fraction of the dense layer's parameters; or
            a word for the largest rank that does not compute more than the dense layer,
            ``"break-even"``, or is predicted to be faster, ``"faster"`` (see
            ``polyadic.rank_for``).
        order: D, modes per side, where ``in_shape`` or ``out_shape`` are not given.
        in_shape: in modes with product M; ``polyadic.tensorize`` by default.
        out_shape: out modes with product N; may differ in number from the in modes.
        memory: what may be kept for the backward: ``"fast"``, ``"balanced"`` or ``"least"``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Attributes:
        cp: the ``CPTensor`` of shape (M, N) with tensorized shape (in_shape, out_shape):
            in factors first, as x W is written; a convolution has its out factors first.
        bias: (N,) or None.
        weight: the dense weight (N, M), read-only.

    Shape:
        (..., M) → (..., N).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, the rank or a shape does not fit.
    """

    _torch_class = nn.Linear
    _shared_arguments = ("in_features", "out_features", "bias")

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
        self._create(
            (self.in_shape, self.out_shape),
            rank,
            self.out_features if check_flag(bias, "bias") else None,
            device,
            dtype,
        )

    def _format_of_rank_1(self) -> LinearFormat:
        return LinearFormat(self.in_shape, self.out_shape, 1)

    def _fan_in(self) -> int:
        return self.in_features

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: Rank | None = None,
        order: int = 3,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        memory: Memory = "balanced",
        cp: Fitted | None = None,
        **fit: Unpack[FitOptions],
    ) -> CPLinear:
        """Make a CPLinear whose weight is fitted to that of a ``torch.nn.Linear``.

        Features, bias, dtype, device, ``training`` and ``requires_grad`` (the weight's for every
        factor) are kept; no storage is shared. The fit is ``polyadic.decompose``'s, exact where
        the rank suffices.

        Args:
            linear: the trained layer.
            rank: as in the constructor; None where ``cp`` is given.
            order: D, modes per side, where ``in_shape`` or ``out_shape`` are not given.
            in_shape: in modes.
            out_shape: out modes.
            memory: what may be kept for the backward.
            cp: a fitted weight, a ``CPTensor`` or a ``Decomposition`` of this layer's tensorized
                shape, which is copied; nothing is fitted then.
            fit: options of ``polyadic.decompose``; ``metric`` is the second moment (M, M) of the
                input.

        Raises:
            TypeError: ``linear`` is not a ``torch.nn.Linear`` itself, or its weight is not plain.
            ValueError: its weight is computed or has no values, something attached to it would be
                lost, or an argument does not fit.
        """
        return convert(
            cls,
            linear,
            "from_linear",
            rank,
            cp,
            order=order,
            in_shape=in_shape,
            out_shape=out_shape,
            memory=memory,
            **fit,
        )

    def to_linear(self) -> nn.Linear:
        """Make the ``torch.nn.Linear`` with this layer's dense weight; its flags are kept.

        Its weight requires a gradient if a factor does.
        """
        return cast(nn.Linear, revert(self))

    def _fit_target(self, weight: Tensor) -> Tensor:
        return weight.t()

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _dense_weight(self) -> Tensor:
        return self.cp._to_transposed()

    def forward(self, x: Tensor) -> Tensor:
        """(..., M) → (..., N); a jagged nested tensor gives a jagged one."""
        if not isinstance(x, Tensor):
            if (recorded := call_recorded(self, x)) is not None:
                return recorded
        elif x.is_nested:
            return by_rows(self.forward, x)
        # The dicts are read because a module's getattr is slow. A parametrized bias is in neither.
        parts: dict[str, Any] = self._modules
        own = self._parameters
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401 - not looked up each time
        if parts.get("frozen") is not None:
            y: Tensor = parts["frozen"].forward(x, bias)
            return y
        cp: CPTensor = parts["cp"]
        (in_factors, out_factors), scale = cp.parts()
        return functional.cp_linear(
            x, in_factors, out_factors, bias, weights=scale, memory=self.memory
        )

    def extra_repr(self) -> str:
        """Say shapes, rank and parameter ratio."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, in_shape={self.in_shape}, "
            f"out_shape={self.out_shape}, {self._ratio()}"
        )
