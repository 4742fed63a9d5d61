"""What is added where a token does not name groups: the sum of all stand-ins, less those of the groups it names.

`absent [G + 1, E]` has a row for each group, and their sum last; see `jettison::sparse_mlp`.
"""

from __future__ import annotations

from jettison.codegen.triton.kernels.base import deeper


def taken_off_lines(loop: str, place: str, of_named: str, mask: str) -> list[str]:
    """Take the stand-ins of named groups off `total`.

    Args:
        loop: Over the named groups, some at a time: the range of `begin`.
        place: Expression of which of them they are.
        of_named: Expression of the stand-ins of the groups `named`, of the shape of `total`.
        mask: Of `of_named`; `inside` says which places there are.
    """
    return [
        "# The groups that are named need nothing that stands in for them.",
        f"for begin in range({loop}):",
        *deeper([
            f"place = {place}",
            "inside = place < KEPT",
            "named = tl.load(indices_ptr + token * KEPT + place, mask=inside, other=0)",
            f"of_named = {of_named}",
            f"total -= tl.load(absent_ptr + of_named, mask={mask}, other=0).to(tl.float32)",
        ]),
    ]  # fmt: skip


def sum_line(groups: int, at: str, guard: str) -> str:
    """Add the sum of all stand-ins to `sums`, the columns `at` of the result."""
    return f"sums += tl.load(absent_ptr + {groups} * E + {at}{guard}).to(tl.float32)"
