"""Estimate all logits cheaply, and compute only those exactly that may be the best: HiRE on the softmax.

Before:
    entry forward(...):
      %9: f32[s0,s1,512] = aten.linear(%8, @lm_head.weight)
After:
    packed @lm_head.weight.estimate: int4{group=64,symmetric=false}[512,64]
    entry forward(...):
      %9: f32[s0,s1,512] = jettison.quantized_linear(%8, @lm_head.weight.estimate.codes, ...)
      %10: (i64[s0,s1,64], i64[s0,s1,448], f32[s0,s1,449]) = jettison.head_candidates(%9, %8, ...errors, 64, 512, 64)
      %13: f32[s0,s1,64] = jettison.selected_linear(%8, %11, @lm_head.weight, None)
      %14: f32[s0,s1,512] = jettison.complete_logits(%9, %11, %13)
    and once there is a KV cache (`cache-kv`):
    entry prefill(...): the head as it was
    entry decode(...): returns candidates, their logits, bounds of the others, head_input (see passes/head_forms.py)
    entry head(%head_input: f32[s0,s1,64]): the head as it was
    entry head_rows(%head_input: f32[s0,s1,64], %head_tokens: i64[s0,s1,s2]): some of its logits

Fires when: the logits of a decoder come from a linear, packed or not, with nothing but increasing element-wise
    operations after it.
Declines when: the head is not such a linear, a packed head has a bias, the vocabulary has no more tokens than there are
    candidates, or the estimator would read more than three quarters of the bytes of the head (the trap of HiRE: a head
    in 4 bits is its own estimator).
Numerics: changes precision in `forward`, whose other logits are estimates. A prompt runs the whole head. So does a
    decode step unless its result is proven: with `certify`, `decode` returns bounds of the logits that it did not
    compute (`ir/ops/head_candidates.py`). Where the best candidates are not above them, a session computes the tokens
    whose bounds reach them, and all logits where those are too many; so greedy and `top_k` tokens are those of the
    whole head up to ties. On 4928 tokens of Treasure Island the best of 64 candidates was the best token on tiny-llama
    and tiny-opt always, proven at once for 96 and 93 % of them (benchmarks/approximate_head.py). What needs the
    whole distribution (`top_p` alone, a repetition penalty) gets the whole head. Without `certify` the best candidates
    are taken as they are.
Saves: per decoded token `V * K * bits / 8` bytes of the head are not read; read are those of the estimator (see
    passes/head_estimators.py), 8 V of `errors` and `candidates * K * bits / 8`. Stored bytes grow by the estimator.
Source: HiRE, arXiv 2402.09360 (estimators, over-selection); the certificate and the choice by upper bounds are ours.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from jettison.ir.chunked_run import ChunkedRun
from jettison.ir.edit import Edit
from jettison.ir.errors import OptionError
from jettison.ir.match import Miss, arguments, constant_name, is_call
from jettison.ir.ops import complete_logits, head_candidates
from jettison.ir.program import MissRecord, Program, output_node
from jettison.passes.base import Pass, describe_node
from jettison.passes.head_estimators import Head, add_int4, add_low_rank, estimator_bytes, group_for, int4_errors
from jettison.passes.head_forms import WholeHead
from jettison.passes.methods.base import InputStatistics
from jettison.passes.options import option
from jettison.passes.requirements import require_forward, require_text
from jettison.passes.select_logits import head_chain

aten = torch.ops.aten
# An estimator that reads more of the head's bytes than this, its candidates included, is not worth its own.
_LARGEST_SHARE = 0.75
# Tokens that are listed with their bounds for every candidate. Mostly they hold all that may be among the 50 best on
# tiny-llama and tiny-opt, and listing them takes little.
RESERVE = 8
_INCREASING = (aten.tanh.default, aten.to.dtype, aten._to_copy.default)
_SHIFTS = (aten.add.Tensor,)
_SCALINGS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class ApproximateLmHead(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "approximate-lm-head"
    is_exact: ClassVar[bool] = False
    candidates: int = option(64, doc="tokens whose logits are computed exactly", range="at least 1")
    estimator: Literal["int4", "lowrank"] = option("int4", doc="what estimates the logits of all tokens")
    rank: int | None = option(None, doc="of lowrank; an eighth of the width, at least 64, unless given")
    certify: bool | None = option(
        None, doc="fall back to the whole head where the result is not proven; true with int4, which alone can"
    )

    def __post_init__(self) -> None:
        for field, value in (("candidates", self.candidates), ("rank", self.rank)):
            if value is not None and value < 1:
                raise OptionError(f"[approximate-lm-head] {field}={value}: needs at least 1. Choose a larger one.")
        if self.estimator == "int4" and self.rank is not None:
            raise OptionError(
                f"[approximate-lm-head] rank={self.rank} with estimator=int4: only lowrank has a rank. Leave it out, "
                "or use estimator=lowrank."
            )
        if self.estimator == "lowrank" and self.certify:
            raise OptionError(
                "[approximate-lm-head] certify=true with estimator=lowrank: its rows are too far from the head's for "
                "the bound to prove anything (0 of 4928 tokens on tiny-llama), so every token would fall back. Leave "
                "certify out, or use estimator=int4."
            )
        if self.certify is None:
            object.__setattr__(self, "certify", self.estimator == "int4")

    @property
    def needs_calibration(self) -> bool:
        """See `Pass`: a low rank is fitted to what the head reads."""
        return self.estimator == "lowrank"

    def requires(self, program: Program) -> None:
        """A graph of whole sequences, and text where it has to be run."""
        why = "because prompts and decode steps get heads of their own when there is a cache"
        require_forward(program, f"[{self.name}]", why)
        if self.needs_calibration:
            require_text(program, f"[{self.name}] estimator=lowrank", "estimator=int4")

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Rewrite the one head there is."""
        chain = head_chain(output_node(program.entries["forward"]).args[0][0])
        found = self.match(chain[-1], program)
        if isinstance(found, Miss):
            return 0, [MissRecord(describe_node(found.node), found.reason)]
        if found is None:
            return 0, []
        edit = Edit(program, "forward", self.name)
        self.rewrite(found, edit)
        edit.eliminate_dead_code()
        return 1, []

    def match(self, node: fx.Node, program: Program) -> Head | Miss | None:
        """The head of a decoder, if estimating pays; nothing where it is done already."""
        if is_call(node, complete_logits):
            return None
        if program.info.kind != "decoder" or len(program.outputs) != 1:
            return Miss("only the logits of a decoder are searched for the best token", node)
        head = Head.of(node, program)
        if head is None:
            return Miss("the language-model head is not a linear with a constant weight", node)
        if not is_call(node, aten.linear.default) and arguments(node)["bias"] is not None:
            return Miss("the head is packed and has a bias", node)
        for behind in head_chain(output_node(program.entries["forward"]).args[0][0])[:-1]:
            if not _is_increasing(behind, program):
                return Miss(f"{describe_node(behind)} after the head may change the order of logits", behind)
        vocabulary, columns = head.shape
        if vocabulary <= self.candidates:
            return Miss(f"the vocabulary has {vocabulary} tokens, and candidates={self.candidates}", node)
        rank = self.rank_for(columns)
        if rank is not None and rank >= columns:
            return Miss(f"rank={rank} is no less than the {columns} columns of the head", node)
        read = estimator_bytes(head.shape, rank) + head.nbytes * self.candidates // vocabulary
        if read > _LARGEST_SHARE * head.nbytes:
            return Miss(
                f"the estimator and the candidates would read {read} bytes and the head has {head.nbytes}: too many to "
                "gain anything",
                node,
            )
        return head

    def rank_for(self, columns: int) -> int | None:
        """The rank of the estimator of a head with K columns; None where it has none.

        An eighth of the width, and at least 64, as far as that is at most half of it: with 32 the best token of one in
        thirty is missed on the bundled models, which are 256 wide (benchmarks/approximate_head.py).
        """
        if self.estimator == "int4":
            return None
        return self.rank or min(max(64, columns // 8), max(1, columns // 2))

    def rewrite(self, match: Head, edit: Edit) -> None:
        """Write estimate, candidates and their exact logits, and all logits from these."""
        node, errors = match.node, None
        rank = self.rank_for(match.shape[1])
        x = node.args[0]
        if rank is None:
            estimate = add_int4(edit, match)
            errors = edit.constant(int4_errors(edit.program, match)) if self.certify else None
        else:
            estimate = add_low_rank(edit, match, rank, _products(edit.program, x))
        with edit.before(node):
            reserve = RESERVE * self.candidates if self.certify else 0
            found = edit.call(head_candidates, estimate, x, errors, self.candidates, reserve, group_for(match.shape[1]))
            candidates = edit.call(operator.getitem, found, 0)
            exact = WholeHead.of_linear(node).logits_of(edit, x, candidates)
            logits = edit.call(complete_logits, estimate, candidates, exact)
        edit.replace(node, logits)

    def ensures(self, program: Program) -> str | None:
        """The head that prompts and fallbacks read can be found again."""
        for node in program.entries["forward"].graph.nodes:
            if is_call(node, complete_logits) and WholeHead.of_candidates(node) is None:
                return "the head is not to be found from its candidates"
        return None


def _products(program: Program, x: fx.Node) -> torch.Tensor:
    """Sum of `x x^T` over the calibration tokens, `[K, K]` f32."""
    assert program.calibration is not None, "the pass requires it"
    statistics = InputStatistics(x.meta["val"].shape[-1])
    ChunkedRun(program, "forward", program.calibration()).advance(x, statistics.add)
    return statistics.products


def _is_increasing(node: fx.Node, program: Program) -> bool:
    """Whether an element-wise operation behind the head keeps the order of logits."""
    if len(node.users) != 1 and any(user.op != "output" for user in node.users):
        return False
    if is_call(node, *_INCREASING):
        return bool(node.meta["val"].is_floating_point())
    numbers = [_number(operand, program) for operand in node.args[:2]]
    if is_call(node, *_SHIFTS):
        return sum(number is not None for number in numbers) == 1
    if is_call(node, *_SCALINGS):
        is_division = is_call(node, aten.div.Tensor, aten.div.Scalar)
        factors = [number for number in (numbers[1:] if is_division else numbers) if number is not None]
        return len(factors) == 1 and factors[0] > 0
    return False


def _number(operand: object, program: Program) -> float | None:
    """The number that all logits are combined with."""
    if isinstance(operand, int | float):
        return float(operand)
    name = constant_name(operand)
    if name is None or program.constants[name].nbytes > 8:
        return None
    value = program.constants[name].value()
    return float(value) if value.numel() == 1 else None
