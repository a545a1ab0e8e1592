"""Tables of the kernels that look up in a table in CP format and scatter into its factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from compiled import Form, pointers_to
from data import device, draw, draw_groups, dtypes_of, judge, poisoned, repeats, short
from pretend import assertions, counted, fused_kernels, judge_together
from torch import Tensor

from polyadic.functional import cp_embedding
from polyadic.functional import embedding as planned
from polyadic.functional.boundary import Call
from polyadic.kernels.embedding import MOST_SCATTERED_ROWS, EmbeddingMap
from polyadic.kernels.multilinear import khatri_rao
from polyadic.kernels.pairs import padded_rank
from polyadic.kernels.triton import embedding as subject
from polyadic.plans import LinearPlan, LinearRoute

# In modes, out modes, rank, indices: a scale of one row, one factor, rows read entry by entry, more
# terms than a tile has, factors of more rows than a program owns, several shares of the indices.
SHAPES = (
    ((4, 4), (2, 5), 3, 5),
    ((13,), (11,), 5, 1),
    ((1, 8, 9), (4, 2, 3, 2), 17, 70),
    ((70, 5), (8, 9), 72, 66),
)


def digits(indices: Tensor, modes: Sequence[int]) -> list[Tensor]:
    """The digit of each index in each mode, the last mode running fastest."""
    found = []
    for mode in reversed(modes):
        found.insert(0, indices % mode)
        indices = indices // mode
    return found


def scattered(
    g: Tensor, indices: Tensor, factors: Sequence[Tensor], own: int, dtype: torch.dtype
) -> Tensor:
    """Gradient of one in factor, computed in a dtype as the definition says."""
    where = digits(indices, [factor.shape[0] for factor in factors])
    rows = g.to(dtype)
    for d, factor in enumerate(factors):
        if d != own:
            rows = rows * factor.to(dtype)[where[d]]
    return rows.new_zeros(factors[own].shape).index_add(0, where[own], rows)


def check() -> Iterator[str]:
    """Each row of the table that holds."""
    for number, shape in enumerate(SHAPES):
        for dtype in dtypes_of(number):
            for integers in (True, False):
                name = f"{short(dtype)} {shape} {integers=}"
                _check_one(name, *shape, dtype, integers)
                yield name
    yield _wide_tile()
    yield _outside()
    yield from _layers()
    yield _launches()


def _check_one(
    name: str,
    in_modes: tuple[int, ...],
    out_modes: tuple[int, ...],
    rank: int,
    count: int,
    dtype: torch.dtype,
    integers: bool,
) -> None:
    ins, outs = draw_groups((in_modes, out_modes), rank, dtype, integers)
    # Both kinds of indices, and a padding index that occurs.
    there = torch.randint(math.prod(in_modes), (count,))
    padding = int(there[count // 2]) if count > 2 else None
    indices = there.to(device(), torch.int32 if integers else torch.int64)
    padded = padded_rank(rank)
    g = draw((count, padded), dtype, integers)
    g[:, rank:] = float("nan")
    with poisoned():
        size = math.prod(in_modes)
        y, z = subject.lookup(indices, ins, outs, padding, size, padded, keep=True)
        alone, nothing = subject.lookup(indices, ins, outs, padding, size, padded, keep=False)
        again, kc = subject.rows(indices, ins, outs, padding, padded)
        gradients = subject.scatter(g, indices, ins, padding)
        repeated = gradients
        if repeats(dtype) and not integers:
            repeated = subject.scatter(g, indices, ins, padding)
    assert nothing is None
    assert z is not None
    assert torch.equal(y, alone), f"{name}: y depends on whether z is kept"
    assert torch.equal(z, again), f"{name}: z is made in two ways that differ"
    a, c = [f.cpu() for f in ins], [f.cpu() for f in outs]
    real = (there != padding).unsqueeze(1) if padding is not None else torch.ones(count, 1).bool()
    wide_z = khatri_rao([f.double() for f in a])[there] * real
    torchs_z, torchs_kc = khatri_rao(a)[there] * real, khatri_rao(c)
    for matrix, expected in ((z, torchs_z), (kc, torchs_kc)):
        assert torch.equal(matrix[:, :rank].cpu(), expected), f"{name}: other bits than torch's"
        assert not matrix[:, rank:].any(), f"{name}: padding is not zero"
    exact = wide_z @ khatri_rao([f.double() for f in c]).t()
    judge(f"{name} y", y, exact, torchs_z @ torchs_kc.t(), integers)
    rows = g.cpu()[:, :rank] * real
    for d, (gradient, other) in enumerate(zip(gradients, repeated, strict=True)):
        assert torch.equal(gradient, other), f"{name}: factor {d} differs from run to run"
        exact = scattered(rows, there, a, d, torch.float64)
        torchs = scattered(rows, there, a, d, torch.float32).to(dtype)
        judge(f"{name} factor {d}", gradient, exact, torchs, integers)


def _wide_tile() -> str:
    """The tile of many indices, and programs of several tiles, which few would not be given."""
    before = subject.ENOUGH_PROGRAMS, subject.AT_ONCE
    subject.ENOUGH_PROGRAMS = subject.AT_ONCE = 1
    subject.lookup_tile.cache_clear()
    try:
        # KC is made once, and for each tile; the last tile is not full.
        for rank in (24, 72):
            _check_one(
                f"wide tile, rank {rank}", (5, 6), (15, 10), rank, 150, torch.bfloat16, False
            )
    finally:
        subject.ENOUGH_PROGRAMS, subject.AT_ONCE = before
        subject.lookup_tile.cache_clear()
    return "wide tile"


def _outside() -> str:
    """An index outside the table fails loudly, reads nothing, and sends no gradient."""
    ins, outs = draw_groups(((3, 4), (5,)), 8, torch.float32, False)
    indices = torch.tensor([-1, 2, 12, 2**30], device=device())
    # On a GPU what follows a failed assertion cannot be computed; see ``benchmarks.gpu``.
    if device() == "cpu":
        y, _ = subject.lookup(indices, ins, outs, None, 12, 8, keep=False)
        assert not y[[0, 2, 3]].any()
        assert y[1].all()
        with assertions():
            subject.lookup(indices[1:2].clone(), ins, outs, None, 12, 8, keep=False)
            for wrong, size in ((-1, 12), (12, 12), (9, 9), (2**30, 12)):
                index = torch.tensor([1, wrong])
                said = "nothing"
                try:
                    subject.lookup(index, ins, outs, None, size, 8, keep=False)
                except Exception as error:
                    said = f"{error!r} {error.__cause__!r}"
                assert "outside the table" in said, f"index {wrong} of {size}: {said}"
    g = draw((4, 8), torch.float32, False)
    once = subject.scatter(g, indices, ins, None)
    alone = subject.scatter(g[1:2].clone(), indices[1:2].clone(), ins, None)
    for gradient, expected in zip(once, alone, strict=True):
        torch.testing.assert_close(gradient, expected)
    return "outside the table"


def _layers() -> Iterator[str]:
    """Whole layers on the kernels, against the same on torch's operations."""
    layers = ((5, 6, 7), (4, 6), 12, 0), ((1, 9, 4), (7,), 5, 1)
    for number, (in_modes, out_modes, rank, keep) in enumerate(layers):
        for dtype in dtypes_of(number):
            name = f"layer {short(dtype)} {in_modes} {out_modes} rank {rank} {keep=}"
            ins, outs = draw_groups((in_modes, out_modes), rank, dtype, False)
            n, n_in = math.prod(in_modes), len(ins)
            indices = torch.randint(n, (40,)).to(device())
            route = LinearRoute((1,) * n_in, (len(outs),), by="triton")
            layer_map = EmbeddingMap(LinearPlan(route, route, keep), n_in, int(indices[3]))
            grad_y = draw((40, math.prod(out_modes)), dtype, False)
            factors = [*ins, *outs]
            with fused_kernels():
                found = _step(layer_map, indices, factors, grad_y)
                for needs in (True, False), (False, True):
                    parts = _step(layer_map, indices, factors, grad_y, needs)
                    for part, whole in zip(parts, found, strict=True):
                        assert part is None or torch.equal(part, whole), f"{name} {needs}"
            there = indices.cpu(), [f.cpu() for f in factors], grad_y.cpu()
            torchs = _step(layer_map, *there)
            wide = there[0], [f.double() for f in there[1]], there[2].double()
            exact = _step(layer_map, *wide)
            judge_together(name, found, exact, torchs)
            # What one way keeps serves the other: only one of the two may be watched by a mode.
            for pair in (fused_kernels(), nullcontext()), (nullcontext(), fused_kernels()):
                mixed = _step(layer_map, indices, factors, grad_y, ways=pair)
                judge_together(f"{name} in two ways", mixed, exact, torchs)
            yield name


def _launches() -> str:
    """A training step launches seven kernels, a lookup one: the check of the indices is in it."""
    ins, outs = draw_groups(((1, 5, 6), (4, 3)), 8, torch.bfloat16, False)
    leaves = [factor.requires_grad_() for factor in (*ins, *outs)]
    # On a GPU more of them than a factor may have rows; ``test_counted.py`` counts those elsewhere.
    count = MOST_SCATTERED_ROWS + 1 if device() == "cuda" else 40
    indices = torch.randint(30, (count,), device=device())
    route = LinearRoute((1, 1, 1), (2,), by="triton")
    plan = LinearPlan(route, route, "x")
    layer_map = EmbeddingMap(plan, 3, 3)
    with torch.enable_grad(), counted() as launches:
        y = Call(layer_map, 0).run(indices, (leaves,), None, None)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    # The gradient of y is made here.
    names = [name for name in launches.names if name != "ones_like"]
    assert len(names) <= 7, names
    groups = [leaf.detach() for leaf in leaves[:3]], [leaf.detach() for leaf in leaves[3:]]
    with counted() as launches, mock.patch.object(planned, "plan_embedding", return_value=plan):
        cp_embedding(indices, *groups)
    assert launches.names == ["lookup_kernel"], launches.names
    return f"{len(names)} launches"


def _step(
    layer_map: EmbeddingMap,
    indices: Tensor,
    factors: Sequence[Tensor],
    grad_y: Tensor,
    needs: tuple[bool, bool] = (True, True),
    ways: tuple[AbstractContextManager[None], ...] = (nullcontext(), nullcontext()),
) -> list[Any]:
    """Output and gradients, None where they are not needed."""
    with ways[0]:
        y, kept = layer_map.forward(indices, None, factors)
    cut = layer_map.n_in
    wanted = [False, *[needs[0]] * cut, *[needs[1]] * (len(factors) - cut)]
    with ways[1]:
        return [y, *layer_map.backward(grad_y, indices, kept, factors, wanted)[1]]


def forms() -> Iterator[Form]:
    """What is compiled ahead of time."""
    for in_modes, out_modes, rank in (
        ((37, 37, 37), (8, 8, 12), 64),
        ((225, 224), (32, 24), 256),
        ((1, 16, 16, 16), (16, 16), 89),
    ):
        # Half precisions make the same code but for the names of instructions.
        for dtype in (torch.bfloat16, torch.float32):
            yield from _forms(in_modes, out_modes, rank, dtype)


def _forms(
    in_modes: tuple[int, ...], out_modes: tuple[int, ...], rank: int, dtype: torch.dtype
) -> Iterator[Form]:
    name = f"{in_modes} {out_modes} rank {rank} {short(dtype)}"
    padded = padded_rank(rank)
    (pointer,) = pointers_to(dtype, 1)
    ins, outs = pointers_to(dtype, len(in_modes)), pointers_to(dtype, len(out_modes))
    sides = subject.sides((in_modes, out_modes), rank)
    common: dict[str, Any] = {"wide_loads": rank * dtype.itemsize % 16 == 0}
    for count, keep in ((100, True), (65536, False)):
        tile = subject.lookup_tile(count, math.prod(out_modes), rank, dtype)
        yield Form(
            f"lookup of {count} {name}",
            subject.lookup_kernel,
            ("*i64", ins, outs, pointer, pointer, *("i32",) * 4),
            (*sides, padded, keep, *tile[:3]),
            warps=tile.warps,
            asserts=True,
            tensor_cores=dtype != torch.float32,
            **common,
        )
    yield Form(
        f"rows {name}",
        subject.rows_kernel,
        ("*i64", ins, outs, pointer, pointer, "i32", "i32", "i32"),
        subject.rows_constants(sides, padded),
        **common,
    )
    for warpgroups in (True, False):
        form = subject.scatter_form(in_modes, rank, padded, dtype, warpgroups)
        yield Form(
            f"scatter {name} {warpgroups=}",
            subject.scatter_kernel,
            (pointer, "*i64", ins, "*fp32", "i32", "i32", "i32"),
            form.constants,
            tensor_cores=True,
            capabilities=(90,) if warpgroups else (80, 100),
            **common,
        )
