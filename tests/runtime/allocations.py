"""Which operator made the largest tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """The largest storage that an operator makes while this mode is entered.

    Attributes:
        largest: Its bytes.
        operator: Who made it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operator = 0, ""
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {value.untyped_storage()._cdata for value in _tensors((args, kwargs))}
        returned = func(*args, **(kwargs or {}))
        for value in _tensors(returned):
            if value.untyped_storage()._cdata not in given and value.untyped_storage().nbytes() > self.largest:
                self.largest, self.operator = value.untyped_storage().nbytes(), str(func)
        return returned


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
