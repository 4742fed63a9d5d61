"""`bitmap`: round trips, error, bytes, what it declines and refuses, and programs that read it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jettison.codegen.onnx.emit import emit_program
from jettison.ir.compare import assert_close, example_input_ids, run_program
from jettison.ir.errors import ArtifactError, OptionError, UnsupportedError
from jettison.ir.match import is_call
from jettison.ir.ops import bitmap_linear
from jettison.passes.formats import Bitmap, IntGroups, format_from_text
from jettison.passes.methods import AWQ, GPTQ, HQQ
from jettison.passes.predict_mlp_sparsity import PredictMlpSparsity
from jettison.passes.prune_weights import PruneWeights
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import assert_golden, run_pass
from tests.passes.test_factorize_linear import gated

SHAPES = ((1, 1), (3, 64), (70, 150), (200, 300))
DENSITIES = (0.0, 1 / 32, 0.5, 1.0)


def sparse(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    return torch.randn(rows, columns, generator=generator) * kept


def adapted(stored: Bitmap, weight: Tensor) -> Bitmap:
    return stored.adapted(lambda start, stop: weight[start:stop], tuple(weight.shape), "weight")  # type: ignore[arg-type]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("of", ["int4", "int8", "float"])
def test_round_trip(of, shape, density):
    weight, stored = sparse(*shape, density), Bitmap(of, 64)
    parts = stored.encode(weight)
    decoded = stored.decode(parts, shape)
    assert bool((decoded[weight == 0] == 0).all())
    if of == "float":
        assert torch.equal(decoded, weight)
    else:
        scales = parts["scales"].float().abs().repeat_interleave(64, 1)[:, : shape[1]]
        # A scale that bf16 rounds down cuts the largest weights a little.
        bound = torch.where(decoded.abs() >= (6.9 if of == "int4" else 126.9) * scales, 1.04, 0.501) * scales
        assert bool(((decoded - weight).abs() <= bound).all())
    assert adapted(stored, weight).bytes(shape) == sum(part.nbytes for part in parts.values())
    again = stored.encode(decoded)
    if of == "float":
        assert all(torch.equal(part, again[name]) for name, part in parts.items())


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 150), columns=st.integers(1, 200), seed=st.integers(0, 99))
def test_rows_are_encoded_alike_however_they_are_split(rows, columns, seed):
    weight = sparse(rows, columns, 0.4, seed)
    known = adapted(Bitmap(), weight)
    whole = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in known.part_specs((rows, columns)).items()}
    for start in range(0, rows, 37):
        part = slice(start, min(start + 37, rows))
        known.put(whole, known.encode_rows(weight[part], "weight", start), part)
    expected = Bitmap().encode(weight)
    assert all(torch.equal(part, expected[name]) for name, part in whole.items())


def test_codes_and_parts_are_inverse():
    weight = sparse(70, 256, 0.5)
    for stored in (Bitmap("int4", 128), Bitmap("int8", 64)):
        groups = stored.split_groups(weight)
        grid = stored.stored(stored.fit(groups))
        codes = stored.round(groups, grid)
        assert torch.equal(codes == 0, groups == 0)
        parts = stored.pack(codes, grid)
        assert all(torch.equal(part, parts[name]) for name, part in stored.encode(weight).items())
        unpacked, again = stored.unpack(parts, (70, 256))
        assert torch.equal(unpacked, codes)
        assert torch.equal(again.scales, grid.scales)
        assert torch.equal(stored.values(codes, grid).flatten(1), stored.decode(parts, (70, 256)))


def test_a_kept_weight_that_rounds_to_zero_stays_kept():
    weight = torch.zeros(1, 64)
    weight[0, :2] = torch.tensor([1.0, 1e-3])
    stored = Bitmap("int4", 64)
    parts = stored.encode(weight)
    assert parts["bitmap"][0, 0] == 0b11
    assert stored.decode(parts, (1, 64)).tolist() == [[1.0, *[0.0] * 63]]


@pytest.mark.parametrize(
    ("dtype", "scale", "expected"),
    [
        (torch.bfloat16, 1, torch.bfloat16),
        (torch.float16, 1, torch.float16),
        (torch.float32, 1, torch.float32),
        (torch.float16, 2**20, torch.float32),
    ],
)
def test_float_takes_the_narrowest_dtype_that_holds_all(dtype, scale, expected):
    weight = sparse(70, 128, 0.5).to(dtype).float() * scale
    assert Bitmap("float").encode(weight)["values"].dtype == expected
    assert torch.equal(Bitmap("float").decode(Bitmap("float").encode(weight), (70, 128)), weight)


@pytest.mark.parametrize(("of", "bits"), [("int4", 4), ("int8", 8), ("float", 32)])
@pytest.mark.parametrize("zeros", [0.3, 0.5, 0.7])
def test_bits_per_weight(of, bits, zeros):
    """The formula of the module: `1 + b (1 - s) + 16 / group + 1 / K`."""
    weight = sparse(512, 1024, 1 - zeros)
    found = adapted(Bitmap(of, 128), weight).bits_per_weight((512, 1024))
    share = float((weight == 0).float().mean())
    expected = 1 + bits * (1 - share) + (16 / 128 if of != "float" else 0) + 1 / 1024
    assert expected - 1e-3 <= found <= expected + 0.04


@pytest.mark.parametrize(("of", "border"), [("int4", 0.25), ("int8", 0.125), ("float", 1 / 16)])
def test_a_bit_per_weight_must_pay(of, border):
    assert Bitmap(of).declines(border + 0.01) is None
    assert Bitmap(of).declines(border - 0.01) == (
        f"{border - 0.01:.1%} of the weight is zero, and a bit per weight saves bytes from {border:.1%} on: prune it "
        "first (prune-weights), or store it in another format"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bitmap{of=int2}", "option 'of' needs int4|int8|float"),
        ("bitmap{group=32}", "option 'group' needs 64|128|256"),
        ("bitmap{bits=4}", "bitmap has no option 'bits'"),
    ],
)
def test_option_errors(text, message):
    with pytest.raises(OptionError, match=message.replace("|", r"\|")):
        format_from_text(text)


@pytest.mark.parametrize(("options", "message"), [(("int2",), "of='int2'"), (("int4", 32), "group=32")])
def test_option_errors_in_python(options, message):
    with pytest.raises(OptionError, match=message):
        Bitmap(*options)


def test_bytes_are_not_known_before_the_weight():
    with pytest.raises(OptionError, match="what is kept is not known yet"):
        Bitmap().bytes((64, 64))


@pytest.mark.parametrize("method", [GPTQ(), AWQ(), HQQ()])
def test_methods_that_would_fill_zeros_are_refused(method):
    with pytest.raises(OptionError, match=rf"\[{method.name}\] format bitmap"):
        QuantizeWeights(format=Bitmap(), method=method)


def test_weights_that_are_not_finite_are_refused():
    weight = sparse(4, 64, 0.5)
    weight[2, 3] = torch.inf
    for of in ("int4", "float"):
        with pytest.raises(UnsupportedError, match=r"entry \[2, 3\] is inf"):
            Bitmap(of).encode(weight)


def test_damaged_parts_are_refused():
    weight = sparse(70, 64, 0.5)
    for name in ("bitmap", "starts", "values", "scales"):
        parts = Bitmap().encode(weight)
        del parts[name]
        with pytest.raises(ArtifactError, match="parts of a weight"):
            Bitmap().decode(parts, (70, 64))
    parts = Bitmap().encode(weight)
    parts["bitmap"][0, 0] ^= 255
    with pytest.raises(ArtifactError, match=r"counts \d+ values, found \d+.*make it again"):
        Bitmap().decode(parts, (70, 64))


def test_golden_gated(snapshot):
    pruned, _ = run_pass(PruneWeights(pattern="2:4"), gated())
    _, record = assert_golden(snapshot, QuantizeWeights(format=Bitmap("int4", 64)), pruned, "gated")
    assert record.rewrites == 3


@pytest.mark.parametrize("of", ["int4", "int8", "float"])
def test_a_program_computes_with_what_is_stored(of):
    pruned, _ = run_pass(PruneWeights(), gated())
    after, record = run_pass(QuantizeWeights(format=Bitmap(of)), pruned)
    assert record.rewrites == 3
    assert sum(is_call(node, bitmap_linear) for node in after.entries["forward"].graph.nodes) == 3
    expected = pruned.copy()
    for name, packed in after.packed.items():
        parts = {part: after.constants[constant].value() for part, constant in packed.parts.items()}
        dense = format_from_text(packed.format).decode(parts, packed.shape)
        expected.constants[name] = type(pruned.constants[name])(name, dense)
        if of == "float":
            assert torch.equal(dense, pruned.constants[name].value())
    for batch, length in ((1, 1), (2, 7), (3, 16)):
        ids = example_input_ids(after, batch, length)
        assert_close(run_program(after, ids)[0], run_program(expected, ids)[0])


def test_what_cannot_be_stored_so_says_why():
    pruned, _ = run_pass(PruneWeights(only="up|gate"), gated())
    _, record = run_pass(QuantizeWeights(format=Bitmap()), pruned)
    reasons = {miss.node: miss.reason for miss in record.misses}
    assert record.rewrites == 2
    assert reasons["layers.0.down.weight"].startswith("0.0% of the weight is zero, and a bit per weight saves bytes")
    assert reasons["head.weight"].startswith("0.0% of the weight is zero")
    assert reasons["embed.weight"] == "an embedding looks rows of it up, which bitmap{of=int4,group=128} does not give"


def test_what_is_left_goes_to_another_format():
    pruned, _ = run_pass(PruneWeights(), gated())
    after, record = run_pass(QuantizeWeights(format=Bitmap()), pruned)
    both, record = run_pass(QuantizeWeights(bits=8), after)
    assert record.rewrites == 2
    assert {packed.format.partition("{")[0] for packed in both.packed.values()} == {"bitmap", "int8"}
    again, record = run_pass(QuantizeWeights(format=Bitmap()), both)
    assert record.rewrites == 0
    assert str(again) == str(both)


def test_other_passes_leave_it_alone():
    pruned, _ = run_pass(PruneWeights(), gated())
    after, _ = run_pass(QuantizeWeights(format=Bitmap()), pruned)
    _, record = run_pass(PruneWeights(sparsity=0.6), after)
    assert {miss.reason for miss in record.misses} == {
        "it is quantised already: put prune-weights before quantize-weights"
    }
    _, record = run_pass(PredictMlpSparsity(keep=0.5, group=8), after)
    assert {miss.reason for miss in record.misses} == {
        "its weights are a bitmap and values, which are not read by groups"
    }


def test_onnx_refuses_it(tmp_path):
    assert "no operator of ONNX" in (QuantizeWeights(format=Bitmap()).unsupported_on("onnx") or "")
    pruned, _ = run_pass(PruneWeights(), gated())
    after, _ = run_pass(QuantizeWeights(format=Bitmap()), pruned)
    with pytest.raises(UnsupportedError, match=r"jettison\.bitmap_linear"):
        emit_program(after, tmp_path)


def test_every_pair_of_options_has_a_name_that_is_read_back():
    for of, group in itertools.product(("int4", "int8", "float"), (64, 128, 256)):
        assert format_from_text(Bitmap(of, group).name) == Bitmap(of, group)
    assert IntGroups(4, 128).declines(0.0) is None
