"""ONNX Runtime's own weight quantisers: `python run_ort_quantizer.py MODEL_FOLDER REQUEST.json OUT_FOLDER`.

Runs in a virtual environment of its own (its HQQ needs torch):

    python3.11 -m venv ort && ort/bin/pip install onnxruntime==1.31.1 onnx onnx-ir sympy safetensors torch==2.13.0

See `weight_files.py` for what goes in and out. A setting has `method` (`default`, which is round to nearest by MLAS,
`hqq`, `k_quant`, or `rtn`, which is that of its copy of Neural Compressor), `bits`, `group`, `symmetric`, `dtype` (of
the model that the quantiser is given, hence of its scales) and `whole`: a decoder's head too, and with `default` the
token embedding by `GatherBlockQuantized`.

These methods look at one matrix at a time and at no data, so the graph they are given is one MatMul per linear, each
behind an input of its own, and no export of anybody's comes between. What they stored is decoded here by the layout of
`MatMulNBits`, and ONNX Runtime multiplies an identity by it: both must agree.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from weight_files import Found, Stored, is_linear, read_weights, serve, table_name

DTYPES = {"float32": np.float32, "float16": np.float16}
TABLE = "token_table"
# How far the kernel may be from the layout as documented, relative to the largest weight.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}


def build_model(matrices: dict[str, np.ndarray], table: np.ndarray | None) -> onnx.ModelProto:
    """One MatMul per matrix `[N, K]`, and a Gather for the table.

    Args:
        matrices: By name.
        table: `[V, E]`, or None.
    """
    nodes, inputs, outputs, constants = [], [], [], []
    for name, matrix in matrices.items():
        kind = helper.np_dtype_to_tensor_dtype(matrix.dtype)
        constants.append(numpy_helper.from_array(np.ascontiguousarray(matrix.T), name))
        inputs.append(helper.make_tensor_value_info(f"{name}.x", kind, ["rows", matrix.shape[1]]))
        outputs.append(helper.make_tensor_value_info(f"{name}.y", kind, ["rows", matrix.shape[0]]))
        nodes.append(helper.make_node("MatMul", [f"{name}.x", name], [f"{name}.y"], name=name))
    if table is not None:
        kind = helper.np_dtype_to_tensor_dtype(table.dtype)
        constants.append(numpy_helper.from_array(table, TABLE))
        inputs.append(helper.make_tensor_value_info(f"{TABLE}.x", TensorProto.INT64, ["rows"]))
        outputs.append(helper.make_tensor_value_info(f"{TABLE}.y", kind, ["rows", table.shape[1]]))
        nodes.append(helper.make_node("Gather", [TABLE, f"{TABLE}.x"], [f"{TABLE}.y"], name=TABLE))
    graph = helper.make_graph(nodes, "matrices", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def quantised_model(model: onnx.ModelProto, setting: dict[str, Any], has_table: bool) -> onnx.ModelProto:
    """What the quantiser returns."""
    bits, group = setting["bits"], setting["group"]
    options: dict[str, Any] = {"block_size": group, "is_symmetric": setting["symmetric"], "bits": bits}
    method = setting["method"]
    if method == "default":
        types = ("MatMul", "Gather") if has_table else ("MatMul",)
        axes = (("MatMul", 0), ("Gather", 1))
        options["algo_config"] = nbits.DefaultWeightOnlyQuantConfig(
            block_size=group, is_symmetric=setting["symmetric"], bits=bits, op_types_to_quantize=types, quant_axes=axes
        )
    elif method == "hqq":
        options["algo_config"] = nbits.HQQWeightOnlyQuantConfig(block_size=group, bits=bits)
    elif method == "k_quant":
        options["algo_config"] = nbits.KQuantWeightOnlyQuantConfig()
    elif method == "rtn":
        options["algo_config"] = nbits.RTNWeightOnlyQuantConfig()
    else:
        raise ValueError(f"method={method!r}: needs default, hqq, k_quant or rtn")
    if method in ("rtn", "k_quant") and bits != 4:
        raise ValueError(f"{method} of ONNX Runtime writes 4 bits whatever it is asked for, found bits={bits}")
    quantizer = nbits.MatMulNBitsQuantizer(model, **options)
    quantizer.process()
    found = quantizer.model
    return found.model if hasattr(found, "model") else found


def unpack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[..., n * 8 / bits]` of bytes `[..., n]`, low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((codes[..., None] >> shifts) & (2**bits - 1)).reshape(*codes.shape[:-1], -1)


def decode(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> tuple[np.ndarray, Stored]:
    """The matrix `[N, K]` that a MatMulNBits node holds, and its bytes."""
    about = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    rows, columns, bits, group = (about[key] for key in ("N", "K", "bits", "block_size"))
    blocks = math.ceil(columns / group)
    packed, scales = constants[node.input[1]], constants[node.input[2]]
    codes = unpack(packed.reshape(rows, blocks, -1), bits).astype(np.float32)
    zeros: np.ndarray | float = float(2 ** (bits - 1))
    stored = Stored(bits, group, packed.nbytes, scales.nbytes, floats=scales.size, float_itemsize=scales.itemsize)
    if len(node.input) > 3 and node.input[3]:
        given = constants[node.input[3]]
        stored.zero_points = given.nbytes
        if given.dtype == np.uint8:
            zeros = unpack(given.reshape(rows, -1), bits)[:, :blocks, None].astype(np.float32)
        else:
            stored.floats += given.size
            zeros = given.reshape(rows, blocks, 1).astype(np.float32)
    decoded = (codes - zeros) * scales.reshape(rows, blocks, 1).astype(np.float32)
    return decoded.reshape(rows, -1)[:, :columns], stored


def decode_table(node: onnx.NodeProto, constants: dict[str, Any], shape: tuple[int, int]) -> tuple[np.ndarray, Stored]:
    """The table `[V, E]` of a GatherBlockQuantized node, and its bytes."""
    about = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    group, scales = about["block_size"], constants[node.input[2]]
    codes = constants[node.input[0]].astype(np.float32).reshape(shape[0], -1, group)
    stored = Stored(4, group, codes.size // 2, scales.nbytes, floats=scales.size, float_itemsize=scales.itemsize)
    zeros: np.ndarray | float = 0.0
    if len(node.input) > 3:
        zeros = constants[node.input[3]].astype(np.float32)[..., None]
        stored.zero_points = zeros.size // 2
    return ((codes - zeros) * scales[..., None].astype(np.float32)).reshape(shape), stored


def check_against_kernel(model: onnx.ModelProto, found: dict[str, np.ndarray], dtype: str) -> float:
    """Largest difference between the decoded matrices and ONNX Runtime's product of an identity with them.

    Raises:
        ValueError: A matrix is another one to the kernel.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs: dict[str, np.ndarray] = {}
    for name, matrix in found.items():
        is_table = name == TABLE
        inputs[f"{name}.x"] = np.arange(matrix.shape[0]) if is_table else np.eye(matrix.shape[1], dtype=DTYPES[dtype])
    largest = 0.0
    for name, value in zip(found, session.run([f"{name}.y" for name in found], inputs), strict=True):
        by_kernel = (value if name == TABLE else value.T).astype(np.float32)
        difference = float(np.abs(by_kernel - found[name]).max() / np.abs(found[name]).max())
        if not difference <= TOLERANCE[dtype]:
            raise ValueError(f"{name}: the kernel's matrix is {difference} of the largest weight away from the decoded")
        largest = max(largest, difference)
    return largest


def quantise(folder: str, setting: dict[str, Any], windows: list[list[int]]) -> Found:
    """See the module docstring; the windows are not needed."""
    weights = read_weights(folder)
    dtype = DTYPES[setting["dtype"]]
    matrices = {name: value.numpy().astype(dtype) for name, value in weights.items() if is_linear(name, value)}
    table = None
    if setting["whole"]:
        table = weights[table_name(weights)].numpy().astype(dtype)
        config = json.loads((Path(folder) / "config.json").read_text())
        if any("CausalLM" in name for name in config["architectures"]):
            matrices["lm_head.weight"] = table
    takes_table = table is not None and setting["method"] == "default" and setting["bits"] == 4
    model = quantised_model(build_model(matrices, table if takes_table else None), setting, takes_table)
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    decoded, stored = {}, {}
    for node in model.graph.node:
        name = node.output[0].removesuffix(".y")
        if node.op_type == "MatMulNBits":
            decoded[name], stored[name] = decode(node, constants)
        elif node.op_type == "GatherBlockQuantized":
            decoded[TABLE], stored[table_name(weights)] = decode_table(node, constants, table.shape)
    if set(matrices) - set(decoded):
        raise ValueError(f"left alone: {sorted(set(matrices) - set(decoded))[:3]}")
    notes = [f"decoded against the kernel: {check_against_kernel(model, decoded, setting['dtype']):.1e}"]
    if TABLE in decoded:
        decoded[table_name(weights)] = decoded.pop(TABLE)
    elif table is not None:
        notes.append("the token embedding stays dense: the method encodes no Gather")
    found = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in decoded.items()}
    return Found(found, stored, np.dtype(dtype).itemsize, notes)


if __name__ == "__main__":
    logging.disable(logging.INFO)  # one line per matrix
    serve("onnxruntime", ("onnxruntime", "onnx", "torch"), quantise)
