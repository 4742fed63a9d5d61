"""Compute logits only where they are asked for.

Before:
    entry forward(%input_ids: i64[s0,s1], %position_ids: i64[s0,s1]):
    %9: f32[s0,s1,512] = aten.linear(%8, @lm_head.weight)
After:
    entry forward(%input_ids: i64[s0,s1], ..., %attention_mask: i64[s0,s2], %logits_positions: i64[s0,s3]):
    %9: i64[s0] = aten.sum.dim_IntList(%attention_mask, [1])
    (positions below zero count from the last token of each row in this call)
    %14: f32[s0,s3,64] = aten.gather(%8, 1, %13)
    %15: f32[s0,s3,512] = aten.linear(%14, @lm_head.weight)

Fires when: the program is a decoder and the output comes from a linear with a constant weight, packed or not, with
    nothing but element-wise operations after it.
Declines when: the head is not a linear, or something after it mixes positions.
Numerics: exact.
Saves: (S - P) * E * V multiplications and (S - P) * V * 4 bytes per row in prefill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from jettison.ir.edit import Edit
from jettison.ir.match import constant_name, is_call
from jettison.ir.ops import quantized_linear
from jettison.ir.program import MissRecord, Program, input_placeholders, output_node
from jettison.passes.base import Pass, describe_node

aten = torch.ops.aten
_ELEMENTWISE = (
    aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.tanh.default, aten.to.dtype, aten._to_copy.default,
    aten.mul.Scalar, aten.div.Scalar,
)  # fmt: skip


@dataclass(frozen=True)
class SelectLogits(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "select-logits"

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Gather hidden states in front of the head of every entry that has no `logits_positions` yet."""
        rewrites, misses = 0, []
        if program.info.kind != "decoder":
            return 0, []
        for entry_name, entry in program.entries.items():
            if "logits_positions" in input_placeholders(entry):
                continue
            chain = head_chain(output_node(entry).args[0][0])
            if not is_call(chain[-1], aten.linear.default, quantized_linear):
                misses.append(MissRecord(describe_node(chain[-1]), "the language-model head is not a linear"))
                continue
            if chain[-1].args[0].meta["val"].dim() != 3:
                misses.append(MissRecord(describe_node(chain[-1]), "the head does not see one row per position"))
                continue
            self._gather(Edit(program, entry_name, self.name), chain)
            rewrites += 1
        return rewrites, misses

    def _gather(self, edit: Edit, chain: list[fx.Node]) -> None:
        head = chain[-1]
        hidden = head.args[0]
        batch = hidden.meta["val"].shape[0]
        mask = edit.input("attention_mask", edit.dynamic_tensor([batch, None], torch.int64, hint=11))
        wanted = edit.input("logits_positions", edit.dynamic_tensor([batch, None], torch.int64, hint=5))
        with edit.before(head):
            total = edit.call(aten.sum.dim_IntList, mask, [1])
            # Tokens of this call: all of a row's tokens in its first call, where padding may follow, S later.
            new = edit.call(aten.clamp_max.default, total, edit.call(aten.sym_size.int, hidden, 1))
            from_end = edit.call(aten.add.Tensor, wanted, edit.call(aten.unsqueeze.default, new, 1))
            is_negative = edit.call(aten.lt.Scalar, wanted, 0)
            positions = edit.call(aten.where.self, is_negative, from_end, wanted)
            column = edit.call(aten.unsqueeze.default, positions, 2)
            width = hidden.meta["val"].shape[2]
            index = edit.call(aten.expand.default, column, [-1, -1, width])
            selected = edit.call(aten.gather.default, hidden, 1, index)
        edit.set_arguments(head, selected, *head.args[1:])
        for node in reversed(chain[:-1]):
            edit.refresh(node)


def head_chain(logits: fx.Node) -> list[fx.Node]:
    """From the logits back through element-wise operations to what they come from: the head, if it is a linear."""
    chain = [logits]
    while is_call(chain[-1], *_ELEMENTWISE):
        tensors = [n for n in chain[-1].all_input_nodes if constant_name(n) is None]
        if len(tensors) != 1:
            break
        chain.append(tensors[0])
    return chain
