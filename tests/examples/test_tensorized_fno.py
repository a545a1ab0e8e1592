"""The example of a tensorized Fourier neural operator runs, and learns."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.mark.skipif(
    importlib.util.find_spec("neuralop") is None,
    reason="needs neuraloperator: pip install 'polyadic[neuralop]'",
)
def test_it_learns(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.tensorized_fno import train

    # Untrained, its error is about 1.
    assert train(80, size=16, width=16, batch=4) < 0.8
    assert "layers left to neuraloperator: none" in capsys.readouterr().out
