"""Products whose streamed weight is larger than a segment may be, as products of its slabs.

A slab is some of the outputs: rows of codes and scales, or of a table that `Gemm` transposes, which lie behind each
other in the weight, so that it is written once, also if rows of it are looked up elsewhere. Columns of a weight that
is stored transposed are written as weights of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx
from onnx import helper

from jettison.codegen.onnx.external_data import TransposedConstant
from jettison.ir.constants import Constant

# Kernels work on tiles of outputs; a slab is a number of whole ones.
TILE = 64


@dataclass(frozen=True)
class Streamed:
    """An initializer that is read from disk while a graph runs.

    Attributes:
        constant: What is written.
        offset: Where in it the initializer begins.
        length: Bytes of the initializer.
    """

    constant: Constant
    offset: int
    length: int


def split_products(
    graph: onnx.GraphProto,
    streamed: dict[str, Streamed],
    most_bytes: int,
    bytes_of: Callable[[onnx.NodeProto, int], float],
) -> None:
    """Split what is too large, in place.

    Args:
        graph: The graph.
        streamed: Its streamed initializers by name; slabs are added, and what they stand for is taken out.
        most_bytes: That the weights of one product may have.
        bytes_of: What the weights of a node take, of so many stored bytes.
    """
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        stored = sum(streamed[name].length for name in set(node.input) & streamed.keys())
        needed = bytes_of(node, stored)
        outputs = _outputs(node, graph, streamed) if needed > most_bytes else None
        rows = int(most_bytes * outputs // needed) // TILE * TILE if outputs else 0
        if not outputs or not rows:
            nodes.append(node)
            continue
        slabs = [(start, min(start + rows, outputs)) for start in range(0, outputs, rows)]
        parts = [_slab(node, graph, streamed, span) for span in slabs]
        joined = helper.make_node("Concat", [part.output[0] for part in parts], node.output, node.output[0], axis=-1)
        nodes += [*parts, joined]
        _declare(node, parts, slabs, graph)
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [each for each in graph.initializer if each.name in read or each.name not in streamed]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _outputs(node: onnx.NodeProto, graph: onnx.GraphProto, streamed: dict[str, Streamed]) -> int | None:
    """How many outputs a product has that can be split; None for what cannot."""
    attributes = {each.name: each.i for each in node.attribute}
    shapes = {each.name: tuple(each.dims) for each in graph.initializer}
    operands = [name for name in node.input[1:] if name]
    if not operands or any(name not in streamed for name in operands):
        return None  # a bias, or a part of the weight that is pinned
    if node.op_type == "MatMul" and isinstance(streamed[operands[0]].constant, TransposedConstant):
        return shapes[operands[0]][1]
    is_gemm = node.op_type == "Gemm" and attributes.get("transB") and len(operands) == 1
    if is_gemm or node.op_type == "MatMulNBits":
        count = shapes[operands[0]][0]
        has_rows = all(shapes[name][0] == count and len(shapes[name]) > 1 for name in operands)
        return count if has_rows else None
    return None


def _slab(
    node: onnx.NodeProto, graph: onnx.GraphProto, streamed: dict[str, Streamed], span: tuple[int, int]
) -> onnx.NodeProto:
    """The product for some of the outputs; its weights become initializers."""
    start, stop = span
    made = onnx.NodeProto()
    made.CopyFrom(node)
    made.name, made.output[0] = f"{node.name}.{start}", f"{node.output[0]}.{start}"
    known = {each.name: each for each in graph.initializer}
    for place, name in enumerate(node.input):
        if place == 0 or not name:
            continue
        slab = made.input[place] = f"{name}.{start}"
        if slab in streamed:
            continue
        whole, tensor = streamed[name], onnx.TensorProto()
        tensor.CopyFrom(known[name])
        tensor.name = slab
        if isinstance(whole.constant, TransposedConstant):
            tensor.dims[1] = stop - start
            rows = TransposedConstant(slab, _rows(whole.constant, start, stop))
            streamed[slab] = Streamed(rows, 0, rows.nbytes)
        else:
            row_bytes = whole.length // tensor.dims[0]
            tensor.dims[0] = stop - start
            streamed[slab] = Streamed(whole.constant, whole.offset + start * row_bytes, (stop - start) * row_bytes)
        graph.initializer.append(tensor)
    for attribute in made.attribute:
        if attribute.name == "N":
            attribute.i = stop - start
    return made


def _rows(constant: Constant, start: int, stop: int) -> Constant:
    """Some rows of the blocks of a constant; no byte is copied."""
    blocks, offset = [], 0
    for block in constant.blocks:
        low, high = max(start - offset, 0), min(stop - offset, block.shape[0])
        if low < high:
            blocks.append(block[low:high])
        offset += block.shape[0]
    return Constant(f"{constant.name}.{start}", blocks, constant.dtype)


def _declare(
    node: onnx.NodeProto, parts: list[onnx.NodeProto], slabs: list[tuple[int, int]], graph: onnx.GraphProto
) -> None:
    """Types of the outputs of slabs, which may cross from one segment to another."""
    whole = next((v for v in (*graph.value_info, *graph.output) if v.name == node.output[0]), None)
    if whole is None:
        return
    for part, (start, stop) in zip(parts, slabs, strict=True):
        declared = onnx.ValueInfoProto()
        declared.CopyFrom(whole)
        declared.name = part.output[0]
        last = declared.type.tensor_type.shape.dim[-1]
        last.Clear()
        last.dim_value = stop - start
        graph.value_info.append(declared)
