"""Every stage of a convolution in poisoned memory, in each dtype and layout, against float64.

oneDNN leaves parts of some gradients unwritten and reads past some inputs, by size, layout, dtype
and processor. So sizes are drawn: kernels larger than the input, padding that no tap looks out of,
one channel, one tap with dilation.
"""

from __future__ import annotations

import ctypes
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from poisoning import fills_c_memory, poisoned
from polyadic.kernels.depthwise import Geometry, Stage, stages
from polyadic.kernels.projections import outer, project, project_back

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ("channels_first", "channels_last")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_the_poison_is_seen(poison: None) -> None:
    """In torch's memory and in the C library's, of every size; and no longer afterwards."""
    for dtype in DTYPES:
        for size in (1, 7, 300, 100_000):
            assert torch.empty(size, dtype=dtype).isnan().all()
    if fills_c_memory():
        library = ctypes.CDLL(None)
        library.malloc.restype = ctypes.c_void_p
        library.malloc.argtypes = [ctypes.c_size_t]
        library.free.argtypes = [ctypes.c_void_p]
        address = library.malloc(5000)
        assert bytes((ctypes.c_char * 5000).from_address(address)) == b"\xff" * 5000
        library.free(address)


def test_the_poison_is_taken_back() -> None:
    with poisoned():
        pass
    assert not torch.are_deterministic_algorithms_enabled()


def in_strides(x: Tensor, layout: str) -> Tensor:
    """The tensor in the strides of a layout, also where one channel makes them a matter of name."""
    if layout == "channels_first":
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def assert_near(got: Tensor, want: Tensor, size: Tensor, what: str) -> None:
    """Each entry within rounding of sums whose terms have moduli that add up to ``size``."""
    unit = torch.finfo(got.dtype).eps
    allowed = 16 * unit * size + 4 * torch.finfo(got.dtype).tiny
    wrong = ~((got.double() - want).abs() <= allowed)
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} entries are wrong"


def drawn(number: random.Random, transposed: bool, dims: int) -> tuple[Geometry, list[int]]:
    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(number.randint(low, high) for _ in range(dims))

    while True:
        kernel, stride, padding, dilation = each(1, 4), each(1, 3), each(0, 3), each(1, 2)
        pairs = tuple((p, p) for p in padding)
        extra: tuple[int, ...] = ()
        if transposed:
            extra = tuple(
                number.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True)
            )
        elif number.random() < 0.2:
            pairs = tuple((p, p + 1) for p in padding)
        where = Geometry(kernel, stride, pairs, dilation, transposed, extra)
        size = list(each(1, 6))
        if min(where.output_size(size)) >= 1:
            return where, size


def check_stage(
    stage: Stage, size: list[int], groups: int, own: tuple[int, int], **how: Any
) -> None:
    """Forward, and the gradients together and alone, of a stage with (in, out) channels a group."""
    dtype, layouts = how["dtype"], how["layouts"]
    inside, outside = own
    shape = (groups * inside, outside) if stage.transposed else (groups * outside, inside)
    batch = how["batch"]
    values = torch.randn(batch, groups * inside, *size), torch.randn(*shape, *stage.kernel_size)
    x, weight = (
        in_strides(t.to(dtype), layout) for t, layout in zip(values, layouts, strict=False)
    )
    extra = stage.output_padding or (0,) * len(size)
    where = (stage.stride, stage.padding, stage.dilation, stage.transposed, extra, groups)

    def right(x: Tensor, weight: Tensor) -> Tensor:
        padded = [side for e in reversed(stage.excess) for side in (0, e)]
        x = torch.nn.functional.pad(x, padded)
        return torch.convolution(x, weight, None, *where)

    def reference(x: Tensor, weight: Tensor, grad: Tensor | None) -> list[Tensor]:
        x, weight = x.double().contiguous(), weight.double().contiguous()
        leaves = x.requires_grad_(), weight.requires_grad_()
        y = right(*leaves)
        grad = torch.ones_like(y) if grad is None else grad.double().contiguous()
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    y = right(x.double().contiguous(), weight.double().contiguous())
    grad = in_strides(torch.randn(y.shape).to(dtype), layouts[2])
    want = reference(x, weight, grad)
    sizes = reference(x.abs(), weight.abs(), grad.abs())
    with poisoned():
        got = stage.forward(x, weight, None, groups)
        both = stage.backward(grad, x, weight, groups, (True, True))
        alone = [
            stage.backward(grad, x, weight, groups, wrt) for wrt in ((True, False), (False, True))
        ]
    assert alone[0][1] is None
    assert alone[1][0] is None
    found = {
        "y": got,
        "dx": both[0],
        "dw": both[1],
        "dx alone": alone[0][0],
        "dw alone": alone[1][1],
    }
    for i, (name, tensor) in enumerate(found.items()):
        assert tensor is not None
        at = i if i < 3 else i - 2
        assert_near(
            tensor, want[at], sizes[at], f"{name} of {stage}, {how}, {own}, {size}, {groups}"
        )


CHANNELS = {
    "depthwise": [(g, (1, 1)) for g in (2, 3, 16, 17)],
    "one channel": [(1, (1, 1))],
    "dense": [(1, own) for own in ((1, 8), (8, 1), (3, 5), (16, 16))],
    "grouped": [(2, (2, 4)), (3, (1, 4)), (4, (3, 1))],
}


@each_dtype
@pytest.mark.parametrize("kind", CHANNELS)
def test_stages(kind: str, dtype: torch.dtype) -> None:
    """y, and the gradients of x and of the taps, together and alone."""
    number = random.Random(f"{kind} {dtype}")
    torch.manual_seed(0)
    for _ in range(60):
        where, size = drawn(number, number.random() < 0.3, number.choice((2, 3)))
        plan = stages(where, "merged", len(size))
        groups, own = number.choice(CHANNELS[kind])
        layouts = [number.choice(LAYOUTS) for _ in range(3)]
        check_stage(
            plan.dense, size, groups, own, dtype=dtype, layouts=layouts, batch=number.choice((1, 2))
        )


FOUND = [
    pytest.param(Stage((1, 4), (1, 3), (0, 2), (0, 0), (1, 1)), [1, 2], (2, 5),
                 id="taps that see padding alone"),
    pytest.param(Stage((3, 2), (2, 2), (1, 3), (0, 0), (1, 2)), [9, 1], (8, 1),
                 id="no tap meets the input"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "size", "own"), FOUND)
def test_stages_that_were_wrong(stage: Stage, size: list[int], own: tuple[int, int]) -> None:
    """The first left its weight gradient unwritten, the second ended the process."""
    for layout in LAYOUTS:
        torch.manual_seed(0)
        for _ in range(8):
            how = {"dtype": torch.bfloat16, "layouts": [layout] * 3, "batch": 2}
            check_stage(stage, size, 1, own, **how)


@each_dtype
def test_projections(dtype: torch.dtype) -> None:
    """In-projection, back-projection and the gradient of the matrix, of shared and own matrices."""
    number = random.Random(str(dtype))
    torch.manual_seed(0)
    for _ in range(60):
        groups = number.choice((1, 1, 2, 3))
        inside, rank = number.choice((1, 2, 5, 16)), number.choice((1, 3, 8))
        size = [number.randint(1, 9) for _ in range(number.choice((2, 3)))]
        batch, layout = number.choice((1, 3)), number.choice(LAYOUTS)
        x = in_strides(torch.randn(batch, groups * inside, *size).to(dtype), number.choice(LAYOUTS))
        z = in_strides(torch.randn(batch, groups * rank, *size).to(dtype), layout)
        each = groups > 1 and number.random() < 0.5
        matrix = torch.randn(*([groups] if each else []), inside, rank).to(dtype)
        bias = torch.randn(groups * rank).to(dtype) if number.random() < 0.5 else None

        def exact(
            x: Tensor,
            z: Tensor,
            matrix: Tensor,
            bias: Tensor | None,
            g: int = groups,
            own: bool = each,
        ) -> list[Tensor]:
            x, z, matrix = (t.double().contiguous() for t in (x, z, matrix))
            x, z = (t.reshape(len(t), g, t.shape[1] // g, -1) for t in (x, z))
            matrix = matrix.expand(g, *matrix.shape[-2:])
            projected = torch.einsum("bgcs,gcr->bgrs", x, matrix).flatten(1, 2)
            if bias is not None:
                projected = projected + bias.double()[:, None]
            back = torch.einsum("bgrs,gcr->bgcs", z, matrix).flatten(1, 2)
            total = torch.einsum("bgcs,bgrs->gcr", x, z)
            return [projected, back, total if own or g == 1 else total.sum(0)]

        want = exact(x, z, matrix, bias)
        sizes = exact(x.abs(), z.abs(), matrix.abs(), None if bias is None else bias.abs())
        with poisoned():
            got = [
                project(x, matrix, layout, groups, bias),
                project_back(z, matrix, x, layout, groups),
                outer(x, z, layout, groups, each),
            ]
        for name, g, w, s in zip(("z", "dx", "dk"), got, want, sizes, strict=True):
            what = f"{name} {tuple(x.shape)} {tuple(matrix.shape)} {layout} {groups}"
            w, s = w.reshape(g.shape), s.reshape(g.shape)
            unit = torch.finfo(dtype).eps
            assert ((g.double() - w).abs() <= 16 * unit * s).all(), what
