"""The embedding layer and the output head tied to it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyadic import checks, functional
from polyadic._torch import is_spread
from polyadic.formats import (
    EmbeddingFormat,
    LinearFormat,
    Rank,
    factored_shape,
    mode_sizes,
    padded_shape,
    positive_int,
    tensorize,
)
from polyadic.functional.sums import sums_taken
from polyadic.nn.convert import Exchangeable, FitOptions, Fitted, convert, dense, revert
from polyadic.nn.inputs import by_rows, call_recorded
from polyadic.nn.peak import peak_bytes
from polyadic.nn.weight import Weighted
from polyadic.planner.request import Request, request
from polyadic.plans import Memory
from polyadic.tensor import CPSlice

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CPEmbedding(Exchangeable):
    """Lookup of rows of a table (V, E) that is in CP format and never built.

    Stands in for ``torch.nn.Embedding``. The vocabulary is padded up to a product of modes of
    nearly equal size; an index is split into its digits over them (see
    ``polyadic.functional.cp_embedding``), and the gradient goes straight into the small factors.

    Args:
        num_embeddings: V.
        embedding_dim: E.
        padding_idx: an index whose output is zero and which sends no gradient. torch sets its
            row to zero; a row of a CP table cannot be set alone, so the output is zeroed instead.
        max_norm: None; another value is refused, because no row can be renormalised alone.
        norm_type: as in torch; it has no meaning, because ``max_norm`` is None.
        scale_grad_by_freq: False; True is refused.
        sparse: False; True is refused, because gradients of factors are small and dense.
        rank: R as an int; a float in (0, 1], the fraction of the table's entries; or
            ``"break-even"`` or ``"faster"``, the largest rank whose FLOPs in ``as_linear`` do not
            exceed those of a dense output head, or which is predicted to be faster there.
        order: D, modes per side, where ``in_shape`` or ``out_shape`` are not given.
        in_shape: in modes with a product of at least V; ``polyadic.padded_shape`` by default.
        out_shape: out modes with product E.
        memory: ``"fast"`` keeps one (len, R) intermediate for the backward, the others nothing.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Attributes:
        cp: the ``CPTensor`` of shape (Π in_shape, E), of which the first V rows are the table.
        weight: the table (V, E) with the padding row zero, read-only.

    Shape:
        (...) of int64 or int32 → (..., E).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, the rank or an option does not fit or is not supported.
    """

    _torch_class = nn.Embedding
    _shared_arguments = (
        "num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type",
        "scale_grad_by_freq", "sparse",
    )  # fmt: skip

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        rank: Rank,
        order: int = 3,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        memory: Memory = "balanced",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refused = {
            "max_norm": max_norm is not None,
            "scale_grad_by_freq": checks.check_flag(scale_grad_by_freq, "scale_grad_by_freq"),
            "sparse": checks.check_flag(sparse, "sparse"),
        }
        for name, given in refused.items():
            if given:
                raise ValueError(
                    f"CPEmbedding does not support {name}: rows of a CP table share all factors; "
                    f"leave it at its default"
                )
        self.num_embeddings = positive_int(num_embeddings, "num_embeddings")
        self.embedding_dim = positive_int(embedding_dim, "embedding_dim")
        self.padding_idx = checks.check_padding_index(padding_idx, self.num_embeddings)
        self.norm_type = norm_type
        if in_shape is None:
            self.in_shape = padded_shape(self.num_embeddings, order)
        else:
            self.in_shape = mode_sizes(in_shape, "in_shape")
            checks.check_table_rows(self.num_embeddings, self.in_shape)
        default_out = tensorize(self.embedding_dim, self.embedding_dim, order)[0]
        self.out_shape = factored_shape(out_shape, self.embedding_dim, default_out, "out_shape")
        self.memory = checks.check_memory(memory)
        self._create((self.in_shape, self.out_shape), rank, None, device, dtype)

    def _format_of_rank_1(self) -> EmbeddingFormat:
        return EmbeddingFormat(self.in_shape, self.out_shape, 1, self.num_embeddings)

    def _request_of_words(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> Request:
        """Return that of the output head, as a lookup in a dense table takes next to no time."""
        made = super()._request_of_words(device, dtype)
        return dataclasses.replace(made, format=LinearFormat(self.out_shape, self.in_shape, 1))

    def _std(self) -> float:
        return 1.0

    def reset_parameters(self) -> None:
        """Draw the factors anew, so that entries of the table have mean 0 and variance 1.

        torch draws them from N(0, 1). Here they are sums of R products of factor entries
        (``polyadic.init.cp_orthonormal_``), which are not exactly normal.
        """
        self.cp.reset_parameters(self._std())

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _dense_weight(self) -> Tensor:
        table = self.cp.to_matrix()[: self.num_embeddings]
        if self.padding_idx is None:
            return table
        rows = torch.arange(self.num_embeddings, device=table.device)
        return table.masked_fill((rows == self.padding_idx).unsqueeze(1), 0)

    def forward(self, indices: Tensor) -> Tensor:
        """(...) → (..., E); a jagged nested tensor gives a jagged one."""
        if not isinstance(indices, Tensor):
            if (recorded := call_recorded(self, indices)) is not None:
                return recorded
        elif indices.is_nested:
            return by_rows(self.forward, indices)
        (in_factors, out_factors), scale = self.cp.parts()
        return functional.cp_embedding(
            indices,
            in_factors,
            out_factors,
            weights=scale,
            padding_idx=self.padding_idx,
            num_embeddings=self.num_embeddings,
            memory=self.memory,
        )

    def resize(self, num_embeddings: int) -> None:
        """Change the number of rows of the table, in place; rows that stay keep their values.

        The first mode is the most significant digit of an index, so that rows are added and removed
        at the end of the table by adding and removing rows of the first factor. A new row of that
        factor is the mean of the present ones. Rows that only padded the table may become rows of
        it. Like added rows they have to be trained, because their values follow from the others.

        An optimizer has to be made anew, and so has a tied head, by ``as_linear``. In a model of
        transformers ``polyadic.pretrained.resize_token_embeddings`` takes care of the head.

        Args:
            num_embeddings: V from now on, above ``padding_idx``.

        Raises:
            TypeError: ``num_embeddings`` is not an int.
            ValueError: it is below 1 or not above ``padding_idx``, the factors are sharded, or the
                table is a layer of a joint tensor, whose other layers would change with it.
        """
        num_embeddings = positive_int(num_embeddings, "num_embeddings")
        checks.check_padding_index(self.padding_idx, num_embeddings)
        if isinstance(self.cp, CPSlice):
            raise ValueError(
                "a layer of a joint tensor cannot be resized alone; give it a tensor of its own: "
                "CPEmbedding.from_embedding(layer.to_embedding(), rank=...)"
            )
        if is_spread(self.cp.factors[0]):
            raise ValueError(
                "resize expects whole factors, but these are DTensors, of which each process holds "
                "a part; resize the plain layer, in every process alike, and shard it afterwards"
            )
        rest = self.in_shape[1:]
        rows = -(-num_embeddings // math.prod(rest))
        self.num_embeddings, self.in_shape = num_embeddings, (rows, *rest)
        # If several layers share the tensor, the first of them has changed it already.
        if (size := len(self.cp.factors[0])) != rows:
            first = self.cp.factors[0]
            with torch.no_grad():
                more = first.mean(0, keepdim=True).expand(max(0, rows - size), -1)
                values = torch.cat([first[:rows], more])
            self.cp.factors[0] = nn.Parameter(values, requires_grad=first.requires_grad)
            self.cp.tensorized_shape = (self.in_shape, *self.cp.tensorized_shape[1:])

    def as_linear(self, bias: bool | Tensor = False) -> CPTiedLinear:
        """Return an output head (..., E) → (..., V) that shares this layer's factors.

        Args:
            bias: whether the head has a bias (V,), initialised to zeros; or a tensor, such as the
                bias of the head that is replaced, which is copied.
        """
        return CPTiedLinear(self, bias)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        rank: Rank | None = None,
        order: int = 3,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        memory: Memory = "balanced",
        cp: Fitted | None = None,
        **fit: Unpack[FitOptions],
    ) -> CPEmbedding:
        """Make a CPEmbedding whose table is fitted to that of a ``torch.nn.Embedding``.

        Sizes, ``padding_idx``, dtype, device, ``training`` and ``requires_grad`` (the table's for
        every factor) are kept; no storage is shared. The fit is ``polyadic.decompose``'s, exact
        where the rank suffices. Rows that pad the vocabulary up to Π in_shape are fitted to
        nothing, which leaves the others more freedom. The row of ``padding_idx`` is fitted as it
        is, for a tied head (``as_linear``); the lookup gives zeros there, and there is a warning
        here if torch's does not.

        Args:
            embedding: the trained layer.
            rank: as in the constructor; None where ``cp`` is given.
            order: D, modes per side, where ``in_shape`` or ``out_shape`` are not given.
            in_shape: in modes with a product of at least V.
            out_shape: out modes.
            memory: what may be kept for the backward.
            cp: a fitted table, a ``CPTensor`` or a ``Decomposition`` of this layer's tensorized
                shape, which is copied; nothing is fitted then.
            fit: options of ``polyadic.decompose``; a ``metric`` may be token frequencies (V,).

        Raises:
            TypeError: ``embedding`` is not a ``torch.nn.Embedding`` itself, or its table is not
                plain.
            ValueError: its table is computed or has no values, something attached to it would be
                lost, or an argument or an option (``max_norm``, ``sparse``) does not fit.
        """
        layer = convert(
            cls,
            embedding,
            "from_embedding",
            rank,
            cp,
            order=order,
            in_shape=in_shape,
            out_shape=out_shape,
            memory=memory,
            **fit,
        )
        _warn_of_padding(embedding)
        return layer

    def to_embedding(self) -> nn.Embedding:
        """Make the ``torch.nn.Embedding`` with this layer's table (V, E); its flags are kept.

        Its table requires a gradient if a factor does.
        """
        return cast(nn.Embedding, revert(self))

    def _fit_target(self, weight: Tensor) -> Tensor:
        return F.pad(weight, (0, 0, 0, self.cp.shape[0] - self.num_embeddings))

    def _fit_metric(self, metric: Tensor | None) -> Tensor | None:
        # Rows that pad the vocabulary weigh nothing: they may be whatever suits the others.
        more = self.cp.shape[0] - self.num_embeddings
        if metric is None:
            return F.pad(torch.ones(self.num_embeddings, device="cpu"), (0, more)) if more else None
        if isinstance(metric, Tensor) and metric.shape == (self.num_embeddings,):
            return F.pad(metric, (0, more))
        return metric

    def extra_repr(self) -> str:
        """Say shapes, rank and parameter ratio."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, in_shape={self.in_shape}, "
            f"out_shape={self.out_shape}, {self._ratio()}"
        )


def _warn_of_padding(embedding: nn.Embedding) -> None:
    index = embedding.padding_idx
    if index is not None and embedding.weight.detach()[index].any():
        warnings.warn(
            f"row {index} of the embedding, its padding_idx, is not zero; a CPEmbedding gives "
            f"zeros there. Set padding_idx of the embedding to None first to keep the row",
            UserWarning,
            stacklevel=3,
        )


class CPTiedLinear(Weighted):
    """Output head y = x Wᵀ + b whose weight is the table of a ``CPEmbedding``; made by as_linear.

    It computes the logits of all V indices by ``polyadic.functional.cp_linear`` on the embedding's
    own factors with the sides exchanged, without building the table. Rows that only pad the
    vocabulary are cut off. The padding index has the logit of its CP row, which the lookup never
    shows.

    Args:
        embedding: the layer whose factors are shared; parameters exist once, and gradients add up.
        bias: whether the head has a bias (V,), initialised to zeros; or a tensor, which is copied.

    Attributes:
        cp: the embedding's own ``CPTensor``.
        bias: (V,) or None.
        weight: the dense weight (V, E), read-only.

    Shape:
        (..., E) → (..., V).
    """

    bias: nn.Parameter | None

    def __init__(self, embedding: CPEmbedding, bias: bool | Tensor = False) -> None:
        super().__init__()
        if not isinstance(embedding, CPEmbedding):
            raise TypeError(f"embedding must be a CPEmbedding, got {type(embedding).__name__}")
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.memory = embedding.memory
        self.cp = embedding.cp
        own: nn.Parameter | None = None
        if isinstance(bias, Tensor):
            checks.check_bias(bias, self.out_features, self.cp.factors[0], cast=False)
            trained = bias.requires_grad if isinstance(bias, nn.Parameter) else True
            own = nn.Parameter(bias.detach().clone(), requires_grad=trained)
        elif bias:
            own = nn.Parameter(self.cp.factors[0].detach().new_zeros(self.out_features))
        self.register_parameter("bias", own)

    def reset_parameters(self) -> None:
        """Set the bias to zeros; the factors are the embedding's, which draws them."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def rank(self) -> int:
        """R, the number of rank-one components."""
        return self.cp.rank

    @property
    def in_factors(self) -> tuple[Tensor, ...]:
        """Tensors (n_d, R): the embedding's out factors."""
        return self.cp.factor_groups()[1]

    @property
    def out_factors(self) -> tuple[Tensor, ...]:
        """Tensors (m_d, R): the embedding's in factors."""
        return self.cp.factor_groups()[0]

    def request(self, batch: int, size: None = None) -> Request:
        """Return what a call of this head asks of the planner, as ``request`` of a layer does.

        Args:
            batch: rows.
            size: None, as a head has no spatial size.

        Raises:
            ValueError: there is a size.
        """
        if size is not None:
            raise ValueError(
                f"size is that of a convolution's input; a head has none, got {size!r}"
            )
        first = self.cp.factors[0]
        # Rows that only pad the vocabulary are computed, too.
        rows, columns = self.cp.tensorized_shape
        fmt = LinearFormat(columns, rows, self.rank)
        made = request(fmt, batch, first.dtype, first.device.type, memory=self.memory)
        return dataclasses.replace(made, weights=self.cp.weights is not None)

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _dense_weight(self) -> Tensor:
        return self.cp.to_matrix()[: self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) → (..., V); a jagged nested tensor gives a jagged one."""
        if not isinstance(x, Tensor):
            if (recorded := call_recorded(self, x)) is not None:
                return recorded
        elif x.is_nested:
            return by_rows(self.forward, x)
        (rows, columns), scale = self.cp.parts()
        logits = functional.cp_linear(x, columns, rows, weights=scale, memory=self.memory)
        if logits.shape[-1] != self.out_features:
            logits = logits[..., : self.out_features]
        if self.bias is None:
            return logits
        return (sums_taken(logits) if is_spread(logits) else logits) + self.bias.to(logits.dtype)

    def to_linear(self) -> nn.Linear:
        """Make a ``torch.nn.Linear`` with the dense weight (V, E), not tied; its flags are kept.

        Its weight requires a gradient if a factor does.
        """
        trained = any(parameter.requires_grad for parameter in self.cp.parameters())
        made = dense(nn.Linear, self._arguments(), self, trained, self.bias)
        return cast(nn.Linear, made)

    def peak_bytes(self, x: Tensor, training: bool = True) -> tuple[int, int]:
        """Return the most bytes of a call that are alive at once, here and in a dense head."""
        twin = nn.Linear(**self._arguments(), device="meta", dtype=self.cp.factors[0].dtype)
        return peak_bytes(self, x, training), peak_bytes(twin, x, training)

    def _arguments(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {**sizes, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        """Say shapes and rank; the parameters are the embedding's."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.rank}"
        )
