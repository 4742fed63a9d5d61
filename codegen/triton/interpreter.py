"""Triton's interpreter, with one mistake mended: its `tl.dot` multiplies the bits of bf16 numbers as integers."""

from __future__ import annotations

from typing import Any

_MARK = "_jettison_reads_bf16"


def mend_products() -> None:
    """Have `tl.dot` read bf16 as numbers; found in Triton 3.6 and 3.9, whose interpreter keeps bf16 in u16."""
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, _MARK):
        return
    original = builder.create_dot

    def as_numbers(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16 or operand.data.dtype != numpy.uint16:
            return operand
        # The upper half of an fp32 number.
        wide = (operand.data.astype(numpy.uint32) << 16).view(numpy.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return original(self, as_numbers(a), as_numbers(b), *others)

    builder.create_dot = create_dot
    setattr(builder, _MARK, True)
