"""`torch.export`, with a way around a proof it cannot make."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.config as fx_config
from torch import Tensor, nn

# Sizes at which an assumption is tried; each is of one or two sizes of the inputs.
_TRIED_SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 33, 64, 127, 1000, 65537)
_SIZE = re.compile(r"L\['[^']*'\](?:\[\d+\])?\.size\(\)\[\d+\]")
# Arithmetic with the smaller of two strides, of sizes that are called `{0}`, `{1}`.
_OF_STRIDES = re.compile(r"(?:[\d\s()*%,=+-]|\{\d\}|min)*min(?:[\d\s()*%,=+-]|\{\d\}|min)*")


def export_module(module: nn.Module, examples: tuple[Tensor, ...], dynamic_shapes: Any) -> torch.export.ExportedProgram:
    """`torch.export.export(module, examples, dynamic_shapes=dynamic_shapes, strict=False)`.

    Raises:
        torch._dynamo.exc.UserError: The module treats some sizes apart; and whatever else the module raises.
    """
    options: dict[str, Any] = {"dynamic_shapes": dynamic_shapes, "strict": False}
    # What torch remembers of operators it compares by symbolic sizes, which takes longer than computing them anew.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False), _no_stack_traces():
        try:
            return torch.export.export(module, examples, **options)
        except torch._dynamo.exc.UserError as error:
            if not _fails_without_need(str(error)):
                raise
        # The assumption becomes an assertion in the graph; there is no other, or it would have been refused as well.
        return torch.export.export(module, examples, prefer_deferred_runtime_asserts_over_guards=True, **options)


@contextmanager
def _no_stack_traces() -> Iterator[None]:
    """Leave out which line of Python made a node: finding it takes time, and nodes say their module anyway."""
    before = getattr(fx_config, "do_not_emit_stack_traces", False)  # not in torch 2.11
    fx_config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before


def _fails_without_need(message: str) -> bool:
    """Whether every assumption that torch.export refuses is one about strides that holds for every size.

    torch 2.11 cannot prove that `min(4*s, 8*s) == (4*s)`, which it assumes of the strides of a copy.
    """
    guards = re.findall(r"satisfy the generated guard (.+)\.", message)
    others = [line for line in message.splitlines() if line.strip().startswith("- ") and "generated guard" not in line]
    return bool(guards) and not others and all(_holds_always(guard) for guard in guards)


def _holds_always(guard: str) -> bool:
    sizes = list(dict.fromkeys(_SIZE.findall(guard)))
    for number, size in enumerate(sizes):
        guard = guard.replace(size, f"{{{number}}}")
    if not sizes or not _OF_STRIDES.fullmatch(guard):
        return False
    tried = itertools.product(_TRIED_SIZES, repeat=len(sizes))
    return all(eval(guard.format(*values), {"__builtins__": {"min": min}}) for values in tried)
