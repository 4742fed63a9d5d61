"""Which quantised weights of a program its linears can read in the layout of a kernel, and which of them as one."""

from __future__ import annotations

from collections.abc import Mapping
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
        columns: K, without padding.
    """

    codes: str
    scales: str
    zeros: str | None
    bits: int
    group: int
    columns: int

    def has_part(self, name: str) -> bool:
        """Whether a constant is one of the parts."""
        return name in (self.codes, self.scales, self.zeros)


@dataclass(frozen=True)
class LutParts:
    """A weight of codes into one table of values, by the names of its constants.

    Attributes:
        codes: Name of a constant, like the next three.
        lut: The table.
        scales: Per group.
        steps: Of scales in 8 bits, or None.
        bits: Per code.
        group: Columns that share a scale.
        columns: K, without padding.
    """

    codes: str
    lut: str
    scales: str
    steps: str | None
    bits: int
    group: int
    columns: int


@dataclass(frozen=True)
class BitmapParts:
    """A weight as a bitmap and the values that are left, by the names of its constants.

    Attributes:
        bitmap: Name of a constant, like the next three; it stands for the weight.
        starts: Of slabs of rows.
        values: Those kept.
        scales: Per group, or None.
        bits: Per value.
        group: Columns that share a scale.
        columns: K.
    """

    bitmap: str
    starts: str
    values: str
    scales: str | None
    bits: int
    group: int
    columns: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of all its constants."""
        return tuple(name for name in (self.bitmap, self.starts, self.values, self.scales) if name is not None)


@dataclass(frozen=True)
class JointWeight:
    """Weights that a kernel reads as one, row after row.

    Attributes:
        parts: One weight, or those of several linears that in every entry read the same x.
        rows: N of each.
        is_table: Whether an embedding looks up rows, too.
        whole_rows: N of the weight that these are a part of, where others that ran as one with them are elsewhere; None
            if they are all. A kernel that adds up in strips of rows takes those of the whole, and gives the same sums.
    """

    parts: tuple[PackedParts, ...]
    rows: tuple[int, ...]
    is_table: bool
    whole_rows: int | None = None

    @property
    def is_alone(self) -> bool:
        """Whether it is one weight that runs with no others, wherever they are: its bias is added before rounding."""
        return len(self.parts) == 1 and self.whole_rows is None

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of all constants that it is made of."""
        names = (name for each in self.parts for name in (each.codes, each.scales, each.zeros))
        return tuple(name for name in names if name is not None)

    @property
    def name(self) -> str:
        """The name that stands for it: that of the first codes."""
        return self.parts[0].codes


def parts_read(node: fx.Node) -> PackedParts | None:
    """The weight that a linear or an embedding reads in packed form, or None."""
    if not is_call(node, ops.quantized_linear, ops.quantized_embedding):
        return None
    read = arguments(node)
    codes, scales, zeros = (constant_name(read[name]) for name in ("codes", "scales", "zeros"))
    if codes is None or scales is None or (zeros is None and read["zeros"] is not None):
        return None
    columns = read["in_features"] if is_call(node, ops.quantized_linear) else read["embedding_dim"]
    return PackedParts(codes, scales, zeros, read["bits"], read["group"], columns)


def sparse_parts_read(node: fx.Node) -> dict[str, PackedParts]:
    """The weights that a sparse feed-forward layer reads in packed form: `gate` (if it has one), `up` and `down`.

    Empty for any other node, and where one of them is computed.
    """
    if not is_call(node, ops.quantized_sparse_mlp):
        return {}
    read = arguments(node)
    sizes = {"up": read["width"], "down": read["neurons"]}
    found = {}
    for name, layout in (("gate", "up"), ("up", "up"), ("down", "down")):
        if read[f"{name}_codes"] is None:
            continue
        codes, scales, zeros = (constant_name(read[f"{name}_{part}"]) for part in ("codes", "scales", "zeros"))
        if codes is None or scales is None or (zeros is None and read[f"{name}_zeros"] is not None):
            return {}
        form = (read[f"{layout}_bits"], read[f"{layout}_group"], sizes[layout])
        found[name] = PackedParts(codes, scales, zeros, *form)
    return found


def all_parts_read(node: fx.Node) -> tuple[PackedParts, ...]:
    """Every weight that a node reads in packed form."""
    parts = parts_read(node)
    return tuple(sparse_parts_read(node).values()) if parts is None else (parts,)


def lut_parts_read(node: fx.Node) -> LutParts | None:
    """The weight that a linear or an embedding reads as codes into a table, with scales; or None."""
    if not is_call(node, ops.lut_linear, ops.lut_embedding):
        return None
    read = arguments(node)
    codes, lut, scales, steps = (constant_name(read[name]) for name in ("codes", "lut", "scales", "steps"))
    if codes is None or lut is None or scales is None or (steps is None and read["steps"] is not None):
        return None
    columns = read["in_features"] if is_call(node, ops.lut_linear) else read["embedding_dim"]
    return LutParts(codes, lut, scales, steps, read["bits"], read["group"], columns)


def bitmap_parts_read(node: fx.Node) -> BitmapParts | None:
    """The weight that a linear reads as a bitmap and values, or None."""
    if not is_call(node, ops.bitmap_linear):
        return None
    read = arguments(node)
    bitmap, starts, values, scales = (constant_name(read[name]) for name in ("bitmap", "starts", "values", "scales"))
    if bitmap is None or starts is None or values is None or (scales is None and read["scales"] is not None):
        return None
    return BitmapParts(bitmap, starts, values, scales, read["bits"], read["group"], read["in_features"])


def bitmap_weights(program: Program) -> list[BitmapParts]:
    """Weights that linears read as a bitmap and values and that nothing reads otherwise, each once.

    Args:
        program: Its metadata are not needed.
    """
    found: dict[BitmapParts, None] = {}
    readers: dict[str, set[BitmapParts | None]] = {}
    for entry in program.entries.values():
        for placeholder in placeholders(entry):
            for user in placeholder.users:
                parts, name = bitmap_parts_read(user), constant_name(placeholder)
                readers.setdefault(name or "", set()).add(parts)
                if parts is not None:
                    found[parts] = None
    return [parts for parts in found if all(readers[name] == {parts} for name in parts.names)]


def joint_weights(program: Program) -> list[JointWeight]:
    """Weights that some linear reads in packed form and that no operator reads otherwise, each once.

    Args:
        program: Its metadata are not needed.
    """
    readers = _readers(program)
    # Every set of neighbours that a weight is read with; a weight that an entry reads twice has two.
    groups: dict[PackedParts, list[tuple[PackedParts, ...]]] = {}
    for entry in program.entries.values():
        for group in _read_together(entry, readers, program):
            for parts in group:
                groups.setdefault(parts, []).append(group)
    joint = {
        group if all(len(set(group)) == len(group) and set(groups[parts]) == {group} for parts in group) else (alone,)
        for alone, found in groups.items()
        for group in found
    }
    return [
        JointWeight(
            group,
            tuple(program.constants[parts.codes].shape[0] for parts in group),
            any(is_call(reader, ops.quantized_embedding) for parts in group for reader in readers[parts]),
        )
        for group in sorted(joint, key=lambda group: group[0].codes)
    ]


def _readers(program: Program) -> dict[PackedParts, list[fx.Node]]:
    """Linears and embeddings that read each weight, for those weights that can be held packed."""
    readers: dict[PackedParts, list[fx.Node]] = {}
    refused: set[str] = set()
    for entry in program.entries.values():
        for placeholder in placeholders(entry):
            for user in placeholder.users:
                read = all_parts_read(user)
                if not read:
                    refused.add(constant_name(placeholder) or "")
                for parts in read:
                    if constant_name(placeholder) == parts.codes:
                        readers.setdefault(parts, []).append(user)
    forms = [parts.codes for parts in readers]
    return {
        parts: nodes
        for parts, nodes in readers.items()
        if parts.codes not in refused
        and forms.count(parts.codes) == 1
        and any(is_call(node, ops.quantized_linear, ops.quantized_sparse_mlp) for node in nodes)
    }


def _read_together(
    entry: fx.GraphModule, usable: Mapping[PackedParts, object], program: Program
) -> list[tuple[PackedParts, ...]]:
    """Weights of linears that read the same x and have the same layout; an embedding reads its table alone."""
    by_input: dict[object, list[PackedParts]] = {}
    for node in entry.graph.nodes:
        # Slabs are cut from each weight alone.
        by_input.update({parts: [parts] for parts in sparse_parts_read(node).values() if parts in usable})
        parts = parts_read(node)
        if parts is None or parts not in usable:
            continue
        is_linear = is_call(node, ops.quantized_linear)
        layout = (parts.bits, parts.group, None if parts.zeros is None else program.constants[parts.zeros].dtype)
        by_input.setdefault((arguments(node)["x"], layout) if is_linear else node, []).append(parts)
    return [tuple(group) for group in by_input.values()]
