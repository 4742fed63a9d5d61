"""Compare a captured program with its eager module, and find out whether it is a decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from jettison.ir.capture_source import CaptureSource, ModelCall, example_inputs, first_line, quiet
from jettison.ir.errors import CaptureError
from jettison.ir.interpret import run_entry
from jettison.ir.program import ModelInfo, Program
from jettison.ir.upcast import UpcastWeights, evaluating

# Largest |captured - eager| over the largest |eager|: the bound the capture promises, in fp32 and in bf16 or fp16.
CAPTURE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_CHECKED_SHAPE = (2, 6)


@torch.no_grad()
def check_against_eager(program: Program, source: CaptureSource, dtype: torch.dtype, special: int | None) -> None:
    """Compare with the eager module on a few tokens, and set `info.kind` by whether tokens see later ones.

    Raises:
        CaptureError: The graph computes something else, here or at the length `special`.
    """
    assert source.eager is not None, "checked by the caller"
    rows, length = _CHECKED_SHAPE
    shapes = [(rows, min(length, source.context))]
    if special is not None:
        shapes.append((1, special))
    eager = source.eager()
    for shape in shapes:
        example = example_inputs(source.inputs, program.info.vocab_size, *shape)
        expected = _eager_outputs(eager, source, example, dtype)
        captured = run_entry(program, "forward", example)
        for number, (ours, theirs) in enumerate(zip(captured, expected, strict=True)):
            if ours.shape != theirs.shape or not _is_close(ours, theirs, CAPTURE_TOLERANCE[dtype]):
                if ours.shape == theirs.shape and dtype != torch.float32:
                    exact = _eager_outputs(eager, source, example, torch.float32)[number]
                    if _is_rounding(ours, theirs, exact):
                        continue
                again = _eager_outputs(eager, source, example, dtype)[number]
                _refuse_difference(f"{program.outputs[number]} of {source.name}", ours, theirs, again, dtype)
        if shape is shapes[0]:
            program.info = _with_kind(program, source, captured[0], example, dtype)


def _eager_outputs(
    eager: nn.Module, source: CaptureSource, example: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    try:
        with evaluating(eager), UpcastWeights(eager, dtype), quiet():
            return ModelCall(eager, source)(*example.values())
    except Exception as error:  # whatever the model raises
        raise CaptureError(
            f"[capture] {source.name}: its graph was captured, but the eager model fails with {type(error).__name__}: "
            f"{first_line(error)}. Check that it runs by itself on {', '.join(example)}, on the CPU."
        ) from error


def _is_close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    error = (ours.double() - theirs.double()).abs().max().item()
    return error <= tolerance * theirs.double().abs().max().item()


def _is_rounding(ours: Tensor, theirs: Tensor, exact: Tensor) -> bool:
    """Whether two values in few bits are about as far from the one in fp32, as those of a deep model may be."""

    def error(value: Tensor) -> float:
        return (value.double() - exact.double()).norm().item()

    return exact.shape == ours.shape and error(ours) <= 2 * error(theirs) < exact.double().norm().item()


def _refuse_difference(name: str, ours: Tensor, theirs: Tensor, again: Tensor, dtype: torch.dtype) -> NoReturn:
    """Say why the graph's value and the eager one may differ; `again` is the eager one of another call."""
    if again.shape == theirs.shape and not theirs.isfinite().all():
        raise CaptureError(
            f"[capture] {name}: the eager model returns NaN or infinite values. Check the weights; a model trained in "
            "bf16 overflows in float16."
        )
    if again.shape != theirs.shape or not _is_close(again, theirs, CAPTURE_TOLERANCE[dtype]):
        raise CaptureError(
            f"[capture] {name}: two calls of the eager model with the same tokens differ, also in eval mode. It draws "
            "random numbers or keeps something between calls. Remove that before capture."
        )
    found = f"shape {list(ours.shape)}, not {list(theirs.shape)}"
    if ours.shape == theirs.shape:
        error, largest = (ours.double() - theirs.double()).abs().max().item(), theirs.double().abs().max().item()
        found = f"an error of {error:.3g}, more than {CAPTURE_TOLERANCE[dtype]:g} of the largest value {largest:.3g}"
    raise CaptureError(
        f"[capture] {name}: the captured graph differs from the eager model: {found}. The forward depends on something "
        "the trace did not see (a Python number computed from the inputs, a global). Use tensor operations there."
    )


def _with_kind(
    program: Program, source: CaptureSource, captured: Tensor, example: dict[str, Tensor], dtype: torch.dtype
) -> ModelInfo:
    """The program's facts, with `kind` found out where the source does not say.

    The first token alone must give what it gives with others behind it and in a larger batch: that is what a KV cache
    rests on. It also tries the sizes that torch.export knows least about, one row and one token.
    """
    if source.kind == "encoder" or captured.dim() < 3 or captured.shape[:2] != example["input_ids"].shape:
        return replace(program.info, kind="encoder")
    first = {name: value[:1, :1] for name, value in example.items()}
    alone, among = run_entry(program, "forward", first)[0], captured[:1, :1]
    # Rounding differs between sizes, in bf16 by up to three units of the largest value in sixteen layers with random
    # weights; a token that is seen makes more.
    allowed = max(CAPTURE_TOLERANCE[dtype] / 10, 4 * torch.finfo(dtype).eps)
    if alone.shape == among.shape and _is_close(alone, among, allowed):
        return replace(program.info, kind="decoder")
    if source.kind == "decoder":
        raise CaptureError(
            f"[capture] {source.name}: the logits of a token depend on later tokens or on other rows of the batch, so "
            "it cannot generate token by token. Needed causal attention; a model that sees both ways is an encoder."
        )
    return replace(program.info, kind="encoder")
