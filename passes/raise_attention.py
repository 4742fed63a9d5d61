"""Raise scaled dot-product attention to `jettison.attention`, whose mask is data instead of a tensor of size S x T.

Before:
    %7: i64[s1] = aten.arange(%1, device=cpu, pin_memory=False)
    %8: i64[s1,1] = aten.unsqueeze(%7, 1)
    %9: bool[s1,s1] = aten.le.Tensor(%7, %8)
    %10: f32[s0,4,s1,8] = aten.scaled_dot_product_attention(%query, %key, %value, %9)
After:
    %7: f32[s0,4,s1,8] = jettison.attention(%query, %key, %value, None, None, None, None, 0.35355, True, 0, 0.0)

Fires when: the mask is absent, causal, a causal sliding window or the padding of `attention_mask`, or several of these.
    A mask is recognised by what it is, not by how it is built: its part of the graph is run at several batch sizes and
    lengths, with position ids 0, 1, ..., and must show every real token exactly the keys that the operator shows it.
Declines when: the mask adds anything else (ALiBi), follows another pattern, differs between heads, or depends on more
    than sizes, positions, constants and `attention_mask`; queries, keys and values are not `[B, H, S, D]` over the
    whole sequence.
Numerics: reassociates (1e-6 relative in fp32). A score lowered by 1e4 or more counts as hidden. The rows of padding
    tokens, which nobody reads, may differ.
Saves: the mask (S * T elements) and what builds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from jettison.ir.edit import Edit
from jettison.ir.match import Miss, arguments, is_call
from jettison.ir.ops import attention
from jettison.ir.ops.attention import visible_keys
from jettison.ir.program import MissRecord, Program
from jettison.passes.base import Pass

aten = torch.ops.aten
# A score lowered by this much (-1e4 as bf16 rounds it) is hidden: softmax gives it 0 beside ordinary scores.
HIDDEN = -9984.0
_PROBES = ((1, 1), (2, 5), (1, 33), (2, 67))
# Windows below this length are found by looking; longer ones by the numbers that occur in the mask's graph.
_LONG_PROBE = 2048
_LONGEST_PROBE = 8192
_NOT_KNOWN = "the mask is not causal, sliding-window or padding: "
# Operands of which only size and dtype are read, by position.
_SHAPE_OPERANDS = {
    aten.new_ones.default: 0, aten.new_zeros.default: 0, aten.new_full.default: 0, aten.new_empty.default: 0,
    aten.ones_like.default: 0, aten.zeros_like.default: 0, aten.full_like.default: 0, aten.empty_like.default: 0,
    aten.to.other: 1, aten.type_as.default: 1, aten.expand_as.default: 1, aten.view_as.default: 1,
}  # fmt: skip


@dataclass(frozen=True)
class MaskTerm:
    """One thing a mask does to the scores `[B, H, S, T]` in front of the softmax.

    Attributes:
        kind: `keep` (hide where the value is false), `hide` (where it is true), `add` or `multiply` (by 0 or 1).
        node: The value; broadcasts to the scores.
        weight: Factor on an added value.
        is_flat: Whether batch and heads are one axis here.
    """

    kind: str
    node: fx.Node
    weight: float = 1.0
    is_flat: bool = False


@dataclass(frozen=True)
class Visibility:
    """A mask as `jettison.attention` spells it."""

    is_causal: bool
    window: int = 0
    key_valid: fx.Node | None = None


@dataclass(frozen=True)
class AttentionOperands:
    """A candidate: operands as they stand, and the mask still to be proven.

    Attributes:
        last: The node to replace.
        query: `[B, H, S, D]`.
        key: `[B, Hkv, S, D]`, or `[B, Hkv, D, S]` if `is_key_transposed`.
        value: `[B, Hkv, S, Dv]`.
        mask: Terms of the mask, in any order.
        scale: Factor on the scores.
        softcap: 0 for none.
        is_key_transposed: See `key`.
    """

    last: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: tuple[MaskTerm, ...]
    scale: float
    softcap: float = 0.0
    is_key_transposed: bool = False


@dataclass(frozen=True)
class AttentionMatch:
    """Operands that fit the operator, and what its queries see."""

    operands: AttentionOperands
    visibility: Visibility


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "raise-attention"
    entries: ClassVar[tuple[str, ...] | None] = ("forward",)

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Rewrite every match; layers that share a mask share its proof."""
        with shared_proofs():
            return super().transform(program)

    def match(self, node: fx.Node, program: Program) -> AttentionMatch | Miss | None:
        """A call of PyTorch's attention."""
        if not is_call(node, aten.scaled_dot_product_attention.default):
            return None
        given = arguments(node)
        query, key, value, mask, scale = (given[n] for n in ("query", "key", "value", "attn_mask", "scale"))
        if given["dropout_p"]:
            return Miss("attention drops weights at random", node)
        if isinstance(scale, fx.Node):
            return Miss("the scale is not a number in the graph", node)
        terms: tuple[MaskTerm, ...] = ()
        if mask is not None:
            terms = (MaskTerm("keep" if mask.meta["val"].dtype == torch.bool else "add", mask),)
        if scale is None:
            scale = query.meta["val"].shape[-1] ** -0.5
        found = AttentionOperands(node, query, key, value, terms, float(scale))
        return check_attention(found, program, is_causal=given["is_causal"])

    def rewrite(self, match: AttentionMatch, edit: Edit) -> None:
        """Emit the operator."""
        emit_attention(match, edit)


def check_attention(operands: AttentionOperands, program: Program, *, is_causal: bool = False) -> AttentionMatch | Miss:
    """Check that operands fit `jettison.attention` and that their mask is one it knows.

    Args:
        operands: The candidate.
        program: The program it is in.
        is_causal: Whether attention without a mask is causal.

    Returns:
        The match, or what stands in the way.
    """
    last, query, key, value = operands.last, operands.query, operands.key, operands.value
    batch, length = sequence_sizes(last.graph)
    key_axis = 3 if operands.is_key_transposed else 2
    for name, operand, axis in (("queries", query, 2), ("keys", key, key_axis), ("values", value, 2)):
        shape = operand.meta["val"].shape
        if len(shape) != 4:
            return Miss(f"{name} have {len(shape)} axes, not [B, H, S, D]", last)
        if not (is_same_size(shape[0], batch) and is_same_size(shape[axis], length)):
            return Miss(f"{name} do not run over the batch and the whole sequence", last)
        if operand.meta["val"].dtype != last.meta["val"].dtype:
            return Miss(f"{name} and the result have different dtypes", last)
    heads, key_heads, value_heads = (n.meta["val"].shape[1] for n in (query, key, value))
    if not isinstance(heads, int) or key_heads != value_heads or heads % key_heads:
        return Miss(f"{heads} query, {key_heads} key and {value_heads} value heads do not form groups", last)
    if list(map(str, last.meta["val"].shape)) != [str(n) for n in (batch, heads, length, value.meta["val"].shape[3])]:
        return Miss("the result is not [B, H, S, D] for the queries' B, H and S", last)
    if not operands.mask:
        return AttentionMatch(operands, Visibility(is_causal))
    visibility = _visibility(operands.mask, heads, program)
    return visibility if isinstance(visibility, Miss) else AttentionMatch(operands, visibility)


def emit_attention(match: AttentionMatch, edit: Edit) -> None:
    """Replace a matched attention by the operator.

    Args:
        match: What `check_attention` found.
        edit: The entry it was found in; changed in place.
    """
    operands, seen = match.operands, match.visibility
    with edit.before(operands.last):
        key = operands.key
        if operands.is_key_transposed:
            key = edit.call(aten.transpose.int, key, 2, 3)
        fused = edit.call(
            attention, operands.query, key, operands.value, None, None, seen.key_valid, None,
            operands.scale, seen.is_causal, seen.window, operands.softcap,
        )  # fmt: skip
    if "where" in operands.last.meta:
        fused.meta["where"] = operands.last.meta["where"]
    edit.replace(operands.last, fused)


def sequence_sizes(graph: fx.Graph) -> tuple[Any, Any]:
    """Batch size and length of a graph's first input."""
    inputs = (n for n in graph.nodes if n.op == "placeholder" and not {"constant", "state"} & n.meta.keys())
    batch, length = next(inputs).meta["val"].shape
    return batch, length


def is_same_size(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Whether two sizes are the same expression; comparing the symbols themselves would add a guard."""
    return str(left) == str(right)


# What a mask shows, found by running it.

_proofs: ContextVar[dict[Any, Visibility | Miss] | None] = ContextVar("proofs", default=None)


@contextmanager
def shared_proofs() -> Iterator[None]:
    """Inside this block a mask that several layers read is proven once."""
    token = _proofs.set({})
    try:
        yield
    finally:
        _proofs.reset(token)


def _visibility(terms: tuple[MaskTerm, ...], heads: int, program: Program) -> Visibility | Miss:
    known = _proofs.get()
    proofs = {} if known is None else known
    if (terms, heads) not in proofs:
        proofs[terms, heads] = _prove(terms, heads, program)
    return proofs[terms, heads]


def mask_nodes(roots: Sequence[fx.Node]) -> list[fx.Node] | Miss:
    """The nodes that `roots` are computed from, operands first.

    Args:
        roots: Values of a mask.

    Returns:
        The nodes, sizes as leaves; or a Miss if one of them is computed from more than sizes, positions, constants
        and `attention_mask`.
    """
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            is_data = node.op == "placeholder" and "constant" not in node.meta
            if is_data and node.name not in ("position_ids", "attention_mask"):
                return Miss(f"{_NOT_KNOWN}it depends on the values of {node.name}", roots[0])
            stack.append((node, True))
            stack += [(operand, False) for operand in _operands_read(node)]
    return order


def _operands_read(node: fx.Node) -> list[fx.Node]:
    """Operands whose values (not only sizes) a node reads."""
    if isinstance(node.meta.get("val"), (int, torch.SymInt)):
        return []  # a size is an expression in batch and length
    position = _SHAPE_OPERANDS.get(node.target)
    others = [argument for at, argument in enumerate(node.args) if at != position]
    found: list[fx.Node] = []
    fx.map_arg((others, node.kwargs), found.append)
    return found


class _NotKnownError(Exception):
    """Why a mask is none that the operator knows."""


def _prove(terms: tuple[MaskTerm, ...], heads: int, program: Program) -> Visibility | Miss:
    roots = [term.node for term in terms]
    nodes = mask_nodes(roots)
    if isinstance(nodes, Miss):
        return nodes
    key_valid = next((node for node in nodes if node.op == "placeholder" and node.name == "attention_mask"), None)
    seen: list[tuple[Tensor, Tensor]] = []
    try:
        for batch, length in _probe_sizes(nodes, program):
            for valid in _paddings(batch, length)[0 if key_valid is not None else -1 :]:
                seen.append((valid, _visible(terms, heads, _run(nodes, roots, valid, program), valid)))
        # The last probe is the longest, without padding.
        longest = seen[-1][1][0, 0]
        is_causal = not bool(longest[0, 1:].any())
        first_key = int(longest[-1].int().argmax())
        window = len(longest) - first_key if first_key else 0
        for valid, visible in seen:
            _compare(visible, valid, is_causal, window)
    except (_NotKnownError, RuntimeError, IndexError) as error:
        return Miss(_NOT_KNOWN + str(error).split("\n")[0], roots[0])
    return Visibility(is_causal, window, key_valid)


def _probe_sizes(nodes: list[fx.Node], program: Program) -> list[tuple[int, int]]:
    """Batch sizes and lengths to run a mask at; past every number in it that could be a window."""
    context = program.info.context
    numbers: list[float] = []
    for node in nodes:
        numbers += [abs(item) for item in tree_leaves((node.args, node.kwargs)) if isinstance(item, (int, float))]
        if "constant" in node.meta:
            constant = program.constants[node.meta["constant"]]
            is_small = constant.nbytes <= 64
            numbers += [*constant.shape, *(constant.value().double().abs().flatten().tolist() if is_small else [])]
    short = [(batch, length) for batch, length in _PROBES if length <= context]
    windows = {int(number) for number in numbers if _LONG_PROBE - 2 < number < context}
    long = {min(context, _LONG_PROBE)} | {min(window + 2, context) for window in windows}
    return short + [(1, length) for length in sorted(long) if length > short[-1][1]]


def _paddings(batch: int, length: int) -> list[Tensor]:
    """Key validities `[B, S]`: padded right, left and here and there; all real comes last."""
    column, row = torch.arange(length)[None], torch.arange(batch)[:, None]
    right, left = column < length - (length // 3) * (row + 1), column >= (length // 3) * (batch - row)
    return [right.long(), left.long(), ((column + row) % 3 != 1).long(), torch.ones(batch, length).long()]


def _run(nodes: list[fx.Node], roots: list[fx.Node], valid: Tensor, program: Program) -> dict[fx.Node, Any]:
    """Values of the `roots` of a mask where `valid` is the attention mask."""
    batch, length = valid.shape
    if length > _LONGEST_PROBE:
        raise _NotKnownError(f"it would have to be run at length {length} to tell (longest: {_LONGEST_PROBE})")
    symbols = zip(sequence_sizes(nodes[0].graph), valid.shape, strict=True)
    sizes = {symbol.node.expr: size for symbol, size in symbols if isinstance(symbol, torch.SymInt)}
    last_use = {operand: node for node in nodes for operand in node.all_input_nodes}
    inputs = {"attention_mask": valid, "position_ids": torch.arange(length).repeat(batch, 1)}
    values: dict[fx.Node, Any] = {}

    def size_of(size: int | torch.SymInt) -> int:
        known = size.node.expr.subs(sizes) if isinstance(size, torch.SymInt) else size
        if getattr(known, "free_symbols", None):
            raise _NotKnownError("it depends on a size besides batch and length")
        return int(known)

    def value_of(operand: fx.Node) -> Any:
        if operand in values:
            return values[operand]
        like = operand.meta["val"]  # only its size and dtype are read
        return torch.zeros((), dtype=like.dtype).expand([size_of(size) for size in like.shape])

    for node in nodes:
        if isinstance(node.meta["val"], (int, torch.SymInt)):
            values[node] = size_of(node.meta["val"])
        elif node.op == "placeholder":
            name = node.meta.get("constant")
            values[node] = program.constants[name].value() if name else inputs[node.name]
        else:
            values[node] = node.target(*fx.map_arg(node.args, value_of), **fx.map_arg(node.kwargs, value_of))
        for operand in node.all_input_nodes:
            if last_use[operand] is node and operand not in roots:
                values.pop(operand, None)
    return values


def _visible(terms: tuple[MaskTerm, ...], heads: int, values: dict[fx.Node, Any], valid: Tensor) -> Tensor:
    """`[B, 1, S, S] bool`: which keys the terms leave visible."""
    batch, length = valid.shape
    visible = torch.ones(batch, 1, length, length, dtype=torch.bool)
    spread = []
    for term in terms:
        value = values[term.node]
        if term.is_flat and value.dim() == 3:
            value = value.reshape(-1, heads if value.shape[0] == batch * heads else 1, *value.shape[1:])
        spread.append(value[(None,) * (4 - value.dim())])
        if term.kind == "multiply":
            continue
        shown = spread[-1] * term.weight > HIDDEN if term.kind == "add" else spread[-1] == (term.kind == "keep")
        if shown.shape[1] > 1 and not (shown == shown[:, :1]).all():
            raise _NotKnownError("it differs between heads")
        visible = visible & shown[:, :1]
    # Visible scores must stay as they are, and hidden ones hidden.
    for term, value in zip(terms, spread, strict=True):
        if term.kind == "multiply" and ((value != 1) & (visible | (value != 0))).any():
            raise _NotKnownError("it multiplies scores of visible keys")
        if term.kind == "add":
            added = value * term.weight
            is_bias = (added != 0) & (visible | ~(added <= 0))
            if is_bias.any():
                bias = added.expand_as(is_bias)[is_bias][0].item()
                raise _NotKnownError(f"it adds {bias:.3g} to scores, a position bias such as ALiBi")
    return visible


def _compare(visible: Tensor, valid: Tensor, is_causal: bool, window: int) -> None:
    positions = torch.arange(valid.shape[1])[None]
    wrong = (visible[:, 0] != visible_keys(positions, positions, valid, is_causal, window)) & (valid != 0)[:, :, None]
    if wrong.any():
        row, query, key = wrong.nonzero()[0].tolist()
        verb = "sees" if visible[row, 0, query, key] else "does not see"
        raise _NotKnownError(f"at length {valid.shape[1]} query {query} {verb} key {key}")
