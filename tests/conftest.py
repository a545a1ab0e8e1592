"""Every test starts from the same random state and leaves torch's switches as it found them."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

# The compiler notes the attributes of tensors when it is imported. Tests that pretend some, such as
# is_cuda, would otherwise leave theirs in it if they are the first to import it.
import torch._dynamo.variables.tensor

from poisoning import poisoned


def pytest_addoption(parser: pytest.Parser) -> None:
    """No test may depend on a lucky draw or on the order in which threads add up."""
    group = parser.getgroup("polyadic")
    group.addoption("--torch-seed", type=int, default=0, help="what every test starts from (0)")
    group.addoption("--torch-threads", type=int, default=1, help="threads of torch (1)")


def pytest_configure(config: pytest.Config) -> None:
    """One thread, for tensors this small; a cache of its own; no notes from torch about itself."""
    threads = config.getoption("--torch-threads")
    torch.set_num_threads(threads)
    # Processes that tests start have as many: those of OpenMP spin while they wait for each other.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if not hasattr(config, "workerinput"):
        # Plans rest on the built-in numbers, not on a calibration of whoever runs the tests.
        folder = tempfile.TemporaryDirectory(prefix="polyadic-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["XDG_CACHE_HOME"] = folder.name
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel")
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script")
    config.addinivalue_line("filterwarnings", "ignore:Complex modules are a new feature")
    config.addinivalue_line("filterwarnings", "ignore:ComplexHalf support is experimental")
    # Tests take layers so small that hardly a rank saves FLOPs.
    config.addinivalue_line("filterwarnings", r"ignore:this CP\w+ has rank")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``long`` unless ``-m`` asks for it."""
    if "long" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(autouse=True)
def _seeded(pytestconfig: pytest.Config) -> Iterator[None]:
    """Seed torch, and see that a test changed neither the default dtype nor the grad mode."""
    # Without a GPU torch.manual_seed formats the stack, for the GPU that it might seed later.
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    seed(pytestconfig.getoption("--torch-seed"))
    # neuraloperator, wherever it is imported, has tensorly contract by opt_einsum from then on, by
    # which tltorch's own layers fail under autocast.
    if (plugins := sys.modules.get("tensorly.plugins")) is not None:
        plugins.use_default_einsum()
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill memory that nobody has written with NaN."""
    with poisoned():
        yield
