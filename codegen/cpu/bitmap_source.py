"""LLVM IR that expands rows of a bitmap weight and multiplies them: see `jettison.ir.ops.bitmap_linear` for the layout.

Functions of one module, over rows `[first, last)` of the weight, `first` a multiple of 64:

    multiply_I(bitmap, starts, values, scales, x, out, first, last, rows, blocks)
    expand(bitmap, starts, values, scales, dense, begin, first, last, blocks)

and `NAME_shared` of each, through which threads share rows (`jettison.codegen.cpu.row_shares`).

`out[i, n] = sum over k of w[n, k] x[i, k]`, with `x` f32 `[I, 64 * blocks]`, zero behind column K, and `out` f32
`[I, rows]`; `dense[n - begin, k] = w[n, k]`, f32 or bf16 `[last - begin, 64 * blocks]`. All keep a block of 64
weights in registers: what differs is how it gets there.

| form     | a block                                                                                       |
|----------|-----------------------------------------------------------------------------------------------|
| vbmi2    | AVX-512 VBMI2: its values are loaded at once and moved apart by the mask in one instruction    |
| bmi2     | codes of 8 columns at a time are moved apart in a 64-bit register; needs codes of 4 or 8 bits  |
| portable | values are written one by one to where their bits are                                          |

No form reads a byte that is not part of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from jettison.codegen.cpu.row_shares import row_shares

Form = Literal["vbmi2", "bmi2", "portable"]
Kind = Literal["int4", "int8", "bf16", "f16", "f32"]
BLOCK, SLAB, LANES = 64, 64, 16
_CODES = ("int4", "int8")
_STORED = {"int4": "i8", "int8": "i8", "bf16": "i16", "f16": "i16", "f32": "float"}
# Bytes behind the values of a block that the form bmi2 may read.
_READ_AHEAD = 80
_FEATURES = {
    "vbmi2": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vbmi2", "bmi2"}),
    "bmi2": frozenset({"avx2", "fma", "bmi2"}),
    "portable": frozenset[str](),
}


@dataclass(frozen=True)
class BitmapKernel:
    """What a module is specialised on.

    Attributes:
        kind: How values are stored.
        group: Columns that share a scale, a multiple of 64; without meaning for floating point.
        form: See the module docstring.
        inputs: Numbers of rows of x that there is a `multiply` for.
        dense: What `expand` writes.
        has_bf16: Whether the processor rounds to bf16 in one instruction.
    """

    kind: Kind
    group: int
    form: Form
    inputs: tuple[int, ...] = (1,)
    dense: Literal["f32", "bf16"] = "f32"
    has_bf16: bool = False


def best_form(kind: Kind, features: frozenset[str]) -> Form:
    """The fastest form for a processor with these features, by their names in LLVM."""
    if _FEATURES["vbmi2"] <= features:
        return "vbmi2"
    return "bmi2" if kind in _CODES and _FEATURES["bmi2"] <= features else "portable"


def bitmap_source(kernel: BitmapKernel) -> str:
    """The module as text."""
    writer = _Writer(kernel)
    for inputs in kernel.inputs:
        writer.multiply(inputs)
    writer.expand()
    return writer.text()


class _Writer:
    """Writes the functions of one kernel. Variables live on the stack; LLVM moves them to registers."""

    def __init__(self, kernel: BitmapKernel) -> None:
        self.kernel = kernel
        self._lines: list[str] = []
        self._declared: dict[str, None] = {}
        self._shared: list[str] = []
        self._names = 0

    def text(self) -> str:
        """All that was written."""
        return "\n".join([*self._declared, "", *self._lines, *self._shared])

    # ------------------------------------------------------------------------------------------------------ functions

    def multiply(self, count: int) -> None:
        """`multiply` for so many rows of x: sums stay in registers for a whole row of the weight."""
        inputs = range(count)
        self._open(f"multiply_{count}", "ptr %x, ptr %out, i64 %first, i64 %last, i64 %rows, i64 %blocks")
        sums = [[self._variable(f"<{LANES} x float>") for _ in range(4)] for _ in inputs]

        def begin() -> None:
            for each in (each for of_input in sums for each in of_input):
                self._put(f"<{LANES} x float>", "zeroinitializer", each)

        def use(block: str, weight: Sequence[str]) -> None:
            for i in inputs:
                offset = self._call(f"add i64 {self._call(f'mul i64 {self._columns}, {i}')}, {block}")
                for part, values in enumerate(weight):
                    x = self._at("%x", "float", self._call(f"add i64 {offset}, {part * LANES}"))
                    read = self._call(f"load <{LANES} x float>, ptr {x}, align 4")
                    total = self._get(f"<{LANES} x float>", sums[i][part])
                    total = self._intrinsic(
                        f"<{LANES} x float>", f"llvm.fmuladd.v{LANES}f32",
                        *((f"<{LANES} x float>", each) for each in (values, read, total)),
                    )  # fmt: skip
                    self._put(f"<{LANES} x float>", total, sums[i][part])

        def end(row: str) -> None:
            for i in inputs:
                parts = [self._get(f"<{LANES} x float>", each) for each in sums[i]]
                halves = [self._call(f"fadd <{LANES} x float> {parts[j]}, {parts[j + 2]}") for j in (0, 1)]
                total = self._call(f"fadd <{LANES} x float> {halves[0]}, {halves[1]}")
                added = self._call(
                    f"call reassoc float @llvm.vector.reduce.fadd.v{LANES}f32(float 0.0, <{LANES} x float> {total})"
                )
                self._declare(f"declare float @llvm.vector.reduce.fadd.v{LANES}f32(float, <{LANES} x float>)")
                place = self._call(f"add i64 {self._call(f'mul i64 %rows, {i}')}, {row}")
                self._line(f"store float {added}, ptr {self._at('%out', 'float', place)}, align 4")

        self._rows(begin, use, end)
        self._close()

    def expand(self) -> None:
        """`expand`: a block is written as it is."""
        self._open("expand", "ptr %dense, i64 %begin, i64 %first, i64 %last, i64 %blocks")

        def use(block: str, weight: Sequence[str]) -> None:
            row = self._call(f"sub i64 {self._row}, %begin")
            offset = self._call(f"add i64 {self._call(f'mul i64 {self._columns}, {row}')}, {block}")
            for part, values in enumerate(weight):
                place = self._call(f"add i64 {offset}, {part * LANES}")
                if self.kernel.dense == "f32":
                    self._line(f"store <{LANES} x float> {values}, ptr {self._at('%dense', 'float', place)}, align 4")
                else:
                    narrow, to = self._narrowed(values), self._at("%dense", "i16", place)
                    self._line(f"store <{LANES} x i16> {narrow}, ptr {to}, align 2")

        self._rows(lambda: None, use, lambda row: None)
        self._close()

    # ---------------------------------------------------------------------------------------------------------- loops

    def _rows(
        self,
        begin: Callable[[], object],
        use: Callable[[str, Sequence[str]], object],
        end: Callable[[str], object],
    ) -> None:
        """All rows, and in each its groups and their blocks; `use` gets the first column and four vectors."""
        stored = _STORED[self.kernel.kind]
        self._columns = self._call(f"mul i64 %blocks, {BLOCK}")
        slab = self._at("%starts", "i64", self._call(f"udiv i64 %first, {SLAB}"))
        base = self._call("load i64, ptr %starts, align 1")
        start = self._call(f"sub i64 {self._call(f'load i64, ptr {slab}, align 1')}, {base}")
        last_slab = self._call(f"udiv i64 {self._call(f'add i64 %last, {SLAB - 1}')}, {SLAB}")
        last = self._call(f"load i64, ptr {self._at('%starts', 'i64', last_slab)}, align 1")
        self._end = self._at("%values", stored, self._call(f"sub i64 {last}, {base}"))
        self._position = self._variable("ptr")
        self._put("ptr", self._at("%values", stored, start), self._position)
        in_group = self.kernel.group // BLOCK if self.kernel.kind in _CODES else 0
        groups = "1"
        if in_group:
            groups = self._call(f"udiv i64 {self._call(f'add i64 %blocks, {in_group - 1}')}, {in_group}")

        def each_row(row: str) -> None:
            self._row = row
            begin()

            def each_group(group: str) -> None:
                self._begin_group(row, group, groups)
                first, stop = "0", "%blocks"
                if in_group:
                    first = self._call(f"mul i64 {group}, {in_group}")
                    full = self._call(f"add i64 {first}, {in_group}")
                    stop = self._intrinsic("i64", "llvm.umin.i64", ("i64", full), ("i64", "%blocks"))
                self._loop(first, stop, each_block)

            def each_block(block: str) -> None:
                word = self._call(f"add i64 {self._call(f'mul i64 {row}, %blocks')}, {block}")
                mask = self._call(f"load i64, ptr {self._at('%bitmap', 'i64', word)}, align 1")
                use(self._call(f"mul i64 {block}, {BLOCK}"), self._block(mask))

            self._loop("0", groups, each_group)
            end(row)

        self._loop("%first", "%last", each_row)

    def _begin_group(self, row: str, group: str, groups: str) -> None:
        """Load the scale; of 4-bit codes, multiply all 16 numbers that they stand for by it."""
        if self.kernel.kind not in _CODES:
            return
        place = self._call(f"add i64 {self._call(f'mul i64 {row}, {groups}')}, {group}")
        narrow = self._call(f"load i16, ptr {self._at('%scales', 'i16', place)}, align 2")
        wide = self._call(f"shl i32 {self._call(f'zext i16 {narrow} to i32')}, 16")
        scale = self._call(f"bitcast i32 {wide} to float")
        one = self._call(f"insertelement <{LANES} x float> poison, float {scale}, i64 0")
        self._scale = self._call(
            f"shufflevector <{LANES} x float> {one}, <{LANES} x float> poison, <{LANES} x i32> zeroinitializer"
        )
        if self.kernel.kind == "int4":
            numbers = ", ".join(f"float {code - 16 * (code >= 8):.1f}" for code in range(16))
            self._scaled = self._call(f"fmul <{LANES} x float> <{numbers}>, {self._scale}")

    # --------------------------------------------------------------------------------------------------------- blocks

    def _block(self, mask: str) -> list[str]:
        """The 64 weights of a block as four vectors of f32; moves on to the values of the next one."""
        count = self._intrinsic("i64", "llvm.ctpop.i64", ("i64", mask))
        position = self._get("ptr", self._position)
        kept = count
        if self.kernel.kind == "int4":
            kept = self._call(f"lshr i64 {self._call(f'add i64 {count}, 1')}, 1")
        self._put("ptr", self._at(position, _STORED[self.kernel.kind], kept), self._position)
        if self.kernel.form == "vbmi2":
            return self._by_mask(mask, position, kept)
        if self.kernel.form == "bmi2":
            return self._by_word(mask, position, kept)
        return self._one_by_one(mask, position)

    def _by_mask(self, mask: str, position: str, kept: str) -> list[str]:
        """AVX-512: as many values are loaded as may be needed, and those that are moved apart."""
        kind = self.kernel.kind
        if kind == "int4":
            loaded = self._load(32, "i8", position, kept)
            wide = self._call(f"zext <32 x i8> {loaded} to <32 x i16>")
            shifted = self._call(f"shl <32 x i16> {wide}, {_splat(32, 'i16', 4)}")
            both = self._call(f"or <32 x i16> {wide}, {shifted}")
            codes = self._call(f"and <32 x i16> {both}, {_splat(32, 'i16', 0x0F0F)}")
            apart = self._apart(64, "i8", self._call(f"bitcast <32 x i16> {codes} to <64 x i8>"), mask)
            return [self._looked_up(part) for part in self._quarters(apart, "i8")]
        if kind == "int8":
            apart = self._apart(64, "i8", self._load(64, "i8", position, kept), mask)
            return [self._scaled_numbers(part) for part in self._quarters(apart, "i8")]
        lanes, stored = (32, "i16") if kind != "f32" else (16, "float")
        found = []
        for part in range(BLOCK // lanes):
            own = self._call(f"and i64 {self._call(f'lshr i64 {mask}, {part * lanes}')}, {(1 << lanes) - 1}")
            count = self._intrinsic("i64", "llvm.ctpop.i64", ("i64", own))
            apart = self._apart(lanes, stored, self._load(lanes, stored, position, count), own)
            position = self._at(position, stored, count)
            halves = [apart] if kind == "f32" else self._quarters(apart, "i16", 2)
            found += [self._as_floats(half) for half in halves]
        return found

    def _load(self, lanes: int, stored: str, position: str, count: str) -> str:
        """The first `count` elements at a place, and anything behind them; near the end of the weight, nothing else.

        Only there by a mask: what is read by one does not tell the processor what to fetch from memory next.
        """
        type_ = f"<{lanes} x {stored}>"
        found, near, inside, done = self._variable(type_), self._name(), self._name(), self._name()
        behind = self._at(position, stored, str(lanes))
        self._line(f"br i1 {self._call(f'icmp ugt ptr {behind}, {self._end}')}, label %{near}, label %{inside}")
        self._line(f"{near}:")
        full = self._intrinsic("i64", "llvm.x86.bmi.bzhi.64", ("i64", "-1"), ("i64", count))
        suffix = f"v{lanes}{stored.replace('float', 'f32')}"
        wanted = self._bits(full, lanes)
        values = self._intrinsic(
            type_, f"llvm.masked.load.{suffix}.p0", ("ptr", position), ("i32", "1"), (f"<{lanes} x i1>", wanted),
            (type_, "zeroinitializer"), signature=f"ptr, i32 immarg, <{lanes} x i1>, {type_}",
        )  # fmt: skip
        self._put(type_, values, found)
        self._line(f"br label %{done}")
        self._line(f"{inside}:")
        self._put(type_, self._call(f"load {type_}, ptr {position}, align 1"), found)
        self._line(f"br label %{done}")
        self._line(f"{done}:")
        return self._get(type_, found)

    def _apart(self, lanes: int, stored: str, values: str, mask: str) -> str:
        type_ = f"<{lanes} x {stored}>"
        suffix = f"v{lanes}{stored.replace('float', 'f32')}"
        wanted = self._bits(mask, lanes)
        return self._intrinsic(
            type_, f"llvm.x86.avx512.mask.expand.{suffix}", (type_, values), (type_, "zeroinitializer"),
            (f"<{lanes} x i1>", wanted),
        )  # fmt: skip

    def _bits(self, mask: str, lanes: int) -> str:
        narrow = mask if lanes == 64 else self._call(f"trunc i64 {mask} to i{lanes}")
        return self._call(f"bitcast i{lanes} {narrow} to <{lanes} x i1>")

    def _quarters(self, values: str, stored: str, parts: int = 4) -> list[str]:
        """A vector as several of 16 lanes."""
        type_ = f"<{parts * LANES} x {stored}>"
        lanes = [", ".join(f"i32 {part * LANES + lane}" for lane in range(LANES)) for part in range(parts)]
        return [
            self._call(f"shufflevector {type_} {values}, {type_} poison, <{LANES} x i32> <{each}>") for each in lanes
        ]

    def _looked_up(self, codes: str) -> str:
        """4-bit codes `<16 x i8>` to weights."""
        wide = self._call(f"zext <{LANES} x i8> {codes} to <{LANES} x i32>")
        return self._intrinsic(
            f"<{LANES} x float>", "llvm.x86.avx512.permvar.sf.512", (f"<{LANES} x float>", self._scaled),
            (f"<{LANES} x i32>", wide),
        )  # fmt: skip

    def _scaled_numbers(self, numbers: str) -> str:
        """Numbers `<16 x i8>` to weights."""
        wide = self._call(f"sext <{LANES} x i8> {numbers} to <{LANES} x i32>")
        floats = self._call(f"sitofp <{LANES} x i32> {wide} to <{LANES} x float>")
        return self._call(f"fmul <{LANES} x float> {floats}, {self._scale}")

    def _as_floats(self, values: str) -> str:
        """16 stored values in floating point as f32."""
        if self.kernel.kind == "f32":
            return values
        if self.kernel.kind == "f16" and self.kernel.form == "portable":
            return self._widened(values)
        if self.kernel.kind == "f16":
            half = self._call(f"bitcast <{LANES} x i16> {values} to <{LANES} x half>")
            return self._call(f"fpext <{LANES} x half> {half} to <{LANES} x float>")
        wide = self._call(f"zext <{LANES} x i16> {values} to <{LANES} x i32>")
        shifted = self._call(f"shl <{LANES} x i32> {wide}, {_splat(LANES, 'i32', 16)}")
        return self._call(f"bitcast <{LANES} x i32> {shifted} to <{LANES} x float>")

    def _widened(self, values: str) -> str:
        """f16 `<16 x i16>` to f32 where there may be no instruction for it: move the bits, and correct the exponent."""
        wide = self._call(f"sext <{LANES} x i16> {values} to <{LANES} x i32>")
        moved = self._call(f"shl <{LANES} x i32> {wide}, {_splat(LANES, 'i32', 13)}")
        # The sign came along; what was shifted in between is not part of the number.
        bits = self._call(f"and <{LANES} x i32> {moved}, {_splat(LANES, 'i32', 0x8FFFE000 - (1 << 32))}")
        number = self._call(f"bitcast <{LANES} x i32> {bits} to <{LANES} x float>")
        return self._call(f"fmul <{LANES} x float> {number}, <{', '.join([f'float {2.0**112:.1f}'] * LANES)}>")

    def _narrowed(self, values: str) -> str:
        """f32 to the nearest bf16, as `<16 x i16>`."""
        if self.kernel.has_bf16:
            return self._call(
                f"bitcast <{LANES} x bfloat> {self._call(f'fptrunc <{LANES} x float> {values} to <{LANES} x bfloat>')} "
                f"to <{LANES} x i16>"
            )
        bits = self._call(f"bitcast <{LANES} x float> {values} to <{LANES} x i32>")
        shifted = self._call(f"lshr <{LANES} x i32> {bits}, {_splat(LANES, 'i32', 16)}")
        odd = self._call(f"and <{LANES} x i32> {shifted}, {_splat(LANES, 'i32', 1)}")
        more = self._call(f"add <{LANES} x i32> {bits}, {_splat(LANES, 'i32', 0x7FFF)}")
        rounded = self._call(f"add <{LANES} x i32> {more}, {odd}")
        top = self._call(f"lshr <{LANES} x i32> {rounded}, {_splat(LANES, 'i32', 16)}")
        return self._call(f"trunc <{LANES} x i32> {top} to <{LANES} x i16>")

    def _one_by_one(self, mask: str, position: str) -> list[str]:
        """Any processor: a block of zeros in memory, and each value written to its place."""
        kind, stored = self.kernel.kind, _STORED[self.kernel.kind]
        number = "float" if kind == "f32" else stored
        block = self._variable(f"[{BLOCK} x {number}]", once=True)
        self._put(f"[{BLOCK} x {number}]", "zeroinitializer", block)
        left = self._variable("i64")
        rank = self._variable("i64")
        self._put("i64", mask, left)
        self._put("i64", "0", rank)

        def condition() -> str:
            return self._call(f"icmp ne i64 {self._get('i64', left)}, 0")

        def body() -> None:
            bits, at = self._get("i64", left), self._get("i64", rank)
            column = self._intrinsic("i64", "llvm.cttz.i64", ("i64", bits), ("i1", "true"), signature="i64, i1 immarg")
            index = self._call(f"lshr i64 {at}, 1") if kind == "int4" else at
            value = self._call(f"load {stored}, ptr {self._at(position, stored, index)}, align 1")
            if kind == "int4":
                odd = self._call(f"trunc i64 {self._call(f'and i64 {at}, 1')} to i1")
                low = self._call(f"shl i8 {value}, 4")
                first = self._call(f"select i1 {odd}, i8 {value}, i8 {low}")
                value = self._call(f"ashr i8 {first}, 4")
            self._line(f"store {stored} {value}, ptr {self._at(block, stored, column)}, align 1")
            less = self._call(f"sub i64 {bits}, 1")
            self._put("i64", self._call(f"and i64 {bits}, {less}"), left)
            self._put("i64", self._call(f"add i64 {at}, 1"), rank)

        self._while(condition, body)
        found = []
        for part in range(4):
            place = self._at(block, stored, str(part * LANES))
            values = self._call(f"load <{LANES} x {stored}>, ptr {place}, align 1")
            found.append(self._scaled_numbers(values) if kind in _CODES else self._as_floats(values))
        return found

    def _by_word(self, mask: str, position: str, kept: str) -> list[str]:
        """BMI2: bits of a word are dealt out to the bytes whose weights are kept, 8 columns at a time."""
        source = self._readable(position, kept)
        kind = self.kernel.kind
        found = []
        for part in range(BLOCK // LANES):
            words = []
            for place in (2 * part * 8, (2 * part + 1) * 8):
                before = self._call(f"and i64 {mask}, {(1 << place) - 1}")
                rank = self._intrinsic("i64", "llvm.ctpop.i64", ("i64", before))
                byte = self._call(f"lshr i64 {rank}, 1") if kind == "int4" else rank
                word = self._call(f"load i64, ptr {self._at(source, 'i8', byte)}, align 1")
                if kind == "int4":
                    odd = self._call(f"shl i64 {self._call(f'and i64 {rank}, 1')}, 2")
                    word = self._call(f"lshr i64 {word}, {odd}")
                columns = self._call(f"lshr i64 {mask}, {place}")
                bits = self._deal(columns, str(0x0101010101010101))
                wanted = self._call(f"mul i64 {bits}, {15 if kind == 'int4' else 255}")
                words.append(self._deal(word, wanted))
            pair = self._call(f"insertelement <2 x i64> poison, i64 {words[0]}, i64 0")
            pair = self._call(f"insertelement <2 x i64> {pair}, i64 {words[1]}, i64 1")
            numbers = self._call(f"bitcast <2 x i64> {pair} to <{LANES} x i8>")
            if kind == "int4":
                flipped = self._call(f"xor <{LANES} x i8> {numbers}, {_splat(LANES, 'i8', 8)}")
                numbers = self._call(f"sub <{LANES} x i8> {flipped}, {_splat(LANES, 'i8', 8)}")
            found.append(self._scaled_numbers(numbers))
        return found

    def _deal(self, bits: str, places: str) -> str:
        return self._intrinsic("i64", "llvm.x86.bmi.pdep.64", ("i64", bits), ("i64", places))

    def _readable(self, position: str, kept: str) -> str:
        """Where the bytes of a block can be read with some behind them: near the end of the weight, a copy."""
        copy, chosen = self._variable(f"[{_READ_AHEAD} x i8]", once=True), self._variable("ptr")
        self._put("ptr", position, chosen)
        behind = self._at(position, "i8", str(_READ_AHEAD))
        inside, done = self._name(), self._name()
        self._line(f"br i1 {self._call(f'icmp ugt ptr {behind}, {self._end}')}, label %{inside}, label %{done}")
        self._line(f"{inside}:")
        self._declare("declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1 immarg)")
        self._put(f"[{_READ_AHEAD} x i8]", "zeroinitializer", copy)
        self._line(f"call void @llvm.memcpy.p0.p0.i64(ptr {copy}, ptr {position}, i64 {kept}, i1 false)")
        self._put("ptr", copy, chosen)
        self._line(f"br label %{done}")
        self._line(f"{done}:")
        return self._get("ptr", chosen)

    # ----------------------------------------------------------------------------------------------------------- text

    def _open(self, name: str, more: str) -> None:
        arguments = ["ptr %bitmap", "ptr %starts", "ptr %values", "ptr %scales", *more.split(", ")]
        noalias = [each.replace("ptr ", "ptr noalias ") for each in arguments]
        self._line(f"define void @{name}({', '.join(noalias)}) #0 {{")
        self._entry = len(self._lines)
        self._shared.append(row_shares(name, [each.split()[0] for each in arguments], arguments.index("i64 %first")))

    def _close(self) -> None:
        self._line("ret void")
        self._line("}")
        self._declare(
            'attributes #0 = { noinline nounwind "prefer-vector-width"="512" "min-legal-vector-width"="512" }'
        )

    def _line(self, text: str) -> None:
        self._lines.append(text if text.startswith(("define", "}")) or text.endswith(":") else f"  {text}")

    def _declare(self, text: str) -> None:
        self._declared[text] = None

    def _name(self) -> str:
        self._names += 1
        return f"v{self._names}"

    def _call(self, instruction: str) -> str:
        name = f"%{self._name()}"
        self._line(f"{name} = {instruction}")
        return name

    def _intrinsic(self, result: str, name: str, *operands: tuple[str, str], signature: str | None = None) -> str:
        self._declare(f"declare {result} @{name}({signature or ', '.join(type_ for type_, _ in operands)})")
        return self._call(f"call {result} @{name}({', '.join(f'{type_} {value}' for type_, value in operands)})")

    def _at(self, base: str, type_: str, index: str) -> str:
        return self._call(f"getelementptr {type_}, ptr {base}, i64 {index}")

    def _variable(self, type_: str, *, once: bool = False) -> str:
        """A place on the stack, made when the function begins, wherever the code that asks for it is."""
        name = f"%{self._name()}"
        self._lines.insert(self._entry, f"  {name} = alloca {type_}{', align 64' if once else ''}")
        return name

    def _get(self, type_: str, variable: str) -> str:
        return self._call(f"load {type_}, ptr {variable}")

    def _put(self, type_: str, value: str, variable: str) -> None:
        self._line(f"store {type_} {value}, ptr {variable}")

    def _loop(self, first: str, stop: str, body: Callable[[str], object]) -> None:
        """`body` is called with each number from `first`, below `stop`."""
        index = self._variable("i64")
        self._put("i64", first, index)

        def step() -> None:
            current = self._get("i64", index)
            body(current)
            self._put("i64", self._call(f"add nuw nsw i64 {current}, 1"), index)

        self._while(lambda: self._call(f"icmp ult i64 {self._get('i64', index)}, {stop}"), step)

    def _while(self, condition: Callable[[], str], body: Callable[[], object]) -> None:
        test, inside, done = self._name(), self._name(), self._name()
        self._line(f"br label %{test}")
        self._line(f"{test}:")
        holds = condition()
        self._line(f"br i1 {holds}, label %{inside}, label %{done}")
        self._line(f"{inside}:")
        body()
        self._line(f"br label %{test}")
        self._line(f"{done}:")


def _splat(lanes: int, type_: str, value: int) -> str:
    return f"<{', '.join(f'{type_} {value}' for _ in range(lanes))}>"
