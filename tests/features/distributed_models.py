"""Whole models on several processes: checkpoints across layouts, ties, compiled code, recovery."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.checkpoint.state_dict_saver import save as write
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module

import polyadic
from compare import assert_all_close
from polyadic.distributed import FeatureParallel, RankParallel
from polyadic.nn import CPConv2d, CPEmbedding, CPLinear


class Words(nn.Module):
    """An embedding, two layers of a joint weight, a convolution and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = CPEmbedding(23, 12, rank=5, out_shape=(2, 6))
        self.first, self.second = CPLinear.joint(
            2, 12, 12, rank=7, in_shape=(2, 6), out_shape=(2, 6)
        )
        self.conv = CPConv2d(4, 4, 3, padding=1, rank=3)
        self.head = self.table.as_linear(True)

    def forward(self, words: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.table(words)))
        x = self.conv(x.unflatten(-1, (4, 3)).unsqueeze(-1).flatten(0, 1)).flatten(1)
        return self.head(self.second(x.view(*words.shape, 12)))


def words() -> Words:
    torch.manual_seed(3)
    return Words().double()


def mesh(*shape: int) -> Any:
    names = ("data", "rank")[: len(shape)]
    return dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)


def replicated(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: Any) -> nn.Module:
    """What shares factors is in one group, and torch refuses to shard a parameter twice."""
    over = mesh(dist.get_world_size())
    fully_shard([model.table, model.head], mesh=over)
    fully_shard([model.first, model.second], mesh=over)
    return fully_shard(model, mesh=over)


def by_rank(model: nn.Module) -> nn.Module:
    return parallelize_module(model, mesh(dist.get_world_size()), RankParallel())


def by_rank_and_rows(model: nn.Module) -> nn.Module:
    both = mesh(dist.get_world_size() // 2, 2)
    parallelize_module(model, both["rank"], RankParallel())
    return fully_shard(model, mesh=both["data"])


def by_features(model: nn.Module) -> nn.Module:
    style = FeatureParallel()
    plan = {"table": style, "first": style, "second": style, "head": style}
    both = mesh(dist.get_world_size() // 2, 2)
    return parallelize_module(model, both["rank"], plan)


LAYOUTS: dict[str, Callable[[Any], nn.Module]] = {
    "DDP": replicated,
    "FSDP2": sharded,
    "RankParallel": by_rank,
    "RankParallel × FSDP2": by_rank_and_rows,
    "FeatureParallel": by_features,
}


class Training:
    """A model in a layout, an optimizer with states, and batches that every process has whole."""

    def __init__(self, layout: str) -> None:
        self.model = LAYOUTS[layout](words())
        groups: Any = polyadic.param_groups(self.model, lr=0.01)
        # Parameters that are on different meshes, or plain ones, are not stepped in one operation.
        self.optimizer = torch.optim.AdamW(groups, foreach=False)
        # torch's function does not find names of shared parameters through this wrapper.
        self.plain = getattr(self.model, "module", self.model)
        self.steps = 0

    def step(self) -> None:
        generator = torch.Generator().manual_seed(self.steps)
        x = torch.randint(23, (4, 3), generator=generator)
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.steps += 1

    def save(self, folder: Path) -> None:
        weights, states = get_state_dict(self.plain, self.optimizer)
        state = {"model": weights, "optimizer": states, "steps": self.steps}
        write(state, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        weights, states = get_state_dict(self.plain, self.optimizer)
        state: dict[str, Any] = {"model": weights, "optimizer": states, "steps": 0}
        read(state, checkpoint_id=folder)
        set_state_dict(
            self.plain,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.steps = state["steps"]

    def whole(self) -> dict[str, Tensor]:
        return {
            name.removeprefix("module."): getattr(p, "full_tensor", lambda p=p: p)()
            .detach()
            .clone()
            for name, p in self.model.named_parameters()
        }


def checkpoints(rank: int, folder: Path) -> None:
    """Written in one layout and read in every other; in its own it goes on bit for bit."""
    saved = Training("RankParallel × FSDP2")
    saved.step()
    saved.step()
    saved.save(folder / "saved")
    before = saved.whole()
    saved.step()
    after = saved.whole()
    assert any(not torch.equal(after[name], before[name]) for name in after)
    for layout in LAYOUTS:
        other = Training(layout)
        other.load(folder / "saved")
        found = other.whole()
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], before[name]) for name in before), layout
        other.step()
        if layout == "RankParallel × FSDP2":
            assert all(torch.equal(other.whole()[name], after[name]) for name in after)
        else:
            assert_all_close(other.whole(), after)


def gradients(rank: int, folder: Path) -> None:
    """Of every layout those of one process, joint weights and tied heads too."""
    x = torch.randint(23, (4, 3), generator=torch.Generator().manual_seed(5))
    alone = words()
    alone(x).square().mean().backward()
    want = {name: p.grad for name, p in alone.named_parameters()}
    for layout, spread in LAYOUTS.items():
        model = spread(words())
        model(x).square().mean().backward()
        got = {
            name.removeprefix("module."): getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
            for name, p in model.named_parameters()
        }
        try:
            assert_all_close(got, want)
        except AssertionError as error:
            raise AssertionError(f"{layout}: {error}") from error


def sequences(rank: int, folder: Path) -> None:
    """A sequence of 5 positions cut over the processes, in and out of a layer."""
    torch.manual_seed(0)
    alone = CPLinear(12, 10, rank=5).double()
    x = torch.randn(4 * dist.get_world_size(), 12, dtype=torch.float64)
    alone(x).square().sum().backward()
    style = RankParallel(input_layouts=Shard(0), output_layouts=Shard(0))
    spread = parallelize_module(copy.deepcopy(alone), mesh(dist.get_world_size()), style)
    spread.zero_grad()
    mine = x.chunk(dist.get_world_size())[rank].clone().requires_grad_()
    spread(mine).square().sum().backward()
    got = {name: p.grad.full_tensor() for name, p in spread.named_parameters()}
    assert_all_close(got, {name: p.grad for name, p in alone.named_parameters()})


def second_derivatives(rank: int, folder: Path) -> None:
    """A penalty on the gradients of input and parameters, the bias of a tied head among them."""

    def whole(tensor: Any) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    makes: list[Callable[[], Any]] = [
        lambda: CPLinear(12, 8, rank=5, in_shape=(2, 6), out_shape=(2, 4)),
        lambda: CPEmbedding(23, 12, rank=5, out_shape=(2, 6)).as_linear(True),
    ]
    for make in makes:
        found = []
        for style in (None, RankParallel(), FeatureParallel()):
            torch.manual_seed(0)
            layer = make().double()
            if style is not None:
                parallelize_module(layer, mesh(dist.get_world_size() // 2, 2)["rank"], style)
            x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
            given = [x, *layer.parameters()]
            slopes = torch.autograd.grad(layer(x).pow(3).sum(), given, create_graph=True)
            sum(whole(slope).square().sum() for slope in slopes).backward()
            found.append({i: whole(one.grad) for i, one in enumerate(given)})
        alone, *others = found
        for other in others:
            assert_all_close(other, alone)


def weights(rank: int, folder: Path) -> None:
    """Read, differentiated, and put into a torch layer, from shards as from whole factors."""
    for spread in (sharded, by_rank):
        alone, model = words(), spread(words())
        for name in ("table", "first", "conv", "head"):
            ours, theirs = getattr(model, name), getattr(alone, name)
            assert torch.equal(ours.weight.detach().clone(), theirs.weight.detach().clone())
        ours, theirs = model.first, alone.first
        assert torch.equal(ours.to_linear().weight, theirs.to_linear().weight)
        assert torch.equal(ours.to_linear().bias, theirs.to_linear().bias)
        assert torch.equal(ours.cp.to_tensor(), theirs.cp.to_tensor())
        ours.weight.square().sum().backward()
        theirs.weight.square().sum().backward()
        for p, q in zip(ours.cp.parameters(), theirs.cp.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)
        for optimizer in ("adamw", "sgd"):
            rates = [
                polyadic.factor_rates(m.table, 1e-3, optimizer=optimizer) for m in (alone, model)
            ]
            assert [*rates[0].values()] == [*rates[1].values()]


def recovery(rank: int, folder: Path) -> None:
    """Both processes recover a model with one file of checkpoints."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))
    # One process begins when the other has finished, or is far ahead.
    if rank:
        dist.barrier()
    student = polyadic.compress(copy.deepcopy(teacher), ratio=1.5, checkpoint=folder / "pieces")[0]
    batches = [torch.randn(4, 12) for _ in range(8)]
    state = {"checkpoint": folder / "distilled", "checkpoint_every": 1}
    polyadic.finetune.distill(student, teacher, batches, steps=8, **state)
    assert (folder / "distilled").is_file()
    if not rank:
        dist.barrier()
    with pytest.raises(ValueError, match="pass resume=True"):
        polyadic.finetune.distill(student, teacher, batches, steps=8, **state)
    dist.barrier()
    spread = fully_shard(copy.deepcopy(teacher), mesh=mesh(dist.get_world_size()))
    students = [copy.deepcopy(student) for _ in range(2)]
    for one, known in zip(students, (teacher, spread), strict=True):
        path = folder / f"with {type(known).__name__}"
        polyadic.finetune.distill(one, known, batches, steps=2, checkpoint=path)
    assert_all_close(*(dict(one.named_parameters()) for one in students))


def compiled(
    rank: int,
    folder: Path,
    backend: str = "aot_eager",
    layouts: Sequence[Callable[[Any], nn.Module]] = (replicated, sharded, by_rank, by_features),
) -> None:
    """Compiled as it is spread."""
    x = torch.randint(23, (4, 3), generator=torch.Generator().manual_seed(5))
    alone = words()
    alone(x).square().mean().backward()
    for spread in layouts:
        torch.compiler.reset()
        model = spread(words())
        torch.compile(model, backend=backend)(x).square().mean().backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(getattr(p.grad, "full_tensor", lambda p=p: p.grad)(), q.grad)


CHECKS: dict[str, Callable[[int, Path], None]] = {
    "gradients of every layout": gradients,
    "checkpoints across layouts": checkpoints,
    "a sequence that is cut": sequences,
    "second derivatives": second_derivatives,
    "weights from shards": weights,
    "recovery with one file of checkpoints": recovery,
}
LONG = {"compiled": compiled}
INDUCTOR = {
    "compiled by the inductor": partial(compiled, backend="inductor", layouts=(sharded, by_rank))
}
