"""The three products of a layer's matrices, each in the way that is fastest on its device.

    times(x, K) = X K  (n, k), (k, m) → (n, m)      linear(z, K) = Z Kᵀ      tall(x, z) = Xᵀ Z

On a CPU that ``onednn`` names, large ones in float32 go to oneDNN where torch would take its BLAS;
in a compiled graph through an operator of our own, as torch's compiler hands oneDNN none but
products with constant weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from polyadic._torch import (
    UNKNOWN_BATCH,
    exporting,
    is_plain,
    known,
    not_traced,
    transformed,
)
from polyadic.kernels.onednn import faster_products

# Elements of an output up to which a pass over it costs less than calling an operation.
SMALL = 2**14
# Multiplications from which oneDNN's call, which takes longer, pays.
LARGE = 2**22
# Terms of a sum up to which oneDNN rounds at most 1.7 times as much as MKL; of 4096, 2.2 times.
CHAIN = 1024
# Columns below which a BLAS may add all terms in one chain, and rows of the blocks used instead.
NARROW, BLOCK = 4, 256
# Terms from which it pays to make a tall product flipped, the vector width its columns are padded
# to, and the widest that gains where it needs no padding.
LONG, VECTOR, SLIM = 256, 16, 64


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """X K of x (n, k), matrix (k, m)."""
    if is_dynamo_compiling():
        if _goes_to_operator(x, matrix, matrix.shape[1]):
            return _operator(x, matrix.t(), None)
    elif (
        type(x) is Tensor
        and x.numel() * matrix.shape[1] >= LARGE
        and _by_onednn(x, matrix, x.shape[1])
    ):
        return _onednn(x, matrix.t(), None)
    return x @ matrix


def linear(z: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Z Kᵀ + bias of z (n, r), matrix (m, r).

    Where the output is small, and on a GPU, the bias takes no operation of its own.
    """
    if is_dynamo_compiling():
        if _goes_to_operator(z, matrix, matrix.shape[0]):
            return _operator(z, matrix, bias)
    elif (
        type(z) is Tensor
        and z.numel() * matrix.shape[0] >= LARGE
        and _by_onednn(z, matrix, z.shape[1])
    ):
        return _onednn(z, matrix, bias)
    if bias is None or z.is_cuda or is_compiling() or z.shape[0] * matrix.shape[0] <= SMALL:
        return F.linear(z, matrix, bias)
    return plus_bias(F.linear(z, matrix), bias)


def plus_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Y + bias in the memory of y, which nothing else holds.

    ``addmm`` would first spread the bias over the whole output, one more pass over it.
    """
    if bias is None:
        return y
    if is_compiling():
        return y + bias
    try:
        return y.add_(bias)
    except RuntimeError:
        # Under vmap a batched bias does not fit into a y that is not batched.
        return y + bias


def tall(x: Tensor, z: Tensor) -> Tensor:
    """Xᵀ Z of x (n, w), z (n, r): a sum over many rows.

    Narrow ones are added in blocks, as one chain of n terms has a rounding that grows with √n.
    """
    (rows, width), rank = x.shape, z.shape[1]
    if is_dynamo_compiling():
        if not (x.is_cpu and known(rows) and better_flipped(rows, width, rank)):
            return x.t() @ z
        flipped = z.t().contiguous()
        return times(flipped, x).t().contiguous()
    if width >= NARROW or rows < 2 * BLOCK or x.is_cuda:
        if x.is_cpu and better_flipped(rows, width, rank):
            if z.numel() * width >= LARGE and _by_onednn(z, x, rows):
                return _onednn(z.t().contiguous(), x.t(), None).t().contiguous()
            return (z.t() @ x).t().contiguous()
        return x.t() @ z
    cut = rows - rows % BLOCK
    blocks = x[:cut].reshape(-1, BLOCK, width), z[:cut].reshape(-1, BLOCK, rank)
    total = torch.bmm(blocks[0].mT, blocks[1]).sum(0)
    return total if cut == rows else total + x[cut:].t() @ z[cut:]


def tall_unrounded(x: Tensor, z: Tensor) -> Tensor:
    """Xᵀ Z (w, r) for more sums to follow: not rounded to half precision where that costs nothing.

    A GPU adds products of half precisions in float32 and can hand its sums out as they are.
    """
    if (
        x.is_cuda
        and torch.version.hip is None
        and x.shape[0] > 0
        and x.dtype in (torch.float16, torch.bfloat16)
        and is_plain(x)
        and is_plain(z)
        and not is_compiling()
        and not transformed()
    ):
        return torch.mm(x.t(), z, out_dtype=torch.float32)
    return tall(x, z)


def better_flipped(terms: int, width: int, rank: int) -> bool:
    """Whether Xᵀ Z (width, rank) is faster made as Zᵀ X and turned, which costs a pass over it.

    A BLAS works on rows of the result in vectors; short ones, or ones padded to whole vectors,
    leave part of them idle. With several threads it divides the few long rows worse.
    """
    if terms < LONG or not _one_thread():
        return False
    if rank % VECTOR:
        return not width % VECTOR and terms * width >= LONG * LONG
    return rank <= SLIM and width >= 8 * rank


def left_to_blas(rows: int, terms: int, columns: int, item: int) -> bool:
    """Whether a product is as large as oneDNN's, and its sums too long for oneDNN's rounding."""
    large = rows * terms * columns >= LARGE and terms > CHAIN
    return large and item == 4 and faster_products()


@not_traced
def _one_thread() -> bool:
    return torch.get_num_threads() == 1


def _goes_to_operator(x: Tensor, matrix: Tensor, columns: int) -> bool:
    """Whether a graph that is being compiled calls our operator for a product of so many columns.

    Rows whose number is symbolic count as their usual number: the operator itself sees how many
    there are.
    """
    rows, terms = x.shape
    large = (rows if known(rows) else UNKNOWN_BATCH) * terms * columns >= LARGE
    return large and not exporting() and _suits_onednn(x, matrix, terms)


def _by_onednn(x: Tensor, matrix: Tensor, terms: int) -> bool:
    """Whether eager code takes oneDNN for a large product: numbers must be all that is asked for.

    Neither a mode nor a tracer must want to see the product.
    """
    return (
        _suits_onednn(x, matrix, terms)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and torch._C._get_mkldnn_enabled()
    )


def _suits_onednn(x: Tensor, matrix: Tensor, terms: int) -> bool:
    """Whether oneDNN may make a product of x and a matrix, sums of so many terms.

    It knows no graph and no transform. It takes any strides, but some a thousand times slower.
    """
    return (
        faster_products()
        and terms <= CHAIN
        and x.is_cpu
        and x.dtype == torch.float32
        and x.is_contiguous()
        and (matrix.is_contiguous() or matrix.t().is_contiguous())
        and type(x) is Tensor
        and type(matrix) in (Tensor, torch.nn.Parameter)
        and not torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _of_any_size(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + bias by what is faster."""
    large = x.numel() * weight.shape[0] >= LARGE and torch._C._get_mkldnn_enabled()
    return _onednn(x, weight, bias) if large else F.linear(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + bias of x (n, k), weight (m, k)."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _empty_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.polyadic.linear(x, weight, bias)
    return y


_LIBRARY = torch.library.Library("polyadic", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_LIBRARY.impl("linear", _of_any_size, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("polyadic::linear", _empty_product, lib=_LIBRARY)
