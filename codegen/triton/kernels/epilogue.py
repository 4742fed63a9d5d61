"""What a linear does with its sums before it stores them: bias, activation, gate, residual."""

from __future__ import annotations

from dataclasses import dataclass

# By name, on `y`.
ACTIVATIONS = {
    "gelu": "0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))",
    # tanh(z) is 2 sigmoid(2 z) - 1.
    "gelu_tanh": "y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))",
    "relu": "tl.maximum(y, 0.0)",
    "sigmoid": "tl.sigmoid(y)",
    "silu": "y * tl.sigmoid(y)",
}


@dataclass(frozen=True)
class Epilogue:
    """What follows the sums.

    Attributes:
        has_bias: Whether a bias is added.
        activation: A key of `ACTIVATIONS`, or None.
        is_gated: Whether there are two sums, of which the activation of one multiplies the other.
        has_residual: Whether something of the shape of the result is added last.
        has_factor: Whether something of the shape of the result multiplies it before that.
    """

    has_bias: bool = False
    activation: str | None = None
    is_gated: bool = False
    has_residual: bool = False
    has_factor: bool = False

    @property
    def name(self) -> str:
        """For names of kernels; empty if nothing follows."""
        parts = [
            "bias" if self.has_bias else "",
            f"gated_{self.activation}" if self.is_gated else self.activation or "",
            "factor" if self.has_factor else "",
            "residual" if self.has_residual else "",
        ]
        return "_".join(part for part in parts if part)

    def parameters(self, element: str) -> dict[str, str]:
        """Pointers that it needs."""
        names = [("bias_ptr", self.has_bias), ("factor_ptr", self.has_factor), ("residual_ptr", self.has_residual)]
        return {name: f"*{element}" for name, is_there in names if is_there}

    def lines(self, row: str, at: str, row_mask: str, mask: str) -> list[str]:
        """From `sums` (and `up_sums` of a gate) to `y`.

        Args:
            row: Expression of the outputs, of the rank of the sums.
            at: Expression of where the result goes.
            row_mask: Of `row`, or empty.
            mask: Of `at`, or empty.
        """
        row_guard, guard = (f", mask={each}, other=0" if each else "" for each in (row_mask, mask))
        found = ["y = sums"]
        if self.has_bias:
            found.append("# its bias")
            found.append(f"y += tl.load(bias_ptr + {row}{row_guard}).to(tl.float32)")
        if self.activation is not None:
            found.append("# jettison.gated_activation" if self.is_gated else f"# aten.{self.activation}")
            found.append(f"y = {ACTIVATIONS[self.activation]}")
        if self.is_gated:
            up = "up_sums"
            if self.has_bias:
                up = f"(up_sums + tl.load(bias_ptr + N + {row}{row_guard}).to(tl.float32))"
            found.append(f"y *= {up}")
        if self.has_factor:
            found.append("# the other half of a gate")
            found.append(f"y *= tl.load(factor_ptr + {at}{guard}).to(tl.float32)")
        if self.has_residual:
            found.append("# aten.add.Tensor")
            found.append(f"y += tl.load(residual_ptr + {at}{guard}).to(tl.float32)")
        return found
