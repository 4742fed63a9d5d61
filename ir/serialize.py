"""A program as two files: `program.json` (nodes, arguments, symbols, constants by name) and a safetensors file.

Nothing of them is executed or unpickled: operators come from an allow-list, names that end up in generated code are
checked, and everything else is data. References are written as in the canonical text: `@name` is a constant, `%name` a
state or an input, `%12` the value of node 12 of the same entry. Metadata are not stored; they are computed again from
the sizes of states and inputs, in which equal symbols (`s0`, `s1`, ...) are equal sizes.
"""

from __future__ import annotations

import json
import keyword
import math
import operator
import os
import re
import stat
import types
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    StrictMinMaxConstraint,
)
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from jettison.ir import ops as _register_ops  # noqa: F401
from jettison.ir.constants import Constant, Packed
from jettison.ir.errors import ArtifactError, UnsupportedError, VerifyError
from jettison.ir.program import MissRecord, ModelInfo, PassRecord, Program, State, output_node, placeholders
from jettison.ir.safetensors_file import read_constants, write_constants
from jettison.ir.verify import verify

FORMAT = "jettison program"
FORMAT_VERSION = 1
MAX_JSON_BYTES = 256 << 20
_MAX_NESTING = 8
_AGAIN = "The artifact is damaged: copy it again, or write it again with `jettison optimize`."

# Functions of Python that appear in graphs, on sizes: name, function, number of operands.
_FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    f"operator.{name}": (getattr(operator, name), count)
    for count, names in (
        (2, ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow")),
        (2, ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")),
        (1, ("neg", "not_")),
    )
    for name in names
} | {
    f"torch.{name}": (getattr(torch, name), count)
    for name, count in (
        ("sym_max", 2),
        ("sym_min", 2),
        ("sym_int", 1),
        ("sym_float", 1),
        ("sym_not", 1),
        ("sym_ite", 3),
    )
}
_FUNCTION_NAMES = {function: name for name, (function, _) in _FUNCTIONS.items()}
_LARGEST_EXPONENT = 64  # of a literal: numbers must not grow without bound

# ATen operators are functions of tensors without effects, except these: they touch files, print, or read memory through
# pointers that a tensor holds.
_REFUSED_ATEN = frozenset(("from_file", "data", "set", "lift", "empty_quantized", "get_gradients", "record_stream"))
_REFUSED_ATEN_PREFIXES = ("fbgemm_", "quantized_", "mkldnn_", "miopen_", "cudnn_", "sparse_", "to_mkldnn")
# Of the private ones, only what torch.export and make_fx leave in the graphs of models.
_PRIVATE_ATEN = frozenset(
    "_adaptive_avg_pool2d _assert_async _assert_scalar _assert_tensor_metadata _conj _convolution "
    "_functional_assert_async _functional_assert_scalar _functional_sym_constrain_range "
    "_functional_sym_constrain_range_for_size _grouped_mm _int_mm _local_scalar_dense _log_softmax _make_dep_token "
    "_native_batch_norm_legit_no_training _safe_softmax _scaled_dot_product_attention_math "
    "_scaled_dot_product_flash_attention_for_cpu _shape_as_tensor _softmax _to_copy _unsafe_index _unsafe_view "
    "_weight_norm".split()
)
_UNSAFE_ARGUMENTS = re.compile(r"Storage|Stream|__torch__|Dict|Future")

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_LAYOUTS = {"strided": torch.strided}
_MEMORY_FORMATS = {
    name: getattr(torch, name)
    for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}  # fmt: skip


def _refused_operator(target: Any) -> str | None:
    """Why a target may not stand in a file, or None if it may."""
    if not isinstance(target, torch._ops.OpOverload):
        return (
            None
            if isinstance(target, types.FunctionType | types.BuiltinFunctionType) and target in _FUNCTION_NAMES
            else "no operator of ATen or jettison"
        )
    namespace, name = target._schema.name.split("::")
    if namespace not in ("aten", "jettison"):
        return f"an operator of the library {namespace}"
    if not torch._C._dispatch_has_kernel(target.name()):
        return "an operator of TorchScript"
    if target._schema.is_mutable:
        return "an operator that writes to its input"
    if any(_UNSAFE_ARGUMENTS.search(str(argument.type)) for argument in target._schema.arguments):
        return "an operator of something other than tensors and numbers"
    is_private = namespace == "aten" and re.match(r"_[^_]", name) and name not in _PRIVATE_ATEN
    if is_private or name in _REFUSED_ATEN or name.startswith(_REFUSED_ATEN_PREFIXES):
        return "an operator outside the allow-list"
    return None


def _target_name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else _FUNCTION_NAMES[target]


def _find_target(name: str) -> Any:
    """The operator of an allow-listed name; None if there is none."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name][0]
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in ("aten", "jettison") or not all(re.fullmatch(r"\w+", part) for part in parts):
        return None
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    target = getattr(packet, parts[2], None)
    return target if isinstance(target, torch._ops.OpOverload) and str(target) == name else None


# ---------------------------------------------------------------------------------------------------------- saving


class _Symbols:
    """Canonical names of the symbols in the sizes of states and inputs, and what a fresh symbol must know."""

    def __init__(self) -> None:
        self.table: dict[str, dict[str, int | None]] = {}
        self._names: dict[sympy.Symbol, str] = {}

    def size(self, size: int | torch.SymInt, where: str) -> int | str:
        if isinstance(size, int):
            return size
        expression = sympy.sympify(size.node.expr)
        if expression.is_number:
            return int(expression)
        if not isinstance(expression, sympy.Symbol) or not size.node.has_hint():
            raise VerifyError(f"[save] {where} has the size {expression}; needed a number or one symbol")
        if expression not in self._names:
            self._names[expression] = f"s{len(self._names)}"
            bounds = size.node.shape_env.var_to_range[expression]
            largest = None if bounds.upper in (int_oo, sympy.oo) else int(bounds.upper)
            self.table[self._names[expression]] = {
                "min": int(bounds.lower), "max": largest, "hint": int(size.node.hint),
            }  # fmt: skip
        return self._names[expression]


def save_program(
    program: Program,
    json_path: str | os.PathLike[str],
    weights_path: str | os.PathLike[str],
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Write a program; the same program gives the same bytes (the seconds of its history are left out).

    Args:
        program: A verified program, with metadata.
        json_path: File of the graphs; overwritten.
        weights_path: safetensors file of the constants that some entry reads; overwritten.
        on_bytes: Called with the number of bytes after each write of weights.

    Raises:
        UnsupportedError: The program calls an operator, or has a dtype, that the files cannot hold.
        OSError: A file cannot be written.
    """
    symbols = _Symbols()
    constants = program.used_constants()
    for packed in program.packed.values():
        constants |= {name: program.constants[name] for name in packed.parts.values()}
    entries = {name: _encode_entry(name, entry, symbols) for name, entry in program.entries.items()}
    history = [asdict(record) for record in program.history]
    for record in history:
        del record["seconds"]
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "info": asdict(program.info),
        "outputs": list(program.outputs),
        "pipeline": program.pipeline,
        "symbols": symbols.table,
        "constants": {
            name: {
                "dtype": _encode(constant.dtype)["dtype"],
                "stored": _encode(constant.stored_dtype)["dtype"],
                "shape": list(constant.shape),
            }
            for name, constant in constants.items()
        },
        "packed": {
            name: {"format": packed.format, "shape": list(packed.shape), "parts": packed.parts}
            for name, packed in program.packed.items()
        },
        "states": {
            name: {"shape": list(state.shape), "dtype": _encode(state.dtype)["dtype"]}
            for name, state in program.states.items()
        },
        "history": [{key: _encode_field(value) for key, value in record.items()} for record in history],
        "entries": entries,
    }
    text = _lines(document, {"entries": 3}) + "\n"
    Path(json_path).write_bytes(text.encode())
    write_constants(weights_path, constants, on_bytes)


def _lines(value: Any, depths: dict[str, int], depth: int = 1, indent: str = "") -> str:
    """JSON with one constant, state or node on a line: `depth` levels are broken, then all stands on one line."""
    if depth < 0 or not isinstance(value, dict | list) or not value:
        return json.dumps(value, allow_nan=False)
    inner = indent + " "
    if isinstance(value, list):
        items = [inner + _lines(item, {}, depth - 1, inner) for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    items = [f"{inner}{json.dumps(k)}: {_lines(v, {}, depths.get(k, depth) - 1, inner)}" for k, v in value.items()]
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def _encode_field(value: Any) -> Any:
    return _encode(value) if isinstance(value, float) else value


def _encode_entry(name: str, entry: fx.GraphModule, symbols: _Symbols) -> dict[str, Any]:
    references: dict[fx.Node, str] = {}
    constants: list[str] = []
    states: dict[str, list[int | str]] = {}
    inputs: dict[str, dict[str, Any]] = {}
    for node in placeholders(entry):
        if "constant" in node.meta:
            constants.append(node.meta["constant"])
            references[node] = f"@{constants[-1]}"
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise VerifyError(f"[save] {name}: {node.name} has no metadata (was the program loaded without?)")
        sizes = [symbols.size(size, f"{name}: {node.name}") for size in value.shape]
        given = node.meta.get("state", node.name)
        if given in states or given in inputs:
            raise VerifyError(f"[save] {name}: {given} is the name of two placeholders")
        references[node] = f"%{given}"
        if "state" in node.meta:
            states[given] = sizes
        else:
            inputs[given] = {"dtype": _encode(value.dtype)["dtype"], "shape": sizes}
    nodes = []
    for node in entry.graph.nodes:
        if node.op == "call_function":
            references[node] = f"%{len(nodes)}"
            nodes.append(_encode_call(name, node, references))
    returns = [references[value] for value in output_node(entry).args[0]]
    return {"constants": constants, "states": states, "inputs": inputs, "nodes": nodes, "returns": returns}


def _encode_call(entry: str, node: fx.Node, references: dict[fx.Node, str]) -> dict[str, Any]:
    where = node.meta.get("where") or node.name
    refused = _refused_operator(node.target)
    if refused is not None:
        raise UnsupportedError(
            f"[save] {where} in {entry} calls {node.target}, {refused}: a saved program holds functional operators of "
            "ATen and jettison only, because it must load without running foreign code. Express that part of the model "
            "in plain torch operations, or use the program without saving it."
        )
    call: dict[str, Any] = {"op": _target_name(node.target), "args": [_encode(a, references) for a in node.args]}
    if node.kwargs:
        call["kwargs"] = {key: _encode(value, references) for key, value in node.kwargs.items()}
    for key in ("where", "made_by"):
        if key in node.meta:
            call[key] = node.meta[key]
    return call


def _encode(value: Any, references: dict[fx.Node, str] | None = None) -> Any:
    """An argument as JSON: references are strings, whatever JSON lacks is a table with one key that names its type."""
    if isinstance(value, fx.Node):
        return (references or {})[value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, str):
        return {"str": value}
    if isinstance(value, complex):
        return {"complex": [_encode(value.real), _encode(value.imag)]}
    if isinstance(value, list | tuple):
        return [_encode(item, references) for item in value]
    if isinstance(value, slice):
        return {"slice": [_encode(bound, references) for bound in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for key, table in (("dtype", _DTYPES), ("layout", _LAYOUTS), ("memory_format", _MEMORY_FORMATS)):
        for name, known in table.items():
            if value is known:
                return {key: name}
    if isinstance(value, torch.SymInt):
        raise VerifyError(f"[save] the size {value} stands in a graph as a literal; needed a node that computes it")
    raise UnsupportedError(f"[save] an argument of type {type(value).__name__} cannot be written to program.json.")


# --------------------------------------------------------------------------------------------------------- loading


def load_program(
    json_path: str | os.PathLike[str], weights_path: str | os.PathLike[str], *, metadata: bool = True
) -> Program:
    """Load a program; its constants are mapped, no weight is read.

    Args:
        json_path: File of the graphs.
        weights_path: safetensors file of the constants.
        metadata: Compute the metadata of every value again, and verify the program. Without (a fast start) the program
            can be run, and not printed, rewritten or saved; then a call whose arguments do not fit its operator is only
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
        # Sizes of states and inputs, until metadata are computed.
        self._sizes: dict[fx.Node, tuple[torch.dtype, list[int | str]]] = {}

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
            self.refuse("the file", f"no readable file ({getattr(error, 'strerror', None) or error})", "one", error)
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
            self.refuse("version", repr(version), f"a number from 1 to {FORMAT_VERSION}")
        return document

    # ---- pieces of JSON

    def table(self, value: Any, where: str, keys: Iterable[str] | None = None, optional: Iterable[str] = ()) -> Any:
        """`value`, if it is a table with exactly these keys (or any keys)."""
        if not isinstance(value, dict):
            self.refuse(where, f"{type(value).__name__} {value!r:.100}", "a table")
        if keys is not None and not set(keys) <= set(value) <= {*keys, *optional}:
            self.refuse(where, f"the keys {', '.join(value)}", f"the keys {', '.join(keys)}")
        return value

    def items(self, value: Any, kind: type, where: str) -> list[Any]:
        """`value`, if it is a list of `kind` without repetition where they are names."""
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            self.refuse(where, f"{type(value).__name__} {value!r:.100}", f"a list of {kind.__name__}")
        if kind is str and len(set(value)) != len(value):
            self.refuse(where, f"the name {Counter(value).most_common(1)[0][0]!r} twice", "names that differ")
        return value

    def text(self, value: Any, where: str) -> str:
        """`value`, if it is a string."""
        if not isinstance(value, str):
            self.refuse(where, f"{type(value).__name__} {value!r:.100}", "a string")
        return value

    def dtype(self, value: Any, where: str) -> torch.dtype:
        """The dtype of a name."""
        if not isinstance(value, str) or value not in _DTYPES:
            self.refuse(where, f"the dtype {value!r:.100}", "a dtype of torch")
        return _DTYPES[value]

    def sizes(self, value: Any, where: str, names: Iterable[str] = ()) -> list[int | str]:
        """`value`, if it is a list of sizes or of these names."""
        known = set(names)
        if isinstance(value, list) and len(value) <= 64:
            if all((type(s) is int and 0 <= s < 2**63) or (isinstance(s, str) and s in known) for s in value):
                return value
        self.refuse(
            where, f"the shape {value!r:.100}", f"a list of sizes{' or of ' if known else ''}{', '.join(known)}"
        )

    def record(self, kind: type, value: Any, where: str) -> Any:
        """An instance of a dataclass of plain fields."""
        hints = typing.get_type_hints(kind)
        required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        table = self.table(value, where, required, hints)
        return kind(**{key: self._field(hints[key], item, f"{where}: {key}") for key, item in table.items()})

    def _field(self, hint: Any, value: Any, where: str) -> Any:
        choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if typing.get_origin(hint) is list and isinstance(value, list):
            return [self._field(typing.get_args(hint)[0], item, where) for item in value]
        if is_dataclass(hint):
            return self.record(hint, value, where)  # type: ignore[arg-type]
        if float in choices and (isinstance(value, dict) or type(value) is int):
            value = self.argument(value, {}, where)
            value = float(value) if type(value) is int else value
        if type(value) not in choices:
            self.refuse(where, f"{type(value).__name__} {value!r:.100}", str(hint))
        return value

    # ---- the program

    def program(self, weights: dict[str, Tensor], weights_path: Path) -> Program:
        """The program, without metadata."""
        keys = ("info", "outputs", "pipeline", "symbols", "constants", "packed", "states", "history", "entries")
        document = self.table(self.document, "the file", ("format", "version", *keys))
        info: ModelInfo = self.record(ModelInfo, document["info"], "info")
        if info.kind not in ("decoder", "encoder") or min(info.context, info.vocab_size) < 1:
            self.refuse("info", str(info), "a decoder or an encoder with positive sizes")
        constants = {}
        for name, fields_ in self.table(document["constants"], "constants").items():
            constants[name] = self._constant(name, fields_, weights.get(name), weights_path)
        states = {}
        for name, fields_ in self.table(document["states"], "states").items():
            where = f"state {name}"
            self.table(fields_, where, ("shape", "dtype"))
            shape = tuple(self.sizes(fields_["shape"], where, ("batch", "capacity")))
            states[name] = State(name, shape, self.dtype(fields_["dtype"], where))
        program = Program(
            {}, constants, info, tuple(self.items(document["outputs"], str, "outputs")), {}, states, [],
            self.text(document["pipeline"], "pipeline"),
        )  # fmt: skip
        for name, fields_ in self.table(document["packed"], "packed").items():
            program.packed[name] = self._packed(name, fields_, constants)
        for record in self.items(document["history"], dict, "history"):
            program.history.append(self.record(PassRecord, record, "history"))
        self.table(document["symbols"], "symbols")
        for name, fields_ in self.table(document["entries"], "entries").items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                self.refuse("entries", f"the name {name!r}", "a name of small letters")
            program.entries[name] = self._entry(name, fields_, program)
        return program

    def _constant(self, name: str, value: Any, stored: Tensor | None, weights_path: Path) -> Constant:
        where = f"constant {name}"
        self.table(value, where, ("dtype", "stored", "shape"))
        shape, stored_dtype = self.sizes(value["shape"], where), self.dtype(value["stored"], where)
        if stored is None:
            self.refuse(where, f"no such tensor in {weights_path}", "the weights that were written with the program")
        if list(stored.shape) != shape or stored.dtype != stored_dtype:
            found = f"{stored.dtype} {list(stored.shape)} in {weights_path}"
            self.refuse(where, found, f"{stored_dtype} {shape}, as the program says")
        return Constant(name, stored, self.dtype(value["dtype"], where))

    def _packed(self, name: str, value: Any, constants: dict[str, Constant]) -> Packed:
        where = f"packed {name}"
        self.table(value, where, ("format", "shape", "parts"))
        parts = self.table(value["parts"], where)
        for part in parts.values():
            if self.text(part, where) not in constants:
                self.refuse(where, f"the part {part!r}", "the name of a constant")
        return Packed(self.text(value["format"], where), tuple(self.sizes(value["shape"], where)), parts)

    def _entry(self, name: str, value: Any, program: Program) -> fx.GraphModule:
        self.table(value, name, ("constants", "states", "inputs", "nodes", "returns"))
        graph = fx.Graph()
        values = self._placeholders(graph, name, value, program)
        for number, call in enumerate(self.items(value["nodes"], dict, f"{name}: nodes")):
            values[f"%{number}"] = self._call(graph, call, values, f"{name}: node %{number}")
        returns = value["returns"]
        needed = len(program.outputs) + len(value["states"])
        if not isinstance(returns, list) or len(returns) != needed:
            self.refuse(name, f"it returns {returns!r:.100}", f"{needed} values: the outputs, then the new states")
        nodes = [self.argument(reference, values, f"{name}: returns") for reference in returns]
        if not all(isinstance(node, fx.Node) for node in nodes):
            self.refuse(name, f"it returns {returns!r:.100}", "references to values")
        graph.output(tuple(nodes))
        return fx.GraphModule(torch.nn.Module(), graph)

    def _placeholders(self, graph: fx.Graph, name: str, value: Any, program: Program) -> dict[str, fx.Node]:
        """Placeholders in the order constants, states, inputs, by reference."""
        values: dict[str, fx.Node] = {}
        symbols = self.document["symbols"]
        inputs = self.table(value["inputs"], f"{name}: inputs")
        for kind, known in (("constant", program.constants), ("state", program.states)):
            given = value[f"{kind}s"]
            names = self.items(given, str, f"{name}: {kind}s") if kind == "constant" else self.table(given, name)
            for each in names:
                if each not in known:
                    self.refuse(f"{name}: {kind}s", f"the {kind} {each!r}", f"one of the program's {kind}s")
                node = _placeholder(graph, each, inputs)
                node.meta[kind] = each
                values[("@" if kind == "constant" else "%") + each] = node
                if kind == "state":
                    state, sizes = program.states[each], self.sizes(given[each], f"{name}: {each}", symbols)
                    pairs = zip(state.shape, sizes, strict=False)
                    is_same = all(isinstance(ours, str) or ours == theirs for ours, theirs in pairs)
                    if len(sizes) != len(state.shape) or not is_same:
                        self.refuse(f"{name}: {each}", f"the sizes {sizes}", f"those of the state, {list(state.shape)}")
                    self._sizes[node] = state.dtype, sizes
        for each, fields_ in inputs.items():
            where = f"{name}: input {each}"
            self.table(fields_, where, ("dtype", "shape"))
            node = graph.placeholder(each) if each.isascii() and each.isidentifier() else None
            # A graph becomes Python code, in which the name stands as it is; fx renames what would not work there.
            if node is None or node.name != each or keyword.iskeyword(each) or each == "self" or f"%{each}" in values:
                self.refuse(where, f"the name {each!r}", "the name of a tensor input, used once")
            values[f"%{each}"] = node
            self._sizes[node] = self.dtype(fields_["dtype"], where), self.sizes(fields_["shape"], where, symbols)
        return values

    def _call(self, graph: fx.Graph, call: dict[str, Any], values: dict[str, fx.Node], where: str) -> fx.Node:
        self.table(call, where, ("op", "args"), ("kwargs", "where", "made_by"))
        name = self.text(call["op"], where)
        target = _find_target(name)
        refused = "no operator of ATen or jettison" if target is None else _refused_operator(target)
        if refused is not None:
            self.refuse(where, f"the operator {name!r} ({refused})", "an allow-listed operator of ATen or jettison")
        args = self.argument(call["args"], values, where)
        kwargs = {
            key: self.argument(item, values, where) for key, item in self.table(call.get("kwargs", {}), where).items()
        }
        wrong = "arguments that are not a list" if not isinstance(args, list) else _misfit(target, args, kwargs)
        if wrong is not None:
            self.refuse(f"{where}: {name}", wrong, "a call that fits the operator")
        node = graph.call_function(target, tuple(args), kwargs)
        for key in ("where", "made_by"):
            if key in call:
                node.meta[key] = self.text(call[key], where)
        return node

    def argument(self, value: Any, values: dict[str, fx.Node], where: str, depth: int = 0) -> Any:
        """The inverse of `_encode`."""
        if depth > _MAX_NESTING:
            self.refuse(where, "arguments nested without end", f"at most {_MAX_NESTING} levels")
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            if not -(2**63) <= value < 2**63:
                self.refuse(where, f"the number {str(value)[:30]}...", "64 bits")
            return value
        if isinstance(value, str):
            if value not in values:
                self.refuse(where, f"a reference to {value!r}", "a value that is defined before it")
            return values[value]
        if isinstance(value, list):
            return [self.argument(item, values, where, depth + 1) for item in value]
        if len(value) != 1:
            self.refuse(where, f"the argument {value!r:.100}", "a table with one key")
        key, item = next(iter(value.items()))
        if key in ("slice", "complex") and isinstance(item, list) and len(item) == (3 if key == "slice" else 2):
            parts = [self.argument(part, values, where, depth + 1) for part in item]
            if key == "slice":
                return slice(*parts)
            if all(isinstance(part, float) for part in parts):
                return complex(*parts)
        literal = _literal(key, item)
        if literal is None:
            self.refuse(where, f"the argument {value!r:.100}", "a literal of a known type")
        return literal

    # ---- metadata

    def compute_metadata(self, program: Program) -> None:
        """Evaluate every node on fake tensors, in order, and verify the program."""
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        symbols = {name: self._symbol(name, spec, mode) for name, spec in self.document["symbols"].items()}
        for name, entry in program.entries.items():
            with mode, torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations inside torch
                for node in placeholders(entry):
                    if "constant" in node.meta:
                        constant = program.constants[node.meta["constant"]]
                        node.meta["val"] = torch.empty(constant.shape, dtype=constant.dtype)
                    else:
                        dtype, sizes = self._sizes[node]
                        node.meta["val"] = torch.empty([symbols.get(size, size) for size in sizes], dtype=dtype)
                self._evaluate_calls(name, entry)
            for node in output_node(entry).args[0]:
                if not isinstance(node.meta["val"], Tensor):
                    self.refuse(name, f"it returns {type(node.meta['val']).__name__}", "tensors")
        try:
            verify(program, after="load")
        except VerifyError as error:
            self.refuse("the program", str(error.args[0]), "a program that keeps every invariant", error)

    def _symbol(self, name: str, spec: Any, mode: FakeTensorMode) -> torch.SymInt:
        where = f"symbol {name}"
        self.table(spec, where, ("min", "max", "hint"))
        low, high, hint = spec["min"], spec["max"], spec["hint"]
        largest = 2**62 if high is None else high
        if not all(type(number) is int for number in (low, largest, hint)) or not 2 <= low <= hint <= largest <= 2**62:
            self.refuse(where, str(spec), "2 <= min <= hint <= max")
        context = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DYNAMIC],
            constraint_sizes=[
                StrictMinMaxConstraint(vr=ValueRanges(low, int_oo if high is None else high), warn_only=False)
            ],
        )
        return mode.from_tensor(torch.empty(hint, device="meta"), symbolic_context=context).shape[0]

    def _evaluate_calls(self, name: str, entry: fx.GraphModule) -> None:
        calls = (node for node in entry.graph.nodes if node.op == "call_function")
        for number, node in enumerate(calls):
            where = f"{name}: node %{number}: {_target_name(node.target)}"
            args = fx.map_arg(node.args, lambda operand: operand.meta["val"])
            kwargs = fx.map_arg(node.kwargs, lambda operand: operand.meta["val"])
            if node.target in _FUNCTION_NAMES and node.target is not operator.getitem:
                # A product of a list and a number could be of any length.
                if any(isinstance(value, list | tuple) for value in args):
                    self.refuse(where, "an operand that is a list", "sizes and tensors")
            try:
                value = node.target(*args, **kwargs)
            except Exception as error:  # operators raise whatever their checks raise
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                self.refuse(where, f"arguments that it refuses ({reason})", "a call that computes", error)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                self.refuse(where, "a size beyond 64 bits", "a size")
            node.meta["val"] = value


def _placeholder(graph: fx.Graph, name: str, reserved: Iterable[str]) -> fx.Node:
    """A placeholder for a constant or state, under an identifier that is safe in generated code."""
    identifier = re.sub(r"[^0-9a-zA-Z_]", "_", name)
    while identifier in reserved:
        identifier += "_"
    node = graph.placeholder(identifier)
    node.target = node.name  # which fx has checked against keywords and the names in use
    return node


def _misfit(target: Any, args: list[Any], kwargs: dict[str, Any]) -> str | None:
    """What is wrong with the number or the names of arguments, or None."""
    if target in _FUNCTION_NAMES:
        count = _FUNCTIONS[_FUNCTION_NAMES[target]][1]
        if kwargs or len(args) != count:
            return f"{len(args)} arguments and {len(kwargs)} named ones, where it takes {count}"
        if target is operator.getitem:
            fits = isinstance(args[0], fx.Node) and isinstance(args[1], fx.Node | int | slice)
        else:
            fits = all(isinstance(operand, fx.Node | int | float) for operand in args)
        if target is operator.pow and fits:
            fits = isinstance(args[1], int | float) and abs(args[1]) <= _LARGEST_EXPONENT
        return None if fits else "operands that are no sizes"
    declared = target._schema.arguments
    positional = [argument.name for argument in declared if not argument.kwarg_only]
    given = positional[: len(args)]
    missing = [a.name for a in declared if a.name not in given and a.name not in kwargs and not a.has_default_value()]
    strange = [key for key in kwargs if key in given or key not in {argument.name for argument in declared}]
    if len(args) > len(positional):
        return f"{len(args)} positional arguments, where it takes {len(positional)}"
    if missing or strange:
        return f"the arguments {', '.join(map(repr, missing or strange))} {'missing' if missing else 'unknown'}"
    return None


def _literal(key: str, item: Any) -> Any:
    """A literal that JSON lacks; None if there is none of that kind and name."""
    if not isinstance(item, str):
        return None
    if key == "str":
        return item
    if key == "float":
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}.get(item)
    if key == "device":
        try:
            return torch.device(item)
        except RuntimeError:
            return None
    return {"dtype": _DTYPES, "layout": _LAYOUTS, "memory_format": _MEMORY_FORMATS}.get(key, {}).get(item)
