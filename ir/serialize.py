"""A program as two files: `program.json` (nodes, arguments, symbols, constants by name) and a safetensors file.

Nothing in them is executed or unpickled: operators come from an allow-list, names that end up in generated code are
checked, and everything else is data. References are written as in the canonical text: `@name` is a constant, `%name` a
state or an input, `%12` the value of node 12 of the same entry. Metadata are not stored; they are computed again from
the sizes of states and inputs, in which equal symbols (`s0`, `s1`, ...) are equal sizes.
"""

from __future__ import annotations

import dataclasses
import json
import keyword
import math
import operator
import re
import stat
import types
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from reprlib import repr as short
from typing import Any, NoReturn

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import symbolic_shapes
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from jettison.ir import ops as _register_ops  # noqa: F401
from jettison.ir.constants import Constant, Packed, StreamedConstant
from jettison.ir.errors import ArtifactError, UnsupportedError, VerifyError
from jettison.ir.placement import TIERS, Placement
from jettison.ir.program import (
    ModelInfo,
    PassRecord,
    Program,
    Retention,
    State,
    Storage,
    constant_placeholders,
    output_node,
    placeholders,
)
from jettison.ir.safetensors_file import read_constants, write_constants
from jettison.ir.stored_operators import FUNCTION_NAMES, find_target, misfit, refused_operator
from jettison.ir.verify import verify

FORMAT = "jettison program"
FORMAT_VERSION = 1
MAX_JSON_BYTES = 256 << 20
_MAX_NESTING = 8
_AGAIN = "The artifact is damaged: copy it again, or write it again with `jettison optimize`."

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
# Literals that JSON lacks are tables with one key: the kind, and the name of the value.
_LITERALS: dict[str, dict[str, Any]] = {
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
    "dtype": _DTYPES,
    "layout": {"strided": torch.strided},
    "memory_format": {name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last")},
}


@dataclasses.dataclass(frozen=True)
class _StoredConstant:
    dtype: torch.dtype
    stored: torch.dtype
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Input:
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class _Symbol:
    """A size known at run time: its range, None meaning no bound, and its size while tracing."""

    min: int
    max: int | None
    hint: int


def _size_name(size: int | torch.SymInt, symbols: dict[sympy.Symbol, tuple[str, _Symbol]], where: str) -> int | str:
    """A number, or the name of a symbol; symbols are numbered in order of appearance."""
    if isinstance(size, int):
        return size
    expression = sympy.sympify(size.node.expr)
    if expression.is_number:
        return int(expression)
    if not isinstance(expression, sympy.Symbol) or not size.node.has_hint():
        raise VerifyError(f"[save] {where} has the size {expression}; needed a number or one symbol")
    if expression not in symbols:
        bounds = size.node.shape_env.var_to_range[expression]
        largest = None if bounds.upper in (int_oo, sympy.oo) else int(bounds.upper)
        symbols[expression] = f"s{len(symbols)}", _Symbol(int(bounds.lower), largest, int(size.node.hint))
    return symbols[expression][0]


def save_program(
    program: Program,
    json_path: str | Path,
    weights_path: str | Path,
    on_bytes: Callable[[int], object] | None = None,
    *,
    without: Collection[str] = (),
) -> None:
    """Write a program; the same program gives the same bytes (the seconds of its history are left out).

    Args:
        program: A verified program, with metadata.
        json_path: File of the graphs; overwritten.
        weights_path: safetensors file of the constants that some entry reads; overwritten.
        on_bytes: Called with the number of bytes after each write of weights.
        without: Constants on disk whose values are elsewhere (see `Placement`): described, and not written.

    Raises:
        UnsupportedError: The program calls an operator, or has a dtype, that the files cannot hold.
        OSError: A file cannot be written.
    """
    symbols: dict[sympy.Symbol, tuple[str, _Symbol]] = {}
    constants = program.used_constants()
    for packed in program.packed.values():
        constants |= {name: program.constants[name] for name in packed.parts.values()}
    document: dict[str, Any] = {
        "format": FORMAT, "version": FORMAT_VERSION, "info": program.info, "outputs": program.outputs,
        "pipeline": program.pipeline, "symbols": {},
        "constants": {name: _StoredConstant(c.dtype, c.stored_dtype, c.shape) for name, c in constants.items()},
        "packed": program.packed, "states": program.states, "retentions": program.retentions,
        "storages": program.storages,
        "history": [dataclasses.replace(record, seconds=0.0) for record in program.history],
        "entries": {name: _encode_entry(name, entry, symbols) for name, entry in program.entries.items()},
    }  # fmt: skip
    if program.entry_outputs:
        document["entry_outputs"] = program.entry_outputs
    if program.placement is not None:
        document["placement"] = program.placement
    document["symbols"] = dict(symbols.values())  # known once the entries are encoded
    Path(json_path).write_bytes(f"{_lines(_plain(document), 'entry', '')}\n".encode())
    write_constants(weights_path, {name: c for name, c in constants.items() if name not in without}, on_bytes)


_ITEMS_ON_LINES = (
    "symbols", "constants", "packed", "states", "retentions", "storages", "history", "nodes", "entries", "entry",
)  # fmt: skip


def _lines(value: Any, key: str, indent: str) -> str:
    """JSON with one constant, state, input or node on a line."""
    if not value or key not in _ITEMS_ON_LINES:
        return json.dumps(value, allow_nan=False)
    inner = indent + " "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _lines(item, "", inner) for item in value) + f"\n{indent}]"
    items = []
    for name, item in value.items():
        below = {"entries": "entry", "entry": name}.get(key, "")
        items.append(f"{inner}{json.dumps(name)}: {_lines(item, below, inner)}")
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def _plain(value: Any) -> Any:
    """Records as JSON values."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return _encode(value, {}) if isinstance(value, float) else value


def _encode_entry(name: str, entry: fx.GraphModule, symbols: dict[Any, Any]) -> dict[str, Any]:
    references: dict[fx.Node, str] = {}
    states: dict[str, list[int | str]] = {}
    inputs: dict[str, _Input] = {}
    for node in placeholders(entry):
        if "constant" in node.meta:
            references[node] = f"@{node.meta['constant']}"
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise VerifyError(f"[save] {name}: {node.name} has no metadata (was the program loaded without?)")
        sizes = [_size_name(size, symbols, f"{name}: {node.name}") for size in value.shape]
        given = node.meta.get("state", node.name)
        references[node] = f"%{given}"
        if "state" in node.meta:
            states[given] = sizes
        else:
            inputs[given] = _Input(value.dtype, tuple(sizes))
    if len(set(references.values())) < len(references):
        raise VerifyError(f"[save] {name}: two placeholders have one name: {', '.join(references.values())}")
    nodes: list[dict[str, Any]] = []
    for node in entry.graph.nodes:
        if node.op == "call_function":
            nodes.append(_encode_call(name, node, references))
            references[node] = f"%{len(nodes) - 1}"
    returns = [references[value] for value in output_node(entry).args[0]]
    constants = list(constant_placeholders(entry))
    return {"constants": constants, "states": states, "inputs": inputs, "nodes": nodes, "returns": returns}


def _encode_call(entry: str, node: fx.Node, references: dict[fx.Node, str]) -> dict[str, Any]:
    refused = refused_operator(node.target)
    if refused is not None:
        raise UnsupportedError(
            f"[save] {node.meta.get('where') or node.name} in {entry} calls {node.target}, {refused}: a saved program "
            "holds functional operators of ATen and jettison only, because it must load without running foreign code. "
            "Express that part of the model in plain torch operations, or use the program without saving it."
        )
    call: dict[str, Any] = {"op": FUNCTION_NAMES.get(node.target) or str(node.target)}
    call["args"] = _encode(list(node.args), references)
    if node.kwargs:
        call["kwargs"] = {key: _encode(value, references) for key, value in node.kwargs.items()}
    return call | {key: node.meta[key] for key in ("where", "made_by") if key in node.meta}


def _encode(value: Any, references: dict[fx.Node, str]) -> Any:
    """An argument as JSON: a string is a reference, other than JSON's own literals are tables with one key."""
    if isinstance(value, fx.Node):
        return references[value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, str | torch.device):
        return {"str" if isinstance(value, str) else "device": str(value)}
    if isinstance(value, list | tuple):
        return [_encode(item, references) for item in value]
    named = [{kind: name} for kind, table in _LITERALS.items() for name, known in table.items() if value is known]
    if named:
        return named[0]
    if isinstance(value, torch.SymInt):
        raise VerifyError(f"[save] the size {value} stands in a graph as a literal; needed a node that computes it")
    raise UnsupportedError(f"[save] an argument of type {type(value).__name__} cannot be written to program.json.")


def load_program(json_path: str | Path, weights_path: str | Path, *, metadata: bool = True) -> Program:
    """Load a program; its constants are mapped, no weight is read.

    Args:
        json_path: File of the graphs.
        weights_path: safetensors file of the constants.
        metadata: Compute the metadata of every value again, and verify the program. Without (a fast start) the program
            can be run, and not printed, rewritten or saved; then a call whose arguments do not fit its operator is
            found when it runs.

    Returns:
        A program that prints, computes and can be rewritten like the saved one.

    Raises:
        ArtifactError: A file is missing, damaged, of a newer format, or asks for anything but known operators.
    """
    reader = _Reader(Path(json_path))
    program = reader.program(read_constants(weights_path), Path(weights_path))
    if metadata:
        reader.compute_metadata(program)
    return program


class _Reader:
    """Turns `program.json` into a program; trusts nothing in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document = self._read()
        # Type of each state and input, until metadata are computed.
        self._types: dict[fx.Node, tuple[torch.dtype, tuple[int | str, ...]]] = {}

    def refuse(self, where: str, found: str, needed: str, cause: BaseException | None = None) -> NoReturn:
        """Raise in the house's four parts; what a damaged file holds may be long."""
        message = f"[{self.path}] {where[:200]}: found {found[:300]}; needed {needed}. {_AGAIN}"
        raise ArtifactError(message) from cause

    def _read(self) -> dict[str, Any]:
        try:
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON_BYTES:
                self.refuse("the file", "something else", f"a regular file of at most {MAX_JSON_BYTES:,} bytes")
            text = self.path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            self.refuse("the file", f"none to read ({getattr(error, 'strerror', None) or error})", "a program", error)
        try:
            document = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            self.refuse("the file", f"{len(text):,} bytes that are not JSON ({error})", "a program", error)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            self.refuse("the file", "JSON of something else", f'a table with "format": "{FORMAT}"')
        version = document.get("version")
        if type(version) is int and version > FORMAT_VERSION:
            raise ArtifactError(
                f"[{self.path}] was written by a newer jettison (program version {version}, this one reads up to "
                f"{FORMAT_VERSION}). Upgrade with `pip install -U jettison`."
            )
        if type(version) is not int or version < 1:
            self.refuse("version", f"{short(version)}", f"a number from 1 to {FORMAT_VERSION}")
        return document

    def table(self, value: Any, where: str, keys: Iterable[str] | None = None, optional: Iterable[str] = ()) -> Any:
        """`value`, if it is a table, with exactly these keys if they are given."""
        if not isinstance(value, dict):
            self.refuse(where, f"{type(value).__name__} {short(value)}", "a table")
        if keys is not None and not set(keys) <= set(value) <= {*keys, *optional}:
            self.refuse(where, f"the keys {', '.join(value) or 'of an empty table'}", f"the keys {', '.join(keys)}")
        return value

    def items(self, value: Any, kind: type, where: str) -> list[Any]:
        """`value`, if it is a list of `kind`, without repetition where they are names."""
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            self.refuse(where, f"{type(value).__name__} {short(value)}", f"a list of {kind.__name__}")
        if kind is str and len(set(value)) != len(value):
            self.refuse(where, f"the name {Counter(value).most_common(1)[0][0]!r} twice", "names that differ")
        return value

    def sizes(self, value: Any, where: str, names: Iterable[str] = ()) -> tuple[int | str, ...]:
        """`value`, if it is a list of sizes and of these names."""
        if not isinstance(value, list) or len(value) > 64:
            self.refuse(where, f"the shape {short(value)}", "a list of sizes")
        known = set(names)
        for size in value:
            if not (type(size) is int and 0 <= size < 2**63) and not (isinstance(size, str) and size in known):
                self.refuse(where, f"the size {short(size)}", f"a number{' or a name defined for it' * bool(known)}")
        return tuple(value)

    def record(self, kind: Any, value: Any, where: str, names: Iterable[str] = ()) -> Any:
        """An instance of a dataclass; `names` may stand for sizes."""
        hints = typing.get_type_hints(kind)
        plain, missing = dataclasses.fields(kind), dataclasses.MISSING
        required = [field.name for field in plain if field.default is missing and field.default_factory is missing]
        table = self.table(value, where, required, hints)
        return kind(**{key: self._field(hints[key], item, f"{where}: {key}", names) for key, item in table.items()})

    def records(self, kind: Any, key: str, names: Iterable[str] = ()) -> dict[str, Any]:
        """A table of the document as instances of a dataclass by name."""
        table = self.table(self.document[key], key)
        return {name: self.record(kind, value, f"{key}: {name}", names) for name, value in table.items()}

    def _field(self, hint: Any, value: Any, where: str, names: Iterable[str]) -> Any:
        origin = typing.get_origin(hint)
        choices = typing.get_args(hint) if origin is types.UnionType else (hint,)
        if origin is tuple:
            return self.sizes(value, where, names)
        if origin is list and typing.get_args(hint) == (str,):
            return self.items(value, str, where)
        if origin is list:
            return [self.record(typing.get_args(hint)[0], item, where) for item in self.items(value, dict, where)]
        if origin is dict:
            held = typing.get_args(hint)[1]
            table = self.table(value, where)
            return {name: self._field(held, each, f"{where}: {short(name)}", names) for name, each in table.items()}
        found = _DTYPES.get(str(value)) if hint is torch.dtype else value
        if float in choices and isinstance(value, dict | int):
            found = self.argument(value, {}, where)
            found = float(found) if type(found) is int else found
        if type(found) not in choices:
            self.refuse(where, short(value), getattr(hint, "__name__", str(hint)))
        return found

    def program(self, weights: dict[str, Tensor], weights_path: Path) -> Program:
        """The program, without metadata."""
        keys = ("info", "outputs", "pipeline", "symbols", "constants", "packed", "states", "retentions", "storages",
                "history", "entries")  # fmt: skip
        document = self.table(self.document, "the file", ("format", "version", *keys), ("entry_outputs", "placement"))
        self.table(document["symbols"], "symbols")
        info = self.record(ModelInfo, document["info"], "info")
        if info.kind not in ("decoder", "encoder") or min(info.context, info.vocab_size) < 1:
            self.refuse("info", str(info), "a decoder or an encoder with positive sizes")
        constants: dict[str, Constant] = {}
        placement = self.record(Placement, document["placement"], "placement") if "placement" in document else None
        on_disk = {name for name, tier in placement.tiers.items() if tier == "disk"} if placement else set()
        for name, wanted in self.records(_StoredConstant, "constants").items():
            stored, where = weights.get(name), f"constant {name}"
            if stored is None and name in on_disk:
                constants[name] = StreamedConstant(name, wanted.shape, wanted.stored, wanted.dtype)
                continue
            if stored is None:
                self.refuse(where, f"no such tensor in {weights_path}", "the weights written with the program")
            if tuple(stored.shape) != wanted.shape or stored.dtype != wanted.stored:
                found = f"{stored.dtype} {list(stored.shape)} in {weights_path}"
                self.refuse(where, found, f"{wanted.stored} {list(wanted.shape)}, as the program says")
            constants[name] = Constant(name, stored, wanted.dtype)
        retentions, packed = self.records(Retention, "retentions"), self.records(Packed, "packed")
        storages = self.records(Storage, "storages")
        states = self.records(State, "states", ("batch", "capacity", *retentions, *storages))
        named = (*states.items(), *retentions.items(), *storages.items())
        strange = [name for name, each in named if each.name != name]
        strange += [each.retention for each in storages.values() if each.retention not in retentions]
        strange += [part for each in packed.values() for part in each.parts.values() if part not in constants]
        if strange:
            self.refuse("states and packed", f"the name {strange[0]!r}", "a name that the program defines")
        passes = self.items(document["history"], dict, "history")
        history = [self.record(PassRecord, each, "history") for each in passes]
        outputs = self.items(document["outputs"], str, "outputs")
        pipeline = self._field(str, document["pipeline"], "pipeline", ())
        program = Program({}, constants, info, tuple(outputs), packed, states, history, pipeline, retentions, storages)
        if placement is not None:
            self._check_placement(placement, program)
            program.placement = placement
        for name, returned in self.table(document.get("entry_outputs", {}), "entry_outputs").items():
            program.entry_outputs[name] = tuple(self.items(returned, str, f"entry_outputs of {name}"))
        for name, value in self.table(document["entries"], "entries").items():
            if not re.fullmatch(r"[a-z][a-z0-9_]{,50}", name):
                self.refuse("entries", f"the name {name!r}", "a name of small letters")
            program.entries[name] = self._entry(name, value, program)
        return program

    def _check_placement(self, placement: Placement, program: Program) -> None:
        named = (*placement.tiers.values(), *placement.states.values(), *placement.limits)
        strange = [name for name in placement.tiers if name not in program.constants]
        strange += [name for name in placement.states if name not in program.states]
        strange += [tier for tier in named if tier not in TIERS]
        sizes = (placement.ring_bytes, placement.batch, placement.context, placement.prompt)
        if strange or min([*sizes, *placement.limits.values()]) < 0:
            found = f"the name {short(strange[0])}" if strange else "a negative size"
            self.refuse("placement", found, f"constants, states and tiers ({', '.join(TIERS)}), and sizes")

    def _entry(self, name: str, value: Any, program: Program) -> fx.GraphModule:
        self.table(value, name, ("constants", "states", "inputs", "nodes", "returns"))
        graph = fx.Graph()
        values = self._placeholders(graph, name, value, program)
        for number, call in enumerate(self.items(value["nodes"], dict, f"{name}: nodes")):
            values[f"%{number}"] = self._call(graph, call, values, f"{name}: node %{number}")
        needed = len(program.outputs_of(name)) + len(value["states"])
        returns = self.argument(value["returns"], values, f"{name}: returns")
        if not isinstance(returns, list) or len(returns) != needed or not all(isinstance(r, fx.Node) for r in returns):
            self.refuse(name, f"it returns {short(value['returns'])}", f"{needed} values: outputs, then new states")
        graph.output(tuple(returns))
        return fx.GraphModule(torch.nn.Module(), graph)

    def _placeholders(self, graph: fx.Graph, name: str, value: Any, program: Program) -> dict[str, fx.Node]:
        """Placeholders in the order constants, states, inputs, by reference."""
        values: dict[str, fx.Node] = {}
        symbols, inputs = self.document["symbols"], self.table(value["inputs"], f"{name}: inputs")
        for each in self.items(value["constants"], str, f"{name}: constants"):
            if each not in program.constants:
                self.refuse(f"{name}: constants", f"the name {each!r}", "a constant of the program")
            values[f"@{each}"] = _placeholder(graph, each, "constant", inputs)
        for each, given in self.table(value["states"], f"{name}: states").items():
            where, state = f"{name}: state {each}", program.states.get(each)
            sizes = self.sizes(given, where, symbols)
            expected = state.shape if state is not None else ()
            is_same = all(isinstance(size, str) or size == got for size, got in zip(expected, sizes, strict=False))
            if state is None or len(sizes) != len(expected) or not is_same:
                self.refuse(where, f"the sizes {list(sizes)}", "a state of the program, and its sizes")
            values[f"%{each}"] = _placeholder(graph, each, "state", inputs)
            self._types[values[f"%{each}"]] = state.dtype, sizes
        for each, given in inputs.items():
            where = f"{name}: input {each}"
            typed = self.record(_Input, given, where, symbols)
            node = graph.placeholder(each) if each.isascii() and each.isidentifier() else None
            # A graph becomes Python code, in which the name stands as it is; fx renames what would not work there.
            if node is None or node.name != each or keyword.iskeyword(each) or each == "self" or f"%{each}" in values:
                self.refuse(where, f"the name {each!r}", "the name of a tensor, used once")
            values[f"%{each}"] = node
            self._types[node] = typed.dtype, typed.shape
        return values

    def _call(self, graph: fx.Graph, call: dict[str, Any], values: dict[str, fx.Node], where: str) -> fx.Node:
        self.table(call, where, ("op", "args"), ("kwargs", "where", "made_by"))
        texts = {key: self._field(str, call[key], where, ()) for key in ("op", "where", "made_by") if key in call}
        name = texts.pop("op")
        target = find_target(name)
        refused = "unknown" if target is None else refused_operator(target)
        if refused is not None:
            self.refuse(where, f"the operator {name!r} ({refused})", "an allow-listed operator of ATen or jettison")
        args, given = self.argument(call["args"], values, where), self.table(call.get("kwargs", {}), where)
        kwargs = {key: self.argument(item, values, where) for key, item in given.items()}
        wrong = misfit(target, args, kwargs) if isinstance(args, list) else "arguments that are not a list"
        if wrong is not None:
            self.refuse(f"{where}: {name}", wrong, "a call that fits the operator")
        node = graph.call_function(target, tuple(args), kwargs)
        node.meta.update(texts)
        return node

    def argument(self, value: Any, values: dict[str, fx.Node], where: str, depth: int = 0) -> Any:
        """The inverse of `_encode`."""
        if depth > _MAX_NESTING:
            self.refuse(where, "arguments nested without end", f"at most {_MAX_NESTING} levels")
        if isinstance(value, list):
            return [self.argument(item, values, where, depth + 1) for item in value]
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            self.refuse(where, f"the number {value:.6e}" if value.bit_length() < 900 else "a number", "64 bits")
        if isinstance(value, str) and value not in values:
            self.refuse(where, f"a reference to {value!r}", "a value that is defined before it")
        if not isinstance(value, dict):
            return values[value] if isinstance(value, str) else value
        kind, item = next(iter(value.items())) if len(value) == 1 else ("", None)
        literal = item if kind == "str" and isinstance(item, str) else _LITERALS.get(kind, {}).get(str(item))
        if kind == "device" and re.fullmatch(r"(cpu|cuda|mps|xpu|meta)(:\d{1,2})?", str(item)):
            literal = torch.device(item)
        if literal is None:
            self.refuse(where, f"the argument {short(value)}", "a literal of a known kind")
        return literal

    def compute_metadata(self, program: Program) -> None:
        """Evaluate every node on fake tensors, in order, and verify the program."""
        mode = FakeTensorMode(shape_env=symbolic_shapes.ShapeEnv(), allow_non_fake_inputs=True)
        symbols = {name: self._fresh(name, mode) for name in self.document["symbols"]}
        # Entries that are copies of each other share their metadata, as they did before they were saved.
        known: dict[Any, Any] = {}
        for name, entry in program.entries.items():
            with mode, enable_python_dispatcher(), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations inside torch
                for node in placeholders(entry):
                    constant = program.constants.get(node.meta.get("constant", ""))
                    dtype, sizes = (constant.dtype, constant.shape) if constant else self._types[node]
                    key = ("constant" in node.meta, node.meta.get("constant") or node.meta.get("state") or node.name)
                    if (key, dtype, sizes) not in known:
                        known[key, dtype, sizes] = torch.empty([symbols.get(s, s) for s in sizes], dtype=dtype)
                    node.meta["val"] = known[key, dtype, sizes]
                self._evaluate_calls(name, entry, known)
            for node in output_node(entry).args[0]:
                if not isinstance(node.meta["val"], Tensor):
                    self.refuse(name, f"it returns {type(node.meta['val']).__name__}", "tensors")
        try:
            verify(program, after="load")
        except VerifyError as error:
            self.refuse("the program", str(error.args[0]), "a program that keeps every invariant", error)

    def _fresh(self, name: str, mode: FakeTensorMode) -> torch.SymInt:
        """A new symbol of its own."""
        symbol = self.record(_Symbol, self.document["symbols"][name], f"symbol {name}")
        largest = 2**62 if symbol.max is None else symbol.max
        # A hint is an example: sizes multiplied with one another must stay within 64 bits.
        is_ordered = 2 <= symbol.min <= symbol.hint <= largest <= 2**62 and symbol.min < largest
        if not is_ordered or symbol.hint > 2**31:
            self.refuse(f"symbol {name}", str(symbol), "2 <= min <= hint <= max, min < max and hint <= 2**31")
        bounds = ValueRanges(symbol.min, int_oo if symbol.max is None else symbol.max)
        limits = [symbolic_shapes.StrictMinMaxConstraint(vr=bounds, warn_only=False)]
        dynamic = [symbolic_shapes.DimDynamic.DYNAMIC]
        context = symbolic_shapes.StatelessSymbolicContext(dynamic_sizes=dynamic, constraint_sizes=limits)
        return mode.from_tensor(torch.empty(symbol.hint, device="meta"), symbolic_context=context).shape[0]

    def _evaluate_calls(self, name: str, entry: fx.GraphModule, known: dict[Any, Any]) -> None:
        occurrences: Counter[Any] = Counter()
        calls = (node for node in entry.graph.nodes if node.op == "call_function")
        for number, node in enumerate(calls):
            where = f"{name}: node %{number}: {FUNCTION_NAMES.get(node.target) or node.target}"
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
            is_arithmetic = node.target in FUNCTION_NAMES and node.target is not operator.getitem
            if is_arithmetic and any(isinstance(value, list | tuple) for value in args):
                self.refuse(where, "an operand that is a list", "sizes and tensors")  # a product could be of any length
            operands = fx.map_arg((node.args, node.kwargs), lambda operand: ("value", id(operand.meta["val"])))
            call = (node.target, repr(operands))
            occurrences[call] += 1
            key = (call, occurrences[call])
            if key not in known:
                try:
                    known[key] = node.target(*args, **kwargs)
                except Exception as error:  # operators raise whatever their checks raise
                    reason = str(error).strip().partition("\n")[0] or type(error).__name__
                    self.refuse(where, f"arguments that it refuses ({reason})", "a call that computes", error)
                if isinstance(known[key], int) and not -(2**63) <= known[key] < 2**63:
                    self.refuse(where, "a size beyond 64 bits", "a size")
            node.meta["val"] = known[key]


def _placeholder(graph: fx.Graph, name: str, kind: str, reserved: Iterable[str]) -> fx.Node:
    """A placeholder of a constant or state, under an identifier that is safe in generated code."""
    identifier = re.sub(r"[^0-9a-zA-Z_]", "_", name)
    while identifier == "self" or identifier in reserved:
        identifier += "_"
    node = graph.placeholder(identifier)
    node.target = node.name  # which fx has checked against keywords and the names in use
    node.meta[kind] = name
    return node
