"""CP embeddings: rows of a table in CP format, without building the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyadic import checks
from polyadic._torch import transforms_active
from polyadic.formats import EmbeddingFormat
from polyadic.functional.boundary import Asked, Call, Groups, as_batch, joined, settled
from polyadic.functional.spread import Layout, SpreadCall, spread_call
from polyadic.kernels.embedding import EmbeddingMap
from polyadic.kernels.multilinear import accumulate_dtype
from polyadic.planner.ask import plan_embedding
from polyadic.plans import LinearPlan, Memory

# Below this many indices a lookup costs no more than finding the distinct ones.
FEWEST_TO_COUNT = 512


def _may_count(flat: Tensor, dtype: torch.dtype) -> bool:
    """Whether distinct indices may be counted although nobody asked for it.

    It must cost no synchronisation with a device, and change nothing under a compiler or a
    transform. In half precision nothing would be gained, because repeats need their gradients
    summed in float32.
    """
    return (
        flat.device.type == "cpu"
        and dtype == accumulate_dtype(dtype)
        and type(flat) is Tensor
        and not torch.compiler.is_compiling()
        and not transforms_active()
        and len(flat) >= FEWEST_TO_COUNT
    )


def _distinct(flat: Tensor, size: int) -> tuple[Tensor, Tensor] | None:
    """Return the distinct indices and the place of each index, if at most half are distinct."""
    if size <= 64 * len(flat):
        # It is cheaper to count marks in a table than to sort indices.
        marks = torch.zeros(size, dtype=torch.bool, device=flat.device).index_fill_(
            0, flat.long(), True
        )
        if 2 * int(marks.sum()) > len(flat):
            return None
    distinct, places = torch.unique(flat, return_inverse=True)
    return (distinct, places) if 2 * len(distinct) <= len(flat) else None


@dataclass(frozen=True)
class _Lookup(Call):
    """A settled call of ``cp_embedding``.

    Args:
        size: V, rows of the table.
        dtype: dtype of the factors.
    """

    map: EmbeddingMap
    size: int = 0
    dtype: torch.dtype = torch.float32


def _settle(asked: Asked) -> tuple[_Lookup, Groups]:
    """Check and plan a call of ``cp_embedding``; λ comes in front, as one more in factor."""
    indices, weights = asked.x, asked.weights
    padding_idx, num_embeddings, memory = asked.options
    ins = checks.check_factor_group(asked.groups[0], "in_factors")
    outs = checks.check_factor_group(asked.groups[1], "out_factors")
    in_shape, out_shape, (rank,) = checks.check_factors(weights, in_factors=ins, out_factors=outs)
    fmt, first = EmbeddingFormat(in_shape, out_shape, rank), ins[0]
    checks.check_indices(indices, first)
    size = checks.check_table_rows(num_embeddings, in_shape)
    padding_idx = checks.check_padding_index(padding_idx, size)
    memory = checks.check_memory(memory)
    plan = plan_embedding(fmt, indices.numel(), first.dtype, first.device.type, memory)
    n_in = len(ins)
    if weights is not None:
        # Called on the class, as torch.compile traces no method of a plan that is a constant to it.
        plan, n_in = LinearPlan.with_weights(plan), n_in + 1
    layer_map = EmbeddingMap(plan, n_in, padding_idx, size)
    return _Lookup(layer_map, 0, as_batch(indices, 0), None, size, first.dtype), (ins, outs)


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
    if unique is not None:
        unique = checks.check_flag(unique, "unique")
    options = padding_idx, num_embeddings, memory
    found, groups = settled(_settle, indices, (in_factors, out_factors), None, weights, options)
    if isinstance(found, SpreadCall):
        return _spread(indices, tuple(map(tuple, groups)), weights, unique, options)
    flat = found.batched(indices)
    if not torch.compiler.is_compiling():
        # The kernel of a GPU that looks indices up asserts their range at no further launch.
        by_kernel = not unique and flat.is_cuda
        if by_kernel:
            by_kernel = found.map.asserts_range(flat, joined(groups, weights, found.weights_at))
        if not by_kernel:
            checks.check_in_range(flat, found.size)
    distinct = None
    # torch cannot differentiate F.embedding twice if there is no index.
    if unique and len(flat):
        distinct = torch.unique(flat, return_inverse=True)
    elif unique is None and _may_count(flat, found.dtype):
        distinct = _distinct(flat, found.size)
    if distinct is None:
        return found.run(indices, groups, None, weights)
    # The gradients of a row's repeats, of which there can be thousands, are summed before they
    # reach the factors. In half precision such a sum ends where a term is below its rounding.
    flat, places = distinct
    wide = accumulate_dtype(found.dtype)
    groups = tuple(tuple([factor.to(wide) for factor in group]) for group in groups)
    weights = None if weights is None else weights.to(wide)
    # Not remembered: there is another number of distinct indices each time.
    fewer, groups = _settle(Asked(flat, groups, None, weights, options))
    rows = fewer.run(flat, groups, None, weights)
    # torch does not differentiate an embedding of complex rows.
    copied = rows.index_select(0, places) if rows.is_complex() else F.embedding(places, rows)
    return found.unbatched(copied.to(found.dtype))


def _spread(
    indices: Any, groups: Any, weights: Any, unique: bool | None, options: tuple[Any, ...]
) -> Tensor:
    """A lookup in DTensors, by each process in what it holds."""

    def local(found: Layout, x: Tensor, groups: Any, biases: Any, scale: Any) -> tuple[Tensor]:
        padding_idx, num_embeddings, memory = options
        return (
            cp_embedding(
                x,
                *groups,
                weights=scale[0],
                padding_idx=padding_idx,
                num_embeddings=num_embeddings,
                unique=unique,
                memory=memory,
            ),
        )

    y: Tensor = spread_call(local, indices, groups, [], [weights])[0]
    return y
