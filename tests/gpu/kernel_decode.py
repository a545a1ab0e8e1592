"""Tables of the kernels of a linear map of few rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from unittest import mock

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
    ((4, 4), (2, 5), 3, 5),
    ((13,), (11,), 5, 1),
    ((1, 8, 9), (4, 2, 3, 2), 17, 3),
    ((16, 18), (9, 8), 72, 16),
    ((4, 5, 3), (37,), 70, 2),
    ((3, 100), (9, 8), 24, 4),
)
# Whether one launch serves in half precision: not a single in factor, nor more than four rows.
ONE_LAUNCH = (False, False, True, False, True, True)


def check() -> Iterator[str]:
    """Each row of the table that holds."""
    for number, (in_modes, out_modes, rank, rows) in enumerate(SHAPES):
        for dtype in dtypes_of(number):
            found = subject.one_launch((in_modes, out_modes), rank, rows, True, dtype)
            as_said = (found is not None) == ONE_LAUNCH[number]
            assert as_said or dtype == torch.float32, (in_modes, rank)
            # Autocast casts x and the bias alone.
            wide = [(False, torch.float32)] if dtype != torch.float32 else []
            for integers, held in ((True, dtype), (False, dtype), *wide):
                name = f"{short(dtype)} {in_modes} to {out_modes} rank {rank} {rows=} {integers=}"
                name += f", factors in {short(held)}"
                ins, outs = draw_groups((in_modes, out_modes), rank, held, integers)
                x = draw((rows, math.prod(in_modes)), dtype, integers)
                bias = draw((math.prod(out_modes),), dtype, integers) if rows != 5 else None
                with poisoned():
                    once = subject.decode(x, ins, outs, bias)
                    again = subject.decode(x, ins, outs, bias) if repeats(dtype) else once
                    with mock.patch.object(subject, "one_launch", return_value=None):
                        twice = subject.decode(x, ins, outs, bias)
                assert torch.equal(once, again), f"{name}: differs from run to run"
                a, c = [f.cpu() for f in ins], [f.cpu() for f in outs]
                added = torch.zeros(1) if bias is None else bias.cpu()
                z = x.cpu().double() @ khatri_rao([f.double() for f in a])
                exact = z @ khatri_rao([f.double() for f in c]).t() + added.double()
                low_z = x.cpu().float() @ khatri_rao(a, dtype).float()
                low = low_z.to(dtype).float() @ khatri_rao(c, dtype).float().t() + added.float()
                small = integers and z.abs().max() <= 2**8
                judge(name, once, exact, low.to(dtype), bool(small))
                judge(f"{name} in two", twice, exact, low.to(dtype), bool(small))
                yield name
    yield _layer()


def _layer() -> str:
    """A layer of few rows launches one kernel or two, and gives what they give."""
    ins, outs = draw_groups(((1, 4, 6), (3, 5)), 8, torch.bfloat16, False)
    x, bias = draw((5, 24), torch.bfloat16, False), draw((15,), torch.bfloat16, False)
    route = LinearRoute((3,), (2,), by="triton")
    layer_map = LinearMap(LinearPlan(route, route, "x"), 3)
    for rows, names in ((2, ["decode_kernel"]), (5, ["contract_kernel", "expand_kernel"])):
        few = x[:rows]
        with counted() as launches:
            y, kept = layer_map.forward(few, bias, [*ins, *outs])
        assert kept == ()
        assert launches.names == names
        assert torch.equal(y, subject.decode(few, ins, outs, bias))
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
            for rows in (1, 16):
                if in_modes != (16, 16, 32):
                    yield from _forms((in_modes, out_modes), rank, rows, dtype)
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


def _forms(
    modes: tuple[tuple[int, ...], tuple[int, ...]], rank: int, rows: int, dtype: torch.dtype
) -> Iterator[Form]:
    (pointer,) = pointers_to(dtype, 1)
    form = subject.form_of(modes, rank, rows, True, dtype)
    ins, outs = (pointers_to(dtype, len(side)) for side in modes)
    name = f"{modes} rank {rank} {rows=} {short(dtype)}"
    cores, wide = dtype != torch.float32, rank * dtype.itemsize % 16 == 0
    yield Form(
        f"contract {name}",
        subject.contract_kernel,
        (pointer, ins, "*fp32", "i32"),
        form.contract,
        wide_loads=wide,
        tensor_cores=cores,
    )
    yield Form(
        f"expand {name}",
        subject.expand_kernel,
        ("*fp32", outs, pointer, pointer, "i32"),
        form.expand,
        wide_loads=wide,
        tensor_cores=cores,
    )
