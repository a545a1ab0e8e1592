"""Two processes on one machine: every layer under DistributedDataParallel and fully_shard."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matrix_layers import LAYERS, Layer, assert_same
from torch import Tensor, nn

PROCESSES = 2


def expected(layer: Layer, rank: int) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """The layer, the input of one process, and the mean gradient by torch over the whole batch."""
    module, x = layer.make(), layer.input(2 * PROCESSES)
    y = layer.dense(module, x)
    names = [name for name, _ in module.named_parameters()]
    grads = torch.autograd.grad(y.square().sum() / PROCESSES, list(module.parameters()))
    share = slice(2 * rank, 2 * rank + 2)
    return module, x[share], {"y": y[share].detach(), **dict(zip(names, grads, strict=True))}


def data_parallel(layer: Layer, rank: int) -> None:
    module, x, want = expected(layer, rank)
    parallel = nn.parallel.DistributedDataParallel(module)
    y = parallel(x)
    y.square().sum().backward()
    got = {name: p.grad for name, p in module.named_parameters()}
    assert_same({"y": y.detach(), **got}, want)


def fully_sharded(layer: Layer, rank: int) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    module, x, want = expected(layer, rank)
    mesh = dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    fully_shard(module, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in module.parameters())
    y = module(x)
    y.square().sum().backward()
    got = {name: p.grad.full_tensor() for name, p in module.named_parameters()}
    assert_same({"y": y.detach(), **got}, want)


def tensor_parallel(layer: Layer, rank: int) -> None:
    """Every factor sharded over its components: a layer needs no code for it."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    module, x, want = expected(layer, 0)
    x = torch.cat([x, expected(layer, 1)[1]])
    mesh = dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    owner = getattr(module.cp, "joint", module.cp)
    for child in (owner, owner.factors):
        for name, p in list(child._parameters.items()):
            if p is not None:
                child._parameters[name] = nn.Parameter(distribute_tensor(p, mesh, [Shard(-1)]))
    if getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(distribute_tensor(module.bias, mesh, [Replicate()]))
    y = module(distribute_tensor(x, mesh, [Replicate()]))
    assert isinstance(y, DTensor)
    (y.square().sum() / PROCESSES).backward()
    got = {name: p.grad.full_tensor() for name, p in module.named_parameters()}
    assert_same({"y": y.full_tensor().detach()[:2], **got}, want)


SHARDED = "DTensor, factors sharded over components"
CHECKS: dict[str, Callable[[Layer, int], None]] = {
    "DistributedDataParallel": data_parallel,
    "FSDP2 (fully_shard)": fully_sharded,
    SHARDED: tensor_parallel,
}


def _process(rank: int, port: int, found: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    for feature, check in CHECKS.items():
        for name, layer in LAYERS.items():
            try:
                check(layer, rank)
                outcome = ""
            except Exception:
                outcome = traceback.format_exc()
            found[name, feature, rank] = outcome
            dist.barrier()
    dist.destroy_process_group()


def outcomes() -> dict[tuple[str, str], str]:
    """By layer and feature what went wrong in a process; empty where nothing did."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(_process, (port, found), nprocs=PROCESSES)
        every = dict(found)
    return {
        (layer, feature): "".join(every[layer, feature, rank] for rank in range(PROCESSES))
        for feature in CHECKS
        for layer in LAYERS
    }
