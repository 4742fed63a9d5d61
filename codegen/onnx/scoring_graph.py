"""`scores.onnx`: the graph of `model.onnx` with the logits of every token, over the same weight file.

Runtimes that know no `logits_positions` get the logits of the last token from `model.onnx`, which is all that
generation needs: those of a whole prompt take its length times the vocabulary. Tools that score a text in one call, as
lm-eval's `onnxruntime` backend does, need them all.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir

POSITIONS = "logits_positions"


def write_scoring_graph(source: Path, out: Path) -> bool:
    """Write a copy of a graph that asks itself for the logits of every token.

    Args:
        source: An emitted graph; its weights are not read.
        out: Where to write, in the same folder.

    Returns:
        False, and nothing is written, if the graph has no `logits_positions`: it returns all logits as it is.
    """
    model = onnx_ir.load(source)
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    if POSITIONS not in inputs:
        return False
    tokens, positions, logits = inputs["input_ids"], inputs[POSITIONS], graph.outputs[0]
    positions.replace_all_uses_with(_every_position(graph, tokens))
    graph.inputs.remove(positions)
    graph.initializers.pop(POSITIONS, None)
    logits.shape = onnx_ir.Shape([*tokens.shape, logits.shape[-1]])
    onnx_ir.save(model, out)
    return True


def _every_position(graph: onnx_ir.Graph, tokens: onnx_ir.Value) -> onnx_ir.Value:
    """`[1, S] i64`, 0 to S - 1, computed in front of everything else."""
    tape = onnx_ir.tape.Tape()

    def constant(name: str, **value: object) -> onnx_ir.Value:
        return tape.op("Constant", [], value, name=f"{POSITIONS}.{name}")

    length = tape.op("Shape", [tokens], {"start": 1, "end": 2}, name=f"{POSITIONS}.shape")
    end = tape.op("Squeeze", [length], name=f"{POSITIONS}.end")
    limits = [constant("start", value_int=0), end, constant("step", value_int=1)]
    columns = tape.op("Range", limits, name=f"{POSITIONS}.columns")
    every = tape.op("Unsqueeze", [columns, constant("axes", value_ints=[0])], name=f"{POSITIONS}.every")
    graph.insert_before(graph[0], tape.nodes)
    return every
