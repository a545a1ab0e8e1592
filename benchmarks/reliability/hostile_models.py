"""Hostile arguments of what is done to whole models, of adapters and of styles for processes."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import polyadic
from benchmarks.reliability.odd import changed, odd, options, size, sizes, tensor
from polyadic import nn as cp
from polyadic.finetune import distill, match_layers

Call = Callable[[], object]

NUMBERS: list[Any] = [0, 1, 2, 0.5, 1e-3, 4.0, -1.0, 1e30]
PATTERNS: list[Any] = ["0", ".*", "2", "(", "", "all-linear", ["0"], ["x"], [], {"0": 2}, {"(": 1}]


def number(draw: random.Random) -> Any:
    """Mostly a number."""
    return draw.choice(NUMBERS) if draw.random() < 0.8 else odd(draw)


def pattern(draw: random.Random) -> Any:
    """Mostly a pattern for names of layers."""
    return draw.choice(PATTERNS) if draw.random() < 0.8 else odd(draw)


def word(*words: str) -> Callable[[random.Random], Any]:
    """Mostly one of the words."""
    return lambda draw: draw.choice(words) if draw.random() < 0.7 else odd(draw)


def dense() -> nn.Sequential:
    """An untrained model of torch's layers, two of which share a weight."""
    model = nn.Sequential(
        nn.Embedding(8, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 8)
    )
    model[4].weight = model[0].weight
    return model


def factorized() -> nn.Sequential:
    """A model of CP layers."""
    table = cp.CPEmbedding(8, 16, rank=3)
    return nn.Sequential(table, cp.CPLinear(16, 16, rank=4), nn.ReLU(), table.as_linear(True))


def images() -> nn.Sequential:
    """CP layers of maps."""
    return nn.Sequential(cp.CPConv1d(4, 4, 3, rank=2), cp.CPSpectralConv1d(4, 4, 3, rank=2))


def model(draw: random.Random) -> tuple[Any, Any]:
    """A model and an input, which mostly fit each other."""
    made, x = draw.choice(
        [
            (dense, torch.arange(6)),
            (factorized, torch.arange(6)),
            (images, torch.ones(2, 4, 9)),
        ]
    )
    if draw.random() < 0.05:
        return odd(draw), x
    # What torch's own layers say to another input is theirs.
    if made is not dense and draw.random() < 0.1:
        x = draw.choice([odd, tensor])(draw)
    return made(), x


def changing(draw: random.Random) -> Call:
    """What exchanges layers, or freezes and merges them."""
    net, x = model(draw)
    which = draw.randrange(6)
    if which < 2:
        given = options(
            draw,
            order=size,
            target_modules=pattern,
            exclude_modules=pattern,
            rank_pattern=pattern,
            order_pattern=pattern,
            callback=odd,
        )
        rank = draw.choice([size, number, word("break-even", "faster")])(draw)
        net = dense() if draw.random() < 0.8 else net
        return lambda: polyadic.factorize(net, rank=rank, **given)
    if which == 2:
        given = options(draw, batch=size, size=sizes)
        return lambda: polyadic.unfreeze(polyadic.freeze(net, **given))
    if which == 3:
        return lambda: polyadic.merge(net)
    if which == 4:
        given = options(
            draw,
            ratio=number,
            flops_ratio=number,
            max_error=number,
            speed=word("faster"),
            target_modules=pattern,
            exclude_modules=pattern,
            orders=sizes,
            calibration=odd,
            seed=size,
            iterations=size,
            callback=odd,
            checkpoint=odd,
            resume=odd,
        )
        given.setdefault("ratio", 2.0)
        return lambda: polyadic.compress(net, **{**given, "dry_run": True})
    names = draw.choice([["1"], ["1", "3"], pattern(draw)])
    batches = draw.choice([[x], [x, x], odd(draw)])
    return lambda: polyadic.second_moments(net, batches, names, **options(draw, weights=odd))


def asking(draw: random.Random) -> Call:
    """Rates, ranks, explanations and fits."""
    net, x = model(draw)
    which = draw.randrange(7)
    if which == 0:
        given = options(draw, weight_decay=number, optimizer=word("adamw", "sgd"))
        rate = number(draw)
        return lambda: polyadic.param_groups(net, rate, **given)
    if which == 1:
        layer = net[1] if isinstance(net, nn.Sequential) and draw.random() < 0.9 else odd(draw)
        given = options(draw, weight_decay=number, optimizer=word("adamw", "sgd"))
        rate = number(draw)
        return lambda: polyadic.factor_rates(layer, rate, **given)
    if which == 2:
        subject: Any = draw.choice([(16, 16), sizes(draw), cp.CPLinear(16, 16, rank=2), odd(draw)])
        given = options(
            draw,
            parameters=number,
            flops=number,
            speedup=number,
            batch=size,
            size=sizes,
            stride=sizes,
            padding=sizes,
            training=odd,
            dtype=odd,
            memory=word("fast", "least"),
        )
        if draw.random() < 0.7:
            given[draw.choice(["parameters", "flops", "speedup"])] = number(draw)
        return lambda: polyadic.rank_for(subject, **given)
    if which == 3:
        return lambda: polyadic.explain(net, x)
    if which == 4:
        layer = draw.choice([cp.CPLinear(16, 16, rank=2), cp.CPConv2d(4, 4, 3, rank=2), odd(draw)])
        given = options(
            draw,
            batch=size,
            size=sizes,
            stride=sizes,
            padding=sizes,
            dilation=sizes,
            plan=odd,
            memory=word("fast", "least"),
            training=odd,
            device=odd,
            dtype=odd,
        )
        return lambda: polyadic.explain(layer, **given)
    if which == 5:
        weight = draw.choice([torch.ones(4, 6), tensor(draw), odd(draw)])
        shape = draw.choice([((2, 2), (2, 3)), (sizes(draw), sizes(draw)), odd(draw)])
        given = options(
            draw,
            metric=tensor,
            metric_groups=sizes,
            damping=number,
            tolerance=number,
            start=word("svd", "random", "auto"),
            regularization=number,
            seed=size,
            weights=odd,
        )
        rank = size(draw)
        return lambda: polyadic.decompose(weight, shape, rank, iterations=2, **given)
    teacher, x = draw.choice([dense(), odd(draw)]), torch.arange(6)
    function: Any = draw.choice([distill, match_layers])
    known: dict[str, Callable[[random.Random], Any]] = {
        "lr": number,
        "optimizer": odd,
        "forward": odd,
        "checkpoint": odd,
        "resume": odd,
        "checkpoint_every": size,
        "callback": odd,
        "seed": size,
        "warmup": size,
        "clip": number,
        "schedule": odd,
    }
    if function is distill:
        known |= {
            "trainable": word("all", "cp+norms"),
            "loss": word("kl", "cosine"),
            "train_mode": odd,
            "validation": odd,
            "validate_every": size,
            "patience": size,
        }
    else:
        known |= {"names": pattern, "mode": word("joint")}
    given = options(draw, **known)
    return lambda: function(net, teacher, [x], steps=2, **given)


def adapting(draw: random.Random) -> Call:
    """Configurations of CP adapters and what is made of them."""
    from peft import LoraConfig, get_peft_model

    from polyadic.adapters import CPConfig, from_lora

    given = options(
        draw,
        r=size,
        alpha=number,
        order=size,
        in_shape_pattern=pattern,
        out_shape_pattern=pattern,
        share=word("none", "layers"),
        dropout=number,
        bias=word("none", "all"),
        exclude_modules=pattern,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        layers_to_transform=sizes,
        layers_pattern=pattern,
        modules_to_save=pattern,
        init_weights=odd,
        target_modules=pattern,
    )
    which = draw.randrange(3)
    if which == 0:
        return lambda: CPConfig(**given)
    if which == 1:
        given.setdefault("target_modules", ["1", "3"])
        given.setdefault("r", 2)
        return lambda: get_peft_model(dense(), CPConfig(**given))
    name = "base_model.model.1.lora_"
    state = {f"{name}A.weight": torch.ones(2, 16), f"{name}B.weight": torch.ones(16, 2)}
    state = changed(draw, state) if draw.random() < 0.5 else state
    lora = draw.choice([LoraConfig(r=2, target_modules=["1"]), odd(draw)])
    rank, order = size(draw), size(draw)
    return lambda: from_lora((lora, state), rank, order, iterations=2)


@contextlib.contextmanager
def one_process() -> Iterator[Any]:
    """A mesh of this process alone, with the group that is there or one for the block."""
    own = not dist.is_initialized()
    if own:
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        if own:
            dist.destroy_process_group()


def spreading(draw: random.Random) -> Call:
    """Styles for several processes, and calls of functions on DTensors."""
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import parallelize_module

    from polyadic.distributed import FeatureParallel, RankParallel

    def placement(draw: random.Random) -> Any:
        return draw.choice([Shard(0), Shard(1), Shard(-1), Replicate(), Shard(5), Partial()])

    def layout(draw: random.Random) -> Any:
        return placement(draw) if draw.random() < 0.8 else odd(draw)

    known: dict[str, Callable[[random.Random], Any]] = {
        "input_layouts": layout,
        "output_layouts": layout,
        "use_local_output": odd,
    }
    style = draw.choice([RankParallel, FeatureParallel])
    if style is FeatureParallel:
        known["features"] = word("in", "out", "both")
    given = options(draw, **known)
    net, x = model(draw)
    if draw.random() < 0.6:

        def spread() -> object:
            with one_process() as mesh:
                made: Any = parallelize_module(net, mesh, style(**given))
                return made if made[-1].__class__ is nn.Linear else made(x)

        return spread
    x = draw.choice([torch.ones(5, 16), tensor(draw)])
    x = x if x.layout is torch.strided else x.to_dense()  # torch makes no other a DTensor
    usual = [Shard(1)] * 8 + [Shard(0), Replicate()]
    where = [(modes, draw.choice(usual)) for modes in (4, 4, 4, 2)]
    of_x = draw.choice([Replicate(), *([Shard(0)] if x.dim() else [])])

    def called() -> object:
        with one_process() as mesh:
            spread = [distribute_tensor(torch.ones(n, 3), mesh, [p]) for n, p in where]
            given = x if draw.random() < 0.1 else distribute_tensor(x, mesh, [of_x])
            return polyadic.functional.cp_linear(given, spread[:2], spread[2:])

    return called
