"""A solve: Fourier neural operators learn Burgers' equation, with weights in several formats.

    u_t + u u_x = ν u_xx on the circle of length 1,     u(x, 0) ↦ u(x, 1)

The data are made from the equation: initial values are drawn from a Gaussian process and taken to
t = 1 by a pseudo-spectral scheme, the linear term exactly (an integrating factor) and the rest by
Runge and Kutta's method of order 4. An error is the relative L2 error on values that no model has
seen.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from neuralop.models import FNO
from torch import Tensor, nn

import polyadic
from benchmarks.records import append, environment, read
from benchmarks.spectral.equal import nearest_share

VISCOSITY, POSITIONS, EVERY, STEPS_OF_TIME = 0.01, 256, 2, 1000
TRAINED, TESTED, BATCH = 512, 128, 16
WIDTH, MODES, BLOCKS, RATE = 32, 32, 4, 3e-3
# Shares of the dense weights' parameters.
RANKS = (0.1, 0.03)
# A curve has the error on unseen values at this many points.
POINTS = 10


def initial(samples: int, generator: torch.Generator) -> Tensor:
    """Draw u(x, 0): covariance 625 (-Δ + 25)⁻², mean zero, as in Li et al. (2021)."""
    k = torch.arange(POSITIONS // 2 + 1, dtype=torch.float64)
    deviation = 25.0 / ((2 * math.pi * k) ** 2 + 25.0)
    deviation[0] = 0.0
    shape = samples, len(k)
    noise = torch.randn(shape, generator=generator, dtype=torch.complex128)
    return torch.fft.irfft(noise * deviation, n=POSITIONS, norm="forward")


def solved(u: Tensor) -> Tensor:
    """Take u(x, 0) (b, n) to u(x, 1)."""
    n, dt = u.shape[-1], 1.0 / STEPS_OF_TIME
    k = 2 * math.pi * torch.arange(n // 2 + 1, dtype=torch.float64)
    # The product u u has twice the frequencies of u: those above two thirds would come back false.
    kept = torch.arange(n // 2 + 1) <= n // 3
    half, derivative = torch.exp(-VISCOSITY * k**2 * dt / 2), -0.5j * k * kept

    def slope(v: Tensor) -> Tensor:
        return derivative * torch.fft.rfft(torch.fft.irfft(v, n=n).square())

    v = torch.fft.rfft(u)
    for _ in range(STEPS_OF_TIME):
        a = slope(v)
        b = slope(half * (v + dt / 2 * a))
        c = slope(half * v + dt / 2 * b)
        d = slope(half.square() * v + dt * half * c)
        v = half.square() * (v + dt / 6 * a) + dt / 3 * half * (b + c) + dt / 6 * d
    return torch.fft.irfft(v, n=n)


def data() -> tuple[Tensor, Tensor]:
    """Initial values and solutions (b, 1, n), on every second position."""
    u = initial(TRAINED + TESTED, torch.Generator().manual_seed(0))
    pairs = u, solved(u)
    first, last = (t[:, None, ::EVERY].float() for t in pairs)
    return first, last


@dataclass(frozen=True)
class Model:
    """A model of the contest.

    Args:
        name: in records.
        options: of neuraloperator's FNO.
        within: makes the context in which it trains.
    """

    name: str
    options: dict[str, Any]
    within: Callable[[], Any] = contextlib.nullcontext

    def make(self) -> nn.Module:
        """Make the model."""
        made: nn.Module = FNO(
            n_modes=(MODES,),
            in_channels=1,
            out_channels=1,
            hidden_channels=WIDTH,
            n_layers=BLOCKS,
            implementation="factorized",
            **self.options,
        )
        return made


def spectral_parameters(model: nn.Module) -> int:
    """Count the real numbers in the weights of spectral convolutions."""
    named = model.named_parameters()
    return sum(p.numel() * (1 + p.is_complex()) for n, p in named if ".convs." in n)


def tucker_like(parameters: int) -> dict[str, Any]:
    """Options of the Tucker model whose weights have nearest to so many numbers."""

    def options(share: float) -> dict[str, Any]:
        return {"factorization": "Tucker", "rank": share}

    def count(share: float) -> int:
        return spectral_parameters(Model("", options(share)).make())

    return options(nearest_share(count, parameters))


def models() -> list[Model]:
    """Dense; then CP in neuraloperator and on our arithmetic, and Tucker, at equal parameters."""
    found = [Model("dense", {"factorization": None})]
    for rank in RANKS:
        options = {"factorization": "CP", "rank": rank}
        parameters = spectral_parameters(Model("", options).make())
        found.append(Model(f"tucker {rank:g}", tucker_like(parameters)))
        found.append(Model(f"cp {rank:g}", options))
    ours = partial(polyadic.accelerate_neuralop, transforms=True)
    options = {"factorization": "CP", "rank": RANKS[0]}
    found.append(Model(f"cp {RANKS[0]:g} accelerated", options, ours))
    return found


def relative(got: Tensor, want: Tensor) -> Tensor:
    """Mean relative L2 error."""
    error: Tensor = ((got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)).mean()
    return error


def unseen(net: nn.Module, first: Tensor, last: Tensor) -> float:
    """The error on the values kept for tests."""
    with torch.no_grad():
        return float(relative(net(first[TRAINED:]), last[TRAINED:]))


def train(model: Model, first: Tensor, last: Tensor, steps: int, seed: int) -> dict[str, Any]:
    """Train a model; its test error, its numbers, and the processor's seconds of a step."""
    torch.manual_seed(seed)
    net = model.make()
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    spent, losses, curve = [], [], []
    with model.within():
        for step in range(1, steps + 1):
            rows = torch.randint(TRAINED, (BATCH,), generator=generator)
            start = time.thread_time()
            loss = relative(net(first[rows]), last[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            spent.append(time.thread_time() - start)
            losses.append(float(loss.detach()))
            if step % max(1, steps // POINTS) == 0:
                curve.append([step, unseen(net, first, last)])
        error = unseen(net, first, last)
    return {
        "error": error,
        "trained_error": sum(losses[-20:]) / len(losses[-20:]),
        "curve": curve,
        "seconds": sorted(spent)[len(spent) // 4],
        "parameters": spectral_parameters(net),
        "all_parameters": sum(p.numel() * (1 + p.is_complex()) for p in net.parameters()),
    }


def run(out: Path, steps: int, seeds: int) -> None:
    """Make the data, train all models, and store the records; what the file holds is left out.

    Raises:
        ValueError: the file of this day is of other sizes.
    """
    torch.set_num_threads(1)
    path = out / f"burgers-{date.today()}.jsonl"
    sizes = {"steps": steps, "batch": BATCH, "trained_on": TRAINED, "tested_on": TESTED}
    sizes |= {"positions": POSITIONS // EVERY, "width": WIDTH, "modes": MODES, "blocks": BLOCKS}
    there = read(path, growing=True) if path.exists() else []
    if not there:
        record = environment(torch.device("cpu"), torch.float32)
        append(path, {**record, "threads": 1, "sizes": sizes, "viscosity": VISCOSITY, "rate": RATE})
    elif there[0]["sizes"] != sizes:
        raise ValueError(f"{path} is of other sizes, {there[0]['sizes']}; delete it or go on so")
    done = {(record["model"], record["seed"]) for record in there[1:]}
    first, last = data()
    for seed in range(seeds):
        for model in models():
            if (model.name, seed) in done:
                continue
            found = train(model, first, last, steps, seed)
            append(path, {"kind": "solve", "model": model.name, "seed": seed, **found})
            print(
                f"{model.name}, seed {seed}: error {found['error']:.4f}, "
                f"{1e3 * found['seconds']:.1f} ms a step, {found['parameters']} numbers",
                flush=True,
            )
