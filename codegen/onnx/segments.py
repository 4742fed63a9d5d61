"""A graph as a chain of smaller ones, for models larger than memory: what streams lies in files of its own.

A session holds its weights as long as it lives. Cut into consecutive runs of nodes with a session each, a model can be
run while only the weights of the run at hand, and of those that come next, are in memory. A segment is an ONNX file
`NAME.segment.000.onnx`. Its inputs are run-time inputs, states, and values of the segments before it; streamed weights
that it reads first are in `NAME.segment.000.onnx.data`, pinned ones in the `model.onnx.data` of all segments, and a
weight that several segments read is stored once.

Cut is where few values cross, which is between layers, so that the streamed bytes of a segment stay below half of the
ring: one half is read while the other is computed with. Rows that are looked up are no stream: of a table that is only
gathered from, a step touches a page or two, and ONNX Runtime reads those from the mapped file.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir
from torch import Tensor

from jettison.codegen.onnx.external_data import DTYPES, SMALLEST_EXTERNAL_BYTES, ExternalDataWriter
from jettison.codegen.onnx.split_products import Streamed, split_products
from jettison.ir.constants import Constant
from jettison.ir.errors import CodegenError, UnsupportedError
from jettison.ir.placement import Placement
from jettison.ir.program import Program

# Where an initializer says that it lies until the graph is cut.
_UNDECIDED = "streamed"
# A quantised weight as its kernel reads it takes up to this much of its codes (with scales and sums beside them).
_PACKED = {"MatMulNBits": 1.5}
GATHERS = ("Gather", "GatherBlockQuantized")
# ONNX Runtime crashes on what it packed for this one, and without packing it needs memory for all of it.
_UNPREPARABLE = "QMoE"


# Pinned weights of all graphs of an artifact.
PINNED_FILE = "model.onnx.data"


@dataclass(frozen=True)
class Segment:
    """One ONNX file of a chain.

    Attributes:
        file: Its name.
        inputs: Names of what it reads: run-time inputs, states, and values that segments before it made.
        outputs: Names of what it makes for others: outputs, new states, and values that segments behind it read.
        is_streamed: Whether weights of it are read from disk while it runs.
        is_packed: Whether kernels read weights of it in an order of their own; see `runtime/prepared.py`.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    is_streamed: bool
    is_packed: bool


@dataclass
class _Node:
    """What cutting asks of a node."""

    proto: onnx.NodeProto
    reads: set[str]
    makes: set[str]
    streamed: dict[str, float] = field(default_factory=dict)
    is_gather: bool = False

    @property
    def is_unpreparable(self) -> bool:
        """Whether it may not be in a segment with weights that stream."""
        return self.proto.op_type == _UNPREPARABLE


class SegmentWriter(ExternalDataWriter):
    """Keeps streamed constants out of the weight file until the graph that reads them is cut.

    Args:
        path: The `.data` file of the constants that are pinned.
        program: Whose constants have a placement.
        placement: Of the program.
        on_bytes: See `ExternalDataWriter`.
    """

    def __init__(
        self,
        path: Path,
        program: Program,
        placement: Placement,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(path, on_bytes)
        self._ring_bytes = placement.ring_bytes
        # What is joined, cut or transposed while a graph is emitted is still made of the stored tensors.
        self._streamed = _Addresses(
            block
            for name, constant in program.constants.items()
            if placement.of(name) == "disk"
            for block in constant.blocks
        )
        self._waiting: dict[str, Streamed] = {}
        self._files: dict[tuple[type[Constant], int], tuple[str, int]] = {}

    def tensor(self, name: str, shape: tuple[int, ...], constant: Constant) -> onnx_ir.TensorProtocol:
        """See `ExternalDataWriter.tensor`; a streamed one says where it lies when the graph is saved."""
        if constant.nbytes < SMALLEST_EXTERNAL_BYTES or not any(map(self._streamed.has, constant.blocks)):
            return super().tensor(name, shape, constant)
        self._waiting[name] = Streamed(constant, 0, constant.nbytes)
        return onnx_ir.ExternalTensor(
            _UNDECIDED, 0, constant.nbytes, DTYPES[constant.dtype], shape=onnx_ir.Shape(shape), name=name,
            base_dir=str(self.path.parent),
        )  # fmt: skip

    def save(self, model: onnx_ir.Model, path: Path) -> list[Segment]:
        """See `ExternalDataWriter.save`; a graph that reads streamed constants becomes segments beside `path`."""
        streamed, self._waiting = self._waiting, {}
        if not streamed:
            return super().save(model, path)
        proto = onnx_ir.to_proto(model)
        split_products(proto.graph, streamed, self._ring_bytes // 2, _bytes_of)
        nodes, constants = _describe(proto, streamed)
        self._check(nodes, {each.name for each in proto.graph.initializer} | constants.keys())
        types = _types(proto)
        segments = []
        for index, (start, stop) in enumerate(_cuts(nodes, self._ring_bytes // 2)):
            file = path.with_name(f"{path.stem}.segment.{index:03}.onnx")
            made = _submodel(proto, nodes, constants, (start, stop), types)
            self._store(made, file, streamed)
            onnx.save(made, str(file))
            given, returned = ([value.name for value in part] for part in (made.graph.input, made.graph.output))
            is_streamed = any(each.name in streamed for each in made.graph.initializer)
            # Names of operators stand in a file as they are, also in functions; weights are in another.
            is_packed = any(name.encode() in made.SerializeToString() for name in _PACKED)
            segments.append(Segment(file.name, tuple(given), tuple(returned), is_streamed, is_packed))
        return segments

    def _check(self, nodes: Sequence[_Node], known: set[str]) -> None:
        for node in nodes:
            if node.streamed and node.reads <= known:
                raise UnsupportedError(
                    f"[onnx] {next(iter(node.streamed))}: ONNX Runtime decodes this format when it loads a model, into "
                    'memory, and the weight is to be read from disk. Pin it, or use target="torch" or another format.'
                )
            if node.is_unpreparable and node.streamed:
                raise UnsupportedError(
                    f"[onnx] {next(iter(node.streamed))}: ONNX Runtime can hold quantised experts ({_UNPREPARABLE}) in "
                    'memory only, and this weight is to be read from disk. Pin it, or use target="torch".'
                )
            needed = int(sum(node.streamed.values()))
            if needed > self._ring_bytes:
                raise UnsupportedError(
                    f"[onnx] {next(iter(node.streamed))}: ONNX Runtime reads a weight as a whole, here {needed:,} "
                    f"bytes, and the ring has {self._ring_bytes:,}. Give it at least that many, or pin the weight."
                )

    def _store(self, model: onnx.ModelProto, file: Path, streamed: dict[str, Streamed]) -> None:
        """Write what no segment before this one wrote, and tell every streamed initializer where it lies."""
        data = file.with_name(f"{file.name}.data")
        mine = [each for each in model.graph.initializer if each.name in streamed]
        new = {_key(streamed[each.name].constant): streamed[each.name].constant for each in mine}
        new = {key: constant for key, constant in new.items() if key not in self._files}
        if new:
            with ExternalDataWriter(data, self._on_bytes) as writer:
                for key, constant in new.items():
                    self._files[key] = (data.name, writer.append(constant)[0])
        for each in mine:
            part = streamed[each.name]
            location, offset = self._files[_key(part.constant)]
            del each.external_data[:]
            where = {"location": location, "offset": offset + part.offset, "length": part.length}
            for name, value in where.items():
                each.external_data.add(key=name, value=str(value))


def writer_for(program: Program, folder: Path, on_bytes: Callable[[int], None] | None = None) -> ExternalDataWriter:
    """What writes the weights of a program: to one file, or by segments if some of them are on disk.

    Args:
        program: As it was placed; what is joined or cut while graphs are emitted is known by where it came from.
        folder: Of the graphs.
        on_bytes: See `ExternalDataWriter`.
    """
    placement = program.placement
    if placement is None or "disk" not in placement.tiers.values():
        return ExternalDataWriter(folder / PINNED_FILE, on_bytes)
    return SegmentWriter(folder / PINNED_FILE, program, placement, on_bytes)


class _Addresses:
    """The memory of some tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._spans = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors)

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of them."""
        place = bisect.bisect_right(self._spans, (tensor.data_ptr(), float("inf"))) - 1
        return place >= 0 and tensor.data_ptr() < self._spans[place][1]


def _key(constant: Constant) -> tuple[type[Constant], int]:
    return type(constant), constant.serial


def _bytes_of(node: onnx.NodeProto, stored: int) -> float:
    return stored * _PACKED.get(node.op_type, 1.0)


def _describe(proto: onnx.ModelProto, streamed: dict[str, Streamed]) -> tuple[list[_Node], dict[str, onnx.NodeProto]]:
    """Nodes in order, and those that are constants, which each segment that reads one has a copy of."""
    nodes, constants = [], {}
    for each in proto.graph.node:
        if each.op_type == "Constant" and not each.domain:
            constants[each.output[0]] = each
            continue
        node = _Node(each, _names_read(each), {name for name in each.output if name})
        node.is_gather = each.op_type in GATHERS and bool(node.reads & streamed.keys())
        if not node.is_gather:
            read = sorted(node.reads & streamed.keys())
            node.streamed = {name: _bytes_of(each, streamed[name].length) for name in read}
        nodes.append(node)
    return nodes, constants


def _names_read(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those of its subgraphs from outside included."""
    read = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            inner = set(itertools.chain.from_iterable(map(_names_read, graph.node)))
            made = {name for each in graph.node for name in each.output}
            read |= (inner | {value.name for value in graph.output}) - own - made
    return read - {""}


def _cuts(nodes: Sequence[_Node], most_bytes: int) -> list[tuple[int, int]]:
    """Consecutive runs of nodes, as ranges.

    As long as the streamed bytes allow; of the places behind the first half of those bytes the one that the fewest
    values cross is taken.
    """
    crossing = _crossing(nodes)
    runs, start = [], 0
    while start < len(nodes):
        places = _places(nodes, start, most_bytes)
        stop, full = places[-1]
        is_free = stop < len(nodes) and not nodes[stop - 1].is_gather
        if is_free and not any(node.is_unpreparable for node in nodes[start:stop]):
            stop = min((place for place in places if place[1] >= full / 2), key=lambda p: (crossing[p[0]], -p[0]))[0]
        runs.append((start, stop))
        start = stop
    return runs


def _places(nodes: Sequence[_Node], start: int, most_bytes: int) -> list[tuple[int, float]]:
    """Where a run may end, and the streamed bytes that it then has."""
    held: dict[str, float] = {}
    places: list[tuple[int, float]] = []
    is_held = False
    for index in range(start, len(nodes)):
        node = nodes[index]
        wanted = {**held, **node.streamed}
        streams = bool(node.streamed) or node.is_gather
        if (held and (sum(wanted.values()) > most_bytes or node.is_unpreparable)) or (is_held and streams):
            break
        held, is_held = wanted, is_held or node.is_unpreparable
        places.append((index + 1, sum(held.values())))
        if node.is_gather and node.proto.op_type == "GatherBlockQuantized":
            break  # packed weights in this segment would have the table copied to where they are
    return places


def _crossing(nodes: Sequence[_Node]) -> list[int]:
    """For each place between two nodes, how many values that were made before it are read behind it."""
    last = {name: index for index, node in enumerate(nodes) for name in node.reads}
    change = [0] * (len(nodes) + 2)
    for index, node in enumerate(nodes):
        for name in node.makes:
            if last.get(name, -1) > index:
                change[index + 1] += 1
                change[last[name] + 1] -= 1
    return list(itertools.accumulate(change))


def _types(proto: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Declarations of values by name; what the exporter left open is inferred."""
    graph = proto.graph
    known = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output) if _has_type(value)}
    if any(name not in known for node in graph.node for name in node.output if name):
        inferred = onnx.shape_inference.infer_shapes(proto)
        known = {value.name: value for value in inferred.graph.value_info if _has_type(value)} | known
    return known


def _has_type(value: onnx.ValueInfoProto) -> bool:
    return value.type.WhichOneof("value") is not None


def _submodel(
    proto: onnx.ModelProto,
    nodes: Sequence[_Node],
    constants: dict[str, onnx.NodeProto],
    span: tuple[int, int],
    types: dict[str, onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """A run of nodes as a model of its own."""
    graph, inside = proto.graph, nodes[slice(*span)]
    made = set(itertools.chain.from_iterable(node.makes for node in inside))
    read = set(itertools.chain.from_iterable(node.reads for node in inside))
    read_later = set(itertools.chain.from_iterable(node.reads for node in nodes[span[1] :]))
    returned = {value.name for value in graph.output}
    # A constant may be returned as it is.
    is_last = span[1] == len(nodes)
    own = [node for name, node in constants.items() if name in read or (is_last and name in returned)]
    made |= {node.output[0] for node in own}
    given = {value.name for value in graph.input}
    # Inputs with a default are given at every call.
    initializers = [each for each in graph.initializer if each.name in read and each.name not in given]
    held = {each.name for each in initializers}
    inputs = sorted(read - made - held, key=lambda name: (name not in given, name))
    outputs = [name for name in sorted(made) if name in returned or name in read_later - constants.keys()]
    for name in (*inputs, *outputs):
        if name not in types:
            raise CodegenError(f"[onnx] {name}: crosses from one segment to another, and its type is not known.")
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    del model.graph.input[:], model.graph.output[:]
    model.graph.node.extend([*own, *(node.proto for node in inside)])
    model.graph.initializer.extend(initializers)
    model.graph.input.extend(types[name] for name in inputs)
    model.graph.output.extend(types[name] for name in outputs)
    called = {(each.domain, each.op_type) for each in model.graph.node}
    kept = [function for function in proto.functions if (function.domain, function.name) in called]
    del model.functions[:]
    model.functions.extend(kept)
    return model
