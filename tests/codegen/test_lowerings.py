"""Each operator's lowering against the operator: traced from small modules that call it, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jettison.codegen.onnx.emit import emit_program
from jettison.codegen.onnx.lowerings import EIGHT_BIT_ACCURACY_LEVEL
from jettison.ir import ops
from jettison.ir.compare import assert_close
from jettison.ir.errors import UnsupportedError
from jettison.ir.interpret import run_entry
from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.program import Program
from jettison.passes.base import Pass
from jettison.passes.formats import IntGroups, Lut, Nf4
from jettison.passes.quantize_weights import QuantizeWeights
from tests.codegen.running import REASON, TOLERANCE, Emitted, attributes, cached_program, emit
from tests.helpers import StoreIn
from tests.models.tiny_models import randomize

VOCAB = 61
# Of the largest output. Activations rounded to 8 bits per block of 32 are off by up to 1/254 of the block's largest.
ROUNDED_ACTIVATIONS = 2e-2


class Heads(nn.Module):
    """Token ids to query, key and value; `function(query, key, value, ids)` returns a dict of tensors."""

    def __init__(self, function: Any, heads: int, kv_heads: int, dim: int) -> None:
        super().__init__()
        self.function, self.dim = function, dim
        self.embed = nn.Embedding(VOCAB, 16)
        self.query, self.key, self.value = (nn.Linear(16, count * dim) for count in (heads, kv_heads, kv_heads))
        self.sinks = nn.Parameter(torch.zeros(heads))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = 2 * self.embed(input_ids)
        heads = [layer(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        return self.function(self, *heads, attention_mask)


def emitted(module: nn.Module, folder: Path, *passes: Pass, accuracy_level: int = 0) -> Emitted:
    program = cached_program(randomize(module).eval(), None, *passes, context=64)
    return emit(program, folder, accuracy_level=accuracy_level)


def outputs(emitted: Emitted, shape: tuple[int, int], padding: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """What the ONNX file and the program return, by name; the last `padding` tokens of the first row are no tokens."""
    ids = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(shape[1]))
    mask = torch.ones_like(ids)
    if padding:
        mask[0, -padding:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    program: Program = emitted.program
    wanted = {name: inputs[name] for name in emitted.executor.entries["forward"].inputs}
    actual = emitted.executor.run("forward", wanted, {})
    expected = run_entry(program, "forward", wanted)
    return {name: (actual[name], value) for name, value in zip(program.outputs, expected, strict=True)}


def check(emitted: Emitted, *shapes: tuple[int, int], padding: int = 0, tolerance: float = TOLERANCE) -> None:
    for shape in shapes:
        for name, (actual, expected) in outputs(emitted, shape, padding).items():
            assert_close(actual, expected, tolerance=tolerance, reason=REASON, what=f"{name} of {shape}")


# --- attention without a cache --------------------------------------------------------------------------------------


def attend_in_many_ways(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> dict[str, Tensor]:
    def attend(*, causal: bool, window: int = 0, softcap: float = 0.0, sinks: Any = None, valid: Any = None) -> Tensor:
        return ops.attention(query, key, value, None, None, valid, sinks, 0.4, causal, window, softcap)

    return {
        "full": attend(causal=False),
        "window": attend(causal=True, window=3),
        "masked": attend(causal=False, valid=mask),
        "sinks": attend(causal=True, sinks=self.sinks),
        "all": attend(causal=True, window=4, softcap=2.0, sinks=self.sinks, valid=mask),
    }


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2)], ids=["mha", "gqa"])
def test_attention(heads: int, kv_heads: int, tmp_path: Path) -> None:
    attention = emitted(Heads(attend_in_many_ways, heads, kv_heads, 5), tmp_path)
    check(attention, (1, 1), (2, 7), (3, 33))
    check(attention, (2, 9), padding=4)
    # Softmax over nothing is no number: a row without a real token gets zeros by definition, on both sides.
    for name in ("masked", "all"):
        for side in outputs(attention, (2, 9), padding=9)[name]:
            assert not side[0].any()
            assert side[1].any()


# --- rotation and the gated activation ------------------------------------------------------------------------------


def rotate_in_many_ways(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> dict[str, Tensor]:
    positions = (mask.cumsum(1) - 1)[:, :, None].float()
    found = {}
    for interleaved in (False, True):
        for channels in (2, 6, 12):
            angles = positions * (7.0 ** -torch.arange(channels // 2))
            found[f"{channels}_{interleaved}"] = ops.rotary_embedding(query, angles.cos(), angles.sin(), interleaved)
    # Angles of one row stand for every row.
    shared = (torch.arange(mask.shape[1])[None, :, None] * torch.tensor([1.0, 0.1])).expand(1, -1, -1)
    found["shared"] = ops.rotary_embedding(key, shared.cos(), shared.sin(), False)
    return found


def test_rotary_embedding_in_both_layouts_and_partial(tmp_path: Path) -> None:
    rotated = emitted(Heads(rotate_in_many_ways, 3, 1, 12), tmp_path)
    check(rotated, (1, 1), (2, 7), (3, 33))
    assert rotated.operators()["RotaryEmbedding"] == 7


def test_gated_activation(tmp_path: Path) -> None:
    # The names of the outputs are also those that the exporter gives to inner values.
    def activate(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {name: ops.gated_activation(query, query.flip(-1), name) for name in ACTIVATIONS}

    check(emitted(Heads(activate, 1, 1, 8), tmp_path), (1, 1), (2, 7))


# --- quantised weights ----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding that is the head too, and linears with and without a bias; widths need not fill a group."""

    def __init__(self, width: int = 72, inner: int = 100) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)
        self.head = nn.Linear(width, VOCAB)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        inner = self.up(x)
        return {"embedded": x, "up": inner, "down": self.down(inner), "logits": self.head(x)}


QUANTISED = [(4, 32, False), (4, 32, True), (4, 64, False), (4, 128, True), (8, 32, False), (8, 64, True)]


@pytest.mark.parametrize(("bits", "group", "symmetric"), QUANTISED)
def test_quantised_weights_at_accuracy_level_zero(bits: int, group: int, symmetric: bool, tmp_path: Path) -> None:
    model = emitted(Tied(), tmp_path, QuantizeWeights(bits=bits, group=group, symmetric=symmetric))
    assert model.operators()["com.microsoft::MatMulNBits"] == 3
    assert model.operators()["com.microsoft::GatherBlockQuantized"] == 1
    for node in model.nodes("MatMulNBits"):
        found = attributes(node)
        assert (found["bits"], found["block_size"]) == (bits, group)
        # The 8-bit kernel is fused at this level only; below it ONNX Runtime expands the weight at every call.
        assert found["accuracy_level"] == (0 if bits == 4 else EIGHT_BIT_ACCURACY_LEVEL)
    for shape in ((1, 1), (2, 7), (1, 40)):
        for name, (actual, expected) in outputs(model, shape).items():
            is_rounded = bits == 8 and name != "embedded"
            tolerance = ROUNDED_ACTIVATIONS if is_rounded else TOLERANCE
            assert_close(actual, expected, tolerance=tolerance, reason="activations in 8 bits", what=name)


def test_quantised_weights_at_accuracy_level_four(tmp_path: Path) -> None:
    model = emitted(Tied(), tmp_path, QuantizeWeights(bits=4, group=32), accuracy_level=4)
    assert {attributes(node)["accuracy_level"] for node in model.nodes("MatMulNBits")} == {4}
    check(model, (1, 1), (2, 7), tolerance=ROUNDED_ACTIVATIONS)


def test_weights_of_two_formats_in_one_file(tmp_path: Path) -> None:
    passes = QuantizeWeights(bits=8, group=32, skip="up|down"), QuantizeWeights(bits=4, group=64)
    model = emitted(Tied(), tmp_path, *passes)
    assert sorted(attributes(node)["bits"] for node in model.nodes("MatMulNBits")) == [4, 4, 8]
    check(model, (2, 7), tolerance=ROUNDED_ACTIVATIONS)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (2, 32), (8, 64)])
def test_zero_points_between_the_codes(bits: int, group: int, tmp_path: Path) -> None:
    model = emitted(Tied(), tmp_path, StoreIn(IntGroups(bits, group, float_zeros=True)))
    # Float zero points as an input of the kernel would make it decode the whole weight.
    assert all(len(node.input) < 4 or not node.input[3] for node in model.nodes("MatMulNBits"))
    assert model.operators()["com.microsoft::GatherBlockQuantized"] == 1
    for shape in ((1, 1), (2, 7), (1, 40)):
        for name, (actual, expected) in outputs(model, shape).items():
            tolerance = TOLERANCE if bits == 4 or name == "embedded" else ROUNDED_ACTIVATIONS
            assert_close(actual, expected, tolerance=tolerance, reason="activations in 8 bits", what=name)


def test_codes_without_a_kernel_are_refused_before_a_file_is_written(tmp_path: Path) -> None:
    program = cached_program(randomize(Tied()).eval(), None, StoreIn(IntGroups(3, 32)), context=64)
    with pytest.raises(UnsupportedError, match=r"^\[onnx\] embed.weight: found 3-bit codes, needs 2, 4 or 8 bits"):
        emit_program(program, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("group", [32, 64])
def test_nf4_runs_as_8_bit_weights(double: bool, group: int, tmp_path: Path) -> None:
    model = emitted(Tied(), tmp_path, StoreIn(Nf4(group, double)))
    assert {attributes(node)["bits"] for node in model.nodes("MatMulNBits")} == {8}
    assert model.operators()["com.microsoft::MatMulNBits"] == 3
    for shape in ((1, 1), (2, 7), (1, 40)):
        for name, (actual, expected) in outputs(model, shape).items():
            tolerance = TOLERANCE if name == "embedded" else ROUNDED_ACTIVATIONS
            assert_close(actual, expected, tolerance=tolerance, reason="levels and activations in 8 bits", what=name)
    stored = {initializer.name: initializer for initializer in model.model.graph.initializer}
    assert list(stored["up.weight.codes"].dims) == [100, -(-72 // group), group // 2], (
        "four bits per weight in the file"
    )


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("count", [3, 16, 200])
def test_palettes_stay_exact(count: int, per_row: bool, tmp_path: Path) -> None:
    module = randomize(Tied()).eval()
    with torch.no_grad():
        for weight in (module.embed.weight, module.up.weight, module.down.weight):
            generator = torch.Generator().manual_seed(count)
            weight.copy_(
                torch.randn(count, generator=generator)[torch.randint(count, weight.shape, generator=generator)]
            )
    model = emit(cached_program(module, None, StoreIn(Lut(per_row=per_row)), context=64), tmp_path)
    for shape in ((1, 1), (2, 7)):
        found = outputs(model, shape)
        assert torch.equal(*found["embedded"])
        for name, (actual, expected) in found.items():
            assert_close(actual, expected, tolerance=TOLERANCE, reason=REASON, what=name)


# --- linears --------------------------------------------------------------------------------------------------------


def test_tied_matrix_is_stored_once_and_others_transposed(tmp_path: Path) -> None:
    model = emitted(Tied(), tmp_path)
    check(model, (1, 1), (2, 7))
    assert model.operators()["Gemm"] == 1, "the head reads the embedding as it lies"
    shapes = {initializer.name: list(initializer.dims) for initializer in model.model.graph.initializer}
    assert shapes["embed.weight"] == [VOCAB, 72]
    assert shapes["up.weight.T"] == [72, 100]
    assert "embed.weight.T" not in shapes
