"""The torch executor: the program's numbers, states updated in place, weights held once."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettison.ir import ops
from jettison.ir.capture import capture_module
from jettison.ir.compare import assert_close
from jettison.ir.errors import OptionError
from jettison.ir.interpret import run_entry
from jettison.ir.match import is_call
from jettison.ir.ops.windowed_attention import resident_tokens
from jettison.ir.program import Program, constant_placeholders, state_placeholders
from jettison.passes.base import Pass
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply, prepare
from jettison.passes.policies import Full, Window
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime import torch_executor
from jettison.runtime.executor import allocate_states
from jettison.runtime.torch_executor import TorchExecutor
from tests.models.tiny_models import VOCAB_SIZE, WINDOW, randomize
from tests.runtime.allocations import Allocations
from tests.runtime.test_packed_linear import needs_bags, needs_int4

CONTEXT, WIDTH, HEADS, KV_HEADS, DIM = 256, 16, 4, 2, 6
LAYERS = 2


class Decoder(nn.Module):
    """Grouped-query attention twice, with a tied head; positions enter as a feature."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(WIDTH, heads * DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)])
            for _ in range(LAYERS)
        )
        self.outs = nn.ModuleList(nn.Linear(HEADS * DIM, WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + (position_ids[:, :, None] * torch.ones(WIDTH)).sin().to(self.embed.weight.dtype)
        for projections, out in zip(self.layers, self.outs, strict=True):
            heads = [layer(F.layer_norm(x, (WIDTH,))).unflatten(-1, (-1, DIM)).transpose(1, 2) for layer in projections]
            attended = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            x = x + out(attended.transpose(1, 2).flatten(2))
        return self.head(x)


@functools.cache
def prepared(dtype: torch.dtype) -> Program:
    """Not to be changed."""
    program = capture_module(randomize(Decoder()).eval(), context=CONTEXT, dtype=dtype)
    prepare(program)
    return program


def program_with(*passes: Pass, dtype: torch.dtype = torch.float32) -> Program:
    program = prepared(dtype).copy()
    apply(program, passes)
    return program


@pytest.fixture(scope="module", params=[Full(), Window(size=WINDOW)], ids=["full", "window"])
def program(request: pytest.FixtureRequest) -> Program:
    return program_with(CacheKV(request.param))


def call(rows: int, steps: int, before: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Inputs of one call: `steps` tokens behind `before` many in each row."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.arange(steps)[None]
    lengths = torch.tensor(before)[:, None]
    total = lengths + steps
    return {
        "input_ids": torch.randint(0, VOCAB_SIZE, (rows, steps), generator=generator),
        "position_ids": lengths + columns,
        "attention_mask": (torch.arange(int(total.max()))[None] < total).long(),
        "logits_positions": columns.repeat(rows, 1),
    }


def resident(tokens: int, states: dict[str, Tensor]) -> int:
    """Slots that hold a token; what the others hold is never read."""
    slots = next(iter(states.values())).shape[2]
    return tokens if slots == CONTEXT else int(resident_tokens(torch.tensor(tokens), slots, WINDOW))


def test_every_call_computes_what_the_program_computes(program: Program) -> None:
    executor = TorchExecutor(program)
    expected_states = allocate_states(program.states, 2, CONTEXT)
    states = allocate_states(program.states, 2, CONTEXT)
    before = [0, 0]
    for entry, steps in [("prefill", 70), ("prefill", 1), ("prefill", 7), *[("decode", 1)] * 12, ("prefill", 100)]:
        inputs = call(2, steps, before, seed=before[0])
        returned = run_entry(program, entry, {**inputs, **expected_states})
        expected_states = dict(zip(state_placeholders(program.entries[entry]), returned[1:], strict=True))
        assert_close(executor.run(entry, inputs, states)["logits"], returned[0], what=f"{entry} behind {before}")
        before = [length + steps for length in before]
        used = slice(0, resident(before[0], states))
        for name, state in states.items():
            expected = expected_states[name][:, :, used]
            assert_close(state[:, :, used], expected, what=f"{name} after {entry} up to {before}")


def test_rows_of_different_length_decode_together(program: Program) -> None:
    """In a windowed cache they move their windows at different steps."""
    executor = TorchExecutor(program)
    lengths, expected = [79, 3, 130], []
    states = allocate_states(program.states, 3, CONTEXT)
    for row, length in enumerate(lengths):
        part = {name: state[row : row + 1] for name, state in states.items()}
        executor.run("prefill", call(1, length, [0], seed=row), part)
        own = {name: state.clone() for name, state in part.items()}
        rows = [executor.run("decode", _row(call(3, 1, [n + k for n in lengths], k), row), own) for k in range(4)]
        expected.append([step["logits"] for step in rows])
    for step in range(4):
        logits = executor.run("decode", call(3, 1, [length + step for length in lengths], step), states)["logits"]
        for row in range(3):
            assert_close(logits[row : row + 1], expected[row][step], what=f"row {row}, step {step}")


def _row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    length = int(inputs["attention_mask"][row].sum())
    alone = {name: value[row : row + 1] for name, value in inputs.items()}
    return {**alone, "attention_mask": alone["attention_mask"][:, :length]}


def test_states_are_updated_in_place_and_never_copied(program: Program) -> None:
    executor = TorchExecutor(program)
    states = allocate_states(program.states, 1, CONTEXT)
    cache_bytes = states["past_key_values.0.key"].untyped_storage().nbytes()
    pointers = {name: state.data_ptr() for name, state in states.items()}
    executor.run("prefill", call(1, 30, [0]), states)
    before = {name: state.clone() for name, state in states.items()}
    with Allocations() as seen:
        executor.run("decode", call(1, 1, [30]), states)
    assert 0 < seen.largest < cache_bytes / 4, f"{seen.operator} made {seen.largest} bytes, a cache has {cache_bytes}"
    for name, state in states.items():
        assert state.data_ptr() == pointers[name]
        assert (state != before[name]).any(-1).any(1)[0].nonzero().tolist() == [[30]], "one slot written"


def test_what_counts_as_a_copy_is_noticed(program: Program) -> None:
    """The measure of the test above sees the functional operators, which do copy."""
    states = allocate_states(program.states, 1, CONTEXT)
    with Allocations() as seen:
        run_entry(program, "decode", {**call(1, 1, [30]), **states})
    assert seen.largest >= states["past_key_values.0.key"].untyped_storage().nbytes()


def test_weights_are_held_once(program: Program) -> None:
    executor = TorchExecutor(program)
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in executor._values.values()}
    assert executor.weight_bytes == program.weight_bytes() == sum(held.values())
    # fp32 weights under an fp32 graph are the program's own tensors, not copies.
    for name, value in executor._values.items():
        assert value.data_ptr() == program.constants[name].blocks[0].data_ptr()
    prefill, decode = (executor._constants[entry] for entry in ("prefill", "decode"))
    assert {value.data_ptr() for value in prefill} == {value.data_ptr() for value in decode}


def quantised(bits: int, group: int = 32, symmetric: bool = False, skip: str | None = None) -> Program:
    return program_with(QuantizeWeights(bits=bits, group=group, symmetric=symmetric, skip=skip), CacheKV())


# Of logits after two layers, whose 4-bit linears round to bf16; with 8 bits the kernels compute in fp32.
PACKED_TOLERANCE = {4: 2e-2, 8: 1e-5}


def assert_runs_like_the_program(executor: TorchExecutor, program: Program, tolerance: float) -> None:
    """A prompt of 70 tokens, which decodes weights by the block, a short one, and single tokens."""
    states, expected = (allocate_states(program.states, 2, CONTEXT) for _ in range(2))
    before = [0, 0]
    for entry, steps in (("prefill", 70), ("prefill", 3), ("decode", 1), ("decode", 1)):
        inputs = call(2, steps, before, seed=before[0])
        returned = run_entry(program, entry, {**inputs, **expected})
        expected = dict(zip(expected, returned[1:], strict=True))
        logits = executor.run(entry, inputs, states)["logits"]
        assert_close(logits, returned[0], tolerance=tolerance, reason="kernels of packed weights", what=entry)
        before = [length + steps for length in before]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group", "symmetric"), [(32, False), (64, True), (128, False)])
def test_quantised_program(bits: int, group: int, symmetric: bool) -> None:
    program = quantised(bits, group, symmetric)
    assert_runs_like_the_program(TorchExecutor(program), program, PACKED_TOLERANCE[bits])


@pytest.mark.parametrize("bits", [4, 8])
def test_reference_kernels_compute_what_the_program_defines(bits: int) -> None:
    program = quantised(bits)
    executor = TorchExecutor(program, kernels="reference")
    assert executor.weight_bytes == program.weight_bytes()
    assert {value.dtype for name, value in executor._values.items() if name.endswith("codes")} == {torch.uint8}
    assert_runs_like_the_program(executor, program, 1e-5)


def test_without_a_kernel_the_operator_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_executor, "pack_weight", lambda *args, **kwargs: None)
    program = quantised(4)
    executor = TorchExecutor(program)
    assert executor.weight_bytes == program.weight_bytes()
    assert_runs_like_the_program(executor, program, 1e-5)


@pytest.mark.parametrize("bits", [pytest.param(4, marks=needs_int4), pytest.param(8, marks=needs_bags)])
def test_packed_weights_replace_their_parts(bits: int) -> None:
    program = quantised(bits)
    executor = TorchExecutor(program)
    biases = {f"{module}.bias" for module in ("outs.0", "outs.1", *(f"layers.{i}.{j}" for i in "01" for j in "012"))}
    # Queries, keys and values of a layer as one; the tied table alone.
    weights = {"layers.0.0", "layers.1.0", "outs.0", "outs.1", "embed"}
    tensors = {name for name, value in executor._values.items() if isinstance(value, Tensor)}
    assert biases <= tensors
    assert not any(name.endswith((".codes", ".scales", ".zeros")) for name in tensors)
    assert set(executor._values) - tensors == {f"{module}.weight.codes" for module in weights}
    assert executor._values["layers.0.0.weight.codes"].rows == (HEADS + 2 * KV_HEADS) * DIM
    assert executor.weight_bytes == sum(value.nbytes for value in executor._values.values())
    for one, other in zip(executor._constants["prefill"], executor._constants["decode"], strict=True):
        assert one is other


@needs_int4
@needs_bags
def test_linears_of_different_layout_stay_apart() -> None:
    """Keys and values in 4 bits, queries in 8, the head as it is."""
    passes = [QuantizeWeights(bits=8, skip=r"layers\..\.[12]|embed|outs"), QuantizeWeights(bits=4, skip="embed")]
    program = program_with(*passes, CacheKV())
    executor = TorchExecutor(program)
    held = {name: type(value).__name__ for name, value in executor._values.items() if not isinstance(value, Tensor)}
    assert held == {
        f"{name}.weight.codes": kind
        for name, kind in [
            ("layers.0.0", "BagWeight"), ("layers.0.1", "Int4Weight"), ("layers.1.0", "BagWeight"),
            ("layers.1.1", "Int4Weight"), ("outs.0", "Int4Weight"), ("outs.1", "Int4Weight"),
        ]
    }  # fmt: skip
    assert_runs_like_the_program(executor, program, PACKED_TOLERANCE[4])


def test_a_weight_that_something_else_reads_stays_as_it_is() -> None:
    program = quantised(4)
    for entry in program.entries.values():
        codes = constant_placeholders(entry)["outs.0.weight.codes"]
        output = next(node for node in entry.graph.nodes if node.op == "output")
        with entry.graph.inserting_before(output):
            total = entry.graph.call_function(torch.ops.aten.sum.default, (codes,))
            scaled = entry.graph.call_function(torch.ops.aten.mul.Tensor, (output.args[0][0], total))
        output.args = ((scaled, *output.args[0][1:]),)
    executor = TorchExecutor(program)
    assert executor._values["outs.0.weight.codes"].dtype == torch.uint8
    assert_runs_like_the_program(executor, program, PACKED_TOLERANCE[4])


def test_unknown_kernels() -> None:
    with pytest.raises(OptionError, match="kernels='fast': needed one of packed, reference"):
        TorchExecutor(quantised(4), kernels="fast")


def test_bfloat16_program_keeps_its_cache_in_bfloat16() -> None:
    program = program_with(CacheKV(), dtype=torch.bfloat16)
    executor, states = TorchExecutor(program), allocate_states(program.states, 1, 64)
    expected = allocate_states(program.states, 1, 64)
    assert states["past_key_values.0.key"].dtype == torch.bfloat16
    for entry, steps, before in (("prefill", 9, 0), ("decode", 1, 9)):
        inputs = call(1, steps, [before])
        returned = run_entry(program, entry, {**inputs, **expected})
        expected = dict(zip(expected, returned[1:], strict=True))
        assert_close(executor.run(entry, inputs, states)["logits"], returned[0])


def test_a_state_that_another_node_reads_is_not_overwritten() -> None:
    """The old value is returned beside the new one: writing in place would change it."""
    program = program_with(CacheKV())
    entry = program.entries["decode"]
    write = next(node for node in entry.graph.nodes if is_call(node, ops.write_slots))
    output = next(node for node in entry.graph.nodes if node.op == "output")
    with entry.graph.inserting_before(output):
        old = entry.graph.call_function(torch.ops.aten.neg.default, (write.args[0],))
    output.args = ((old, *output.args[0][1:]),)
    executor, states = TorchExecutor(program), allocate_states(program.states, 1, 64)
    executor.run("prefill", call(1, 5, [0]), states)
    before = states[write.args[0].meta["state"]].clone()
    assert torch.equal(executor.run("decode", call(1, 1, [5]), states)["logits"], -before)
    assert not torch.equal(states[write.args[0].meta["state"]], before)


def test_unknown_entry(program: Program) -> None:
    with pytest.raises(OptionError, match="no entry 'forward': this program has prefill, decode"):
        TorchExecutor(program).run("forward", {}, {})
