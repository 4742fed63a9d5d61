"""Capture: an `nn.Module` to a Program through `torch.export`, without allocating a single weight.

The module is copied with fake parameters of the compute dtype, exported with dynamic batch and length, turned into a
graph whose placeholders name constants, and compared with the eager module on a few tokens before it is returned.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from jettison.ir import ops as _register_ops  # noqa: F401
from jettison.ir.capture_source import (
    DEFAULT_CONTEXT,
    CaptureSource,
    ModelCall,
    example_inputs,
    first_line,
    module_inputs,
    quiet,
)
from jettison.ir.constants import Constant
from jettison.ir.eager_check import check_against_eager
from jettison.ir.edit import placeholder_name
from jettison.ir.errors import CaptureError, JettisonError
from jettison.ir.match import arguments
from jettison.ir.program import ModelInfo, Program, placeholders
from jettison.ir.torch_export import export_module
from jettison.ir.trail import TRACED_SHAPE, Trail
from jettison.ir.verify import verify


def fake_copy(module: nn.Module, dtype: torch.dtype, mode: FakeTensorMode) -> nn.Module:
    """A copy of `module` whose parameters are fake and floating ones have `dtype`; buffers are real."""
    memo: dict[int, Any] = {}
    with mode:
        for parameter in module.parameters():
            kind = dtype if parameter.is_floating_point() else parameter.dtype
            memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=kind), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to(dtype) if buffer.is_floating_point() and buffer.dtype != torch.float32 else buffer
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError) as error:  # what deepcopy raises on locks, handles and non-leaf tensors
        raise CaptureError(
            f"[capture] {type(module).__name__} cannot be copied: {first_line(error)}. Capture traces a copy without "
            "weights, so that the module stays as it is: keep files, locks and computed tensors out of its attributes."
        ) from error


def _export(skeleton: nn.Module, source: CaptureSource, vocab_size: int) -> tuple[torch.export.ExportedProgram, Trail]:
    """Trace the module, dynamic in batch and length."""
    trail = Trail(skeleton)
    wrapper = ModelCall(skeleton, source, trail)
    rows, length = TRACED_SHAPE
    example = example_inputs(source.inputs, vocab_size, rows, min(length, source.context))
    try:
        try:
            exported = _trace(wrapper, example, source.context)
        except torch._dynamo.exc.UserError as error:
            if f"!= {source.context}" not in str(error):
                raise
            # A slice of a buffer that holds the whole context (a causal mask, a table of positions): torch.export
            # takes the whole of it for another case. That length is compared with the eager model instead.
            exported = _trace(wrapper, example, source.context - 1)
            trail.is_whole_context_apart = True
        if _needs_functionalisation(exported):
            with quiet():
                exported = exported.run_decompositions({})
    except JettisonError as error:
        found = str(error).removeprefix("[capture] ")
        raise type(error)(f"[capture] {_place(trail.running(), source)}: {found}") from error
    except Exception as error:  # torch.export raises whatever the model raises
        raise CaptureError(_export_failure(source, trail, error)) from error
    return exported, trail


def _trace(wrapper: ModelCall, example: dict[str, Tensor], longest: int) -> torch.export.ExportedProgram:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("sequence", max=longest)
    shapes = (tuple({0: batch, 1: length} for _ in example),)
    with torch.no_grad(), wrapper.source.tracing(), quiet():
        return export_module(wrapper, tuple(example.values()), shapes)


def _place(submodule: str, source: CaptureSource) -> str:
    return f"{submodule} in {source.name}" if submodule else source.name


def _needs_functionalisation(exported: torch.export.ExportedProgram) -> bool:
    nodes = exported.graph.nodes
    overloads = (node.target for node in nodes if isinstance(node.target, torch._ops.OpOverload))
    return any(node.op == "get_attr" for node in nodes) or any(target._schema.is_mutable for target in overloads)


def _export_failure(source: CaptureSource, trail: Trail, error: Exception) -> str:
    text = str(error)
    if isinstance(error, torch._dynamo.exc.UserError) and "Constraints violated" in text:
        where = _place(trail.assumes_length(source.context), source)
        details = [line.strip(" -") for line in text.splitlines()[1:] if line.strip().startswith("- ")]
        reason = details[0] if details else first_line(error)
        return (
            f"[capture] {where}: its forward works for one length only, or treats lengths apart: {reason[:300]}\n"
            "The graph must be dynamic in batch and length. A forward that loops over tokens (recurrent and "
            "state-space layers) or computes Python numbers from the length cannot be captured: use a model whose "
            "layers attend, or rewrite that part with tensor operations."
        )
    cause = re.search(r"Caused by: \((.+?)\)", text)
    reason = first_line(error) + (f" (at {cause.group(1)})" if cause else "")
    return (
        f"[capture] {_place(trail.running(), source)}: torch.export stopped at {type(error).__name__}: {reason}\n"
        "The whole model must be one graph that is dynamic in batch and length, without branches on tensor values. "
        "Rewrite that forward with torch.where, or pass a submodule that exports."
    )


def _convert(exported: torch.export.ExportedProgram, names: Mapping[str, str]) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Graph with constants, states and inputs as placeholders; and the tensors of lifted constants by name."""
    signature = exported.graph_signature
    lifted: dict[str, Any] = {}
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    by_constant: dict[str, fx.Node] = {}
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    targets.update(getattr(signature, "inputs_to_lifted_tensor_constants", {}))
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in targets:
            target = targets[node.name]
            name = names.get(target, target).removeprefix("module.")
            if name not in by_constant:
                by_constant[name] = graph.placeholder(placeholder_name(name))
                by_constant[name].meta = {"val": node.meta["val"], "constant": name}
                lifted[name] = exported.state_dict.get(target, exported.constants.get(target))
            mapping[node] = by_constant[name]
        elif node.op == "output":
            graph.output(tuple(mapping[value] for value in _user_outputs(exported, node)))
        elif _is_whole_copy(node):
            mapping[node] = mapping[node.args[1]]
        else:
            mapping[node] = graph.node_copy(node, lambda old: mapping[old])
            # Assertions return nothing; functionalisation leaves them without metadata.
            mapping[node].meta = {"val": node.meta.get("val")}
            if _where(node):
                mapping[node].meta["where"] = _where(node)
    _split_stacks(graph)
    return fx.GraphModule(nn.Module(), graph), lifted


def _split_stacks(graph: fx.Graph) -> None:
    """Make each matrix that is read from a stack (the weights of experts) a constant of its own: a view, not a copy."""
    parts: dict[tuple[str, int], fx.Node] = {}
    for node in list(graph.nodes):
        stack: Any = node.args[0] if node.target is torch.ops.aten.select.int else None
        is_stack = isinstance(stack, fx.Node) and "constant" in stack.meta and node.args[1] == 0
        if not is_stack or not isinstance(node.args[2], int):
            continue
        key = name, row = stack.meta["constant"], node.args[2] % stack.meta["val"].shape[0]
        if key not in parts:
            with graph.inserting_before(stack):
                parts[key] = graph.placeholder(placeholder_name(f"{name}.{row}"))
            parts[key].meta = {"val": node.meta["val"], "constant": f"{name}.{row}", "stack": key}
        node.replace_all_uses_with(parts[key])
        graph.erase_node(node)
        if not stack.users:
            graph.erase_node(stack)


def _where(node: fx.Node) -> str:
    """Path of the submodule whose forward made a node."""
    # torch.export names a hook of its own as the place of some sizes.
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if not path.startswith("_empty_nn")]
    return paths[-1].removeprefix("module").removeprefix(".") if paths else ""


def _is_whole_copy(node: fx.Node) -> bool:
    """Whether a node overwrites a whole tensor with another of its type: its value is the other."""
    if node.target is not torch.ops.aten.copy.default:
        return False
    old, new = node.args[0].meta["val"], node.args[1].meta["val"]
    return (old.shape, old.dtype) == (new.shape, new.dtype)


def _user_outputs(exported: torch.export.ExportedProgram, output: fx.Node) -> list[fx.Node]:
    """What the module returns, without the buffers it writes to.

    Raises:
        CaptureError: A buffer is written to and read: a call would depend on the calls before it.
    """
    signature = exported.graph_signature
    for node in exported.graph.nodes:
        buffer = signature.inputs_to_buffers.get(node.name)
        if node.op != "placeholder" or buffer not in signature.buffers_to_mutate.values():
            continue
        readers = [user for user in node.users if not (_is_whole_copy(user) and user.args[0] is node)]
        if readers:
            raise CaptureError(
                f"[capture] {_where(readers[0]) or 'forward'}: writes to its buffer {buffer.removeprefix('module.')} "
                "and reads it, so one call depends on those before it. A program keeps nothing between calls but its "
                "KV cache: compute the value from the inputs instead."
            )
    user_kind = torch.export.graph_signature.OutputKind.USER_OUTPUT
    kinds = [spec.kind for spec in signature.output_specs]
    return [value for value, kind in zip(output.args[0], kinds, strict=True) if kind == user_kind]


def capture(source: CaptureSource, dtype: torch.dtype = torch.float32) -> Program:
    """Capture a module as a Program with one entry, `forward`.

    The module is left as it was: weights, mode (`training`) and attention implementation.

    Args:
        source: The module, its weights and its facts.
        dtype: What the graph computes in; weights keep their stored dtype and are converted when read.

    Returns:
        A verified program that computes what the eager module computes.

    Raises:
        CaptureError: The module cannot be exported, or the graph does not compute what the module computes.
        UnsupportedError: It is a kind of model that jettison does not handle.
    """
    _require_cpu(source)
    vocab_size = source.vocab_size or _vocab_size(source.module)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    skeleton = fake_copy(source.module, dtype, mode).eval()
    exported, trail = _export(skeleton, source, vocab_size)
    aliases = _first_names(skeleton)
    entry, lifted = _convert(exported, {f"module.{name}": f"module.{first}" for name, first in aliases.items()})
    _name_inputs(entry, source.inputs)
    entry.graph.eliminate_dead_code()
    _refuse_operators(entry, source)
    info = ModelInfo(source.kind or "decoder", source.name, source.context, vocab_size)
    constants = _constants(entry, source, lifted)
    packed = {name: weight for name, weight in source.packed.items() if constants.keys() >= set(weight.parts.values())}
    program = Program({"forward": entry}, constants, info, trail.outputs, packed)
    verify(program)
    if source.eager is not None:
        check_against_eager(program, source, dtype, source.context if trail.is_whole_context_apart else None)
    return program


def _name_inputs(entry: fx.GraphModule, names: tuple[str, ...]) -> None:
    """Give the run-time inputs their names; a node that torch.export happened to call so gets another one."""
    inputs = [node for node in placeholders(entry) if "constant" not in node.meta]
    for node in entry.graph.nodes:
        if node.name in names and node not in inputs:
            node.name = entry.graph._graph_namespace.create_name(f"{node.name}_value", node)
    for node, name in zip(inputs, names, strict=True):
        node.name = node.target = name


def _require_cpu(source: CaptureSource) -> None:
    for name, tensor in source.weights.items():
        if tensor.device.type not in ("cpu", "meta"):
            raise CaptureError(
                f"[capture] {name} of {source.name} is on {tensor.device}: needed the CPU, where weights are "
                "rewritten. Move the model with model.cpu(), or pass its folder."
            )


def _constants(entry: fx.GraphModule, source: CaptureSource, lifted: Mapping[str, Any]) -> dict[str, Constant]:
    constants = {}
    for node in placeholders(entry):
        if "constant" not in node.meta:
            continue
        name, row = node.meta.pop("stack", (node.meta["constant"], None))
        stored = source.weights.get(name, lifted[name])
        if stored is None or stored.device.type == "meta" or type(stored).__name__ == "FakeTensor":
            raise CaptureError(
                f"[capture] {name} of {source.name} has no values (it is on the meta device). Load the weights before "
                "capture, or pass the model's folder."
            )
        stored = stored.detach() if row is None else stored.detach()[row]
        constants[node.meta["constant"]] = Constant(node.meta["constant"], stored, node.meta["val"].dtype)
    return constants


def _refuse_operators(entry: fx.GraphModule, source: CaptureSource) -> None:
    """Refuse a graph that draws random numbers, or whose sizes depend on the values of tensors."""
    for node in entry.graph.nodes:
        place = _place(node.meta.get("where", ""), source)
        if node.op == "call_function" and free_unbacked_symbols(node.meta["val"]):
            raise CaptureError(
                f"[capture] {place}: {node.name} has a size that depends on the values of a tensor. Sizes must follow "
                "from batch and length: use masks and torch.where instead of .item(), .tolist(), nonzero and indexing "
                "by booleans."
            )
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
            continue
        operands = arguments(node)
        is_off = operands.get("train") is False or operands.get("training") is False or operands.get("dropout_p") == 0
        if node.users and not is_off:
            raise CaptureError(
                f"[capture] {place}: draws random numbers ({target.name()}) in eval mode, so two calls differ. Make it "
                "depend on `self.training`, or compute the values from the inputs."
            )


def _first_names(module: nn.Module) -> dict[str, str]:
    """First name of the object behind every parameter and buffer name (tied weights have several)."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            names[name] = first.setdefault(id(tensor), name)
    return names


def _vocab_size(module: nn.Module) -> int:
    sizes = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)]
    if not sizes:
        raise CaptureError(
            f"[capture] {type(module).__name__} has no nn.Embedding: the vocabulary size is unknown. "
            "Give `vocab_size` as an attribute of the module."
        )
    return getattr(module, "vocab_size", None) or sizes[0]


def capture_module(
    module: nn.Module, *, context: int | None = None, dtype: torch.dtype = torch.float32, kind: str | None = None
) -> Program:
    """Capture a plain module whose forward takes `input_ids` (and perhaps `position_ids`, `attention_mask`).

    Args:
        module: Any module; its parameters are shared with the program, not copied.
        context: Most positions of a sequence; default the module's `context` attribute, or 2048.
        dtype: What the graph computes in.
        kind: `decoder`, `encoder`, or None: a decoder if no token sees later ones.

    Returns:
        The program.

    Raises:
        CaptureError: See `capture`.
    """
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    source = CaptureSource(
        module=module,
        eager=lambda: module,
        weights=weights,
        inputs=module_inputs(module),
        name=type(module).__name__,
        context=context or getattr(module, "context", None) or DEFAULT_CONTEXT,
        kind=kind,
    )
    return capture(source, dtype)
