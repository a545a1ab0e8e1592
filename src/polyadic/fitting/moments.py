"""Second moments of layers' inputs, gathered from calibration batches by hooks.

For a linear layer the mean squared error of the output is ‖Σ^½ (W − Ŵ)‖² with Σ = E[x xᵀ], (M, M).
A convolution is a linear layer on patches: Σ is (Cin·k, Cin·k) in the order of its weight's
``flatten(1)``. An embedding's input is one-hot: Σ is diagonal, the frequencies of the indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyadic.batches import call, evaluating, require_batches
from polyadic.checks import check_module

# Most entries of patches that are unfolded at once.
UNFOLDED = 2**22


def second_moments(
    model: nn.Module,
    batches: Iterable[Any],
    names: Iterable[str],
    *,
    weights: Callable[[Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run batches through a model and gather E[x xᵀ] of the inputs of some of its layers.

    The model is in evaluation mode while it runs, and each module's mode is restored in the end.
    Moments are added up in float32 on the layer's device, one batch after the other, and nothing
    of a batch is kept.

    Args:
        model: holds the layers.
        batches: an iterable of batches, read once: a tensor or another object in it is passed as
            ``model(batch)``, a tuple or list as ``model(*batch)``, a mapping as
            ``model(**batch)``.
        names: names of ``nn.Linear``, ``nn.Conv1d`` to ``3d``, ``nn.ConvTranspose1d`` to ``3d``
            and ``nn.Embedding`` modules, as in ``model.named_modules()``.
        weights: gets a batch and returns how much each position counts, such as an attention mask
            (B, T): the leading dimensions of the inputs of the linear layers and embeddings, the
            batch of convolutions. Positions of weight 0 are left out, even if they hold NaN.

    Returns:
        By name (M, M) for a linear layer; (Cin·k, Cin·k) for a convolution, the mean over its
        groups where there are several; (Cin, Cin) for a transposed convolution, a block for each
        group, which leaves out that its outputs overlap; (V,) for an embedding. These are the
        ``metric`` of ``polyadic.decompose``.

    Raises:
        TypeError: the model is no module, ``batches`` is a single tensor, mapping or text, a name
            belongs to a module of another type, or the weights are no tensor.
        ValueError: a name is not in the model, a layer was never called or saw no position, or
            the weights do not fit a layer's input, are negative or not finite.
    """
    require_batches(batches, "batches", once=True)
    wanted = _named(model, names)
    gathered: dict[nn.Module, _Moment] = {
        module: _Moment(name, module) for name, module in wanted.items()
    }
    hooks = [
        module.register_forward_pre_hook(moment.hook, with_kwargs=True)
        for module, moment in gathered.items()
    ]
    try:
        with evaluating(model):
            for batch in batches:
                counts = None if weights is None else weights(batch)
                if counts is not None:
                    check_weights(counts)
                for moment in gathered.values():
                    moment.weights = counts
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: gathered[module].mean() for name, module in wanted.items()}


def _named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    check_module(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    for name in [names] if isinstance(names, str) else names:
        if name not in modules:
            raise ValueError(f"the model has no module named {name!r}")
        if not isinstance(modules[name], tuple(_READINGS)):
            raise TypeError(
                f"{name} must be a Linear, Conv, ConvTranspose or Embedding of torch, got "
                f"{type(modules[name]).__name__}"
            )
        found[name] = modules[name]
    return found


def check_weights(counts: Any) -> None:
    """Check what the user's ``weights`` returned for a batch.

    Raises:
        TypeError: it is no tensor of real numbers.
        ValueError: some of them are negative or not finite.
    """
    if not isinstance(counts, Tensor) or counts.is_complex():
        got = f"one of {counts.dtype}" if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(f"weights must return a tensor of real numbers for a batch, got {got}")
    if not bool((counts.isfinite() & (counts >= 0)).all()):
        raise ValueError(
            "weights must return how much each position counts, finite and not negative; got a "
            "tensor with others, give 0 for positions to leave out"
        )


class _Moment:
    """The second moment Σ of one layer's input, added up over calls."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.reading = next(r for kind, r in _READINGS.items() if isinstance(module, kind))
        self.blocks: Any = module.groups if self.reading.a_block_for_each_group else 1
        self.weights: Tensor | None = None
        self.total: Tensor | None = None
        self.count = 0.0
        self.called = False

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the input of one call of the layer; it is a forward pre-hook."""
        x = args[0] if args else kwargs["input"]
        self.called = True
        if not isinstance(x, Tensor):
            return  # the layer itself will refuse it
        dims = self.reading.dims
        if self.reading.rows is None:
            self._add_indices(module, x)
            return
        if dims and x.dim() == dims + 1:
            x = x.unsqueeze(0)
        counts = self._counts(x.shape[: 1 if dims else -1], x)
        for rows, each in self.reading.rows(module, x, counts):
            self._add_rows(rows, each)

    def _counts(self, leading: Sequence[int], x: Tensor) -> Tensor | None:
        if self.weights is None:
            return None
        if tuple(self.weights.shape) != tuple(leading):
            raise ValueError(
                f"weights must have the leading dimensions {tuple(leading)} of the input of "
                f"{self.name}, got {tuple(self.weights.shape)}; gather that layer by another call"
            )
        return self.weights.to(x.device, torch.float32).reshape(-1)

    def _add(self, part: Tensor, count: float) -> None:
        self.total = part if self.total is None else self.total.add_(part)
        self.count += count

    def _add_rows(self, rows: Tensor, counts: Tensor | None) -> None:
        rows = rows.to(torch.complex64 if rows.is_complex() else torch.float32)
        scaled, count = rows, float(len(rows))
        if counts is not None:
            seen = counts != 0
            rows, counts = rows[seen], counts[seen]
            scaled, count = rows * counts.unsqueeze(1), float(counts.sum())
        # Autocast may be on for the model; the moments are not to be rounded by it.
        with torch.autocast(rows.device.type, enabled=False):
            self._add(scaled.mH @ rows, count)

    def _add_indices(self, module: Any, indices: Tensor) -> None:
        counts = self._counts(indices.shape, indices)
        found = torch.bincount(indices.reshape(-1), counts, minlength=module.num_embeddings)
        self._add(found.float(), float(indices.numel() if counts is None else counts.sum()))

    def mean(self) -> Tensor:
        """Return Σ.

        Raises:
            ValueError: the layer was never called, or saw no position of positive weight.
        """
        if not self.called:
            raise ValueError(
                f"{self.name} was never called by the model: there were no batches, or its forward "
                f"is bypassed, as a fast path of torch's transformer layers does"
            )
        if self.total is None or self.count <= 0:
            raise ValueError(f"{self.name} saw no position of positive weight")
        mean = self.total / self.count
        if self.blocks > 1:
            block = torch.arange(len(mean), device=mean.device) // (len(mean) // self.blocks)
            mean = mean * (block.unsqueeze(0) == block.unsqueeze(1))
        return mean


# Rows that a layer multiplies with its weight, and how much each of them counts.
_Rows = Iterator[tuple[Tensor, Tensor | None]]


def _vectors(module: Any, x: Tensor, counts: Tensor | None) -> _Rows:
    """Yield the input (..., M) of a linear layer as rows."""
    yield x.reshape(-1, x.shape[-1]), counts


def _positions(module: Any, x: Tensor, counts: Tensor | None) -> _Rows:
    """Yield the input (B, Cin, *S) of a transposed convolution, a row for each position."""
    x = x.movedim(1, -1)
    if counts is not None:
        counts = counts.repeat_interleave(math.prod(x.shape[1:-1]))
    yield x.reshape(-1, x.shape[-1]), counts


def _patches(module: Any, x: Tensor, counts: Tensor | None) -> _Rows:
    """Yield the patches of a convolution, a row for each group, some images at a time."""
    kernel, dilation = module.kernel_size, module.dilation
    x = _padded(module, x)
    for dim, (size, step, spread) in enumerate(
        zip(kernel, module.stride, dilation, strict=True), start=2
    ):
        x = x.unfold(dim, spread * (size - 1) + 1, step)[..., ::spread]
    dims = len(kernel)
    channels = module.in_channels // module.groups
    x = x.reshape(len(x), module.groups, channels, *x.shape[2:]).movedim(2, 2 + dims)
    per_image = math.prod(x.shape[1:])
    images = max(1, UNFOLDED // per_image)
    for start in range(0, len(x), images):
        part = x[start : start + images]
        lines = max(1, math.ceil(part.shape[2] * UNFOLDED / max(UNFOLDED, per_image)))
        for first in range(0, part.shape[2], lines):
            piece = part[:, :, first : first + lines]
            rows = piece.reshape(-1, math.prod(piece.shape[2 + dims :]))
            each = None
            if counts is not None:
                each = counts[start : start + images].repeat_interleave(len(rows) // len(piece))
            yield rows, each


def _padded(module: Any, x: Tensor) -> Tensor:
    """Return the input with the convolution's padding."""
    amounts: list[int] = []
    for dim, (size, spread) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        if module.padding == "same":
            total = spread * (size - 1)
            pair = [total // 2, total - total // 2]
        else:
            pair = [0, 0] if module.padding == "valid" else [module.padding[dim]] * 2
        amounts = pair + amounts
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, amounts, mode=mode) if any(amounts) else x


@dataclass(frozen=True)
class _Reading:
    """How the inputs of one class of torch's layers are read.

    Attributes:
        rows: makes rows of an input; None for a lookup, whose input are indices.
        dims: number of spatial dimensions, 0 for layers that have none.
        a_block_for_each_group: whether the weight multiplies the channels of each group of channels
            separately, so that Σ has a block for each.
    """

    rows: Callable[[Any, Tensor, Tensor | None], _Rows] | None
    dims: int = 0
    a_block_for_each_group: bool = False


# The table of the layers whose inputs are read; a layer is read as the first class it belongs to.
_READINGS: dict[type[nn.Module], _Reading] = {
    nn.Linear: _Reading(_vectors),
    nn.Embedding: _Reading(None),
    nn.Conv1d: _Reading(_patches, 1),
    nn.Conv2d: _Reading(_patches, 2),
    nn.Conv3d: _Reading(_patches, 3),
    nn.ConvTranspose1d: _Reading(_positions, 1, True),
    nn.ConvTranspose2d: _Reading(_positions, 2, True),
    nn.ConvTranspose3d: _Reading(_positions, 3, True),
}
