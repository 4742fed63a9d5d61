"""Spares the ONNX exporter a second trace of graphs that are in its operators already.

`torch.onnx.export` asks the exported program to decompose operators that ONNX has no counterpart of, which traces the
whole program again, whether there are any or not. Lowered graphs rarely have one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_END = 2**63 - 1


def spare_decompositions(exported: torch.export.ExportedProgram) -> None:
    """Tidy a program as decomposing would, and let it decompose only where the exporter names one of its operators.

    What the exporter knows neither by itself nor how to decompose is its error then; see `decompose_all`.

    Args:
        exported: Edited in place; without submodules.
    """
    _tidy(exported.graph)
    decompose = exported.run_decompositions

    def run_decompositions(table: Any = None, **options: Any) -> torch.export.ExportedProgram:
        is_needed = table is None or any(node.target in table for node in exported.graph.nodes)
        return decompose(table, **options) if is_needed else exported

    exported.run_decompositions = run_decompositions


def decompose_all(exported: torch.export.ExportedProgram) -> None:
    """Take `spare_decompositions` back, tidiness aside."""
    del exported.run_decompositions


def _tidy(graph: fx.Graph) -> None:
    """Spell nodes as the exporter has short forms for them, leave out slices of everything, ask for each size once."""
    sizes: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if node.target in (aten.to.dtype, aten.to.device):
            dtype = node.args[1 if node.target is aten.to.dtype else 2]
            node.target, node.kwargs, node.args = aten._to_copy.default, {"dtype": dtype}, node.args[:1]
        elif node.target is aten.square.default:
            node.target, node.args = aten.mul.Tensor, (source, source)
        elif node.target is aten.__and__.Tensor:
            node.target = aten.bitwise_and.Tensor
        elif node.target is aten.slice.Tensor and tuple(node.args[2:]) in ((), (0,), (0, _END), (0, _END, 1)):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif node.target is aten.sym_size.int:
            first = sizes.setdefault(str(node.meta["val"]), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)
        elif node.target in (aten.flatten.using_ints, aten.unflatten.int):
            node.target, node.args, node.kwargs = aten.reshape.default, (source, _shape(node, graph, sizes)), {}


def _shape(node: fx.Node, graph: fx.Graph, sizes: dict[str, fx.Node]) -> list[int | fx.Node]:
    """The sizes of a node's value, as numbers and nodes; the first that no node has yet is left to be worked out."""
    shape: list[int | fx.Node] = []
    for size in node.meta["val"].shape:
        if isinstance(size, int):
            shape.append(size)
        elif str(size) in sizes or -1 not in shape:
            shape.append(sizes.get(str(size), -1))
        else:
            source = node.args[0]
            assert isinstance(source, fx.Node), "a value is reshaped"
            axis = [str(each) for each in source.meta["val"].shape].index(str(size))
            with graph.inserting_before(node):
                asked = graph.call_function(aten.sym_size.int, (source, axis))
            asked.meta["val"] = size
            sizes[str(size)] = asked
            shape.append(asked)
    return shape
