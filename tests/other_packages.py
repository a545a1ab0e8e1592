"""Packages that some tests need and the extra ``dev`` does not have."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


def imported(name: str) -> Any:
    """A module, or a skip that says why there is none and how to get it.

    What an import raises may be anything: a torchvision that is made for another torch raises a
    RuntimeError.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(
            f"{name} cannot be imported ({type(error).__name__}: {error}); make test-models "
            f"installs it"
        )
