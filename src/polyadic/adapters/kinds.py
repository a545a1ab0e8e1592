"""The kinds of layers that are adapted, and which class adapts which layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from polyadic.adapters.layer import AdaptedLayer, Groups, columns, matrix
from polyadic.formats import Shape, padded_shape, tensorize
from polyadic.functional import cp_conv, cp_embedding, cp_linear
from polyadic.nn.kinds import is_torch_layer


class AdaptedLinear(AdaptedLayer):
    """A linear layer, quantized ones too, or transformers' ``Conv1D``; modes (in, out)."""

    @classmethod
    def modes(
        cls, base: Any, order: int, ins: Shape | None, outs: Shape | None
    ) -> tuple[Shape, ...]:
        """The groups of modes of ΔW."""
        return _sides(*_features(base), order, ins, outs)

    def features(self) -> tuple[int, int]:
        """In and out features."""
        return _features(self.get_base_layer())

    def delta(self, x: Tensor, groups: Groups, weights: Tensor | None) -> Tensor:
        """What an adapter adds to the output, but for its scaling."""
        ins, outs = groups
        return cp_linear(x, ins, outs, weights=weights)

    def dense(self, groups: Groups, weights: Tensor | None) -> Tensor:
        """ΔW as the base layer stores its weight."""
        ins, outs = groups
        if isinstance(self.get_base_layer(), Conv1D):
            return matrix(ins, outs, weights)
        return matrix(outs, ins, weights)

    def lora(self, adapter: str, name: str) -> dict[str, Tensor]:
        """The two matrices of the LoRA that is this adapter."""
        (ins, outs), weights = self.scaled_parts(adapter)
        return {
            "lora_A.weight": columns(ins, weights).t(),
            "lora_B.weight": columns(outs, None),
        }


class AdaptedConv(AdaptedLayer):
    """A convolution of one to three dimensions, with groups too; modes (out, in, kernel)."""

    in_groups = (1, 2)
    out_group = 0

    @classmethod
    def modes(
        cls, base: Any, order: int, ins: Shape | None, outs: Shape | None
    ) -> tuple[Shape, ...]:
        """The groups of modes of ΔW."""
        out_channels, in_channels, *kernel = base.weight.shape
        in_modes, out_modes = _sides(in_channels, out_channels, order, ins, outs)
        return out_modes, in_modes, tuple(kernel)

    def features(self) -> tuple[int, int]:
        """In and out channels."""
        base = self.get_base_layer()
        return base.in_channels, base.out_channels

    def fan_in(self) -> int:
        """How many products an entry of the output sums up."""
        return math.prod(map(int, self.get_base_layer().weight.shape[1:]))

    def delta(self, x: Tensor, groups: Groups, weights: Tensor | None) -> Tensor:
        """What an adapter adds to the output, but for its scaling."""
        base = self.get_base_layer()
        outs, ins, kernel = groups
        return cp_conv(
            x,
            outs,
            ins,
            kernel,
            weights=weights,
            stride=base.stride,
            padding=base.padding,
            dilation=base.dilation,
            groups=base.groups,
            padding_mode=base.padding_mode,
        )

    def dense(self, groups: Groups, weights: Tensor | None) -> Tensor:
        """ΔW as the base layer stores its weight."""
        outs, ins, kernel = groups
        shape = self.get_base_layer().weight.shape
        return matrix(outs, (*ins, *kernel), weights).view(shape)

    def lora(self, adapter: str, name: str) -> dict[str, Tensor]:
        """The two matrices of the LoRA that is this adapter."""
        base = self.get_base_layer()
        for option, plain in (("groups", 1), ("dilation", 1), ("padding_mode", "zeros")):
            value: Any = getattr(base, option)
            if value != plain and set(value if isinstance(value, tuple) else ()) != {plain}:
                raise ValueError(
                    f"{name} has {option}={value!r}, which PEFT's LoRA of convolutions leaves out "
                    f"of account; merge the adapter instead"
                )
        (outs, ins, kernel), weights = self.scaled_parts(adapter)
        down = columns((*ins, *kernel), weights).t()
        up = columns(outs, None)
        return {
            "lora_A.weight": down.reshape(-1, *base.weight.shape[1:]),
            "lora_B.weight": up.reshape(*up.shape, *(1 for _ in kernel)),
        }


class AdaptedEmbedding(AdaptedLayer):
    """A table of embeddings, whose row at ``padding_idx`` stays; modes (rows, columns)."""

    @classmethod
    def modes(
        cls, base: Any, order: int, ins: Shape | None, outs: Shape | None
    ) -> tuple[Shape, ...]:
        """The groups of modes of ΔW."""
        rows, columns = base.weight.shape
        if ins is not None and math.prod(ins) < rows:
            raise ValueError(
                f"in_shape_pattern must cover the {rows} rows of the embedding, got {ins}"
            )
        _, out_modes = _sides(columns, columns, order, None, outs)
        return padded_shape(rows, order) if ins is None else ins, out_modes

    def features(self) -> tuple[int, int]:
        """Rows and columns."""
        base = self.get_base_layer()
        return base.num_embeddings, base.embedding_dim

    def fan_in(self) -> int:
        """How many products an entry of the output sums up."""
        # A row is picked and not summed, and LoRA's table too has entries of mean square 1.
        return 1

    def delta(self, x: Tensor, groups: Groups, weights: Tensor | None) -> Tensor:
        """What an adapter adds to the output, but for its scaling."""
        base = self.get_base_layer()
        ins, outs = groups
        added = cp_embedding(
            x,
            ins,
            outs,
            weights=weights,
            padding_idx=base.padding_idx,
            num_embeddings=base.num_embeddings,
        )
        # Tables of some models scale their output.
        scale = self._get_embed_scale()
        return added if scale is None else added * scale.to(added.dtype)

    def dense(self, groups: Groups, weights: Tensor | None) -> Tensor:
        """ΔW as the base layer stores its weight."""
        base = self.get_base_layer()
        ins, outs = groups
        table = matrix(ins, outs, weights)[: base.num_embeddings]
        if base.padding_idx is not None:
            table[base.padding_idx] = 0
        return table

    def lora(self, adapter: str, name: str) -> dict[str, Tensor]:
        """The two matrices of the LoRA that is this adapter."""
        base = self.get_base_layer()
        (ins, outs), weights = self.scaled_parts(adapter)
        rows = columns(ins, weights)[: base.num_embeddings].clone()
        if base.padding_idx is not None:
            rows[base.padding_idx] = 0
        return {"lora_embedding_A": rows.t(), "lora_embedding_B": columns(outs, None)}


def kind_of(base: nn.Module, name: str) -> type[AdaptedLayer]:
    """The class that adapts a layer.

    Args:
        base: the layer.
        name: of the layer in its model, for the message.

    Raises:
        TypeError: no adapter is for such a layer.
        ValueError: an embedding has an option that a CP table has not.
    """
    if is_torch_layer(base, "embedding"):
        for option in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(base, option):
                raise ValueError(
                    f"{name} has {option}={getattr(base, option)!r}, which CP adapters do not "
                    f"support; leave it out of target_modules"
                )
        return AdaptedEmbedding
    if is_torch_layer(base, "conv"):
        return AdaptedConv
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{name} is the out projection of nn.MultiheadAttention, which reads its weight and "
            f"does not call it; leave it out of target_modules"
        )
    if is_torch_layer(base, "linear") or isinstance(base, Conv1D):
        return AdaptedLinear
    backend = resolve_quantization_backend(base)
    if backend is not None and backend.layer_type == "linear":
        return AdaptedLinear
    raise TypeError(
        f"Target module {name} ({type(base).__name__}) is not supported. CP adapters are for "
        f"nn.Linear (quantized ones too), transformers' Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d "
        f"and nn.Embedding; leave it out of target_modules"
    )


def check_called(parent: nn.Module, target: nn.Module, name: str) -> None:
    """Refuse a layer that its parent may not call.

    Raises:
        ValueError: in evaluation the parent would read the weight, without the adapter.
    """
    if (
        isinstance(parent, nn.TransformerEncoderLayer)
        and target in (parent.linear1, parent.linear2)
        and torch.backends.mha.get_fastpath_enabled()
    ):
        raise ValueError(
            f"{name} is not called in evaluation: the fast path of nn.TransformerEncoderLayer "
            f"reads its weight; switch that off by torch.backends.mha.set_fastpath_enabled(False)"
        )


def _features(base: Any) -> tuple[int, int]:
    if isinstance(base, Conv1D):
        ins, outs = base.weight.shape
        return int(ins), int(outs)
    return int(base.in_features), int(base.out_features)


def _sides(
    in_features: int, out_features: int, order: int, ins: Shape | None, outs: Shape | None
) -> tuple[Shape, Shape]:
    """Modes of both sides; those that are given must multiply to the features."""
    own_ins, own_outs = tensorize(in_features, out_features, order)
    return _fitting(ins, own_ins, "in"), _fitting(outs, own_outs, "out")


def _fitting(given: Shape | None, own: Shape, side: str) -> Shape:
    if given is None:
        return own
    if math.prod(given) != math.prod(own):
        raise ValueError(
            f"{side}_shape_pattern must multiply to the {math.prod(own)} {side} features, got "
            f"{given}"
        )
    return given
