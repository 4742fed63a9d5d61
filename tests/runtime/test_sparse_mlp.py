"""Sparse feed-forward layers on the torch target: slabs of weights, the two kernels, executors and artifacts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jettison
from jettison.ir.compare import assert_close
from jettison.ir.edit import Edit
from jettison.ir.ops import quantized_sparse_mlp, sparse_mlp
from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.packed_parts import joint_weights, sparse_parts_read
from jettison.ir.program import Program, constant_placeholders, output_node
from jettison.passes.cache_kv import CacheKV
from jettison.passes.formats.int_groups import IntGroups
from jettison.passes.predict_mlp_sparsity import PredictMlpSparsity
from jettison.passes.predictors import HiRE
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime import packed_linear
from jettison.runtime.executor import allocate_states
from jettison.runtime.packed_linear import SLAB_ROWS, Int4Weight, PackedWeight, pack_weight
from jettison.runtime.sparse_mlp import _Slabs, groups_per_slab, run_quantized_sparse_mlp, run_sparse_mlp
from jettison.runtime.torch_executor import TorchExecutor
from tests.models.tiny_feed_forward import decoder, decoder_program, token_ids

WIDTH, NEURONS = 64, 1024
# x, activations, scales and results are rounded to bf16, through two products.
INT4 = {"tolerance": 2e-2, "reason": "bf16 operands"}

needs_int4 = pytest.mark.skipif(not packed_linear._has_int4_kernel(), reason="no int4 kernel for this processor")
needs_bags = pytest.mark.skipif(not packed_linear._has_bag_kernel(), reason="no bag kernel for this processor")
BITS = [pytest.param(4, marks=needs_int4), *(pytest.param(bits, marks=needs_bags) for bits in (8, 2))]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(indices: Tensor, groups: int, union: int) -> Tensor:
    """The same names, folded into so many groups that are spread over all."""
    return torch.arange(0, groups, max(1, groups // union))[:union][indices % union]


def named(tokens: int, groups: int, kept: int, union: int) -> Tensor:
    """`[T, kept]`: different groups of each token, together at most `union` of them."""
    chosen = random(tokens, union, seed=tokens).topk(kept, -1).indices
    return near(chosen, groups, union)


# --- slabs of packed weights -------------------------------------------------------------------------------------


def packed(
    bits: int, group: int, rows: int, columns: int, symmetric: bool = False, seed: int = 0
) -> tuple[Any, Tensor]:
    """A weight whose rows and columns are cut, and what it decodes to."""
    parts = IntGroups(bits, group, symmetric).encode(random(rows, columns, seed=seed) / columns**0.5)
    operands = parts["codes"], parts["scales"], parts.get("zeros")
    weight = pack_weight(*operands, bits, group, columns, is_table=False, is_cut=True)
    assert weight is not None
    return weight, IntGroups(bits, group, symmetric).decode(parts, (rows, columns))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns", "size"), [(256, 64, 64), (384, 100, 128)])
def test_linear_of_rows(bits: int, symmetric: bool, rows: int, columns: int, size: int) -> None:
    """100 columns are no whole groups of 32."""
    weight, dense = packed(bits, 32, rows, columns, symmetric)
    for numbers in ([0], [rows // size - 1, 0], list(range(rows // size))):
        slabs = torch.tensor(numbers, dtype=torch.int64)
        taken = dense.view(-1, size, columns)[slabs].flatten(0, 1)
        for steps in (1, 3, 17):
            x = random(steps, columns, seed=steps)
            out = weight.linear_of_rows(x, slabs, size)
            assert_close(out, x @ taken.T, **(INT4 if bits == 4 else {"tolerance": 1e-5}))
            assert out.shape == (steps, len(numbers) * size)
            assert weight.linear_of_rows(x.bfloat16(), slabs, size).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group", "size"), [(64, 256, 32, 64), (70, 512, 64, 128)])
def test_linear_of_columns(bits: int, symmetric: bool, rows: int, columns: int, group: int, size: int) -> None:
    """70 rows are no whole strips."""
    weight, dense = packed(bits, group, rows, columns, symmetric)
    for numbers in ([0], [columns // size - 1, 0], list(range(columns // size))):
        slabs = torch.tensor(numbers)
        taken = dense.view(rows, -1, size)[:, slabs].flatten(1)
        for steps in (1, 3, 17):
            x = random(steps, len(numbers) * size, seed=steps)
            out = weight.linear_of_columns(x, slabs, size)
            assert_close(out, x @ taken.T, **(INT4 if bits == 4 else {"tolerance": 1e-5}))
            assert weight.linear_of_columns(x.bfloat16(), slabs, size).dtype == torch.bfloat16


@needs_bags
def test_rows_that_are_cut_come_in_short_strips() -> None:
    cut, _ = packed(8, 32, 512, 64)
    parts = IntGroups(8, 32).encode(random(512, 64) / 8)
    whole = pack_weight(parts["codes"], parts["scales"], parts["zeros"], 8, 32, 64, is_table=False)
    assert (cut._scales.shape[-1], whole._scales.shape[-1]) == (SLAB_ROWS, 512)
    assert cut.nbytes < 1.1 * whole.nbytes
    x = random(3, 64)
    assert_close(cut.linear(x, None), whole.linear(x, None), tolerance=1e-6)


def test_groups_of_a_slab() -> None:
    assert [groups_per_slab(group) for group in (16, 32, 64, 128, 192, 48, 96, 1)] == [
        4,
        2,
        1,
        1,
        3 // 3,
        None,
        None,
        64,
    ]
    slabs = _Slabs(torch.tensor([[5, 2], [3, 2]]), 16, 2)
    assert slabs.slabs.tolist() == [1, 2]
    assert slabs.is_worth_it
    kept = slabs.keep(torch.ones(2, 8), 2)
    assert kept.tolist() == [[1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert not _Slabs(torch.tensor([[5, 2], [3, 2]]), 7, 2).is_worth_it
    # One token reads its groups in the order in which it names them, and drops nothing.
    alone = _Slabs(torch.tensor([[5, 2]]), 16, 1)
    assert alone.slabs.tolist() == [5, 2]
    assert alone.keep(torch.ones(1, 4), 2).all()


# --- floating-point weights --------------------------------------------------------------------------------------

FLOAT_CASES = {
    "relu": ("relu", False, True), "gated": ("silu", True, False), "gelu": ("gelu", False, True),
    "gelu_tanh": ("gelu_tanh", False, False), "gated_and_all": ("gelu", True, True),
}  # fmt: skip


def float_weights(gated: bool, rest: bool, group: int, neurons: int = NEURONS) -> tuple[Tensor | None, ...]:
    """Gate, up, its bias, down, its bias, stand-ins."""
    gate, up, down = (random(neurons, WIDTH, seed=seed) / WIDTH**0.5 for seed in (1, 2, 3))
    absent = random(neurons // group + 1, WIDTH, seed=6)
    absent[-1] = absent[:-1].sum(0)
    biases = (random(neurons, seed=4), random(WIDTH, seed=5))
    added = (*biases, absent) if rest else (None, None, None)
    return gate if gated else None, up, added[0], down, added[1], added[2]


@pytest.mark.parametrize("case", FLOAT_CASES)
@pytest.mark.parametrize("group", [1, 32, 128])
def test_float_layers_are_the_operator(case: str, group: int) -> None:
    activation, gated, rest = FLOAT_CASES[case]
    assert activation in ACTIVATIONS
    weights, groups = float_weights(gated, rest, group), NEURONS // group
    kept = max(1, groups // 8)
    for shape, union in (
        ((1,), kept),
        ((3,), groups // 4),
        ((40,), groups // 2),
        ((5,), groups),
        ((2, 3), groups // 4),
    ):
        x = random(*shape, WIDTH, seed=len(shape))
        indices = named(x.shape[:-1].numel(), groups, kept, union).reshape(*shape, kept)
        out = run_sparse_mlp(x, indices, *weights, activation, group)
        assert_close(out, sparse_mlp(x, indices, *weights, activation, group))
    x = random(2, 3, WIDTH)
    assert_close(run_sparse_mlp(x, None, *weights, activation, group), sparse_mlp(x, None, *weights, activation, group))


def test_float_weights_that_nobody_named_are_not_read() -> None:
    weights = float_weights(True, True, 32)
    x, indices = random(3, WIDTH), named(3, NEURONS // 32, 4, 8)
    expected = run_sparse_mlp(x, indices, *weights, "silu", 32)
    is_read = torch.zeros(NEURONS // 32, dtype=torch.bool)
    is_read[indices.flatten()] = True
    for place in (0, 1, 2, 3):
        weights[place].view(NEURONS // 32, -1)[~is_read] = float("nan")
    assert torch.equal(run_sparse_mlp(x, indices, *weights, "silu", 32), expected)


# --- packed weights ----------------------------------------------------------------------------------------------


@functools.cache
def packed_layer(
    bits: int, up_group: int, down_group: int, gated: bool
) -> tuple[dict[str, dict[str, Tensor]], dict[str, PackedWeight | None]]:
    """Parts and packed weights of gate, up and down."""
    parts, weights = {}, {"gate": None}
    for seed, name in enumerate(("gate", "up", "down")):
        shape = (WIDTH, NEURONS) if name == "down" else (NEURONS, WIDTH)
        group = down_group if name == "down" else up_group
        parts[name] = IntGroups(bits, group).encode(random(*shape, seed=seed) / shape[1] ** 0.5)
        if name != "gate" or gated:
            given = (parts[name][part] for part in ("codes", "scales", "zeros"))
            weights[name] = pack_weight(*given, bits, group, shape[1], is_table=False, is_cut=name != "down")
    if not gated:
        parts["gate"] = dict.fromkeys(("codes", "scales", "zeros"))
    return parts, weights


def both(
    x: Tensor, indices: Tensor, bits: int, up_group: int, down_group: int, group: int, gated: bool, rest: bool
) -> tuple[Tensor, Tensor]:
    """What the kernels compute, and the operator."""
    parts, weights = packed_layer(bits, up_group, down_group, gated)
    _, _, up_bias, _, down_bias, absent = float_weights(gated, rest, group)
    operands = [[parts[name][part] for part in ("codes", "scales", "zeros")] for name in ("gate", "up", "down")]
    expected = quantized_sparse_mlp(
        x, indices, *operands[0], *operands[1], up_bias, *operands[2], down_bias, absent, "silu", group, bits, up_group,
        bits, down_group, WIDTH, NEURONS,
    )  # fmt: skip
    more = (up_bias, down_bias, absent, "silu", group, NEURONS)
    return run_quantized_sparse_mlp(*(weights[n] for n in ("gate", "up", "down")), x, indices, *more), expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("group", "down_group"), [(32, 32), (64, 32), (128, 128)])
def test_packed_layers_are_the_operator(bits: int, gated: bool, group: int, down_group: int) -> None:
    groups = NEURONS // group
    for tokens, kept, union in ((1, 1, 1), (1, 2, 8), (3, 2, groups // 4), (40, 2, groups // 2), (5, 2, groups)):
        x, indices = random(tokens, WIDTH, seed=tokens), named(tokens, groups, kept, union)
        out, expected = both(x, indices, bits, 32, down_group, group, gated, rest=tokens != 3)
        assert_close(out, expected, **(INT4 if bits == 4 else {"tolerance": 1e-5}), what=f"{tokens} tokens")
    x, indices = random(2, 3, WIDTH), named(6, groups, 2, groups // 4).reshape(2, 3, 2)
    out, expected = both(x, indices, bits, 32, down_group, group, gated, rest=True)
    assert_close(out, expected, **(INT4 if bits == 4 else {"tolerance": 1e-5}))


@needs_bags
def test_groups_that_kernels_cannot_cut_are_read_with_the_rest() -> None:
    """96 neurons are no whole slabs, nor a part of one."""
    neurons, shapes = 960, {"up": (960, WIDTH), "down": (WIDTH, 960)}
    parts = {name: IntGroups(8, 32).encode(random(*shape) / 8) for name, shape in shapes.items()}
    up, down = ([each[part] for part in ("codes", "scales", "zeros")] for each in parts.values())
    weights = (pack_weight(*given, 8, 32, columns, is_table=False, is_cut=True)
               for given, columns in ((up, WIDTH), (down, neurons)))  # fmt: skip
    x, indices = random(2, WIDTH), torch.tensor([[0, 3], [3, 5]])
    out = run_quantized_sparse_mlp(None, *weights, x, indices, None, None, None, "relu", 96, neurons)
    none = (None, None, None)
    layout = (8, 32, 8, 32, WIDTH, neurons)
    expected = quantized_sparse_mlp(x, indices, *none, *up, None, *down, None, None, "relu", 96, *layout)
    assert_close(out, expected, tolerance=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_rows_do_not_depend_on_the_batch(bits: int) -> None:
    """Alone, with others that name other groups, and where the union is so large that everything is read."""
    for union in (8, NEURONS // 32):
        x, indices = random(12, WIDTH), named(12, NEURONS // 32, 3, union)
        together, _ = both(x, indices, bits, 32, 32, 32, True, rest=True)
        for row in range(12):
            alone, _ = both(x[row : row + 1], indices[row : row + 1], bits, 32, 32, 32, True, rest=True)
            assert_close(together[row : row + 1], alone, **(INT4 if bits == 4 else {"tolerance": 1e-5}))


@needs_bags
def test_only_what_is_worth_it_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    _, weights = packed_layer(8, 32, 32, False)
    kernel = type(weights["up"])
    real = kernel.linear_of_rows

    def watched(self: Any, x: Tensor, slabs: Tensor, rows: int) -> Tensor:
        taken.append(len(slabs))
        return real(self, x, slabs, rows)

    monkeypatch.setattr(kernel, "linear_of_rows", watched)
    for count in (1, 2, 16, 17, 32):
        both(random(count, WIDTH), torch.arange(count)[:, None], 8, 32, 32, 32, False, rest=False)
    # Two groups of 32 are a slab; of 16 slabs eight are worth it.
    assert taken == [1, 1, 8]


# --- executors and artifacts -------------------------------------------------------------------------------------


SPARSE = (PredictMlpSparsity(method=HiRE(rank=8), keep=0.125, group=32, force=True), CacheKV())


@functools.cache
def captured(gated: bool) -> Program:
    options = {"activation": "silu", "gated": True, "bias": False} if gated else {}
    return decoder_program(neurons=512, **options)


@functools.cache
def cached(bits: int | None, gated: bool = True) -> Program:
    program = captured(gated).copy()
    passes = [] if bits is None else [QuantizeWeights(bits=bits)]
    for pass_ in (*passes, *SPARSE):
        record = pass_.run(program)
        assert record.rewrites > 0
    return program


def steps(executor: TorchExecutor, rows: int, tokens: int = 4) -> Tensor:
    """Logits of a prompt of five tokens and of some steps behind it."""
    states, out = allocate_states(executor.states, rows, 32), []
    ids = token_ids(rows, 5 + tokens)
    for start, stop in ((0, 5), *((5 + step, 6 + step) for step in range(tokens))):
        columns = torch.arange(stop - start).repeat(rows, 1)
        inputs = {"input_ids": ids[:, start:stop], "position_ids": start + columns, "logits_positions": columns,
                  "attention_mask": torch.ones(rows, stop, dtype=torch.int64)}  # fmt: skip
        out.append(executor.run("prefill" if start == 0 else "decode", inputs, states)["logits"])
    return torch.cat(out, 1)


@pytest.mark.parametrize(
    ("bits", "gated"),
    [(None, False), (None, True), pytest.param(8, False, marks=needs_bags), pytest.param(8, True, marks=needs_bags),
     pytest.param(4, True, marks=needs_int4), pytest.param(2, True, marks=needs_bags)],
)  # fmt: skip
def test_an_executor_computes_what_the_program_defines(bits: int | None, gated: bool) -> None:
    program = cached(bits, gated)
    packed_one, reference = TorchExecutor(program), TorchExecutor(program, kernels="reference")
    for rows in (1, 3):
        out, expected = steps(packed_one, rows), steps(reference, rows)
        if bits == 4:  # a rounding may choose another group where two are as good
            assert (out - expected).norm() < 0.1 * expected.norm()
        else:
            assert_close(out, expected, tolerance=1e-4, reason="the order of sums, through a head of large weights")


@pytest.mark.parametrize("bits", [None, *BITS])
def test_weights_are_held_once(bits: int | None) -> None:
    program = cached(bits)
    executor = TorchExecutor(program)
    assert executor.weight_bytes == sum(value.nbytes for value in executor._values.values())
    if bits is None:
        assert executor.weight_bytes == program.weight_bytes()
        return
    # Padding of the head's 61 rows to the 64 of a strip and more, and what a table keeps besides.
    assert 0.95 * program.weight_bytes() < executor.weight_bytes < 1.25 * program.weight_bytes()
    (node,) = [n for n in program.entries["decode"].graph.nodes if sparse_parts_read(n)]
    parts = sparse_parts_read(node)
    assert list(parts) == ["gate", "up", "down"]
    for each in parts.values():
        assert isinstance(executor._values[each.codes], Int4Weight if bits == 4 else packed_linear.BagWeight)
        assert each.scales not in executor._values
    # A prompt's linears read the same ones: never jointly with a neighbour.
    alone = [joint.parts for joint in joint_weights(program) if set(joint.parts) & set(parts.values())]
    assert sorted(len(group) for group in alone) == [1, 1, 1]


@pytest.mark.parametrize(
    "passes",
    [
        pytest.param("", id="float"),
        pytest.param("quantize-weights{bits=4},", marks=needs_int4, id="int4"),
    ],
)
def test_an_artifact_decodes_as_the_optimised_model(passes: str, tmp_path: Path) -> None:
    text = f"{passes}predict-mlp-sparsity{{method=hire,rank=8,keep=0.25,group=32,force=true}}"
    model = jettison.optimize(
        decoder(neurons=256), text, target="torch", context=64, calibration_size=(4, 32), strict=True
    )
    loaded = jettison.load(model.save_pretrained(tmp_path / "made"))
    for rows in (1, 3):
        expected, out = (steps(each.executor, rows) for each in (model, loaded))
        assert torch.equal(out, expected)
    ids = token_ids(1, 7)
    expected, out = (torch.as_tensor(each.generate(ids, max_new_tokens=8)) for each in (model, loaded))
    assert torch.equal(out, expected)
    assert loaded.executor.weight_bytes == model.executor.weight_bytes


def test_codes_that_something_else_reads_stay_as_they_are() -> None:
    program = cached(8).copy()
    (node,) = [n for n in program.entries["decode"].graph.nodes if sparse_parts_read(n)]
    codes = sparse_parts_read(node)["up"].codes
    edit = Edit(program, "decode", "test")
    placeholder = constant_placeholders(edit.entry)[codes]
    with edit.before(output_node(edit.entry)):
        total = edit.call(torch.ops.aten.sum.default, placeholder)
    logits, *states = output_node(edit.entry).args[0]
    with edit.before(output_node(edit.entry)):
        changed = edit.call(torch.ops.aten.add.Tensor, logits, total)
    edit.set_outputs([changed, *states])
    executor = TorchExecutor(program)
    assert executor._values[codes].dtype == torch.uint8
    expected = steps(TorchExecutor(program, kernels="reference"), 2)
    assert_close(steps(executor, 2), expected, tolerance=1e-4, reason="the order of sums")


def test_a_layer_of_which_one_matrix_has_no_kernel_is_computed_by_the_operator() -> None:
    """There is none for three bits. The linears of a prompt read the same parts."""
    program = captured(gated=True).copy()
    for pass_ in (QuantizeWeights(bits=3, only="down"), QuantizeWeights(bits=8), *SPARSE):
        assert pass_.run(program).rewrites > 0
    executor = TorchExecutor(program)
    expected = steps(TorchExecutor(program, kernels="reference"), 2)
    assert_close(steps(executor, 2), expected, tolerance=1e-4, reason="the order of sums")
    assert executor.weight_bytes < 1.25 * program.weight_bytes()
