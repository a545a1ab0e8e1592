"""Initialisation of factors to a wanted standard deviation of the weight they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyadic._torch import is_spread, no_autocast
from polyadic.checks import a_number, check_dense, check_factor_group
from polyadic.formats import positive_int


class Factors(nn.ParameterList):
    """The factors of a CP tensor: a list of parameters that is called for them.

    Tools that move the parameters of a module in and out of memory, such as accelerate, or that
    gather their shards, do so in hooks that run when that module is called. They attach them to
    the module that holds the parameters, so that this one is called where a plain list is read.

    Args:
        values: (mode, R) each.
        std: of an entry of the CP tensor, as ``reset_parameters`` draws it.
    """

    # ParameterList forbids the call.
    __call__ = nn.Module.__call__

    def __init__(self, values: Iterable[Tensor] | None = None, std: float = 1.0) -> None:
        super().__init__(values)
        self.std = std

    def reset_parameters(self) -> None:
        """Draw all factors anew."""
        cp_orthonormal_(list(self), self.std)

    def forward(self) -> tuple[Tensor, ...]:
        """Return the factors in order."""
        return tuple(self)


@torch.no_grad()
def cp_orthonormal_(factors: Sequence[Tensor], std: float) -> None:
    """Fill factors so that each entry of their CP tensor has mean 0 and standard deviation ``std``.

    Each factor (m, R) is filled with blocks of orthonormal random columns (Haar distributed), times
    √m: its entries have mean 0, and their mean square is 1 in every draw. A block has min(m, 256)
    columns where the factor has at most 2¹⁶ entries and min(m, 64) where it has more, the last one
    what is left. Each column is uniform on the sphere of radius √m whatever the width; columns of
    two blocks are independent, so that their cosines are of the order 1/√m in place of 0.
    Factors are independent and so are the signs of their columns, so that an entry of the tensor

        W = Σ_r Π_k A_k[i_k, r]      has      E[W] = 0,   E[W²] = R · Π_k E[A_k²] = R,

    since the cross terms of r ≠ s vanish: E[A_k[i, r] A_k[i, s]] = 0. All factors are scaled by the
    same c with c^(2K) = std²/R, which gives Var(W) = std² and balanced factors.

    Complex factors get orthonormal columns of the unitary group. Their squares are those of moduli,
    E|A_k[i, r]|² = 1, and the phases of columns are independent and uniform in the place of signs,
    so that E[A_k[i, r] conj(A_k[i, s])] = 0 for r ≠ s and E|W|² = R as above: ``std`` is the root
    of E|W|². E[W²] = 0, as E[A_k[i, r]²] = 0: real and imaginary parts have std²/2 each.

    Orthonormal rather than Gaussian columns because a product of K Gaussians has kurtosis
    3 + (3^K − 3)/R per weight: most weights near 0, a few huge. Entries of an orthonormal m-column
    have kurtosis 3m/(m + 2) < 3; components within a block are exactly orthogonal.

    DTensors get their shards of what the first process of their mesh would draw alone, whatever
    the seeds of the others; all of its processes are to call this together.

    Args:
        factors: K tensors (m_k, R), filled in place; meta tensors are left alone.
        std: wanted standard deviation of an entry of the CP tensor; of complex ones, the root of
            their mean squared modulus.

    Raises:
        TypeError: ``factors`` are no sequence of tensors, or ``std`` is no number.
        ValueError: there is no factor, they are no matrices with one number of columns, one is
            empty, or ``std`` is negative or not finite.
    """
    factors = check_factor_group(factors, "factors")
    a_number(std, "std", least=0)
    for factor in factors:
        _check_filled(factor, "a factor")
    are_matrices = all(f.dim() == 2 and min(f.shape) > 0 for f in factors)
    if not are_matrices or len({f.shape[1] for f in factors}) != 1:
        shapes = ", ".join(str(tuple(f.shape)) for f in factors)
        raise ValueError(
            f"factors must have the shapes (m_k, R) with one R and no size of 0, got {shapes}"
        )
    if is_spread(factors[0]):
        _fill_shards(factors, lambda drawn: cp_orthonormal_(drawn, std))
        return
    rank = factors[0].shape[1]
    scale = (std / math.sqrt(rank)) ** (1 / len(factors))
    for factor in factors:
        if not factor.is_meta:
            _fill_with_orthonormal_columns(factor, scale * math.sqrt(factor.shape[0]))


# Orthogonalizing costs time in proportion to the width of a block for each entry, and drawing costs
# a constant. Construction must not take much longer than torch takes to draw a dense weight. So
# small factors get blocks as wide as is of use, which takes a few milliseconds, and large factors
# get narrower blocks, which cost about as much as the draw.
WIDEST_BLOCK = 256
MOST_ENTRIES_IN_WIDE_BLOCKS = 2**16
WIDEST_BLOCK_OF_MANY = 64
# A Gaussian matrix (m, w) has the condition number (√m + √w)/(√m − √w), here at most 3.
TALL = 4


def _fill_with_orthonormal_columns(factor: Tensor, scale: float) -> None:
    """Fill (m, R) with blocks of Haar-random orthonormal columns side by side, times ``scale``.

    Drawn in float32 at least.
    """
    size, rank = factor.shape
    widest = WIDEST_BLOCK if factor.numel() <= MOST_ENTRIES_IN_WIDE_BLOCKS else WIDEST_BLOCK_OF_MANY
    width = min(size, rank, widest)
    if size >= TALL * width:
        for block in torch.split(factor, width, 1):
            block.copy_(_haar_of_tall(_normal(factor, *block.shape), scale))
        return
    whole = rank // width
    columns = _haar(_normal(factor, whole, size, width))
    side_by_side = factor[:, : whole * width].view(size, whole, width)
    side_by_side.copy_(columns.transpose(0, 1).mul_(scale))
    if rank % width:
        factor[:, whole * width :].copy_(_haar(_normal(factor, size, rank % width)).mul_(scale))


def _normal(like: Tensor, *shape: int) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(shape, device=like.device, dtype=dtype)


def _haar(normal: Tensor) -> Tensor:
    """The orthonormal columns of the QR factors of Gaussian matrices (…, m, w), w ≤ m.

    The first w columns of a Haar-random m×m matrix have the law of the Q of m×w Gaussian entries,
    which costs m·w² where the square one costs m³.
    """
    q, r = torch.linalg.qr(normal)
    # The signs of R's diagonal, of complex numbers their phases, make the QR factors unique, and Q
    # Haar distributed (Mezzadri 2007).
    signed: Tensor = q * torch.diagonal(r, dim1=-2, dim2=-1).sgn().unsqueeze(-2)
    return signed


def _haar_of_tall(normal: Tensor, scale: float) -> Tensor:
    """What ``_haar`` returns for a Gaussian X (m, w), m ≥ 4 w, times a scale, in matrix products.

    With XᴴX = L Lᴴ the matrix X L⁻ᴴ has orthonormal columns, and Lᴴ is the R of the QR factors
    whose diagonal is positive. Its error grows with the square of X's condition number, 9 here.
    """
    with no_autocast(normal):
        lower = torch.linalg.cholesky_ex(normal.mH @ normal).L
        one = torch.eye(len(lower), device=normal.device, dtype=normal.dtype)
        inverse = torch.linalg.solve_triangular(lower, one, upper=False)
        columns: Tensor = normal @ inverse.mH.mul(scale)
    return columns


def torch_std(fan_in: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the standard deviation of torch's own initial weights in Linear and Conv layers.

    They are U(−1/√fan_in, 1/√fan_in) (``kaiming_uniform_`` with a = √5), of variance 1/(3 fan_in).
    Of a complex weight real and imaginary part are each drawn so, which makes E|W|² = 2/(3 fan_in).

    Args:
        fan_in: M for a linear layer, Cin·Πk for a convolution.
        dtype: of the weight.

    Raises:
        TypeError: ``fan_in`` is no int, or ``dtype`` no dtype.
        ValueError: ``fan_in`` is below 1.
    """
    positive_int(fan_in, "fan_in")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    return math.sqrt((2 if dtype.is_complex else 1) / (3 * fan_in))


@torch.no_grad()
def torch_bias_(bias: Tensor, fan_in: int) -> None:
    """Fill a bias, of a complex one each part, as torch does: U(−1/√fan_in, 1/√fan_in).

    Args:
        bias: a tensor of floating-point or complex numbers.
        fan_in: as in ``torch_std``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``fan_in`` is below 1, or ``bias`` is an expanded tensor.
    """
    bound = 1 / math.sqrt(positive_int(fan_in, "fan_in"))
    bias_(bias, lambda values: values.uniform_(-bound, bound))


@torch.no_grad()
def bias_(bias: Tensor, draw: Callable[[Tensor], Any]) -> None:
    """Fill a bias by a function of a tensor; DTensors get shards of what one process draws.

    Args:
        bias: of any shape.
        draw: fills a tensor that it is given.

    Raises:
        TypeError: ``bias`` is no dense tensor of floating-point or complex numbers, or ``draw`` no
            function.
        ValueError: ``bias`` is an expanded tensor.
    """
    _check_filled(bias, "bias")
    if not callable(draw):
        raise TypeError(f"draw must be a function of a tensor, got {type(draw).__name__}")
    if is_spread(bias):
        _fill_shards([bias], lambda drawn: draw(drawn[0]))
    else:
        draw(bias)


def _check_filled(tensor: Any, name: str) -> None:
    """Refuse what cannot be filled with random numbers.

    Raises:
        TypeError: it is no dense tensor of floating-point or complex numbers.
        ValueError: several of its entries are one number in memory.
    """
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of floating-point or complex numbers, got {got}")
    check_dense(tensor, name)
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    if any(size > 1 and step == 0 for size, step in steps):
        raise ValueError(
            f"{name} must have an entry of its own at every index, got an expanded tensor; give "
            f"its contiguous() copy"
        )


def _fill_shards(tensors: Sequence[Any], draw: Callable[[list[Tensor]], None]) -> None:
    """Fill DTensors with what one process would draw, the same in all processes of their mesh.

    Whole factors are small, so that each process draws all of them and keeps its shards: no two
    processes can then have the same columns, and what is replicated is the same. All draw from the
    state of the first process's generator, which goes on from there as if it were alone; the
    generators of the others are left as they were, so that processes that are to draw different
    batches or dropout still do.
    """
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    first, mesh = tensors[0], tensors[0].device_mesh
    if first.is_meta:
        return
    device, everywhere = first.device, [Replicate()] * mesh.ndim
    random: Any = torch.random if device.type == "cpu" else torch.get_device_module(device)
    own = random.get_rng_state()
    shared = distribute_tensor(own.to(device, copy=True), mesh, everywhere).to_local()
    random.set_rng_state(shared.to(own.device))
    drawn = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in tensors]
    draw(drawn)
    if any(mesh.get_coordinate()):
        random.set_rng_state(own)
    for tensor, values in zip(tensors, drawn, strict=True):
        shared = DTensor.from_local(values, mesh, everywhere, run_check=False)
        tensor.to_local().copy_(shared.redistribute(placements=tensor.placements).to_local())


def mup_std(fan_in: int, fan_out: int) -> float:
    """Spectral (muP) standard deviation √(1/fan_in)·min(1, √(fan_out/fan_in)).

    Source: Yang, Simon & Bernstein, A Spectral Condition for Feature Learning, 2023, §3.

    Args:
        fan_in: M.
        fan_out: N.

    Raises:
        TypeError: a number is no int.
        ValueError: one is below 1.
    """
    positive_int(fan_in, "fan_in")
    positive_int(fan_out, "fan_out")
    return math.sqrt(1 / fan_in) * min(1.0, math.sqrt(fan_out / fan_in))
