"""Styles for parallelize_module: what they place, what they say, and what they refuse by name.

The other processes are not there: collectives do nothing, and are counted. Numbers are held
against one process's by the matrix of features, which runs real processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils import parametrizations

import polyadic
from benchmarks.communication.count import Count, pretended
from polyadic.distributed import FeatureParallel, RankParallel
from polyadic.functional import cp_conv, cp_linear
from polyadic.nn import CPConv2d, CPEmbedding, CPLinear, CPSharedInput

PROCESSES = 4
WORD = 8  # bytes of a float64
B, M, N, R = 5, 12, 20, 6


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """That of the last process, which has the least. torch keeps what it found for a mesh of this
    size, so that no other test may pretend to be another of four processes.
    """
    with pretended(PROCESSES, PROCESSES - 1):
        yield dist.device_mesh.init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("all",))


def linear(**own: Any) -> CPLinear:
    shapes = {"in_shape": (4, 3), "out_shape": (4, 5)}
    return CPLinear(M, N, dtype=torch.float64, **{"rank": R, **shapes, **own})


def said(module: nn.Module, x: torch.Tensor) -> dict[str, list[int]]:
    with Count() as count:
        module(x).sum().backward()
    return count.total()


ALL = f"all_reduce of {PROCESSES}"
GATHER = f"all_gather of {PROCESSES}"


def rows(size: int = M) -> torch.Tensor:
    return torch.randn(B, size, dtype=torch.float64, requires_grad=True)


def test_rank_parallel_sums_the_output_and_the_inputs_gradient(mesh: Any) -> None:
    spread = parallelize_module(linear(), mesh, RankParallel())
    assert said(spread, rows()) == {ALL: [2, WORD * B * (N + M)]}


def test_rank_parallel_of_a_sequence_gathers_and_scatters(mesh: Any) -> None:
    style = RankParallel(input_layouts=Shard(0), output_layouts=Shard(0))
    spread = parallelize_module(linear(), mesh, style)
    whole = WORD * B * PROCESSES
    assert said(spread, rows()) == {
        GATHER: [2, whole * (M + N)],
        f"reduce_scatter of {PROCESSES}": [2, whole * (N + M)],
    }


def test_feature_parallel_sums_r_columns_and_whole_factors_once(mesh: Any) -> None:
    style = FeatureParallel(input_layouts=Shard(-1), output_layouts=Shard(-1))
    spread = parallelize_module(linear(), mesh, style)
    small = (3 + 5) * R
    got = said(spread, rows(M // PROCESSES))
    assert got == {ALL: [3, WORD * (2 * B * R + small)]}


def test_an_embedding_of_sharded_features_sums_nothing_forward(mesh: Any) -> None:
    table = CPEmbedding(23, 8, rank=R, in_shape=(2, 12), out_shape=(4, 2), dtype=torch.float64)
    parallelize_module(table, mesh, FeatureParallel(output_layouts=Shard(-1)))
    indices = torch.arange(6)
    with Count() as count, torch.no_grad():
        assert table(indices).shape == (6, 8 // PROCESSES)
    assert not count.said
    assert said(table, indices) == {ALL: [1, WORD * (2 + 12 + 2) * R]}


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 7])
def test_any_rank_is_shared_out(mesh: Any, rank: int) -> None:
    """As torch.chunk does it, so that processes beyond the rank hold none."""
    spread = parallelize_module(linear(rank=rank), mesh, RankParallel())
    sizes = [len(part) for part in torch.arange(rank).chunk(PROCESSES)]
    sizes += [0] * (PROCESSES - len(sizes))
    for factor in spread.cp.factors:
        assert factor.shape[1] == rank
        assert factor.to_local().shape[1] == sizes[mesh.get_local_rank()]
    assert said(spread, rows()) == {ALL: [2, WORD * B * (N + M)]}
    assert all(p.grad.placements == p.placements for p in spread.parameters())


def test_a_whole_model_is_spread_and_ties_stay(mesh: Any) -> None:
    table = CPEmbedding(23, 8, rank=R)
    shared = CPSharedInput([CPLinear(8, 8, rank=R), CPLinear(8, 4, rank=R)])
    joint = CPLinear.joint(2, 8, 8, rank=R)
    model = nn.ModuleDict(
        {
            "table": table,
            "qk": shared,
            "joint": joint,
            "head": table.as_linear(True),
            "norm": nn.LayerNorm(8),
        }
    )
    names = dict(model.named_parameters()).keys()
    parallelize_module(model, mesh, RankParallel())
    assert dict(model.named_parameters()).keys() == names
    assert model["head"].cp is table.cp
    assert joint[0].cp.joint is joint[1].cp.joint
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) is not name.startswith("norm")
    x = model["table"](torch.arange(3))
    q, k = model["qk"](x)
    assert (q.shape, k.shape) == ((3, 8), (3, 4))
    model["head"](joint[1](joint[0](q))).sum().backward()
    assert all(p.grad is not None for p in table.parameters())


def test_layers_called_together_that_share_factors_share_their_product(mesh: Any) -> None:
    shared = CPSharedInput(CPLinear.joint(2, 8, 8, rank=R, dtype=torch.float64))
    parallelize_module(shared, mesh, RankParallel())
    x = rows(8)
    with Count() as count:
        y, z = shared(x)
        (y.sum() + z.sum()).backward()
    assert count.total() == {ALL: [3, WORD * B * (8 + 8 + 8)]}


def test_calls_as_of_any_layer(mesh: Any) -> None:
    """By keyword, with an output that is changed in place, and nothing nested."""
    layer = parallelize_module(linear(), mesh, RankParallel())
    y = layer(x=rows())
    y += 1
    y.mul_(2).sum().backward()
    nested = torch.nested.nested_tensor([rows()], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"got a nested tensor.*x\.values"):
        layer(nested)
    kept = parallelize_module(linear(), mesh, RankParallel(use_local_output=False))
    assert kept(rows()).placements == (Replicate(),)


def frozen() -> nn.Module:
    return polyadic.freeze(nn.Sequential(linear()), batch=4096)


def of_another_mesh(mesh: Any) -> nn.Module:
    layer = linear()
    two = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    return parallelize_module(layer, two["b"], RankParallel())


def tied_to_a_spread_one(mesh: Any) -> nn.Module:
    first, second = CPLinear.joint(2, M, N, rank=R, in_shape=(4, 3), out_shape=(4, 5))
    parallelize_module(first, mesh, RankParallel())
    return second


REFUSED: list[tuple[str, Any, Callable[[Any], nn.Module], str]] = [
    ("Colwise", ColwiseParallel(), lambda _: linear(), "Colwise.*RankParallel"),
    ("Rowwise", RowwiseParallel(), lambda _: CPEmbedding(5, 4, rank=2), "polyadic.distributed"),
    ("no CP layer", RankParallel(), lambda _: nn.Linear(4, 4), "expects a CP layer.*Linear"),
    ("frozen", RankParallel(), lambda _: frozen(), "frozen; call polyadic.unfreeze"),
    ("parametrized", RankParallel(),
     lambda _: (parametrizations.weight_norm(m := linear(), "bias"), m)[1], "parametrized"),
    ("another mesh", RankParallel(), of_another_mesh, "is a DTensor on .*apply the style before"),
    ("another style", FeatureParallel(), tied_to_a_spread_one, "must have one style"),
    ("uneven", FeatureParallel(), lambda _: linear(in_shape=(2, 6)), r"\(2, 6\).*RankParallel"),
    ("uneven out", FeatureParallel(features="out"), lambda _: linear(out_shape=(5, 4)), "mode 5"),
    ("convolution", FeatureParallel(), lambda _: CPConv2d(4, 4, 3, rank=2), "CPConv2d.*Rank"),
    ("together", FeatureParallel(), lambda _: CPSharedInput([linear()]), "a CPShared"),
    ("rows", FeatureParallel(features="in"), lambda _: CPEmbedding(16, 4, rank=2), "its in"),
    ("rows of a head", FeatureParallel(features="out"),
     lambda _: CPEmbedding(16, 4, rank=2).as_linear(), "cannot shard its out"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "style", "make", "message"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused_by_name(
    mesh: Any, name: str, style: Any, make: Callable[[Any], nn.Module], message: str
) -> None:
    module = make(mesh)
    before = {key: id(p) for key, p in module.named_parameters()}
    with pytest.raises((ValueError, TypeError), match=message):
        parallelize_module(module, mesh, style)
    if name != "another style":
        assert {key: id(p) for key, p in module.named_parameters()} == before


def test_dense_layers_keep_torchs_styles(mesh: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    assert model[0].weight.placements == (Shard(0),)
    assert model[1].weight.placements == (Shard(1),)


def test_arguments_of_a_style() -> None:
    with pytest.raises(TypeError, match="input_layouts must be a placement"):
        RankParallel(input_layouts="rows")
    with pytest.raises(ValueError, match="features must be one of 'in', 'out', 'both'"):
        FeatureParallel(features="all")


def test_a_mesh_of_two_dimensions_is_refused(mesh: Any) -> None:
    two = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    style = RankParallel()
    with pytest.raises(ValueError, match=r"one dimension.*mesh\["):
        style._apply(linear(), two)


def spread(mesh: Any, factors: Any, *placements: Any) -> list[Any]:
    return [distribute_tensor(f, mesh, [p]) for f, p in zip(factors, placements, strict=True)]


def test_functions_take_dtensors_or_say_what_is_wrong(mesh: Any) -> None:
    layer = linear()
    ins, outs = layer.in_factors, layer.out_factors
    x, whole = distribute_tensor(rows().detach(), mesh, [Replicate()]), Replicate()
    columns = [Shard(1)] * 2
    y = cp_linear(x, spread(mesh, ins, *columns), spread(mesh, outs, *columns))
    assert y.placements == (Partial(),)
    assert y.shape == (B, N)
    parts = DTensor.from_local(torch.randn(B, M, dtype=torch.float64), mesh, [Partial()])
    y = cp_linear(parts, spread(mesh, ins, whole, whole), spread(mesh, outs, whole, whole))
    assert y.placements == (whole,)
    batch = distribute_tensor(torch.randn(7, M, dtype=torch.float64), mesh, [Shard(0)])
    y = cp_linear(batch, spread(mesh, ins, whole, whole), spread(mesh, outs, whole, whole))
    assert y.placements == (Shard(0),)
    assert y.shape == (7, N)
    with pytest.raises(TypeError, match=r"x is plain.*RankParallel"):
        cp_linear(rows(), spread(mesh, ins, *columns), spread(mesh, outs, *columns))
    with pytest.raises(TypeError, match="some of the others are plain"):
        cp_linear(x, ins, spread(mesh, outs, *columns))
    for i, o in ((columns, [whole, whole]), ([whole, Shard(0)], [whole, whole])):
        with pytest.raises(ValueError, match="either every factor is to be Shard"):
            cp_linear(x, spread(mesh, ins, *i), spread(mesh, outs, *o))
    first = [Shard(0), whole]
    other = [torch.randn(m, R, dtype=torch.float64) for m in (3, 4)]
    with pytest.raises(ValueError, match="must be a multiple of the number"):
        cp_linear(x, spread(mesh, other, *first), spread(mesh, outs, whole, whole))
    bias = distribute_tensor(layer.bias.detach(), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="are to be Replicate"):
        cp_linear(x, spread(mesh, ins, *columns), spread(mesh, outs, *columns), bias)
    conv = CPConv2d(4, 4, 3, rank=2, out_shape=(4, 1), in_shape=(2, 2))
    image = distribute_tensor(torch.randn(2, 4, 5, 5), mesh, [Replicate()])
    groups = [
        spread(mesh, group, *([Shard(0)] * (i == 0) + [whole] * (2 - (i == 0))))
        for i, group in enumerate((conv.out_factors, conv.in_factors, conv.kernel_factors))
    ]
    with pytest.raises(ValueError, match="either every factor is to be Shard"):
        cp_conv(image, *groups)


def test_ties_over_two_groups_of_shards_are_refused(mesh: Any) -> None:
    table = CPEmbedding(23, 8, rank=R)
    first, second = CPLinear.joint(2, 8, 8, rank=R)
    for one, other in ((table, table.as_linear(True)), (first, second)):
        fully_shard(one, mesh=mesh)
        with pytest.raises(ValueError, match=r"over this mesh already.*fully_shard\(\[one"):
            fully_shard(other, mesh=mesh)


def test_what_changes_parameters_refuses_spread_ones(mesh: Any) -> None:
    table = parallelize_module(CPEmbedding(23, 8, rank=R), mesh, RankParallel())
    with pytest.raises(ValueError, match="resize expects whole factors"):
        table.resize(30)
    model = nn.Sequential(parallelize_module(linear(), mesh, RankParallel()))
    for call in (polyadic.freeze, polyadic.merge):
        with pytest.raises(ValueError, match="is a DTensor"):
            call(model)
