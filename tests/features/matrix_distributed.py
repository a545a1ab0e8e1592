"""Processes on one machine: every layer in every way in which torch spreads modules over them.

Two processes in every run of the tests, four in the long ones: what is two-dimensional has one
dimension of size 1 with two.
"""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matrix_layers import LAYERS, Layer, assert_near, assert_same, results
from torch import Tensor, nn

from compare import assert_close
from polyadic.nn import CPTiedLinear

Mesh = Any


def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> Mesh:
    return dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)


def line() -> Mesh:
    return mesh_of(dist.get_world_size())


def shapes() -> list[tuple[int, int]]:
    """Of two-dimensional meshes: (1, 2) and (2, 1) of two processes, (2, 2) of four."""
    half = dist.get_world_size() // 2
    return sorted({(half, 2), (2, half)})


def expected(
    layer: Layer, rank: int, parts: int | None = None
) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """The layer, the input of one process, and the mean gradient by torch over the whole batch."""
    parts = dist.get_world_size() if parts is None else parts
    module, x = layer.make(), layer.input(2 * parts)
    y = layer.dense(module, x)
    names = [name for name, _ in module.named_parameters()]
    grads = torch.autograd.grad(y.square().sum() / parts, list(module.parameters()))
    share = slice(2 * rank, 2 * rank + 2)
    return module, x[share], {"y": y[share].detach(), **dict(zip(names, grads, strict=True))}


def trained(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a step, those of DTensors whole."""
    y = module(x)
    y.square().sum().backward()
    return {"y": y.detach(), **gradients(module)}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p.grad) for name, p in module.named_parameters()}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def data_parallel(layer: Layer, rank: int) -> None:
    """As it stands, twice with a static graph, and in two halves with gradients in buckets."""
    module, x, want = expected(layer, rank)
    wrapped = nn.parallel.DistributedDataParallel
    assert_same(trained(wrapped(copy.deepcopy(module)), x), want)
    fixed = wrapped(copy.deepcopy(module), static_graph=True)
    for _ in range(2):
        fixed.zero_grad()
        assert_same(trained(fixed, x), want)
    halves = wrapped(module, gradient_as_bucket_view=True)
    for half, sync in ((x[:1], halves.no_sync()), (x[1:], contextlib.nullcontext())):
        with sync:
            halves(half).square().sum().backward()
    assert_same({"y": want["y"], **gradients(halves)}, want)


def zero_redundancy(layer: Layer, rank: int) -> None:
    """Each process keeps the optimizer's state of some factors and steps those."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    module, x, want = expected(layer, rank)
    alone = copy.deepcopy(module)
    for name, parameter in alone.named_parameters():
        parameter.grad = want[name]
    torch.optim.Adam(alone.parameters(), lr=0.1).step()
    parallel = nn.parallel.DistributedDataParallel(module)
    optimizer = ZeroRedundancyOptimizer(
        parallel.parameters(), torch.optim.Adam, lr=0.1, parameters_as_bucket_view=True
    )
    parallel(x).square().sum().backward()
    optimizer.step()
    # Adam divides by the size of a gradient, so that its step is compared and not scaled up.
    assert_same(dict(module.named_parameters()), dict(alone.named_parameters()))


def shard(module: Any, layer: Layer, **options: Any) -> Any:
    """``fully_shard``, complex factors before the real bias: a group has parameters of one dtype.

    The layer reads the factors after the CP tensor has handed them out, so they stay until the
    backward.
    """
    from torch.distributed.fsdp import fully_shard

    if layer.spectral:
        cp = getattr(module, "_checkpoint_wrapped_module", module).cp
        fully_shard(cp, **{**options, "reshard_after_forward": False})
    return fully_shard(module, **options)


def fully_sharded(layer: Layer, rank: int) -> None:
    """Resharded after the forward or not, and with the forward computed again for the backward."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.tensor import DTensor

    module, x, want = expected(layer, rank)
    for reshard in (True, False):
        sharded = shard(copy.deepcopy(module), layer, mesh=line(), reshard_after_forward=reshard)
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        assert_same(trained(sharded, x), want)
    again = shard(checkpoint_wrapper(module), layer, mesh=line())
    found = trained(again, x)
    assert_same({k.removeprefix("_checkpoint_wrapped_module."): v for k, v in found.items()}, want)


def mixed_precision(layer: Layer, rank: int) -> None:
    """Computed in bfloat16, with gradients summed and kept in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    module, x, want = expected(layer, rank)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded = shard(module.float(), layer, mesh=line(), mp_policy=policy)
    found = trained(sharded, x.float() if x.is_floating_point() else x)
    assert found.pop("y").dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in found.values())
    want.pop("y")
    assert_near({name: grad.double() for name, grad in found.items()}, want, 0.05)


def hybrid_sharded(layer: Layer, rank: int) -> None:
    """Sharded along one dimension of a mesh and replicated along the other."""

    module, x, want = expected(layer, rank)
    for shape in shapes():
        mesh = mesh_of(*shape, names=("replicate", "shard"))
        assert_same(trained(shard(copy.deepcopy(module), layer, mesh=mesh), x), want)


def from_meta(layer: Layer, rank: int) -> None:
    """Made without memory, sharded, and drawn as the first process would draw it alone."""

    alone, sharded = layer.make(), layer.make().to("meta")
    shard(sharded, layer, mesh=line())
    sharded.to_empty(device="cpu")
    torch.manual_seed(7 + rank)
    sharded.reset_parameters()
    after = torch.rand(1)
    torch.manual_seed(7)
    alone.reset_parameters()
    if rank:
        torch.manual_seed(7 + rank)
    assert after == torch.rand(1), "the first process goes on as one alone, the others as before"
    # A head's factors are its embedding's to draw.
    own = "bias" if isinstance(alone, CPTiedLinear) else ""
    for (name, p), q in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        assert not name.startswith(own) or torch.equal(whole(p), q), name


def component_parallel(layer: Layer, rank: int) -> None:
    """A slice of the rank in each process, by the style and by DTensors made by hand."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import parallelize_module

    from polyadic.distributed import RankParallel

    module, x = layer.make(), layer.input()
    want = results(module, partial(layer.dense, module), x)
    by_hand = copy.deepcopy(module)
    owner = getattr(by_hand.cp, "joint", by_hand.cp)
    for child in (owner, owner.factors):
        for name, p in list(child._parameters.items()):
            if p is not None:
                spread = distribute_tensor(p.detach(), line(), [Shard(-1)])
                child._parameters[name] = nn.Parameter(spread)
    if getattr(by_hand, "bias", None) is not None:
        bias = distribute_tensor(by_hand.bias.detach(), line(), [Replicate()])
        by_hand.bias = nn.Parameter(bias)
    y = by_hand(distribute_tensor(x, line(), [Replicate()]))
    assert isinstance(y, DTensor)
    assert_close(y.full_tensor().detach(), want["y"], "y")

    spread = parallelize_module(module, line(), RankParallel())
    assert_same(spread_results(spread, x), want)


def spread_results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """``results`` with whole gradients."""
    return {name: whole(value) for name, value in results(module, module, x).items()}


def feature_parallel(layer: Layer, rank: int) -> None:
    """A slice of the features in each process."""
    from torch.distributed.tensor.parallel import parallelize_module

    from polyadic.distributed import FeatureParallel

    module, x = layer.make(), layer.input()
    want = results(module, partial(layer.dense, module), x)
    mesh = mesh_of(*shapes()[0], names=("data", "features"))["features"]
    assert_same(spread_results(parallelize_module(module, mesh, FeatureParallel()), x), want)


def two_dimensional(layer: Layer, rank: int) -> None:
    """A slice of the rank along one dimension of a mesh, fully sharded along the other."""
    from torch.distributed.tensor.parallel import parallelize_module

    from polyadic.distributed import RankParallel

    for shape in shapes():
        mesh = mesh_of(*shape, names=("data", "rank"))
        module, x, want = expected(layer, mesh.get_local_rank("data"), shape[0])
        parallelize_module(module, mesh["rank"], RankParallel())
        assert_same(trained(shard(module, layer, mesh=mesh["data"]), x), want)


class Doubled(nn.Module):
    """A stage without parameters."""

    def forward(self, y: Tensor) -> Tensor:
        return 2 * y


def pipelined(layer: Layer, rank: int) -> None:
    """The layer in the first stage of a pipeline, in micro-batches."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    module, x = layer.make(), layer.input(4)
    y = 2 * layer.dense(module, x)
    names = [name for name, _ in module.named_parameters()]
    grads = torch.autograd.grad(y.square().sum(), list(module.parameters()))
    last = dist.get_world_size() - 1
    part = module if rank == 0 else Doubled() if rank == last else nn.Identity()
    stage = PipelineStage(part, rank, last + 1, torch.device("cpu"))
    schedule = Schedule1F1B(
        stage, last + 1, loss_fn=lambda out, target: out.square().sum(), scale_grads=False
    )
    if rank == 0:
        schedule.step(x)
        got = {name: parameter.grad for name, parameter in module.named_parameters()}
        assert_same(got, dict(zip(names, grads, strict=True)))
    else:
        out = schedule.step(target=torch.zeros(4))
        if rank == last:
            assert_close(out.detach(), y.detach(), "y")


A_MODEL = "a model"
SHARDED = "RankParallel (DTensor, factors sharded over components)"
FEATURES = "FeatureParallel"
CHECKS: dict[str, Callable[[Layer, int], None]] = {
    "DistributedDataParallel: static_graph, no_sync, bucket views": data_parallel,
    "ZeroRedundancyOptimizer": zero_redundancy,
    "FSDP2 (fully_shard): with and without reshard, checkpointed": fully_sharded,
    "FSDP2, bfloat16 with sums in float32": mixed_precision,
    "FSDP2, two-dimensional: HSDP": hybrid_sharded,
    "meta device, fully_shard, reset_parameters": from_meta,
    SHARDED: component_parallel,
    "RankParallel × FSDP2": two_dimensional,
    FEATURES: feature_parallel,
    "stage of a pipeline (1F1B)": pipelined,
}


def _process(
    rank: int,
    size: int,
    port: int,
    found: Any,
    checks: Mapping[str, Any],
    models: Mapping[str, Any],
    folder: Path,
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    for feature, check in checks.items():
        for name, layer in LAYERS.items():
            try:
                check(layer, rank)
                outcome = ""
            except Exception:
                outcome = traceback.format_exc()
            found[name, feature, rank] = outcome
            dist.barrier()
    for name, check in models.items():
        try:
            check(rank, folder)
            outcome = ""
        except Exception:
            outcome = traceback.format_exc()
        found[A_MODEL, name, rank] = outcome
        dist.barrier()
    dist.destroy_process_group()


def outcomes(
    processes: int = 2,
    checks: Mapping[str, Callable[[Layer, int], None]] = CHECKS,
    models: Mapping[str, Callable[[int, Path], None]] = MappingProxyType({}),
) -> dict[tuple[str, str], str]:
    """By layer and feature what went wrong in a process; empty where nothing did.

    Checks of models have the name of no layer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        found = manager.dict()
        arguments = (processes, port, found, checks, models, Path(folder))
        mp.spawn(_process, arguments, nprocs=processes)
        every = dict(found)
    cells = [(layer, feature) for feature in checks for layer in LAYERS]
    return {
        cell: "".join(every[(*cell, rank)] for rank in range(processes))
        for cell in [*cells, *((A_MODEL, name) for name in models)]
    }
