"""Small classifiers of real digits: converted, finetuned, and trained as CP from the start."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from dataclasses import replace as replace_fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study import fits
from benchmarks.study.store import Store
from examples.demo import models, training
from polyadic import init
from polyadic.fitting import second_moments
from polyadic.nn import CPConv2d, CPLinear
from polyadic.surgery import replace

FILE = "study-digits.jsonl"
FAMILIES = ("MLP", "CNN")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to run; the same for all methods.

    Attributes:
        seeds: Trainings of each kind; number i has seed i.
        ratio: Weights of the converted layers over numbers stored instead, for each layer.
        sweeps: Of alternating least squares, at most.
        penalty: Factor of the penalty Σ_r λ_r² where there is one.
        quick: Few epochs of the trainings.
    """

    seeds: int = 5
    ratio: float = 10.0
    sweeps: int = 50
    penalty: float = 1e-4
    quick: bool = False

    @classmethod
    def short(cls) -> Options:
        """Shorten everything to seconds; the numbers then mean little."""
        return cls(seeds=1, sweeps=2, quick=True)

    def schedule(self, seed: int) -> training.Settings:
        """Of a training from the start: the demo's."""
        return training.Settings.quick(seed) if self.quick else training.Settings(seed)

    def one_epoch(self, seed: int) -> training.Settings:
        """Of the short finetuning; the long one takes the settings of a training."""
        return replace_fields(self.schedule(seed), mlp_epochs=1, cnn_epochs=1)


@dataclass(frozen=True)
class Variant:
    """One way to train a factorized model from the start.

    Attributes:
        key: Name in records.
        label: Name in tables.
        std: Standard deviation of a weight from fan-in and fan-out.
        draw: Fills factors so that the weight has that standard deviation.
        orders: Modes per side, of linear layers and of convolutions.
        penalised: Whether Σ_r λ_r² is added to the loss.
        low_rank: Take a plain low-rank matrix in place of CP.
    """

    key: str
    label: str
    std: Callable[[int, int], float] = lambda fan_in, fan_out: init.torch_std(fan_in)
    draw: Callable[[Sequence[Tensor], float], None] = init.cp_orthonormal_
    orders: tuple[int, int] = (fits.LINEAR_ORDER, fits.CONV_ORDER)
    penalised: bool = False
    low_rank: bool = False


@torch.no_grad()
def gaussian_(factors: Sequence[Tensor], std: float) -> None:
    """Fill factors with normal numbers so that the tensor's entries have variance ``std²``.

    Var(W) = R·σ^(2K) for K factors of variance σ², so σ = (std/√R)^(1/K); tltorch draws like this.
    """
    sigma = (std / math.sqrt(factors[0].shape[1])) ** (1 / len(factors))
    for factor in factors:
        factor.normal_(0, sigma)


VARIANTS = (
    Variant("cp", "CP, orthonormal"),
    Variant("cp-penalty", "CP, orthonormal, λ penalised", penalised=True),
    Variant("gaussian", "CP, Gaussian", draw=gaussian_),
    Variant("gaussian-penalty", "CP, Gaussian, λ penalised", draw=gaussian_, penalised=True),
    Variant("mup", "CP, orthonormal, muP", std=init.mup_std),
    Variant("finer", "CP, orthonormal, one more mode per side", orders=(3, 2)),
    Variant("low-rank", "low rank", low_rank=True),
)


def run(options: Options, out: Path, tell: Tell = print) -> Path:
    """Train, convert, finetune; a record for each seed and way, those in the file not again.

    Args:
        options: what to run.
        out: folder of the records.
        tell: told in a line what is being done.

    Returns:
        The file.

    Raises:
        ImportError: a package is missing.
        ValueError: the file holds records of other settings.
    """
    store = Store(out / FILE, asdict(options))
    for name in FAMILIES:
        for seed in range(options.seeds):
            work = _Work(options, name, seed)
            for key, make in work.all().items():
                if not store.has(family=name, seed=seed, way=key):
                    record = make()
                    tell(f"{name} seed {seed} {key}: {100 * record['accuracy']:.1f} %")
                    store.add(
                        {"kind": "digits", "family": name, "seed": seed, "way": key, **record}
                    )
    return out / FILE


class _Work:
    """All that is to be done with one seed of a family."""

    def __init__(self, options: Options, family: str, seed: int) -> None:
        self._options, self._family, self._seed = options, family, seed
        self._digits = training.load()
        self._dense = next(c for c in models.contestants() if c.family == family)
        self._converted = models.FAMILIES[family].converted
        self._trained: tuple[nn.Module, training.Curve] | None = None

    def all(self) -> dict[str, Callable[[], dict[str, Any]]]:
        return {
            "dense": self.dense,
            **{f"scratch {v.key}": partial(self.scratch, v) for v in VARIANTS},
            **{f"convert {m.key}": partial(self.convert, m) for m in fits.METHODS},
        }

    def original(self) -> tuple[nn.Module, training.Curve]:
        """The dense model, trained once."""
        if self._trained is None:
            self._trained = self._train(self._dense.build, self._options.schedule(self._seed))
        return self._trained

    def dense(self) -> dict[str, Any]:
        model, curve = self.original()
        return {"label": "dense", **self._outcome(model, curve)}

    def scratch(self, variant: Variant) -> dict[str, Any]:
        ratio, penalty = self._options.ratio, None
        if variant.penalised:
            penalty = partial(component_penalty, factor=self._options.penalty)

        def build() -> nn.Module:
            model = self._dense.build()
            for name in self._converted:
                replace(model, name, fresh(model.get_submodule(name), ratio, variant))
            return model

        model, curve = self._train(build, self._options.schedule(self._seed), penalty)
        return {"label": variant.label, **self._outcome(model, curve)}

    def convert(self, method: fits.Method) -> dict[str, Any]:
        model, _ = self.original()
        layers = {name: model.get_submodule(name) for name in self._converted}
        found_moments = second_moments(model, [self._digits.train_x], layers)
        moments = {name: moment.double() for name, moment in found_moments.items()}
        task = fits.Task(
            layers,
            self._options.ratio,
            moments,
            self._options.sweeps,
            [self._digits.train_x],
            lambda model, batch: model(batch),
        )
        student = copy.deepcopy(model)
        start = time.perf_counter()
        made = method.convert(student, task)
        seconds = time.perf_counter() - start
        for name, layer in made.items():
            replace(student, name, layer)
        growth = largest_growth(student)
        found: dict[str, Any] = {
            "label": method.label,
            "fit_seconds": seconds,
            "accuracy_converted": training.accuracy(student, self._digits) / 100,
        }
        finetunings = {
            "accuracy_one_epoch": self._options.one_epoch(self._seed),
            "accuracy": self._options.schedule(self._seed),
        }
        for key, settings in finetunings.items():
            tuned, curve = self._train(partial(copy.deepcopy, student), settings)
            found[key] = curve.accuracy[-1] / 100
        return {**self._outcome(tuned, curve), **found, "growth_converted": growth}

    def _train(
        self,
        build: Callable[[], nn.Module],
        settings: training.Settings,
        penalty: Callable[[nn.Module], Tensor] | None = None,
    ) -> tuple[nn.Module, training.Curve]:
        epochs = settings.epochs(self._family)
        return training.train(build, epochs, self._digits, settings, self._seed, penalty)

    def _outcome(self, model: nn.Module, curve: training.Curve) -> dict[str, Any]:
        names, dense = self._converted, self._dense.build()
        return {
            "accuracy": curve.accuracy[-1] / 100,
            "loss": curve.loss[-1],
            "diverged": not curve.loss[-1] < math.log(models.CLASSES),
            "parameters": sum(weights(model.get_submodule(name)) for name in names),
            "dense_parameters": sum(weights(dense.get_submodule(name)) for name in names),
            "growth": largest_growth(model),
        }


def weights(layer: nn.Module) -> int:
    """Numbers stored for a layer's weight, without the bias."""
    return sum(p.numel() for n, p in layer.named_parameters() if n.split(".")[-1] != "bias")


def fresh(layer: Any, ratio: float, variant: Variant) -> nn.Module:
    """A layer drawn anew, with ``ratio`` times fewer weights than the dense ``layer``."""
    entries = layer.weight.numel()
    linear = isinstance(layer, nn.Linear)
    if variant.low_rank:
        rank = fits.rank_for(ratio, layer.weight.flatten(1).shape, entries)
        if linear:
            return CPLinear(layer.in_features, layer.out_features, rank=rank, order=1)
        return fits.low_rank_conv(layer, rank)
    made: CPLinear | CPConv2d
    if linear:
        order = variant.orders[0]
        made = CPLinear(layer.in_features, layer.out_features, rank=1, order=order)
        rank = fits.rank_for(ratio, [len(f) for f in made.cp.factors], entries)
        made = CPLinear(layer.in_features, layer.out_features, rank=rank, order=order)
    else:
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size)
        order = variant.orders[1]
        made = CPConv2d(*shape, rank=1, order=order)
        rank = fits.rank_for(ratio, [len(f) for f in made.cp.factors], entries)
        made = CPConv2d(*shape, padding=layer.padding, rank=rank, order=order)
    fan_out, fan_in = layer.weight.flatten(1).shape
    variant.draw(list(made.cp.factors), variant.std(fan_in, fan_out))
    return made


def component_penalty(model: nn.Module, factor: float) -> Tensor:
    """``factor`` · Σ_r λ_r² over all CP layers, λ_r being the norm of component r.

    λ_r = Π_k ‖A_k[:, r]‖. Components that grow while they cancel each other are what it holds back.
    """
    terms = [squared_norms(layer).sum() for layer in _cp_layers(model)]
    return factor * torch.stack(terms).sum()


def squared_norms(layer: CPLinear | CPConv2d) -> Tensor:
    """λ² (R,) of a layer's components."""
    norms = [a.square().sum(0) for a in layer.cp.factors]
    return torch.stack(norms).prod(0)


def _cp_layers(model: nn.Module) -> list[CPLinear | CPConv2d]:
    return [m for m in model.modules() if isinstance(m, (CPLinear, CPConv2d))]


@torch.no_grad()
def largest_growth(model: nn.Module) -> float | None:
    """Largest √(Σ_r λ_r²)/‖W‖ of a CP layer, None without one.

    It is 1 where components are orthogonal, and large where they cancel each other.
    """
    found = [
        (squared_norms(layer).sum().sqrt() / layer.cp.to_matrix().norm()).item()
        for layer in _cp_layers(model)
    ]
    return max(found, default=None)
