from __future__ import annotations

import pytest
import torch
from torch import nn

from jettison.codegen.onnx.decompositions import decompose_all, spare_decompositions

aten = torch.ops.aten
# As the exporter gives it: operators that it has no counterpart of, and how to do without them.
TABLE = {aten.rsub.Scalar: lambda x, other, alpha=1: aten.add.Scalar(aten.neg.default(x), other)}


class Tidy(nn.Module):
    def forward(self, x, y):
        flat = x[:, None].flatten(2)
        between = (y > -0.5).to("cpu", torch.bool) & (y.square() < 0.5)
        return flat.to(torch.float64), (y.unflatten(1, (2, -1)) + 1)[:, :, :2], flat.shape[0], between


class Reversed(nn.Module):
    def forward(self, x):
        return aten.rsub.Scalar(x.flatten(1), 1)


def exported(module, *examples):
    dims = [{0: torch.export.Dim(f"rows{index}")} for index in range(len(examples))]
    return torch.export.export(module, examples, dynamic_shapes=(*dims,), strict=False)


def targets(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def test_what_the_exporter_knows_is_not_traced_again():
    program = exported(Tidy(), torch.ones(3, 4, 5), torch.ones(2, 6))
    given = torch.randn(4, 4, 5), torch.randn(7, 6)
    expected = program.module()(*given)
    spare_decompositions(program)
    assert program.run_decompositions(TABLE) is program
    assert aten.slice.Tensor in targets(program), "one that leaves something out"
    assert targets(program).count(aten.slice.Tensor) == 1
    assert targets(program).count(aten.sym_size.int) <= 2, "one for each input"
    spelled_otherwise = {
        aten.to.dtype,
        aten.to.device,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.square.default,
    }
    assert not {*spelled_otherwise, aten.__and__.Tensor} & set(targets(program))
    program.graph.lint()
    for mine, theirs in zip(program.module()(*given), expected, strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # inside torch
def test_what_it_does_not_know_is_decomposed():
    program = exported(Reversed(), torch.ones(3, 2, 2))
    spare_decompositions(program)
    decomposed = program.run_decompositions(TABLE)
    assert decomposed is not program
    assert aten.rsub.Scalar not in targets(decomposed)
    assert torch.equal(decomposed.module()(torch.full((5, 2, 2), 3.0)), torch.full((5, 4), -2.0))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_it_can_be_taken_back():
    program = exported(Tidy(), torch.ones(3, 4, 5), torch.ones(2, 6))
    spare_decompositions(program)
    decompose_all(program)
    assert program.run_decompositions(TABLE) is not program
