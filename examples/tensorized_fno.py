"""Train a tensorized Fourier neural operator of neuraloperator, with its layers run by polyadic.

    python examples/tensorized_fno.py --steps 200

It learns to solve the heat equation u_t = ν Δu on a square with periodic edges: from an initial
temperature to that at a later time. The model is neuraloperator's TFNO with weights in CP format.
Two lines are added to a program of its users, marked below.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from neuralop.models import TFNO
from torch import Tensor

import polyadic


def heat(samples: int, size: int, spread: float = 0.002) -> tuple[Tensor, Tensor]:
    """Random smooth temperatures (b, 1, n, n), and what they have become; exact for each mode."""
    k = torch.fft.fftfreq(size, 1 / size)
    squares = k[:, None] ** 2 + k[None, : size // 2 + 1] ** 2
    noise = torch.fft.rfft2(torch.randn(samples, 1, size, size))
    first = noise * 8 / (8 + squares)
    last = first * torch.exp(-spread * (2 * math.pi) ** 2 * squares)
    before, after = (torch.fft.irfft2(u, s=(size, size)) for u in (first, last))
    return before, after


def relative_error(got: Tensor, want: Tensor) -> Tensor:
    """Mean relative L2 error of a batch."""
    error: Tensor = ((got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)).mean()
    return error


def train(steps: int, size: int = 32, width: int = 32, batch: int = 8, seed: int = 0) -> float:
    """Train a model and print how it goes; returns the error on temperatures it has not seen."""
    torch.manual_seed(seed)
    model = TFNO(
        n_modes=(12, 12),
        in_channels=1,
        out_channels=1,
        hidden_channels=width,
        n_layers=4,
        factorization="CP",
        rank=0.02,
    )
    accelerated = polyadic.accelerate_neuralop(transforms=True)  # the first line
    left = {name: why for name, why in accelerated.reasons(model).items() if why}
    print(f"layers left to neuraloperator: {left or 'none'}")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        before, after = heat(batch, size)
        loss = relative_error(model(before), after)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 5) == 0:
            each = (time.perf_counter() - start) / step
            print(f"step {step}: error {loss.item():.3f}, {1e3 * each:.1f} ms a step")
    with torch.no_grad():
        before, after = heat(64, size)
        error = relative_error(model(before), after).item()
    accelerated.undo()  # the second line; without it, it stays on until the program ends
    print(f"error on what it has not seen: {error:.3f}")
    return error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    train(parser.parse_args().steps)
