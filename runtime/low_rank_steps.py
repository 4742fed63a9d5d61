"""Runs what `codegen/triton/low_rank_step.py` plans."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.codegen.triton.kernels import low_rank_mlp
from jettison.codegen.triton.kernels.gemm import DECODE_ROWS
from jettison.codegen.triton.launch import Launchers
from jettison.codegen.triton.steps import LowRankAttentionStep, LowRankMlpStep, Product
from jettison.runtime.device_weights import DeviceWeights


class RunProduct:
    """Runs a `Product`."""

    def __init__(self, product: Product, weights: DeviceWeights, launchers: Launchers) -> None:
        self.rows, self.weight = product.rows, weights.stacked(product.weights, product.dtype)
        self.bias = weights.joined(product.biases, product.dtype)
        self.gemv, self.few_rows, self.gemm = (
            launchers(each) for each in (product.gemv, product.few_rows, product.gemm)
        )

    def __call__(self, x: Tensor, *others: Tensor, out: Tensor | None = None) -> Tensor:
        """`[M, N]` of `[M, K]`, contiguous both; others are what the epilogue reads beside the bias."""
        out = x.new_empty(len(x), self.rows) if out is None else out
        given = (x, *self.weight, *self.bias, *others, out)
        if len(x) == 1:
            self.gemv(*given, sizes={})
        else:
            launcher = self.few_rows if len(x) <= DECODE_ROWS else self.gemm
            launcher(*given, sizes={"M": len(x)})
        return out


class RunLowRankMlp:
    """Runs a `LowRankMlpStep`: a chain of products for few tokens, and for many a kernel and at most one product.

    So the neurons of at most `FEW_TOKENS` tokens are ever written, however many there are.
    """

    __name__ = "run_step"

    def __init__(self, step: LowRankMlpStep, weights: DeviceWeights, launchers: Launchers) -> None:
        assert step.kernel is not None, "made with one"
        assert step.sums is not None, "made with one"
        self.width, self.inputs = step.kernel.width, len(step.rows)
        self.neurons = [RunProduct(each, weights, launchers) for each in step.neurons]
        self.sums = RunProduct(step.sums, weights, launchers)
        self.last = None if step.last is None else RunProduct(step.last, weights, launchers)
        self.kernel = launchers(step.kernel)
        self.rows, self.biases = _apart(step, weights)

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """`[..., E]` of what gate and up are made of, and of the residual if there is one."""
        read, rest = given[: self.inputs], given[self.inputs :]
        flat = [each.reshape(-1, each.shape[-1]).contiguous() for each in read]
        end = self.last or self.sums
        residual = [each.contiguous() for each in rest]
        out = read[-1].new_empty(*read[-1].shape[:-1], end.rows)
        if len(flat[-1]) <= low_rank_mlp.FEW_TOKENS:
            hidden = self.neurons[0](flat[-1])
            for gate in self.neurons[1:]:
                hidden = gate(flat[0], hidden)
            if self.last is None:
                self.sums(hidden, *residual, out=out)
            else:
                self.last(self.sums(hidden), *residual, out=out)
        elif self.last is None:
            self._prompt(flat, residual, out)
        else:
            summed = flat[-1].new_empty(len(flat[-1]), self.width)
            self._prompt(flat, [], summed)
            self.last(summed, *residual, out=out)
        return (out,)

    def _prompt(self, flat: list[Tensor], residual: list[Tensor], out: Tensor) -> None:
        read = [each for pair in zip(flat, self.rows, strict=True) for each in pair]
        after = [*self.biases, *self.sums.weight, *self.sums.bias, *residual, out]
        self.kernel(*read, *after, sizes={"M": len(flat[-1])})


def _apart(step: LowRankMlpStep, weights: DeviceWeights) -> tuple[list[Tensor], list[Tensor]]:
    """The weights and biases that make neurons, one by one.

    They are views where few tokens read those of gate and up as one, so that each is held once.
    """
    (first, *others) = step.neurons
    if others or len(step.rows) == 1:
        return [weights.constant(name) for name in step.rows], [weights.constant(name) for name in step.biases]
    (rows,) = weights.stacked(first.weights, first.dtype)
    return list(rows.chunk(2)), [half for both in weights.joined(first.biases, first.dtype) for half in both.chunk(2)]


class RunLowRankAttention:
    """Runs a `LowRankAttentionStep`."""

    __name__ = "run_step"

    def __init__(self, step: LowRankAttentionStep, weights: DeviceWeights, launchers: Launchers) -> None:
        assert step.kernel is not None, "made with one"
        self.kernel, self.launcher = step.kernel, launchers(step.kernel)
        self.weights = [weights.constant(name) for name in (*step.rows, *step.biases)]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """`[B, S, H, Dv]`."""
        kernel, masks, rest = self.kernel, self.kernel.masks, list(others)
        batch, steps = query.shape[:2]
        sizes = {"B": batch, "S": steps, "T": key.shape[1]}
        given = [each.contiguous() for each in (query, key, value)] + self.weights
        if kernel.rotated:
            given += self._of_rows(sizes, "ANGLES", rest, 2)
        if masks.has_query_positions:
            given += self._of_rows(sizes, "ASKED", rest, 1)
        if masks.has_key_positions:
            given += self._of_rows(sizes, "PLACES", rest, 1)
        if masks.has_valid:
            given.append((rest.pop(0) != 0).expand(batch, -1).contiguous().view(torch.uint8))
        if kernel.has_sinks:
            given.append(rest.pop(0).float().contiguous())
        out = query.new_empty(batch, steps, kernel.heads, kernel.value_dim)
        self.launcher(*given, out, sizes=sizes)
        return (out,)

    def _of_rows(self, sizes: dict[str, int], name: str, rest: list[Tensor], count: int) -> list[Tensor]:
        """The next operands, and how far apart they are for two rows of the batch: not at all where all share them."""
        taken = [rest.pop(0).contiguous() for _ in range(count)]
        sizes[name] = 0 if len(taken[0]) == 1 else taken[0].stride(0)
        return taken
