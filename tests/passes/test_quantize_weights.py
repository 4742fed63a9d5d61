from __future__ import annotations

import functools
import importlib
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jettison.ir.compare import compare_programs, example_input_ids, run_program
from jettison.ir.constants import Constant
from jettison.ir.errors import OptionError, UnsupportedError
from jettison.ir.match import is_call
from jettison.ir.ops import quantized_embedding, quantized_linear
from jettison.ir.progress import listening
from jettison.passes.cache_kv import CacheKV
from jettison.passes.canonicalize_linear import CanonicalizeLinear
from jettison.passes.formats import FORMATS, Nf4, WeightFormat
from jettison.passes.formats.int_groups import IntGroups
from jettison.passes.grammar import format_pipeline, parse_pipeline
from jettison.passes.merge_qkv_projections import MergeQkvProjections
from jettison.passes.methods import GPTQ, METHODS, Method
from jettison.passes.options import build, describe, to_spec
from jettison.passes.pipeline import prepare
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import (
    Apply,
    Embedded,
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_tiny,
    run_pass,
)

# The package `jettison.ir.ops` has the operator under the name of its module.
quantized_linear_module = importlib.import_module("jettison.ir.ops.quantized_linear")
REGISTRIES = {WeightFormat: FORMATS, Method: METHODS}
# Not a multiple of any group: the last group of a row is padded.
WIDTH = 40


class TiedLanguageModel(nn.Module):
    """Embedding and head are one table; a projection with a bias and one without."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.embed = nn.Embedding(61, width)
        self.up, self.down = nn.Linear(width, 72), nn.Linear(72, width, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return F.linear(x + self.down(self.up(x).tanh()), self.embed.weight)


@functools.cache
def tied():
    return export_tiny(TiedLanguageModel())


def export_matrix(function, **parameters):
    """A function of `(self, hidden [B, S, 40])` and its matrices."""
    return export_tiny(Embedded(Apply(function, **parameters), width=WIDTH))


def decoded(program, before):
    """`before` with the weights that the packed ones of `program` decode to."""
    reference = before.copy()
    for name, packed in program.packed.items():
        bits, group, symmetric = re.fullmatch(r"int(\d){group=(\d+),symmetric=(\w+)}", packed.format).groups()
        weight_format = IntGroups(int(bits), int(group), symmetric == "true")
        parts = {part: program.constants[constant].value() for part, constant in packed.parts.items()}
        weight = weight_format.decode(parts, packed.shape)
        reference.constants[name] = Constant(name, weight, before.constants[name].dtype)
    return reference


def weights_read(program):
    """Name of each weight that is still read in its own dtype by a linear or an embedding."""
    return {name for name in program.used_constants() if name.endswith("weight")}


def test_golden_tied(snapshot):
    after, record = assert_golden(snapshot, QuantizeWeights(), tied(), "tied")
    assert record.rewrites == 4
    assert_same_numbers(decoded(after, tied()), after)


def test_golden_symmetric(snapshot):
    after, record = assert_golden(snapshot, QuantizeWeights(8, 64, True), tied(), "symmetric")
    assert record.rewrites == 4
    assert_same_numbers(decoded(after, tied()), after)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_computes_with_the_decoded_weights(bits, group, symmetric):
    after, record = run_pass(QuantizeWeights(bits, group, symmetric), tied())
    assert (record.rewrites, record.misses) == (4, [])
    assert_same_numbers(decoded(after, tied()), after, ((1, 1), (2, 7)))


def test_more_bits_and_smaller_groups_are_nearer():
    kl = {}
    for bits, group in ((8, 32), (4, 32), (4, 128)):
        after, _ = run_pass(QuantizeWeights(bits, group), export_tiny(TiedLanguageModel(width=128)))
        kl[bits, group] = compare_programs(export_tiny(TiedLanguageModel(width=128)), after).kl
    assert 0 < kl[8, 32] < 1e-4 < kl[4, 32] < kl[4, 128] < 0.1


def test_bytes_are_those_of_the_format():
    after, record = run_pass(QuantizeWeights(), tied())
    packed = sum(IntGroups(4, 32).bytes(shape) for shape in ((61, 40), (72, 40), (40, 72)))
    assert record.bytes_before == 4 * (61 * 40 + 72 * 40 + 72 + 40 * 72)
    # The tied table is counted once, the bias stays.
    assert record.bytes_after == packed + 4 * 72 == after.weight_bytes()


def test_a_tied_table_is_stored_once():
    after, _ = run_pass(QuantizeWeights(), tied())
    (entry,) = after.entries.values()
    (lookup,) = [node for node in entry.graph.nodes if is_call(node, quantized_embedding)]
    head = [node for node in entry.graph.nodes if is_call(node, quantized_linear)][-1]
    assert lookup.args[1:4] == head.args[1:4]
    assert after.packed["embed.weight"].parts == {
        "codes": "embed.weight.codes", "scales": "embed.weight.scales", "zeros": "embed.weight.zeros",
    }  # fmt: skip


def test_dense_weights_are_let_go():
    after, _ = run_pass(QuantizeWeights(skip="down"), tied())
    assert "embed.weight" not in after.constants
    assert "down.weight" in after.constants
    assert "embed.weight" in tied().constants


def test_runs_twice_like_once():
    assert_idempotent(QuantizeWeights(), tied())


def test_skip_is_searched_in_names():
    after, record = run_pass(QuantizeWeights(skip=r"embed|^down\."), tied())
    assert (record.rewrites, record.misses) == (1, [])
    assert weights_read(after) == {"embed.weight", "down.weight"}
    assert_same_numbers(decoded(after, tied()), after)


def test_skip_that_finds_nothing_is_reported():
    _, record = run_pass(QuantizeWeights(skip="lm_head"), tied())
    assert record.rewrites == 4
    assert [(miss.node, miss.reason) for miss in record.misses] == [
        ("skip='lm_head'", "found in the name of no weight")
    ]


def test_a_second_run_takes_what_the_first_skipped():
    after, record = run_pass(QuantizeWeights(bits=8, skip="up|down"), tied(), QuantizeWeights(group=64))
    assert record.rewrites == 2
    assert {name: packed.format for name, packed in after.packed.items()} == {
        "embed.weight": "int8{group=32,symmetric=false}",
        "up.weight": "int4{group=64,symmetric=false}",
        "down.weight": "int4{group=64,symmetric=false}",
    }
    assert_same_numbers(decoded(after, tied()), after)


def test_learned_positions_are_embeddings():
    class Positions(TiedLanguageModel):
        def __init__(self):
            super().__init__()
            self.positions = nn.Embedding(64, WIDTH)

        def forward(self, input_ids, position_ids):
            return self.up(self.embed(input_ids) + self.positions(position_ids))

    before = export_tiny(Positions())
    after, record = run_pass(QuantizeWeights(), before)
    assert (record.rewrites, record.misses) == (3, [])
    assert_same_numbers(decoded(after, before), after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_graph_dtypes_keep_theirs(dtype):
    before = export_tiny(TiedLanguageModel(), dtype=dtype)
    after, record = run_pass(QuantizeWeights(bits=8), before)
    assert record.rewrites == 4
    reason = "decoded weights are used in fp32 instead of being rounded to the dtype of the graph"
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert_same_numbers(decoded(after, before), after, tolerance=tolerance, reason=reason)


def test_a_stored_dtype_other_than_the_graphs():
    narrow = export_tiny(TiedLanguageModel())
    for name, constant in narrow.constants.items():
        narrow.constants[name] = Constant(name, constant.value().bfloat16(), torch.float32)
    after, record = run_pass(QuantizeWeights(), narrow)
    assert record.bytes_before == 2 * (61 * 40 + 72 * 40 + 72 + 40 * 72)
    assert_same_numbers(decoded(after, narrow), after)


def test_the_matrix_of_a_conv1d():
    """GPT-2 stores `[K, N]`: the constant is a transposed view."""

    def conv1d(self, x):
        return torch.addmm(self.bias, x.reshape(-1, WIDTH), self.matrix).reshape(*x.shape[:2], 24)

    before = export_matrix(conv1d, bias=(24,), matrix=(WIDTH, 24))
    CanonicalizeLinear().run(before)
    assert before.constants["body.matrix.T"].blocks[0].stride() == (1, 24)
    after, record = run_pass(QuantizeWeights(), before)
    assert (record.rewrites, record.misses) == (2, [])
    assert after.packed["body.matrix.T"].shape == (24, WIDTH)
    assert_same_numbers(decoded(after, before), after)


@pytest.mark.parametrize("chunk_weights", [1, WIDTH * 7, 1 << 19])
def test_parts_do_not_depend_on_how_rows_are_split(chunk_weights, monkeypatch):
    """Also where a chunk lies across two blocks."""
    program = export_matrix(lambda self, x: F.linear(x, self.matrix), matrix=(30, WIDTH))
    whole, _ = run_pass(QuantizeWeights(), program)
    matrix = program.constants["body.matrix"].value()
    program.constants["body.matrix"] = Constant("body.matrix", (matrix[:10], matrix[10:11], matrix[11:].clone()))
    monkeypatch.setattr(quantized_linear_module, "CHUNK_WEIGHTS", chunk_weights)
    blocks, _ = run_pass(QuantizeWeights(), program)
    for part in whole.packed["body.matrix"].parts.values():
        assert torch.equal(blocks.constants[part].value(), whole.constants[part].value())


def test_no_weight_is_ever_held_dense(monkeypatch):
    """Only the rows that are being encoded are converted, and large parts lie in files."""
    asked, scratch = [], []
    rows, value = Constant.rows, Constant.value

    def watched_rows(self, start, stop):
        asked.append((stop - start) * self.shape[1])
        return rows(self, start, stop)

    def watched_value(self):
        assert not self.name.endswith("weight")
        return value(self)

    def watched_scratch(shape, dtype):
        scratch.append((tuple(shape), dtype))
        return torch.zeros(shape, dtype=dtype)

    program = export_tiny(TiedLanguageModel())
    monkeypatch.setattr(quantized_linear_module, "CHUNK_WEIGHTS", 200)
    monkeypatch.setattr(Constant, "rows", watched_rows)
    monkeypatch.setattr(Constant, "value", watched_value)
    monkeypatch.setattr("jettison.passes.methods.layerwise.scratch_tensor", watched_scratch)
    QuantizeWeights().run(program)
    assert max(asked) == 200
    assert sum(asked) == 61 * 40 + 72 * 40 + 40 * 72
    assert ((61, 2, 16), torch.uint8) in scratch


def test_progress_is_in_bytes():
    class Bar:
        def __init__(self):
            self.steps, self.done = [], 0.0

        def start(self, description, total):
            self.steps.append((description, total))
            return self.advance

        def advance(self, amount):
            self.done += amount

        def stop(self, advance):
            self.steps.append("stop")

    bar, program = Bar(), tied().copy()
    with listening(bar):
        QuantizeWeights().run(program)
    total = 4 * (61 * 40 + 72 * 40 + 40 * 72)
    assert bar.steps == [("quantize-weights", total), "stop"]
    assert bar.done == pytest.approx(total)


class Decoder(nn.Module):
    """One attention over a tied table."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 32)
        self.q, self.k, self.v = (nn.Linear(32, size, bias=False) for size in (32, 16, 16))

    def forward(self, input_ids, position_ids):
        x = self.embed(input_ids) + position_ids[:, :, None]
        query, key, value = (part(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = torch.ops.jettison.attention(query, key, value, None, None, None, None, 1.0, True, 0, 0.0)
        return F.linear(x + out.transpose(1, 2).reshape(x.shape), self.embed.weight)


@functools.cache
def decoder():
    program = export_tiny(Decoder())
    prepare(program)
    return program


def test_a_weight_of_two_entries_is_encoded_once(monkeypatch):
    encoded = []
    encode_rows = IntGroups.encode_rows
    monkeypatch.setattr(
        IntGroups, "encode_rows", lambda self, *args: encoded.append(args[1]) or encode_rows(self, *args)
    )
    cached, _ = run_pass(CacheKV(), decoder())
    after, record = run_pass(QuantizeWeights(), cached)
    assert record.rewrites == 2 * 5
    assert sorted(encoded) == ["embed.weight", "k.weight", "q.weight", "v.weight"]
    assert_same_numbers(decoded(after, cached), after, prefill=3)


def test_the_order_with_cache_kv_does_not_matter():
    first, _ = run_pass(QuantizeWeights(), decoder(), CacheKV())
    last, _ = run_pass(CacheKV(), decoder(), QuantizeWeights())
    assert first.weight_bytes() == last.weight_bytes()
    input_ids = example_input_ids(first, 3, 9)
    for ours, theirs in zip(
        run_program(first, input_ids, prefill=4), run_program(last, input_ids, prefill=4), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_merged_projection():
    merged, _ = run_pass(MergeQkvProjections(), decoder())
    assert len(merged.constants["qkv_proj.weight"].blocks) == 3
    after, record = run_pass(QuantizeWeights(), merged)
    assert (record.rewrites, record.misses) == (3, [])
    assert_same_numbers(decoded(after, merged), after)
    # Groups lie along rows, so merging changes nothing but the number of products.
    alone, _ = run_pass(QuantizeWeights(), decoder())
    assert_same_numbers(alone, after)


def test_declines_when_the_weight_is_computed():
    program = export_matrix(lambda self, x: F.linear(x, self.matrix * 2), matrix=(9, WIDTH))
    assert_declines(QuantizeWeights(skip="embed"), program, reason="the weight is not a constant")


def test_declines_when_the_weight_is_read_elsewhere():
    program = export_matrix(lambda self, x: F.linear(x, self.matrix) + self.matrix.sum(), matrix=(9, WIDTH))
    assert_declines(QuantizeWeights(skip="embed"), program, reason="aten.sum needs the float form of the weight too")


def test_declines_a_table_that_is_read_elsewhere():
    """Head and embedding stay together: the float form is needed anyway."""

    class Normalised(TiedLanguageModel):
        def forward(self, input_ids):
            return super().forward(input_ids) / self.embed.weight.norm()

    _, record = run_pass(QuantizeWeights(), export_tiny(Normalised()))
    assert record.rewrites == 2
    assert [(miss.node, miss.reason) for miss in record.misses] == [
        ("embed.weight", "aten.linalg_vector_norm needs the float form of the weight too")
    ]


def test_declines_experts():
    """Mixtral's experts: one weight of three axes, picked by token."""

    def experts(self, x):
        weight = self.experts[x.sum(-1).long().abs() % 3]
        return torch.matmul(weight, x[..., None])[..., 0]

    program = export_matrix(experts, experts=(3, 9, WIDTH))
    reason = "the weight has 3 axes, as those of experts have, not two"
    assert_declines(QuantizeWeights(skip="embed"), program, reason=reason)
    assert_declines(QuantizeWeights(skip="embed|experts"), program, reason=None)


def test_declines_products_that_are_no_linear():
    program = export_matrix(lambda self, x: torch.matmul(self.matrix, x.transpose(1, 2)), matrix=(9, WIDTH))
    reason = "the weight is read by aten.matmul, not by a linear or an embedding"
    assert_declines(QuantizeWeights(skip="embed"), program, reason=reason)


def test_declines_a_weight_that_is_no_matrix():
    program = export_matrix(lambda self, x: F.linear(x, self.vector), vector=(WIDTH,))
    reason = "the weight is f32[40], not a matrix of f32, bf16 or f16"
    assert_declines(QuantizeWeights(skip="embed"), program, reason=reason)


def test_is_not_interested_in_norms_and_masks():
    program = export_matrix(lambda self, x: x * self.scale + self.shift, scale=(WIDTH,), shift=(1, 1, WIDTH))
    assert_declines(QuantizeWeights(skip="embed"), program, reason=None)


def test_strict_names_every_miss():
    program = export_matrix(lambda self, x: F.linear(x, self.matrix * 2), matrix=(9, WIDTH))
    with pytest.raises(UnsupportedError, match=r"\[quantize-weights\] strict mode: 1 place(?s:.)*not a constant"):
        QuantizeWeights().run(program, strict=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_weights_that_are_not_finite(value):
    program = export_tiny(TiedLanguageModel())
    text = str(program)
    weight = program.constants["down.weight"].value().clone()
    weight[5, 33] = value
    program.constants["down.weight"] = Constant("down.weight", weight)
    with pytest.raises(UnsupportedError, match=rf"down\.weight: entry \[5, 33\] is {value}"):
        QuantizeWeights().run(program)
    # Nothing is half done.
    assert not program.packed
    program.constants["down.weight"] = tied().constants["down.weight"]
    assert str(program) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"bits=5: needs one of 8, 4, 3, 2"),
        ({"bits": "4"}, r"bits='4': needs one of 8, 4, 3, 2"),
        ({"bits": True}, r"bits=True: needs one of 8, 4, 3, 2"),
        ({"group": 48}, r"group=48: needs one of 32, 64, 128"),
        ({"symmetric": 1}, r"symmetric=1: needs true or false"),
        ({"bits": 4, "format": "int8"}, r"format=int8 with bits=4: leave one of them out"),
        ({"bits": 4, "format": Nf4()}, r"format=nf4.* with bits=4: needs the options of the format inside its braces"),
        ({"only": "mlp["}, r"only='mlp\[': needs a regular expression"),
        ({"skip": "mlp["}, r"skip='mlp\[': needs a regular expression \(unterminated character set"),
        ({"skip": 3}, r"skip=3: needs a regular expression"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(OptionError, match=r"\[quantize-weights\] " + message):
        QuantizeWeights(**options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quantize-weights", QuantizeWeights()),
        ("quantize-weights{bits=8,group=128,symmetric=true}", QuantizeWeights(8, 128, True)),
        (r"quantize-weights{skip='lm_head|\.0\.'}", QuantizeWeights(skip=r"lm_head|\.0\.")),
        ("quantize-weights{format=int8,group=64}", QuantizeWeights(8, 64)),
        ("quantize-weights{format=nf4{group=64}}", QuantizeWeights(format=Nf4(group=64))),
        ("quantize-weights{method=gptq,damping=0.05}", QuantizeWeights(method=GPTQ(damping=0.05))),
    ],
)
def test_text(text, expected):
    (spec,) = parse_pipeline(text)
    built = build(QuantizeWeights, spec, where=text, registries=REGISTRIES)
    assert built == expected
    (again,) = parse_pipeline(format_pipeline([to_spec(built)]))
    assert build(QuantizeWeights, again, where="", registries=REGISTRIES) == expected


def test_text_that_is_wrong_points_at_the_column():
    text = "quantize-weights{skip='mlp['}"
    (spec,) = parse_pipeline(text)
    with pytest.raises(OptionError, match="pipeline, column 1"):
        build(QuantizeWeights, spec, where=text, registries=REGISTRIES)


def test_options_are_described():
    assert [(name, default) for name, _, default, _ in describe(QuantizeWeights)] == [
        ("bits", "none"), ("group", "none"), ("symmetric", "none"), ("format", "none"), ("method", "rtn"),
        ("skip", "none"), ("only", "none"),
    ]  # fmt: skip
