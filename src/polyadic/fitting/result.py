"""What a fit returns: the CP tensor, how good it is, and how fragile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyadic.fitting.normal import gram
from polyadic.tensor import CPTensor


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A weight's CP format as ``polyadic.decompose`` found it. ``print`` it for the reasons.

    Attributes:
        cp: the ``CPTensor``, without λ, every component's norm spread evenly over the modes; in
            the weight's dtype, on its device.
        error: ‖Σ^½(W − Ŵ)‖ / ‖Σ^½W‖ in the metric that was minimised (with its damping); the
            Frobenius error where there is none.
        frobenius_error: ‖W − Ŵ‖ / ‖W‖.
        growth: √(Σ_r ‖w_r‖²) / ‖W‖ for the components w_r: 1 where they are orthogonal, large
            where they cancel each other.
        sensitivity: Σ_d n_d Σ_r Π_{k≠d} ‖a_kr‖² / ‖W‖², the expected squared relative change of
            the weight under noise of variance 1 in every factor entry (Phan et al., ECCV 2020).
        congruence: largest |cosine| between two components.
        mean_congruence: root mean square of the cosines between all pairs.
        start: what the fit began with, the winner of the race where there were several.
        raced: (start, error) of every start when the race was decided.
        further: errors in the end of the fits that followed from random starts.
        regularization: τ at the end.
        iterations: sweeps over all factors, those of starts and fits that lost not counted.
        history: relative error in the metric after each of them.
        seconds: wall-clock time, starts and race included.
        converged: whether it ended by itself, and not by a limit or the callback.
        reason: why it ended.
    """

    cp: CPTensor
    error: float
    frobenius_error: float
    growth: float
    sensitivity: float
    congruence: float
    mean_congruence: float
    start: str
    raced: tuple[tuple[str, float], ...]
    further: tuple[float, ...]
    regularization: float
    iterations: int
    history: tuple[float, ...] = field(repr=False)
    seconds: float
    converged: bool
    reason: str

    def __str__(self) -> str:
        """A few lines: errors, fragility, where it began, why it ended."""
        cp = self.cp
        own, dense = sum(f.numel() for f in cp.factors), math.prod(cp.shape)
        others = ", ".join(f"{name} {error:.4g}" for name, error in self.raced)
        further = ", ".join(f"{error:.4g}" for error in self.further)
        lines = [
            f"{cp.tensorized_shape} at rank {cp.rank}: {own} parameters for {dense} "
            f"({dense / own:.2f}x fewer)",
            f"relative error {self.error:.4g}; Frobenius {self.frobenius_error:.4g}",
            f"growth {self.growth:.3g} (1: orthogonal components), largest congruence "
            f"{self.congruence:.3f}, sensitivity {self.sensitivity:.3g}, "
            f"regularization {self.regularization:.1g}",
            f"began with {self.start}" + (f" (race: {others})" if len(self.raced) > 1 else ""),
            *([f"further fits from random starts: {further}"] if further else []),
            f"{self.reason} after {self.iterations} sweeps, {self.seconds:.2f} s",
        ]
        return "\n".join(lines)


class DecomposeInterrupted(KeyboardInterrupt):
    """Ctrl-C during a fit; ``decomposition`` holds what was reached, fit to be a ``start``."""

    def __init__(self, decomposition: Decomposition) -> None:
        super().__init__("decompose was interrupted; the result so far is in .decomposition")
        self.decomposition = decomposition


@dataclass(frozen=True)
class Fragility:
    """How components lie to each other; see ``Decomposition``."""

    growth: float
    sensitivity: float
    congruence: float
    mean_congruence: float


def fragility(factors: Sequence[Tensor], norm: float) -> Fragility:
    """Judge the components of some factors.

    Args:
        factors: (n_d, R) each.
        norm: ‖W‖.
    """
    rank = factors[0].shape[1]
    cosines = torch.ones(rank, rank, dtype=torch.float64, device=factors[0].device)
    squares = []
    for factor in factors:
        product = gram(factor)
        square = product.diagonal().clone()
        scale = square.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
        cosines *= product * scale.unsqueeze(0) * scale.unsqueeze(1)
        squares.append(square)
    stacked = torch.stack(squares)
    # Products of all squares but one, without dividing by a zero.
    sensitivity = sum(
        len(factor) * float(torch.cat([stacked[:d], stacked[d + 1 :]]).prod(0).sum())
        for d, factor in enumerate(factors)
    )
    cosines.fill_diagonal_(0)
    pairs = max(1, rank * (rank - 1))
    norm = norm or 1.0
    return Fragility(
        growth=math.sqrt(float(stacked.prod(0).sum())) / norm,
        sensitivity=sensitivity / norm**2,
        congruence=min(1.0, float(cosines.abs().max())),
        mean_congruence=math.sqrt(float(cosines.square().sum()) / pairs),
    )
