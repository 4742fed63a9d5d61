"""Programs of the small models: each is captured once in a process, however many tests rewrite it."""

from __future__ import annotations

import functools

from jettison.ir.program import Program
from jettison.passes.base import Pass
from jettison.passes.pipeline import apply, prepare
from jettison.source import open_source
from tests.models.tiny_models import tiny_model


@functools.cache
def _prepared(name: str, layers: int | None, dtype: str) -> Program:
    program = open_source(tiny_model(name, layers=layers), dtype=dtype).program
    prepare(program)
    return program


def tiny_program(name: str, *passes: Pass, layers: int | None = None, dtype: str = "float32") -> Program:
    """A small model, captured, prepared and rewritten by passes; may be changed."""
    program = _prepared(name, layers, dtype).copy()
    apply(program, passes)
    return program
