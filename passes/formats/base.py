"""What every weight format can do; a new format is one file with `fit`, `round`, `values`, `pack` and `unpack`.

The K columns of a row are cut into `k_blocks = ceil(K / group)` groups; the last one is padded with zeros. `fit`
chooses what a group needs to be rounded (its `Grid`), `round` takes weights to codes, `values` takes codes back, `pack`
and `unpack` go to and from the stored parts. A method that rounds column by column (GPTQ) calls `fit` on the columns of
one group and `round` and `values` on one column at a time: all three take any number of columns per group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NoReturn, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from jettison.ir.edit import Edit
from jettison.ir.errors import ArtifactError, PassError, UnsupportedError
from jettison.ir.ops.quantized_linear import row_chunks

# Half of the fp32 range: the end of the grid lies up to half a step beyond the largest weight and must stay finite.
LARGEST_WEIGHT = torch.finfo(torch.float32).max / 2
# Groups whose scale would be below the smallest normal number count as all zero.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny

RowReader: TypeAlias = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Grid:
    """What groups are rounded to, beside what the format itself fixes.

    Attributes:
        scales: `[n, b]` f32.
        zeros: `[n, b]` f32, the code that stands for 0; None where the format has no zero points.
        tables: `[1, C]` or `[n, C]` f32, not falling, what each code of a row stands for before scaling; None where the
            format does not choose tables.
    """

    scales: Tensor
    zeros: Tensor | None = None
    tables: Tensor | None = None


class WeightFormat(ABC):
    """A weight format. Subclasses are frozen dataclasses whose fields are the options.

    Attributes:
        id: Text id, by which pipelines name it.
        group: Columns that share a scale.
        is_exact: Whether it holds weights as they are, or refuses them.
        is_for_zeros: Whether it stores weights that are not zero, and where they are.
    """

    is_exact: ClassVar[bool] = False
    is_for_zeros: ClassVar[bool] = False
    id: ClassVar[str]
    group: int

    # ------------------------------------------------------------------------------------- what a format has to define

    @property
    @abstractmethod
    def name(self) -> str:
        """The canonical text, for example `int4{group=32,symmetric=false}`; `format_from_text` inverts it."""

    @abstractmethod
    def part_specs(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every part of a weight `[N, K]`, in storage order: enough to write a file header."""

    @abstractmethod
    def fit(self, groups: Tensor) -> Grid:
        """Choose the grid of each group.

        Args:
            groups: `[n, b, g]` f32, finite; g is any positive number of columns.

        Returns:
            The grid of `[n, b]` groups.
        """

    @abstractmethod
    def round(self, groups: Tensor, grid: Grid) -> Tensor:
        """Round weights to nearest.

        Args:
            groups: `[n, b, g]` f32; g is any number of columns.
            grid: Of `[n, b]` groups.

        Returns:
            `[n, b, g]` u8, one code per byte.
        """

    @abstractmethod
    def values(self, codes: Tensor, grid: Grid) -> Tensor:
        """What codes stand for, bit for bit as the operator of the format computes it.

        Args:
            codes: `[n, b, g]` u8; g is any number of columns.
            grid: Of `[n, b]` groups.

        Returns:
            `[n, b, g]` f32.
        """

    @abstractmethod
    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Store whole rows.

        Args:
            codes: `[n, k_blocks, group]` u8.
            grid: Of `[n, k_blocks]` groups, what `stored` returned.

        Returns:
            The parts of these rows, as in `part_specs`.
        """

    @abstractmethod
    def unpack(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        """Invert `pack`.

        Args:
            parts: Of n rows.
            shape: `(n, K)`.

        Returns:
            Codes `[n, k_blocks, group]` u8 and the grid of `[n, k_blocks]` groups.
        """

    @abstractmethod
    def call_linear(
        self, edit: Edit, x: fx.Node, parts: dict[str, fx.Node], bias: fx.Node | None, shape: tuple[int, int]
    ) -> fx.Node:
        """Write a linear that reads a weight in this format.

        Args:
            edit: Inside `with edit.before(node)`.
            x: `[..., K]`.
            parts: Of the weight.
            bias: `[N]` or None.
            shape: `(N, K)` of the weight.

        Returns:
            `[..., N]` in the dtype of x.
        """

    def stored(self, grid: Grid) -> Grid:
        """What is left of the grid of whole rows once it is stored; `round` and `values` should be given this.

        Args:
            grid: Of `[n, k_blocks]` groups, from `fit`.

        Returns:
            The same where scales are stored as they are.
        """
        return grid

    @property
    def shared_parts(self) -> tuple[str, ...]:
        """Names of the parts that all rows share: `encode_rows` returns them whole."""
        return ()

    @property
    def has_table(self) -> bool:
        """Whether an embedding can look rows up; where it cannot, `call_embedding` must not be called."""
        return True

    def call_embedding(
        self, edit: Edit, indices: fx.Node, parts: dict[str, fx.Node], shape: tuple[int, int]
    ) -> fx.Node:
        """Write an embedding whose table is in this format.

        Args:
            edit: Inside `with edit.before(node)`.
            indices: `[...]` i32 or i64.
            parts: Of the table.
            shape: `(V, K)` of the table.

        Returns:
            `[..., K]`; the caller converts the dtype.
        """
        raise PassError(f"[{self.name}] has no table form, see has_table.")

    def unsupported_on(self, target: str) -> str | None:
        """Why a target (`onnx`, `torch`) cannot run weights in this format, or None if it can."""
        return None

    def declines(self, zeros: float) -> str | None:
        """Why a weight with this share of zeros is better not stored in this format, or None; see `is_for_zeros`."""
        return None

    def adapted(self, rows: RowReader, shape: tuple[int, int], where: str) -> WeightFormat:
        """This format with everything fixed that has to be read off the whole weight before its first row is encoded.

        Most formats have nothing of the kind and return themselves.

        Args:
            rows: Returns rows `[start, stop)` of the weight, any floating-point dtype.
            shape: `(N, K)`.
            where: Name of the weight, for messages.

        Raises:
            UnsupportedError: The format cannot hold this weight.
        """
        return self

    # -------------------------------------------------------------------------------------- what follows from the above

    def __str__(self) -> str:
        return self.name

    def bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of all parts of a weight `[N, K]`, padding included."""
        return sum(torch.Size(dims).numel() * dtype.itemsize for dims, dtype in self.part_specs(shape).values())

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits per weight of `[N, K]`: scales, zero points and padding included."""
        rows, columns = shape
        return 8 * self.bytes(shape) / (rows * columns)

    @torch.no_grad()
    def encode(self, weight: Tensor, where: str = "weight", out: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Quantise a weight, half a million entries at a time.

        Beyond the result it needs less than 20 MiB whatever the size of the weight, which may be mapped from a file.

        Args:
            weight: `[N, K]`, any floating-point dtype and strides.
            where: name of the weight, for messages.
            out: tensors that match `part_specs` to fill (mapped from a file, for example) instead of new ones.

        Returns:
            The parts; `out` if it was given.

        Raises:
            UnsupportedError: not a non-empty floating-point matrix, or entries are NaN, infinite or beyond 1.7e38.
            ArtifactError: `out` does not match `part_specs`.
        """
        self._check_matrix(weight, where)
        shape = (weight.shape[0], weight.shape[1])
        chosen = self.adapted(lambda start, stop: weight[start:stop], shape, where)
        specs = chosen.part_specs(shape)
        parts = {name: torch.empty(dims, dtype=dtype) for name, (dims, dtype) in specs.items()} if out is None else out
        chosen._check_parts(parts, shape)
        for rows in row_chunks(*shape):
            chosen.put(parts, chosen.encode_rows(weight[rows], where, rows.start), rows)
        return parts

    @torch.no_grad()
    def encode_rows(self, weight: Tensor, where: str = "weight", first_row: int = 0) -> dict[str, Tensor]:
        """Quantise some rows of a weight at once; the result does not depend on how rows are split.

        Args:
            weight: `[n, K]`, any floating-point dtype.
            where: name of the whole weight, for messages.
            first_row: index of the first row in the whole weight, for messages.

        Returns:
            The parts of these rows.

        Raises:
            UnsupportedError: as `encode`.
        """
        self._check_matrix(weight, where)
        groups = self.split_groups(weight)
        self.check_values(groups, where, first_row)
        grid = self.stored(self.fit(groups))
        return self.pack(self.round(groups, grid), grid)

    @torch.no_grad()
    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Dequantise.

        Args:
            parts: what `encode` returned.
            shape: `(N, K)` of the weight.

        Returns:
            `[N, K]` f32, contiguous.

        Raises:
            ArtifactError: a part is missing, unexpected, or of another shape or dtype.
        """
        self._check_parts(parts, shape)
        weight = torch.empty(shape, dtype=torch.float32)
        for rows in row_chunks(*shape):
            codes, grid = self.unpack(self.take(parts, rows), (rows.stop - rows.start, shape[1]))
            weight[rows] = self.values(codes, grid).flatten(1)[:, : shape[1]]
        return weight

    def put(self, parts: dict[str, Tensor], chunk: dict[str, Tensor], rows: slice) -> None:
        """Write some rows where they belong.

        Args:
            parts: Of the whole weight; changed.
            chunk: What `encode_rows` returned for these rows.
            rows: Which.
        """
        for name, values in chunk.items():
            parts[name][... if name in self.shared_parts else rows] = values

    def take(self, parts: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """The parts of some rows."""
        return {name: part if name in self.shared_parts else part[rows] for name, part in parts.items()}

    def split_groups(self, weight: Tensor) -> Tensor:
        """`[n, K]` any float dtype -> `[n, k_blocks, group]` f32, the last group filled with zeros."""
        rows, columns = weight.shape
        wide, padding = weight.to(torch.float32), -columns % self.group
        # Padding by nothing copies, and more memory in use makes the allocator give it back and fault it in each time.
        return (F.pad(wide, (0, padding)) if padding else wide).reshape(rows, -1, self.group)

    def _check_matrix(self, weight: Tensor, where: str) -> None:
        if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
            found = f"{str(weight.dtype).removeprefix('torch.')}{list(weight.shape)}"
            raise UnsupportedError(
                f"[{self.name}] {where}: found {found}, needs a non-empty floating-point matrix [N, K], because groups "
                "are cut along the rows of a matrix. Leave this weight out of the pass (skip='...')."
            )

    def check_values(self, groups: Tensor, where: str, first_row: int) -> None:
        """Refuse weights that no grid can hold.

        Args:
            groups: `[n, b, g]` f32, some rows of a weight.
            where: Name of the weight, for messages.
            first_row: Index of the first row in the whole weight, for messages.

        Raises:
            UnsupportedError: An entry is NaN, infinite or beyond 1.7e38.
        """
        lo, hi = torch.aminmax(groups)
        if not bool((lo >= -LARGEST_WEIGHT) & (hi <= LARGEST_WEIGHT)):  # false for NaN too
            self._refuse_values(groups.flatten(1), where, first_row)

    def _refuse_values(self, weight: Tensor, where: str, first_row: int) -> NoReturn:
        row, column = (int(index) for index in (~(weight.abs() <= LARGEST_WEIGHT)).nonzero()[0])
        raise UnsupportedError(
            f"[{self.name}] {where}: entry [{first_row + row}, {column}] is {float(weight[row, column])}, needs a "
            f"finite number of at most {LARGEST_WEIGHT:.2g}, because the scale of its group would not be finite. "
            "Repair the checkpoint, or leave this weight out of the pass (skip='...')."
        )

    def _check_parts(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> None:
        needed = self.part_specs(shape)
        found = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
        if found != needed:
            raise ArtifactError(
                f"[{self.name}] parts of a weight {list(shape)}: found {_describe(found)}, needs {_describe(needed)}, "
                "because the format fixes the layout. The packed weight is damaged or was written in another format: "
                "make it again."
            )


def pad_with_last(weight: Tensor, multiple: int) -> Tensor:
    """`[n, K]` with its last column repeated until K is a multiple: padding that no statistic of a row notices."""
    padding = -weight.shape[1] % multiple
    return torch.cat([weight, weight[:, -1:].expand(-1, padding)], 1) if padding else weight


def _describe(specs: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    parts = (f"{name} {str(dtype).removeprefix('torch.')}{list(dims)}" for name, (dims, dtype) in specs.items())
    return ", ".join(parts) or "nothing"
