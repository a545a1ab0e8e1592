"""Curves and fits as plain values and tensors, so that a stopped compression need not redo them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from polyadic.compression.curves import Curve
from polyadic.compression.targets import Target
from polyadic.fitting import Decomposition
from polyadic.tensor import CPTensor


def fit_to_plain(fit: Decomposition) -> dict[str, Any]:
    """Return a fit as what a checkpoint holds."""
    plain = {f.name: getattr(fit, f.name) for f in dataclasses.fields(fit) if f.name != "cp"}
    return {**plain, "shape": fit.cp.tensorized_shape, "factors": list(fit.cp.factors)}


def fit_from_plain(plain: Mapping[str, Any], device: torch.device) -> Decomposition:
    """Return the fit again, on a device."""
    fields = dict(plain)
    factors = [factor.to(device) for factor in fields.pop("factors")]
    return Decomposition(cp=CPTensor.from_factors(fields.pop("shape"), factors), **fields)


def curves_to_plain(target: Target, curves: list[Curve]) -> list[dict[str, Any]]:
    """Return the curves of a target as what a checkpoint holds."""
    return [
        {
            "candidate": target.candidates.index(curve.candidate),
            "ranks": curve.ranks,
            "errors": curve.errors,
            "fits": [fit_to_plain(fit) for fit in curve.fits],
            "given_up": curve.given_up,
        }
        for curve in curves
    ]


def curves_from_plain(target: Target, plain: list[dict[str, Any]]) -> list[Curve]:
    """Return the curves again."""
    device = target.weight.device
    return [
        Curve(
            target.candidates[one["candidate"]],
            one["ranks"],
            one["errors"],
            tuple(fit_from_plain(fit, device) for fit in one["fits"]),
            one["given_up"],
        )
        for one in plain
    ]
