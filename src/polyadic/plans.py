"""Plans: frozen, hashable descriptions of how a layer is computed. Kernels obey them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from polyadic.formats import ConvFormat, LinearFormat, SpectralFormat

Groups = tuple[int, ...]
Kind = Literal["factorized", "dense"]
Backend = Literal["torch", "triton"]
Memory = Literal["fast", "balanced", "least"]
Transform = Literal["dft", "fft", "fft-dft"]
# Of which of them the planner may choose: of all, or of those that round like torch's.
Transforms = Literal["any", "close"]
# What a linear layer or an embedding keeps for its backward; Z is X KA, or the product of the rows.
Keep = Literal["x", "x and z", "autograd"]

MEMORY: tuple[Memory, ...] = ("fast", "balanced", "least")
KEEP: tuple[Keep, ...] = ("x", "x and z", "autograd")


def _one_of(value: object, allowed: tuple[object, ...], name: str) -> None:
    # The type is compared too, because 1.0 and 1 are equal.
    if not isinstance(value, type(allowed[0])) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_routes(plan: LinearPlan | ConvPlan | SpectralPlan, kind: type) -> None:
    for name, route in (("forward", plan.forward), ("backward", plan.backward)):
        if not isinstance(route, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(route).__name__}")


def _check_groups(groups: object, name: str) -> None:
    # isinstance, as torch.compile does not trace "type(g) is int" here.
    if not isinstance(groups, tuple) or not all(
        isinstance(g, int) and not isinstance(g, bool) and g >= 1 for g in groups
    ):
        raise ValueError(
            f"{name} must be a tuple of positive ints, the lengths of consecutive groups of modes "
            f"such as (3,) or (1, 2), got {groups!r}"
        )


@dataclass(frozen=True)
class LinearRoute:
    """One direction (forward or backward) of a linear layer.

    Args:
        in_groups: lengths of consecutive groups of in modes contracted one after the other;
            (D,) is the explicit Khatri-Rao matrix, (l, D-l) two-step, (1, …, 1) per factor.
        out_groups: lengths of the groups of out modes.
        kind: ``"factorized"``, or ``"dense"`` to rebuild W (M, N) and use one GEMM.
        by: ``"torch"``, or ``"triton"`` for the library's own kernels, which make both Khatri-Rao
            matrices in one launch and all gradients of factors in another, on a CUDA device.

    Raises:
        ValueError: an argument is none of these, or ``by="triton"`` is given with a route that no
            kernel serves.
    """

    in_groups: Groups
    out_groups: Groups
    kind: Kind = "factorized"
    by: Backend = "torch"

    def __post_init__(self) -> None:
        _one_of(self.kind, ("factorized", "dense"), "kind")
        _check_groups(self.in_groups, "in_groups")
        _check_groups(self.out_groups, "out_groups")
        _one_of(self.by, ("torch", "triton"), "by")
        if self.by == "triton" and len(self.out_groups) > 1:
            raise ValueError(
                f"by='triton' serves routes that contract the out modes by their whole Khatri-Rao "
                f"matrix, got out_groups {self.out_groups}; use by='torch'"
            )

    @property
    def is_khatri_rao(self) -> bool:
        """Whether both sides are contracted with their whole Khatri-Rao matrix."""
        return self.kind == "factorized" and len(self.in_groups) == len(self.out_groups) == 1

    def __str__(self) -> str:
        by = "" if self.by == "torch" else f", by {self.by}"
        if self.kind == "dense":
            return f"rebuild W{by}"
        return f"in {_groups_name(self.in_groups)}, out {_groups_name(self.out_groups)}{by}"


def _groups_name(groups: Groups) -> str:
    if len(groups) == 1:
        return "Khatri-Rao"
    if len(groups) > 2 and set(groups) == {1}:
        return "per factor"
    return "split " + "|".join(map(str, groups))


def _with_one_more_in_mode(route: LinearRoute) -> LinearRoute:
    # Spelled out, as torch.compile does not trace dataclasses.replace.
    groups = (route.in_groups[0] + 1, *route.in_groups[1:])
    return LinearRoute(groups, route.out_groups, route.kind, route.by)


@dataclass(frozen=True)
class LinearPlan:
    """How a linear layer is computed.

    Args:
        forward: the route of Y = X W.
        backward: the route of the gradients.
        keep: what stays for the backward besides the factors. ``"x"`` keeps X alone, so that the
            backward computes Z = X KA (B, R) again; ``"x and z"`` keeps Z too. ``"autograd"`` has
            no closed-form backward: torch's autograd differentiates the forward and keeps what it
            needs for that, the Khatri-Rao products among it. This spares a small layer the cost of
            a call into the closed form. False or 0, True or 1, and 2 are other names of the three.

    Raises:
        TypeError: a route is no LinearRoute.
        ValueError: ``keep`` is none of these; or it is ``"autograd"`` and the routes are not both
            the explicit Khatri-Rao route that torch computes.
    """

    forward: LinearRoute
    backward: LinearRoute
    keep: Keep | int = "x and z"

    def __post_init__(self) -> None:
        _check_routes(self, LinearRoute)
        if isinstance(self.keep, int) and 0 <= self.keep <= 2:
            object.__setattr__(self, "keep", KEEP[self.keep])
        _one_of(self.keep, KEEP, "keep")
        simple = self.forward.is_khatri_rao and self.forward.by == "torch"
        if self.keep == "autograd" and not (simple and self.forward == self.backward):
            raise ValueError(
                f"keep='autograd' leaves the backward to autograd, which follows the forward; it "
                f"needs the Khatri-Rao route in both, got {self.forward} and {self.backward}"
            )

    @property
    def keeps_z(self) -> bool:
        """Whether Z (B, R) stays for the backward."""
        return self.keep != "x" and self.forward.kind == "factorized"

    def covering(self, fmt: LinearFormat) -> LinearPlan:
        """Return the plan after a check that its groups cover the modes of a format.

        Raises:
            ValueError: they cover other numbers of modes.
        """
        for route in (self.forward, self.backward):
            if route.by == "triton" and len(route.in_groups) > 1:
                raise ValueError(
                    f"by='triton' serves linear routes that contract the in modes by their whole "
                    f"Khatri-Rao matrix, got in_groups {route.in_groups}; use by='torch'"
                )
            for groups, modes, name in (
                (route.in_groups, fmt.in_shape, "in_groups"),
                (route.out_groups, fmt.out_shape, "out_groups"),
            ):
                if sum(groups) != len(modes):
                    raise ValueError(
                        f"the plan's {name} {groups} cover {sum(groups)} modes, but the layer has "
                        f"{len(modes)}: {modes}"
                    )
        return self

    def with_weights(self) -> LinearPlan:
        """Return the plan for weights λ passed as one more in factor, in front."""
        return LinearPlan(
            _with_one_more_in_mode(self.forward),
            _with_one_more_in_mode(self.backward),
            self.keep,
        )

    def __str__(self) -> str:
        kept = "X and Z" if self.keeps_z else "X"
        if self.keep == "autograd":
            kept = "what autograd keeps"
        return f"forward: {self.forward}; backward: {self.backward}; keeps {kept}"


# A program of the backward's kernel holds a sum for each tap in its registers, for up to so many.
MOST_FUSED_TAPS = 27


def fused_by_triton(fmt: ConvFormat) -> bool:
    """Whether Triton kernels serve convolutions of a format."""
    return not fmt.transposed and math.prod(fmt.kernel_size) <= MOST_FUSED_TAPS


@dataclass(frozen=True)
class ConvRoute:
    """One direction (forward or backward) of a convolution.

    Args:
        layout: ``"channels_last"`` makes both projections plain GEMMs (an input in another
            layout is converted); ``"channels_first"`` works on the contiguous layout.
        depthwise: ``"merged"`` forms the R kernels of all taps, ``"separable"`` convolves one
            spatial dimension after the other.
        kind: ``"factorized"``, or ``"dense"`` to rebuild the kernel and use one convolution.
        by: ``"torch"``, or ``"triton"`` for the library's own kernels, on a CUDA device: products
            by GEMMs, and what lies between them fused.

    Raises:
        ValueError: an argument is none of these, or ``by="triton"`` is given with a route that no
            kernel serves.
    """

    layout: Literal["channels_last", "channels_first"] = "channels_last"
    depthwise: Literal["merged", "separable"] = "merged"
    kind: Kind = "factorized"
    by: Backend = "torch"

    def __post_init__(self) -> None:
        _one_of(self.kind, ("factorized", "dense"), "kind")
        _one_of(self.by, ("torch", "triton"), "by")
        _one_of(self.layout, ("channels_last", "channels_first"), "layout")
        _one_of(self.depthwise, ("merged", "separable"), "depthwise")
        own = self.kind, self.layout, self.depthwise
        if self.by == "triton" and own != ("factorized", "channels_last", "merged"):
            raise ValueError(
                f"by='triton' serves the factorized route in channels_last with merged depthwise "
                f"kernels, got {', '.join(own)}; use by='torch'"
            )

    def __str__(self) -> str:
        if self.kind == "dense":
            return f"rebuild kernel, {self.layout}"
        by = "" if self.by == "torch" else f", by {self.by}"
        return f"{self.depthwise} depthwise, {self.layout}{by}"


@dataclass(frozen=True)
class ConvPlan:
    """How a convolution is computed.

    Args:
        forward: the route of the forward pass.
        backward: the route of the gradients.
        keep: number of R-channel maps kept for the backward beside the input: 0, 1 (the
            in-projection) or 2 (also the depthwise result); the others are recomputed.

    Raises:
        TypeError: a route is no ConvRoute.
        ValueError: ``keep`` is none of these.
    """

    forward: ConvRoute
    backward: ConvRoute
    keep: int = 1

    def __post_init__(self) -> None:
        _check_routes(self, ConvRoute)
        _one_of(self.keep, (0, 1, 2), "keep")

    def covering(self, fmt: ConvFormat) -> ConvPlan:
        """Return the plan after a check that it can be followed for a format.

        Raises:
            ValueError: it asks for Triton kernels where there are none.
        """
        if "triton" in (self.forward.by, self.backward.by) and not fused_by_triton(fmt):
            raise ValueError(
                f"by='triton' serves convolutions of up to {MOST_FUSED_TAPS} taps that are not "
                f"transposed, got {fmt}; use by='torch'"
            )
        return self

    def __str__(self) -> str:
        maps = self.keep if self.forward.kind == "factorized" else 0
        kept = ("X", "X and Z1", "X, Z1 and Z2")[maps]
        return f"forward: {self.forward}; backward: {self.backward}; keeps {kept}"


@dataclass(frozen=True)
class SpectralRoute:
    """One direction (forward or backward) of a spectral convolution.

    Args:
        modes_at_once: number of kept modes that are contracted together, so that their (B, R) maps
            stay in a cache; None for all of them at once.
        kind: ``"factorized"``, or ``"dense"`` to rebuild the weight of every kept mode.
        transforms: for each spatial dimension ``"dft"``, products with truncated DFT matrices;
            ``"fft"``, fast transforms that are cut to the kept modes; or ``"fft-dft"``, a fast
            transform into the spectrum and a product out of it. () where the input is a spectrum
            already.
        components_at_once: number of components of the weight that are contracted together, so that
            their part of the factors stays in a cache beside those maps; None for all of them, as
            where all modes are contracted at once.

    Raises:
        ValueError: an argument is none of these.
    """

    modes_at_once: int | None = None
    kind: Kind = "factorized"
    transforms: tuple[Transform, ...] = ()
    components_at_once: int | None = None

    def __post_init__(self) -> None:
        _one_of(self.kind, ("factorized", "dense"), "kind")
        for name in ("modes_at_once", "components_at_once"):
            if getattr(self, name) is not None:
                _check_groups((getattr(self, name),), name)
        if self.components_at_once is not None and self.modes_at_once is None:
            raise ValueError(
                f"components_at_once is for pieces of modes: give modes_at_once too, got "
                f"components_at_once={self.components_at_once}"
            )
        if not isinstance(self.transforms, tuple):
            raise ValueError(
                f"transforms must be a tuple of 'dft', 'fft' and 'fft-dft', one for each spatial "
                f"dimension, got {self.transforms!r}"
            )
        for transform in self.transforms:
            _one_of(transform, ("dft", "fft", "fft-dft"), "each of transforms")

    def __str__(self) -> str:
        if self.kind == "dense":
            how = "rebuild weight"
        elif self.modes_at_once is None:
            how = "all modes at once"
        else:
            how = f"{self.modes_at_once} modes at once"
            if self.components_at_once is not None:
                how += f" of {self.components_at_once} components"
        return f"{how}, {' '.join(self.transforms)}" if self.transforms else how


@dataclass(frozen=True)
class SpectralPlan:
    """How a spectral convolution is computed.

    Args:
        forward: the route of the forward pass.
        backward: the route of the gradients.
        keep: 1 to keep the projected spectrum Z (S, B, R) for the backward beside the kept modes of
            the input's spectrum, where all modes are contracted at once; 0 to compute it again.

    Raises:
        TypeError: a route is no SpectralRoute.
        ValueError: ``keep`` is none of these.
    """

    forward: SpectralRoute
    backward: SpectralRoute
    keep: int = 0

    def __post_init__(self) -> None:
        _check_routes(self, SpectralRoute)
        _one_of(self.keep, (0, 1), "keep")

    def covering(self, fmt: SpectralFormat, dims: int) -> SpectralPlan:
        """Return the plan after a check that it can be followed for a format.

        Args:
            fmt: the layer's format.
            dims: number of spatial dimensions that are transformed; 0 for a spectrum.

        Raises:
            ValueError: it has transforms for another number of dimensions, or a separable layer,
                which multiplies by its rebuilt weight in any case, is given another route.
        """
        for route in (self.forward, self.backward):
            if len(route.transforms) != dims:
                raise ValueError(
                    f"the plan's transforms {route.transforms} are of {len(route.transforms)} "
                    f"dimensions, but {dims} are transformed"
                )
            if fmt.separable and route.kind != "dense":
                raise ValueError(
                    f"a separable spectral convolution multiplies by its rebuilt weight: its "
                    f"routes have kind='dense', got {route}"
                )
        return self

    def __str__(self) -> str:
        kept = "the kept modes" + (" and Z" if self.keeps_z else "")
        return f"forward: {self.forward}; backward: {self.backward}; keeps {kept}"

    @property
    def keeps_z(self) -> bool:
        """Whether Z (S, B, R) stays for the backward."""
        whole = self.forward.kind == "factorized" and self.forward.modes_at_once is None
        return self.keep > 0 and whole
