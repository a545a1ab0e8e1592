"""CP linear maps, convolutions and embeddings on plain tensors: validate, plan, run.

``cp_linear``, ``cp_linear_shared``, ``cp_conv``, ``cp_conv_transpose`` and ``cp_embedding`` are
differentiable; the pairs ``cp_linear_forward`` and ``cp_linear_backward``, ``cp_conv_forward`` and
``cp_conv_backward`` are the same arithmetic without autograd, for those who bring their own.

The method: a CP tensorized matrix is W = KA diag(λ) KCᵀ with Khatri-Rao products KA, KC of its
factors (Kolda & Bader, Tensor Decompositions and Applications, SIAM Review 2009, §2.6 and §3), so
that forward and backward are products with KA and KC and MTTKRPs of matrices of their size. A CP
convolution is in-projection, depthwise convolution, out-projection (Lebedev et al., Speeding-up
Convolutional Neural Networks Using Fine-tuned CP-Decomposition, ICLR 2015).
"""

from polyadic.functional.conv import (
    ConvSaved,
    cp_conv,
    cp_conv_backward,
    cp_conv_forward,
    cp_conv_transpose,
)
from polyadic.functional.embedding import cp_embedding
from polyadic.functional.linear import (
    LinearSaved,
    cp_linear,
    cp_linear_backward,
    cp_linear_forward,
)
from polyadic.functional.shared import cp_linear_shared
from polyadic.functional.spectral import cp_spectral_conv, cp_spectral_product

__all__ = [
    "ConvSaved",
    "LinearSaved",
    "cp_conv",
    "cp_conv_backward",
    "cp_conv_forward",
    "cp_conv_transpose",
    "cp_embedding",
    "cp_linear",
    "cp_linear_backward",
    "cp_linear_forward",
    "cp_linear_shared",
    "cp_spectral_conv",
    "cp_spectral_product",
]
