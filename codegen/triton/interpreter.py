"""Triton's interpreter, mended: `tl.dot` multiplies the bits of bf16 numbers, and every `tl.max` sets all up anew."""

from __future__ import annotations

from typing import Any

_MARK = "_jettison_mended"


def mend() -> None:
    """Mend the interpreter of this process, once."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, _MARK):
        setattr(interpreter, _MARK, True)
        _read_bf16(interpreter)
        _patch_once(interpreter)


def _read_bf16(interpreter: Any) -> None:
    """Have `tl.dot` read bf16 as numbers; found in Triton 3.6 and 3.9, whose interpreter keeps bf16 in u16."""
    import numpy
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
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


class _Nothing:
    """The scope of a patch that was there already."""

    def restore(self) -> None:
        pass


def _patch_once(interpreter: Any) -> None:
    """Replace the functions of the language once per launch, not at every `tl.max`, which is faster than that."""
    import triton.language as tl

    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[tuple[bool, ...]] = set()

    def patch_lang(function: Any) -> Any:
        visible = list(function.__globals__.values())
        languages = tuple(any(value is language for value in visible) for language in (tl, tl.core))
        if languages in patched:
            return _Nothing()
        patched.add(languages)
        return patch(function)

    def call(self: Any, *given: Any, **options: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *given, **options)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = call
