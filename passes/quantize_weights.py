"""Store the weights of linears and embeddings in few bits.

Before:
    constant @e: f32[61,64]
    %0: f32[s0,s1,64] = aten.embedding(@e, %input_ids)
    %1: f32[s0,s1,61] = aten.linear(%0, @e, @bias)
After:
    constant @e.codes: u8[61,2,16]
    constant @e.scales: f32[61,2]
    constant @e.zeros: u8[61,1]
    packed @e: int4{group=32,symmetric=false}[61,64]
    %0: f32[s0,s1,64] = jettison.quantized_embedding(%input_ids, @e.codes, @e.scales, @e.zeros, 4, 32, 64)
    %1: f32[s0,s1,61] = jettison.quantized_linear(%0, @e.codes, @e.scales, @e.zeros, @bias, 4, 32, 64)

Fires when: `aten.linear` or `aten.embedding` reads a constant matrix: projections, the head, token and learned position
    embeddings; or `jettison.experts` reads constant stacks of them, which become `jettison.quantized_experts`. A tied
    embedding is encoded once and read by both. Biases stay. A second run with other options takes what the first one
    skipped (`quantize-weights{bits=8,skip='mlp'},quantize-weights{bits=4}`).
Declines when: the weight is computed, has other than two axes outside of `jettison.experts`, or something else reads
    its float form, as operators of `fuse-low-rank` do; where `skip` finds one stack of experts and not the other.
    Without a miss where `skip` finds its name, and where the linear chooses experts: routers are few of the bytes, and
    rounding them sends tokens to other experts.
Numerics: changes precision. |w - w'| is at most half a step of its group (see formats/int_groups.py). Mean KL in nats
    over 8 windows of 1024 tokens of Treasure Island, group 32: 8 bits 4.0e-5 on tiny-llama and 3.4e-5 on tiny-opt, 4
    bits 0.0111 and 0.0100; with the tied table of tiny-llama at 8 bits and the rest at 4, 0.0043. Learned position
    embeddings are worth encoding: those of tiny-opt in bf16 would take 9 % more bytes and give 0.0098.
Saves: N * K * (stored_bits - bits - (32 + bits) / group) / 8 bytes per matrix, and as many read per token; `bits` less
    in the sum when symmetric.
Method and format: `method` says how weights are rounded (passes/methods/), `format`, or `bits`, `group` and
    `symmetric` for integer groups, how they are stored (passes/formats/). Methods that look at what linears read run
    before `cache-kv`, on the program's calibration tokens; tables and stacks of experts are rounded to nearest then.
    `awq` also changes constants in front of linears.
Source: round to nearest in groups, as ONNX Runtime's `MatMulNBits` and llama.cpp's `Q4_1` store it; for the methods
    see their files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from jettison.ir.constants import Constant, Packed
from jettison.ir.edit import Edit
from jettison.ir.errors import OptionError
from jettison.ir.match import Miss, arguments, constant_name, is_call
from jettison.ir.ops import experts, low_rank_attention, low_rank_mlp, quantized_experts, sparse_linear, sparse_mlp
from jettison.ir.program import CACHE, MissRecord, Program, constant_placeholders, constant_reads
from jettison.ir.progress import track
from jettison.ir.text import dtype_text, target_text
from jettison.passes.base import Pass
from jettison.passes.expert_reads import (
    ExpertsRead,
    as_matrix,
    as_stack,
    chooses_experts,
    match_experts,
    rewrite_experts,
)
from jettison.passes.formats import IntGroups, WeightFormat, format_from_text
from jettison.passes.grammar import format_pipeline
from jettison.passes.methods import RTN, Method
from jettison.passes.methods.finished_layers import Encoded
from jettison.passes.methods.layerwise import LayerwiseRun, encode_weights
from jettison.passes.options import option, to_spec
from jettison.passes.requirements import idle_patterns, require_pattern, require_text

aten = torch.ops.aten
_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Products that canonicalisation could not spell as a linear.
_PRODUCTS = (
    aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default, aten.baddbmm.default,
    aten.einsum.default,
)  # fmt: skip
_FUSED = "fuse-low-rank has joined its linears, and reads their factors as they are: leave fuse-low-rank out"


@dataclass(frozen=True)
class WeightRead:
    """A linear or an embedding, and the name of the constant it reads."""

    node: fx.Node
    weight: str

    @property
    def weights(self) -> tuple[str, ...]:
        """The one name."""
        return (self.weight,)


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "quantize-weights"
    is_exact: ClassVar[bool] = False
    bits: Literal[8, 4, 3, 2] | None = option(None, doc="bits per weight; 4 unless there is a format")
    group: Literal[32, 64, 128] | None = option(None, doc="columns that share a scale; 32 unless there is a format")
    symmetric: bool | None = option(None, doc="no zero points: fewer bytes, a larger error; false unless given")
    format: Literal["int8", "int4", "int3", "int2"] | WeightFormat | None = option(
        None, doc="how weights are stored, instead of the three options before", flat=True
    )
    method: Method = option(RTN(), doc="how weights are rounded", flat=True)
    skip: str | None = option(None, doc="regular expression; weights in whose name it is found stay as they are")
    only: str | None = option(None, doc="regular expression; weights in whose name it is not found stay as they are")

    def __post_init__(self) -> None:
        chosen = {field: getattr(self, field) for field in ("bits", "group", "symmetric")}
        if isinstance(self.format, str):
            bits = int(self.format.removeprefix("int"))
            if self.bits not in (None, bits):
                raise OptionError(
                    f"[quantize-weights] format={self.format} with bits={self.bits}: leave one of them out."
                )
            chosen["bits"], stored = bits, None
        else:
            stored = self.format
        if stored is not None:
            given = [f"{field}={value}" for field, value in chosen.items() if value is not None]
            if given:
                raise OptionError(
                    f"[quantize-weights] format={stored} with {', '.join(given)}: needs the options of the format "
                    "inside its braces, because bits, group and symmetric are those of integer groups. Leave them out."
                )
        else:
            defaults = {"bits": 4, "group": 32, "symmetric": False}
            chosen = {field: defaults[field] if value is None else value for field, value in chosen.items()}
            try:
                IntGroups(**chosen)
            except OptionError as error:
                raise OptionError(str(error).replace("[int-groups]", "[quantize-weights]")) from None
        for field, value in {**chosen, "format": stored}.items():
            object.__setattr__(self, field, value)
        for field in ("skip", "only"):
            require_pattern(f"[{self.name}]", field, getattr(self, field))
        self.method.adapted(self.stored_format)

    @property
    def stored_format(self) -> WeightFormat:
        """The weight format that the options ask for."""
        if isinstance(self.format, WeightFormat):
            return self.method.adapted(self.format)
        assert self.bits is not None, "filled in"
        assert self.group is not None, "filled in"
        return self.method.adapted(IntGroups(self.bits, self.group, bool(self.symmetric)))

    @property
    def needs_calibration(self) -> bool:
        """See `Pass`: it is up to the method."""
        return self.method.needs_inputs

    def requires(self, program: Program) -> None:
        """A method that looks at what linears read runs the captured graph on text."""
        if self.method.needs_inputs:
            require_text(program, f"[{self.name}] method={self.method.name}", "method=rtn")

    def unsupported_on(self, target: str) -> str | None:
        """See `Pass`: it is the format that a target can run or not."""
        return self.stored_format.unsupported_on(target)

    def match(self, node: fx.Node, program: Program) -> WeightRead | ExpertsRead | Miss | None:
        """A linear, an embedding or experts of constants that nothing else reads in another way."""
        if is_call(node, experts):
            read, stored = match_experts(node, program, self._is_skipped), self.stored_format
            if isinstance(read, ExpertsRead) and (not isinstance(stored, IntGroups) or stored.float_zeros):
                return Miss(f"routed experts are read in integer groups with whole zero points, not in {stored}", node)
            return read
        if not is_call(node, aten.linear.default, aten.embedding.default):
            return self._unquantized_product(node)
        weight = arguments(node)["weight"]
        name = constant_name(weight)
        if name is None:
            return Miss("the weight is not a constant", node)
        if self._is_skipped(name) or chooses_experts(node):
            return None
        value = weight.meta["val"]
        if value.dim() != 2 or value.dtype not in _COMPUTE_DTYPES:
            found = f"{dtype_text(value.dtype)}{list(value.shape)}"
            return Miss(f"the weight is {found}, not a matrix of f32, bf16 or f16", node)
        stored = self.stored_format
        if not stored.has_table and any(
            is_call(user, aten.embedding.default) for user, _ in constant_reads(program, name)
        ):
            return Miss(f"an embedding looks rows of it up, which {stored} does not give", node)
        refused = stored.declines(program.constants[name].zeros) if stored.is_for_zeros else None
        if refused is not None:
            return Miss(refused, node)
        other = _other_reader(name, program)
        if other is not None:
            return Miss(f"{target_text(other.target)} needs the float form of the weight too", node)
        return WeightRead(node, name)

    def _unquantized_product(self, node: fx.Node) -> Miss | None:
        """A weight matrix that would have been worth quantising, read by something else."""
        if node.op != "call_function" or is_call(node, quantized_experts):  # whose scales have three axes
            return None
        if is_call(node, sparse_linear, sparse_mlp):
            name = constant_name(arguments(node)["weight" if is_call(node, sparse_linear) else "up"])
            reason = "it is read sparsely already: put quantize-weights before predict-mlp-sparsity"
            if is_call(node, sparse_linear):
                reason = "it is read by channels of its input, and groups of codes run along them"
            return None if name is None or self._is_skipped(name) else Miss(reason, node)
        if is_call(node, low_rank_attention, low_rank_mlp):
            names = [constant_name(arguments(node)[each]) for each in arguments(node) if each.endswith("rows")]
            names = [name for name in names if name is not None and not self._is_skipped(name)]
            return Miss(_FUSED, node) if names else None
        for operand in node.all_input_nodes:
            name = constant_name(operand)
            if name is None or not operand.meta["val"].is_floating_point() or self._is_skipped(name):
                continue
            shape = operand.meta["val"].shape
            if len(shape) == 2 and is_call(node, *_PRODUCTS):
                return Miss(f"the weight is read by {target_text(node.target)}, not by a linear or an embedding", node)
            if len(shape) > 2 and min(shape) > 1:
                return Miss(f"the weight has {len(shape)} axes, as those of experts have, not two", node)
        return None

    def _is_skipped(self, name: str) -> bool:
        # What a cache policy computes with is no weight of the model.
        return (
            name.startswith(CACHE)
            or (self.skip is not None and re.search(self.skip, name) is not None)
            or (self.only is not None and re.search(self.only, name) is None)
        )

    def find_all(self, program: Program) -> tuple[dict[str, list[WeightRead | ExpertsRead]], list[MissRecord]]:
        """What the pass would rewrite in each entry, and what it would miss."""
        reads: dict[str, list[WeightRead | ExpertsRead]] = {}
        misses: dict[tuple[str, str], MissRecord] = {}
        for entry in program.entries:
            found, missed = self.find(program, entry)
            if found:
                reads[entry] = found
            for record in missed:
                misses.setdefault((record.node, record.reason), record)
        return reads, [*misses.values(), *idle_patterns(program, skip=self.skip, only=self.only)]

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Encode every weight once, then rewrite its readers in every entry."""
        reads, misses = self.find_all(program)
        self._encode_all(program, reads)
        for entry_name, in_entry in reads.items():
            edit = Edit(program, entry_name, self.name)
            for read in in_entry:
                self.rewrite(read, edit)
            edit.eliminate_dead_code()
        _drop_replaced(program)
        return sum(len(in_entry) for in_entry in reads.values()), misses

    def rewrite(self, match: WeightRead | ExpertsRead, edit: Edit) -> None:
        """Read the packed parts instead of the weight."""
        if isinstance(match, ExpertsRead):
            stored = self.stored_format
            assert isinstance(stored, IntGroups), "matched"
            rewrite_experts(match, dict.fromkeys(match.weights, (stored.bits, stored.group)), edit)
            return
        packed = edit.program.packed[match.weight]
        stored = format_from_text(packed.format)
        parts = {part: edit.constant(edit.program.constants[name]) for part, name in packed.parts.items()}
        shape = (packed.shape[0], packed.shape[1])
        operands = arguments(match.node)
        with edit.before(match.node):
            if is_call(match.node, aten.linear.default):
                new = stored.call_linear(edit, operands["input"], parts, operands["bias"], shape)
            else:
                new = stored.call_embedding(edit, operands["indices"], parts, shape)
                # The lookup returns the dtype of the scales.
                if new.meta["val"].dtype != match.node.meta["val"].dtype:
                    new = edit.call(aten.to.dtype, new, match.node.meta["val"].dtype)
        edit.replace(match.node, new)

    def ensures(self, program: Program) -> str | None:
        """A packed weight has all its parts and no reader of its float form."""
        for entry_name, entry in program.entries.items():
            for name in constant_placeholders(entry):
                if name in program.packed:
                    return f"{entry_name} still reads {name}, which is packed"
        for name, packed in program.packed.items():
            missing = [part for part in packed.parts.values() if part not in program.constants]
            if missing:
                return f"{name} is packed, but the program has no {missing[0]}"
        return None

    def _encode_all(self, program: Program, reads: Mapping[str, Sequence[WeightRead | ExpertsRead]]) -> None:
        """Encode weights into new constants, all of them before any graph changes: one of them may be refused."""
        names = {name for in_entry in reads.values() for read in in_entry for name in read.weights}
        weights = {name: as_matrix(constant) for name, constant in program.constants.items() if name in names}
        encoded: dict[str, Encoded] = {}
        with track(self.name, sum(weight.stored_bytes for weight in weights.values())) as advance:
            if self.method.needs_inputs:
                linears = [read.node for read in reads.get("forward", ()) if is_call(read.node, aten.linear.default)]
                step = format_pipeline([to_spec(self)])
                layerwise = LayerwiseRun(program, linears, self.method, self.stored_format, step, advance).run()
                encoded |= layerwise.encoded
            with _one_thread():
                rest = [weight for name, weight in weights.items() if name not in encoded]
                encoded |= encode_weights(rest, self.method, self.stored_format, None, advance)
        if self.method.needs_inputs:
            encoded |= layerwise.apply(program)
        for name in weights:
            _store(program, name, encoded[name])


def _store(program: Program, name: str, encoded: Encoded) -> None:
    """Put the parts of a weight beside it, as constants."""
    shape = tuple(program.constants[name].shape)
    parts = {part: as_stack(Constant(f"{name}.{part}", tensor), shape) for part, tensor in encoded.parts.items()}
    packed = {part: constant.name for part, constant in parts.items()}
    program.packed[name] = Packed(encoded.format.name, shape, packed)
    program.constants.update({constant.name: constant for constant in parts.values()})


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on this thread alone.

    Each of some twenty operations per chunk takes a tenth of a millisecond. Meeting at a barrier after each gains
    little (one thread encodes 2e8 weights per second) and on a busy machine loses a factor of a hundred.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _other_reader(name: str, program: Program) -> fx.Node | None:
    """A node of any entry that reads a weight otherwise than as the matrix of a linear or the table of an embedding."""
    for user, placeholder in constant_reads(program, name):
        is_weight = (is_call(user, aten.linear.default) and user.args[1] is placeholder) or (
            is_call(user, aten.embedding.default) and user.args[0] is placeholder
        )
        if not is_weight or sum(operand is placeholder for operand in user.args) > 1:
            return user
    return None


def _drop_replaced(program: Program) -> None:
    """Forget dense weights that nothing reads any more, so that a model given in memory can be released."""
    used = program.used_constants()
    for name in program.packed:
        if name not in used:
            program.constants.pop(name, None)
