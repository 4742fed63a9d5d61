"""Packed checkpoints keep their codes, scales and zero points: compared with packers that spell the layouts out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import jettison
from jettison.ir.checkpoint import Checkpoint
from jettison.ir.compare import assert_close, run_program
from jettison.ir.errors import CaptureError, UnsupportedError
from jettison.ir.match import is_call
from jettison.ir.ops import quantized_linear
from jettison.ir.packed_linears import PackedLinear, replace_packed_linears
from jettison.passes.formats import format_from_text
from jettison.passes.pipeline import prepare
from jettison.source import open_source
from tests.models.tiny_models import random_ids, randomize, tiny_config

N, K = 64, 160


@dataclass
class Weight:
    """A quantised weight `[N, K]`, before any tool packed it; group `[K]` is that of each column."""

    bits: int
    columns: int
    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    group: np.ndarray

    @property
    def dense(self) -> Tensor:
        """What loaders compute, in fp32."""
        scales = self.scales.astype(np.float32)[:, self.group]
        codes, zeros = self.codes.astype(np.float32), self.zeros.astype(np.float32)
        return torch.from_numpy((codes - zeros[:, self.group]) * scales)


def draw(shape: tuple[int, int], bits: int, group: int, *, symmetric: bool = False, scatter: bool = False) -> Weight:
    n, k = shape
    columns = k if group == -1 else group
    groups = -(-k // columns)
    random = np.random.default_rng(n * k + bits)
    # A zero point of 0 has no unambiguous form in GPTQ's first format.
    zeros = random.integers(1, 2**bits, (n, groups)) if not symmetric else np.full((n, groups), 2 ** (bits - 1))
    scales = random.uniform(0.01, 0.1, (n, groups)).astype(np.float16)
    group_of = np.arange(k) // columns
    if scatter:
        group_of = np.random.default_rng(k).permutation(group_of)
    return Weight(bits, columns, random.integers(0, 2**bits, (n, k)), zeros, scales, group_of)


def bit_stream(codes: np.ndarray, bits: int) -> Tensor:
    """`[r, c]` to `[r, ceil(c * bits / 32)]` i32: code after code, low bits first."""
    each = (codes[:, :, None] >> np.arange(bits)) & 1
    flat = each.reshape(len(codes), -1).astype(np.uint8)
    padded = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


def awq_words(codes: np.ndarray) -> Tensor:
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32))


def gptq(weight: Weight, *, first_format: bool = True, index: bool = True) -> dict[str, Tensor]:
    zeros = weight.zeros - 1 if first_format else weight.zeros
    tensors = {
        "qweight": bit_stream(weight.codes, weight.bits).t().contiguous(),
        "qzeros": bit_stream(zeros.T, weight.bits),
        "scales": torch.from_numpy(weight.scales.T.copy()),
    }
    return tensors | ({"g_idx": torch.from_numpy(weight.group.astype(np.int32))} if index else {})


def awq(weight: Weight) -> dict[str, Tensor]:
    scales = torch.from_numpy(weight.scales.T.copy())
    return {"qweight": awq_words(weight.codes.T), "qzeros": awq_words(weight.zeros.T), "scales": scales}


def compressed(weight: Weight, *, zeros: str = "packed", index: bool = False) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": bit_stream(weight.codes, weight.bits),
        "weight_scale": torch.from_numpy(weight.scales),
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if zeros == "packed":
        tensors["weight_zero_point"] = bit_stream(weight.zeros.T, weight.bits).t().contiguous()
    elif zeros == "bytes":
        tensors["weight_zero_point"] = torch.from_numpy((weight.zeros - 2 ** (weight.bits - 1)).astype(np.int8))
    return tensors | ({"weight_g_idx": torch.from_numpy(weight.group.astype(np.int32))} if index else {})


def gptq_config(bits: int = 4, group: int = 32, **others: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, **others}


def awq_config(group: int = 32) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}


def compressed_config(*schemes: tuple[int, int], symmetric: bool = False) -> dict[str, Any]:
    groups = {}
    for number, (bits, group) in enumerate(schemes):
        weights = {"num_bits": bits, "type": "int", "strategy": "channel" if group == -1 else "group"}
        weights |= {"symmetric": symmetric}
        weights["group_size"] = None if group == -1 else group
        groups[f"group_{number}"] = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], **others: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**others, "quantization_config": config}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


class Model(nn.Module):
    def __init__(self, n: int = N, k: int = K) -> None:
        super().__init__()
        self.up = nn.Linear(k, n, bias=False)


def imported(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], n: int = N, k: int = K) -> PackedLinear:
    stored = {f"up.{part}": tensor for part, tensor in tensors.items()}
    model = Model(n, k)
    packed, used = replace_packed_linears(model, Checkpoint.open(write(folder, config, stored)), "model.")
    assert used == set(stored)
    assert list(packed) == ["up.weight"]
    assert isinstance(model.up, PackedLinear)
    return model.up


def decoded(linear: PackedLinear) -> Tensor:
    """The weight that a packed linear holds, columns in the order of its input."""
    symmetric = linear.weight.zeros is None
    stored = format_from_text(f"int{linear.bits}{{group={linear.group},symmetric={str(symmetric).lower()}}}")
    parts = dict(linear.weight.named_buffers())
    weight = stored.decode(parts, (linear.out_features, linear.in_features))
    if linear.input_order is None:
        return weight
    restored = torch.empty_like(weight)
    restored[:, linear.input_order] = weight
    return restored


def check(linear: PackedLinear, weight: Weight) -> None:
    assert decoded(linear).equal(weight.dense)
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
    assert_close(linear(x), x @ weight.dense.t())


# The three layouts.


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq(tmp_path: Path, bits: int, group: int, layout: str):
    weight = draw((N, K), bits, group)
    linear = imported(
        tmp_path, gptq_config(bits, group, checkpoint_format=layout), gptq(weight, first_format=layout == "gptq")
    )
    check(linear, weight)
    assert (linear.bits, linear.group) == (bits, 128 if group == -1 else group)
    assert linear.input_order is None


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_in_activation_order(tmp_path: Path, bits: int):
    weight = draw((N, K), bits, 32, scatter=True)
    linear = imported(tmp_path, gptq_config(bits, desc_act=True), gptq(weight))
    check(linear, weight)
    assert linear.input_order is not None


def test_gptq_zero_points_of_zero_borrow_from_their_neighbours(tmp_path: Path):
    """GPTQModel subtracts and adds a word of ones, not a one from each zero point."""
    weight = draw((N, K), 4, 32)
    weight.zeros[:, ::2] = 0
    tensors = gptq(weight, first_format=False)
    tensors["qzeros"] = tensors["qzeros"] - 0x11111111
    check(imported(tmp_path, gptq_config(), tensors), weight)


def test_gptqmodel_subtracts_other_words_from_3_bits_than_autogptq(tmp_path: Path):
    weight = draw((N, K), 3, 32)
    tensors = gptq(weight, first_format=False)
    words = np.array([0x24924924, 0x92492492, 0x49249249] * 2, np.uint32).view(np.int32)
    tensors["qzeros"] = tensors["qzeros"] - torch.from_numpy(words)
    check(imported(tmp_path, gptq_config(3, meta={"quantizer": ["gptqmodel:4.0.0"]}), tensors), weight)


@pytest.mark.parametrize("group", [32, 64, -1])
def test_awq(tmp_path: Path, group: int):
    weight = draw((N, K), 4, group)
    check(imported(tmp_path, awq_config(group), awq(weight)), weight)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("zeros", ["packed", "bytes"])
def test_compressed_tensors(tmp_path: Path, bits: int, group: int, zeros: str):
    weight = draw((N, K), bits, group)
    check(imported(tmp_path, compressed_config((bits, group)), compressed(weight, zeros=zeros)), weight)


def test_compressed_tensors_in_activation_order(tmp_path: Path):
    weight = draw((N, K), 4, 32, scatter=True)
    check(imported(tmp_path, compressed_config((4, 32)), compressed(weight, index=True)), weight)


def test_a_g_idx_of_minus_ones_says_nothing(tmp_path: Path):
    weight = draw((N, K), 4, 32)
    tensors = compressed(weight) | {"weight_g_idx": torch.full((K,), -1, dtype=torch.int32)}
    check(imported(tmp_path, compressed_config((4, 32)), tensors), weight)


def test_shapes_say_which_scheme_is_whose(tmp_path: Path):
    weight = draw((N, K), 8, -1)
    check(imported(tmp_path, compressed_config((4, 32), (8, -1)), compressed(weight)), weight)


def test_odd_sizes(tmp_path: Path):
    """K and N that fill no whole word, nor a group."""
    weight = draw((13, 45), 3, 32)
    check(imported(tmp_path, compressed_config((3, 32)), compressed(weight), 13, 45), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_symmetric_weights_hold_no_zero_points(tmp_path: Path, symmetric: bool):
    weight = draw((N, K), 4, 32, symmetric=symmetric)
    linear = imported(tmp_path, gptq_config(), gptq(weight))
    check(linear, weight)
    assert (linear.weight.zeros is None) == symmetric


def test_symmetric_compressed_tensors_have_no_zero_points(tmp_path: Path):
    weight = draw((N, K), 4, 32, symmetric=True)
    linear = imported(tmp_path, compressed_config((4, 32), symmetric=True), compressed(weight, zeros="none"))
    check(linear, weight)
    assert linear.weight.zeros is None


@pytest.mark.parametrize(("group", "ours"), [(256, 128), (192, 64), (96, 32)])
def test_large_groups_are_split(tmp_path: Path, group: int, ours: int):
    weight = draw((N, 768), 4, group)
    linear = imported(tmp_path, gptq_config(4, group), gptq(weight), N, 768)
    check(linear, weight)
    assert linear.group == ours


def test_biases_of_zeros_are_left_out(tmp_path: Path):
    weight = draw((N, K), 4, 32)
    linear = imported(tmp_path, gptq_config(), gptq(weight) | {"bias": torch.zeros(N)})
    assert linear.bias is None


# Whole models.


def packed_folder(folder: Path, tool: str, **options: Any) -> tuple[Path, nn.Module]:
    """A folder whose linears a tool packed, the head aside, and the dense model that it stands for."""
    from transformers import LlamaForCausalLM

    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size, config.head_dim, config.num_hidden_layers = 64, 96, 16, 1
    model = randomize(LlamaForCausalLM(config)).eval()
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        path = name.rpartition(".")[0]
        if "proj" not in name:
            tensors[name] = parameter.clone()
            continue
        weight = draw(tuple(parameter.shape), 4, 32, **options)
        parameter.copy_(weight.dense)
        packed = {"gptq": gptq, "awq": awq, "compressed": compressed}[tool](weight)
        tensors |= {f"{path}.{part}": tensor for part, tensor in packed.items()}
    packing = {"gptq": gptq_config(), "awq": awq_config(), "compressed": compressed_config((4, 32))}[tool]
    described = {**json.loads(config.to_json_string()), "architectures": ["LlamaForCausalLM"]}
    return write(folder, packing, tensors, **described), model


@pytest.mark.parametrize("tool", ["gptq", "awq", "compressed"])
def test_a_model_computes_what_its_decoded_weights_compute(tmp_path: Path, tool: str):
    folder, dense = packed_folder(tmp_path, tool, scatter=tool == "gptq")
    program = open_source(folder).program
    prepare(program)
    ids = random_ids(2, 9)
    with torch.no_grad():
        expected = dense(ids, use_cache=False).logits
    assert_close(run_program(program, ids)[0], expected)
    nodes = list(program.entries["forward"].graph.nodes)
    assert sum(is_call(node, quantized_linear) for node in nodes) == len(program.packed) == 7
    for name, packed in program.packed.items():
        assert packed.format == "int4{group=32,symmetric=false}"
        assert name.endswith("proj.weight")
        assert packed.shape == tuple(dense.get_parameter(name).shape)
    packed_bytes = sum(format_from_text(each.format).bytes(each.shape) for each in program.packed.values())
    rest = sum(value.nbytes for name, value in dense.named_parameters() if "proj" not in name)
    rest += dense.model.rotary_emb.inv_freq.nbytes
    permutations = [node for node in nodes if is_call(node, torch.ops.aten.index_select.default)]
    orders = {node.args[2]: 8 * node.args[2].meta["val"].shape[0] for node in permutations}
    assert program.weight_bytes() == packed_bytes + rest + sum(orders.values())
    # One each for q, k and v, for o, for gate and up, for down; orders differ with K only.
    assert (len(permutations), sorted(orders.values())) == ((4, [8 * 64, 8 * 96]) if tool == "gptq" else (0, []))


def test_optimize_quantises_the_rest_and_generates(tmp_path: Path):
    folder, _ = packed_folder(tmp_path, "gptq", scatter=True)
    model = jettison.optimize(folder, "quantize-weights{bits=8,group=32}")
    assert model.report.passes[0].rewrites == 2  # embedding and head
    model.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    on_torch = jettison.optimize(folder, "quantize-weights{bits=8,group=32}", target="torch")
    prompt = random_ids(1, 5)[0].tolist()
    made = on_torch.generate(prompt, max_new_tokens=3)
    assert jettison.load(tmp_path / "out").generate(prompt, max_new_tokens=3) == made


# What does not fit.


def without(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != part}


def test_misfits_are_refused(tmp_path: Path):
    good = gptq(draw((N, K), 4, 32))
    uneven = good["g_idx"].clone()
    uneven[0] = 4
    cases = [
        (without(good, "scales"), "no tensor 'up.scales'", "float16|bfloat16|float32[5, 64]"),
        (without(good, "qzeros"), "no tensor 'up.qzeros'", "int32[5, 8]"),
        (good | {"qweight": good["qweight"][:10].clone()}, "tensor 'up.qweight' int32[10, 64]", "int32[20, 64]"),
        (good | {"scales": good["scales"].int()}, "tensor 'up.scales' int32[5, 64]", "float16"),
        (good | {"g_idx": uneven}, "tensor 'up.g_idx' with groups of other sizes", "32 columns for each of 5 groups"),
    ]
    for tensors, found, needed in cases:
        with pytest.raises(CaptureError, match=r"model\.safetensors: found") as caught:
            imported(tmp_path, gptq_config(), tensors)
        assert found in str(caught.value)
        assert needed in str(caught.value)


def test_zero_points_that_config_json_promises_are_needed(tmp_path: Path):
    with pytest.raises(CaptureError, match=r"no tensor 'up\.weight_zero_point'; needed int32\[8, 5\]"):
        imported(tmp_path, compressed_config((4, 32)), compressed(draw((N, K), 4, 32), zeros="none"))


def test_other_bits_than_the_tensors_have_are_refused(tmp_path: Path):
    with pytest.raises(CaptureError, match=r"needed int32\[40, 64\].*gptq, 8 bits, group_size 32"):
        imported(tmp_path, gptq_config(8), gptq(draw((N, K), 4, 32)))


def test_weight_shape_must_be_that_of_the_model(tmp_path: Path):
    tensors = compressed(draw((N, K), 4, 32)) | {"weight_shape": torch.tensor([N, K + 1])}
    with pytest.raises(CaptureError, match=r"weight_shape' \[64, 161\]; needed \[64, 160\]"):
        imported(tmp_path, compressed_config((4, 32)), tensors)


def test_small_groups_are_refused(tmp_path: Path):
    with pytest.raises(UnsupportedError, match=r"found groups of 16 columns in 'up\.qweight'"):
        imported(tmp_path, gptq_config(4, 16), gptq(draw((N, K), 4, 16)))


def test_packed_tensors_of_other_modules_are_refused(tmp_path: Path):
    tensors = {f"experts.0.up.{part}": tensor for part, tensor in gptq(draw((N, K), 4, 32)).items()}
    checkpoint = Checkpoint.open(write(tmp_path, gptq_config(), tensors))
    with pytest.raises(UnsupportedError, match=r"packed tensor 'experts\.0\.up\.qweight', a weight that is no linear"):
        replace_packed_linears(Model(), checkpoint, "model.")
    table = nn.Module()
    table.experts = nn.ModuleList([nn.Module()])
    table.experts[0].up = nn.Embedding(N, K)
    with pytest.raises(UnsupportedError, match="the weight of a Embedding"):
        replace_packed_linears(table, checkpoint, "model.")
