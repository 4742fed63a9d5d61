"""What capture needs to know about a module, and how it is called: by keyword, with tensors returned."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jettison.ir.constants import Packed
from jettison.ir.errors import CaptureError
from jettison.ir.trail import Trail

DEFAULT_CONTEXT = 2048
_INPUT_NAMES = ("input_ids", "position_ids", "attention_mask", "token_type_ids")


@dataclass
class CaptureSource:
    """Everything capture needs to know about a module.

    Attributes:
        module: The module to export; its parameters may live on the meta device.
        eager: The module to compare with, with real parameters; None builds none and skips the comparison.
        weights: Stored tensor of each parameter and persistent buffer, by the name it has in `module`.
        inputs: Which of `input_ids`, `position_ids`, `attention_mask`, `token_type_ids` are passed, by keyword.
        call: Extra keyword arguments of `forward`.
        tracing: A context to trace in.
        packed: Weights that `module` holds packed, by the name of the dense weight.
        kind: `decoder`, `encoder`, or None to find out whether tokens see later ones.
        name: For messages and the report.
        context: Most positions of a sequence.
        vocab_size: Rows of the token embedding, or None to find out.
    """

    module: nn.Module
    eager: Callable[[], nn.Module] | None
    weights: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    name: str
    context: int
    kind: str | None = None
    vocab_size: int | None = None
    call: dict[str, Any] = field(default_factory=dict)
    tracing: Callable[[], AbstractContextManager[None]] = nullcontext
    packed: Mapping[str, Packed] = field(default_factory=dict)


class ModelCall(nn.Module):
    """Calls a module by keyword and flattens what it returns to a tuple of tensors."""

    def __init__(self, module: nn.Module, source: CaptureSource, trail: Trail | None = None) -> None:
        super().__init__()
        self.module = module
        self.source = source
        self._trail = trail

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the module, in order; see `Trail.outputs` for their names."""
        source, trail = self.source, self._trail
        if trail is not None:
            trail.begin(inputs)
        returned = self.module(**dict(zip(source.inputs, inputs, strict=True)), **source.call)
        named: dict[str, Any] = {"logits": returned}
        if hasattr(returned, "keys"):
            named = {key: returned[key] for key in returned.keys()}  # noqa: SIM118 (model outputs iterate over values)
            if source.kind == "decoder" and "logits" in named:
                named = {"logits": named["logits"]}  # router losses and the like are for training
        elif isinstance(returned, (tuple, list)) and returned:
            named = {"logits": returned[0]}
        named = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        if not named:
            raise CaptureError(
                f"[capture] {source.name}.forward returns {type(returned).__name__}: needed a tensor, a tuple that "
                "begins with one, or a mapping that holds one. Wrap the module in one that returns its logits."
            )
        if trail is not None:
            trail.outputs = tuple(named)
        return tuple(named.values())


def module_inputs(module: nn.Module) -> tuple[str, ...]:
    """Which of the standard inputs a module's `forward` takes, in our order.

    Raises:
        CaptureError: `forward` takes no `input_ids`.
    """
    parameters = inspect.signature(module.forward).parameters
    if "input_ids" not in parameters:
        raise CaptureError(
            f"[capture] {type(module).__name__}.forward takes ({', '.join(parameters)}): needed a parameter named "
            "`input_ids` with token ids [B, S]. Wrap the module in one whose forward is `forward(input_ids, "
            "position_ids)`."
        )
    return tuple(name for name in _INPUT_NAMES if name in parameters)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, at most 300 characters."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def example_inputs(names: tuple[str, ...], vocab_size: int, rows: int, length: int) -> dict[str, Tensor]:
    """Inputs `[rows, length]` to try a module with: seeded token ids, positions from 0, a full mask."""
    generator = torch.Generator().manual_seed(0)
    known = {
        "input_ids": torch.randint(0, max(vocab_size, 1), (rows, length), generator=generator),
        "position_ids": torch.arange(length)[None].repeat(rows, 1),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        "token_type_ids": torch.zeros(rows, length, dtype=torch.int64),
    }
    return {name: known[name] for name in names}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence deprecations inside torch and transformers, and torch.export's dump of a graph it stopped at."""
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.export._trace")]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger in loggers:
                logger.disabled = False
