"""Layers whose numbers are checked: each by the library and by a few lines of plain torch.

The plain form builds the dense weight from the factors by one ``torch.einsum`` and calls torch's
own layer. In float64 it is the truth; in the dtype at hand its error says what rounding costs.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyadic import functional

Leaves = dict[str, Tensor]
Shape = tuple[int, ...]
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def weight(groups: Sequence[Sequence[Tensor]], scale: Tensor | None, flat: int) -> Tensor:
    """The dense weight of groups of factors; the first ``flat`` groups become one axis each."""
    letters = iter(string.ascii_letters.replace("r", ""))
    names = ["".join(next(letters) for _ in group) for group in groups]
    operands = [f for group in groups for f in group]
    terms = [f"{mode}r" for name in names for mode in name]
    if scale is not None:
        operands.append(scale)
        terms.append("r")
    dense = torch.einsum(f"{','.join(terms)}->{''.join(names)}", *operands)
    sizes = [math.prod(f.shape[0] for f in group) for group in groups[:flat]]
    return dense.reshape(*sizes, *[f.shape[0] for group in groups[flat:] for f in group])


@dataclass(frozen=True)
class Subject:
    """One layer with the shapes of all its leaves.

    Args:
        name: for records.
        kind: ``"linear"``, ``"conv"``, ``"transposed"`` or ``"embedding"``.
        groups: mode sizes of the groups in the order the function takes them.
        rank: R.
        x_shape: of the input.
        bias: whether there is one.
        scaled: whether there is a weight vector λ.
        options: of the function, and of torch's.
        layout: ``"channels_last"`` or ``"transposed"`` for an input that lies otherwise.
        exact: whether small integers stay exact all the way in every dtype.
    """

    name: str
    kind: str
    groups: tuple[Shape, ...]
    rank: int
    x_shape: Shape
    bias: bool = False
    scaled: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "given"
    exact: bool = False

    def leaves(self, seed: int, integers: bool) -> Leaves:
        """Numbers on the CPU in float64, the same on every machine."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, size: float = 1.0) -> Tensor:
            if integers:
                drawn = torch.randint(-1, 2, shape, generator=generator).double()
                return drawn * torch.randint(0, 2, shape, generator=generator)
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * size

        found: Leaves = {}
        if self.kind == "embedding":
            rows = self.options["num_embeddings"]
            found["x"] = torch.randint(rows, self.x_shape, generator=generator)
        else:
            found["x"] = draw(*self.x_shape)
        for g, group in enumerate(self.groups):
            for d, mode in enumerate(group):
                found[f"factor {g}.{d}"] = draw(mode, self.rank, size=0.6)
        if self.scaled:
            found["weights"] = draw(self.rank)
        if self.bias:
            found["bias"] = draw(self.outputs())
        return found

    def outputs(self) -> int:
        """Features or channels of the output."""
        groups = self.options.get("groups", 1)
        sides = {"linear": 1, "embedding": 1, "conv": 0, "transposed": 1}
        out = math.prod(self.groups[sides[self.kind]])
        return out * groups if self.kind == "transposed" else out

    def _sorted(self, leaves: Leaves) -> tuple[list[list[Tensor]], Tensor | None]:
        groups = [
            [leaves[f"factor {g}.{d}"] for d in range(len(group))]
            for g, group in enumerate(self.groups)
        ]
        return groups, leaves.get("weights")

    def placed(self, leaves: Leaves, device: torch.device, dtype: torch.dtype) -> Leaves:
        """Leaves on a device in a dtype that require gradients, x in the layout asked for."""
        moved: Leaves = {}
        for name, leaf in leaves.items():
            if not leaf.is_floating_point():
                moved[name] = leaf.to(device)
                continue
            t = leaf.to(device, dtype)
            if name == "x" and self.layout == "channels_last":
                t = t.movedim(1, -1).contiguous().movedim(-1, 1)
            elif name == "x" and self.layout == "transposed":
                t = t.t().contiguous().t()
            moved[name] = t.requires_grad_()
        return moved

    def ours(self, leaves: Leaves) -> Tensor:
        """By the library."""
        groups, scale = self._sorted(leaves)
        arguments: list[Any] = [leaves["x"], *groups]
        if self.kind != "embedding":
            arguments.append(leaves.get("bias"))
        called: dict[str, Callable[..., Tensor]] = {
            "linear": functional.cp_linear,
            "conv": functional.cp_conv,
            "transposed": functional.cp_conv_transpose,
            "embedding": functional.cp_embedding,
        }
        return called[self.kind](*arguments, weights=scale, **self.options)

    def plain(self, leaves: Leaves) -> Tensor:
        """By the dense weight."""
        groups, scale = self._sorted(leaves)
        x, bias = leaves["x"], leaves.get("bias")
        dense = weight(groups, scale, 2)
        if self.kind == "linear":
            return F.linear(x, dense.t(), bias)
        if self.kind == "embedding":
            y = F.embedding(x, dense[: self.options["num_embeddings"]])
            padding = self.options.get("padding_idx")
            return y if padding is None else y * (x != padding).unsqueeze(-1)
        table = CONVS if self.kind == "conv" else TRANSPOSED
        return table[len(self.groups[2])](x, dense, bias, **self.options)


def step(function: Callable[[Leaves], Tensor], leaves: Leaves, grad: Tensor) -> dict[str, Tensor]:
    """Output and all gradients by name."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    y = function(leaves)
    grads = torch.autograd.grad(y, list(wanted.values()), grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


SMALL = [
    Subject("linear 24→30 R=5", "linear", ((2, 3, 4), (5, 6)), 5, (9, 24), exact=True),
    Subject(
        "linear 8→24 R=3, λ, bias", "linear", ((2, 4), (4, 3, 2)), 3, (7, 8), True, True,
        exact=True,
    ),
    Subject("linear 64→96 one factor R=16", "linear", ((64,), (96,)), 16, (130, 64), True),
    Subject("linear 60→72 R=33, x transposed", "linear", ((3, 4, 5), (2, 6, 6)), 33, (77, 60),
            layout="transposed"),
    Subject("linear 48→81 order 4 R=17, one row", "linear", ((2, 2, 3, 4), (3, 3, 3, 3)), 17,
            (1, 48), True),
    Subject("linear no rows", "linear", ((2, 4), (3, 2)), 3, (0, 8)),
    Subject("embedding 30×12 R=5", "embedding", ((5, 6), (3, 4)), 5, (11,), exact=True,
            options={"num_embeddings": 29}),
    Subject("embedding 300×35 R=19, padding, repeats", "embedding", ((4, 9, 9), (5, 7)), 19,
            (3, 40), options={"num_embeddings": 300, "padding_idx": 2}),
    Subject("conv 6→8 3×3 R=5", "conv", ((2, 4), (2, 3), (3, 3)), 5, (2, 6, 6, 7), exact=True,
            options={"padding": 1}),
    Subject("conv 12→15 3×3 R=27 stride 2, channels_last, bias", "conv",
            ((3, 5), (3, 4), (3, 3)), 27, (2, 12, 9, 11), True,
            options={"padding": 1, "stride": 2}, layout="channels_last"),
    Subject("conv 6→8 3×3×3 R=5, channels_last", "conv", ((2, 4), (2, 3), (3, 3, 3)), 5,
            (2, 6, 4, 5, 6), options={"padding": 1}, layout="channels_last"),
    Subject("conv 6→8 5×5 R=11, channels_last", "conv", ((2, 4), (2, 3), (5, 5)), 11,
            (2, 6, 9, 8), options={"padding": 2}, layout="channels_last"),
    Subject("conv 8→8 k5 1-d R=9", "conv", ((2, 4), (2, 4), (5,)), 9, (3, 8, 31),
            options={"padding": 2}),
    Subject("transposed conv 6→10 3×3 R=7 stride 2", "transposed", ((2, 3), (2, 5), (3, 3)), 7,
            (2, 6, 5, 6), options={"stride": 2, "padding": 1}),
]  # fmt: skip
_CUBE = (16, 16, 16)
LARGE = [
    Subject("linear 4096→4096 R=64", "linear", (_CUBE, _CUBE), 64, (300, 4096), True),
    Subject("linear 4096→11008 R=89", "linear", (_CUBE, (16, 16, 43)), 89, (257, 4096)),
    Subject("linear 1024→1024 R=256, λ", "linear", ((4, 16, 16),) * 2, 256, (130, 1024),
            scaled=True),
    Subject("embedding 50257×768 R=64", "embedding", ((37, 37, 37), (8, 8, 12)), 64, (2000,),
            options={"num_embeddings": 50257}),
    Subject("conv 128→128 3×3 28² R=176", "conv", ((8, 16), (8, 16), (3, 3)), 176,
            (4, 128, 28, 28), options={"padding": 1}, layout="channels_last"),
]  # fmt: skip


def subjects(dry: bool) -> list[Subject]:
    """Irregular layers of every kind, and in full some of real size."""
    if dry:
        return [s for s in SMALL if s.exact or s.kind == "transposed"]
    return [*SMALL, *LARGE]
