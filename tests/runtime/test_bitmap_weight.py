"""Bitmap weights as the torch target holds them: numbers, slabs, threads, and programs that run with them."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from jettison.ir.compare import assert_close, example_input_ids
from jettison.ir.errors import ArtifactError
from jettison.ir.ops import bitmap_linear
from jettison.ir.ops.bitmap_linear import expand_rows
from jettison.passes.cache_kv import CacheKV
from jettison.passes.formats import Bitmap
from jettison.passes.prune_weights import PruneWeights
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime import bitmap_weight
from jettison.runtime.bitmap_weight import MANY_ROWS, BitmapWeight, pack_bitmap
from jettison.runtime.session import Session
from jettison.runtime.torch_executor import TorchExecutor
from jettison.runtime.torch_threads import run_shared
from tests.helpers import run_pass
from tests.passes.test_prune_weights import family_program

BITS = {"int4": 4, "int8": 8, "float": None}


def weight_of(of: str, rows: int, columns: int, density: float = 0.5) -> tuple[BitmapWeight, tuple]:
    """A weight, and the operands of the operator behind x."""
    generator = torch.Generator().manual_seed(rows + columns)
    kept = torch.rand(rows, columns, generator=generator) < density
    parts = Bitmap(of, 128).encode(torch.randn(rows, columns, generator=generator) * kept)
    stored = [parts.get(name) for name in ("bitmap", "starts", "values", "scales")]
    bits = BITS.get(of) or parts["values"].dtype.itemsize * 8
    weight = pack_bitmap(*stored, bits, 128, columns)
    assert weight is not None
    return weight, (*stored, None, bits, 128, columns)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("of", BITS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (70, 150), (256, 128), (1000, 515)])
@pytest.mark.parametrize("density", [0.0, 1 / 32, 0.5, 1.0])
def test_numbers_are_those_of_the_operator(of, rows, columns, density):
    weight, operands = weight_of(of, rows, columns, density)
    for tokens in (1, 3, 4, 5, MANY_ROWS, 2 * MANY_ROWS + 1):
        x = randn(tokens, columns)
        found, expected = weight.linear(x, None), bitmap_linear(x, *operands)
        assert found.shape == (tokens, rows)
        # Many rows of x are multiplied in bf16 where the processor does that: x, weights and results are rounded.
        epsilon = 2e-7 * 8 if tokens < MANY_ROWS else 3.1 * 2**-8
        terms = bitmap_linear(x.abs(), *absolute(operands))
        assert bool(((found - expected).abs() <= epsilon * terms + 1e-30).all())


def absolute(operands: tuple) -> tuple:
    """The weight with its signs taken off, in fp32."""
    bitmap, _, values, scales, bias, bits, group, columns = operands
    dense = expand_rows(bitmap, values, scales, bits, group, columns).abs()
    parts = Bitmap("float").encode(torch.where(dense > 0, dense + 1e-20, dense))
    return (
        parts["bitmap"],
        parts["starts"],
        parts["values"],
        None,
        bias,
        parts["values"].dtype.itemsize * 8,
        64,
        columns,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96,), (2, 3, 96), (1, 20, 96), (2, 0, 96)])
def test_keeps_dtype_and_leading_shape(dtype, shape):
    weight, operands = weight_of("int4", 70, 96)
    x, bias = randn(*shape).to(dtype), randn(70)
    y = weight.linear(x, bias)
    assert (y.shape, y.dtype) == ((*shape[:-1], 70), dtype)
    assert y.is_contiguous()
    expected = bitmap_linear(x, *operands[:4], bias, *operands[5:])
    assert torch.allclose(y.float(), expected.float(), atol=0.15)


def test_x_may_have_any_strides():
    weight, operands = weight_of("int4", 70, 128)
    x = randn(128, 5).T
    assert torch.allclose(weight.linear(x, None), bitmap_linear(x, *operands), atol=1e-4)
    assert torch.allclose(weight.linear(x[::2], None), bitmap_linear(x[::2], *operands), atol=1e-4)


@pytest.mark.parametrize("of", BITS)
def test_slabs_are_views_and_give_their_rows(of):
    weight, _ = weight_of(of, 300, 200)
    x = randn(2, 200)
    whole = weight.linear(x, None)
    slabs = [weight.rows_between(start, start + 128) for start in range(0, 300, 128)]
    assert [slab.rows for slab in slabs] == [128, 128, 44]
    assert torch.equal(torch.cat([slab.linear(x, None) for slab in slabs], 1), whole)
    # A slab of a slab.
    assert torch.equal(slabs[1].rows_between(64, 128).linear(x, None), whole[:, 192:256])
    assert sum(slab.nbytes for slab in slabs) == weight.nbytes + 8 * 2  # a border of each two has two starts
    held = weight.parts()
    for slab in slabs:
        for name, part in slab.parts().items():
            assert part.untyped_storage().data_ptr() == held[name].untyped_storage().data_ptr()


@pytest.mark.parametrize("of", BITS)
def test_parts_may_lie_elsewhere(of):
    """As in a ring of buffers: one block of bytes, of which each part is a view."""
    weight, _ = weight_of(of, 300, 200)
    x = randn(3, 200)
    slab = weight.rows_between(64, 256)
    buffer, views, place = torch.full((1 << 20,), 255, dtype=torch.uint8), {}, 0
    for name, part in slab.parts().items():
        views[name] = buffer[place : place + part.nbytes].view(part.dtype).view(part.shape).copy_(part)
        place += -(-part.nbytes // 8) * 8
    moved = slab.with_parts(views)
    assert torch.equal(moved.linear(x, None), slab.linear(x, None))
    assert moved.parts().keys() == slab.parts().keys()
    buffer.zero_()
    assert not moved.linear(x, None).any()


@pytest.mark.parametrize("fewest", [1, 1 << 16, 1 << 30])
def test_threads_share_the_rows(fewest, monkeypatch):
    weight, operands = weight_of("int4", 1000, 512)
    x, many = randn(3, 512), randn(40, 512)
    alone = weight.linear(x, None)
    monkeypatch.setattr(bitmap_weight, "_FEWEST_WEIGHTS", fewest)
    jobs = []
    monkeypatch.setattr(bitmap_weight, "run_shared", lambda *job: (jobs.append(job), run_shared(*job)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(weight.linear(x, None), alone)
        assert torch.allclose(weight.linear(many, None), bitmap_linear(many, *operands), atol=0.3)
    finally:
        torch.set_num_threads(threads)
    assert {threads for *_, threads in jobs} == ({1} if fewest == 1 << 30 else {3})
    assert all(job[2] % 64 == 0 for _, job, _ in jobs), "only slabs have a start"


def test_several_threads_may_read_one_weight():
    weight, _ = weight_of("int4", 512, 256)
    x = randn(8, 256)
    expected = [weight.linear(row, None) for row in x]
    found: list[Tensor | None] = [None] * 8

    def run(index: int) -> None:
        for _ in range(20):
            found[index] = weight.linear(x[index], None)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("part", ["bitmap", "starts", "values"])
def test_parts_that_do_not_belong_together_are_refused(part):
    """The kernel trusts the bitmap, so a damaged one must not reach it."""
    _, operands = weight_of("int4", 130, 128)
    parts = dict(zip(("bitmap", "starts", "values", "scales"), operands, strict=False))
    if part == "bitmap":
        parts["bitmap"] = parts["bitmap"] | 1
    elif part == "starts":
        parts["starts"] = parts["starts"] - torch.tensor([0, 1, 0, 0])
    else:
        parts["values"] = parts["values"][:-1]
    with pytest.raises(ArtifactError, match=r"the bitmap counts \d+ values.*make it again"):
        pack_bitmap(*parts.values(), 4, 128, 128)


def test_what_no_kernel_reads():
    _, operands = weight_of("int4", 64, 64)
    assert pack_bitmap(*operands[:3], operands[3].float(), 4, 128, 64) is None


def test_without_a_compiler_the_operator_itself_runs(monkeypatch):
    pruned, _ = run_pass(PruneWeights(), family_program("llama"))
    program, _ = run_pass(QuantizeWeights(format=Bitmap()), pruned)
    expected = TorchExecutor(program, kernels="reference")
    monkeypatch.setattr(bitmap_weight, "is_available", lambda: False)
    executor = TorchExecutor(program)
    assert not any(isinstance(value, BitmapWeight) for value in executor._values.values())
    ids = inputs(program)
    assert torch.equal(executor.run("forward", ids, {})["logits"], expected.run("forward", ids, {})["logits"])


def inputs(program):
    ids = example_input_ids(program, 2, 7)
    batch = program.calibration()[0]
    made = {name: value[:2, :7] for name, value in batch.items() if value.dim() == 2 and value.shape[1] >= 7}
    made |= {name: value[:2] for name, value in batch.items() if name not in made}
    return {**made, "input_ids": ids}


@pytest.mark.parametrize("of", BITS)
def test_a_session_runs_with_them(of):
    pruned, _ = run_pass(PruneWeights(), family_program("llama"))
    program, _ = run_pass(QuantizeWeights(format=Bitmap(of)), pruned, CacheKV())
    executor, reference = TorchExecutor(program), TorchExecutor(program, kernels="reference")
    held = [value for value in executor._values.values() if isinstance(value, BitmapWeight)]
    assert len(held) == len(program.packed) > 0
    assert executor.weight_bytes == reference.weight_bytes
    ids = example_input_ids(program, 2, 9)
    found, expected = (
        [session.prefill(ids[:, :5].tolist()), *(session.decode(ids[:, place].tolist()) for place in range(5, 9))]
        for session in (Session(each, 2, 64) for each in (executor, reference))
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, tolerance=1e-4, reason="sums in another order")
