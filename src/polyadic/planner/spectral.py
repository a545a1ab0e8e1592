"""Plans of a spectral convolution: in which pieces modes are contracted, and which transforms.

The steps mirror ``kernels.spectral`` and ``kernels.dft``. What a transform costs in one dimension
does not depend on how the others are transformed, so each dimension is decided by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from polyadic.formats import Shape, SpectralFormat
from polyadic.planner.calibrated import machine_for
from polyadic.planner.linear import Steps
from polyadic.planner.multilinear import khatri_rao_backward_steps, khatri_rao_steps
from polyadic.planner.request import Request
from polyadic.planner.steps import Step, gemm, stream, transpose
from polyadic.plans import SpectralPlan, SpectralRoute, Transform

TRANSFORMS: tuple[Transform, ...] = ("dft", "fft", "fft-dft")
# A product with a Fourier matrix of at most so many columns rounds like a fast transform. They are
# positions on the way into the spectrum, and modes on the way out of it. Root mean square errors in
# float32 with MKL, 2026-11: 1.3 to 1.5 times those of a fast transform with 32 columns, whether the
# grid has 32 positions or 1024; 1.6 to 1.8 times with 64 columns and 3 times with 1024.
CLOSE_COLUMNS = 32
# Complex numbers of single precision in a vector of 64 bytes.
LANES_OF_COMPLEX = 8
# The Z of a piece and, backward, the H beside it take this share of a cache each.
SHARE_OF_CACHE = 0.5
# So do the parts of A and C of the components of a piece, and backward their gradients beside them.
# AMD EPYC with 1 MiB of second-level cache, 2026-11: backwards of rank 629 at 64 channels and 544
# modes take 98 to 101 ms in parts of 158 to 210 components, 108 ms in one.
SHARE_OF_FACTORS = 0.15
# A Z of all modes is kept only where it is at most this many caches large. On that processor whole
# products of rank 193 (1.8 MB), Z kept, take 0.94 of the time of pieces; of rank 629 (22 MB) 1.3.
CACHES_OF_KEPT = 4.0


def _format(request: Request) -> SpectralFormat:
    assert isinstance(request.format, SpectralFormat)
    return request.format


def _with_rank(request: Request, sizes: Sequence[int]) -> Shape:
    """Return mode sizes with λ among them, as one more factor, where there are weights."""
    return (1, *sizes) if request.weights else tuple(sizes)


def _routes(request: Request, transforms: tuple[Transform, ...]) -> list[SpectralRoute]:
    """List the routes that take these transforms."""
    fmt = _format(request)
    dense = SpectralRoute(None, "dense", transforms)
    if fmt.separable:
        return [dense]
    routes = [SpectralRoute(None, "factorized", transforms)]
    components = components_at_once(request)
    at_once = modes_at_once(request, components)
    if at_once < fmt.kept:
        part = None if components == fmt.rank else components
        routes.append(SpectralRoute(at_once, "factorized", transforms, part))
    return [*routes, dense] if request.rebuild else routes


def components_at_once(request: Request) -> int:
    """Return how many components to take at a time: parts of one size whose factors fit a cache."""
    fmt = _format(request)
    entries = SHARE_OF_FACTORS * machine_for(request).cache / request.item
    most = max(1, int(entries / max(fmt.in_channels, fmt.out_channels)))
    return -(-fmt.rank // -(-fmt.rank // most))


def modes_at_once(request: Request, components: int) -> int:
    """Return for how many modes Z (modes, B, R) fits into the share of a cache; on a GPU all."""
    fmt = _format(request)
    if not request.on_cpu:
        return fmt.kept
    entries = SHARE_OF_CACHE * machine_for(request).cache / request.item
    return min(fmt.kept, max(1, int(entries / (max(1, request.batch) * components))))


def _keep(request: Request) -> int:
    return int(request.memory == "fast")


def candidates(request: Request) -> list[SpectralPlan]:
    """List the plans of one route both ways and one transform; ``choose`` takes one for each d."""
    allowed = [_transforms_allowed(request, d) for d in range(len(request.size))]
    ways = [way for way in TRANSFORMS if all(way in each for each in allowed)]
    return [
        SpectralPlan(route, route, _keep(request))
        for way in (ways if request.size else TRANSFORMS[:1])
        for route in _routes(request, (way,) * len(request.size))
    ]


def _transforms_allowed(request: Request, d: int) -> tuple[Transform, ...]:
    """Return transforms to choose from: TF32 would round the products with DFT matrices."""
    if request.tf32:
        return ("fft",)
    if request.transforms == "any" or request.size[d] <= CLOSE_COLUMNS:
        return TRANSFORMS
    return ("fft", "fft-dft") if _format(request).modes[d] <= CLOSE_COLUMNS else ("fft",)


def simplest(request: Request) -> SpectralPlan:
    """Return a plan that is right for any sizes, for when they are not known."""
    whole: tuple[Transform, ...] = tuple(["fft" for _ in request.size])
    route = SpectralRoute(None, "dense" if _format(request).separable else "factorized", whole)
    return SpectralPlan(route, route, _keep(request))


def choose(request: Request) -> SpectralPlan:
    """Return the cheapest plan for the request as it is; ``choice.choose`` remembers it."""
    machine, fmt = machine_for(request), _format(request)
    ends = (*_ends(request), *_backward_ends(request))
    ways = tuple(
        min(
            _transforms_allowed(request, d),
            key=lambda way: machine.total(
                [step for end in ends for step in _one_dimension(request, end, d, way)]
            ),
        )
        for d in range(len(request.size))
    )
    routes = _routes(request, ways)

    def pair(routes: list[SpectralRoute], keep: int) -> tuple[float, SpectralPlan]:
        """Return the cheapest routes of both directions, with what they take."""

        def forth(route: SpectralRoute) -> float:
            return machine.total(_product_steps(request, route))

        def back(route: SpectralRoute) -> float:
            return machine.total(_product_backward(request, route, kept=keep))

        forward, backward = min(routes, key=forth), min(routes, key=back)
        return forth(forward) + back(backward), SpectralPlan(forward, backward, keep)

    found = pair(routes, 0)
    most = CACHES_OF_KEPT * machine.cache / request.item if request.on_cpu else math.inf
    if _keep(request) and not fmt.separable and _maps(request) <= most:
        # The Z that all modes make at once can be kept, as neuraloperator keeps it.
        kept = pair([SpectralRoute(None, "factorized", ways)], 1)
        found = min(found, kept, key=lambda cost: cost[0])
    return found[1]


def steps(request: Request, plan: SpectralPlan) -> Steps:
    """List the steps of a plan, forward and backward."""
    return forward_steps(request, plan.forward), backward_steps(
        request, plan.backward, kept=int(plan.keeps_z)
    )


def forward_steps(request: Request, route: SpectralRoute) -> list[Step]:
    """List the steps of a forward pass."""
    into, out = _ends(request)
    return [
        *_transform_steps(request, into, route.transforms),
        *_product_steps(request, route),
        *_transform_steps(request, out, route.transforms),
    ]


def backward_steps(request: Request, route: SpectralRoute, *, kept: int) -> list[Step]:
    """List the steps that make the gradients of x and of all factors."""
    into, out = _backward_ends(request)
    return [
        *_transform_steps(request, into, route.transforms),
        *_product_backward(request, route, kept=kept),
        *_transform_steps(request, out, route.transforms),
    ]


# What is transformed: a name, the number of channels, and whether into the spectrum or out of it.
End = tuple[str, int, bool]


def _ends(request: Request) -> tuple[End, End]:
    fmt = _format(request)
    return ("X", fmt.in_channels, True), ("Y", fmt.out_channels, False)


def _backward_ends(request: Request) -> tuple[End, End]:
    """The adjoint of a transform out of the spectrum is one into it, with other scales."""
    fmt = _format(request)
    return ("out of dY", fmt.out_channels, True), ("into dX", fmt.in_channels, False)


def _transform_steps(request: Request, end: End, transforms: tuple[Transform, ...]) -> list[Step]:
    """List the steps of the truncated transforms of all dimensions, and of the copy to rows."""
    steps = [
        step for d, way in enumerate(transforms) for step in _one_dimension(request, end, d, way)
    ]
    entries = _format(request).kept * request.batch * end[1]
    return [*steps, transpose(request, f"{end[0]}: rows of modes", entries)]


def _one_dimension(request: Request, end: End, d: int, way: Transform) -> list[Step]:
    """List the steps that transform one dimension; those behind it are cut to the kept modes."""
    name, channels, into = end
    if way == "fft-dft":
        way = "fft" if into else "dft"
    sizes, modes = request.size, _format(request).modes
    n, k, last = sizes[d], modes[d], d == len(sizes) - 1
    lead = request.batch * channels * math.prod(sizes[:d])
    trail = math.prod(modes[d + 1 :])
    item, label = request.item, f"{name}: {way} of dimension {d + 1}"
    if way == "dft" and last:
        # Real numbers by a real matrix, whose columns are real and imaginary parts in turn.
        flops = 2 * lead * n * 2 * k
        nbytes = item // 2 * (lead * n + 2 * n * k) + item * lead * k
        padded = 2 * lead * n * request.padded(2 * k)
        return [Step(label, "gemm", flops, nbytes, views=2, elements=lead * k, padded_flops=padded)]
    if way == "dft":
        # One product (k, n) @ (n, trail) for each of the lead; columns are padded to vectors.
        lanes = LANES_OF_COMPLEX if request.on_cpu else 1
        flops = 2 * lead * k * n * request.multiply_adds
        nbytes = item * (lead * (n + k) * trail + n * k)
        padded = flops * (-(-trail // lanes) * lanes)
        return [
            Step(
                label,
                "gemm",
                flops * trail,
                nbytes,
                views=2,
                elements=lead * k * trail,
                padded_flops=padded,
            )
        ]
    # A radix-2 transform of n complex numbers is about 5 n log n operations; of real ones half.
    passes = math.log2(max(2, n))
    cut = stream(f"{label}, cut", 2 * item * lead * k * trail, lead * k * trail, views=2)
    if last:
        work, nbytes, made = int(2.5 * lead * n * passes), item * lead * (n + 1), n // 2 + 1
        return [Step(label, "fft", 0, nbytes, elements=lead * made, padded_flops=work), cut]
    work, moved = int(5 * lead * n * trail * passes), lead * n * trail
    # torch copies the map so that the positions of the dimension lie side by side.
    rows = transpose(request, f"{label}, rows", moved)
    return [rows, Step(label, "fft", 0, 2 * item * moved, elements=moved, padded_flops=work), cut]


def _matrices(request: Request, *, channels: bool) -> list[Step]:
    """List the steps that form K and, by ``channels``, the matrices of the channels."""
    fmt = _format(request)
    steps = khatri_rao_steps(request, "K", _with_rank(request, fmt.modes), fmt.rank)
    if channels:
        steps += khatri_rao_steps(request, "A", fmt.in_shape, fmt.rank)
        if not fmt.separable:
            steps += khatri_rao_steps(request, "C", fmt.out_shape, fmt.rank)
    return steps


def _rebuilt(request: Request) -> list[Step]:
    """List the steps that rebuild the weight of every mode."""
    fmt = _format(request)
    width = fmt.in_channels * math.prod(fmt.out_shape)
    steps = _matrices(request, channels=False)
    steps += khatri_rao_steps(request, "A, C", (*fmt.in_shape, *fmt.out_shape), fmt.rank)
    return [*steps, gemm(request, "W", fmt.kept, fmt.rank, width, views=2)]


def _number_of_pieces(request: Request, route: SpectralRoute) -> int:
    if route.modes_at_once is None:
        return 1
    fmt = _format(request)
    parts = -(-fmt.rank // (route.components_at_once or fmt.rank))
    return parts * -(-fmt.kept // route.modes_at_once)


def _piecewise(
    request: Request, route: SpectralRoute, name: str, sizes: tuple[int, int, int], maps: int
) -> Step:
    """Price a product of rows that is made in pieces; ``maps`` entries of it stay in a cache."""
    m, k, n = sizes
    pieces = _number_of_pieces(request, route)
    whole = gemm(request, name, m, k, n)
    nbytes = whole.nbytes - (request.item * maps if pieces > 1 else 0)
    return Step(
        name,
        "gemm",
        whole.flops,
        nbytes,
        launches=pieces,
        views=3 * pieces * (pieces > 1),
        elements=whole.elements,
        padded_flops=whole.padded_flops,
    )


def _times_k(request: Request, route: SpectralRoute, name: str) -> Step:
    pieces, entries = _number_of_pieces(request, route), _maps(request)
    return stream(name, 2 * request.item * entries, entries, launches=pieces, views=pieces)


def _maps(request: Request) -> int:
    """Count the entries of Z (S, B, R)."""
    fmt = _format(request)
    return fmt.kept * request.batch * fmt.rank


def _product_steps(request: Request, route: SpectralRoute) -> list[Step]:
    """List the steps of the product of the spectrum with the weight."""
    fmt = _format(request)
    rows, i, o = fmt.kept * request.batch, fmt.in_channels, fmt.out_channels
    if fmt.separable:
        entries = rows * i
        times = stream("Y = W X", 2 * request.item * entries, entries, views=1)
        steps = _matrices(request, channels=True)
        return [*steps, gemm(request, "W", fmt.kept, fmt.rank, i, views=1), times]
    if route.kind == "dense":
        return [*_rebuilt(request), _by_mode(request, "Y = X W", request.batch, i, o)]
    rank, maps = fmt.rank, _maps(request)
    return [
        *_matrices(request, channels=True),
        _piecewise(request, route, "Z = X A", (rows, i, rank), maps),
        _times_k(request, route, "Z K"),
        _piecewise(request, route, "Y = Z K C^T", (rows, rank, o), maps),
    ]


def _by_mode(request: Request, name: str, m: int, k: int, n: int) -> Step:
    """Price a product of matrices for each kept mode."""
    modes = _format(request).kept
    one = gemm(request, name, m, k, n)
    return Step(
        name,
        "gemm",
        modes * one.flops,
        modes * one.nbytes,
        elements=modes * one.elements,
        padded_flops=modes * one.padded_flops,
    )


def _product_backward(request: Request, route: SpectralRoute, *, kept: int) -> list[Step]:
    """List the steps of the gradients of the spectrum and of all factors."""
    fmt = _format(request)
    rows, i, o, rank = fmt.kept * request.batch, fmt.in_channels, fmt.out_channels, fmt.rank
    spectral = khatri_rao_backward_steps(
        request, "MTTKRP modes", _with_rank(request, fmt.modes), rank
    )
    channels = (*fmt.in_shape, *fmt.out_shape)
    if fmt.separable or route.kind == "dense":
        width = i * math.prod(fmt.out_shape)
        if fmt.separable:
            entries, item = rows * i, request.item
            found = [
                *_matrices(request, channels=True),
                gemm(request, "W", fmt.kept, rank, i, views=2),
                stream("dX = W dY", 2 * item * entries, entries),
                stream("dW", 3 * item * entries, entries, launches=2, sums=1),
            ]
        else:
            found = [
                *_rebuilt(request),
                _by_mode(request, "dX = dY W^T", request.batch, o, i),
                _by_mode(request, "dW = X^T dY", i, request.batch, o),
            ]
        return [
            *found,
            gemm(request, "dA, dC from dW", width, fmt.kept, rank, views=1),
            *khatri_rao_backward_steps(request, "MTTKRP channels", channels, rank),
            gemm(request, "dK from dW", fmt.kept, width, rank),
            *spectral,
        ]
    maps = _maps(request)
    product = (rows, i, rank)
    z = [] if kept else [_piecewise(request, route, "Z = X A", product, maps)]
    pieces = _number_of_pieces(request, route)
    return [
        *_matrices(request, channels=True),
        *z,
        _piecewise(request, route, "H = dY C", (rows, o, rank), maps),
        stream("dK", 3 * request.item * maps, maps, launches=2 * pieces, sums=pieces),
        _times_k(request, route, "Z K"),
        _piecewise(request, route, "dC = dY^T Z K", (o, rows, rank), maps),
        _times_k(request, route, "H K"),
        _piecewise(request, route, "dA = X^T H K", (i, rows, rank), maps),
        _piecewise(request, route, "dX = H K A^T", (rows, rank, i), maps),
        *khatri_rao_backward_steps(request, "MTTKRP in", fmt.in_shape, rank),
        *khatri_rao_backward_steps(request, "MTTKRP out", fmt.out_shape, rank),
        *spectral,
    ]


def product_alone(request: Request) -> Request:
    """Return the request without transforms, for ranks to be judged by the product with the weight.

    A product with a DFT matrix has FLOPs that torch counts, a fast transform has none.
    """
    return dataclasses.replace(request, size=())


def kept_elements(request: Request, plan: SpectralPlan) -> int:
    """Count the complex numbers kept for the backward: kept modes of the spectrum, and Z or not."""
    fmt = _format(request)
    spectrum = fmt.kept * request.batch * fmt.in_channels
    return spectrum + (_maps(request) if plan.keeps_z else 0)


def _full_spectrum(request: Request) -> int:
    *others, last = request.size
    return math.prod(others) * (last // 2 + 1)


def dense_steps(request: Request) -> Steps:
    """List the steps of a dense spectral convolution of whole transforms, by torch's functions."""
    fmt = _format(request)
    product: list[Step]
    i, o, batch = fmt.in_channels, fmt.out_channels, request.batch
    if fmt.separable:
        entries = fmt.kept * batch * i
        product = [stream("Y = W X", 3 * request.item * entries, entries)]
        gradients = [*product, *product]
    else:
        product = [_by_mode(request, "Y = X W", batch, i, o)]
        gradients = [
            _by_mode(request, "dX = dY W^T", batch, o, i),
            _by_mode(request, "dW = X^T dY", i, batch, o),
        ]
    into, out = _whole(request, "X", i), _whole(request, "Y", o)
    return [*into, *product, *out], [*out, *gradients, *into]


def _whole(request: Request, name: str, channels: int) -> list[Step]:
    """List the steps of a transform of all modes, and of the copy of the kept ones."""
    if not request.size:
        return []
    positions = request.batch * channels * math.prod(request.size)
    spectrum = request.batch * channels * _full_spectrum(request)
    work = int(2.5 * positions * math.log2(max(2, math.prod(request.size))))
    moved = request.item * (positions + 2 * len(request.size) * spectrum)
    kept = request.batch * channels * _format(request).kept
    copies = request.item * (2 * spectrum + 4 * kept)
    return [
        Step(f"{name}: whole transform", "fft", 0, moved, elements=spectrum, padded_flops=work),
        stream(f"{name}: zeros, shift, cut", copies, spectrum, launches=4),
    ]


def dense_kept(request: Request) -> int:
    """Count the complex numbers that torch's functions keep: x and the whole spectrum of it."""
    fmt = _format(request)
    each = math.prod(request.size) // 2 + _full_spectrum(request) if request.size else fmt.kept
    return request.batch * fmt.in_channels * each


def describe(request: Request) -> str:
    """Say format and batch in words."""
    fmt, times = _format(request), "x".join
    modes = times(map(str, fmt.modes))
    grid = f" of a grid {times(map(str, request.size))}" if request.size else ""
    kind = "separable spectral convolution" if fmt.separable else "spectral convolution"
    return (
        f"{kind} {fmt.in_channels} -> {fmt.out_channels}, {modes} modes{grid}, "
        f"rank {fmt.rank}, {request.batch} inputs, {request.dtype}"
    )
