"""Remove the assertions that `torch.export` leaves in a graph.

Before:
    %4: NoneType = aten._assert_tensor_metadata(%3, dtype=i64, device=cpu, layout=torch.strided)
    %5: f32[s0,s1,1] = aten.to.dtype(%3, f32)
After:
    %4: f32[s0,s1,1] = aten.to.dtype(%3, f32)

Fires when: a node asserts or constrains and returns nothing.
Declines when: never.
Numerics: exact.
Saves: nothing at run time but the calls; later patterns become adjacent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from jettison.ir.edit import Edit
from jettison.ir.match import Miss, is_call
from jettison.ir.program import Program
from jettison.passes.base import Pass

aten = torch.ops.aten
_ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
    torch._check,
)


@dataclass(frozen=True)
class StripExportAsserts(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "strip-export-asserts"

    def match(self, node: fx.Node, program: Program) -> fx.Node | Miss | None:
        """The assertion itself."""
        return node if is_call(node, *_ASSERTS) else None

    def rewrite(self, match: fx.Node, edit: Edit) -> None:
        """Erase it."""
        edit.erase(match)
