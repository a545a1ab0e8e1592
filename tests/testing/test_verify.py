"""``polyadic verify``: what it finds, how it fails, and what it says to wrong arguments."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
import torch

from polyadic.testing import verification as verify
from polyadic.testing.verification import Check, conv_problem, linear_problem, relative_error
from polyadic_cli.main import main

LINEAR_QUANTITIES = [
    "y",
    "dx",
    *[f"d {group}_factors[{d}]" for group in ("in", "out") for d in range(3)],
]
CONV_QUANTITIES = [
    "y",
    "dx",
    *[f"d {group}_factors[{d}]" for group in ("out", "in", "kernel") for d in range(2)],
]


def run(*arguments: str, capsys: Any) -> tuple[int, str, str]:
    """Run the command line; the exit code and what went to stdout and stderr."""
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    code = exit_.value.code
    printed = capsys.readouterr()
    assert isinstance(code, int)
    return code, printed.out, printed.err


def implementations(result: verify.Result) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for check in result.checks:
        names.setdefault(check.implementation, []).append(check.quantity)
    return names


def test_the_notebooks_checks_agree() -> None:
    linear, conv = verify.verify(linear_problem()), verify.verify(conv_problem())
    assert linear.ok
    assert conv.ok
    assert (linear.parameters, linear.dense_parameters) == (4000, 32768)
    assert (conv.parameters, conv.dense_parameters) == (2600, 4608)
    every = ["reference", "explicit", "autograd", "factorized"]
    assert implementations(linear) == dict.fromkeys(every, LINEAR_QUANTITIES)
    assert implementations(conv) == dict.fromkeys(every, CONV_QUANTITIES)


@pytest.mark.parametrize("dtype", verify.DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "arguments",
    [
        {"in_features": 12, "out_features": 30, "rank": 5},
        {"in_features": 7, "out_features": 1, "rank": 1, "order": 1, "batch": 1},
        {"in_features": 64, "out_features": 48, "rank": 20, "order": 4, "weights": True},
        {"in_features": 8, "out_features": 8, "rank": 3, "batch": 0},
    ],
    ids=str,
)
def test_linear_problems_agree(arguments: Any, dtype: torch.dtype, seed: int) -> None:
    result = verify.verify(linear_problem(**arguments, dtype=dtype, seed=seed))
    assert [check for check in result.checks if not check.ok] == []


@pytest.mark.parametrize("dtype", verify.DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "arguments",
    [
        {"in_channels": 6, "out_channels": 4, "rank": 5, "size": (5, 7)},
        {"in_channels": 5, "out_channels": 8, "kernel_size": (4, 2), "size": (6, 6), "rank": 4},
        {"kernel_size": (1, 1), "size": (4, 4), "rank": 8, "order": 3, "weights": True},
    ],
    ids=str,
)
def test_conv_problems_agree(arguments: Any, dtype: torch.dtype, seed: int) -> None:
    result = verify.verify(conv_problem(**arguments, dtype=dtype, seed=seed))
    assert [check for check in result.checks if not check.ok] == []


def test_the_same_seed_draws_the_same_problem() -> None:
    first, again, other = (linear_problem(6, 4, rank=2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.tensor.to_matrix(), again.tensor.to_matrix())
    assert not torch.equal(first.x, other.x)


def test_relative_error() -> None:
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0])) == 0.25
    assert relative_error(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3)) == 0.0
    assert relative_error(torch.zeros(2, 1), torch.zeros(1, 2)) == math.inf
    assert not Check("a", "y", relative_error(torch.tensor([math.nan]), torch.ones(1)), 1.0).ok


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": torch.zeros(3, 3)}, TypeError, "weights must be True or False"),
        ({"weights": torch.zeros(0)}, TypeError, "weights must be True or False"),
        ({"batch": 2**62}, ValueError, "too large"),
        ({"batch": 1.0}, TypeError, "batch must be an int"),
        ({"batch": -1}, ValueError, "batch must be at least 0"),
        ({"seed": 2**64}, ValueError, "seed must be from"),
        ({"seed": "one"}, TypeError, "seed must be an int"),
    ],
)
@pytest.mark.parametrize("draw", [linear_problem, conv_problem])
def test_what_no_problem_can_be_drawn_of_is_refused(
    draw: Any, arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        draw(4, 6, **arguments)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.2)]
)
@pytest.mark.parametrize("draw", [linear_problem, conv_problem])
def test_a_wrong_gradient_is_found_in_every_dtype(
    draw: Any, dtype: torch.dtype, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slightly_wrong(problem: verify.Problem) -> Any:
        y, dx, grads, weight_grad = verify._reference(problem)
        return y, dx, [grads[0], grads[1] * (1 + share), *grads[2:]], weight_grad

    monkeypatch.setitem(verify.IMPLEMENTATIONS, "explicit", slightly_wrong)
    result = verify.verify(draw(dtype=dtype))
    wrong = [(check.implementation, check.quantity) for check in result.checks if not check.ok]
    assert [implementation for implementation, _ in wrong] == ["explicit"]
    assert wrong[0][1].endswith("_factors[1]")


def test_the_command_names_what_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_number(problem: verify.Problem) -> Any:
        y, dx, grads, weight_grad = verify._reference(problem)
        return y, dx * math.nan, grads[::-1], weight_grad

    monkeypatch.setitem(verify.IMPLEMENTATIONS, "explicit", no_number)
    small = ("verify", "--in", "2", "--out", "6", "--rank", "2", "--order", "1")
    code, out, err = run(*small, "--json", capsys=capsys)
    found = json.loads(out)
    wrong = [c for c in found["results"][0]["checks"] if not c["ok"]]
    assert [(c["implementation"], c["quantity"], c["error"]) for c in wrong] == [
        ("explicit", "dx", None),
        ("explicit", "d in_factors[0]", None),
        ("explicit", "d out_factors[0]", None),
    ]
    assert (code, err, found["ok"]) == (1, "", False)

    code, out, _ = run(*small, capsys=capsys)
    assert code == 1
    assert "3 differ" in out


def test_without_a_shape_the_notebooks_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("verify", capsys=capsys)
    assert (code, err) == (0, "")
    assert "linear 4x4x16 4x4x8, rank 100, input 32x256, float64" in out
    assert "conv 4x8 4x4 3x3, rank 100, input 1x16x32x32, float64" in out
    assert "4000 in CP format, 32768 dense" in out
    assert "2600 in CP format, 4608 dense" in out
    assert out.count("32 quantities compared with dense autograd: all agree") == 2


def test_json_of_a_convolution(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--in 6 --out 4 --rank 3 --kernel 2x5 --size 4x6 --batch 2 --order 3 --dtype float32"
    code, out, err = run("verify", *shape.split(), "--weights", "--json", capsys=capsys)
    (result,) = json.loads(out)["results"]
    assert (code, err) == (0, "")
    assert result["layer"] == "conv"
    assert result["tensorized_shape"] == [[1, 2, 2], [1, 2, 3], [2, 5]]
    assert result["input_shape"] == [2, 6, 4, 6]
    assert (result["rank"], result["dtype"], result["weights"]) == (3, "float32", True)
    assert result["parameters"] == 3 * (1 + 2 + 2 + 1 + 2 + 3 + 2 + 5) + 3
    assert {"explicit", "autograd", "factorized"} == {
        c["implementation"] for c in result["checks"] if c["quantity"] == "d weights"
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--in 4", "--in and --out go together"),
        ("--in 4 --out 0", "positive int, got 0"),
        ("--in 4 --out 4 --rank 0", "rank must be a positive int, got 0"),
        ("--in 4 --out 4 --order 0", "order must be a positive int"),
        ("--in 4 --out 4 --batch -1", "batch must be at least 0, got -1"),
        ("--in four --out 4", "Invalid value for '--in'"),
        ("--in 4 --out 4 --size 8x8", "--size is the image of a convolution"),
        ("--kernel 3", "--kernel must be height x width, as in 3x3, got '3'"),
        ("--kernel 3x0", "kernel_size must be a positive int, got 0"),
        ("--kernel 3x3 --size 3xy", "--size must be height x width"),
        ("--dtype float16", "torch.complex64, got torch.float16"),
        ("--dtype zeros", "torch.complex64, got zeros"),
        ("--seed -1", "seed"),
        ("--ranks 3", "--ranks"),
    ],
)
def test_wrong_arguments_get_one_line_and_code_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run("verify", *arguments.split(), capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("polyadic: ")
    assert err.count("\n") == 1
    assert message in err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("--version", capsys=capsys)
    assert code == 0
    assert out.startswith("polyadic 0.")
    code, out, _ = run(capsys=capsys)
    assert code == 0
    assert all(name in out for name in ("verify", "plan", "compress"))


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == missing or name.startswith("polyadic_cli"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as exit_:
        main(["verify"])
    assert "pip install 'polyadic[cli]'" in str(exit_.value.code)
