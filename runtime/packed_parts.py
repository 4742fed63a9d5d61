"""Which quantised weights of a program its linears can read from one packed copy, and which of them jointly."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx

from jettison.ir import ops
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.program import Program, placeholders


@dataclass(frozen=True)
class PackedParts:
    """A quantised weight by the names of its constants.

    Attributes:
        codes: Name of a constant, like the next two.
        scales: Per group.
        zeros: Per group, or None.
        bits: Per code.
        group: Columns that share a scale.
        rows: N.
        columns: K, without padding.
    """

    codes: str
    scales: str
    zeros: str | None
    bits: int
    group: int
    rows: int
    columns: int


def parts_read(node: fx.Node) -> PackedParts | None:
    """The weight that a linear or an embedding reads in packed form, or None."""
    if not is_call(node, ops.quantized_linear, ops.quantized_embedding):
        return None
    read = arguments(node)
    codes, scales, zeros = (constant_name(read[name]) for name in ("codes", "scales", "zeros"))
    if codes is None or scales is None or (zeros is None and read["zeros"] is not None):
        return None
    columns = read["in_features"] if is_call(node, ops.quantized_linear) else read["embedding_dim"]
    rows = read["codes"].meta["val"].shape[0]
    return PackedParts(codes, scales, zeros, read["bits"], read["group"], rows, columns)


def packed_weights(program: Program) -> dict[tuple[PackedParts, ...], bool]:
    """Weights that some linear reads in packed form and that no operator reads otherwise.

    Args:
        program: What to look at.

    Returns:
        Weights that linears of the same x read, in every entry, or one weight alone; and whether an embedding looks up
        rows of it too.
    """
    readers: dict[PackedParts, list[fx.Node]] = {}
    refused: set[str] = set()
    for entry in program.entries.values():
        for placeholder in placeholders(entry):
            for user in placeholder.users:
                parts = parts_read(user)
                if parts is None:
                    refused.add(constant_name(placeholder) or "")
                elif constant_name(placeholder) == parts.codes:
                    readers.setdefault(parts, []).append(user)
    forms = Counter(parts.codes for parts in readers)
    found: dict[tuple[PackedParts, ...], bool] = {}
    for parts, nodes in readers.items():
        if parts.codes not in refused and forms[parts.codes] == 1:
            found[parts] = nodes
    ...
    return found
