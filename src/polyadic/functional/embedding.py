"""CP embeddings: rows of a table in CP format, without building the table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from polyadic import checks
from polyadic.autograd import run
from polyadic.formats import EmbeddingFormat
from polyadic.kernels.embedding import EmbeddingMap
from polyadic.kernels.multilinear import accumulate_dtype
from polyadic.planner.ask import plan_embedding
from polyadic.plans import LinearPlan, Memory

# Below this many indices a lookup costs no more than finding the distinct ones.
FEWEST_TO_COUNT = 512


def _may_count(flat: Tensor, dtype: torch.dtype) -> bool:
    """Whether distinct indices may be counted unasked: no host sync, no capture, no transform.

    In half precision nothing would be gained: repeats need their gradients summed in float32.
    """
    return (
        flat.device.type == "cpu"
        and dtype == accumulate_dtype(dtype)
        and type(flat) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and len(flat) >= FEWEST_TO_COUNT
    )


def _distinct(flat: Tensor, size: int) -> tuple[Tensor, Tensor] | None:
    """Distinct indices and where each index stands among them, if they are at most half as many."""
    if size <= 64 * len(flat):
        # Marks in the table are cheaper to count than indices to sort.
        marks = torch.zeros(size, dtype=torch.bool, device=flat.device).index_fill_(
            0, flat.long(), True
        )
        if 2 * int(marks.sum()) > len(flat):
            return None
    distinct, places = torch.unique(flat, return_inverse=True)
    return (distinct, places) if 2 * len(distinct) <= len(flat) else None


def cp_embedding(
    indices: Tensor,
    in_factors: Sequence[Tensor],
    out_factors: Sequence[Tensor],
    *,
    weights: Tensor | None = None,
    padding_idx: int | None = None,
    num_embeddings: int | None = None,
    unique: bool | None = None,
    memory: Memory = "balanced",
) -> Tensor:
    """Rows of a table in CP format, y[j] = W[indices[j]], without building the table W.

    W (V, E) are the first V rows of (A_1 ⊙ … ⊙ A_D) diag(λ) (C_1 ⊙ … ⊙ C_E)ᵀ. Each index is split
    into its digits over the in modes, D rows are gathered and multiplied, and one GEMM follows; the
    gradient goes straight into the factors. Differentiable in the factors, also twice and in
    forward mode; works under torch.func, torch.compile and torch.export. Autocast leaves it alone,
    as it does torch's embedding.

    Args:
        indices: of any shape, int64 or int32, each in [0, V).
        in_factors: D tensors A_d (m_d, R) with Π m_d ≥ V; the last mode varies fastest.
        out_factors: tensors C_d (n_d, R) whose modes multiply to E.
        weights: λ (R,) or None for ones.
        padding_idx: index whose output row is zero and which sends no gradient; counted from the
            end where negative.
        num_embeddings: V; Π m_d by default. On a CPU an index outside [0, V) is an IndexError; on
            other devices, as with torch's own, it is caught asynchronously or (compiled, from V
            to Π m_d) not at all.
        unique: look up each distinct index once and copy its row to its repeats. None does so in
            eager mode on a CPU in float32 and float64, where there are at least 512 indices and at
            most half as many distinct ones; True always (it needs the number of distinct indices
            on the host, so that it cannot be captured in one graph), False never. In half precision
            the rows are then made, and the gradients of repeats summed, in float32.
        memory: ``"fast"`` keeps one (len, R) intermediate for the backward; ``"balanced"`` and
            ``"least"`` keep the indices alone.

    Returns:
        (*indices.shape, E), in the factors' dtype.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, ranks or devices do not fit together.
        IndexError: an index is outside [0, V).
    """
    ins = checks.check_factor_group(in_factors, "in_factors")
    outs = checks.check_factor_group(out_factors, "out_factors")
    in_shape, out_shape, (rank,) = checks.check_factors(weights, in_factors=ins, out_factors=outs)
    fmt = EmbeddingFormat(in_shape, out_shape, rank)
    checks.check_indices(indices, ins[0])
    size = checks.check_table_rows(num_embeddings, in_shape)
    padding_idx = checks.check_padding_index(padding_idx, size)
    memory = checks.check_memory(memory)
    flat = indices.reshape(math.prod(indices.shape))
    if not torch.compiler.is_compiling():
        checks.check_in_range(flat, size)
    inverse = None
    if unique:
        flat, inverse = torch.unique(flat, return_inverse=True)
    elif unique is None and _may_count(flat, ins[0].dtype):
        flat, inverse = _distinct(flat, size) or (flat, None)
    factors, dtype = [*ins, *outs], ins[0].dtype
    if weights is not None:
        factors.insert(0, weights.unsqueeze(0))
    if inverse is not None:
        # The gradients of a row's repeats, of which there can be thousands, are summed before they
        # reach the factors. In half precision such a sum ends where a term is below its rounding.
        factors = [factor.to(accumulate_dtype(dtype)) for factor in factors]
    plan = plan_embedding(fmt, flat.shape[0], factors[0].dtype, ins[0].device.type, memory)
    if weights is not None:
        # On the class, as torch.compile traces no method of a plan that is a constant to it.
        plan = LinearPlan.with_weights(plan)
    y = run(EmbeddingMap(plan, len(factors) - len(outs), padding_idx), flat, None, factors)
    if inverse is not None:
        y = F.embedding(inverse, y).to(dtype)
    return y.view(*indices.shape, fmt.out_features)
