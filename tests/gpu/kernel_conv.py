"""Tables of the kernels of a convolution's depthwise stage, and of layers that stand on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from compiled import Form, pointers_to
from data import (
    DTYPES,
    device,
    draw,
    draw_groups,
    dtypes_of,
    judge,
    poisoned,
    repeats,
    short,
)
from pretend import fused_kernels, judge_together
from torch import Tensor

from polyadic.kernels import fused_conv
from polyadic.kernels.conv import ConvMap
from polyadic.kernels.depthwise import Geometry
from polyadic.kernels.triton import conv as subject
from polyadic.kernels.triton import depthwise
from polyadic.kernels.triton.depthwise import Where
from polyadic.plans import ConvPlan, ConvRoute

Three = tuple[int, int, int]
ONE, NONE = (1, 1, 1), (0, 0, 0)
# Images, spatial size, groups, maps, out channels of a group, and the stage; padding behind is what
# the last number says beyond that in front.
SHAPES: tuple[tuple[int, Three, int, int, int, Where, Three], ...] = (
    (2, (1, 5, 6), 1, 8, 10, Where((1, 3, 3), ONE, (0, 1, 1), ONE), NONE),
    (1, (1, 9, 7), 1, 24, 33, Where((1, 3, 3), (1, 2, 2), (0, 1, 1), ONE), NONE),
    (1, (1, 8, 8), 2, 16, 5, Where((1, 5, 3), (1, 1, 2), (0, 2, 0), (1, 1, 2)), NONE),
    (3, (1, 1, 20), 1, 40, 16, Where((1, 1, 4), (1, 1, 3), (0, 0, 1), ONE), (0, 0, 1)),
    (1, (4, 5, 3), 1, 8, 7, Where((2, 3, 2), (2, 1, 1), (1, 1, 0), ONE), NONE),
)


def by_torch(
    z1: Tensor, taps: Tensor, where: Where, more: Three, groups: int, dtype: torch.dtype
) -> Tensor:
    """Z2 (b, g·r, *s') of z1 (b, g·r, *s), computed in a dtype by torch."""
    kernels = taps.to(dtype).t().repeat(groups, 1).reshape(-1, 1, *where.kernel)
    front = where.padding
    widths = [w for d in (2, 1, 0) for w in (front[d], front[d] + more[d])]
    padded = F.pad(z1.to(dtype), widths)
    return F.conv3d(padded, kernels, None, where.stride, 0, where.dilation, z1.shape[1])


def output_size(size: Three, where: Where, more: Three) -> Three:
    """Spatial size behind the stage."""
    sizes = [
        (n + 2 * front + extra - d * (k - 1) - 1) // s + 1
        for n, k, s, front, d, extra in zip(size, *where, more, strict=True)
    ]
    return sizes[0], sizes[1], sizes[2]


def channels_first(rows: Tensor, images: int, size: Three) -> Tensor:
    """(b·s, c) → (b, c, *s)."""
    return rows.view(images, *size, rows.shape[1]).movedim(-1, 1)


def rows_of(maps: Tensor) -> Tensor:
    """(b, c, *s) → (b·s, c)."""
    return maps.movedim(1, -1).reshape(-1, maps.shape[1])


def check() -> Iterator[str]:
    """Each row of the table that holds."""
    for number, shape in enumerate(SHAPES):
        for dtype in dtypes_of(number):
            # A GPU's time goes to compiling: there each shape is checked in one dtype.
            if device() == "cuda" and dtype != _turn(number):
                continue
            for integers in (True, False):
                name = f"{short(dtype)} {shape} {integers=}"
                _check_forward(name, *shape, dtype, integers)
                _check_backward(name, *shape, dtype, integers)
                yield name
    yield from _layers()


def _turn(number: int) -> torch.dtype:
    """The dtype in which a row is checked where it is checked in one, each dtype in its turn."""
    return (torch.float32, torch.float16, torch.bfloat16)[number % 3]


def _check_forward(
    name: str,
    images: int,
    size: Three,
    groups: int,
    rank: int,
    channels: int,
    where: Where,
    more: Three,
    dtype: torch.dtype,
    integers: bool,
) -> None:
    out = output_size(size, where, more)
    z1 = draw((images * math.prod(size), groups * rank), dtype, integers)
    taps = draw((math.prod(where.kernel), rank), dtype, integers)
    kc = draw((groups * channels, rank), dtype, integers)
    bias = draw((groups * channels,), dtype, integers)
    with poisoned():
        y, z2 = subject.depthwise_project(z1, taps, kc, bias, where, size, out, groups, keep=True)
        bare, nothing = subject.depthwise_project(
            z1, taps, kc, None, where, size, out, groups, keep=False
        )
    assert nothing is None
    assert z2 is not None

    def way(wide: torch.dtype, low: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Z2, Y and Y without bias, Z2 rounded once on the way."""
        maps = channels_first(z1.cpu(), images, size)
        middle = rows_of(by_torch(maps, taps.cpu(), where, more, groups, wide)).to(low)
        by_group = middle.to(wide).view(-1, groups, rank).transpose(0, 1)
        matrices = kc.cpu().to(wide).view(groups, channels, rank)
        plain = (by_group @ matrices.mT).transpose(0, 1).reshape(middle.shape[0], -1)
        return middle, (plain + bias.cpu().to(wide)).to(low), plain.to(low)

    exact, torchs = way(torch.float64, torch.float64), way(torch.float32, dtype)
    # Integers stay exact only if what is rounded on the way does.
    small = integers and exact[0].abs().max() <= 2**8
    for what, numbers, wanted, given in zip(
        ("z2", "y", "bare"), (z2, y, bare), exact, torchs, strict=True
    ):
        judge(f"{name} {what}", numbers, wanted, given, small)


def _check_backward(
    name: str,
    images: int,
    size: Three,
    groups: int,
    rank: int,
    channels: int,
    where: Where,
    more: Three,
    dtype: torch.dtype,
    integers: bool,
) -> None:
    out = output_size(size, where, more)
    z1 = draw((images * math.prod(size), groups * rank), dtype, integers)
    d_z2 = draw((images * math.prod(out), groups * rank), dtype, integers)
    taps = draw((math.prod(where.kernel), rank), dtype, integers)
    given = z1, d_z2, taps, where, size, out, groups
    with poisoned():
        stage = depthwise.depthwise(z1, taps, where, size, out, groups)
        once = depthwise.depthwise_backward(*given, wrt_taps=True, again=True)
        twice = once
        if repeats(dtype):
            twice = depthwise.depthwise_backward(*given, wrt_taps=True, again=True)
        alone = depthwise.depthwise_backward(*given, wrt_taps=False, again=False)
    assert alone[1] is None
    assert alone[2] is None
    assert once[1] is not None
    assert once[2] is not None
    assert torch.equal(once[2], stage), f"{name}: Z2 is made in two ways that differ"
    assert torch.equal(once[0], alone[0]), f"{name}: dZ1 depends on what else is wanted"

    def way(wide: torch.dtype, low: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """dZ1, dtaps in float32 or more, and Z2."""
        maps = channels_first(z1.cpu(), images, size).to(wide).requires_grad_()
        leaves = taps.cpu().to(wide).requires_grad_()
        with torch.enable_grad():
            z2 = by_torch(maps, leaves, where, more, groups, wide)
            gradient = channels_first(d_z2.cpu(), images, out).to(wide)
            d_maps, d_taps = torch.autograd.grad(z2, (maps, leaves), gradient)
        return rows_of(d_maps).to(low), d_taps, rows_of(z2.detach()).to(low)

    exact, torchs = way(torch.float64, torch.float64), way(torch.float32, dtype)
    for what, numbers, again, wanted, given_by_torch in zip(
        ("dz1", "dtaps", "z2"), once, twice, exact, torchs, strict=True
    ):
        assert numbers is not None
        assert torch.equal(numbers, again), f"{name}: {what} differs from run to run"
        total = numbers.sum(0) if what == "dtaps" else numbers
        judge(f"{name} {what}", total, wanted, given_by_torch, integers)


# Input (b, c, *s), groups, geometry, and how many maps are kept, of whole layers: strides of a 1×1
# kernel and of one with one row, one dimension and three, padding behind alone.
LAYERS: tuple[tuple[tuple[int, ...], int, Geometry, int], ...] = (
    ((2, 6, 7, 8), 1, Geometry((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)), 1),
    ((2, 6, 7, 8), 1, Geometry((1, 3), (2, 2), ((0, 0), (0, 1)), (1, 1)), 2),
    ((2, 6, 5, 4), 2, Geometry((3, 2), (1, 1), ((2, 2), (0, 1)), (2, 1)), 0),
    ((2, 6, 9), 1, Geometry((4,), (1,), ((1, 2),), (1,)), 1),
    ((2, 6, 3, 2, 4), 1, Geometry((3, 2, 2), (1, 1, 1), ((1, 1),) * 3, (1, 1, 1)), 1),
    ((2, 6, 7, 8), 2, Geometry((1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1)), 1),
)


def _layers() -> Iterator[str]:
    """Whole layers on the kernels, against the same on torch's operations."""
    for number, (shape, groups, geometry, keep) in enumerate(LAYERS):
        # The kernels' own rows are of every dtype; these are dear.
        for dtype in DTYPES:
            if dtype != _turn(number):
                continue
            name = f"layer {short(dtype)} {shape} {groups=} {geometry} {keep=}"
            # The last group of factors is led by a scale.
            modes = ((2, 4), (3, 2 // groups), (1, *geometry.kernel_size))
            sides = draw_groups(modes, 10, dtype, False)
            factors = [factor for side in sides for factor in side]
            route = ConvRoute("channels_last", "merged", by="triton")
            layer_map = ConvMap(ConvPlan(route, route, keep), geometry, 2, 2, groups)
            x = draw(shape, dtype, False)
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
            bias = draw((8,), dtype, False)
            grad_y = draw((2, 8, *geometry.output_size(shape[2:])), dtype, False)
            with fused_kernels():
                found = _step(layer_map, x, bias, factors, grad_y)
                for needs in (True, False, False), (False, True, True), (True, True, False):
                    *parts, d_bias = _step(layer_map, x, bias, factors, grad_y, needs)
                    for part, whole in zip(parts, found[:-1], strict=True):
                        assert part is None or torch.equal(part, whole), f"{name} {needs}"
                    # It is summed in another order where no factor needs a gradient.
                    torch.testing.assert_close(d_bias, found[-1])
            there = x.cpu(), bias.cpu(), [f.cpu() for f in factors], grad_y.cpu()
            torchs = _step(layer_map, *there)
            wide = x.cpu().double(), bias.cpu().double(), [f.double() for f in there[2]]
            exact = _step(layer_map, *wide, grad_y.cpu().double())
            judge_together(name, found, exact, torchs)
            with fused_kernels(), mock.patch.object(fused_conv, "MOST_PROJECTED_CHANNELS", 0):
                apart = _step(layer_map, x, bias, factors, grad_y)
            judge_together(f"{name} projection apart", apart, exact, torchs)
            # What one way keeps serves the other: only one of the two may be watched by a mode.
            for pair in (fused_kernels(), nullcontext()), (nullcontext(), fused_kernels()):
                mixed = _step(layer_map, x, bias, factors, grad_y, ways=pair)
                judge_together(f"{name} in two ways", mixed, exact, torchs)
            yield name


def _step(
    layer_map: ConvMap,
    x: Tensor,
    bias: Tensor,
    factors: list[Tensor],
    grad_y: Tensor,
    needs: tuple[bool, bool, bool] = (True, True, True),
    ways: tuple[AbstractContextManager[None], ...] = (nullcontext(), nullcontext()),
) -> list[Tensor | None]:
    """Output and gradients, None where they are not needed: of x, the out factors, the others.

    The gradient of the bias, which is always wanted, is the last.
    """
    with ways[0]:
        y, kept = layer_map.forward(x, bias, factors)
    cut = layer_map.n_out
    wanted = [needs[0], *[needs[1]] * cut, *[needs[2]] * (len(factors) - cut)]
    with ways[1]:
        d_x, others = layer_map.backward(grad_y, x, kept, factors, wanted, wrt_bias=True)
    return [y, d_x, *others]


def forms() -> Iterator[Form]:
    """What is compiled ahead of time."""
    plain = Where((1, 3, 3), ONE, (0, 1, 1), ONE)
    for where, groups, channels, padded in (
        (plain, 1, 64, 88),
        (plain, 1, 128, 184),
        (plain._replace(stride=(1, 2, 2)), 1, 512, 744),
        (Where((1, 5, 5), ONE, (0, 2, 2), ONE), 2, 128, 64),
        (Where((3, 3, 3), ONE, ONE, ONE), 1, 64, 48),
        # No code grows with the distance between taps.
        (Where((1, 1, 3), ONE, (0, 0, 512), (1, 1, 512)), 1, 128, 32),
    ):
        # Half precisions make the same code but for the names of instructions.
        for dtype in (torch.bfloat16, *((torch.float32,) if channels == 64 else ())):
            yield from _forms(where, groups, channels, padded, dtype)


def _forms(
    where: Where, groups: int, channels: int, padded: int, dtype: torch.dtype
) -> Iterator[Form]:
    name = f"{where.kernel} stride {where.stride} dilation {where.dilation} {groups=} {channels=}"
    name += f" {padded=} {short(dtype)}"
    pointers = pointers_to(dtype, 6)
    for positions in (10**6, 1000):
        columns = subject.columns_of(channels, positions, dtype)
        constants = subject.project_constants(
            where, groups, channels, padded, True, positions < 10**6, columns, dtype
        )
        yield Form(
            f"project {columns=} {name}",
            subject.depthwise_project_kernel,
            (*pointers, *("i32",) * 7),
            constants,
            tensor_cores=dtype != torch.float32,
        )
    few = math.prod(where.kernel) <= depthwise.MOST_RUN_TAPS
    # A thread that holds fewer entries of a run is faster, and reads 8 bytes of a half precision.
    wide = dtype == torch.float32
    yield Form(
        f"depthwise {name}",
        depthwise.depthwise_kernel,
        (*pointers[:3], *("i32",) * 7),
        depthwise.forward_constants(where, groups, padded),
        warps=depthwise.forward_warps(where),
        wide_loads=wide or not few,
    )
    # Many taps take the compiler long: the most of them are compiled, in one dtype for one GPU.
    if not few and (where.taps < depthwise.MOST_TAPS or dtype != torch.bfloat16):
        return
    for wrt_taps in (False, True) if padded == 88 else (True,):
        yield Form(
            f"backward {wrt_taps=} {name}",
            depthwise.depthwise_backward_kernel,
            (*pointers[:5], "*fp32", *("i32",) * 11),
            depthwise.backward_constants(where, groups, padded, wrt_taps),
            warps=depthwise.BACKWARD_WARPS,
            wide_loads=wide,
            capabilities=(80, 90, 100) if few else (90,),
        )
