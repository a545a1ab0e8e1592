"""CP adapters for fine-tuning, as a method of PEFT; importing this package makes PEFT know it.

    from peft import PeftModel, get_peft_model
    from polyadic.adapters import CPConfig

    model = get_peft_model(base, CPConfig(r=64, alpha=16, target_modules="all-linear"))
    model.save_pretrained("adapter")
    model = PeftModel.from_pretrained(base, "adapter")

It needs the extra ``peft``, and is imported by no other part of polyadic.
"""

from importlib.metadata import PackageNotFoundError, version

OLDEST, NEWEST = (0, 21), (0, 22)


def _check_peft() -> None:
    """Refuse a PEFT whose interface for methods from outside this code was not written for."""
    try:
        found = version("peft")
    except PackageNotFoundError:
        raise ImportError('polyadic.adapters needs PEFT: pip install "polyadic[peft]"') from None
    major, minor, *_ = found.split(".")
    if not OLDEST <= (int(major), int(minor)) <= NEWEST:
        raise ImportError(
            f'polyadic.adapters needs peft>=0.21,<0.23, found {found}: pip install "polyadic[peft]"'
        )


_check_peft()

from polyadic.adapters.config import CPConfig  # noqa: E402 - PEFT's version is checked first
from polyadic.adapters.lora import FromLora, from_lora, save_as_lora, to_lora  # noqa: E402
from polyadic.adapters.model import CPModel  # noqa: E402
from polyadic.adapters.register import register  # noqa: E402

register(CPConfig, CPModel)

__all__ = [
    "CPConfig",
    "CPModel",
    "FromLora",
    "from_lora",
    "save_as_lora",
    "to_lora",
]
