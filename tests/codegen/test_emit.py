"""Emitted ONNX files: what they hold, and that they compute what the program computes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettison.codegen.onnx import emit as emitter
from jettison.codegen.onnx.emit import MINIMUM_ORT
from jettison.ir.compare import assert_close
from jettison.ir.errors import UnsupportedError
from jettison.ir.interpret import run_entry
from jettison.ir.program import output_node
from jettison.passes.policies import Full, Policy, Window
from jettison.passes.quantize_weights import QuantizeWeights
from tests.codegen.running import REASON, TOLERANCE, Emitted, SideBySide, attributes, cached_program, emit
from tests.models.tiny_models import TINY_MODELS, VOCAB_SIZE, WINDOW, randomize

CONTEXT = 128
CAPACITY = 128
ATTENTION = "com.microsoft::GroupQueryAttention"


def family(name: str, **options: Any) -> Any:
    """A small transformers model with other sizes than the ones other tests use."""
    transformers = pytest.importorskip("transformers")
    tiny = TINY_MODELS[name]
    config = getattr(transformers, tiny.config)(**{**tiny.options, **options})
    return randomize(getattr(transformers, tiny.model)(config)).eval()


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of transformers, and what its attention must become.

    Attributes:
        family: Key of `TINY_MODELS`.
        policy: Of the cache.
        operators: How often operators must occur.
        fused: Attributes that every GroupQueryAttention must have.
        options: Fields of the configuration.
    """

    family: str
    policy: Policy
    operators: dict[str, int]
    fused: dict[str, Any]
    options: dict[str, Any]


def case(
    name: str, policy: Policy, operators: dict[str, int], fused: dict[str, Any] | None = None, **options: Any
) -> Any:
    return pytest.param(Case(name, policy, operators, fused or {}, options), id=f"{name}-{policy.name}")


WIDE = {"hidden_size": 64}  # four heads of 16, which the kernel also rotates
ONE = {"num_hidden_layers": 1}
ROTATED = {"do_rotary": 1, "rotary_interleaved": 0}
CASES = [
    case("llama", Full(), {ATTENTION: 1, "RotaryEmbedding": 0}, ROTATED, **WIDE, **ONE),
    case("gpt2", Full(), {ATTENTION: 1, "Gemm": 1}, {"do_rotary": 0, "num_heads": 4, "kv_num_heads": 4}, n_layer=1),
    case("opt", Full(), {ATTENTION: 1}, {"do_rotary": 0}, **ONE),
    case("qwen3", Full(), {ATTENTION: 1}, {"do_rotary": 1, "kv_num_heads": 2}, head_dim=64, **ONE),
    case("gpt_neox", Full(), {ATTENTION: 1, "RotaryEmbedding": 2}, {"do_rotary": 0}, rotary_pct=0.25, **WIDE, **ONE),
    case("gemma2", Full(), {ATTENTION: 2}, {**ROTATED, "softcap": 2.0}, head_dim=16),
    case("mistral", Full(), {ATTENTION: 1}, {**ROTATED, "local_window_size": WINDOW}, head_dim=16, **ONE),
    case("mistral", Window(), {ATTENTION: 1}, {"do_rotary": 0, "sliding_window_cache": 1}, **ONE),
    case("mixtral", Full(), {ATTENTION: 1, "TopK": 1, "com.microsoft::MoE": 1}, {}, **ONE),
    # One layer windowed and one full, both with sinks.
    case("gpt_oss", Window(), {ATTENTION: 2}, {}, head_dim=16),
]


@pytest.mark.parametrize("case", CASES)
def test_family_computes_what_its_program_computes(case: Case, tmp_path: Path) -> None:
    emitted = emit(cached_program(family(case.family, **case.options), case.policy), tmp_path)
    found = emitted.operators()
    assert {name: found[name] for name in case.operators} == case.operators
    for node in emitted.nodes("GroupQueryAttention"):
        assert attributes(node).items() >= case.fused.items()
    if isinstance(case.policy, Full):
        ragged = SideBySide(emitted, 3, CAPACITY)
        ragged.check([7, 20, 1])
        ragged.check_steps(3)
    # The windowed kernel takes rows of different length one by one, as sessions do.
    # 80 slots hold a window: it moves within the second call or while decoding.
    long = SideBySide(emitted, 1, CAPACITY)
    long.check([70])
    long.check([7])
    long.check_steps(6)
    even = SideBySide(emitted, 2, CAPACITY)
    even.check([11, 11])
    even.check_steps(3)


class Attention(nn.Module):
    """Causal attention whose heads have any size, rotated in their first channels."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, dim: int, rotated: int, interleaved: bool, value_dim: int
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.rotated, self.interleaved = heads, kv_heads, dim, rotated, interleaved
        self.query = nn.Linear(width, heads * dim)
        self.key = nn.Linear(width, kv_heads * dim)
        self.value = nn.Linear(width, kv_heads * value_dim)
        self.out = nn.Linear(heads * value_dim, width)
        if rotated:
            self.register_buffer("frequencies", 100.0 ** (-torch.arange(0, rotated, 2) / rotated))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, rest = x[..., : self.rotated], x[..., self.rotated :]
        if self.interleaved:
            cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
            half = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
            first, second = turned[..., : self.rotated // 2], turned[..., self.rotated // 2 :]
            half = torch.cat((-second, first), -1)
        turned = turned * cos[:, None] + half * sin[:, None]
        return turned if self.rotated == self.dim else torch.cat((turned, rest), -1)

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        heads = (self.heads, self.kv_heads, self.kv_heads)
        query, key, value = (
            layer(x).unflatten(-1, (count, -1)).transpose(1, 2)
            for layer, count in zip((self.query, self.key, self.value), heads, strict=True)
        )
        if self.rotated:
            angles = position_ids[:, :, None].float() * self.frequencies
            query, key = (self.rotate(each, angles.cos(), angles.sin()) for each in (query, key))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(out.transpose(1, 2).flatten(2))


@dataclasses.dataclass(frozen=True)
class Site:
    """Sizes of one attention; `value_dim` 0 means `dim`."""

    heads: int
    kv_heads: int
    dim: int
    rotated: int
    interleaved: bool = False
    value_dim: int = 0


class ManyHeadSizes(nn.Module):
    """One layer per site."""

    def __init__(self, *sites: Site, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, width)
        self.layers = nn.ModuleList(
            Attention(width, *dataclasses.astuple(site)[:5], site.value_dim or site.dim) for site in sites
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in sites)
        self.head = nn.Linear(width, VOCAB_SIZE, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), position_ids)
        return self.head(x)


EVEN, ODD, TURNED = Site(4, 4, 8, 8), Site(4, 2, 12, 12), Site(4, 1, 16, 16, interleaved=True)
SITES = [
    EVEN,
    ODD,  # heads of no multiple of 8
    TURNED,
    Site(2, 2, 32, 16),  # partial, and wide enough for the kernel
    Site(2, 1, 16, 8, value_dim=8),  # values narrower than keys
]


@pytest.fixture(scope="module")
def head_sizes(tmp_path_factory: pytest.TempPathFactory) -> Emitted:
    program = cached_program(randomize(ManyHeadSizes(*SITES)).eval(), Full(), context=CONTEXT)
    return emit(program, tmp_path_factory.mktemp("sizes"))


def test_head_sizes_take_the_fused_kernel_where_it_can(head_sizes: Emitted) -> None:
    run = SideBySide(head_sizes, 3, CAPACITY)
    run.check([21, 1, 40])
    run.check_steps(4)
    fused = [attributes(node) for node in head_sizes.nodes("GroupQueryAttention")]
    assert [(node["num_heads"], node["do_rotary"]) for node in fused] == [(4, 0), (4, 1), (2, 1)]
    assert head_sizes.operators()["ScatterND"] == 4, "keys and values of the two that are written out"
    assert head_sizes.graphs[0].minimum_ort == MINIMUM_ORT["default"]


def test_head_sizes_of_a_windowed_cache(tmp_path: Path) -> None:
    """The kernel for windows rotates nothing, and what it refuses is written out."""
    program = cached_program(randomize(ManyHeadSizes(EVEN, ODD)).eval(), Window(size=WINDOW), context=CONTEXT)
    emitted = emit(program, tmp_path)
    run = SideBySide(emitted, 1, CAPACITY)
    run.check([70])
    run.check([7])
    run.check_steps(8)
    rows = SideBySide(emitted, 3, CAPACITY)
    rows.check([21, 21, 21])
    rows.check_steps(4)
    assert [attributes(node)["do_rotary"] for node in emitted.nodes("GroupQueryAttention")] == [0]
    assert emitted.graphs[0].minimum_ort == MINIMUM_ORT["windowed_cache"]


def test_no_operator_copies_the_full_cache(head_sizes: Emitted, tmp_path: Path) -> None:
    # The graph as ONNX Runtime runs it.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(head_sizes.graphs[0].path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False).graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in {*node.input} - {""}:
            readers.setdefault(name, []).append(node)
    writers = {name: node for node in graph.node for name in node.output}
    pairs = [pair for graph in head_sizes.graphs for pair in graph.states.values()]
    assert len(pairs) == 2 * len(SITES)
    for past, present in pairs:
        # The one node that reads the past writes the present, so one buffer can be both.
        (reader,) = (node for node in readers[past] if node.op_type != "Shape")
        assert reader is writers[present]
        assert reader.op_type in ("GroupQueryAttention", "ScatterND")
        # Written-out attention reads it where it lies: a product over a view of another shape.
        views = [node for node in readers.get(present, []) if node.op_type != "Shape"]
        assert [node.op_type for node in views] == ["Unsqueeze"] * (reader.op_type == "ScatterND")
        for view in views:
            assert {node.op_type for node in readers[view.output[0]]} <= {"MatMul", "FusedMatMul"}


def test_a_decode_step_writes_one_slot_in_place(head_sizes: Emitted) -> None:
    run = SideBySide(head_sizes, 2, CAPACITY)
    pointers = {name: state.data_ptr() for name, state in run.states.items()}
    run.check([5, 5])
    before = {name: state.clone() for name, state in run.states.items()}
    run.check_steps(1)
    for name, state in run.states.items():
        assert state.data_ptr() == pointers[name]
        changed = (state != before[name]).any(-1).any(1)
        assert changed.nonzero()[:, 1].tolist() == [5, 5]


# --- what is in a file ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Emitted:
    """Tied embedding, quantised; rotated by the kernel."""
    pytest.importorskip("transformers")
    model = family("llama", **WIDE, **ONE, tie_word_embeddings=True, vocab_size=131)
    program = cached_program(model, Full(), QuantizeWeights(bits=4, group=32))
    return emit(program, tmp_path_factory.mktemp("small"), accuracy_level=4)


def axes_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def test_inputs_and_outputs_have_the_documented_names_and_axes(small: Emitted) -> None:
    graph = small.model.graph
    inputs = {value.name: axes_of(value) for value in graph.input}
    outputs = {value.name: axes_of(value) for value in graph.output}
    tokens = ["batch_size", "sequence_length"]
    cache = ["batch_size", 2, "past_sequence_length", 16]
    assert inputs == {
        "input_ids": tokens,
        "position_ids": tokens,
        "attention_mask": ["batch_size", "total_sequence_length"],
        "logits_positions": ["logits_batch_size", "logits_sequence_length"],
        "past_key_values.0.key": cache,
        "past_key_values.0.value": cache,
    }
    assert outputs == {
        "logits": ["batch_size", 1, 131],  # as they are without logits_positions
        "present.0.key": cache,
        "present.0.value": cache,
    }
    assert next(iter(outputs)) == "logits"
    for axes in (*inputs.values(), *outputs.values()):
        assert all(re.search("batch|past|seq|total", axis) for axis in axes if isinstance(axis, str))
    (described,) = small.graphs
    assert described.entries == ("prefill", "decode")
    assert set(described.inputs) == set(inputs)
    assert set(described.outputs) == set(outputs)


def test_session_of_onnxruntime_agrees_with_the_description(small: Emitted) -> None:
    session = onnxruntime.InferenceSession(str(small.graphs[0].path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == [
        "input_ids", "position_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value",
    ]  # fmt: skip
    assert [value.name for value in session.get_overridable_initializers()] == ["logits_positions"]


@pytest.mark.parametrize("entry", ["prefill", "decode"])
def test_logits_positions_may_be_left_out(small: Emitted, entry: str) -> None:
    """Other runtimes do not know the input: they get the logits after the last token of each row."""
    session = onnxruntime.InferenceSession(str(small.graphs[0].path), providers=["CPUExecutionProvider"])
    steps = 6 if entry == "prefill" else 1
    lengths = [4, 6] if entry == "prefill" else [1, 1]
    feed: dict[str, Any] = {
        "input_ids": torch.arange(2 * steps).reshape(2, steps).numpy(),
        "position_ids": torch.arange(steps)[None].repeat(2, 1).numpy(),
        "attention_mask": (torch.arange(steps)[None] < torch.tensor(lengths)[:, None]).long().numpy(),
        "past_key_values.0.key": torch.zeros(2, 2, 64, 16).numpy(),
        "past_key_values.0.value": torch.zeros(2, 2, 64, 16).numpy(),
    }
    (last,) = session.run(["logits"], feed)
    assert last.shape == (2, 1, 131)
    everywhere = torch.arange(steps)[None].repeat(2, 1).numpy()
    (every,) = session.run(["logits"], {**feed, "logits_positions": everywhere})
    assert every.shape == (2, steps, 131)
    for row, length in enumerate(lengths):
        assert_close(torch.from_numpy(last[row, 0]), torch.from_numpy(every[row, length - 1]))


def test_file_is_standard_onnx_23_and_names_nothing_of_this_machine(small: Emitted) -> None:
    model = small.model
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 23, "com.microsoft": 1}
    assert model.producer_name == "jettison"
    assert not model.functions
    data = small.graphs[0].path.read_bytes()
    assert not re.search(rb"\.py|/tmp|/home|/usr|site-packages|pkg\.", data)
    assert str(small.folder).encode() not in data
    for element in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        assert not element.doc_string
        assert not element.metadata_props


def external(model: onnx.ModelProto) -> dict[str, tuple[str, int, int]]:
    """Location, offset and length of every initializer in the data file."""
    found = {}
    for initializer in model.graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in initializer.external_data}
            found[initializer.name] = (entries["location"], int(entries["offset"]), int(entries["length"]))
    return found


def test_weights_lie_in_one_file_page_aligned_each_once(small: Emitted) -> None:
    stored = external(small.model)
    assert {location for location, _, _ in stored.values()} == {"model.onnx.data"}
    assert all(offset % 4096 == 0 for _, offset, _ in stored.values())
    blocks = sorted({(offset, length) for _, offset, length in stored.values()})
    end = 0
    for offset, length in blocks:
        assert offset == -(-end // 4096) * 4096, "nothing but padding between tensors"
        end = offset + length
    assert (small.folder / "model.onnx.data").stat().st_size == end
    assert sorted(path.name for path in small.folder.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_tied_embedding_is_stored_once(small: Emitted) -> None:
    stored = external(small.model)
    table, rows = (stored[f"model.embed_tokens.weight.codes{suffix}"] for suffix in ("", ".rows"))
    assert table == rows
    shapes = {initializer.name: list(initializer.dims) for initializer in small.model.graph.initializer}
    assert shapes["model.embed_tokens.weight.codes"] == [131, 2, 16]
    assert shapes["model.embed_tokens.weight.codes.rows"] == [131, 32]
    assert small.operators()["com.microsoft::GatherBlockQuantized"] == 1
    scales = [name for name in stored if name.startswith("model.embed_tokens.weight.scales")]
    assert len(scales) <= 1
    # Two layouts of the same matrix would be two copies; nothing else repeats.
    owners: dict[int, list[str]] = {}
    for name, (_, offset, _) in stored.items():
        owners.setdefault(offset, []).append(name)
    shared = [names for names in owners.values() if len(names) > 1]
    assert shared == [["model.embed_tokens.weight.codes.rows", "model.embed_tokens.weight.codes"]] or shared == [
        ["model.embed_tokens.weight.codes", "model.embed_tokens.weight.codes.rows"]
    ]


def test_emission_is_deterministic_and_defaults_to_accuracy_level_four(small: Emitted, tmp_path: Path) -> None:
    emitter.emit_program(small.program, tmp_path)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / name).read_bytes() == (small.folder / name).read_bytes()
    levels = [attributes(node)["accuracy_level"] for node in small.nodes("MatMulNBits")]
    assert levels == [4] * 6


# --- programs that are no plain decoder -----------------------------------------------------------------------------


def test_entries_that_differ_become_two_files_over_one_data_file(tmp_path: Path) -> None:
    program = cached_program(randomize(ManyHeadSizes(TURNED, width=48)).eval(), Full(), context=CONTEXT)
    # The decode entry returns the negative of the logits: any difference will do.
    entry = program.entries["decode"]
    output = output_node(entry)
    logits, *rest = output.args[0]
    with entry.graph.inserting_before(output):
        negative = entry.graph.call_function(torch.ops.aten.neg.default, (logits,))
    negative.meta = dict(logits.meta)
    output.args = ((negative, *rest),)
    emitted = emit(program, tmp_path)
    assert sorted(path.name for path in emitted.folder.iterdir()) == ["decode.onnx", "model.onnx.data", "prefill.onnx"]
    assert [graph.entries for graph in emitted.graphs] == [("prefill",), ("decode",)]
    prefill, decode = (external(onnx.load(str(graph.path), load_external_data=False)) for graph in emitted.graphs)
    assert len(prefill) == 6, "queries, keys and values are one projection"
    assert prefill == decode, "both graphs share every weight, and the tables of angles"
    run = SideBySide(emitted, 1, 64)
    run.check([9])
    run.check_steps(2)


def test_encoder(tmp_path: Path) -> None:
    program = cached_program(
        family("bert", num_key_value_heads=None, hidden_size=48, vocab_size=64, num_hidden_layers=1)
    )
    emitted = emit(program, tmp_path)
    ids = torch.randint(0, 64, (3, 19), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(19)[None] < torch.tensor([19, 4, 11])[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (torch.arange(19) > 9).long().repeat(3, 1)}
    for expected, (name, actual) in zip(
        run_entry(program, "forward", inputs), emitted.executor.run("forward", inputs, {}).items(), strict=True
    ):
        assert_close(actual, expected, tolerance=TOLERANCE, reason=REASON, what=name)
    outputs = {value.name: axes_of(value) for value in emitted.model.graph.output}
    assert outputs == {"last_hidden_state": ["batch_size", "sequence_length", 48], "pooler_output": ["batch_size", 48]}
    # Nothing but standard operators, whose schemas the checker knows.
    assert not any("::" in operator for operator in emitted.operators())
    onnx.checker.check_model(str(emitted.graphs[0].path), full_check=True)


def test_operator_without_counterpart_is_refused_by_name(tmp_path: Path) -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(61, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.special.i1e(self.embed(input_ids))

    program = cached_program(Strange().eval(), context=64)
    with pytest.raises(UnsupportedError, match=r'bessel_i1e.*target="torch"'):
        emit(program, tmp_path)


def test_slots_that_are_computed_are_refused(tmp_path: Path) -> None:
    program = cached_program(randomize(ManyHeadSizes(ODD)).eval(), Full(), context=CONTEXT)
    for entry in program.entries.values():
        for node in list(entry.graph.nodes):
            if node.target is torch.ops.jettison.write_slots.default:
                with entry.graph.inserting_before(node):
                    slots = entry.graph.call_function(torch.ops.aten.sub.Tensor, (node.args[2], 1))
                slots.meta = dict(node.args[2].meta)
                node.args = (*node.args[:2], slots)
    with pytest.raises(UnsupportedError, match=r'slots that are computed.*target="torch"'):
        emit(program, tmp_path)


class Tables(nn.Module):
    """Looks up tables of ids sliced to the length, and adds two large tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("first", torch.randint(0, 61, (1, 600), generator=generator))
        self.register_buffer("second", torch.randint(0, 61, (1, 600), generator=generator))
        self.register_buffer("mixing", torch.randn(40, 40, 8, generator=generator))

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        tables = self.embed(self.first[:, :length]) - self.embed(self.second[:, :length])
        return self.embed(input_ids) + tables + self.mixing.transpose(0, 1).sum(0)[:1]


def test_long_tables_are_neither_folded_nor_shared_by_accident(tmp_path: Path) -> None:
    """The exporter folds and merges small initializers; it must never see the placeholders of large ones."""
    model = Tables().eval()
    program = cached_program(model, context=256)
    emitted = emit(program, tmp_path)
    ids = torch.randint(0, 61, (2, 33))
    (name,) = program.outputs
    ours = emitted.executor.run("forward", {"input_ids": ids}, {})[name]
    assert_close(ours, model(ids).detach(), tolerance=TOLERANCE, reason=REASON)
