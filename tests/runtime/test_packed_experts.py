"""Quantised experts on the torch target: read by kernels, held once, and only where nothing else reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jettison.ir.compare import assert_close, example_input_ids
from jettison.ir.edit import Edit
from jettison.ir.match import is_call
from jettison.ir.ops import quantized_experts
from jettison.ir.program import Program, constant_placeholders, output_node
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime.packed_experts import PackedExperts, pack_experts, packable_experts
from jettison.runtime.torch_executor import TorchExecutor
from tests.models.tiny_mixture import EXPERTS, LAYERS, mixture_program

REASON = "x and scales in bf16 where there are 4 bits"


def quantised(bits: int, group: int = 32, inner: int = 48) -> Program:
    program = mixture_program(inner)
    QuantizeWeights(bits, group, skip="embed").run(program)
    return program


def run(executor: TorchExecutor, ids: Tensor) -> Tensor:
    return next(iter(executor.run("forward", {"input_ids": ids}, {}).values()))


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (4, 64)])
def test_kernels_compute_what_the_program_defines(bits: int, group: int) -> None:
    """48 columns are no whole groups."""
    program = quantised(bits, group)
    packed, reference = TorchExecutor(program), TorchExecutor(program, kernels="reference")
    held = [value for value in packed._values.values() if isinstance(value, PackedExperts)]
    parts = packable_experts(program)
    if pack_experts(program, parts[0]) is None:
        pytest.skip("no kernel of this build of PyTorch reads the format on this processor")
    assert (len(held), len(parts)) == (LAYERS, LAYERS)
    assert not any(isinstance(value, PackedExperts) for value in reference._values.values())
    for shape in ((1, 1), (2, 7), (3, 33)):
        ids = example_input_ids(program, *shape)
        tolerance = 2e-2 if bits == 4 else 1e-5
        assert_close(run(packed, ids), run(reference, ids), tolerance=tolerance, reason=REASON)


def test_stacks_are_held_once() -> None:
    program = quantised(8)
    executor = TorchExecutor(program)
    if not any(isinstance(value, PackedExperts) for value in executor._values.values()):
        pytest.skip("no kernel of this build of PyTorch reads the format on this processor")
    parts = packable_experts(program)
    names = {name for each in parts for name in each.names}
    assert names & set(executor._values) == {each.name for each in parts}
    assert executor.weight_bytes == sum(value.nbytes for value in executor._values.values())


def test_a_stack_that_something_else_reads_stays_as_it_is() -> None:
    program = quantised(4)
    edit = Edit(program, "forward", "test")
    codes = constant_placeholders(edit.entry)["body.down0.codes"]
    with edit.before(output_node(edit.entry)):
        total = edit.call(torch.ops.aten.sum.default, codes)
    edit.set_outputs([*output_node(edit.entry).args[0], total])
    program.outputs = (*program.outputs, "total")
    assert [each.name for each in packable_experts(program)] == ["body.gate_up1.codes"]
    ids = example_input_ids(program, 2, 7)
    returned = TorchExecutor(program).run("forward", {"input_ids": ids}, {})
    assert returned["total"] == program.constants["body.down0.codes"].value().sum()


def test_no_kernel_for_three_bits() -> None:
    """The operator itself computes then."""
    program = quantised(8)
    parts = packable_experts(program)[0]
    three_bits = type(parts)(parts.gate_up, parts.down, (3, 32, 3, 32))
    assert pack_experts(program, three_bits) is None
    assert program.constants[parts.name].shape[0] == EXPERTS
    assert any(is_call(node, quantized_experts) for node in program.entries["forward"].graph.nodes)
