"""Weight compression by NNCF: `python run_nncf.py MODEL_FOLDER REQUEST.json OUT_FOLDER`.

Runs in a virtual environment of its own:

    python3.11 -m venv nncf
    nncf/bin/pip install torch==2.13.0 nncf==3.4.0 openvino==2026.4.1 transformers safetensors

See `weight_files.py` for what goes in and out. A setting has `mode` (`int4_asym`, `int4_sym`, `int3_sym`, `nf4`),
`group`, `options` (keywords of `compress_weights`: `awq`, `scale_estimation`, `gptq`), and `tables`: `dense` (the
embedding and the head are left alone), `backup` (int8, the tool's default) or `primary` (`all_layers`).

OpenVINO is the one backend in which NNCF has all of these (GPTQ, 3 bits, nf4). Weights are what OpenVINO computes for
the second input of every MatMul; where AWQ put a multiplication in front of a MatMul, its vector is folded into the
columns and counted in `other`. What is dense counts as 16 bits, as `openvino.save_model` writes it.

Attention gets a mask and positions from outside: OpenVINO does not convert the `diff` by which transformers looks for
packed sequences, and with a mask of ones in two axes the converted model's logits are wrong.
"""

from __future__ import annotations

from typing import Any

import nncf
import numpy as np
import openvino
import torch
import transformers
from openvino import opset13 as ops
from torch import Tensor, nn
from weight_files import Found, Stored, read_weights, serve, table_name

CONFIG = {"INFERENCE_PRECISION_HINT": "f32"}
# How far the converted model's outputs may be from those of torch.
TOLERANCE = 1e-3
# Parts of an encoded matrix, by the end of their names.
PARTS = {"/scale": "scales", "/zero_point": "zero_points"}


class Wrapped(nn.Module):
    """A model of `input_ids [1, S]` only.

    Args:
        model: Of transformers.
        length: S.
        is_decoder: Whether attention is causal.
    """

    def __init__(self, model: nn.Module, length: int, is_decoder: bool) -> None:
        super().__init__()
        self.model = model
        hidden = torch.full((1, 1, length, length), -1e4)
        self.register_buffer("mask", hidden.triu(1) if is_decoder else torch.zeros_like(hidden))
        self.register_buffer("positions", torch.arange(length)[None])
        self.options = {"use_cache": False} if is_decoder else {}

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits, or hidden states."""
        return self.model(input_ids, attention_mask=self.mask, position_ids=self.positions, **self.options)[0]


def convert(folder: str, windows: list[list[int]]) -> openvino.Model:
    """The model in OpenVINO, in fp32.

    Raises:
        ValueError: It is another model than torch runs.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    is_decoder = any("CausalLM" in name for name in config.architectures)
    cls = transformers.AutoModelForCausalLM if is_decoder else transformers.AutoModel
    model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.tensor([windows[0]])
    with torch.no_grad():
        converted = openvino.convert_model(Wrapped(model, tokens.shape[1], is_decoder), example_input=tokens)
        expected = model(tokens, attention_mask=torch.ones_like(tokens))[0].numpy()
    found = openvino.compile_model(converted, "CPU", CONFIG)([tokens.numpy()])[0]
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE:
        raise ValueError(f"the converted model's outputs are {difference} away from those of torch")
    return converted


def constants_of(output: Any) -> list[Any]:
    """Constants that an output is computed from, or nothing where an input of the model is among them."""
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return [node]
    if kind in ("Parameter", "ReadValue") or not node.inputs():
        return []
    found = []
    for each in node.inputs():
        below = constants_of(each.get_source_output())
        if not below:
            return []
        found += below
    return found


def weight_name(constants: list[Any], original: dict[str, Tensor]) -> str | None:
    """Name in the folder of the matrix that some constants encode, or None where they are something else."""
    for constant in constants:
        name = constant.get_friendly_name().removeprefix("self.model.")
        if name == "lm_head.weight" and name not in original:
            return table_name(original)
        if name in original:
            return name
    return None


def constant_bytes(node: Any) -> int:
    """Bytes of a constant; OpenVINO packs what is narrower than a byte."""
    kind = node.output(0).get_element_type()
    return -(-int(np.prod(node.output(0).shape)) * kind.bitwidth // 8)


def matrices(model: openvino.Model, original: dict[str, Tensor]) -> dict[str, tuple[Any, Any, list[Any]]]:
    """For each matrix of the folder that a MatMul or a Gather reads: that node, the output it reads, its constants."""
    found: dict[str, tuple[Any, Any, list[Any]]] = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in ("MatMul", "Gather"):
            continue
        output = node.input(1 if kind == "MatMul" else 0).get_source_output()
        constants = constants_of(output)
        name = weight_name(constants, original)
        if name is not None and original[name].dim() == 2 and (name not in found or kind == "MatMul"):
            found[name] = (node, output, constants)
    return found


def readers_of_tables(model: openvino.Model, original: dict[str, Tensor]) -> list[str]:
    """Names of the nodes that read an embedding or the head."""
    names = []
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("MatMul", "Gather"):
            continue
        for each in node.inputs():
            name = weight_name(constants_of(each.get_source_output()), original)
            if name is not None and ("embed" in name or "lm_head" in name):
                names.append(node.get_friendly_name())
    return names


def stored_parts(constants: list[Any], shape: torch.Size) -> Stored | None:
    """Bytes of an encoded matrix, or None for one that stayed as it was."""
    codes = max(constants, key=lambda each: int(np.prod(each.output(0).shape)))
    kind = codes.output(0).get_element_type()
    if kind.bitwidth > 8:
        return None
    stored = Stored(kind.bitwidth, shape[1], constant_bytes(codes), 0)
    for constant in constants:
        name, size = constant.get_friendly_name(), int(np.prod(constant.output(0).shape))
        part = next((part for end, part in PARTS.items() if name.endswith(end)), None)
        if constant is codes or part is None:  # the latter are shapes of reshapes: of the graph, not of the weights
            continue
        setattr(stored, part, getattr(stored, part) + constant_bytes(constant))
        if part == "scales":
            stored.group = shape.numel() // size
            stored.floats, stored.float_itemsize = size, constant.output(0).get_element_type().bitwidth // 8
    return stored


def multiplied(node: Any) -> np.ndarray | None:
    """The vector by which AWQ multiplies the input of a MatMul, if it does."""
    before = node.input(0).get_source_output().get_node()
    if node.get_type_name() != "MatMul" or not before.get_friendly_name().endswith("/awq_mul"):
        return None
    values = [each.get_source_output().get_node() for each in before.inputs()]
    constant = next(constants_of(value.output(0)) for value in values if constants_of(value.output(0)))
    return np.asarray(constant[0].get_data(), dtype=np.float32).reshape(-1)


def quantise(folder: str, setting: dict[str, Any], windows: list[list[int]]) -> Found:
    """See the module docstring."""
    original = read_weights(folder)
    model = convert(folder, windows)
    options = dict(setting["options"])
    if options:
        options["dataset"] = nncf.Dataset([np.array([each]) for each in windows])
        options["subset_size"] = len(windows)
    if setting["tables"] == "dense":
        options["ignored_scope"] = nncf.IgnoredScope(names=readers_of_tables(model, original))
    elif setting["tables"] == "primary":
        options["all_layers"] = True
    mode = nncf.CompressWeightsMode(setting["mode"])
    model = nncf.compress_weights(model, mode=mode, group_size=setting["group"], ratio=1.0, **options)
    read = matrices(model, original)
    outputs = [ops.convert(output, "f32") for _, output, _ in read.values()]
    decoded = openvino.compile_model(openvino.Model(outputs, [], "weights"), "CPU", CONFIG)([])
    weights, stored, notes = {}, {}, []
    for index, (name, (node, _, constants)) in enumerate(read.items()):
        weight = np.array(decoded[index]).reshape(original[name].shape)
        vector = multiplied(node)
        parts = stored_parts(constants, original[name].shape)
        if vector is not None:
            weight = weight * vector
            parts.other += vector.size * 2
            notes.append(f"inputs scaled by AWQ: {name}")
        if parts is not None:
            weights[name], stored[name] = torch.from_numpy(weight), parts
    return Found(weights, stored, 2, notes)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    serve("nncf", ("nncf", "openvino", "transformers", "torch"), quantise)
