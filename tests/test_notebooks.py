"""The notebooks this library started from, with their functions imported instead of defined.

The cells are run as they stand and what they print is compared: every comparison True, and the
parameter counts 4000 against 32768 (linear) and 2600 against 4608 (conv).
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import polyadic
from polyadic import functional

NOTEBOOKS = Path(__file__).parents[2] / "shared" / "seed" / "cp_notebooks.md"
FUNCTIONS = {"cp_times_matrix_fwd", "cp_times_matrix_bwd", "cp_conv_fwd", "cp_conv_bwd"}
IMPORTS = f"from polyadic.reference import {', '.join(sorted(FUNCTIONS))}\n"

LINEAR_COUNTS = [
    "The number of parameters in CP format: 4000",
    "The number of parameters in matrix format: 32768",
]
CONV_COUNTS = [
    "The number of parameters in CP format: 2600",
    "The number of parameters in matrix format: 4608",
]
# forward, six factors, dx
CHECKS = ["True"] * 8
LINEAR_PRINTS = CHECKS + LINEAR_COUNTS
CONV_PRINTS = CHECKS + CONV_COUNTS

LINEAR_CELLS = [
    """
import torch
DTYPE = torch.float64
""",
    """
in_features = 256
out_features = 128
rank = 100
cp_tensor = new_tensor(((4, 4, 16), (4, 4, 8)), rank)
""",
    """
batch_size = 32
X = torch.randn((batch_size, in_features), dtype=DTYPE, requires_grad=True)
W = cp_tensor.to_matrix()
standard_fwd = X @ W
with torch.no_grad():
    factorized_fwd, saved_tensors = cp_times_matrix_fwd(cp_tensor, X)
print(torch.allclose(standard_fwd, factorized_fwd))
""",
    """
dy = torch.randn_like(standard_fwd)
standard_fwd.backward(dy)
with torch.no_grad():
    factor_grad, dx = cp_times_matrix_bwd(cp_tensor, dy, saved_tensors)
for i, grad in enumerate(factor_grad):
    print(torch.allclose(cp_tensor.factors[i].grad, grad))
print(torch.allclose(dx, X.grad))
""",
    """
cp_count = sum(torch.numel(x) for x in cp_tensor.factors)
print('The number of parameters in CP format: {}'.format(cp_count))
print('The number of parameters in matrix format: {}'.format(torch.numel(W)))
""",
]

CONV_CELLS = [
    """
import torch
import torch.nn.functional as F
DTYPE = torch.float64
""",
    """
out_channels = 32
in_channels = 16
kernel_size_x = 3
kernel_size_y = 3
order = 2
rank = 100
tensor = new_tensor(((4, 8), (4, 4), (kernel_size_x, kernel_size_y)), rank)
""",
    """
batch_size = 1
x = 32
y = 32
input_tensor = torch.randn((batch_size, in_channels, x, y), dtype=DTYPE, requires_grad=True)
kernel = tensor.to_matrix().reshape(out_channels, in_channels, kernel_size_x, kernel_size_y)
standard_fwd = F.conv2d(input_tensor, kernel, bias=None, padding='same')
with torch.no_grad():
    factorized_fwd, saved_tensors = cp_conv_fwd(tensor, input_tensor, order)
print(torch.allclose(standard_fwd, factorized_fwd))
""",
    """
dy = torch.randn_like(standard_fwd)
standard_fwd.backward(dy)
factor_grads, dx = cp_conv_bwd(tensor, dy, saved_tensors)
for i, grad in enumerate(factor_grads):
    print(torch.allclose(tensor.factors[i].grad, grad))
print(torch.allclose(dx, input_tensor.grad))
""",
    """
cp_count = sum(torch.numel(x) for x in tensor.factors)
print('The number of parameters in CP format: {}'.format(cp_count))
print('The number of parameters in matrix format: {}'.format(torch.numel(kernel)))
""",
]


def new_tltorch_tensor(shape: Any, rank: int) -> Any:
    tltorch = pytest.importorskip("tltorch")
    tensor = tltorch.TensorizedTensor.new(shape, rank, factorization="CP", dtype=torch.float64)
    tltorch.tensor_init(tensor)
    return tensor


def new_polyadic_tensor(shape: Any, rank: int) -> Any:
    return polyadic.CPTensor(shape, rank, dtype=torch.float64)


def explicit_pairs() -> dict[str, Any]:
    """The notebooks' four names on the explicit pairs; `saved_tensors` is then our own record."""

    def linear_fwd(tensor: Any, matrix: Any) -> Any:
        order = len(tensor.tensorized_shape[0])
        factors = list(tensor.factors)
        return functional.cp_linear_forward(matrix, factors[:order], factors[order:])

    def linear_bwd(tensor: Any, grad: Any, saved: Any) -> Any:
        dx, in_grads, out_grads = functional.cp_linear_backward(grad, saved)
        return [*in_grads, *out_grads], dx

    def conv_fwd(tensor: Any, x: Any, order: int) -> Any:
        factors = list(tensor.factors)
        groups = factors[:order], factors[order : 2 * order], factors[2 * order :]
        return functional.cp_conv_forward(x, *groups, padding="same")

    def conv_bwd(tensor: Any, dy: Any, saved: Any) -> Any:
        dx, out_grads, in_grads, kernel_grads = functional.cp_conv_backward(dy, saved)
        return [*out_grads, *in_grads, *kernel_grads], dx

    return {
        "cp_times_matrix_fwd": linear_fwd,
        "cp_times_matrix_bwd": linear_bwd,
        "cp_conv_fwd": conv_fwd,
        "cp_conv_bwd": conv_bwd,
    }


def reference_functions() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(IMPORTS, names)
    return names


def run(cells: list[str], namespace: dict[str, Any]) -> list[str]:
    """Run the cells one after the other in one namespace; the lines they print."""
    torch.manual_seed(0)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in cells:
            exec(compile(cell, "<cell>", "exec"), namespace)
    return printed.getvalue().splitlines()


@pytest.mark.parametrize("new_tensor", [new_tltorch_tensor, new_polyadic_tensor])
@pytest.mark.parametrize("functions", [reference_functions, explicit_pairs])
@pytest.mark.parametrize(
    ("cells", "expected"),
    [(LINEAR_CELLS, LINEAR_PRINTS), (CONV_CELLS, CONV_PRINTS)],
    ids=["linear", "conv"],
)
def test_cells_print_the_same(
    cells: list[str], expected: list[str], functions: Any, new_tensor: Any
) -> None:
    assert run(cells, {"new_tensor": new_tensor, **functions()}) == expected


def stored_cells(text: str) -> list[str]:
    """The code cells of the exported notebooks, without the functions they define.

    The export marks where a cell begins and not where it ends, so a cell is the longest run of
    lines from its `In [n]:` up to an empty line that is Python. A printed `True` may be caught
    by that, and does nothing.
    """
    cells = []
    for block in re.split(r"^In \[\d+\]:\n", text, flags=re.MULTILINE)[1:]:
        lines = block.splitlines()
        ends = [i for i, line in enumerate(lines) if not line] + [len(lines)]
        for end in reversed(ends):
            try:
                tree = ast.parse("\n".join(lines[:end]))
            except SyntaxError:
                continue
            break
        tree.body = [
            node
            for node in tree.body
            if not (isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS)
        ]
        cells.append(ast.unparse(tree))
    return cells


@pytest.mark.skipif(not NOTEBOOKS.exists(), reason="the exported notebooks are not beside us")
@pytest.mark.parametrize("functions", [reference_functions, explicit_pairs])
def test_stored_notebooks_print_the_same(functions: Any) -> None:
    pytest.importorskip("tltorch")
    linear, conv = NOTEBOOKS.read_text().split("# CP Forward and Backward Propagation for CONV")
    # the conv notebook sets kernel_size_h and _w but reads kernel_size_x and _y
    sizes = {"kernel_size_x": 3, "kernel_size_y": 3}
    for text, expected in ((linear, LINEAR_PRINTS), (conv, CONV_PRINTS)):
        cells = stored_cells(text)
        assert len(cells) > 7
        printed = run(cells, {**functions(), **sizes})
        wanted = [line for line in printed if line in ("True", "False") or "number of" in line]
        assert wanted == expected
