"""Hostile arguments of plans, of conversions, of initial values, and of what surrounds layers."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import polyadic
from benchmarks.reliability.hostile_models import dense, model, number, pattern, word
from benchmarks.reliability.odd import odd, options, size, sizes, tensor
from polyadic import functional, init, plans, pretrained, testing
from polyadic import nn as cp
from polyadic.formats import LinearFormat, SpectralFormat, padded_shape, tensorize

Call = Callable[[], object]


def planning(draw: random.Random) -> Call:
    """Formats, routes, plans and their predictions."""
    which = draw.randrange(8)
    first, second, rank, other = sizes(draw), sizes(draw), size(draw), odd(draw)
    if which == 0:
        made: Any = draw.choice([tensorize, padded_shape])
        return lambda: made(rank, size(draw))
    if which == 1:
        return lambda: polyadic.explain(LinearFormat(first, second, rank), batch=other)
    if which == 2:
        return lambda: polyadic.ConvFormat(first, second, sizes(draw), rank)
    if which == 3:
        return lambda: SpectralFormat(first, second, sizes(draw), rank)
    if which == 4:
        return lambda: plans.LinearPlan(plans.LinearRoute(first, second, other), other)
    route: Any
    whole: Any
    if which == 5:
        given = options(draw, layout=odd, depthwise=word("merged"), kind=word("dense"), by=odd)
        route, whole = plans.ConvRoute, plans.ConvPlan
    elif which == 6:
        given = options(draw, modes_at_once=size, transforms=odd, components_at_once=size, kind=odd)
        route, whole = plans.SpectralRoute, plans.SpectralPlan
    else:
        rank_of: Any = polyadic.rank_for
        return lambda: rank_of(cp.CPLinear(12, 8, rank=3), other)
    keep = options(draw, keep=size)
    return lambda: whole(route(**given), other if draw.random() < 0.3 else route(), **keep)


def converting(draw: random.Random) -> Call:
    """Layers in the place of torch's, and back; layers that share a tensor."""
    which = draw.randrange(7)
    given = options(
        draw,
        order=size,
        in_shape=sizes,
        out_shape=sizes,
        memory=odd,
        cp=odd,
        metric=tensor,
        iterations=size,
        seed=size,
        start=word("random"),
        damping=number,
    )
    given.setdefault("iterations", 2)
    if draw.random() < 0.9:
        given.setdefault("rank", size(draw))
    classes: Any = draw.choice(
        [
            (cp.CPLinear.from_linear, nn.Linear(12, 8)),
            (cp.CPConv1d.from_conv, nn.Conv1d(4, 6, 3)),
            (cp.CPConv2d.from_conv, nn.Conv2d(4, 6, 3)),
            (cp.CPConvTranspose2d.from_conv_transpose, nn.ConvTranspose2d(4, 6, 3)),
            (cp.CPEmbedding.from_embedding, nn.Embedding(12, 8)),
            (cp.CPSpectralConv1d.from_spectral_conv, nn.Conv1d(4, 6, 3)),
        ]
    )
    if which < 3:
        make, layer = classes
        other = odd(draw) if draw.random() < 0.2 else layer
        return lambda: make(other, **given)
    if which == 3:
        layers = draw.choice([[nn.Linear(12, 8), nn.Linear(12, 8)], odd(draw), [odd(draw)]])
        return lambda: cp.CPLinear.joint_from(layers, **given)
    if which == 4:
        count, features = size(draw), size(draw)
        own = options(draw, order=size, in_shape=sizes, out_shape=sizes, bias=odd, device=_device)
        own.setdefault("device", "meta")
        return lambda: cp.CPLinear.joint(count, features, size(draw), rank=size(draw), **own)
    if which == 5:
        one: Any = cp.CPLinear.joint(3, 12, 8, rank=2)[0]
        whole: Any = one.cp.joint if draw.random() < 0.8 else odd(draw)
        return lambda: polyadic.CPSlice(whole, odd(draw))
    bias = odd(draw)
    back = draw.choice(
        [
            lambda: cp.CPEmbedding(12, 8, rank=3).as_linear(bias),
            lambda: cp.CPTiedLinear(odd(draw), bias),
            lambda: cp.CPLinear(12, 8, rank=3).to_linear(),
        ]
    )
    return back


def filling(draw: random.Random) -> Call:
    """What fills factors and biases, and the problems that the library verifies itself by."""
    which = draw.randrange(7)
    if which == 0:
        factors = [tensor(draw) for _ in range(draw.randrange(4))]
        if draw.random() < 0.5:
            rank = draw.choice([1, 2, 5])
            factors = [torch.empty(draw.choice([1, 2, 7]), rank) for _ in range(3)]
        given = factors if draw.random() < 0.9 else odd(draw)
        return lambda: init.cp_orthonormal_(given, number(draw))
    if which == 1:
        return lambda: init.torch_std(size(draw), *([odd(draw)] if draw.random() < 0.2 else []))
    if which == 2:
        return lambda: init.mup_std(size(draw), size(draw))
    if which == 3:
        return lambda: init.torch_bias_(tensor(draw), size(draw))
    if which == 4:
        filled = odd(draw) if draw.random() < 0.2 else torch.empty(3)
        function = draw.choice([odd(draw), torch.Tensor.zero_])
        return lambda: init.bias_(filled, function)
    if which == 5:
        counting: Any = draw.choice(
            [
                testing.flops,
                testing.launches,
                testing.allocations,
                testing.kept_bytes,
                testing.environment,
                testing.verify,
            ]
        )
        return lambda: counting(odd(draw))
    known = {"rank": size, "order": size, "batch": size, "dtype": odd, "seed": size, "weights": odd}
    if draw.random() < 0.5:
        own = options(draw, **known)
        return lambda: testing.linear_problem(size(draw), size(draw), **own)
    maps = options(draw, size=sizes, **known)
    return lambda: testing.conv_problem(size(draw), size(draw), sizes(draw), **maps)


def surrounding(draw: random.Random) -> Call:
    """Plans that are timed, other libraries accelerated, models saved and resized."""
    net, x = model(draw)
    which = draw.randrange(6)
    if which == 0:
        # Most calls reach no layer: a layer that is timed takes seconds.
        if draw.random() < 0.98:
            net, x = draw.choice([dense(), odd(draw)]), torch.arange(6)
        given = options(draw, training=odd, store=_untrue)
        return lambda: polyadic.tune(net, *([x] if draw.random() < 0.8 else []), **given)
    if which == 1:
        return lambda: polyadic.untune(stored=_untrue(draw))
    if which == 2:
        accelerate: Any = draw.choice([polyadic.accelerate_tltorch, polyadic.accelerate_neuralop])
        given = options(draw, transforms=odd)
        asked = net if draw.random() < 0.8 else odd(draw)

        def accelerated() -> None:
            with accelerate(**given) as found:
                found.reasons(asked)

        return accelerated
    if which == 3:
        pretrained.attach(dense())
        tokens = size(draw)
        changed: Any = draw.choice(
            [
                lambda: pretrained.attach(net),
                lambda: pretrained.resize_token_embeddings(net, tokens),
            ]
        )
        return changed
    if which == 4:
        given = options(draw, max_shard_size=odd, unknown=odd)

        def saved() -> None:
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder) / "model" if draw.random() < 0.8 else odd(draw)
                pretrained.save_pretrained(net, place, **given)

        return saved
    y, kept = functional.cp_linear_forward(torch.ones(3, 12), *_factors((3, 4), (2, 4)))
    images, stages = functional.cp_conv_forward(
        torch.ones(2, 4, 5, 5), *_factors((6,), (4,), (3, 3))
    )
    back: Any
    back, grad, state = draw.choice(
        [
            (functional.cp_linear_backward, y, kept),
            (functional.cp_conv_backward, images, stages),
        ]
    )
    grad = grad if draw.random() < 0.3 else draw.choice([tensor, odd])(draw)
    state = state if draw.random() < 0.8 else odd(draw)
    return lambda: back(grad, state)


def adapting_back(draw: random.Random) -> Call:
    """A model with a CP adapter, written as a LoRA."""
    from peft import get_peft_model

    from polyadic.adapters import CPConfig, save_as_lora, to_lora

    net: Any = odd(draw)
    if draw.random() < 0.8:
        share: Any = draw.choice(["none", "layers"])
        net = get_peft_model(dense(), CPConfig(r=2, target_modules=["1", "3"], share=share))
    name = "default" if draw.random() < 0.5 else draw.choice([pattern, odd])(draw)
    if draw.random() < 0.7:
        return lambda: to_lora(net, name)

    def saved() -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_as_lora(folder if draw.random() < 0.7 else odd(draw), net, name)

    return saved


def _device(draw: random.Random) -> Any:
    """A device that is everywhere, or none; what torch says of a missing GPU is its own."""
    return draw.choice(["meta", "cpu", "x", -1, 2**70, 2.0, b"x", (), True, torch.float32])


def _untrue(draw: random.Random) -> Any:
    """A flag that is off or none: the user's own tuned plans are left alone."""
    return draw.choice([False, 0, None, "x", 2, 1.0, [], {}, object])


def _factors(*groups: tuple[int, ...]) -> list[list[torch.Tensor]]:
    return [[torch.ones(mode, 2) for mode in group] for group in groups]
