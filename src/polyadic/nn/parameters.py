"""The parameters of a CP layer, which say what to do where a weight is looked for among them."""

from __future__ import annotations

from typing import Any, NoReturn


class NamedParameters(dict[str, Any]):
    """What ``torch.nn.Module`` keeps parameters in; taking one named weight is refused by name.

    torch.nn.utils.weight_norm and spectral_norm, and other tools that put something in the place of
    a layer's weight, take it out of this dict first.

    Args:
        owner: the class of the layer, for messages.
    """

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner

    def __reduce__(self) -> tuple[Any, ...]:
        """Be copied and pickled with the owner, and item by item."""
        return type(self), (self.owner,), None, None, iter(self.items())

    def __missing__(self, key: str) -> NoReturn:
        if key.startswith("weight"):
            refuse_parameter(self.owner, key)
        raise KeyError(key)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            self.__missing__(key)
        super().__delitem__(key)


def refuse_parameter(owner: str, name: str) -> NoReturn:
    """Raise the error of a parameter in the place of the weight.

    Raises:
        TypeError: always.
    """
    raise TypeError(
        f"{name} of a {owner} cannot be set or taken: its weight is computed from CP factors and "
        f"no parameter; use those (layer.cp), or convert to the torch layer first"
    )
