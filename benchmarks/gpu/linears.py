"""Who competes in a linear cell."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import polyadic
from benchmarks.gpu import floors
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.captured import Started, uncaptured_in_double
from benchmarks.gpu.contest import MOST_WEIGHTS, Cell, Contestant, NotApplicableError
from benchmarks.gpu.switch import has_kernels, without_kernels
from polyadic import functional
from polyadic.nn import CPLinear


def explained(batch: int) -> Any:
    """The plan of a layer and its predicted seconds."""

    def explain(module: Any, training: bool) -> tuple[str, float]:
        chosen = polyadic.explain(module, batch=batch, training=training).chosen
        return str(chosen.plan), chosen.seconds

    return explain


def cell(
    bench: Bench,
    T: int,
    M: int,
    N: int,
    R: int,
    *,
    group: str,
    modes: tuple[str, ...] = floors.MODES,
    order: int = 3,
) -> Cell:
    """One linear layer with T rows."""
    ins, outs = polyadic.tensorize(M, N, order=order)
    parameters = R * (sum(ins) + sum(outs))
    end = "" if bench.dtype == torch.bfloat16 else f"_{bench.dtype_name()}"
    end += f"_order{order}" if order != 3 else ""

    def inputs() -> Tensor:
        return bench.randn(T, M).requires_grad_("training" in modes)

    return Cell(
        name=f"{group}_{M}x{N}_R{R}_T{T}{end}",
        title=f"{M}→{N} R={R} T={T}",
        layer="linear",
        group=group,
        x_shape=(T, M),
        y_shape=(T, N),
        rank=R,
        inputs=inputs,
        grad=partial(bench.randn, T, N),
        floors=floors.linear(T, M, N, R, parameters, bench.size),
        modes=modes,
        x_bytes=bench.size * T * (M + N),
        weight_bytes=bench.size * M * N,
        facts={
            "T": T,
            "in": M,
            "out": N,
            "tensorized_shape": [ins, outs],
            "batch": T,
            "parameters": parameters,
            "dense_parameters": M * N,
        },
    )


# Layers of ours that take turns: their factors are so small that they stay in the L2 cache anyway.
OURS_COPIES = 4


class Forced(nn.Module):
    """A CP linear layer that obeys a plan."""

    def __init__(self, layer: CPLinear, plan: polyadic.LinearPlan) -> None:
        super().__init__()
        self.layer, self.plan = layer, plan

    def forward(self, x: Tensor) -> Tensor:
        """(T, M) → (T, N)."""
        ins, outs = self.layer.cp.factor_groups()
        return functional.cp_linear(x, ins, outs, self.layer.bias, plan=self.plan)


def _thawed(module: nn.Module) -> nn.Module:
    return polyadic.unfreeze(copy.deepcopy(module)).double()


class Makers:
    """Makes the contestants of linear cells of one size."""

    def __init__(self, bench: Bench, T: int, M: int, N: int, R: int, order: int = 3) -> None:
        self.bench, self.T, self.M, self.N, self.R, self.order = bench, T, M, N, R, order
        self.where: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
        # As many dense weights as keep them out of the L2 cache.
        self.dense_copies = bench.rotations(bench.size * M * N, MOST_WEIGHTS)

    def layer(self, bias: bool = False) -> CPLinear:
        """Our layer."""
        return CPLinear(self.M, self.N, bias, rank=self.R, order=self.order, **self.where)

    def ours(self) -> Contestant:
        """Our layer as users have it."""
        plan = explained(self.T)
        return Contestant("polyadic", "ours", self.layer, copies=OURS_COPIES, explained=plan)

    def aten(self) -> list[Contestant]:
        """Our layer by torch's operations, where there are kernels to be switched off."""
        if not has_kernels():
            return []
        name = "polyadic, no kernels"
        return [Contestant(name, "aten", self.layer, without_kernels, copies=OURS_COPIES)]

    def biased(self) -> list[Contestant]:
        """Both layers with a bias."""
        dense = partial(nn.Linear, self.M, self.N, **self.where)
        return [
            Contestant("polyadic, bias", "ours", partial(self.layer, True)),
            Contestant("dense, bias", "dense", dense, copies=self.dense_copies),
        ]

    def frozen(self) -> Contestant:
        """Our layer, its factors contracted beforehand."""

        def build() -> nn.Module:
            return polyadic.freeze(self.layer().eval(), batch=self.T)

        return Contestant("polyadic, frozen", "ours", build, inference=True, exact=_thawed)

    def dense(self) -> Contestant:
        """Torch's layer."""
        build = partial(nn.Linear, self.M, self.N, bias=False, **self.where)
        return Contestant(
            "dense", "dense", build, copies=self.dense_copies, explained=self._dense_explained
        )

    def _dense_explained(self, module: nn.Module, training: bool) -> tuple[str, float]:
        layer = CPLinear(
            self.M,
            self.N,
            False,
            rank=self.R,
            order=self.order,
            device="meta",
            dtype=self.bench.dtype,
        )
        kind = self.bench.device.type
        found = polyadic.explain(layer, batch=self.T, training=training, device=kind)
        return "dense layer", found.dense.seconds

    def pair(self) -> Contestant:
        """Two dense layers with R features between them: what a low-rank layer costs at least."""

        def build() -> nn.Module:
            return nn.Sequential(
                nn.Linear(self.M, self.R, bias=False, **self.where),
                nn.Linear(self.R, self.N, bias=False, **self.where),
            )

        return Contestant("low-rank pair", "pair", build)

    def tltorch(self) -> Contestant:
        """tensorly-torch's factorized layer."""

        def build() -> nn.Module:
            try:
                import tltorch
            except ImportError as error:
                raise NotApplicableError(f"{error.name} is not installed") from error
            ins, outs = polyadic.tensorize(self.M, self.N, order=self.order)
            layer: nn.Module = tltorch.FactorizedLinear(
                ins,
                outs,
                bias=False,
                factorization="cp",
                rank=self.R,
                implementation="factorized",
                **self.where,
            )
            return layer

        return Contestant("tltorch", "tltorch", build, copies=1)

    def started(self, contestant: Contestant, label: str, how: str) -> Contestant:
        """A contestant whose module is captured or compiled; one copy, as each takes its time."""

        def build() -> nn.Module:
            return Started(contestant.build(), how, self.bench.compiler)

        return Contestant(
            f"{contestant.name}, {label}",
            contestant.family,
            build,
            copies=1,
            exact=uncaptured_in_double,
            launches=("eager",),
        )

    def plans(self, wanted: Sequence[str] | None = None) -> list[Contestant]:
        """Our layer with plans forced on it."""
        D = self.order
        whole, split, single = (D,), (1, D - 1), (1,) * D
        by: Any = "triton" if has_kernels() else "torch"
        routes = {
            "Khatri-Rao": polyadic.LinearRoute(whole, whole, by=by),
            "split": polyadic.LinearRoute(split, split),
            "per factor": polyadic.LinearRoute(single, single),
            "rebuild": polyadic.LinearRoute(whole, whole, "dense"),
        }
        made = []
        for name, route in routes.items():
            if wanted is not None and name not in wanted:
                continue
            for keep in (1, 0) if name == "Khatri-Rao" else (int(name != "rebuild"),):
                plan = polyadic.LinearPlan(route, route, keep)
                label = (
                    f"plan {name}{', keeps x alone' if name == 'Khatri-Rao' and not keep else ''}"
                )
                made.append(Contestant(label, "plan", partial(self._forced, plan)))
        return made

    def _forced(self, plan: polyadic.LinearPlan) -> nn.Module:
        return Forced(self.layer(), plan)
