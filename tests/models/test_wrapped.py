"""What changes the parameters of a model refuses one that is wrapped or sharded, by name.

A wrapper synchronises the parameters it found when it was made. Had new ones taken their places,
the processes would train apart from each other without an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import polyadic
from polyadic import decompose
from polyadic.finetune import distill, match_layers
from polyadic.nn import CPLinear


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))


def factorized() -> nn.Sequential:
    return nn.Sequential(CPLinear(12, 8, rank=3), nn.Tanh(), nn.Linear(8, 6))


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    return fully_shard(model, mesh=mesh)


def unsharded(model: nn.Module) -> nn.Module:
    """Between forward and backward parameters are whole for a while, and still not its own."""
    fully_sharded(model).unshard()
    assert not any(hasattr(parameter, "placements") for parameter in model.parameters())
    return model


def replicated(model: nn.Module) -> nn.Module:
    composable = pytest.importorskip("torch.distributed._composable.replicate")
    return composable.replicate(model)


def tensor_parallel(model: nn.Module) -> nn.Module:
    """One parameter alone, in a layer that no call asks for."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    sharded = distribute_tensor(model[2].weight.detach(), mesh, [Shard(0)])
    model[2].weight = nn.Parameter(sharded)
    return model


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


WRAPPERS: list[tuple[str, Callable[[nn.Module], nn.Module], str]] = [
    ("DDP", nn.parallel.DistributedDataParallel, "model is in DistributedDataParallel"),
    (
        "DDP inside",
        lambda m: nn.ModuleDict({"body": nn.parallel.DistributedDataParallel(m)}),
        "model.body is in DistributedDataParallel",
    ),
    ("DataParallel", nn.DataParallel, "model is in DataParallel"),
    ("replicate", replicated, "model is in DDP"),
    ("FSDP1", fsdp1, "model is in FullyShardedDataParallel"),
    ("FSDP2", fully_sharded, "model is in FSDPModule"),
    ("FSDP2 unsharded", unsharded, "model is in FSDPModule"),
    ("DTensor", tensor_parallel, "model.2.weight is a DTensor"),
]


def saved(folder: Path) -> Path:
    polyadic.save_pretrained(factorized(), folder)
    return folder


def batches() -> list[Tensor]:
    return [torch.randn(4, 12) for _ in range(2)]


CALLS: list[tuple[str, Callable[[], nn.Module], Callable[[Any, Path], Any]]] = [
    ("compress", dense, lambda m, _: polyadic.compress(m, ratio=2)),
    ("compress", dense, lambda m, _: polyadic.compress(m, ratio=2, inplace=True)),
    ("compress", dense, lambda m, _: polyadic.compress(m, ratio=2, dry_run=True)),
    ("merge", factorized, lambda m, _: polyadic.merge(m)),
    ("freeze", factorized, lambda m, _: polyadic.freeze(m)),
    ("from_pretrained", dense, lambda m, folder: polyadic.from_pretrained(saved(folder), m)),
    ("distill", factorized, lambda m, _: distill(m, dense(), batches(), steps=1)),
    ("match_layers", factorized, lambda m, _: match_layers(m, dense(), batches(), steps=1)),
]


@pytest.mark.parametrize(
    ("wrap", "message"), [w[1:] for w in WRAPPERS], ids=[w[0] for w in WRAPPERS]
)
@pytest.mark.parametrize(
    ("name", "make", "call"), CALLS, ids=[f"{i}-{c[0]}" for i, c in enumerate(CALLS)]
)
def test_a_wrapped_model_is_refused_by_name(
    name: str, make: Any, call: Any, wrap: Any, message: str, tmp_path: Path
) -> None:
    model = wrap(make())
    before = {key: (id(p), copy.deepcopy(p.detach())) for key, p in model.named_parameters()}
    if name in ("distill", "match_layers"):
        message = message.replace("model", "student", 1)
    with pytest.raises(ValueError, match=rf"{name} expects .*{message}.*the plain model"):
        call(model, tmp_path)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    for key, (identity, value) in before.items():
        assert id(after[key]) == identity
        assert torch.equal(after[key], value)


def test_the_plain_model_inside_is_taken() -> None:
    wrapped = nn.parallel.DistributedDataParallel(dense())
    new, _ = polyadic.compress(wrapped.module, ratio=2)
    again = nn.parallel.DistributedDataParallel(new)
    again(torch.randn(3, 12)).sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())


def test_a_sharded_weight_is_not_fitted() -> None:
    weight = tensor_parallel(dense())[2].weight
    with pytest.raises(ValueError, match="must be whole, got a DTensor"):
        decompose(weight, ((6,), (8,)), 2)
    with pytest.raises(TypeError, match="got a DTensor"):
        CPLinear.from_linear(tensor_parallel(dense())[2], rank=2)


def test_a_compiled_model_is_no_wrapper() -> None:
    """It is compiled anew for the layers it holds by then."""
    x, model = torch.randn(5, 12), dense()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    polyadic.compress(compiled, ratio=2, inplace=True)
    assert any(isinstance(layer, CPLinear) for layer in model)
    torch.testing.assert_close(compiled(x), model(x))
    before = model(x)
    polyadic.freeze(compiled)
    torch.testing.assert_close(compiled(x), before)
    polyadic.unfreeze(compiled)
    polyadic.merge(compiled)
    torch.testing.assert_close(compiled(x), before)
