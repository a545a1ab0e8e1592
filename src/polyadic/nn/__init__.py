"""Layers whose weight is a CP tensor. They own parameters; the arithmetic is in ``functional``."""

from polyadic.nn.conv import CPConv1d, CPConv2d, CPConv3d
from polyadic.nn.conv_transpose import CPConvTranspose1d, CPConvTranspose2d, CPConvTranspose3d
from polyadic.nn.embedding import CPEmbedding, CPTiedLinear
from polyadic.nn.linear import CPLinear
from polyadic.nn.shared import CPSharedInput
from polyadic.nn.spectral import CPSpectralConv1d, CPSpectralConv2d, CPSpectralConv3d

__all__ = [
    "CPConv1d",
    "CPConv2d",
    "CPConv3d",
    "CPConvTranspose1d",
    "CPConvTranspose2d",
    "CPConvTranspose3d",
    "CPEmbedding",
    "CPLinear",
    "CPSharedInput",
    "CPSpectralConv1d",
    "CPSpectralConv2d",
    "CPSpectralConv3d",
    "CPTiedLinear",
]
