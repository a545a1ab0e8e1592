"""What a Tucker weight of as many parameters as a spectral convolution's would cost instead."""

from __future__ import annotations

import math

from polyadic.formats import Shape, SpectralFormat
from polyadic.planner.request import Request


def tucker_ranks(fmt: SpectralFormat) -> Shape:
    """Return the ranks of a Tucker weight that has about as many parameters as the CP weight.

    Each is the same share of its mode, as neuraloperator chooses them.
    """
    modes = (fmt.in_channels, *((fmt.out_channels,) * (not fmt.separable)), *fmt.modes)
    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        ranks = tuple(max(1, round(share * mode)) for mode in modes)
        size = math.prod(ranks) + sum(m * r for m, r in zip(modes, ranks, strict=True))
        low, high = (share, high) if size <= fmt.parameters else (low, share)
    return tuple(max(1, round(low * mode)) for mode in modes)


def note(request: Request) -> str:
    """Say how many multiply-adds a Tucker weight of as many parameters takes.

    A separable spectral convolution and every other layer have no note, "".
    """
    fmt = request.format
    if not isinstance(fmt, SpectralFormat) or fmt.separable:
        return ""
    into, out, *cores = ranks = tucker_ranks(fmt)
    # The core is expanded to all kept modes, (into, out, S), and multiplies the projected spectrum.
    expanded, entries = 0, math.prod(ranks)
    for mode, rank in zip(fmt.modes, cores, strict=True):
        expanded += entries * mode
        entries = entries // rank * mode
    i, o = fmt.in_channels, fmt.out_channels
    tucker = expanded + fmt.kept * request.batch * (i * into + into * out + out * o)
    ours = fmt.kept * request.batch * fmt.rank * (i + o)
    named = "x".join(map(str, ranks))
    return (
        f"A Tucker weight of as many parameters (ranks {named}) multiplies this spectrum with "
        f"{tucker / ours:.2g} times the multiply-adds of the CP weight."
    )
