"""Write a pass of your own: x * sigmoid(x) is silu.

python examples/03_write_a_pass.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from jettison.ir.capture import capture_module
from jettison.ir.diff import diff_text
from jettison.ir.edit import Edit
from jettison.ir.match import Miss, is_call
from jettison.ir.program import Program
from jettison.ir.text import program_text
from jettison.passes.base import Pass
from jettison.passes.pipeline import prepare

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseSilu(Pass):
    """x * sigmoid(x) -> silu(x); exact up to rounding."""

    name: ClassVar[str] = "raise-silu"

    def match(self, node: fx.Node, program: Program) -> fx.Node | Miss | None:
        """The product, if one factor is the sigmoid of the other."""
        if not is_call(node, aten.mul.Tensor):
            return None
        for x, gate in (node.args, node.args[::-1]):
            if is_call(gate, aten.sigmoid.default):
                return node if gate.args[0] is x else Miss("the sigmoid is of something else", node)
        return None

    def rewrite(self, match: fx.Node, edit: Edit) -> None:
        """Emit one silu."""
        x = next(a for a in match.args if not is_call(a, aten.sigmoid.default))
        with edit.before(match):
            silu = edit.call(aten.silu.default, x)
        edit.replace(match, silu)


class Tiny(nn.Module):
    """Two linears and an activation written out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.up, self.down = nn.Embedding(32, 8), nn.Linear(8, 16), nn.Linear(16, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[B, S] i64` to `[B, S, 32]`."""
        h = self.up(self.tokens(input_ids))
        return self.down(h * torch.sigmoid(h))


def main() -> None:
    """Run the pass; the driver verifies the graph and that the pass told the truth about what it did."""
    program = capture_module(Tiny())
    prepare(program)
    before = program_text(program)
    record = RaiseSilu().run(program)
    print(f"{record.name}: {record.rewrites} rewrite(s), {len(record.misses)} miss(es)")
    print(diff_text(before, program_text(program)))


if __name__ == "__main__":
    main()
