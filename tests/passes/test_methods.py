from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jettison.ir.compare import assert_close, run_program, usual_inputs
from jettison.ir.constants import Constant
from jettison.ir.errors import OptionError, UnsupportedError
from jettison.ir.program import input_placeholders
from jettison.passes.canonicalize_linear import CanonicalizeLinear
from jettison.passes.formats import IntGroups, Lut, Nf4
from jettison.passes.methods import AWQ, GPTQ, HQQ, METHODS, RTN, InputStatistics
from jettison.passes.methods.gptq import inverse_factor, round_columns
from jettison.passes.pipeline import prepare
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import Apply, Embedded, export_tiny, run_pass

WIDTH, INNER = 40, 72
CALIBRATED = [GPTQ(), GPTQ(order="none"), GPTQ(clip=False), AWQ()]


def tokens(rows=6, length=32):
    return (torch.arange(rows * length) * 7919 + torch.arange(rows * length) ** 2 * 31).reshape(rows, length) % 61


def calibrated(program, *, ids=None):
    """A copy that has calibration batches."""
    program = program.copy()
    wanted = input_placeholders(program.entries["forward"])
    batches = [usual_inputs(part) for part in (tokens() if ids is None else ids).split(4)]
    program.calibration = lambda: [{name: batch[name] for name in wanted} for batch in batches]
    return program


class Block(nn.Module):
    """Normalised, gated and plain linears, with biases, over a tied table."""

    def __init__(self, is_gated=True):
        super().__init__()
        self.embed, self.is_gated = nn.Embedding(61, WIDTH), is_gated
        self.norm = nn.RMSNorm(WIDTH) if is_gated else nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        normed = self.norm(x)
        inner = F.silu(self.gate(normed)) * self.up(normed) if self.is_gated else F.relu(self.up(normed))
        return F.linear(x + self.down(inner), self.embed.weight)


@functools.cache
def block(is_gated=True):
    program = export_tiny(Block(is_gated), kind="decoder")
    prepare(program)
    return calibrated(program)


def correlated(rows=24, columns=WIDTH, count=400, seed=0):
    """A weight, and statistics of inputs that live in few dimensions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    inputs = torch.randn(count, columns // 4, generator=generator) @ mixing
    inputs += 0.1 * torch.randn(count, columns, generator=generator)
    statistics = InputStatistics(columns)
    statistics.add(inputs)
    return torch.randn(rows, columns, generator=generator), statistics


def output_error(weight, decoded, statistics):
    error = decoded - weight
    return float(((error @ statistics.products) * error).sum())


def encoded_error(method, weight, statistics, weight_format):
    stored = method.adapted(weight_format)
    parts = method.row_encoder(stored, statistics)(weight, "weight", 0)
    return output_error(weight, stored.decode(parts, tuple(weight.shape)), statistics)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_statistics_are_sums_over_tokens():
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    parts, whole = InputStatistics(8), InputStatistics(8)
    for row in x:
        parts.add(row)
    whole.add(x)
    flat = x.flatten(0, 1)
    assert parts.tokens == whole.tokens == 15
    assert_close(parts.products, flat.T @ flat)
    assert_close(whole.magnitudes, flat.abs().sum(0))
    scales = torch.arange(1.0, 9)
    divided = InputStatistics(8)
    divided.add(x / scales)
    assert_close(whole.divided(scales).products, divided.products)
    assert_close(whole.divided(scales).magnitudes, divided.magnitudes)


# ---------------------------------------------------------------------------------------------------------------- gptq


def test_the_factor_is_of_the_damped_inverse():
    _, statistics = correlated()
    damped = statistics.products + 0.01 * statistics.products.diagonal().mean() * torch.eye(WIDTH)
    factor = inverse_factor(statistics.products, torch.arange(WIDTH), 0.01)
    assert torch.equal(factor, factor.triu())
    assert_close(factor.T @ factor @ damped, torch.eye(WIDTH), tolerance=1e-3, reason="condition of the products")


def test_factor_of_more_columns_than_are_solved_at_once():
    inputs = torch.randn(3000, 1100, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    damped = inputs.T @ inputs / 3000
    factor = inverse_factor(damped.float(), torch.arange(1100), 0.01)
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    assert_close((factor.T @ factor).double() @ damped, torch.eye(1100, dtype=torch.float64), tolerance=1e-3,
                 reason="the inverse of a matrix of condition 30 in fp32")  # fmt: skip
    assert not bool(factor.tril(-1).any())


def test_a_singular_product_is_damped_more():
    # One input seen once: rank 1, and in fp32 a damping of 1e-12 of the mean vanishes.
    x = torch.full((1, WIDTH), 1e3)
    factor = inverse_factor(x.T @ x, torch.arange(WIDTH), 1e-12)
    assert bool(factor.isfinite().all())


@pytest.mark.parametrize("weight_format", [IntGroups(4, 32), IntGroups(3, 32), IntGroups(2, 32, True), Nf4()], ids=str)
def test_gptq_errs_less_in_the_outputs(weight_format):
    weight, statistics = correlated()
    error = {method: encoded_error(method, weight, statistics, weight_format) for method in (RTN(), *CALIBRATED[:3])}
    assert all(0 < error[method] < 0.6 * error[RTN()] for method in CALIBRATED[:3]), error


def test_without_correlation_gptq_rounds_to_nearest():
    weight, _ = correlated()
    weight_format = IntGroups(4, 32)
    groups = weight_format.split_groups(weight)
    grid = weight_format.fit(groups)
    codes = round_columns(weight_format, groups, grid, torch.arange(WIDTH), torch.eye(WIDTH))
    assert torch.equal(codes, weight_format.round(groups, grid))


def test_gptq_is_the_textbook_recursion():
    """One column after the other with the whole inverse, as the paper's equations 2 and 3 have it, in fp64."""
    weight, statistics = correlated(rows=3)
    weight_format = IntGroups(4, 32)
    groups = weight_format.split_groups(weight)
    grid = weight_format.fit(groups)
    products = statistics.products.double()
    left = weight.double().clone()
    inverse = torch.linalg.inv(products + 0.01 * products.diagonal().mean() * torch.eye(WIDTH))
    expected = torch.zeros_like(weight)
    for column in range(WIDTH):
        own = type(grid)(*(part[:, column // 32, None] for part in (grid.scales, grid.zeros)))
        rounded = weight_format.values(weight_format.round(left[:, column, None, None].float(), own), own)[:, 0, 0]
        expected[:, column] = rounded
        error = (left[:, column] - rounded) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    factor = inverse_factor(statistics.products, torch.arange(WIDTH), 0.01)
    codes = round_columns(weight_format, groups, grid, torch.arange(WIDTH), factor)
    found = weight_format.values(codes, grid).flatten(1)[:, :WIDTH]
    assert_close(found, expected)


@pytest.mark.parametrize("method", CALIBRATED)
def test_rows_can_be_split(method):
    weight, statistics = correlated()
    weight_format = IntGroups(4, 32)
    encode = method.row_encoder(weight_format, statistics)
    whole = encode(weight, "weight", 0)
    split = [encode(part, "weight", start) for part, start in ((weight[:7], 0), (weight[7:], 7))]
    joint = {name: torch.cat([piece[name] for piece in split]) for name in whole}
    # A matrix product of other rows may round differently, and move a code by one here and there, and then its scale.
    assert (joint["codes"] != whole["codes"]).float().mean() < 0.01
    errors = [
        output_error(weight, weight_format.decode(parts, tuple(weight.shape)), statistics) for parts in (joint, whole)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_columns_that_were_never_active_are_kept():
    weight, _ = correlated()
    statistics = InputStatistics(WIDTH)
    inputs = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(1))
    inputs[:, 5:20] = 0
    statistics.add(inputs)
    weight_format = IntGroups(8, 32)
    decoded = weight_format.decode(GPTQ().row_encoder(weight_format, statistics)(weight, "w", 0), tuple(weight.shape))
    assert_close(decoded, weight, tolerance=0.05, reason="half a step of 8 bits, and corrections of that size")


def extreme_weight(kind):
    weight, _ = correlated()
    if kind == "zero rows":
        weight[3] = 0
    elif kind == "constant groups":
        weight[:, :32] = 0.25
    elif kind == "outlier":
        weight[0, 0] = 1e4
    return weight


@pytest.mark.parametrize("kind", ["zero rows", "constant groups", "outlier"])
@pytest.mark.parametrize("method", [*CALIBRATED, HQQ()], ids=repr)
def test_extreme_weights(method, kind):
    weight, statistics = extreme_weight(kind), correlated()[1]
    stored = method.adapted(IntGroups(4, 32))
    decoded = stored.decode(method.row_encoder(stored, statistics)(weight, "w", 0), tuple(weight.shape))
    assert bool(decoded.isfinite().all())
    if kind == "zero rows":
        assert_close(decoded[3], torch.zeros(WIDTH))
    if kind == "outlier":
        assert float(decoded[0, 0]) > 4e3  # half of the range is the smallest part that is tried
        assert_close(decoded[1:].norm(), weight[1:].norm(), tolerance=0.1, reason="4 bits")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS.values())
def test_weights_that_are_not_finite_are_named(method, value):
    weight, statistics = correlated()
    weight[2, 33] = value
    stored = method().adapted(IntGroups(4, 32))
    with pytest.raises(UnsupportedError, match=rf"layers\.0\.up: entry \[12, 33\] is {value}"):
        method().row_encoder(stored, statistics)(weight, "layers.0.up", 10)


@pytest.mark.parametrize("damping", [0, -1, 1.5])
def test_refuses_damping(damping):
    with pytest.raises(OptionError, match=r"\[gptq\] damping=.*needs a number above 0 and at most 1"):
        GPTQ(damping=damping)


def test_descent_never_makes_it_worse():
    weight, statistics = correlated()
    errors = [
        encoded_error(GPTQ(sweeps=sweeps), weight, statistics, IntGroups(bits, 32))
        for bits in (4, 2)
        for sweeps in (0, 1, 4)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[3] > errors[4] > errors[5]


@pytest.mark.parametrize("method", CALIBRATED, ids=repr)
def test_exact_formats_leave_nothing_to_choose(method):
    with pytest.raises(OptionError, match=r"format lut: needs a format that rounds(?s:.)*Take method=rtn"):
        QuantizeWeights(format=Lut(), method=method)


# ----------------------------------------------------------------------------------------------------------------- hqq


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_hqq_errs_less_in_its_own_norm(bits):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    stored = HQQ().adapted(IntGroups(bits, 64))
    errors = []
    for encode in (stored.encode_rows, HQQ().row_encoder(stored, None)):
        decoded = stored.decode(encode(weight, "w", 0), (64, 128))
        errors.append(((decoded - weight).abs() ** 0.7).sum())
    assert errors[1] < 0.98 * errors[0]


def test_hqq_matches_the_published_error():
    """Relative squared error on N(0, 1) weights, groups of 64: .0074, .0334 and .188 at 4, 3 and 2 bits."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    for bits, expected in ((4, 0.0074), (3, 0.0334), (2, 0.188)):
        stored = HQQ().adapted(IntGroups(bits, 64))
        decoded = stored.decode(HQQ().row_encoder(stored, None)(weight, "w", 0), (512, 512))
        assert float(((decoded - weight) ** 2).sum() / (weight**2).sum()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("weight_format", [IntGroups(4, 32, True), Nf4()], ids=str)
def test_hqq_refuses_formats_without_zero_points(weight_format):
    with pytest.raises(OptionError, match=r"\[hqq\] format .*needs integer groups with zero points"):
        QuantizeWeights(format=weight_format, method=HQQ())


# ----------------------------------------------------------------------------------------------------------- the pass


@pytest.mark.parametrize("method", [*CALIBRATED, HQQ()], ids=repr)
def test_encodes_what_rounding_to_nearest_encodes(method):
    nearest, expected = run_pass(QuantizeWeights(), block())
    after, record = run_pass(QuantizeWeights(method=method), block())
    assert (record.rewrites, record.misses) == (expected.rewrites, [])
    assert after.packed.keys() == nearest.packed.keys()
    if method != HQQ():
        assert record.bytes_after == expected.bytes_after


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("method", CALIBRATED, ids=repr)
def test_outputs_are_nearer_on_the_calibration_text(method, is_gated):
    ids = tokens(2)
    reference = run_program(block(is_gated), ids)[0]
    errors = {}
    for each in (RTN(), method):
        after, _ = run_pass(QuantizeWeights(bits=3, skip="embed", method=each), block(is_gated))
        errors[each] = float((run_program(after, ids)[0] - reference).norm())
    assert errors[method] < 0.9 * errors[RTN()]


def test_the_matrix_of_a_conv1d():
    """GPT-2 stores `[K, N]`: the constant is a transposed view."""

    def conv1d(self, x):
        return torch.addmm(self.bias, x.reshape(-1, WIDTH), self.matrix).reshape(*x.shape[:2], 24)

    program = export_tiny(Embedded(Apply(conv1d, bias=(24,), matrix=(WIDTH, 24)), width=WIDTH))
    CanonicalizeLinear().run(program)
    program, errors = calibrated(program), {}
    reference = run_program(program, tokens(2))[0]
    for method in (RTN(), GPTQ()):
        after, record = run_pass(QuantizeWeights(bits=3, skip="embed", method=method), program)
        assert record.rewrites == 1
        errors[method] = float((run_program(after, tokens(2))[0] - reference).norm())
    assert errors[GPTQ()] < 0.9 * errors[RTN()]


def test_joint_weights_are_encoded_like_their_blocks():
    program = export_tiny(Embedded(Apply(lambda self, x: F.linear(x, self.matrix), matrix=(30, WIDTH)), width=WIDTH))
    matrix = program.constants["body.matrix"].value()
    whole, _ = run_pass(QuantizeWeights(method=GPTQ()), calibrated(program))
    program.constants["body.matrix"] = Constant("body.matrix", (matrix[:10], matrix[10:11], matrix[11:].clone()))
    blocks, _ = run_pass(QuantizeWeights(method=GPTQ()), calibrated(program))
    for part in whole.packed["body.matrix"].parts.values():
        assert torch.equal(blocks.constants[part].value(), whole.constants[part].value())


def test_needs_calibration():
    program = block().copy()
    program.calibration = None
    with pytest.raises(OptionError, match=r"method=gptq: needs text to calibrate on(?s:.)*or use method=rtn"):
        QuantizeWeights(method=GPTQ()).run(program)


def test_needs_whole_sequences():
    program = block().copy()
    program.entries["prefill"] = program.entries.pop("forward")
    with pytest.raises(OptionError, match=r"method=gptq behind cache-kv(?s:.)*Put cache-kv last"):
        QuantizeWeights(method=GPTQ()).run(program)


def test_inputs_that_are_not_finite_are_named():
    program = block().copy()
    program.constants["norm.weight"] = Constant("norm.weight", torch.full((WIDTH,), torch.inf))
    with pytest.raises(UnsupportedError, match=r"\[gptq\] gate\.weight: what its linear reads .*is not finite"):
        QuantizeWeights(method=GPTQ()).run(program)


def test_a_weight_that_two_linears_read_learns_from_both():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner = nn.Embedding(61, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, input_ids):
            return self.inner(torch.tanh(self.inner(self.embed(input_ids))))

    program = calibrated(export_tiny(Shared()))
    seen = []

    @dataclass(frozen=True)
    class Watching(GPTQ):
        name: ClassVar[str] = "watching"

        def row_encoder(self, weight_format, statistics):
            if statistics is not None:
                seen.append(statistics.tokens)
            return super().row_encoder(weight_format, statistics)

    _, record = run_pass(QuantizeWeights(method=Watching()), program)
    assert record.rewrites == 3
    assert seen == [2 * tokens().numel()]


@dataclass(frozen=True)
class Scaling(RTN):
    """Rounds to nearest what was scaled by given factors."""

    name: ClassVar[str] = "scaling"
    needs_inputs: ClassVar[bool] = True
    scales_inputs: ClassVar[bool] = True

    def input_scales(self, weights, weight_format, statistics):
        return torch.linspace(0.5, 2, weights[0].shape[1])


@pytest.mark.parametrize("is_gated", [True, False])
def test_scales_are_folded_exactly(is_gated):
    """What is multiplied into the columns of a weight is divided out in front of it, biases included."""
    before = block(is_gated)
    after, _ = run_pass(QuantizeWeights(method=Scaling(), skip="embed"), before)
    reference = before.copy()
    for name, packed in after.packed.items():
        parts = {part: after.constants[constant].value() for part, constant in packed.parts.items()}
        dense = IntGroups(4, 32).decode(parts, packed.shape)
        if name == "up.weight":  # its rows were divided for `down`
            dense *= torch.linspace(0.5, 2, INNER)[:, None]
        reference.constants[name] = Constant(name, dense / torch.linspace(0.5, 2, dense.shape[1]))
    ids = tokens(2)
    assert_close(run_program(after, ids)[0], run_program(reference, ids)[0], tolerance=2e-5, reason="scaled twice")
    norm = after.constants["norm.weight"].value()
    assert_close(norm, before.constants["norm.weight"].value() / torch.linspace(0.5, 2, WIDTH))
    bias = after.constants["up.bias"].value()
    assert_close(bias, before.constants["up.bias"].value() / torch.linspace(0.5, 2, INNER))


@pytest.mark.parametrize("left_alone", ["gate", "down"])
def test_inputs_that_something_else_reads_are_not_scaled(left_alone):
    after, _ = run_pass(QuantizeWeights(method=Scaling(), skip=f"embed|{left_alone}"), block())
    same = {"gate": "norm.weight", "down": "up.bias"}[left_alone]
    assert torch.equal(after.constants[same].value(), block().constants[same].value())


def test_awq_is_better_where_channels_are_outliers():
    weight, _ = correlated()
    statistics = InputStatistics(WIDTH)
    inputs = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(3))
    inputs[:, ::13] *= 30
    statistics.add(inputs)
    weight_format = IntGroups(4, 32)
    scales = AWQ().input_scales([weight], weight_format, statistics)
    assert scales is not None
    assert scales[::13].min() > scales[1:13].max()
    decoded = weight_format.decode(weight_format.encode(weight * scales), tuple(weight.shape)) / scales
    nearest = weight_format.decode(weight_format.encode(weight), tuple(weight.shape))
    assert output_error(weight, decoded, statistics) < 0.5 * output_error(weight, nearest, statistics)
