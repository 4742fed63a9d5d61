"""Program to ONNX: our operators become contrib operators, `torch.onnx` does the rest, weights are streamed to disk."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, fx

from jettison.codegen.onnx import residual_norm
from jettison.codegen.onnx.decompositions import decompose_all, spare_decompositions
from jettison.codegen.onnx.external_data import ExternalDataWriter
from jettison.codegen.onnx.functions import add_functions
from jettison.codegen.onnx.lowered_graph import LoweredGraph
from jettison.codegen.onnx.lowerings import require_kernels
from jettison.codegen.onnx.packed_projections import pack_projections
from jettison.codegen.onnx.routed_experts import spell_out_experts
from jettison.codegen.onnx.segments import Segment, SegmentWriter, writer_for
from jettison.codegen.onnx.sparse_mlp import cut_into_slabs, is_group_mixture
from jettison.ir import ops
from jettison.ir.errors import CodegenError, JettisonError, UnsupportedError
from jettison.ir.match import is_call
from jettison.ir.program import HEAD, Program, constant_placeholders, output_node, placeholders, state_placeholders
from jettison.ir.torch_export import export_module

OPSET = 23
# MatMulNBits with a bias input; GroupQueryAttention with sliding_window_cache; QMoE with router_weights and
# accuracy_level.
MINIMUM_ORT = {"default": "1.24", "windowed_cache": "1.31", "experts": "1.31"}
AXES: dict[str, tuple[str | int, ...]] = {
    "input_ids": ("batch_size", "sequence_length"),
    "position_ids": ("batch_size", "sequence_length"),
    "token_type_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "total_sequence_length"),
    # One row to the exporter, which must not take the size of the batch from an input that may be left out.
    "logits_positions": (1, "logits_sequence_length"),
    "token_count": ("batch_size",),
    "stored_slots": ("batch_size", "stored_length"),
    "head_tokens": ("batch_size", "sequence_length", "head_tokens_length"),
}
# Sizes that the exporter shows itself; any may be given at run time.
_EXAMPLE_SIZES = {"batch_size": 2, "logits_sequence_length": 3, "past_sequence_length": 16, "stored_length": 3,
                  "head_tokens_length": 6}  # fmt: skip


@dataclass
class EmittedGraph:
    """One ONNX file.

    Attributes:
        path: Where it was written.
        entries: Entries of the program that it serves.
        inputs: Names of its inputs, states included.
        outputs: Names of its outputs, new states included.
        states: State name to (input, output); no output for a state that is only read.
        minimum_ort: Oldest ONNX Runtime that has every operator.
        is_fast: Whether it is the fast form of an entry that another graph serves too.
        is_mapped: Whether its weights are better read from the file than packed in memory.
        segments: The files that it was cut into, in order, where it reads weights that are streamed; `path` is none.
    """

    path: Path
    entries: tuple[str, ...]
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    states: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    minimum_ort: str = MINIMUM_ORT["default"]
    is_fast: bool = False
    is_mapped: bool = False
    segments: list[Segment] = field(default_factory=list)


@contextmanager
def _quiet_exporter() -> Any:
    """The exporter logs and warns about its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _examples(entry: fx.GraphModule, program: Program) -> tuple[list[str], list[Tensor], list[dict[int, Any]]]:
    """Names, example tensors and dynamic axes of the inputs and states, in the order of the graph."""
    context = program.info.context
    sizes = {**_EXAMPLE_SIZES, "sequence_length": min(5, context), "total_sequence_length": min(7, context)}
    for kept in program.retentions.values():
        sizes |= {f"{kept.mask}_length": 9, f"{kept.name}_slots": (kept.budget or 0) + 16}
    sizes |= {f"{name}_slots": 6 for name in program.storages}
    # A table of positions has as many rows as the context, and the exporter wants to hear that no call asks for more.
    most = {"sequence_length": context, "total_sequence_length": context}
    fewest = {f"{kept.name}_slots": (kept.budget or 0) + 1 for kept in program.retentions.values()}
    dims = {name: torch.export.Dim(name, min=fewest.get(name), max=most.get(name)) for name in sizes}
    # An entry without a cache has a mask as long as its tokens.
    is_cached_entry = bool(state_placeholders(entry))
    names, tensors, axes = [], [], []
    for node in placeholders(entry):
        if "constant" in node.meta:
            continue
        if "state" in node.meta:
            state = program.states[node.meta["state"]]
            known = {"batch": "batch_size", "capacity": "past_sequence_length"}
            labels = [s if isinstance(s, int) else known.get(s, f"{s}_slots") for s in state.shape]
            names.append(state.name)
        else:
            labels = _labels(node, program)
            if node.name == "attention_mask" and not is_cached_entry:
                labels[1] = "sequence_length"
            names.append(node.name)
        shape = [sizes[label] if isinstance(label, str) else label for label in labels]
        tensors.append(torch.zeros(shape, dtype=node.meta["val"].dtype))
        axes.append({axis: dims[label] for axis, label in enumerate(labels) if isinstance(label, str)})
    return names, tensors, axes


def _labels(node: fx.Node, program: Program) -> list[str | int]:
    """Axis names and fixed sizes of an input."""
    if node.name in AXES:
        return list(AXES[node.name])
    if any(node.name == kept.mask for kept in program.retentions.values()):
        return ["batch_size", f"{node.name}_length"]
    sizes = node.meta["val"].shape
    if node.name in ("new_key", "new_value"):
        return ["batch_size", int(sizes[1]), "stored_length", *map(int, sizes[3:])]
    usual = ("batch_size", "sequence_length")
    return [
        usual[axis] if axis < 2 and isinstance(size, torch.SymInt) else int(size) for axis, size in enumerate(sizes)
    ]


def _present_names(program: Program, entry_name: str) -> dict[str, str | None]:
    """Of the output with each state's new value; None for a state that is only read."""
    entry = program.entries[entry_name]
    returned = output_node(entry).args[0][len(program.outputs_of(entry_name)) :]
    return {
        state: None if new is old else state.replace("past_key_values.", "present.", 1)
        for (state, old), new in zip(state_placeholders(entry).items(), returned, strict=True)
    }


def emit_entry(
    program: Program,
    entry_name: str,
    path: Path,
    data: ExternalDataWriter,
    *,
    serves: tuple[str, ...],
    accuracy_level: int = 4,
    is_fast: bool = False,
) -> EmittedGraph:
    """Write one entry as an ONNX file.

    Args:
        program: A program with a KV cache, or an encoder.
        entry_name: Which entry.
        path: Where to write.
        data: Weight file, shared by all entries of an artifact.
        serves: Entries this graph stands for.
        accuracy_level: Of `MatMulNBits`: 4 quantises activations to int8 inside the kernel, 0 computes in fp32.
        is_fast: Whether linears over all tokens compute in 8-bit integers; see `fast_prefill`.

    Returns:
        Names of inputs and outputs.

    Raises:
        UnsupportedError: ONNX has no counterpart of an operator.
        CodegenError: The graph cannot be lowered.
    """
    entry = program.entries[entry_name]
    lowered = LoweredGraph(program, entry, accuracy_level, is_fast).eval()
    names, tensors, axes = _examples(entry, program)
    presents = _present_names(program, entry_name)
    outputs = [*program.outputs_of(entry_name), *(present for present in presents.values() if present is not None)]
    model = _export(lowered, entry_name, names, tensors, axes, outputs)
    _place_constants(model, lowered, data)
    _name_axes(model, axes)
    _make_optional(model)
    _separate_names(model)
    _strip_debris(model)
    _leave_out_statistics(model)
    add_functions(model)
    emitted = EmittedGraph(path, serves, names, outputs, is_fast=is_fast, segments=data.save(model, path))
    # A head that is asked now and then has been packed for `prefill` already, and packed again it is in memory twice. A
    # quantised weight that is not packed is decoded at each call.
    is_packed = any(is_call(node, ops.quantized_linear) for node in entry.graph.nodes)
    emitted.is_mapped = entry_name == HEAD and not is_packed
    emitted.states = {state: (state, present) for state, present in presents.items()}
    if any(is_call(node, ops.windowed_attention) for node in entry.graph.nodes):
        emitted.minimum_ort = MINIMUM_ORT["windowed_cache"]
    if any(is_call(node, ops.experts, ops.quantized_experts) or is_group_mixture(node) for node in entry.graph.nodes):
        emitted.minimum_ort = MINIMUM_ORT["experts"]
    return emitted


def _export(
    lowered: LoweredGraph,
    entry_name: str,
    names: list[str],
    tensors: list[Tensor],
    axes: list[dict[int, Any]],
    outputs: list[str],
) -> onnx_ir.Model:
    """Trace a lowered graph with `torch.onnx`; its weights are not in the model yet."""
    try:
        with torch.no_grad(), _quiet_exporter():
            exported = export_module(
                lowered, (*tensors, *lowered.examples()), ((*axes, *({} for _ in lowered.placed)),)
            )
            options = {"input_names": [*names, *lowered.placed], "output_names": outputs}
            spare_decompositions(exported)
            try:
                onnx_program = _converted(exported, **options)
            except torch.onnx.OnnxExporterError:
                decompose_all(exported)
                onnx_program = _converted(exported, **options)
    except JettisonError:
        raise
    except Exception as error:
        raise _explained(error, entry_name) from error
    return onnx_program.model


def _converted(exported: torch.export.ExportedProgram, **options: Any) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(exported, opset_version=OPSET, dynamo=True, verbose=False, optimize=True, **options)
    assert program is not None, "export without a file returns the program"
    return program


def _explained(error: BaseException, entry_name: str) -> JettisonError:
    """What the exporter's error means: an operator without a counterpart is nobody's bug."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__
    for link in chain:
        missing = re.search(r"No ONNX function found for .*?'([\w:.]+)'", str(link))
        if missing is not None:
            return UnsupportedError(
                f"[onnx] {entry_name}: torch.onnx knows no counterpart of {missing[1]} in ONNX opset {OPSET}. Use "
                'target="torch".'
            )
    first_line = (str(chain[-1]).strip().splitlines() or ["no message"])[0]
    return CodegenError(f"[onnx] {entry_name}: {type(chain[-1]).__name__}: {first_line}")


def _place_constants(model: onnx_ir.Model, lowered: LoweredGraph, data: ExternalDataWriter) -> None:
    """Give every initializer its name and its bytes; inputs that stand for constants become initializers."""
    graph = model.graph
    found = {name: graph.initializers.pop(attribute, None) for attribute, name in lowered.folded.items()}
    for value in list(graph.inputs):
        if value.name in lowered.placed:
            graph.inputs.remove(value)
            found[value.name] = value if value.uses() else None
    for name, (shape, constant) in lowered.layouts.items():
        value = found[name]
        if value is not None:  # neither folded away nor unread
            value.name = name
            value.const_value = data.tensor(name, shape, constant)
            graph.initializers[name] = value


def _name_axes(model: onnx_ir.Model, axes: list[dict[int, Any]]) -> None:
    """Restore the names of dynamic axes, which the exporter numbers; tokens come first, states after."""
    graph = model.graph
    renamed: dict[str, str] = {}
    for value, named in zip(graph.inputs, axes, strict=True):
        for axis, dim in named.items():
            renamed[str(value.shape[axis])] = dim.__name__
    for value in (*graph.inputs, *graph.outputs):
        value.shape = onnx_ir.Shape(
            [size if isinstance(size, int) else renamed.get(str(size), str(size)) for size in value.shape]
        )
    graph.inputs.sort(key=lambda value: value.name.startswith("past_key_values."))


def _make_optional(model: onnx_ir.Model) -> None:
    """Give `logits_positions` a default, the last token of each row, so that other runtimes need not know it.

    The logits are declared as they are then, `[B, 1, V]`: by this 1 ONNX Runtime GenAI knows that they are of the last
    token. A call that asks for more gets more; ONNX Runtime allows it, with a warning at its default log level.
    """
    graph = model.graph
    for value in graph.inputs:
        if value.name == "logits_positions":
            value.shape = onnx_ir.Shape(["logits_batch_size", "logits_sequence_length"])
            default = torch.full((1, 1), -1, dtype=torch.int64)
            value.const_value = onnx_ir.tensor(default.numpy(), name=value.name)
            graph.initializers[value.name] = value
            logits = graph.outputs[0]
            logits.shape = onnx_ir.Shape(["batch_size", 1, logits.shape[-1]])


def _separate_names(model: onnx_ir.Model) -> None:
    """Rename inner values that bear the name of an input, output or weight: the exporter calls them by operator."""
    graph = model.graph
    taken = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    outputs = {id(value) for value in graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value.name in taken and id(value) not in outputs:
                value.name = f"{value.name}.inner"


def _leave_out_statistics(model: onnx_ir.Model) -> None:
    """Take the names from the outputs of norms that are for training, so that nothing allocates them."""
    domain, name = residual_norm.OPERATOR.split("::")
    for node in model.graph:
        if (node.domain, node.op_type) == (domain, name):
            for value in node.outputs:
                if not value.uses() and value not in model.graph.outputs:
                    value.name = ""


def _strip_debris(model: onnx_ir.Model) -> None:
    """Drop what the exporter notes about source lines: it names machine paths."""
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "jettison", ""


def emit_program(
    program: Program,
    folder: Path,
    *,
    accuracy_level: int = 4,
    prefill: str = "exact",
    on_bytes: Callable[[int], None] | None = None,
) -> list[EmittedGraph]:
    """Write a program as `model.onnx`, or as `prefill.onnx` and `decode.onnx`, over one `model.onnx.data`.

    Entries that move tokens have graphs of their own: `evict.onnx`, `store.onnx`, `load.onnx`.

    Entries with the same text share one graph that is general in the number of tokens.

    Args:
        program: What to write.
        folder: An existing folder.
        accuracy_level: See `emit_entry`.
        prefill: `fast` writes `prefill.fast.onnx` as well; see `fast_prefill`.
        on_bytes: Progress over the weight file.

    Returns:
        One description per file.

    Raises:
        UnsupportedError: ONNX has no counterpart of an operator, or no kernel for a weight format.
        CodegenError: A graph cannot be lowered.
    """
    require_kernels(program)
    writer = writer_for(program, folder, on_bytes)
    if prefill == "fast" and isinstance(writer, SegmentWriter):
        raise UnsupportedError(
            '[onnx] prefill="fast" keeps a second copy of the weights in memory, and these are to be read from disk. '
            'Use prefill="exact", or pin all weights.'
        )
    program = pack_projections(cut_into_slabs(spell_out_experts(program)))
    entries = [name for name in program.entries if name not in program.state_entries]
    is_one_graph = len(entries) == 1 or (len(entries) == 2 and _same_graph(*map(program.entries.get, entries)))
    if is_one_graph:
        plan = [(entries[0], "model.onnx", tuple(entries), False)]
    else:
        plan = [(name, f"{name}.onnx", (name,), False) for name in entries]
    plan += [(name, f"{name}.onnx", (name,), False) for name in program.state_entries]
    if prefill == "fast" and "prefill" in entries:
        plan.append(("prefill", "prefill.fast.onnx", ("prefill",), True))
    with writer as data:
        return [
            emit_entry(program, name, folder / file, data, serves=serves, accuracy_level=accuracy_level, is_fast=fast)
            for name, file, serves, fast in plan
        ]


def _same_graph(left: fx.GraphModule, right: fx.GraphModule) -> bool:
    from jettison.ir.text import _entry_lines, _Namer

    return _entry_lines("x", left, _Namer()) == _entry_lines("x", right, _Namer())


def weight_bytes(program: Program) -> int:
    """Bytes of the weights in an ONNX artifact; its weight file also has tables of angles, and padding."""
    return sum(
        program.constants[name].nbytes
        for name in {name for entry in program.entries.values() for name in constant_placeholders(entry)}
    )
