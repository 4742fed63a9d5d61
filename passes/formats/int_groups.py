"""Integer groups: round-to-nearest 8-, 4- and 2-bit weights with one scale per group of columns.

Parts (the layout of `com.microsoft::MatMulNBits`, spelled out in `jettison.ir.ops.quantized_linear`):
`codes` u8 `[N, k_blocks, group * bits / 8]`, `scales` f32 `[N, k_blocks]`, and, unless symmetric, `zeros` u8
`[N, ceil(k_blocks * bits / 8)]`. K that is not a multiple of the group is padded with codes equal to the zero point,
which decode to 0.

Asymmetric. `lo = min(0, min w)`, `hi = max(0, max w)`, `s = (hi - lo) / (2^b - 1)`, `z = round(-lo / s)`,
`code = clip(round(w / s) + z, 0, 2^b - 1)`. Zero has to be in the range: the zero point is an integer among the codes,
so the representable range contains 0 whatever the scale, and a range without it would be clipped, not resolved.
`|w - w'| <= s / 2` up to fp32 rounding.

Symmetric. `m` = the entry of largest magnitude with its sign, `s = m / -2^(b-1)` (so scales may be negative), zero
point `2^(b-1)`, not stored. All codes are used and `m` is exact. `|w - w'| <= |s| / 2`, except for weights beyond
`-m (1 - 2^-b)` on the side opposite to `m`, whose code is clipped: there `|w - w'| <= |s|`.

A constant group decodes to its constant within fp32 rounding, an all-zero group exactly (its scale is 1).
Groups whose scale would be below the smallest normal fp32 count as all zero.

Relative squared error measured on N(0, 1) weights and on the matrices of tiny-llama, 4 bits, group 32 / 64 / 128: this
asymmetric rule .0065 / .0083 / .0102 and .0067 / .0085 / .0103; this symmetric rule .0074 / .0090 / .0107 and
.0075 / .0093 / .0110; the textbook symmetric rule `s = max|w| / 7` .0094 / .0116 / .0138 and .0096 / .0119 / .0142.
Leaving zero out of the range changes nothing there and turns .0005 into .35 on weights 1 + 0.1 N(0, 1). At 2 bits the
symmetric rule is the better one (group 32: .131 against .165).

Source: ONNX Runtime, MLAS block quantiser (both rules); llama.cpp `Q4_0` (the signed scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from jettison.ir.errors import ArtifactError, OptionError, UnsupportedError
from jettison.ir.ops.quantized_linear import dequantize_rows, pack_codes, row_chunks

BITS = (8, 4, 2)
GROUPS = (32, 64, 128)

# Half of the fp32 range: the end of the grid lies up to half a step beyond the largest weight and must stay finite.
LARGEST_WEIGHT = torch.finfo(torch.float32).max / 2
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class IntGroups:
    """A weight format: `bits`-bit codes, a scale and a zero point per `group` columns.

    Attributes:
        bits: 8, 4 or 2 bits per code.
        group: 32, 64 or 128 columns that share a scale and a zero point.
        symmetric: the zero point is the middle of the code range and is not stored.

    Raises:
        OptionError: a field is outside its range.
    """

    bits: int
    group: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        for field, value, legal in (("bits", self.bits, BITS), ("group", self.group, GROUPS)):
            if type(value) is not int or value not in legal:
                choices = ", ".join(str(choice) for choice in legal)
                raise OptionError(
                    f"[int-groups] {field}={value!r}: needs one of {choices}, because these are the layouts that the "
                    f"kernels read. Set {field} to one of them."
                )
        if not isinstance(self.symmetric, bool):
            raise OptionError(f"[int-groups] symmetric={self.symmetric!r}: needs true or false. Set one of the two.")

    @property
    def name(self) -> str:
        """The canonical text, for example `int4{group=32,symmetric=false}`."""
        return f"int{self.bits}{{group={self.group},symmetric={str(self.symmetric).lower()}}}"

    def __str__(self) -> str:
        return self.name

    def part_specs(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every part of a weight `[N, K]`, in storage order: enough to write a file header."""
        rows, columns = shape
        k_blocks = -(-columns // self.group)
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((rows, k_blocks, self.group * self.bits // 8), torch.uint8),
            "scales": ((rows, k_blocks), torch.float32),
        }
        if not self.symmetric:
            specs["zeros"] = ((rows, -(-k_blocks * self.bits // 8)), torch.uint8)
        return specs

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
        specs = self.part_specs((weight.shape[0], weight.shape[1]))
        parts = {name: torch.empty(dims, dtype=dtype) for name, (dims, dtype) in specs.items()} if out is None else out
        self._check_parts(parts, (weight.shape[0], weight.shape[1]))
        for rows in row_chunks(weight.shape[0], weight.shape[1]):
            for name, chunk in self.encode_rows(weight[rows], where, rows.start).items():
                parts[name][rows] = chunk
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
        groups = self._split_groups(weight)
        top_code = 2**self.bits - 1
        # Clamping with 0 includes zero in the range, and makes padding (zeros) harmless to the statistics.
        lo, hi = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
        good = (lo >= -LARGEST_WEIGHT) & (hi <= LARGEST_WEIGHT)  # false for NaN too
        if not bool(good.all()):
            self._refuse_values(good, weight, where, first_row)
        if self.symmetric:
            scales = torch.where(hi > -lo, hi, lo) / -(2 ** (self.bits - 1))
            scales.masked_fill_(scales.abs() < SMALLEST_SCALE, 1.0)
            zeros = torch.full_like(scales, 2 ** (self.bits - 1))
        else:
            scales = (hi - lo) / top_code
            scales.masked_fill_(scales < SMALLEST_SCALE, 1.0)
            zeros = (-lo / scales).round_().clamp_(0, top_code)
        codes = groups.div(scales.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, top_code)
        # Through int16: fp32 to u8 in one step is not vectorised and takes seven times as long.
        parts = {"codes": pack_codes(codes.to(torch.int16).to(torch.uint8), self.bits), "scales": scales}
        if not self.symmetric:
            parts["zeros"] = self._pack_zeros(zeros)
        return parts

    @torch.no_grad()
    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Dequantise: `(code - zero) * scale`.

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
        zeros = parts.get("zeros")
        for rows in row_chunks(*shape):
            weight[rows] = dequantize_rows(
                parts["codes"][rows],
                parts["scales"][rows],
                None if zeros is None else zeros[rows],
                self.bits,
                self.group,
                shape[1],
            )
        return weight

    def _split_groups(self, weight: Tensor) -> Tensor:
        """`[n, K]` any float dtype -> `[n, k_blocks, group]` f32, the last group filled with zeros."""
        rows, columns = weight.shape
        k_blocks = -(-columns // self.group)
        if k_blocks * self.group == columns:
            return weight.to(torch.float32).reshape(rows, k_blocks, self.group)
        padded = torch.zeros(rows, k_blocks * self.group, dtype=torch.float32)
        padded[:, :columns] = weight
        return padded.view(rows, k_blocks, self.group)

    def _pack_zeros(self, zeros: Tensor) -> Tensor:
        """`[n, k_blocks]` f32 -> `[n, ceil(k_blocks * bits / 8)]` u8: every row starts on a byte."""
        per_byte = 8 // self.bits
        padding = -zeros.shape[1] % per_byte
        return pack_codes(torch.nn.functional.pad(zeros.to(torch.uint8), (0, padding)), self.bits)

    def _check_matrix(self, weight: Tensor, where: str) -> None:
        if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
            found = f"{str(weight.dtype).removeprefix('torch.')}{list(weight.shape)}"
            raise UnsupportedError(
                f"[{self.name}] {where}: found {found}, needs a non-empty floating-point matrix [N, K], because groups "
                "are cut along the rows of a matrix. Leave this weight out of the pass (skip='...')."
            )

    def _refuse_values(self, good: Tensor, weight: Tensor, where: str, first_row: int) -> NoReturn:
        row, block = (int(index) for index in (~good).nonzero()[0])
        start = block * self.group
        entries = weight[row, start : start + self.group].to(torch.float32)
        column = int((~(entries.abs() <= LARGEST_WEIGHT)).nonzero()[0])
        raise UnsupportedError(
            f"[{self.name}] {where}: entry [{first_row + row}, {start + column}] is {float(entries[column])}, needs a "
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


def _describe(specs: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    parts = (f"{name} {str(dtype).removeprefix('torch.')}{list(dims)}" for name, (dims, dtype) in specs.items())
    return ", ".join(parts) or "nothing"
