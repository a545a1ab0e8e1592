"""Alternating least squares for the CP format: one sweep updates every factor once.

All updates lower one objective, so that it never rises:

    F(A) = ‖Σ^½ (W − Ŵ)‖² + τ Σ_r ‖w_r‖²,      Ŵ = Σ_r w_r = KA KCᵀ

The second term, the squared norms of the components w_r, bounds them: with τ > 0 the infimum is
attained, and components cannot grow against each other without end (Lim & Comon, J. Chemometrics
2009, §5; Phan et al., ECCV 2020, bound this quantity). The term needs no balanced factors, since a
component's norm does not depend on how it is spread over the modes.

The update of a mode d minimises F over its factor A_d, with all others fixed. As Ŵ is linear in
A_d, with K the Khatri-Rao product of all other factors, F is quadratic. For a mode outside the
metric, setting ½ ∂F/∂A_d to zero gives

    A_d KᵀΣK − W_dᵀΣK + τ A_d D = 0       (error, weight, penalty), that is

    A_d (G + τ D) = Y,    G = KᵀΣK = (KAᵀ Σ KA) ∘ Π_{e≠d} C_eᵀ C_e,    D = diag(Π_{e≠d} ‖a_e‖²),

where Y, the weight matricized in mode d times ΣK, is the MTTKRP. Of complex numbers the second
factor of each of these products is the conjugate, as it stems from the conjugate of Ŵ. The modes of
the metric's side are coupled by Σ and solved in ``metric``.

The modes of one side share a product of the weight with the other side's Khatri-Rao product (a
dimension tree of two leaves: Phan, Tichavský & Cichocki, IEEE TSP 2013). How the systems are
solved stands in ``normal``.

After the right side's last update the error costs no further pass over the weight: with the
current factors ⟨Ŵ, ΣW⟩ = ⟨A_d, Y⟩ and ⟨Ŵ, ΣŴ⟩ is the sum of all entries of the full Gram matrix,
so that f = ⟨W, ΣW⟩ − 2 ⟨A_d, Y⟩ + Σ_{r,r'} G_full[r,r']. This difference loses digits where f is
small, and there f is measured from the residual.

Axes: p left modes flattened, q right modes flattened, r rank; a mode's factor is (n_d, R).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from polyadic.fitting.metric import solve_in_metric
from polyadic.fitting.normal import contract_but, gram, solve_step
from polyadic.fitting.problem import Problem, balanced, inner, wide
from polyadic.kernels.multilinear import khatri_rao


class Sweeper:
    """Factors under alternating least squares.

    Args:
        problem: what is fitted.
        factors: a (n_d, R) tensor per fitted mode, left and then right.

    Attributes:
        factors: the current factors, balanced after every sweep.
        power: ⟨W, Σ W⟩.
    """

    def __init__(self, problem: Problem, factors: Sequence[Tensor]) -> None:
        self.problem = problem
        self.power = problem.power()
        self.factors = balanced(factors)
        self._estimate, self._measured = math.nan, False

    def sweep(self, tau: float) -> float:
        """Update every factor once.

        Args:
            tau: weight of the squared component norms, relative to the weight's own scale.

        Returns:
            F divided by the power of the weight, ⟨W, Σ W⟩.
        """
        for side in (0, 1):
            self._update_side(side, tau)
        self.factors = balanced(self.factors)
        return self.objective(tau)

    def objective(self, tau: float) -> float:
        """Return F after the last sweep, relative to the power of the weight."""
        error = self.squared_error()
        return error + tau * self.component_power() / self.power

    def squared_error(self) -> float:
        """Return the relative squared error after the last sweep.

        Where it is small it is measured from the residual, once, and else taken from the normal
        equations.
        """
        small = 1e-6 if torch.finfo(self.problem.matrix.dtype).bits == 64 else 1e-3
        if not self._measured and self._estimate <= small:
            self._estimate = self.problem.residual(self.factors)[0] / self.power
            self._measured = True
        return self._estimate

    def component_power(self) -> float:
        """Return Σ_r ‖w_r‖²."""
        squares = [wide(factor).abs().square().sum(0) for factor in self.factors]
        return float(torch.stack(squares).prod(0).sum())

    def _update_side(self, side: int, tau: float) -> None:
        """Update the factors of the left (0) or right (1) modes one after the other."""
        problem, cut = self.problem, len(self.problem.left)
        own, other = range(cut), range(cut, len(self.factors))
        target = problem.weighted
        if side == 1:
            own, other, target = other, own, target.t()
        others = [self.factors[d] for d in other]
        outer, norms = self._outer_gram(others, side)
        projected = _Projection(target, [f.conj() for f in others], problem.matrix.numel())
        grams = {d: gram(self.factors[d]) for d in own}
        rhs = None
        for d in own:
            rest = [e for e in own if e != d]
            rhs = projected.mttkrp([self.factors[e].conj() for e in own], d - own.start)  # Y
            diagonal = norms.clone()  # D
            for e in rest:
                diagonal *= grams[e].diagonal().real
            if side == 0 and problem.metric is not None:
                self.factors[d] = solve_in_metric(
                    problem.metric,
                    [self.factors[e] for e in own],
                    d,
                    rhs,
                    outer,
                    tau * diagonal,
                )
            else:
                system = outer  # G
                for e in rest:
                    system = system * grams[e]
                self.factors[d] = solve_step(self.factors[d], rhs, system, tau * diagonal)
            grams[d] = gram(self.factors[d])
        if side == 1 and rhs is not None:
            full = outer  # G_full
            for e in own:
                full = full * grams[e]
            cross = inner(self.factors[own[-1]], rhs)
            squared = self.power - 2 * cross + float(full.sum().real)  # f
            self._estimate, self._measured = max(squared, 0.0) / self.power, False

    def _outer_gram(self, others: Sequence[Tensor], side: int) -> tuple[Tensor, Tensor]:
        """Return KᵀΣK (R, R) of the other side and ‖k_r‖² (R,) of its columns, both wide."""
        grams = [gram(factor) for factor in others]
        plain = grams[0]
        for other in grams[1:]:
            plain = plain * other
        if side == 0 or self.problem.metric is None:
            return plain, plain.diagonal().real.clone()
        product = khatri_rao(others)
        in_metric = wide(product.t() @ self.problem.apply_metric(product).conj())
        return (in_metric + in_metric.mH) / 2, plain.diagonal().real.clone()


class _Projection:
    """The weight times the other side's Khatri-Rao product, from which a side's MTTKRPs follow.

    The product is kept whole, (P, R), where it takes no more memory than twice the weight or one
    Gram matrix; otherwise it is made anew for every mode, some components at a time.
    """

    def __init__(self, target: Tensor, others: Sequence[Tensor], weight_size: int) -> None:
        self.target, self.others = target, others
        rank = others[0].shape[1]
        budget = max(2 * weight_size, rank * rank)
        self.step = max(1, min(rank, budget // max(target.shape)))
        self.whole: Tensor | None = None
        if len(target) * rank <= budget:
            self.whole = target.new_empty(len(target), rank)
            for part in self._parts():
                self.whole[:, part] = target @ khatri_rao([f[:, part] for f in others])

    def _parts(self) -> list[slice]:
        rank = self.others[0].shape[1]
        return [slice(i, min(rank, i + self.step)) for i in range(0, rank, self.step)]

    def mttkrp(self, own: Sequence[Tensor], d: int) -> Tensor:
        """Contract with the factors of the own side except that of mode d: (n_d, R)."""
        if len(own) == 1 and self.whole is not None:
            return self.whole
        result = torch.empty_like(own[d])
        for part in self._parts():
            factors = [factor[:, part] for factor in own]
            if self.whole is not None:
                product = self.whole[:, part]
            else:
                product = self.target @ khatri_rao([f[:, part] for f in self.others])
            result[:, part] = contract_but(product, factors, d)
        return result
