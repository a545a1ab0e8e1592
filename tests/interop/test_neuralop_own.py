"""neuraloperator's own tests, run with ``polyadic.accelerate_neuralop`` on."""

from __future__ import annotations

from pathlib import Path

import pytest

from interop.their_tests import run_their_tests

pytest.importorskip("neuralop", reason="needs neuraloperator: pip install 'polyadic[neuralop]'")

SPECTRAL = (
    "layers/tests/test_spectral_convolution.py",
    "layers/tests/test_legacy_spectral_convolution.py",
)
BLOCKS = (*SPECTRAL, "layers/tests/test_fno_block.py")
MODELS = (
    "models/tests/test_fno.py",
    "models/tests/test_uno.py",
    "models/tests/test_codano.py",
    "layers/tests/test_coda_layer.py",
    "layers/tests/test_local_no_block.py",
)
# torch has no has_cuda any more, for which some of their tests ask.
SHIM = "torch.has_cuda = getattr(torch, 'has_cuda', False)"
# Every weight that would be dense becomes a CP weight.
FORCED = f"""{SHIM}
    from neuralop.layers.spectral_convolution import SpectralConv
    made = SpectralConv.__init__
    def init(self, *args, **kwargs):
        if kwargs.get("factorization") is None and len(args) < 11:
            kwargs |= dict(factorization="CP", rank=0.5, implementation="factorized")
        made(self, *args, **kwargs)
    SpectralConv.__init__ = init"""
LEVELS = {
    "close transforms": "polyadic.accelerate_neuralop()",
    "any transforms": "polyadic.accelerate_neuralop(transforms=True)",
}
OURS = ("cp_spectral_product", "cp_spectral_conv")


def run(
    folder: Path, tests: tuple[str, ...], level: str | None, first: str = SHIM, select: str = ""
) -> tuple[set[str], dict[str, int]]:
    """Run some of their tests with a level of acceleration, or without."""
    return run_their_tests(
        folder,
        "neuralop",
        tests,
        level is not None,
        module="polyadic.interop.neuralop",
        names=OURS,
        turn_on=LEVELS[level or "close transforms"],
        first=first,
        select=select,
    )


def check_every_level(
    folder: Path, tests: tuple[str, ...], first: str = SHIM, select: str = ""
) -> tuple[set[str], list[dict[str, int]]]:
    """Check that what passes without acceleration passes with each level of it.

    Returns:
        Which tests passed without it, and how often our functions ran with each level.
    """
    without, nothing = run(folder, tests, None, first, select)
    assert not nothing
    counts = []
    for level in LEVELS:
        with_it, ran = run(folder, tests, level, first, select)
        print(f"{level}: {len(without)} passed without, {len(with_it)} with it; {ran}")
        assert without <= with_it
        counts.append(ran)
    return without, counts


@pytest.mark.slow
def test_their_spectral_tests_pass_with_it_on(tmp_path: Path) -> None:
    without, counts = check_every_level(tmp_path, SPECTRAL[:1], select="CP")
    assert len(without) >= 20
    assert all(ran.keys() == set(OURS) for ran in counts)


@pytest.mark.long
@pytest.mark.parametrize(
    ("tests", "first"),
    [(BLOCKS, SHIM), (BLOCKS, FORCED), (MODELS, FORCED)],
    ids=["layers", "layers, every weight CP", "models, every weight CP"],
)
def test_their_tests_pass_with_it_on(tmp_path: Path, tests: tuple[str, ...], first: str) -> None:
    _, counts = check_every_level(tmp_path, tests, first)
    assert all(ran["cp_spectral_conv"] > 0 for ran in counts)
