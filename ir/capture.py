"""Capture: an `nn.Module` to a Program through `torch.export`, without allocating a single weight.

The module is copied with fake parameters of the compute dtype, exported with dynamic batch and length, turned into a
graph whose placeholders name constants, and compared with the eager module on a few tokens before it is returned.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from jettison.ir import ops as _register_ops  # noqa: F401
from jettison.ir.constants import Constant
from jettison.ir.errors import CaptureError
from jettison.ir.interpret import run_entry
from jettison.ir.program import ModelInfo, Program, placeholders
from jettison.ir.upcast import UpcastWeights
from jettison.ir.verify import verify

# Largest |captured - eager| over the largest |eager|: the bound the capture promises, in fp32 and in bf16 or fp16.
CAPTURE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
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
        kind: `decoder`, `encoder`, or None to decide from the captured attention.
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


class _Forward(nn.Module):
    """Calls a module by keyword and flattens what it returns to a tuple of tensors."""

    def __init__(self, module: nn.Module, source: CaptureSource, report: Callable[[tuple[str, ...]], None]) -> None:
        super().__init__()
        self.module = module
        self._names, self._call = source.inputs, source.call
        # A function, since torch.export undoes changes of attributes during tracing.
        self._report = report

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        returned = self.module(**dict(zip(self._names, inputs, strict=True)), **self._call)
        if isinstance(returned, Tensor):
            named = {"logits": returned}
        elif hasattr(returned, "keys"):
            named = {key: returned[key] for key in returned.keys() if isinstance(returned[key], Tensor)}  # noqa: SIM118
        else:
            named = {"logits": returned[0]}
        self._report(tuple(named))
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


def fake_copy(module: nn.Module, dtype: torch.dtype, mode: FakeTensorMode) -> nn.Module:
    """A copy of `module` whose parameters are fake and floating ones have `dtype`; buffers are real."""
    memo: dict[int, Any] = {}
    with mode:
        for parameter in module.parameters():
            kind = dtype if parameter.is_floating_point() else parameter.dtype
            memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=kind), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to(dtype) if buffer.is_floating_point() and buffer.dtype != torch.float32 else buffer
    return copy.deepcopy(module, memo)


def _example(names: tuple[str, ...], vocab_size: int, rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    known = {
        "input_ids": torch.randint(0, max(vocab_size, 1), (rows, length), generator=generator),
        "position_ids": torch.arange(length)[None].repeat(rows, 1),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        "token_type_ids": torch.zeros(rows, length, dtype=torch.int64),
    }
    return {name: known[name] for name in names}


def _export(wrapper: _Forward, source: CaptureSource, vocab_size: int) -> torch.export.ExportedProgram:
    example = _example(source.inputs, vocab_size, rows=2, length=5)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("sequence", max=source.context)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch and transformers, not the user's
            exported = torch.export.export(
                wrapper,
                tuple(example.values()),
                dynamic_shapes=(tuple({0: batch, 1: length} for _ in example),),
                strict=False,
            )
            if _needs_functionalisation(exported):
                exported = exported.run_decompositions({})
    except Exception as error:  # torch.export raises whatever the model raises
        raise CaptureError(_export_failure(source, error)) from error
    return exported


def _needs_functionalisation(exported: torch.export.ExportedProgram) -> bool:
    for node in exported.graph.nodes:
        if node.op == "get_attr" or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
            return True
    return False


def _export_failure(source: CaptureSource, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and traceback.tb_frame.f_code.co_name == "forward":
            frames.append(owner)
        traceback = traceback.tb_next
    names = {id(module): name for name, module in source.module.named_modules()}
    types = [type(module).__name__ for module in frames if not isinstance(module, _Forward)]
    inside = types[-1] if types else source.name
    path = next((names[id(module)] for module in reversed(frames) if names.get(id(module))), "")
    where = f"{path} ({inside})" if path else inside
    return (
        f"[capture] {where} in {source.name}: torch.export stopped at: {type(error).__name__}: {reason[:300]}\n"
        "The whole model must be one graph that is dynamic in batch and length, without branches on tensor values. "
        "Rewrite that forward with torch.where or torch.cond, or pass a submodule that exports."
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
                by_constant[name] = graph.placeholder(_identifier(name))
                by_constant[name].meta = {"val": node.meta["val"], "constant": name}
                lifted[name] = exported.state_dict.get(target, exported.constants.get(target))
            mapping[node] = by_constant[name]
            continue
        if node.op == "get_attr":
            raise CaptureError(
                f"[capture] {node.target}: a submodule call remains in the exported graph ({node.name})."
            )
        mapping[node] = graph.node_copy(node, lambda old: mapping[old])
        mapping[node].meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        stack = node.meta.get("nn_module_stack")
        if stack:
            mapping[node].meta["where"] = list(stack.values())[-1][0].removeprefix("module").removeprefix(".")
    outputs = next(node for node in reversed(graph.nodes) if node.op == "output")
    outputs.args = (tuple(outputs.args[0]),)
    return fx.GraphModule(nn.Module(), graph), lifted


def _identifier(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def capture(source: CaptureSource, dtype: torch.dtype = torch.float32) -> Program:
    """Capture a module as a Program with one entry, `forward`.

    Args:
        source: The module, its weights and its facts.
        dtype: What the graph computes in; weights keep their stored dtype and are converted when read.

    Returns:
        A verified program that computes what the eager module computes.

    Raises:
        CaptureError: The module cannot be exported, or the graph does not compute what the module computes.
    """
    vocab_size = source.vocab_size or _vocab_size(source.module)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    skeleton = fake_copy(source.module, dtype, mode).eval()
    outputs: list[tuple[str, ...]] = []
    wrapper = _Forward(skeleton, source, outputs.append)
    exported = _export(wrapper, source, vocab_size)
    aliases = _first_names(skeleton)
    entry, lifted = _convert(exported, {f"module.{name}": f"module.{first}" for name, first in aliases.items()})
    for node, name in zip([n for n in placeholders(entry) if "constant" not in n.meta], source.inputs, strict=True):
        node.name = node.target = name
    constants = {}
    for node in placeholders(entry):
        if "constant" in node.meta:
            name = node.meta["constant"]
            stored = source.weights.get(name, lifted[name])
            if stored is None or stored.device.type == "meta" or type(stored).__name__ == "FakeTensor":
                raise CaptureError(f"[capture] {name}: the model has this parameter, but no weights for it were given.")
            constants[name] = Constant(name, stored.detach(), node.meta["val"].dtype)
    kind = source.kind or "decoder"
    info = ModelInfo(kind, source.name, source.context, vocab_size)
    program = Program({"forward": entry}, constants, info, outputs[-1])
    entry.graph.eliminate_dead_code()
    verify(program)
    if source.eager is not None:
        _check_against_eager(program, source, dtype)
    return program


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


@torch.no_grad()
def _check_against_eager(program: Program, source: CaptureSource, dtype: torch.dtype) -> None:
    example = _example(source.inputs, program.info.vocab_size, rows=2, length=6)
    assert source.eager is not None, "checked by the caller"
    eager = source.eager()
    with UpcastWeights(eager, dtype):
        expected = _Forward(eager, source, lambda names: None)(*example.values())
    for name, ours, theirs in zip(program.outputs, run_entry(program, "forward", example), expected, strict=True):
        error = (ours.double() - theirs.double()).abs().max().item()
        bound = CAPTURE_TOLERANCE[dtype] * theirs.double().abs().max().item()
        if not error <= bound:
            raise CaptureError(
                f"[capture] {source.name}: the captured graph differs from the eager model in {name} by {error:.3g}, "
                f"more than {bound:.3g}. The forward depends on something the trace did not see (a random choice, a "
                "value read from a tensor, the length of the input). Put the model in eval mode, or rewrite that part."
            )


def capture_module(
    module: nn.Module, *, context: int | None = None, dtype: torch.dtype = torch.float32, kind: str | None = None
) -> Program:
    """Capture a plain module whose forward takes `input_ids` (and perhaps `position_ids`, `attention_mask`).

    Args:
        module: Any module; its parameters are shared with the program, not copied.
        context: Most positions of a sequence; default the module's `context` attribute, or 2048.
        dtype: What the graph computes in.
        kind: `decoder`, `encoder`, or None: decided from the attention once it is raised.

    Returns:
        The program.

    Raises:
        CaptureError: See `capture`.
    """
    module = module.eval()
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
