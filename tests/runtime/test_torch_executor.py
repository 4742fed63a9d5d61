"""The torch executor: the program's numbers, states updated in place, weights held once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from jettison.ir import ops
from jettison.ir.capture import capture_module
from jettison.ir.compare import assert_close
from jettison.ir.errors import OptionError
from jettison.ir.interpret import run_entry
from jettison.ir.match import is_call
from jettison.ir.ops.windowed_attention import resident_tokens
from jettison.ir.program import Program, state_placeholders
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply, prepare
from jettison.passes.policies import Full, Policy, Window
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime.executor import allocate_states
from jettison.runtime.torch_executor import TorchExecutor, attend_slots, windowed_attention_
from tests.models.tiny_models import VOCAB_SIZE, WINDOW, randomize

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


def program_with(policy: Policy, dtype: torch.dtype = torch.float32) -> Program:
    program = capture_module(randomize(Decoder()).eval(), context=CONTEXT, dtype=dtype)
    prepare(program)
    apply(program, [CacheKV(policy)])
    return program


@pytest.fixture(scope="module", params=[Full(), Window(size=WINDOW)], ids=["full", "window"])
def program(request: pytest.FixtureRequest) -> Program:
    return program_with(request.param)


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


class Allocations(TorchDispatchMode):
    """Sizes of the storages that operators make, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operator = 0, ""
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {value.untyped_storage()._cdata for value in _tensors((args, kwargs))}
        returned = func(*args, **(kwargs or {}))
        for value in _tensors(returned):
            if value.untyped_storage()._cdata not in given and value.untyped_storage().nbytes() > self.largest:
                self.largest, self.operator = value.untyped_storage().nbytes(), str(func)
        return returned


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


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


def test_quantised_weights_stay_packed() -> None:
    program = capture_module(randomize(Decoder()).eval(), context=CONTEXT)
    prepare(program)
    apply(program, [QuantizeWeights(bits=4, group=32), CacheKV()])
    executor = TorchExecutor(program)
    assert executor.weight_bytes == program.weight_bytes()
    assert {value.dtype for name, value in executor._values.items() if name.endswith("codes")} == {torch.uint8}
    inputs, states = call(1, 9, [0]), allocate_states(program.states, 1, 64)
    expected = run_entry(program, "prefill", {**inputs, **states})[0]
    assert_close(executor.run("prefill", inputs, states)["logits"], expected)


def test_bfloat16_program_keeps_its_cache_in_bfloat16() -> None:
    program = program_with(Full(), torch.bfloat16)
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
    program = program_with(Full())
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


# --- the in-place forms against the operators that define them ------------------------------------------------------


def heads(rows: int, count: int, steps: int, seed: int) -> Tensor:
    return torch.randn(rows, count, steps, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(0.0, False), (2.0, False), (0.0, True)])
@pytest.mark.parametrize(
    "positions", [[[0]], [[40], [40]], [[40], [3]], [[0, 1, 2, 3]], [[9, 10, 11], [50, 51, 52]]], ids=str
)
def test_attend_slots(positions: list[list[int]], softcap: float, with_sinks: bool, window: int) -> None:
    rows, steps = len(positions), len(positions[0])
    query, key, value = heads(rows, 4, steps, 0), heads(rows, 2, 64, 1), heads(rows, 2, 64, 2)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    arguments = (torch.tensor(positions), None, None, sinks, 0.3, True, window, softcap)
    assert_close(attend_slots(query, key, value, *arguments), ops.attention(query, key, value, *arguments))


@pytest.mark.parametrize(("softcap", "with_sinks"), [(0.0, False), (2.0, False), (0.0, True)])
@pytest.mark.parametrize(
    ("before", "new", "steps"),
    [
        ([0], [1], 1), ([0], [9], 9), ([23], [1], 1), ([24], [1], 1), ([25], [3], 3), ([22], [5], 5), ([100], [40], 40),
        ([7, 24], [1, 1], 1), ([24, 24], [1, 1], 1), ([0, 0], [5, 2], 5), ([3, 30], [2, 2], 2),
    ],
    ids=str,
)  # fmt: skip
def test_windowed_attention_in_place(
    before: list[int], new: list[int], steps: int, softcap: float, with_sinks: bool
) -> None:
    """A window of 16 in 24 slots: before the first move, at it, behind it, and rows that differ."""
    rows, window, capacity = len(before), 16, 24
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    past = heads(rows, 2, capacity, 3), heads(rows, 2, capacity, 4)
    new_tokens, total = torch.tensor(new), torch.tensor(before) + torch.tensor(new)
    tensors = heads(rows, 4, steps, 0), heads(rows, 2, steps, 1), heads(rows, 2, steps, 2)
    options = (new_tokens, total, sinks, 0.3, window, softcap)
    expected = ops.windowed_attention(*tensors, *past, *options)
    own = tuple(state.clone() for state in past)
    out, key, value = windowed_attention_(*tensors, *own, *options)
    assert key is own[0]
    assert value is own[1]
    for row, count in enumerate(new):
        assert_close(out[row, :, :count], expected[0][row, :, :count])
    for row, count in enumerate(resident_tokens(total, capacity, window).tolist()):
        assert torch.equal(key[row, :, :count], expected[1][row, :, :count])
        assert torch.equal(value[row, :, :count], expected[2][row, :, :count])
