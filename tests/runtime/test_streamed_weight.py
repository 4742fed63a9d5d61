"""Streamed programs compute, bit by bit, what they compute with all weights in memory."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jettison.api import parse_passes
from jettison.ir.errors import ArtifactError, OptionError, UnsupportedError
from jettison.ir.placement import Placement
from jettison.ir.program import Program
from jettison.passes.base import Pass
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply, prepare
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime import segment_file_writer, weight_store
from jettison.runtime.packed_linear import BagWeight, Int4Weight
from jettison.runtime.segment_file_writer import BLOCK
from jettison.runtime.session import Session
from jettison.runtime.streamed_reads import streamed_reads
from jettison.runtime.streamed_weight import StreamedWeight, WeightStore, open_streamed
from jettison.runtime.torch_executor import TorchExecutor
from jettison.runtime.weight_store import table_as_dict, table_from_dict, temporary_store, write_store
from jettison.source import open_source
from tests.helpers import weight_values
from tests.models.tiny_models import tiny_model
from tests.runtime.test_packed_linear import needs_bags, needs_int4

PROMPT = [[5, 6, 7, 8, 9]]
RING = 1 << 20
FORMS: dict[str, Sequence[Pass]] = {
    "dense": (),
    "int8": (QuantizeWeights(bits=8, group=32),),
    "int4": (QuantizeWeights(bits=4, group=32),),
    "int4 symmetric": (QuantizeWeights(bits=4, group=32, symmetric=True),),
    "bitmap of int4": parse_passes("prune-weights{method=magnitude},quantize-weights{format=bitmap{of=int4,group=64}}"),
    "bitmap of floats": parse_passes("prune-weights{method=magnitude},quantize-weights{format=bitmap{of=float}}"),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def captured(model: Path | nn.Module, *passes: Pass, dtype: str = "float32") -> Program:
    program = open_source(model, dtype=dtype).program
    prepare(program)
    apply(program, [*passes, CacheKV()])
    return program


@pytest.fixture(scope="module")
def two_layer_opt(once: Callable[..., Path]) -> Path:
    from tests.models.shortened import shortened

    return once("tiny-opt-2", lambda out: shortened("tiny-opt", 2, out))


def streamable(program: Program) -> list[list[str]]:
    """Constants of each weight that can be streamed."""
    groups = {name: [name] for name in program.used_constants()}
    for packed in program.packed.values():
        own = [*packed.parts.values()]
        groups |= dict.fromkeys(own, own)
    found, before = [], program.placement
    for group in groups.values():
        program.placement = Placement(dict.fromkeys(group, "disk"))
        try:
            streamed_reads(program)
        except UnsupportedError:
            continue
        if group not in found:
            found.append(group)
    program.placement = before
    return found


def placed(program: Program, groups: list[list[str]], ring: int = RING) -> Program:
    program = program.copy()
    program.placement = Placement({name: "disk" for group in groups for name in group}, ring_bytes=ring)
    return program


def logits(executor: TorchExecutor, prompts: list[list[list[int]]], new: int = 20) -> Tensor:
    """Of prompts one behind the other, and of greedy tokens behind each."""
    session = Session(executor, 1, 128)
    found = []
    for prompt in prompts:
        last = session.prefill(prompt)
        for _ in range(new):
            found.append(last.clone())
            last = session.decode([int(last[0].argmax())])
    return torch.stack(found)


# Each form with one family in fp32, and what may round apart with the others.
ELSEWHERE = [("llama", "bfloat16", "dense"), ("llama", "bfloat16", "int4"), ("opt", "float32", "dense"),
             ("opt", "float32", "int4")]  # fmt: skip


@pytest.mark.parametrize(("family", "dtype", "form"), [("llama", "float32", form) for form in FORMS] + ELSEWHERE)
def test_twenty_tokens_for_any_set_in_memory(
    family: str, form: str, dtype: str, two_layers: Path, two_layer_opt: Path
) -> None:
    """Both have a tied head; their checkpoints are in bf16 and in fp32."""
    program = captured(two_layers if family == "llama" else two_layer_opt, *FORMS[form], dtype=dtype)
    expected = logits(TorchExecutor(program), [PROMPT])
    groups = streamable(program)
    assert len(groups) > 10
    source = random.Random(form + family)
    for chosen in (groups, source.sample(groups, len(groups) // 2), source.sample(groups, 3)):
        executor = TorchExecutor(placed(program, chosen))
        assert executor.stream is not None
        assert torch.equal(logits(executor, [PROMPT]), expected)
        assert executor.stream.statistics.restarts == 0
        executor.stream.close()


@pytest.mark.parametrize("form", FORMS)
def test_long_prompts_and_untied_heads(form: str) -> None:
    """Many rows take other kernels, which decode blocks of a weight; slabs are cut where that changes nothing."""
    program = captured(wide_model(), *FORMS[form])
    prompts = [[[(7 * place + 3) % 97 for place in range(length)]] for length in (70, 3, 1)]
    expected = logits(TorchExecutor(program), prompts, new=4)
    executor = TorchExecutor(placed(program, streamable(program), ring=1 << 19))
    assert executor.stream is not None
    assert torch.equal(logits(executor, prompts, new=4), expected)
    assert max(len(weight._slabs) for weight in executor._values.values() if isinstance(weight, StreamedWeight)) > 2
    executor.stream.close()


def wide_model() -> nn.Module:
    """Weights of several slabs, with odd numbers of rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1111, hidden_size=160, intermediate_size=1300, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_every_step_reads_every_streamed_byte_once(two_layers: Path) -> None:
    program = captured(two_layers, *FORMS["int4"])
    executor = TorchExecutor(placed(program, streamable(program)))
    assert executor.stream is not None
    session = Session(executor, 1, 128)
    session.prefill(PROMPT)
    for _ in range(5):
        before = executor.stream.statistics
        session.decode([3])
        done = executor.stream.statistics.since(before)
        # The table of the embedding is not passed by: its rows are read alone.
        assert done.bytes_taken == sum(-(-segment // BLOCK) * BLOCK for segment in step_segments(executor))
    executor.stream.close()


def step_segments(executor: TorchExecutor) -> list[int]:
    assert executor.stream is not None
    reading = executor.stream._reading
    return [reading._file.segments[number].bytes for number in reading._order]


def test_step_bytes_are_those_of_the_streamed_weights(two_layers: Path) -> None:
    """Layouts of kernels take as much as what they are made of, but for padding and scales in half precision."""
    program = captured(two_layers)
    chosen = [group for group in streamable(program) if "layers" in group[0]]
    table, descriptor = temporary_store(placed(program, chosen))
    open(descriptor, "rb").close()
    stored = sum(program.constants[name].stored_bytes for group in chosen for name in group)
    assert stored <= table.step_bytes < stored + BLOCK * len(table.segments)
    assert table.file_bytes == table.step_bytes


def test_two_sessions_take_turns(two_layers: Path) -> None:
    program = captured(two_layers)
    resident, executor = TorchExecutor(program), TorchExecutor(placed(program, streamable(program)))
    assert executor.stream is not None
    found = []
    for each in (resident, executor):
        first, second = Session(each, 1, 128), Session(each, 2, 128)
        out = [first.prefill(PROMPT), second.prefill([[1, 2], [3, 4]])]
        for token in range(4):
            out += [first.decode([token]), second.decode([token, 9]), first.decode([token + 1])]
        found.append(torch.cat([logit.reshape(-1) for logit in out]))
    assert torch.equal(*found)
    executor.stream.close()


def test_weights_are_held_once_and_streamed_ones_not_at_all(two_layers: Path) -> None:
    program = captured(two_layers)
    groups = streamable(program)
    executor = TorchExecutor(placed(program, groups))
    assert executor.stream is not None
    held = [value for value in executor._values.values() if isinstance(value, Tensor)]
    assert sum(value.nbytes for value in held) < 20_000
    names = {name for group in groups for name in group}
    assert not {id(value) for value in held} & {id(program.constants[name].blocks[0]) for name in names}
    executor.stream.close()


# --- layouts --------------------------------------------------------------------------------------------------------


def packed(bits: int, rows: int, columns: int, *, has_zeros: bool) -> Int4Weight | BagWeight:
    from jettison.ir.ops.quantized_linear import pack_codes, pack_zeros

    blocks = -(-columns // 32)
    values = (weight_values(rows * blocks * 32, bits) + 0.5).reshape(rows, blocks, 32)
    codes = (values * 2**bits).to(torch.uint8)
    scales = (weight_values(rows * blocks, 7) + 1).reshape(rows, blocks).to(torch.float32)
    zeros = pack_zeros(codes[:, :, 0], bits) if has_zeros else None
    if bits == 4:
        return Int4Weight(pack_codes(codes, 4), scales, zeros, 32, columns, is_table=False)
    return BagWeight(pack_codes(codes, bits), scales, zeros, bits, 32, columns)


@pytest.mark.parametrize("has_zeros", [True, False])
@pytest.mark.parametrize(
    "bits", [pytest.param(4, marks=needs_int4), pytest.param(8, marks=needs_bags), pytest.param(2, marks=needs_bags)]
)
def test_rows_of_a_packed_weight(bits: int, has_zeros: bool) -> None:
    whole = packed(bits, 1100, 300, has_zeros=has_zeros)
    bias = weight_values(1100, 3).to(torch.float32)
    edges = [0, whole.granule, 2 * whole.granule, 1100]
    for rows in (1, 3, 20, 300):
        x = weight_values(rows * 300, rows).reshape(rows, 300).to(torch.float32)
        pieces = []
        for start, stop in itertools.pairwise(edges):
            part = whole.rows_between(start, stop)
            assert part.rows == stop - start
            layout = {name: (each.dtype, tuple(each.shape)) for name, each in part.parts().items()}
            again = type(part).of_form(part.form)
            assert again.layout() == layout
            opened = again.with_parts(part.parts())
            assert opened.nbytes == part.nbytes
            pieces.append(opened.linear(x, bias[start:stop]))
        assert torch.equal(torch.cat(pieces, -1), whole.linear(x, bias))


@needs_int4
def test_a_store_of_another_processor_is_refused(two_layers: Path, monkeypatch, tmp_path: Path) -> None:
    program = placed(captured(two_layers, *FORMS["int4"]), [])
    program.placement = Placement({n: "disk" for g in streamable(program) for n in g}, ring_bytes=RING)
    with (tmp_path / "weights.stream").open("wb") as file:
        document = table_as_dict(write_store(program, file))
    monkeypatch.setattr(weight_store, "int4_interleave", lambda: 7)
    with pytest.raises(ArtifactError, match=r"interleaves 64 rows; this one interleaves 7. Run `jettison optimize`"):
        table_from_dict(document, tmp_path / "weights.stream")


# --- what is refused ------------------------------------------------------------------------------------------------


def test_constants_that_cannot_be_streamed(two_layers: Path) -> None:
    program = captured(two_layers, *FORMS["int4"])
    name = "model.norm.weight"
    with pytest.raises(UnsupportedError, match=rf"{name} is on disk; only whole matrices"):
        TorchExecutor(placed(program, [[name]]))
    codes = next(name for name in program.constants if name.endswith("down_proj.weight.codes"))
    with pytest.raises(UnsupportedError, match=rf"{codes} is on disk.*with all of their parts"):
        TorchExecutor(placed(program, [[codes]]))


def test_settings_that_cannot_be_streamed(two_layers: Path) -> None:
    program = captured(two_layers)
    weights = [group for group in streamable(program) if "down_proj" in group[0]]
    with pytest.raises(OptionError, match=r"kernels='reference' with 2 constants on disk"):
        TorchExecutor(placed(program, weights), kernels="reference")
    with pytest.raises(OptionError, match=r"ring_bytes=0: needed at least"):
        TorchExecutor(placed(program, weights, ring=0))


def test_a_store_of_another_program(two_layers: Path, two_layer_opt: Path) -> None:
    ours, other = (captured(folder) for folder in (two_layers, two_layer_opt))
    ours, other = (placed(program, streamable(program)) for program in (ours, other))
    with pytest.raises(ArtifactError, match=r"does not hold model.* as the program reads it"):
        open_streamed(ours, WeightStore(*temporary_store(other)))


def _cut(document):
    document["segments"][0]["bytes"] = 10


def _move(document):
    document["segments"][1]["offset"] += 4096


def _lengthen(document):
    next(iter(document["reads"].values()))["slabs"][0]["form"]["rows"] += 64


def _retype(document):
    part = next(iter(next(iter(document["reads"].values()))["slabs"][0]["parts"].values()))
    part["dtype"] = "nn"


@pytest.fixture(scope="module")
def table_document(two_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = captured(two_layers)
    with (tmp_path_factory.mktemp("table") / "weights.stream").open("wb") as file:
        return table_as_dict(write_store(placed(program, streamable(program), ring=1 << 18), file))


@pytest.mark.parametrize("change", [_cut, _move, _lengthen, _retype, lambda d: d.pop("order"), lambda d: d.clear()])
def test_a_damaged_table_is_refused(table_document: dict[str, Any], change, tmp_path: Path) -> None:
    document = copy.deepcopy(table_document)
    assert table_from_dict(document, tmp_path).step_bytes
    change(document)
    with pytest.raises(ArtifactError, match="needed the table of a weight store"):
        table_from_dict(document, tmp_path)


def test_a_full_temporary_folder(two_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = captured(two_layers)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment_file_writer.os, "posix_fallocate", full)
    with pytest.raises(ArtifactError, match=r"bytes of streamed weights cannot be written: No space left.*TMPDIR"):
        TorchExecutor(placed(program, streamable(program)))


def test_an_index_outside_a_table(two_layers: Path) -> None:
    program = captured(two_layers)
    weights, stream = open_streamed(placed(program, streamable(program)), None)
    assert stream is not None
    with pytest.raises(IndexError, match="the table has 4096 rows"):
        weights["model.embed_tokens.weight"].lookup(torch.tensor([[1, 4096]]))
    stream.close()


def test_models_without_transformers_stream_too() -> None:
    program = captured(tiny_model("llama"))
    executor = TorchExecutor(placed(program, streamable(program)))
    assert torch.equal(logits(executor, [PROMPT]), logits(TorchExecutor(program), [PROMPT]))
