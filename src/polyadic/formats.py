"""Shapes: tensorized shapes, the CP format of a layer, its sizes and break-even rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Shape = tuple[int, ...]
Rank = int | float | Literal["break-even", "faster"]
# Ranks beyond the largest that any tensor needs are let through up to here, as they cost little.
_HARMLESS_RANK = 4096
_MOST_MODES = 64  # No size has so many prime factors.


def is_int(value: Any) -> bool:
    """Return whether a value is an integer; bool, float, tensors and arrays are not."""
    whole = hasattr(value, "__index__") and not hasattr(value, "__iter__")
    return whole and not isinstance(value, bool)


def positive_int(value: Any, name: str, most: int | None = None) -> int:
    """Return ``value`` as a plain int.

    Raises:
        TypeError: ``value`` is not an integer (bool and float are refused).
        ValueError: ``value`` is below 1, or above ``most``.
    """
    if not is_int(value):
        raise TypeError(f"{name} must be a positive int, got {value!r} ({type(value).__name__})")
    if value < 1 or (most is not None and value > most):
        bound = f" of at most {most}" if value > 0 else ""
        raise ValueError(f"{name} must be a positive int{bound}, got {value}")
    return int(value)


def mode_sizes(value: Any, name: str) -> Shape:
    """Return a group of mode sizes as a tuple of plain positive ints.

    Raises:
        TypeError: ``value`` is not a sequence of integers.
        ValueError: the group is empty or a size is below 1.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(
            f"{name} must be a sequence of mode sizes such as (4, 4, 16), got {value!r}"
        )
    sizes = tuple(positive_int(size, f"each mode of {name}") for size in value)
    if not sizes:
        raise ValueError(f"{name} must have at least one mode, got an empty sequence")
    return sizes


def tensorized_groups(tensorized_shape: Any) -> tuple[tuple[Shape, ...], int]:
    """Return the groups of modes of a tensorized shape, and how many ints stood in front of them.

    Raises:
        TypeError: it is no sequence of groups of integers.
        ValueError: a size is below 1, there is no group, or an int stands behind a group.
    """
    if isinstance(tensorized_shape, (str, bytes)) or not isinstance(tensorized_shape, Sequence):
        raise TypeError(
            f"tensorized_shape must be a sequence of groups of mode sizes such as "
            f"((4, 4, 16), (4, 4, 8)), got {tensorized_shape!r}"
        )
    single = [hasattr(group, "__index__") for group in tensorized_shape]
    layer_modes = sum(single)
    if any(single[layer_modes:]):
        raise ValueError(
            f"ints in tensorized_shape are modes of layers and stand in front of the groups, got "
            f"{tuple(tensorized_shape)}; write a group of one mode as (size,)"
        )
    groups = tuple(
        mode_sizes((group,) if i < layer_modes else group, f"tensorized_shape[{i}]")
        for i, group in enumerate(tensorized_shape)
    )
    if len(groups) == layer_modes:
        raise ValueError(
            f"tensorized_shape must have at least one group of modes, got "
            f"{tuple(tensorized_shape) or 'none'}"
        )
    return groups, layer_modes


def split_modes(shape: tuple[Shape, ...], layer_modes: int) -> tuple[Shape, tuple[Shape, ...]]:
    """Return the sizes of the layer modes, and the groups of one layer."""
    return tuple(mode for (mode,) in shape[:layer_modes]), shape[layer_modes:]


def _prime_factors(number: int) -> list[int]:
    """Return the prime factors in ascending order; [1] for 1."""
    primes, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            primes.append(divisor)
            number //= divisor
        divisor += 1
    if number > 1 or not primes:
        primes.append(number)
    return primes


def _merge_smallest(parts: list[int], count: int) -> Shape:
    """Multiply the two smallest parts together until ``count`` are left; pad with 1 if fewer."""
    parts = sorted(parts)
    while len(parts) > count:
        parts = sorted([parts[0] * parts[1], *parts[2:]])
    return (1,) * (count - len(parts)) + tuple(parts)


def tensorize(in_features: int, out_features: int, order: int = 3) -> tuple[Shape, Shape]:
    """Factor both feature counts into ``order`` integers each, ascending and balanced.

    Each side starts from its prime factors (the output side takes at most one more part than
    the input side has primes; what is left stays one part) and merges its two smallest parts
    until ``order`` are left. Where a number has too few prime factors it gets modes of size 1 in
    front. Where ``tltorch.utils.get_tensorized_shape`` finds ``order`` integers for both
    sides, the result is the same.

    Args:
        in_features: M, any positive integer.
        out_features: N, any positive integer.
        order: D, the number of modes per side.

    Returns:
        ``(in_shape, out_shape)``, two tuples of D plain ints whose products are M and N.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is below 1.

    >>> tensorize(256, 128, order=3)
    ((4, 4, 16), (4, 4, 8))
    >>> tensorize(7, 12, order=3)
    ((1, 1, 7), (2, 2, 3))
    """
    in_parts = _prime_factors(positive_int(in_features, "in_features"))
    out_parts = _prime_factors(positive_int(out_features, "out_features"))
    order = positive_int(order, "order", _MOST_MODES)
    # tltorch stops splitting the out side early if it has many more primes than the in side.
    kept = max(len(in_parts), order - 1)
    if kept < len(out_parts):
        out_parts = [*out_parts[:kept], math.prod(out_parts[kept:])]
    return _merge_smallest(in_parts, order), _merge_smallest(out_parts, order)


def padded_shape(size: int, order: int = 3) -> Shape:
    """Return ``order`` modes with a product of at least ``size`` and the smallest possible sum.

    For a given sum the product is largest where the modes differ by at most one, so the smallest
    sum that suffices is found among those.

    Args:
        size: the number of entries that the modes must cover, such as a vocabulary.
        order: D, the number of modes.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is below 1.

    >>> padded_shape(50257)
    (37, 37, 37)
    >>> padded_shape(30522)
    (31, 31, 32)
    """
    size, order = positive_int(size, "size"), positive_int(order, "order", _MOST_MODES)
    total = order * max(1, math.floor(size ** (1 / order)) - 1)
    while True:
        low, more = divmod(total, order)
        modes: Shape = (low,) * (order - more) + (low + 1,) * more
        if math.prod(modes) >= size:
            return modes
        total += 1


@dataclass(frozen=True)
class LinearFormat:
    """The CP format of a linear layer: ``W (M, N) = Σ_r ⊗_d A_d[:, r] ⊗_d C_d[:, r]``.

    Args:
        in_shape: (m_1, …), whose product is M = in_features.
        out_shape: (n_1, …), whose product is N = out_features.
        rank: R.
    """

    in_shape: Shape
    out_shape: Shape
    rank: int

    @property
    def in_features(self) -> int:
        """M, the product of the in modes."""
        return math.prod(self.in_shape)

    @property
    def out_features(self) -> int:
        """N, the product of the out modes."""
        return math.prod(self.out_shape)

    @property
    def parameters(self) -> int:
        """Number of factor entries, R·(Σ m_d + Σ n_d), without weights λ and bias."""
        return self.rank * (sum(self.in_shape) + sum(self.out_shape))

    @property
    def dense_parameters(self) -> int:
        """Number of entries of the dense weight, M·N."""
        return self.in_features * self.out_features

    @property
    def largest_rank(self) -> int:
        """A rank that suffices for every weight: the product of all modes but the largest."""
        return _largest_rank((*self.in_shape, *self.out_shape))

    @property
    def break_even_rank(self) -> int:
        """Largest rank whose factorized FLOPs, 2·B·R·(M+N), do not exceed dense 2·B·M·N.

        Only products with the factors are counted, which for large batches are nearly all FLOPs;
        ``polyadic.rank_for`` counts every step of the plan for a batch.
        """
        return max(1, self.dense_parameters // (self.in_features + self.out_features))


@dataclass(frozen=True)
class EmbeddingFormat(LinearFormat):
    """The CP format of an embedding: that of a linear map with a row per index, some unused.

    Args:
        num_embeddings: V, at most in_features.
    """

    num_embeddings: int = 0

    @property
    def dense_parameters(self) -> int:
        """Number of entries of the table, V·E."""
        return self.num_embeddings * self.out_features


@dataclass(frozen=True)
class ConvFormat:
    """The CP format of a convolution: factors of the out, in and kernel modes, in this order.

    Args:
        out_shape: (n_1, …), whose product is out_channels.
        in_shape: (m_1, …), whose product is in_channels.
        kernel_size: one size per spatial dimension.
        rank: R.
        groups: number of groups of channels. The side that the groups do not share counts the
            channels of all groups.
        transposed: whether it is a transposed convolution, whose groups share the out side; the
            groups of a convolution share the in side.
    """

    out_shape: Shape
    in_shape: Shape
    kernel_size: Shape
    rank: int
    groups: int = 1
    transposed: bool = False

    @property
    def in_channels(self) -> int:
        """Cin, or that of one group if groups share the in side."""
        return math.prod(self.in_shape)

    @property
    def out_channels(self) -> int:
        """Cout, or that of one group if groups share the out side."""
        return math.prod(self.out_shape)

    @property
    def channels(self) -> tuple[int, int]:
        """(Cin, Cout) of all groups, as the input and the output have them."""
        shared_in, shared_out = (1, self.groups) if self.transposed else (self.groups, 1)
        return shared_in * self.in_channels, shared_out * self.out_channels

    @property
    def parameters(self) -> int:
        """Number of factor entries, without weights λ and bias."""
        return self.rank * (sum(self.out_shape) + sum(self.in_shape) + sum(self.kernel_size))

    @property
    def dense_parameters(self) -> int:
        """Number of entries of the dense kernel."""
        return self.out_channels * self.in_channels * math.prod(self.kernel_size)

    @property
    def depthwise_taps(self) -> int:
        """Multiply-adds of the cheaper depthwise form per component and position; 0 for 1×1."""
        longer = [size for size in self.kernel_size if size > 1]
        return min(math.prod(longer), sum(longer)) if longer else 0

    @property
    def largest_rank(self) -> int:
        """A rank that suffices for every kernel: the product of all modes but the largest."""
        return _largest_rank((*self.out_shape, *self.in_shape, *self.kernel_size))

    @property
    def break_even_rank(self) -> int:
        """Largest rank whose FLOPs per position, 2·R·(Cin+taps+Cout), do not exceed dense.

        Counted at stride 1, where input and output have the same number of positions.
        """
        own, shared = self.out_channels, self.in_channels
        if self.transposed:
            own, shared = shared, own
        per_rank = own + self.groups * (self.depthwise_taps + shared)
        return max(1, self.dense_parameters // per_rank)


@dataclass(frozen=True)
class SpectralFormat:
    """The CP format of a spectral convolution: a weight (Cin, Cout) for each kept mode.

    Args:
        in_shape: (m_1, …), whose product is in_channels.
        out_shape: (n_1, …), whose product is out_channels; () where the layer is separable, which
            multiplies each channel by a number of its own.
        modes: the numbers of kept modes, one per spatial dimension.
        rank: R.
    """

    in_shape: Shape
    out_shape: Shape
    modes: Shape
    rank: int

    @property
    def separable(self) -> bool:
        """Whether each channel is multiplied by itself."""
        return not self.out_shape

    @property
    def in_channels(self) -> int:
        """Cin."""
        return math.prod(self.in_shape)

    @property
    def out_channels(self) -> int:
        """Cout."""
        return math.prod(self.out_shape or self.in_shape)

    @property
    def kept(self) -> int:
        """S, the number of kept modes of all dimensions together."""
        return math.prod(self.modes)

    @property
    def parameters(self) -> int:
        """Number of factor entries, which are complex; weights λ and bias not counted."""
        return self.rank * (sum(self.in_shape) + sum(self.out_shape) + sum(self.modes))

    @property
    def dense_parameters(self) -> int:
        """Number of entries of the dense weight, which are complex."""
        return self.in_channels * math.prod(self.out_shape) * self.kept

    @property
    def largest_rank(self) -> int:
        """A rank that suffices for every weight: the product of all modes but the largest."""
        return _largest_rank((*self.in_shape, *self.out_shape, *self.modes))

    @property
    def break_even_rank(self) -> int:
        """Largest rank whose FLOPs for a kept mode, 2·B·R·(Cin+Cout), do not exceed dense.

        A separable layer has one product for a channel and mode whatever its rank; 1 for it.
        """
        if self.separable:
            return 1
        return max(
            1, self.in_channels * self.out_channels // (self.in_channels + self.out_channels)
        )


@dataclass(frozen=True)
class JointFormat:
    """The CP format of layers that share a CP tensor with one more mode, for the layers.

    Args:
        one: the format of one of the layers.
        layers: L, the number of layers.
    """

    one: LinearFormat | ConvFormat | SpectralFormat
    layers: int

    @property
    def parameters(self) -> int:
        """Number of factor entries, those of the mode for the layers included."""
        return self.one.parameters + self.one.rank * self.layers

    @property
    def dense_parameters(self) -> int:
        """Number of entries of all dense weights."""
        return self.layers * self.one.dense_parameters

    @property
    def largest_rank(self) -> int:
        """A rank that suffices for all weights, each with components of its own."""
        return self.layers * self.one.largest_rank


def _largest_rank(modes: Shape) -> int:
    return math.prod(modes) // max(modes)


def resolve_rank(rank: Any, unit: LinearFormat | ConvFormat | SpectralFormat | JointFormat) -> int:
    """Turn a rank that is a number into an integer.

    Args:
        rank: a positive int; or a float in (0, 1], the fraction of the dense layer's parameters
            (rounded down, at least 1).
        unit: the layer's format at rank 1.

    Raises:
        TypeError: ``rank`` is of another type.
        ValueError: a float outside (0, 1] (NaN too), an int below 1 or so large that it makes no
            sense, or a string.
    """
    allowed = "rank must be an int, a float in (0, 1], 'break-even' or 'faster'"
    if isinstance(rank, str):
        raise ValueError(f"{allowed}, got {rank!r}")
    if isinstance(rank, float):
        if not 0.0 < rank <= 1.0:
            raise ValueError(
                f"rank as a float is the fraction of dense parameters and must lie in (0, 1], "
                f"got {rank}; give an int for an absolute rank"
            )
        return max(1, int(rank * unit.dense_parameters / unit.parameters))
    try:
        number = positive_int(rank, "rank")
    except TypeError:
        raise TypeError(f"{allowed}, got {rank!r} ({type(rank).__name__})") from None
    if number > max(unit.largest_rank, _HARMLESS_RANK):
        raise ValueError(
            f"rank must be at most {unit.largest_rank}, got {number}: every weight of these modes "
            f"is a sum of {unit.largest_rank} components, so that more of them represent nothing "
            f"else"
        )
    return number


def factored_shape(value: Sequence[int] | None, features: int, default: Shape, name: str) -> Shape:
    """Return the user's mode sizes for one side, checked against its feature count.

    Raises:
        ValueError: the product of ``value`` is not ``features``.
    """
    if value is None:
        return default
    sizes = mode_sizes(value, name)
    if math.prod(sizes) != features:
        raise ValueError(
            f"{name} must multiply to {features}, got {sizes} with product {math.prod(sizes)}"
        )
    return sizes
