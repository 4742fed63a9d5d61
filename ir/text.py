"""The one canonical printer: golden files, dumps, `jettison diff` and the change check all read this text.

Inputs, constants (`@name`) and states (`%name`) keep their names; every other value is `%0, %1, ...` in order; symbols
are `s0, s1, ...` in order of appearance; nothing of torch's own counters, paths or addresses appears.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from jettison.ir.program import Program, output_node, placeholders

_DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


def dtype_text(dtype: torch.dtype) -> str:
    """Short name of a dtype, e.g. `bf16`."""
    return _DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


def target_text(target: Any) -> str:
    """Short name of a call's target: `aten.linear`, `aten.add.Tensor`, `getitem`."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        return name
    return f"{getattr(target, '__module__', '?')}.{getattr(target, '__name__', target)}"


class _Namer:
    """Canonical names of values and symbols within one program."""

    def __init__(self) -> None:
        self.symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self.values: dict[fx.Node, str] = {}
        self._numbers = 0
        self._sizes: dict[sympy.Expr, str] = {}

    def number(self, node: fx.Node) -> str:
        self.values[node] = f"%{self._numbers}"
        self._numbers += 1
        return self.values[node]

    def size(self, size: Any) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        expression = sympy.sympify(size.node.expr)
        if expression not in self._sizes:
            for symbol in sorted(expression.free_symbols, key=str):
                if symbol not in self.symbols:
                    self.symbols[symbol] = sympy.Symbol(f"s{len(self.symbols)}", integer=True, positive=True)
            self._sizes[expression] = str(expression.xreplace(self.symbols)).replace(" ", "")
        return self._sizes[expression]

    def type(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{dtype_text(value.dtype)}[{','.join(self.size(size) for size in value.shape)}]"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self.type(item) for item in value)})"
        if isinstance(value, (torch.SymInt, int)):
            return f"sym[{self.size(value)}]"
        return type(value).__name__

    def argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.values.get(value, f"%<{value.name}>")
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(self.argument(item) for item in value)}]"
        if isinstance(value, torch.dtype):
            return dtype_text(value)
        if isinstance(value, torch.SymInt):
            return self.size(value)
        return repr(value) if isinstance(value, (str, float)) else str(value)


def node_text(node: fx.Node, namer: _Namer | None = None) -> str:
    """One line for one node; values that were not numbered yet appear under torch's name."""
    namer = namer or _Namer()
    arguments = [namer.argument(argument) for argument in node.args]
    arguments += [f"{key}={namer.argument(value)}" for key, value in node.kwargs.items()]
    name = namer.values.get(node, f"%<{node.name}>")
    return f"{name}: {namer.type(node.meta.get('val'))} = {target_text(node.target)}({', '.join(arguments)})"


def _entry_lines(name: str, entry: fx.GraphModule, namer: _Namer) -> list[str]:
    inputs = []
    for node in placeholders(entry):
        if "constant" in node.meta:
            namer.values[node] = f"@{node.meta['constant']}"
        else:
            namer.values[node] = f"%{node.meta.get('state', node.name)}"
            inputs.append(f"{namer.values[node]}: {namer.type(node.meta.get('val'))}")
    lines = [f"entry {name}({', '.join(inputs)}):"]
    namer._numbers = 0
    for node in entry.graph.nodes:
        if node.op == "output":
            lines.append(f"  return {', '.join(namer.argument(value) for value in node.args[0])}")
        elif node.op != "placeholder":
            namer.number(node)
            lines.append(f"  {node_text(node, namer)}")
    return lines


def value_names(program: Program, entry_name: str) -> dict[fx.Node, str]:
    """Names that the text of a program gives to the values of an entry: `%7`, `@model.norm.weight`."""
    namer = _Namer()
    _entry_lines(entry_name, program.entries[entry_name], namer)
    return namer.values


def program_text(program: Program, *, by_identity: bool = False) -> str:
    """Canonical text of a program.

    Args:
        program: What to print.
        by_identity: Tell constants apart by object instead of by content, which reads no weight. Only for comparing
            two texts of one process.

    Returns:
        Lines ending in a newline.
    """
    info = program.info
    lines = [f"program {info.kind} {info.name} context={info.context} vocab={info.vocab_size}"]
    for name, constant in sorted(program.used_constants().items()):
        stored = "" if constant.stored_dtype == constant.dtype else f" stored {dtype_text(constant.stored_dtype)}"
        mark = f"serial {constant.serial}" if by_identity else f"#{constant.digest}"
        sizes = ",".join(map(str, constant.shape))
        lines.append(f"constant @{name}: {dtype_text(constant.dtype)}[{sizes}]{stored} {mark}")
    for name, packed in sorted(program.packed.items()):
        lines.append(f"packed @{name}: {packed.format}[{','.join(map(str, packed.shape))}]")
    for name, state in program.states.items():
        lines.append(f"state %{name}: {dtype_text(state.dtype)}[{','.join(map(str, state.shape))}]")
    for name, kept in program.retentions.items():
        layers = ",".join(map(str, kept.layers))
        lines.append(f"retention {name}: {kept.mask} budget={kept.budget} every={kept.every} layers={layers}")
    for name, storage in program.storages.items():
        lines.append(
            f"storage {name}: of {storage.retention} {storage.count} tokens={storage.tokens} keep={storage.keep} "
            f"residual={storage.residual} takes={'dropped' if storage.takes_dropped else 'oldest'}"
        )
    tiers = {} if program.placement is None else program.placement.tiers
    lines += [f"stream @{name}: {tier}" for name, tier in sorted(tiers.items())]
    namer = _Namer()
    for name, entry in program.entries.items():
        lines += _entry_lines(name, entry, namer)
    return "\n".join(lines) + "\n"


def window_text(entry: fx.GraphModule, culprit: fx.Node, around: int = 10) -> str:
    """The nodes around `culprit`, ten on either side, with an arrow at it."""
    namer = _Namer()
    lines: list[str] = []
    where = 0
    for node in entry.graph.nodes:
        if node.op == "placeholder":
            namer.values[node] = f"%{node.meta.get('constant', node.meta.get('state', node.name))}"
            text = f"{namer.values[node]}: {namer.type(node.meta.get('val'))} = input"
        elif node.op == "output":
            text = f"return {', '.join(namer.argument(value) for value in output_node(entry).args[0])}"
        else:
            namer.number(node)
            text = node_text(node, namer)
        if node is culprit:
            where = len(lines)
        lines.append(("-> " if node is culprit else "   ") + text)
    return "\n".join(lines[max(0, where - around) : where + around + 1])
