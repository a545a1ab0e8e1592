"""Learning rates and weight decay of factors, from those of the dense weight they stand for.

A factor is larger than the weight: K factors multiply to one entry, so that entries of W of size
0.04 are made of factors of size 0.4. An optimizer whose step has a fixed size, such as Adam,
changes such a factor relatively ten times less than it would change W, and a model of CP layers
under the dense learning rate trains as if that rate were a tenth. The rules here are derived in
docs/maths.md, "The dense recipe".

**AdamW.** A step changes each entry by about lr. It changes W, of root mean square w, relatively
by lr/w, and a factor of root mean square a_d by lr_d/a_d, which is also by how much it changes
the tensor. Each factor is to change the tensor as much as the dense step changes W:

    lr_d / a_d = lr / w      ⟹      lr_d = lr · a_d / w

K factors together then change the tensor √K times as much, in directions that are independent at
first. Whether to divide by this √K was settled by training: with it, the best rate of language
models of CP layers was 2.5 to 3.2 times the dense model's best, without it 1.0 to 1.6 times.

**SGD.** A step is the gradient's. With ΔA_d = −lr_d · ∂L/∂A_d the tensor moves by the gradient of
W, projected on what a change of A_d can reach, times lr_d · s_d with

    s_d = mean over r of λ_r² Π_{e≠d} ‖A_e[:, r]‖²          so that      lr_d = lr / s_d

moves W as dense SGD moves it, in the directions that one factor reaches.

**Weight decay** multiplies every factor by 1 − lr_d · decay_d and W by the product of K of them:
decay_d = lr · decay / (K · lr_d) makes W decay as the dense weight does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyadic import checks
from polyadic._torch import whole
from polyadic.checks import check_module
from polyadic.fitting.normal import gram
from polyadic.fitting.problem import wide
from polyadic.tensor import CPTensor

Optimizer = Literal["adamw", "sgd"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "sgd")
# Rates are rounded to so many steps per factor of two (4.4 %), so that factors of nearly the same
# rate share a group: an optimizer works on a group at once.
STEPS_PER_OCTAVE = 16


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    optimizer: Optimizer = "adamw",
) -> list[dict[str, Any]]:
    """Make groups for an optimizer, with which CP layers train at the dense learning rate.

    Factors get rates and decays of their own, such that their tensor changes, and decays, as a
    dense weight does at ``lr`` and ``weight_decay``; everything else keeps these two, parameters
    that a factor is computed from (by a parametrization or pruning) too. Rates follow the values
    that the parameters have now: call it once the model is initialised, converted or loaded. A
    scheduler multiplies every group's rate by the same number, and so keeps the rule;
    ``OneCycleLR`` and ``CyclicLR`` set peaks instead, and want one for each group:
    ``[group["lr"] for group in optimizer.param_groups]``.

        optimizer = torch.optim.AdamW(polyadic.param_groups(model, 1e-3, weight_decay=0.1))

    Args:
        model: any module. Parameters that need no gradient are left out; shared ones stand once.
        lr: the learning rate with which the dense model would be trained.
        weight_decay: the decay with which it would be trained: decoupled (AdamW), or torch's SGD's.
        optimizer: ``"adamw"`` for AdamW and its relatives, whose step does not depend on the size
            of the gradient, or ``"sgd"``, with momentum or without.

    Returns:
        Dicts with ``params``, ``lr`` and ``weight_decay``, the group of all other parameters first.

    Raises:
        TypeError: ``model`` is no module, or a number is none.
        ValueError: a number is negative or not finite, the optimizer is not one of these, or a
            factor has no values yet or is zero throughout, so that it has no scale to follow.
            (Muon orthogonalises the step of a matrix. For a factor that has no meaning for W,
            because a mode with m_d rows has at most m_d orthogonal columns. Train factors with
            AdamW, and the other weights with Muon.)
    """
    check_module(model)
    rates: dict[int, tuple[float, float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, CPTensor):
            try:
                found = factor_rates(module, lr, weight_decay, optimizer=optimizer)
            except ValueError as error:
                raise ValueError(f"{name or 'the model'}: {error}") from error
            rates.update({id(p): rate for p, rate in found.items()})
    _check_arguments(lr, weight_decay, optimizer)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(lr, weight_decay): []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(rates.get(id(parameter), (lr, weight_decay)), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
        if parameters
    ]


def factor_rates(
    layer: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    optimizer: Optimizer = "adamw",
) -> Mapping[nn.Parameter, tuple[float, float]]:
    """Return learning rate and weight decay of each factor of a layer, by the rule of param_groups.

    It is for those who make groups of their own.

    Args:
        layer: a CP layer, or its ``CPTensor``.
        lr: the learning rate of the dense weight.
        weight_decay: the decay of the dense weight.
        optimizer: as in ``param_groups``.

    Returns:
        (learning rate, weight decay) by parameter, λ among them where the tensor owns one; a factor
        that is computed from other parameters is left out.

    Raises:
        TypeError: ``layer`` holds no CP tensor, or a number is none.
        ValueError: as in ``param_groups``.
    """
    _check_arguments(lr, weight_decay, optimizer)
    tensor = _tensor_of(layer)
    every = [*tensor.factors, *([] if tensor.weights is None else [tensor.weights])]
    if any(factor.is_meta for factor in every):
        raise ValueError("the factors are on the meta device; give them values first")
    gains = _adamw_gains(tensor) if optimizer == "adamw" else _sgd_gains(tensor)
    found: dict[nn.Parameter, tuple[float, float]] = {}
    for factor, gain in zip(every, gains, strict=True):
        if not (math.isfinite(gain) and gain > 0):
            raise ValueError(
                "a factor, or what the others make of it, is zero or not finite, so that it has no "
                "scale that a learning rate could follow; give these parameters a rate by hand"
            )
        rate = lr * 2 ** (round(math.log2(gain) * STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE)
        decay = 0.0 if rate == 0 else lr * weight_decay / (len(every) * rate)
        if isinstance(factor, nn.Parameter):
            found[factor] = (rate, decay)
    return found


def _check_arguments(lr: Any, weight_decay: Any, optimizer: Any) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        checks.a_number(value, name, least=0)
    checks.check_word(optimizer, "optimizer", OPTIMIZERS)


def _tensor_of(layer: Any) -> CPTensor:
    own = layer if isinstance(layer, CPTensor) else getattr(layer, "cp", None)
    own = getattr(own, "joint", own)
    if not isinstance(own, CPTensor):
        raise TypeError(f"layer must be a CP layer or a CPTensor, got {type(layer).__name__}")
    return own


@torch.no_grad()
def _adamw_gains(tensor: CPTensor) -> list[float]:
    """Return a_d / w of each factor, and of λ."""
    factors = [wide(whole(factor)) for factor in tensor.factors]
    scale = None if tensor.weights is None else wide(whole(tensor.weights))
    total = gram(factors[0])
    for factor in factors[1:]:
        total = total * gram(factor)
    if scale is not None:
        total = total * scale.outer(scale.conj())
    entries = math.prod(factor.shape[0] for factor in factors)
    w = math.sqrt(max(float(total.sum().real), 0.0) / entries)
    every = [*factors, *([] if scale is None else [scale])]
    return [_rms(each) / w if w > 0 else math.nan for each in every]


def _rms(values: Tensor) -> float:
    return math.sqrt(float(values.abs().square().mean()))


@torch.no_grad()
def _sgd_gains(tensor: CPTensor) -> list[float]:
    """Return 1 / s_d of each factor, and of λ."""
    squares = [wide(whole(factor)).abs().square().sum(0) for factor in tensor.factors]
    if tensor.weights is not None:
        squares.append(wide(whole(tensor.weights)).abs().square())
    gains = []
    for own in range(len(squares)):
        others = torch.ones_like(squares[0])
        for e, square in enumerate(squares):
            if e != own:
                others = others * square
        mean = float(others.mean())
        gains.append(1 / mean if mean > 0 else math.nan)
    return gains
