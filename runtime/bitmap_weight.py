"""A pruned weight as a bitmap and the values that are left, which a kernel of ours expands in registers on its way by.

PyTorch has no operator for it, and its masked scatter is slower than a disk (`benchmarks/bitmap_linear.py`).
`codegen/cpu/bitmap_source.py` writes the kernel as LLVM IR, and it is compiled once per process and layout.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.codegen.cpu.bitmap_source import BitmapKernel, Form, Kind, best_form, bitmap_source
from jettison.codegen.cpu.compiled import compile_source, host_features, is_available
from jettison.ir.errors import ArtifactError
from jettison.ir.ops.bitmap_linear import BLOCK, SLAB, check_bitmap, row_sizes, slab_chunks, unpack_bits
from jettison.runtime.packed_linear import BLOCK_WEIGHTS, _product_dtype, _scratch
from jettison.runtime.torch_threads import run_shared

# From this many rows of x on, expanding blocks of the weight and multiplying them is faster.
MANY_ROWS = 12
# Rows of x that the kernel takes while a block of the weight is in registers.
INPUTS = 4
# A thread with fewer weights than this takes longer to be told than to compute.
_FEWEST_WEIGHTS = 1 << 18
# Shares for every thread: one that is held up leaves the rest of its own to the others.
_SHARES = 4
_KINDS: dict[torch.dtype, Kind] = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True)
class BitmapKernels:
    """Compiled for this processor, each over a job of rows that threads share.

    Attributes:
        multiply: By the number of rows of x.
        expand: To `dense`.
        dense: What weights are expanded to for many rows of x.
    """

    multiply: dict[int, Callable[[int], None]]
    expand: Callable[[int], None]
    dense: torch.dtype


@functools.cache
def bitmap_kernels(
    kind: Kind, group: int, form: Form | None = None, features: frozenset[str] | None = None,
    dense: torch.dtype | None = None,
) -> BitmapKernels:  # fmt: skip
    """Compile the kernels of one layout, once in a process.

    Args:
        kind: How values are stored.
        group: Columns that share a scale.
        form: The fastest there is unless given.
        features: Of the processor, by their names in LLVM; those it has unless given.
        dense: What is fastest to multiply unless given.
    """
    known = host_features() if features is None else features
    form = form or best_form(kind, known)
    dense = dense or _product_dtype()
    name: Literal["bf16", "f32"] = "bf16" if dense == torch.bfloat16 else "f32"
    has_bf16 = "avx512bf16" in known and form == "vbmi2"
    kernel = BitmapKernel(kind, group, form, (1, INPUTS), name, has_bf16)
    function = compile_source(bitmap_source(kernel), features)
    multiply = {inputs: function(f"multiply_{inputs}_shared", 1) for inputs in kernel.inputs}
    return BitmapKernels(multiply, function("expand_shared", 1), dense)


def pack_bitmap(
    bitmap: Tensor, starts: Tensor, values: Tensor, scales: Tensor | None, bits: int, group: int, in_features: int
) -> BitmapWeight | None:
    """Hold a weight for its kernel.

    Args:
        bitmap: As in `jettison::bitmap_linear`, like the rest.
        starts: Of slabs.
        values: Those kept.
        scales: Per group, or None.
        bits: Per value.
        group: Columns that share a scale.
        in_features: K.

    Returns:
        The weight, or None where no kernel reads it: scales of another dtype than bf16, or a processor that LLVM does
        not compile for in this process.

    Raises:
        ArtifactError: The bitmap and the values do not belong together.
    """
    if (scales is not None and scales.dtype != torch.bfloat16) or not is_available():
        return None
    parts = {"bitmap": bitmap, "starts": starts, "values": values, "scales": scales}
    check_bitmap(bitmap, starts, values, scales, bits, group, in_features)
    row_begins(bitmap, starts, values, bits)
    # Copies: what is given may be mapped from a file, which then can go.
    return BitmapWeight({n: part.clone() for n, part in parts.items() if part is not None}, bits, group, in_features)


class BitmapWeight:
    """See the module docstring and `PackedWeight`, of which it has `linear` alone: no table is ever pruned.

    Its numbers are those of the operator up to the order of fp32 sums; for `MANY_ROWS` rows of x and more, weights, x
    and results are rounded to bf16 where the processor multiplies those.

    Args:
        parts: `bitmap`, `starts`, `values` and perhaps `scales` (bf16), as in `jettison::bitmap_linear`, contiguous;
            the bitmap must count as many values as there are.
        bits: Per value.
        group: Columns that share a scale.
        in_features: K.
    """

    def __init__(self, parts: Mapping[str, Tensor], bits: int, group: int, in_features: int) -> None:
        self._parts = dict(parts)
        self.bits, self.group, self.columns = bits, group, in_features
        self.rows, self._blocks = len(parts["bitmap"]), parts["bitmap"].shape[1] // 8
        kind: Kind = "int4" if bits == 4 else "int8" if bits == 8 else _KINDS[parts["values"].dtype]
        self._kernels = bitmap_kernels(kind, group if bits <= 8 else BLOCK)
        self.nbytes = sum(part.nbytes for part in self._parts.values())

    @classmethod
    def of_form(cls, form: Mapping[str, Any]) -> BitmapWeight:
        """See `StoredWeight`."""
        rows, columns, bits, group = (int(form[name]) for name in ("rows", "columns", "bits", "group"))
        shapes = {
            "bitmap": (torch.uint8, (rows, -(-columns // BLOCK) * 8)),
            "starts": (torch.int64, (-(-rows // SLAB) + 1,)),
            "values": (getattr(torch, form["dtype"]), (int(form["values"]),)),
        }
        if bits <= 8:
            shapes["scales"] = torch.bfloat16, (rows, -(-columns // group))
        parts = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in shapes.items()}
        return cls(parts, bits, group, columns)

    @property
    def granule(self) -> int:
        """See `StoredWeight`."""
        return SLAB

    @property
    def form(self) -> dict[str, int | str]:
        """See `StoredWeight`."""
        values = self._parts["values"]
        sizes = {"rows": self.rows, "columns": self.columns, "bits": self.bits, "group": self.group}
        return {**sizes, "values": len(values), "dtype": str(values.dtype).removeprefix("torch.")}

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See `StoredWeight`."""
        return {name: (part.dtype, tuple(part.shape)) for name, part in self._parts.items()}

    def parts(self) -> dict[str, Tensor]:
        """The tensors that it holds."""
        return dict(self._parts)

    def with_parts(self, parts: Mapping[str, Tensor]) -> BitmapWeight:
        """The same weight over tensors that lie elsewhere.

        Args:
            parts: Copies of what `parts` returned, which the kernel trusts.
        """
        other = copy.copy(self)
        other._parts = dict(parts)
        return other

    def rows_between(self, start: int, stop: int) -> BitmapWeight:
        """Some of its rows, over the same memory.

        Args:
            start: A multiple of 64.
            stop: A multiple of 64, or all rows.
        """
        stop = min(stop, self.rows)
        assert start % SLAB == 0, "rows lie in slabs of 64"
        assert stop % SLAB == 0 or stop == self.rows, "rows lie in slabs of 64"
        starts = self._parts["starts"][start // SLAB : -(-stop // SLAB) + 1]
        base = int(self._parts["starts"][0])
        values = self._parts["values"][int(starts[0]) - base : int(starts[-1]) - base]
        own = {name: part[start:stop] for name, part in self._parts.items() if name not in ("starts", "values")}
        other = self.with_parts({**own, "starts": starts, "values": values})
        other.rows, other.nbytes = stop - start, sum(part.nbytes for part in other._parts.values())
        return other

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedWeight`."""
        flat = x.reshape(-1, self.columns)
        many = len(flat) >= MANY_ROWS
        flat = flat.to(self._kernels.dense if many else torch.float32)
        padding = self._blocks * BLOCK - self.columns
        flat = F.pad(flat, (0, padding)) if padding else flat.contiguous()
        out = torch.empty(len(flat), self.rows)
        (self._multiply_expanded if many else self._multiply)(flat, out)
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], self.rows).to(x.dtype)

    def expanded(self) -> Tensor:
        """The weight `[N, K]` in the dtype of products, for tests and inspection."""
        dense = torch.empty(self.rows, self._blocks * BLOCK, dtype=self._kernels.dense)
        self._expand(dense, 0, self.rows)
        return dense[:, : self.columns]

    def _multiply(self, x: Tensor, out: Tensor) -> None:
        """`[M, 64 * blocks]` f32 by the weight into `[M, N]` f32, every block expanded once for `INPUTS` rows."""
        rows = len(x)
        if rows % INPUTS > 1:  # zeros beside them take less time than one after the other
            x, padded = F.pad(x, (0, 0, 0, -rows % INPUTS)), out.new_empty(rows + -rows % INPUTS, self.rows)
            self._multiply(x, padded)
            out.copy_(padded[:rows])
            return
        for first in range(0, rows - rows % INPUTS, INPUTS):
            self._multiply_inputs(x[first:], out[first:], INPUTS)
        if rows % INPUTS:
            self._multiply_inputs(x[-1:], out[-1:], 1)

    def _multiply_inputs(self, x: Tensor, out: Tensor, inputs: int) -> None:
        """The same for the first rows of x."""
        arguments = (x.data_ptr(), out.data_ptr(), 0, 0, self.rows, self._blocks)
        self._share(self._kernels.multiply[inputs], 0, self.rows, inputs, arguments)

    def _multiply_expanded(self, x: Tensor, out: Tensor) -> None:
        """The same for many rows of x, in the dtype of products."""
        width = self._blocks * BLOCK
        at_once = max(1, BLOCK_WEIGHTS // (width * SLAB)) * SLAB
        for start in range(0, self.rows, at_once):
            stop = min(start + at_once, self.rows)
            dense = _scratch(self._kernels.dense, stop - start, width)
            self._expand(dense, start, stop)
            out[:, start:stop] = F.linear(x, dense)

    def _expand(self, dense: Tensor, first: int, last: int) -> None:
        """Rows of the weight into `[last - first, 64 * blocks]`."""
        self._share(self._kernels.expand, first, last, 1, (dense.data_ptr(), first, 0, 0, self._blocks))

    def _pointers(self) -> list[int]:
        parts = (self._parts.get(name) for name in ("bitmap", "starts", "values", "scales"))
        return [0 if part is None else part.data_ptr() for part in parts]

    def _share(
        self, kernel: Callable[[int], None], first: int, last: int, inputs: int, arguments: Sequence[int]
    ) -> None:
        """Have a kernel go over rows in the threads that torch may use, whole slabs at a time."""
        slabs = -(-(last - first) // SLAB)
        at_once = -(-_FEWEST_WEIGHTS // (SLAB * self._blocks * BLOCK * inputs))
        threads = max(1, min(torch.get_num_threads(), slabs // at_once))
        at_once = max(at_once, slabs // (threads * _SHARES)) if threads > 1 else slabs
        run_shared(kernel, [first, last, at_once * SLAB, *self._pointers(), *arguments], threads)


def row_begins(bitmap: Tensor, starts: Tensor, values: Tensor, bits: int) -> Tensor:
    """Where in the values each row begins, and the last one ends: `[N + 1] i64`.

    Args:
        bitmap: As in `jettison::bitmap_linear`, like the rest.
        starts: Of slabs.
        values: Those kept.
        bits: Per value.

    Raises:
        ArtifactError: They do not belong together: a kernel would read behind the values.
    """
    sizes = torch.cat([row_sizes(unpack_bits(bitmap[rows]), bits) for rows in slab_chunks(*bitmap.shape)])
    begins = F.pad(sizes.cumsum(0), (1, 0))
    slabs = [*range(0, len(bitmap), SLAB), len(bitmap)]
    if not torch.equal(starts, begins[slabs]) or int(starts[-1]) != len(values):
        raise ArtifactError(
            f"[bitmap] weight of {len(bitmap)} rows: the bitmap counts {int(sizes.sum())} values, of which "
            f"{len(values)} are there, or slabs of rows do not begin where they should. The packed weight is damaged: "
            "make it again."
        )
    return begins
