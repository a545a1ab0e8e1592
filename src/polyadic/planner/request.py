"""What a plan is asked for: one value that holds all that a choice depends on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from polyadic.formats import ConvFormat, EmbeddingFormat, LinearFormat, Shape
from polyadic.kernels.depthwise import Geometry
from polyadic.plans import Memory

HALVES = (torch.bfloat16, torch.float16)


class Place(NamedTuple):
    """All that a machine's rates depend on.

    Attributes:
        device: type of the device.
        dtype: computed in.
        threads: of the processor, where the device is one; else 1.
        tf32: whether float32 products run in TF32.
    """

    device: str
    dtype: torch.dtype
    threads: int = 1
    tf32: bool = False


def bucket(batch: int) -> int:
    """The next power of two, at least 1."""
    return 1 << (max(batch, 1) - 1).bit_length()


@dataclass(frozen=True)
class Request:
    """A layer's sizes, its batch and the place where it is to be computed; hashable.

    Args:
        format: sizes of the factors.
        batch: rows of a linear layer, indices of an embedding, images of a convolution.
        dtype: computed in.
        device: type of the device, such as ``"cpu"``.
        threads: of the processor, where the device is one; else 1.
        tf32: whether float32 products may run in TF32, as torch's own switch says.
        memory: how much may be kept for the backward.
        rebuild: whether the dense weight may be built.
        weights: whether there are weights λ, which come as one more factor.
        geometry: of a convolution.
        size: spatial size of a convolution's input.
        channels_last: whether a convolution's input comes in this layout.
        kept_beside: elements that a call keeps for the backward beside the map and its input.
    """

    format: LinearFormat | ConvFormat
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
    kept_beside: int = 0

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def on_cpu(self) -> bool:
        """Whether the device is a CPU, for which the kernels do some things their own way."""
        return self.device == "cpu"

    @property
    def is_half(self) -> bool:
        """Whether factors are widened to float32 before they are multiplied, and rounded once."""
        return self.dtype in HALVES

    def padded(self, columns: int) -> int:
        """Columns that a product works on where there are so many.

        A CPU's vector units leave lanes idle beyond the last multiple of 16; a GPU reads rows in
        pieces of 16 bytes.
        """
        lanes = 16 if self.on_cpu else max(1, 16 // self.item)
        return -(-columns // lanes) * lanes

    def bucketed(self) -> Request:
        """The request that stands for all batches up to the next power of two.

        Whatever does not bear on the choice of a plan is left out, so that choices are shared.
        """
        return dataclasses.replace(self, batch=bucket(self.batch), weights=False, kept_beside=0)

    @property
    def place(self) -> Place:
        """Where it is computed, and how."""
        return Place(self.device, self.dtype, self.threads, self.tf32)

    def at(self, device: str, dtype: torch.dtype) -> Request:
        """The same on another device or in another dtype."""
        return dataclasses.replace(self, **place_now(device, dtype)._asdict())

    def constants(self) -> tuple[Any, ...]:
        """The request as nested tuples of plain values, which a compiler knows as constants."""
        fmt, where = self.format, self.geometry
        shape: tuple[Any, ...]
        if isinstance(fmt, ConvFormat):
            shape = (fmt.out_shape, fmt.in_shape, fmt.kernel_size, fmt.rank, fmt.groups)
            shape = (*shape, fmt.transposed)
        elif isinstance(fmt, EmbeddingFormat):
            shape = (fmt.in_shape, fmt.out_shape, fmt.rank, fmt.num_embeddings)
        else:
            shape = (fmt.in_shape, fmt.out_shape, fmt.rank)
        place: tuple[Any, ...] = ()
        if where is not None:
            place = (where.kernel_size, where.stride, where.padding, where.dilation)
            place = (*place, where.transposed, where.output_padding)
        options = (self.memory, self.rebuild, self.size, self.channels_last)
        return shape, place, self.batch, self.dtype, self.device, options

    @staticmethod
    def of_constants(constants: tuple[Any, ...]) -> Request:
        """The request that ``constants`` came from."""
        shape, place, batch, dtype, device, options = constants
        kind = {3: LinearFormat, 4: EmbeddingFormat, 6: ConvFormat}[len(shape)]
        memory, rebuild, size, channels_last = options
        return request(
            kind(*shape),
            batch,
            dtype,
            device,
            memory=memory,
            rebuild=rebuild,
            geometry=Geometry(*place) if place else None,
            size=size,
            channels_last=channels_last,
        )


def request(
    fmt: LinearFormat | ConvFormat,
    batch: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> Request:
    """A request under torch's present settings; ``options`` are further fields of ``Request``."""
    return Request(fmt, batch, **place_now(device, dtype)._asdict(), **options)


def place_now(device: str, dtype: torch.dtype) -> Place:
    """A type of device and a dtype under torch's present settings."""
    threads = torch.get_num_threads() if device == "cpu" else 1
    tf32 = device == "cuda" and dtype == torch.float32 and _allows_tf32()
    return Place(device, dtype, threads, tf32)


def _allows_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
