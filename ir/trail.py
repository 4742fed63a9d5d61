"""Which submodule was running when, so that a failure of a trace can name it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

# Tokens of the trace; no size may be 0 or 1, which torch.export specialises.
TRACED_SHAPE = (2, 5)
# Lengths at which the trace's assumptions are tried, to find the submodule that made one.
_PROBED_LENGTHS = (2, 3, 7, 61, 64, 127)


class Trail:
    """Which submodule was running when, so that a failure of the trace can name it.

    Attributes:
        outputs: Names of what the last traced forward returned.
        is_whole_context_apart: Whether torch.export takes a sequence as long as the context for a case of its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.outputs: tuple[str, ...] = ()
        self.is_whole_context_apart = False
        self._types = {path: type(each).__name__ for path, each in module.named_modules()}
        self._running = [""]
        self._lengths: list[Any] = []
        # (number of assumptions made so far, submodule that was running until now)
        self._events: list[tuple[int, str]] = []
        for path, each in module.named_modules():
            if path:
                each.register_forward_pre_hook(lambda *_, path=path: self._enter(path))
                each.register_forward_hook(lambda *_: self._leave())

    def begin(self, inputs: Sequence[Tensor]) -> None:
        """A forward begins; the sizes of its inputs lead to torch's list of assumptions."""
        self._running, self._events, self._lengths = [""], [], [each.shape[1] for each in inputs]

    def _guards(self) -> Sequence[Any]:
        # Not public: without it a failure is still reported, less precisely.
        node = getattr(self._lengths[0], "node", None) if self._lengths else None
        return getattr(getattr(node, "shape_env", None), "guards", ())

    def _enter(self, path: str) -> None:
        self._events.append((len(self._guards()), self._running[-1]))
        self._running.append(path)

    def _leave(self) -> None:
        self._events.append((len(self._guards()), self._running.pop()))

    def running(self) -> str:
        """The submodule that was running last, e.g. `layers.0.mlp (GatedMlp)`; empty for the module itself."""
        return self._named(self._running[-1])

    def _named(self, path: str) -> str:
        return f"{path} ({self._types[path]})" if path else ""

    def assumes_length(self, context: int) -> str:
        """The first submodule that assumes something about the length which some length breaks; empty if unknown."""
        symbols = {getattr(getattr(length, "node", None), "_expr", None) for length in self._lengths} - {None}
        for number, guard in enumerate(self._guards()):
            rows = dict.fromkeys(guard.expr.free_symbols - symbols, TRACED_SHAPE[0])
            lengths = (length for length in _PROBED_LENGTHS if length <= context)
            tried = (guard.expr.subs({**rows, **dict.fromkeys(symbols, length)}) for length in lengths)
            if any(holds == False for holds in tried):  # noqa: E712 (sympy's own false)
                return self._named(next((path for count, path in self._events if count > number), ""))
        return ""
