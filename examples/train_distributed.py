"""Training on several processes that goes on after a worker was killed.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_distributed.py --layout sharded

``--layout data`` is DistributedDataParallel; ``sharded`` cuts every factor along the rank over
``--rank-processes`` processes (RankParallel) and along its rows over all others (FSDP2). On GPUs
the same program uses NCCL. ``--kill-at 12`` lets the last worker kill itself once, to see what
follows.

When a worker dies, torchrun ends the others, starts all anew, and each reads the last whole
checkpoint. On CPUs set TORCH_GLOO_LAZY_INIT=1: without it gloo connects every process to every
other at once, and a restarted worker may wait for one that is gone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.checkpoint.state_dict_saver import save as write
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor.parallel import parallelize_module

import polyadic
from polyadic.distributed import RankParallel
from polyadic.nn import CPLinear

FEATURES, HIDDEN, CLASSES, RANK = 256, 512, 10, 24
BATCH, TEST = 96, 500


def network() -> nn.Sequential:
    """(B, 256) to (B, 10)."""
    return nn.Sequential(
        CPLinear(FEATURES, HIDDEN, rank=RANK),
        nn.GELU(),
        CPLinear(HIDDEN, HIDDEN, rank=RANK),
        nn.GELU(),
        CPLinear(HIDDEN, CLASSES, rank=8, in_shape=(16, 32), out_shape=(10,)),
    )


def samples(count: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noisy copies of one pattern a class, the same in every process."""
    patterns = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = 2 * torch.randn(count, FEATURES, generator=generator)
    return (patterns[labels] + noise).to(device), labels.to(device)


def spread(model: nn.Module, layout: str, mesh: DeviceMesh) -> nn.Module:
    """The model over the processes of a mesh ("data", "rank")."""
    if layout == "data":
        return nn.parallel.DistributedDataParallel(model)
    parallelize_module(model, mesh["rank"], RankParallel())
    for layer in model.children():
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return model


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end: its metadata is written last."""
    found = sorted(path.parent for path in folder.glob("step-*/.metadata"))
    agreed: list[Path | None] = [found[-1] if found else None]
    dist.broadcast_object_list(agreed)
    return agreed[0]


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint, of which each process writes its shards, and keep the two last."""
    weights, states = get_state_dict(model, optimizer)
    path = folder / f"step-{step:06d}"
    write({"model": weights, "optimizer": states, "step": step}, checkpoint_id=path)
    if dist.get_rank() == 0:
        for old in sorted(folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read a checkpoint of any layout into this one, and return the steps it had taken."""
    weights, states = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": states, "step": 0}
    read(state, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return int(state["step"])


def train(options: argparse.Namespace, device: torch.device) -> float:
    """Train, save and go on from what was saved; return the share of right answers."""
    size = dist.get_world_size()
    shape = (size, 1) if options.layout == "data" else (size // options.rank_processes, -1)
    mesh = init_device_mesh(
        device.type, (shape[0], size // shape[0]), mesh_dim_names=("data", "rank")
    )
    torch.manual_seed(0)
    model = spread(network().to(device), options.layout, mesh)
    optimizer = torch.optim.AdamW(polyadic.param_groups(model, lr=3e-3))
    folder = Path(options.folder) if options.folder else None
    begun = last_whole(folder) if folder else None
    first = load(begun, model, optimizer) if begun else 0
    if dist.get_rank() == 0 and first:
        print(f"goes on after step {first}", flush=True)
    for step in range(first, options.steps):
        # The batch of a step is the same whoever computes it; each takes its part.
        x, labels = samples(BATCH, 1 + step, device)
        mine = slice(mesh.get_local_rank("data"), None, mesh.size(0))
        loss = F.cross_entropy(model(x[mine]), labels[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if folder and (step + 1) % options.save_every == 0:
            save(folder, step + 1, model, optimizer)
        killed = step + 1 == options.kill_at and dist.get_rank() == size - 1
        if killed and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
    x, labels = samples(TEST, 0, device)
    with torch.no_grad():
        logits = model(x)
    right = (logits.argmax(1) == labels).double().mean().item()
    if dist.get_rank() == 0:
        checksum = logits.double().abs().sum().item()
        print(f"{right:.1%} right, logits add up to {checksum!r}", flush=True)
    return right


def join(backend: str) -> None:
    """Meet the other processes of this start.

    torchrun may keep one store for all starts, where a process would find the address of one that
    was killed before its successor has written its own: each start has keys of its own here.
    """
    store, rank, size = next(iter(rendezvous("env://")))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    start = dist.PrefixStore(f"start {attempt}", store)
    dist.init_process_group(backend, store=start, rank=rank, world_size=size)


def main(arguments: Sequence[str] = ()) -> float:
    """Read the options, join the other processes where torchrun has started some, and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", choices=("data", "sharded"), default="data")
    parser.add_argument("--rank-processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", help="of the checkpoints; none are written without it")
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--kill-at", type=int, default=0)
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    backend, device = ("nccl", "cuda") if cuda else ("gloo", "cpu")
    if "RANK" in os.environ:
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        join(backend)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        return train(options, torch.device(device))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
