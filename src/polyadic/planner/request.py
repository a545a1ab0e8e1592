"""The request for a plan: one hashable value that holds all that the choice depends on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from polyadic.formats import ConvFormat, EmbeddingFormat, LinearFormat, Shape, SpectralFormat
from polyadic.kernels.depthwise import Geometry
from polyadic.kernels.products import HALVES
from polyadic.plans import Memory, Transforms

_FORMATS: dict[str, Any] = {
    "linear": LinearFormat,
    "embedding": EmbeddingFormat,
    "conv": ConvFormat,
    "spectral": SpectralFormat,
}
# The dtype of the parts of complex numbers. A machine computes them at the rates of that dtype.
PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64}


class Place(NamedTuple):
    """Where something is computed: all that a machine's rates depend on.

    Attributes:
        device: type of the device, such as ``"cpu"``.
        dtype: dtype of the computation.
        threads: number of threads if the device is a CPU, else 1.
        tf32: whether float32 products run in TF32.
    """

    device: str
    dtype: torch.dtype
    threads: int = 1
    tf32: bool = False


def bucket(batch: int) -> int:
    """Round up to a power of two, at least 1."""
    return 1 << (max(batch, 1) - 1).bit_length()


@dataclass(frozen=True)
class Request:
    """A layer's sizes, its batch and the place where it is to be computed; hashable.

    Args:
        format: sizes of the factors.
        batch: number of rows of a linear layer, indices of an embedding, images of a convolution.
        dtype: dtype of the computation.
        device: type of the device, such as ``"cpu"``.
        threads: number of threads if the device is a CPU, else 1.
        tf32: whether torch is set to run float32 products in TF32.
        memory: how much may be kept for the backward.
        rebuild: whether the dense weight may be built.
        weights: whether there are weights λ, which are passed as one more factor.
        geometry: kernel size, stride, padding and dilation of a convolution.
        size: spatial size of a convolution's input.
        channels_last: whether a convolution's input comes in this layout.
        transforms: ``"any"``, or ``"close"`` for those that round like torch's fast ones.
        kept_beside: number of elements that the call keeps for the backward besides what the map
            keeps and its input.
    """

    format: LinearFormat | ConvFormat | SpectralFormat
    batch: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    threads: int = 1
    tf32: bool = False
    memory: Memory = "balanced"
    rebuild: bool = True
    weights: bool = False
    geometry: Geometry | None = None
    size: Shape = ()
    channels_last: bool = False
    transforms: Transforms = "any"
    kept_beside: int = 0

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def on_cpu(self) -> bool:
        """Whether the device is a CPU, where the kernels do what ``kernels.cpu`` says."""
        return self.device == "cpu"

    @property
    def multiply_adds(self) -> int:
        """Real multiply-adds in one of the dtype, which torch's counter takes for one: 4 or 1."""
        return 4 if self.dtype.is_complex else 1

    @property
    def is_half(self) -> bool:
        """Whether factors are widened to float32 before they are multiplied, and rounded once."""
        return self.dtype in HALVES

    def padded(self, columns: int) -> int:
        """Round a number of columns up to the number that a product takes the time of.

        A CPU's vector units leave lanes idle beyond the last multiple of 16; a GPU reads rows in
        pieces of 16 bytes.
        """
        lanes = 16 if self.on_cpu else max(1, 16 // self.item)
        return -(-columns // lanes) * lanes

    def bucketed(self) -> Request:
        """Return the request with its batch rounded up to a power of two.

        Whatever does not bear on the choice of a plan is left out, so that choices are shared.
        """
        return dataclasses.replace(self, batch=bucket(self.batch), weights=False, kept_beside=0)

    @property
    def place(self) -> Place:
        """Where the layer is computed; of complex numbers the place of their parts."""
        return Place(self.device, PARTS.get(self.dtype, self.dtype), self.threads, self.tf32)

    def at(self, device: str, dtype: torch.dtype) -> Request:
        """Return the request moved to another type of device and another dtype."""
        return dataclasses.replace(self, **place_now(device, dtype)._asdict())

    def constants(self) -> tuple[Any, ...]:
        """Return the request as tuples of plain values, which a compiler takes for constants."""
        fmt, where = self.format, self.geometry
        shape: tuple[Any, ...]
        if isinstance(fmt, ConvFormat):
            shape = (fmt.out_shape, fmt.in_shape, fmt.kernel_size, fmt.rank, fmt.groups)
            shape = ("conv", *shape, fmt.transposed)
        elif isinstance(fmt, SpectralFormat):
            shape = ("spectral", fmt.in_shape, fmt.out_shape, fmt.modes, fmt.rank)
        elif isinstance(fmt, EmbeddingFormat):
            shape = ("embedding", fmt.in_shape, fmt.out_shape, fmt.rank, fmt.num_embeddings)
        else:
            shape = ("linear", fmt.in_shape, fmt.out_shape, fmt.rank)
        place: tuple[Any, ...] = ()
        if where is not None:
            place = (where.kernel_size, where.stride, where.padding, where.dilation)
            place = (*place, where.transposed, where.output_padding)
        options = (self.memory, self.rebuild, self.size, self.channels_last, self.transforms)
        return shape, place, self.batch, self.dtype, self.device, options

    @staticmethod
    def of_constants(constants: tuple[Any, ...]) -> Request:
        """Return the request of which ``constants`` made the tuples."""
        (name, *shape), place, batch, dtype, device, options = constants
        memory, rebuild, size, channels_last, transforms = options
        return request(
            _FORMATS[name](*shape),
            batch,
            dtype,
            device,
            memory=memory,
            rebuild=rebuild,
            geometry=Geometry(*place) if place else None,
            size=size,
            channels_last=channels_last,
            transforms=transforms,
        )


def request(
    fmt: LinearFormat | ConvFormat | SpectralFormat,
    batch: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> Request:
    """Make a request under torch's present settings; ``options`` are further fields of it."""
    return Request(fmt, batch, **place_now(device, dtype)._asdict(), **options)


def place_now(device: str, dtype: torch.dtype) -> Place:
    """Return the place of a type of device and a dtype, under torch's present settings."""
    threads = torch.get_num_threads() if device == "cpu" else 1
    single = PARTS.get(dtype, dtype) == torch.float32
    tf32 = device == "cuda" and single and _allows_tf32()
    return Place(device, dtype, threads, tf32)


def _allows_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
