"""The table of the kinds of CP layers, one row a kind.

A row says which torch layer a CP layer stands in for, if any, by which methods one is made from
the other, and which arguments a saved model stores. Code that handles every kind (conversion,
freezing, saving, the search for layers in a model) reads this table, so that a new kind needs one
more row and no change elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from polyadic.nn.conv import CPConv1d, CPConv2d, CPConv3d
from polyadic.nn.conv_transpose import CPConvTranspose1d, CPConvTranspose2d, CPConvTranspose3d
from polyadic.nn.embedding import CPEmbedding, CPTiedLinear
from polyadic.nn.linear import CPLinear
from polyadic.nn.spectral import CPSpectralConv1d, CPSpectralConv2d, CPSpectralConv3d

Family = Literal["linear", "conv", "conv_transpose", "embedding", "head", "spectral"]
# Names of a constructor's arguments, each with the kind of value that a saved model must give it.
Arguments = Mapping[str, str]

_CP: Arguments = {"in_shape": "modes", "out_shape": "modes", "rank": "size", "memory": "text"}
_LINEAR: Arguments = {"in_features": "size", "out_features": "size", "bias": "flag"}
_EMBEDDING: Arguments = {"num_embeddings": "size", "embedding_dim": "size", "padding_idx": "index"}
_CONV: Arguments = {
    "in_channels": "size", "out_channels": "size", "kernel_size": "sizes", "stride": "sizes",
    "padding": "padding", "dilation": "sizes", "groups": "size", "bias": "flag",
    "padding_mode": "text",
}  # fmt: skip
_TRANSPOSED: Arguments = {**_CONV, "output_padding": "sizes"}
# A separable layer has no out modes.
_SPECTRAL: Arguments = {
    "in_channels": "size", "out_channels": "size", "n_modes": "sizes", "max_n_modes": "sizes",
    "separable": "flag", "bias": "flag", "fft_norm": "text", "resolution_scaling": "numbers",
    "precision": "text", "out_shape": "modes or none",
}  # fmt: skip
# What a row of torch's table can have done to it alone, and a row of a CP table cannot.
_PLAIN_TABLE = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}


@dataclass(frozen=True)
class Kind:
    """One kind of CP layer.

    Attributes:
        cp: the class of the CP layer.
        dense: the class of the torch layer that it stands in for; None where torch has none.
        family: the kinds of one family differ only in their number of spatial dimensions.
        from_dense: name of the class method that makes the CP layer from the torch layer; None for
            a head, which is made from its embedding, and where torch has no such layer.
        to_dense: name of the method that makes the torch layer from the CP layer, or None.
        shared: arguments of the constructor that both classes have; where torch has no such layer,
            all but those that every CP layer has.
        orders: the numbers of modes per side among which ``compress`` chooses by default.
        required: further arguments of torch's class, by name with the only value that the CP layer
            supports.
    """

    cp: type[nn.Module]
    dense: type[nn.Module] | None
    family: Family
    from_dense: str | None
    to_dense: str | None
    shared: Arguments
    orders: tuple[int, ...] = ()
    required: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the CP layer's class, which saved models go by."""
        return self.cp.__name__

    @property
    def arguments(self) -> Arguments:
        """All arguments of the constructor but device and dtype."""
        # A row comes last: what it says of an argument that all CP layers have is what counts.
        return self.shared if self.family == "head" else {**self.shared, **_CP, **self.shared}

    def make(self, layer: nn.Module, **options: Any) -> Any:
        """Make the CP layer that takes the place of a torch layer."""
        assert self.from_dense is not None
        return getattr(self.cp, self.from_dense)(layer, **options)

    def unmake(self, layer: nn.Module) -> Any:
        """Make the torch layer that takes the place of a CP layer."""
        assert self.to_dense is not None
        return getattr(layer, self.to_dense)()


_TO_3 = (1, 2, 3)
_TO_2 = (1, 2)
_BACK = ("from_conv_transpose", "to_conv_transpose", _TRANSPOSED, _TO_2)
KINDS = (
    Kind(CPLinear, nn.Linear, "linear", "from_linear", "to_linear", _LINEAR, _TO_3),
    Kind(CPConv1d, nn.Conv1d, "conv", "from_conv", "to_conv", _CONV, _TO_2),
    Kind(CPConv2d, nn.Conv2d, "conv", "from_conv", "to_conv", _CONV, _TO_2),
    Kind(CPConv3d, nn.Conv3d, "conv", "from_conv", "to_conv", _CONV, _TO_2),
    Kind(CPConvTranspose1d, nn.ConvTranspose1d, "conv_transpose", *_BACK),
    Kind(CPConvTranspose2d, nn.ConvTranspose2d, "conv_transpose", *_BACK),
    Kind(CPConvTranspose3d, nn.ConvTranspose3d, "conv_transpose", *_BACK),
    Kind(
        CPEmbedding,
        nn.Embedding,
        "embedding",
        "from_embedding",
        "to_embedding",
        _EMBEDDING,
        _TO_3,
        _PLAIN_TABLE,
    ),
    Kind(CPTiedLinear, nn.Linear, "head", None, "to_linear", _LINEAR),
    Kind(CPSpectralConv1d, None, "spectral", None, None, _SPECTRAL),
    Kind(CPSpectralConv2d, None, "spectral", None, None, _SPECTRAL),
    Kind(CPSpectralConv3d, None, "spectral", None, None, _SPECTRAL),
)
BY_NAME: Mapping[str, Kind] = {kind.name: kind for kind in KINDS}
BY_CP: Mapping[type[nn.Module], Kind] = {kind.cp: kind for kind in KINDS}
BY_DENSE: Mapping[type[nn.Module], Kind] = {
    kind.dense: kind for kind in KINDS if kind.dense is not None and kind.from_dense is not None
}


def is_cp(layer: nn.Module) -> bool:
    """Whether a module is a CP layer, or of a class derived from one."""
    return isinstance(layer, tuple(BY_CP))


def is_of_family(layer: nn.Module, *families: Family) -> bool:
    """Whether a module is a CP layer of one of the families, or of a class derived from one."""
    return isinstance(layer, tuple([kind.cp for kind in KINDS if kind.family in families]))


def is_torch_layer(layer: nn.Module, family: Family) -> bool:
    """Whether a module is torch's layer of a family, or of a class derived from it."""
    return isinstance(layer, tuple([d for d, kind in BY_DENSE.items() if kind.family == family]))


def family_of(layer: nn.Module) -> Family | None:
    """The family of a CP layer, or of a torch layer that one can stand in for; else None.

    A class derived from either is of no family, as it may compute something else.
    """
    kind = BY_CP.get(type(layer)) or BY_DENSE.get(type(layer))
    return None if kind is None else kind.family
