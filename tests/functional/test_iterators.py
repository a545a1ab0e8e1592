"""Factors given as an iterator, which can be gone through once, count as the tuple does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from polyadic import CPTensor, reference
from polyadic import functional as PF

R = 3


def factors(*modes: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(mode, R, dtype=torch.float64) for mode in modes)


WEIGHTS = torch.rand(R, dtype=torch.float64)
IMAGE = torch.randn(2, 6, 5, 4, dtype=torch.float64)
Groups = tuple[Sequence[Tensor], ...]


def linear_pair(x: Tensor, ins: Any, outs: Any, **kwargs: Any) -> Any:
    y, saved = PF.cp_linear_forward(x, ins, outs, **kwargs)
    return y, *PF.cp_linear_backward(torch.ones_like(y), saved)


def conv_pair(x: Tensor, outs: Any, ins: Any, kernels: Any, **kwargs: Any) -> Any:
    y, saved = PF.cp_conv_forward(x, outs, ins, kernels, **kwargs)
    return y, *PF.cp_conv_backward(torch.ones_like(y), saved)


FUNCTIONS: dict[str, tuple[Callable[..., Any], Any, tuple[tuple[int, ...], ...]]] = {
    "cp_linear": (PF.cp_linear, IMAGE[..., 0].transpose(1, 2), ((2, 3), (4, 2))),
    "cp_linear_forward, cp_linear_backward": (linear_pair, IMAGE[:, :, 0, 0], ((2, 3), (4, 2))),
    "cp_conv": (PF.cp_conv, IMAGE, ((4, 2), (2, 3), (3, 2))),
    "cp_conv, padded by entries": (
        lambda *args, **kw: PF.cp_conv(*args, padding=1, padding_mode="reflect", **kw),
        IMAGE, ((4, 2), (2, 3), (3, 2)),
    ),
    "cp_conv, unbatched": (PF.cp_conv, IMAGE[0], ((4, 2), (2, 3), (3, 2))),
    "cp_conv_forward, cp_conv_backward": (conv_pair, IMAGE, ((4, 2), (2, 3), (3, 2))),
    "cp_conv_transpose": (PF.cp_conv_transpose, IMAGE, ((2, 3), (4, 2), (3, 2))),
    "cp_embedding": (PF.cp_embedding, torch.tensor([[0, 5], [3, 3]]), ((2, 3), (4, 2))),
}  # fmt: skip


def flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for part in found for t in flat(part)]


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "lambda"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, weights: Tensor | None) -> None:
    """Whichever groups are iterators, of all kinds, at the first call and at a later one.

    Compared are the same tensors in tuples: torch multiplies those that ask for gradients, as a
    ParameterList's do, in other shapes, which some processors round otherwise.
    """
    function, x, modes = FUNCTIONS[name]
    groups: Groups = tuple(factors(*group) for group in modes)
    kinds: tuple[Callable[[Any], Any], ...] = (
        iter,
        list,
        lambda g: (f for f in g),
        torch.nn.ParameterList,
    )
    for kind in kinds:
        for chosen in itertools.product((False, True), repeat=len(groups)):
            given = [kind(g) if c else g for g, c in zip(groups, chosen, strict=True)]
            same = [tuple(kind(g)) if c else g for g, c in zip(groups, chosen, strict=True)]
            want = flat(function(x, *same, weights=weights))
            got = flat(function(x, *given, weights=weights))
            assert len(got) == len(want)
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), (kind, chosen)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_iterator_that_is_used_up_is_refused(name: str) -> None:
    function, x, modes = FUNCTIONS[name]
    for at in range(len(modes)):
        given: list[Any] = [factors(*group) for group in modes]
        given[at] = iter(())
        with pytest.raises(ValueError, match="at least one factor"):
            function(x, *given)


def test_a_tensor_of_factors() -> None:
    every = factors(2, 3, 4)
    made = CPTensor.from_factors(((2, 3), (4,)), iter(every), WEIGHTS)
    assert all(torch.equal(a, b) for a, b in zip(made.factors, every, strict=True))


def test_the_reference_takes_what_it_saved_once() -> None:
    tensor = CPTensor.from_factors(((2, 3), (4,)), factors(2, 3, 4))
    x, grad = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    _, saved = reference.cp_times_matrix_fwd(tensor, x)
    want = flat(reference.cp_times_matrix_bwd(tensor, grad, saved))
    try:
        got = flat(reference.cp_times_matrix_bwd(tensor, grad, iter(saved)))
    except (TypeError, ValueError):
        return
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
