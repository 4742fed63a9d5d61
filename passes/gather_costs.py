"""How much longer a byte of weights takes that is gathered for a token, by target: whether reading less is faster.

Shares of the time over shares of the bytes of decode steps (`speed` and `inputs_speed` in
benchmarks/results/contextual_sparsity.json). What a GPU takes has not been measured: the Triton kernels read slabs as
they read whole weights, so a little more than the same is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping

from jettison.ir.program import Program

# Whole groups of neurons, by whether they are quantised.
_GROUPS: Mapping[str, Mapping[bool, float]] = {
    "torch": {False: 2.3, True: 3.2}, "onnx": {False: 3.0, True: 1.6}, "triton": {False: 1.3, True: 1.3},
}  # fmt: skip
# Single rows of a weight that is not quantised.
_ROWS: Mapping[str, float] = {"torch": 1.1, "onnx": 3.0, "triton": 1.3}
# Of a program that nobody has said a target of.
_USUAL = "torch"


def group_cost(program: Program, *, is_packed: bool) -> float:
    """Of groups of neurons."""
    return _GROUPS[program.target or _USUAL][is_packed]


def row_cost(program: Program) -> float:
    """Of single rows."""
    return _ROWS[program.target or _USUAL]
