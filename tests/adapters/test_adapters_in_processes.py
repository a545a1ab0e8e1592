"""Two processes on one machine: adapters under DistributedDataParallel and fully_shard."""

from __future__ import annotations

import copy
import os
import socket
import traceback
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

pytest.importorskip("peft")

from adapters.adapted import words

PROCESSES = 2


def check(kind: str, share: str, rank: int) -> None:
    """Outputs and mean gradients are those of one process with the whole batch."""
    torch.manual_seed(0)
    _, model = words(share=share)
    x = torch.randint(0, 30, (2 * PROCESSES, 7))
    whole = copy.deepcopy(model)
    want = whole(x)
    (want.square().sum() / PROCESSES).backward()
    grads = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}
    mine = slice(2 * rank, 2 * rank + 2)
    if kind == "ddp":
        parallel: Any = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
        if share == "none":
            # Each layer by itself; factors that layers share are sharded with the whole model.
            for layer in model.base_model.model.children():
                fully_shard(layer, mesh=mesh)
        parallel = fully_shard(model, mesh=mesh)
    y = parallel(x[mine])
    torch.testing.assert_close(y, want[mine])
    y.square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if kind == "fsdp":
        got = {name: grad.full_tensor() for name, grad in got.items()}
    torch.testing.assert_close(got, grads)


def _process(rank: int, port: int, found: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    for kind in ("ddp", "fsdp"):
        for share in ("none", "layers"):
            try:
                check(kind, share, rank)
                found[kind, share, rank] = ""
            except Exception:
                found[kind, share, rank] = traceback.format_exc()
            dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_train_what_one_does() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(_process, (port, found), nprocs=PROCESSES)
        outcomes = dict(found)
    assert len(outcomes) == 4 * PROCESSES
    assert not {key: text for key, text in outcomes.items() if text}
