"""Every test starts from the same random state and leaves torch's switches as it found them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Silence torch's note on speed of the dense counterparts of some cases."""
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Seed torch, and see that a test changed neither the default dtype nor the grad mode."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
