"""Capture: an `nn.Module` to a Program through `torch.export`, without allocating a single weight.

The module is copied with fake parameters of the compute dtype, exported with dynamic batch and length, turned into a
graph whose placeholders name constants, and compared with the eager module on a few tokens before it is returned.
"""

from __future__ import annotations

import copy
import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from jettison.ir import ops as _register_ops  # noqa: F401
from jettison.ir.constants import Constant
from jettison.ir.edit import placeholder_name
from jettison.ir.errors import CaptureError, JettisonError
from jettison.ir.interpret import run_entry
from jettison.ir.match import arguments
from jettison.ir.program import ModelInfo, Program, placeholders
from jettison.ir.upcast import UpcastWeights, evaluating
from jettison.ir.verify import verify

# Largest |captured - eager| over the largest |eager|: the bound the capture promises, in fp32 and in bf16 or fp16.
CAPTURE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
DEFAULT_CONTEXT = 2048
# Tokens of the trace and of the comparison with the eager model; no size may be 0 or 1, which torch.export specialises.
_TRACED_SHAPE = (2, 5)
_CHECKED_SHAPE = (2, 6)
# Lengths at which the trace's assumptions are tried, to find the submodule that made one.
_PROBED_LENGTHS = (2, 3, 7, 61, 64, 127)
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
        tracing: A context to trace in.
        kind: `decoder`, `encoder`, or None to find out whether tokens see later ones.
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
    tracing: Callable[[], AbstractContextManager[None]] = nullcontext


class _Forward(nn.Module):
    """Calls a module by keyword and flattens what it returns to a tuple of tensors."""

    def __init__(self, module: nn.Module, source: CaptureSource, trail: _Trail | None = None) -> None:
        super().__init__()
        self.module = module
        self.source = source
        self._trail = trail

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        source, trail = self.source, self._trail
        if trail is not None:
            trail.begin(inputs)
        returned = self.module(**dict(zip(source.inputs, inputs, strict=True)), **source.call)
        named: dict[str, Any] = {"logits": returned}
        if hasattr(returned, "keys"):
            named = {key: returned[key] for key in returned.keys()}  # noqa: SIM118 (model outputs iterate over values)
            if source.kind == "decoder" and "logits" in named:
                named = {"logits": named["logits"]}  # router losses and the like are for training
        elif isinstance(returned, (tuple, list)) and returned:
            named = {"logits": returned[0]}
        named = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        if not named:
            raise CaptureError(
                f"[capture] {source.name}.forward returns {type(returned).__name__}: needed a tensor, a tuple that "
                "begins with one, or a mapping that holds one. Wrap the module in one that returns its logits."
            )
        if trail is not None:
            trail.outputs = tuple(named)
        return tuple(named.values())


class _Trail:
    """Which submodule was running when, so that a failure of the trace can name it.

    Attributes:
        outputs: Names of what the last traced forward returned.
        is_whole_context_apart: Whether torch.export takes a sequence as long as the context for a case of its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.outputs: tuple[str, ...] = ()
        self.is_whole_context_apart = False
        self._types = {path: type(each).__name__ for path, each in module.named_modules()}
        self._running = [""]
        self._lengths: list[Any] = []
        # (number of assumptions made so far, submodule that was running until now)
        self._events: list[tuple[int, str]] = []
        for path, each in module.named_modules():
            if path:
                each.register_forward_pre_hook(lambda *_, path=path: self._enter(path))
                each.register_forward_hook(lambda *_: self._leave())

    def begin(self, inputs: Sequence[Tensor]) -> None:
        """A forward begins; the sizes of its inputs lead to torch's list of assumptions."""
        self._running, self._events, self._lengths = [""], [], [each.shape[1] for each in inputs]

    def _guards(self) -> Sequence[Any]:
        # Not public: without it a failure is still reported, less precisely.
        node = getattr(self._lengths[0], "node", None) if self._lengths else None
        return getattr(getattr(node, "shape_env", None), "guards", ())

    def _enter(self, path: str) -> None:
        self._events.append((len(self._guards()), self._running[-1]))
        self._running.append(path)

    def _leave(self) -> None:
        self._events.append((len(self._guards()), self._running.pop()))

    def running(self) -> str:
        """The submodule that was running last, e.g. `layers.0.mlp (GatedMlp)`; empty for the module itself."""
        return self._named(self._running[-1])

    def _named(self, path: str) -> str:
        return f"{path} ({self._types[path]})" if path else ""

    def assumes_length(self, context: int) -> str:
        """The first submodule that assumes something about the length which some length breaks; empty if unknown."""
        symbols = {getattr(getattr(length, "node", None), "_expr", None) for length in self._lengths} - {None}
        for number, guard in enumerate(self._guards()):
            rows = dict.fromkeys(guard.expr.free_symbols - symbols, _TRACED_SHAPE[0])
            lengths = (length for length in _PROBED_LENGTHS if length <= context)
            tried = (guard.expr.subs({**rows, **dict.fromkeys(symbols, length)}) for length in lengths)
            if any(holds == False for holds in tried):  # noqa: E712 (sympy's own false)
                return self._named(next((path for count, path in self._events if count > number), ""))
        return ""


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
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError) as error:  # what deepcopy raises on locks, handles and non-leaf tensors
        raise CaptureError(
            f"[capture] {type(module).__name__} cannot be copied: {_first_line(error)}. Capture traces a copy without "
            "weights, so that the module stays as it is: keep files, locks and computed tensors out of its attributes."
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _example(names: tuple[str, ...], vocab_size: int, rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    known = {
        "input_ids": torch.randint(0, max(vocab_size, 1), (rows, length), generator=generator),
        "position_ids": torch.arange(length)[None].repeat(rows, 1),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        "token_type_ids": torch.zeros(rows, length, dtype=torch.int64),
    }
    return {name: known[name] for name in names}


def _export(skeleton: nn.Module, source: CaptureSource, vocab_size: int) -> tuple[torch.export.ExportedProgram, _Trail]:
    """Trace the module, dynamic in batch and length."""
    trail = _Trail(skeleton)
    wrapper = _Forward(skeleton, source, trail)
    rows, length = _TRACED_SHAPE
    example = _example(source.inputs, vocab_size, rows, min(length, source.context))
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
            with _quiet():
                exported = exported.run_decompositions({})
    except JettisonError as error:
        found = str(error).removeprefix("[capture] ")
        raise type(error)(f"[capture] {_place(trail.running(), source)}: {found}") from error
    except Exception as error:  # torch.export raises whatever the model raises
        raise CaptureError(_export_failure(source, trail, error)) from error
    return exported, trail


def _trace(wrapper: _Forward, example: dict[str, Tensor], longest: int) -> torch.export.ExportedProgram:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("sequence", max=longest)
    shapes = (tuple({0: batch, 1: length} for _ in example),)
    with torch.no_grad(), wrapper.source.tracing(), _quiet():
        return torch.export.export(wrapper, tuple(example.values()), dynamic_shapes=shapes, strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence deprecations inside torch and transformers, and torch.export's dump of a graph it stopped at."""
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.export._trace")]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger in loggers:
                logger.disabled = False


def _place(submodule: str, source: CaptureSource) -> str:
    return f"{submodule} in {source.name}" if submodule else source.name


def _needs_functionalisation(exported: torch.export.ExportedProgram) -> bool:
    nodes = exported.graph.nodes
    overloads = (node.target for node in nodes if isinstance(node.target, torch._ops.OpOverload))
    return any(node.op == "get_attr" for node in nodes) or any(target._schema.is_mutable for target in overloads)


def _export_failure(source: CaptureSource, trail: _Trail, error: Exception) -> str:
    text = str(error)
    if isinstance(error, torch._dynamo.exc.UserError) and "Constraints violated" in text:
        where = _place(trail.assumes_length(source.context), source)
        details = [line.strip(" -") for line in text.splitlines()[1:] if line.strip().startswith("- ")]
        reason = details[0] if details else _first_line(error)
        return (
            f"[capture] {where}: its forward works for one length only, or treats lengths apart: {reason[:300]}\n"
            "The graph must be dynamic in batch and length. A forward that loops over tokens (recurrent and "
            "state-space layers) or computes Python numbers from the length cannot be captured: use a model whose "
            "layers attend, or rewrite that part with tensor operations."
        )
    cause = re.search(r"Caused by: \((.+?)\)", text)
    reason = _first_line(error) + (f" (at {cause.group(1)})" if cause else "")
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
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0].removeprefix("module").removeprefix(".") if stack else ""


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
    for node, name in zip([n for n in placeholders(entry) if "constant" not in n.meta], source.inputs, strict=True):
        node.name = node.target = name
    entry.graph.eliminate_dead_code()
    _refuse_operators(entry, source)
    info = ModelInfo(source.kind or "decoder", source.name, source.context, vocab_size)
    program = Program({"forward": entry}, _constants(entry, source, lifted), info, trail.outputs)
    verify(program)
    if source.eager is not None:
        _check_against_eager(program, source, dtype, source.context if trail.is_whole_context_apart else None)
    return program


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


@torch.no_grad()
def _check_against_eager(program: Program, source: CaptureSource, dtype: torch.dtype, special: int | None) -> None:
    """Compare with the eager module on a few tokens, and set `info.kind` by whether tokens see later ones.

    Raises:
        CaptureError: The graph computes something else, here or at the length `special`.
    """
    assert source.eager is not None, "checked by the caller"
    rows, length = _CHECKED_SHAPE
    shapes = [(rows, min(length, source.context))]
    if special is not None:
        shapes.append((1, special))
    eager = source.eager()
    for shape in shapes:
        example = _example(source.inputs, program.info.vocab_size, *shape)
        expected = _eager_outputs(eager, source, example, dtype)
        captured = run_entry(program, "forward", example)
        for number, (ours, theirs) in enumerate(zip(captured, expected, strict=True)):
            if ours.shape != theirs.shape or not _is_close(ours, theirs, CAPTURE_TOLERANCE[dtype]):
                again = _eager_outputs(eager, source, example, dtype)[number]
                _refuse_difference(f"{program.outputs[number]} of {source.name}", ours, theirs, again, dtype)
        if shape is shapes[0]:
            program.info = _with_kind(program, source, captured[0], example, dtype)


def _eager_outputs(
    eager: nn.Module, source: CaptureSource, example: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    try:
        with evaluating(eager), UpcastWeights(eager, dtype), _quiet():
            return _Forward(eager, source)(*example.values())
    except Exception as error:  # whatever the model raises
        raise CaptureError(
            f"[capture] {source.name}: its graph was captured, but the eager model fails with {type(error).__name__}: "
            f"{_first_line(error)}. Check that it runs by itself on {', '.join(example)}, on the CPU."
        ) from error


def _is_close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    error = (ours.double() - theirs.double()).abs().max().item()
    return error <= tolerance * theirs.double().abs().max().item()


def _refuse_difference(name: str, ours: Tensor, theirs: Tensor, again: Tensor, dtype: torch.dtype) -> NoReturn:
    """Say why the graph's value and the eager one may differ; `again` is the eager one of another call."""
    if again.shape == theirs.shape and not theirs.isfinite().all():
        raise CaptureError(
            f"[capture] {name}: the eager model returns NaN or infinite values. Check the weights; a model trained in "
            "bf16 overflows in float16."
        )
    if again.shape != theirs.shape or not _is_close(again, theirs, CAPTURE_TOLERANCE[dtype]):
        raise CaptureError(
            f"[capture] {name}: two calls of the eager model with the same tokens differ, also in eval mode. It draws "
            "random numbers or keeps something between calls. Remove that before capture."
        )
    found = f"shape {list(ours.shape)}, not {list(theirs.shape)}"
    if ours.shape == theirs.shape:
        error, largest = (ours.double() - theirs.double()).abs().max().item(), theirs.double().abs().max().item()
        found = f"an error of {error:.3g}, more than {CAPTURE_TOLERANCE[dtype]:g} of the largest value {largest:.3g}"
    raise CaptureError(
        f"[capture] {name}: the captured graph differs from the eager model: {found}. The forward depends on something "
        "the trace did not see (a Python number computed from the inputs, a global). Use tensor operations there."
    )


def _with_kind(
    program: Program, source: CaptureSource, captured: Tensor, example: dict[str, Tensor], dtype: torch.dtype
) -> ModelInfo:
    """The program's facts, with `kind` found out where the source does not say.

    The first token alone must give what it gives with others behind it and in a larger batch: that is what a KV cache
    rests on. It also tries the sizes that torch.export knows least about, one row and one token.
    """
    if source.kind == "encoder" or captured.dim() < 3 or captured.shape[:2] != example["input_ids"].shape:
        return replace(program.info, kind="encoder")
    first = {name: value[:1, :1] for name, value in example.items()}
    alone, among = run_entry(program, "forward", first)[0], captured[:1, :1]
    # Rounding differs between sizes, less than what a token that is seen makes.
    if alone.shape == among.shape and _is_close(alone, among, CAPTURE_TOLERANCE[dtype] / 10):
        return replace(program.info, kind="decoder")
    if source.kind == "decoder":
        raise CaptureError(
            f"[capture] {source.name}: the logits of a token depend on later tokens or on other rows of the batch, so "
            "it cannot generate token by token. Needed causal attention; a model that sees both ways is an encoder."
        )
    return replace(program.info, kind="encoder")


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
