"""Tables of the kernel of a linear map of few rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from compiled import Form, pointers_to
from data import draw, draw_groups, dtypes_of, judge, poisoned, repeats, short
from pretend import counted

from polyadic.kernels.linear import LinearMap
from polyadic.kernels.multilinear import khatri_rao
from polyadic.kernels.triton import decode as subject
from polyadic.plans import LinearPlan, LinearRoute

# In modes, out modes, rank, rows.
SHAPES = (
    ((4, 4), (2, 5), 3, 4),
    ((1, 8, 9), (4, 2, 3, 2), 17, 3),
    ((16, 18), (9, 8), 72, 1),
    ((4, 5, 3), (37,), 70, 2),
    ((3, 100), (9, 8), 24, 4),
)
# Not served: a single in factor, more than four rows, more terms than each program can make.
REFUSED = (((13,), (11,), 5, 1), ((4, 4), (2, 5), 3, 5), ((64, 64), (64, 64), 600, 1))


def check() -> Iterator[str]:
    """Each row of the table that holds."""
    for number, (in_modes, out_modes, rank, rows) in enumerate(SHAPES):
        for dtype in dtypes_of(number):
            # Four rows of so many features are too many in float32.
            if subject.one_launch((in_modes, out_modes), rank, rows, True, dtype) is None:
                assert dtype == torch.float32, (in_modes, rank)
                continue
            # Autocast casts x and the bias alone.
            wide = [(False, torch.float32)] if dtype != torch.float32 else []
            for integers, held in ((True, dtype), (False, dtype), *wide):
                name = f"{short(dtype)} {in_modes} to {out_modes} rank {rank} {rows=} {integers=}"
                name += f", factors in {short(held)}"
                ins, outs = draw_groups((in_modes, out_modes), rank, held, integers)
                x = draw((rows, math.prod(in_modes)), dtype, integers)
                bias = draw((math.prod(out_modes),), dtype, integers) if rows != 3 else None
                with poisoned():
                    once = subject.decode(x, ins, outs, bias)
                    again = subject.decode(x, ins, outs, bias) if repeats(dtype) else once
                assert once is not None
                assert again is not None
                assert torch.equal(once, again), f"{name}: differs from run to run"
                a, c = [f.cpu() for f in ins], [f.cpu() for f in outs]
                added = torch.zeros(1) if bias is None else bias.cpu()
                z = x.cpu().double() @ khatri_rao([f.double() for f in a])
                exact = z @ khatri_rao([f.double() for f in c]).t() + added.double()
                low_z = x.cpu().float() @ khatri_rao(a, dtype).float()
                low = low_z.to(dtype).float() @ khatri_rao(c, dtype).float().t() + added.float()
                small = integers and z.abs().max() <= 2**8
                judge(name, once, exact, low.to(dtype), bool(small))
                yield name
    yield _layer()


def _layer() -> str:
    """A layer of few rows launches one kernel, and gives what that gives; others launch three."""
    ins, outs = draw_groups(((1, 4, 6), (3, 5)), 8, torch.bfloat16, False)
    x, bias = draw((5, 24), torch.bfloat16, False), draw((15,), torch.bfloat16, False)
    route = LinearRoute((3,), (2,), by="triton")
    layer_map = LinearMap(LinearPlan(route, route, "x"), 3)
    for rows, launched in ((2, 1), (4, 1), (5, 3)):
        few = x[:rows]
        with counted() as launches:
            y, kept = layer_map.forward(few, bias, [*ins, *outs])
        assert kept == ()
        assert len(launches.names) == launched, launches.names
        alone = subject.decode(few, ins, outs, bias)
        assert (alone is not None) == (launched == 1)
        assert alone is None or torch.equal(y, alone)
    for in_modes, out_modes, rank, rows in REFUSED:
        dtype = torch.bfloat16
        assert subject.one_launch((in_modes, out_modes), rank, rows, True, dtype) is None
    return "layer"


def forms() -> Iterator[Form]:
    """What is compiled ahead of time."""
    for in_modes, out_modes, rank in (
        ((16, 16, 16), (16, 16, 16), 64),
        ((1, 64, 64), (86, 128), 256),
        ((64, 64), (64, 64), 89),
        ((16, 16, 32), (16, 16, 32), 64),
    ):
        for dtype in (torch.bfloat16, torch.float32):
            for rows in (1, 4):
                one = subject.one_launch((in_modes, out_modes), rank, rows, True, dtype)
                if one is not None:
                    yield _form_of_one(one, (in_modes, out_modes), rank, rows, dtype)


def _form_of_one(
    one: subject.OneLaunch,
    modes: tuple[tuple[int, ...], tuple[int, ...]],
    rank: int,
    rows: int,
    dtype: torch.dtype,
) -> Form:
    (pointer,) = pointers_to(dtype, 1)
    ins, outs = (pointers_to(dtype, len(side)) for side in modes)
    return Form(
        f"one launch {modes} rank {rank} {rows=} {short(dtype)}",
        subject.decode_kernel,
        (pointer, ins[: one.cut], ins[one.cut :], outs, pointer, pointer, "i32"),
        one.constants,
        wide_loads=rank * dtype.itemsize % 16 == 0,
        tensor_cores=dtype != torch.float32,
    )
