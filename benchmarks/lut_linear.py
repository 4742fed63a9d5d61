"""What ONNX Runtime makes of weights that `MatMulNBits` does not take as they are: nf4, palettes, float zero points.

    python benchmarks/lut_linear.py [--threads N]

Per shape `N x K`, milliseconds for one row of x, medians of interleaved rounds; `error` is the root of the squared
error of the result over that of the fp32 product with the same weights. `nf4 taken` and `palette taken` are the
lowerings of `codegen/onnx/lut_weights.py`, `float zeros taken` is that of `codegen/onnx/lowerings.py`; the others are
what was not taken. Torch's operators on the packed form are beside them. Writes benchmarks/results/lut_linear.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from record import environment, write
from torch import Tensor, nn

from jettison.codegen.onnx import lowerings, lut_weights
from jettison.ir import ops
from jettison.passes.formats import IntGroups, Lut, Nf4, WeightFormat
from jettison.runtime.packed_linear import pack_weight

GROUP = 64
SHAPES = ((2048, 2048), (8192, 2048))
ROUNDS, RUNS = 15, 5
# Longer calls are timed once per round.
LONG_SECONDS = 0.01

Session = onnxruntime.InferenceSession


def open_session(model: bytes | str, threads: int, *, is_folding: bool = True) -> Session:
    """A session on the CPU; without folding nothing is computed before a run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads of the others that wait would take the cores of the one that is measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not is_folding:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return Session(model, options, providers=["CPUExecutionProvider"])


class Lowered(nn.Module):
    """A lowering as the exporter sees it; the weight is an input, so that it is not folded on the way."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, *parts: Tensor) -> Tensor:
        """The function."""
        return self.function(x, *parts)


def lowered(function: Callable[..., Tensor], columns: int, parts: list[Tensor], threads: int, **how: bool) -> Session:
    """A session of a lowering of ours, with its parts as initialisers."""
    names = [f"part_{index}" for index in range(len(parts))]
    program = torch.onnx.export(
        Lowered(function).eval(), (torch.zeros(1, columns), *parts), input_names=["x", *names], output_names=["y"],
        opset_version=23, dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None, "export without a file returns the program"
    model = program.model_proto
    graph = model.graph
    kept = [value for value in graph.input if value.name == "x"]
    del graph.input[:]
    graph.input.extend(kept)
    graph.initializer.extend(
        numpy_helper.from_array(part.numpy(), name) for name, part in zip(names, parts, strict=True)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return open_session(str(path), threads, **how)


def contrib(op_type: str, columns: int, parts: dict[str, Tensor], threads: int, **attributes: int) -> Session:
    """A session of one operator of ONNX Runtime."""
    node = helper.make_node(op_type, ["x", *parts], ["y"], domain="com.microsoft", K=columns, **attributes)
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(part.numpy(), name) for name, part in parts.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return open_session(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(), threads)


def onnx_ways(weights: dict[str, tuple[WeightFormat, dict[str, Tensor]]], rows: int, columns: int, threads: int) -> Any:
    """Sessions by name, and the name of the weight each reads."""
    found: dict[str, tuple[Session, str]] = {}
    for bits in (2, 4, 8):
        parts = weights[f"int{bits}"][1]
        attributes = {"N": rows, "bits": bits, "block_size": GROUP, "accuracy_level": 4}
        found[f"int{bits}"] = contrib("MatMulNBits", columns, parts, threads, **attributes), f"int{bits}"
        between = weights[f"int{bits} float zeros"][1]

        def shifted(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int = bits) -> Tensor:
            return lowerings.quantized_linear(x, codes, scales, zeros, None, bits, GROUP, columns)

        name = f"int{bits} float zeros"
        found[f"{name} taken"] = lowered(shifted, columns, list(between.values()), threads), name
        if bits != 8:  # the kernel refuses these
            found[f"{name}, MatMulNBits"] = contrib("MatMulNBits", columns, between, threads, **attributes), name
    codes, lut, scales = weights["nf4"][1].values()
    flat = ((codes >> 4) | (codes << 4)).reshape(-1)
    bnb = contrib(
        "MatMulBnb4", columns, {"b": flat, "absmax": scales.reshape(-1)}, threads, N=rows, block_size=GROUP,
        quant_type=1,
    )  # fmt: skip
    found["nf4, MatMulBnb4"] = bnb, "nf4"

    def nf4(x: Tensor, codes: Tensor, lut: Tensor, scales: Tensor) -> Tensor:
        return lut_weights.lut_linear(x, codes, lut, scales, None, None, 4, GROUP, columns)

    def dense(x: Tensor, codes: Tensor, lut: Tensor) -> Tensor:
        return lut_weights.lut_linear(x, codes, lut, None, None, None, 4, 8, columns)

    found["nf4 taken"] = lowered(nf4, columns, [codes, lut, scales], threads), "nf4"
    palette = list(weights["palette"][1].values())
    found["palette taken"] = lowered(dense, columns, palette, threads), "palette"
    found["palette decoded at every call"] = lowered(dense, columns, palette, threads, is_folding=False), "palette"
    return found


def torch_ways(weights: dict[str, tuple[WeightFormat, dict[str, Tensor]]], columns: int) -> dict[str, Any]:
    """What the torch target runs, by name: functions of x."""
    found: dict[str, Any] = {}
    for bits in (2, 3, 4, 8):
        parts = tuple(weights[f"int{bits}"][1].values())
        layout = bits, GROUP, columns
        packed = pack_weight(*parts, *layout, is_table=False)
        found[f"torch int{bits}"] = (
            (lambda x, parts=parts, layout=layout: ops.quantized_linear(x, *parts, None, *layout))
            if packed is None
            else (lambda x, packed=packed: packed.linear(x, None))
        )
    nf4, palette = (tuple(weights[name][1].values()) for name in ("nf4", "palette"))
    found["torch nf4"] = lambda x: ops.lut_linear(x, *nf4, None, None, 4, GROUP, columns)
    found["torch palette"] = lambda x: ops.lut_linear(x, *palette, None, None, None, 4, 8, columns)
    return found


def in_rounds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of each call, the median of rounds in which all are made in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            runs = 1 if time.perf_counter() - start > LONG_SECONDS else RUNS
            start = time.perf_counter()
            for _ in range(runs):
                call()
            times[name].append((time.perf_counter() - start) / runs)
    return {name: round(1e3 * statistics.median(each), 3) for name, each in times.items()}


def measure_shape(rows: int, columns: int, threads: int) -> dict[str, Any]:
    """Milliseconds and errors by way."""
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    few = torch.randn(16, generator=torch.Generator().manual_seed(1))
    palettised = few[torch.randint(16, (rows, columns), generator=torch.Generator().manual_seed(2))]
    formats: dict[str, WeightFormat] = {f"int{bits}": IntGroups(bits, GROUP) for bits in (2, 3, 4, 8)}
    formats |= {f"int{bits} float zeros": IntGroups(bits, GROUP, float_zeros=True) for bits in (2, 4, 8)}
    weights = {name: (each, each.encode(dense)) for name, each in formats.items()}
    weights["nf4"] = Nf4(GROUP, double=False), Nf4(GROUP, double=False).encode(dense)
    weights["palette"] = Lut(4, per_row=False), Lut(4, per_row=False).encode(palettised)
    x = torch.randn(1, columns, generator=torch.Generator().manual_seed(3))
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for name, (session, weight) in onnx_ways(weights, rows, columns, threads).items():
        calls[name] = lambda session=session: session.run(["y"], {"x": x.numpy()})
        weight_format, parts = weights[weight]
        expected = F.linear(x, weight_format.decode(parts, (rows, columns)))
        difference = torch.from_numpy(np.asarray(calls[name]()[0])) - expected
        errors[name] = float(difference.norm() / expected.norm())
    milliseconds = in_rounds(calls)
    # Not beside sessions, whose threads and PyTorch's would share the cores.
    calls = {name: lambda function=function: function(x) for name, function in torch_ways(weights, columns).items()}
    calls["torch fp32"] = lambda: F.linear(x, dense)
    milliseconds |= in_rounds(calls)
    figures = {
        "milliseconds": milliseconds,
        "over_int4": {name: round(each / milliseconds["int4"], 2) for name, each in milliseconds.items()},
        "error": {name: float(f"{error:.2g}") for name, error in errors.items()},
        "bits_per_weight": {
            name: round(each.bits_per_weight((rows, columns)), 4) for name, (each, _) in weights.items()
        },
    }
    print(f"{rows} x {columns}", json.dumps(figures, indent=2), flush=True)
    return figures


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before = environment()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # of the exporter about its own internals
    with torch.inference_mode():
        shapes = {f"{rows}x{columns}": measure_shape(rows, columns, arguments.threads) for rows, columns in SHAPES}
    print(write("lut_linear", {"threads": arguments.threads, "group": GROUP, "rows_of_x": 1, "shapes": shapes}, before))


if __name__ == "__main__":
    main()
