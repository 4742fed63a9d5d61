"""How a kernel reads a weight: the parameters it needs, and the lines that turn memory into numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS
from jettison.codegen.triton.word_layout import fields, group_words

# Codes become fp32 without a conversion, which is slow: or-ed to the top of the mantissa of 1.0, a code is
# 1 + code / 2**n. What the ones and the middle of the codes add to a sum is the same for all rows, `x_bias`. The 1.0 is
# not written as a constant but made where the compiler cannot see that it is one: mask and or are one instruction then.
ONE = "one = 0x3F800000 | tl.program_id(2)"


@dataclass(frozen=True)
class WeightForm:
    """A weight `[N, K]` in memory.

    Attributes:
        dtype: Of a dense weight; of scales and offsets of a quantised one.
        bits: Of a code, or 0 for a dense weight.
        group: Columns that share a scale; 0 for a dense weight.
        has_offsets: Whether groups have zero points other than the middle of the codes.
        has_table: Whether codes name values of a table.
    """

    dtype: torch.dtype
    bits: int = 0
    group: int = 0
    has_offsets: bool = False
    has_table: bool = False

    @property
    def name(self) -> str:
        """For names of kernels."""
        if not self.bits:
            return ELEMENTS[self.dtype]
        if self.has_table:
            return f"lut{self.bits}_g{self.group}"
        return f"int{self.bits}{'' if self.has_offsets else 's'}_g{self.group}"

    @property
    def operator(self) -> str:
        """What reads such a weight in a graph."""
        if not self.bits:
            return "aten.linear"
        return "jettison.lut_linear" if self.has_table else "jettison.quantized_linear"

    @property
    def fields(self) -> int:
        """Numbers in a word."""
        return fields(self.bits) if self.bits else 1

    @property
    def group_words(self) -> int:
        """Words of a group."""
        return group_words(self.bits, self.group) if self.bits else 0

    def row_words(self, columns: int) -> int:
        """Words of a row of K columns."""
        return -(-columns // self.group) * self.group_words if self.bits else columns

    @property
    def parameters(self) -> dict[str, str]:
        """Pointers of a kernel, in the order of `WordWeight.tensors`."""
        element = ELEMENTS[self.dtype]
        if not self.bits:
            return {"weight_ptr": f"*{element}"}
        found = {"words_ptr": "*i32"}
        if self.bits == 3:
            found["highs_ptr"] = "*i16"
        found["scales_ptr"] = f"*{element}"
        if self.has_offsets:
            found["offsets_ptr"] = f"*{element}"
        if self.has_table:
            found["table_ptr"] = "*fp32"
        return found

    def shape_lines(self, columns: int) -> list[str]:
        """Sizes of a row, by name."""
        if not self.bits:
            return [f"ROW_WORDS: tl.constexpr = {columns}  # numbers of a row"]
        return [
            f"ROW_WORDS: tl.constexpr = {self.row_words(columns)}  # {self.fields} codes each",
            f"GROUP_WORDS: tl.constexpr = {self.group_words}",
            f"ROW_GROUPS: tl.constexpr = {-(-columns // self.group)}",
        ]

    def column_line(self, at: str) -> str:
        """Column of the first code of each word `at`."""
        return f"column = {at}" if not self.bits else (
            f"column = {at} // GROUP_WORDS * {self.group} + {at} % GROUP_WORDS"
        )  # fmt: skip

    def offset_lines(self) -> list[str]:
        """Where the words `at` of the rows `row` stand, and what belongs to them."""
        found = ["of_row = row[:, None] * ROW_WORDS + at[None, :]"]
        if self.bits:
            found.append("of_group = row[:, None] * ROW_GROUPS + at[None, :] // GROUP_WORDS")
        return found

    def load_lines(self, mask: str, suffix: str = "", skipped: str = "", pointer: str = "weight_ptr") -> list[str]:
        """Loads of `[rows, words]`: `packed` and what belongs to it.

        Args:
            mask: Of rows and words, or empty.
            suffix: Of the variables.
            skipped: Rows that stand before these, or empty.
            pointer: Of a dense weight.
        """
        guard = f", mask={mask}, other=0" if mask else ""
        of_row, of_group = (
            f"{at} + {skipped} * {size}" if skipped else at
            for at, size in (("of_row", "ROW_WORDS"), ("of_group", "ROW_GROUPS"))
        )
        if not self.bits:
            return [f"packed{suffix} = tl.load({pointer} + {of_row}{guard}).to(tl.float32)"]
        found = [f"packed{suffix} = tl.load(words_ptr + {of_row}{guard})"]
        if self.bits == 3:
            found.append(f"highs{suffix} = tl.load(highs_ptr + {of_row}{guard}).to(tl.int32)")
        found.append(f"scale{suffix} = tl.load(scales_ptr + {of_group}{guard}).to(tl.float32)")
        if self.has_offsets:
            found.append(f"offset{suffix} = tl.load(offsets_ptr + {of_group}{guard}).to(tl.float32)")
        return found

    @property
    def _chunk_bits(self) -> int:
        """Bits of a word that one shift brings to the top of a mantissa, with one or two codes in them."""
        return {8: 8, 4: 8, 3: 2, 2: 4}[self.bits]

    @property
    def chunks(self) -> int:
        """Of a word."""
        return 32 // self._chunk_bits

    @property
    def chunk_fields(self) -> int:
        """Codes of a chunk."""
        return self.fields // self.chunks

    def x_lines(self) -> list[str]:
        """`x` for field `field` of a chunk, and `x_bias`, what is too much in the sum of `x * code`."""
        if self.has_table:
            return []
        top = 3 if self.bits == 3 else self._chunk_bits
        place = f" - {self.bits} * field" if self.chunk_fields > 1 else ""
        return [f"x *= 1 << ({top}{place})", f"x_bias += x * (1.0 + {2 ** (self.bits - 1)} / (1 << ({top}{place})))"]

    def chunk_lines(self, suffix: str = "") -> list[str]:
        """`moved`: chunk `chunk` of the words, at the top of the mantissa; of a table, as it is."""
        if self.has_table:
            return [f"moved{suffix} = packed{suffix} >> {self._chunk_bits} * chunk"]
        if self.bits == 3:
            low, high = f"((packed{suffix} >> 2 * chunk) & 3)", f"(((highs{suffix} >> chunk) & 1) << 2)"
            return [f"moved{suffix} = ({low} | {high}) << 20"]
        down = f"({self._chunk_bits} * chunk - {23 - self._chunk_bits})"
        return [f"moved{suffix} = packed{suffix} >> {down} if {down} > 0 else packed{suffix} << -{down}"]

    def code_lines(self, suffix: str = "") -> list[str]:
        """`code`: field `field` of a chunk, as a number from 1 to 2; of a table, the value."""
        if self.has_table:
            place = f"{self.bits} * field" if self.chunk_fields > 1 else "0"
            return [f"code = tl.load(table_ptr + ((moved{suffix} >> {place}) & {2**self.bits - 1}))"]
        if self.bits == 3:
            taken = f"moved{suffix}"
        else:
            lowest = f"{23 - self._chunk_bits} + {self.bits} * field" if self.chunk_fields > 1 else "15"
            taken = f"(moved{suffix} & ({2**self.bits - 1} << ({lowest})))"
        return [f"code = ({taken} | one).to(tl.float32, bitcast=True)"]

    def value_lines(self, suffix: str = "") -> list[str]:
        """`w`: the weights of field `field`, as fp32."""
        if self.has_table:
            return [f"w{suffix} = code * scale{suffix}"]
        top = 3 if self.bits == 3 else self._chunk_bits
        factor = f"(1 << ({top}{f' - {self.bits} * field' if self.chunk_fields > 1 else ''}))"
        offset = f" + offset{suffix}" if self.has_offsets else ""
        middle = 2 ** (self.bits - 1)
        return [f"w{suffix} = (code * {factor} - ({factor} + {middle})) * scale{suffix}{offset}"]
