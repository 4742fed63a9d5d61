"""`jettison explain`: say what each pass did and where it did not fire, and what every layer came to."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jettison.cli.console import Terminal, size_text
from jettison.cli.graph_text import Weight, layer_of, read_graph, slot_counts, state_bytes
from jettison.cli.optimize import print_passes
from jettison.cli.parser import add_artifact

if TYPE_CHECKING:
    from jettison.runtime.artifact import Artifact

# By target and weight format, of the slowest first; benchmarks/results/torch_decode.json, two Zen 4 cores.
_DECODED_AT_EACH_CALL = "are decoded at each call: no kernel of PyTorch reads them, and int4 is faster at more bytes"
_DECODES = "decodes weights to fp32, 1.6 times the time of target onnx"
_LIMITS = {
    "torch": {
        "bitmap": "limited by arithmetic: expanding a bitmap takes longer than int4, and pays where weights stream",
        "int3": f"weights in 3 bits {_DECODED_AT_EACH_CALL}",
        "nf4": f"weights in nf4 {_DECODED_AT_EACH_CALL}",
        "lut": f"weights with tables of values {_DECODED_AT_EACH_CALL}",
        "int4": f"limited by arithmetic: PyTorch's int4 kernel {_DECODES}",
        "int8": f"limited by arithmetic: PyTorch's int8 kernel {_DECODES}",
    },
    "onnx": {
        "lut": "weights with tables of values are decoded to fp32 when a session is made: int8 reads a quarter of that",
        "nf4": "weights in nf4 become 8-bit ones when a session is made: int4 reads half of that",
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_artifact(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    from jettison.runtime.artifact import Artifact

    document = _document(Artifact.open(args.artifact))
    if terminal.is_json:
        terminal.document(document)
        return 0
    terminal.line(f"pipeline   {document['pipeline'] or '(empty)'}")
    terminal.line()
    print_passes(document, terminal)
    fired = [(record["name"], place) for record in document["passes"] for place in record["where"]]
    if fired:
        terminal.table(("fired", "at"), fired)
        terminal.line()
    columns: tuple[str, ...] = (
        "layer",
        "weights",
        "weight bytes",
        "KV policy",
        "state bytes per token",
        "state bytes fixed",
    )
    rows = [_layer_row(layer) for layer in document["layers"]]
    is_placed = document["streamed_bytes"] > 0
    if is_placed:
        columns = (*columns, "streamed bytes")
        rows = [[*row, layer["streamed_bytes"]] for row, layer in zip(rows, document["layers"], strict=True)]
    terminal.table(columns, rows)
    terminal.line()
    terminal.line(f"weights    {size_text(document['weight_bytes'])}")
    if is_placed:
        terminal.line(f"streamed   {size_text(document['streamed_bytes'])} of them are not kept in memory")
    terminal.line(
        f"states     {size_text(document['state_bytes_per_token'])} per token and "
        f"{size_text(document['state_bytes_fixed'])} per sequence"
    )
    if document["decode_limit"] is not None:
        terminal.line(f"decode     {document['decode_limit']}")
    if document["run_by_torch"]:
        terminal.line()
        terminal.table(
            ("entry", "run by PyTorch, without a kernel", "times", "because"),
            [
                (entry, each["operator"], each["count"], each["reason"])
                for entry, listed in document["run_by_torch"].items()
                for each in listed
            ],
        )
    return 0


def _layer_row(layer: dict[str, Any]) -> list[object]:
    formats = Counter(weight["format"] for weight in layer["weights"])
    listed = ", ".join(f"{count} x {name}" for name, count in formats.most_common())
    number = "other" if layer["layer"] is None else str(layer["layer"])
    return [
        number, listed or None, layer["weight_bytes"], layer["kv_policy"], layer["state_bytes_per_token"],
        layer["state_bytes_fixed"],
    ]  # fmt: skip


def _document(artifact: Artifact) -> dict[str, Any]:
    manifest, report = artifact.manifest, artifact.read_json("report.json")
    graph = read_graph(artifact.path("graph/after.txt").read_text(), manifest["target"])
    states = manifest["states"]
    state_layers = [layer_of(state["name"]) for state in states]
    numbers = sorted({w.layer for w in graph.weights} | {*state_layers}, key=lambda n: (n is None, n or 0))
    policies = _Policies(manifest["pipeline"], report["passes"])
    layers = [
        _layer(
            number,
            [weight for weight in graph.weights if weight.layer == number],
            [state for state, layer in zip(states, state_layers, strict=True) if layer == number],
            policies,
            manifest,
        )
        for number in numbers
    ]
    return {
        "artifact": str(artifact.folder),
        "pipeline": manifest["pipeline"],
        "passes": [{**record, "where": record.get("where", [])} for record in report["passes"]],
        "not_recognised": report["not_recognised"],
        "layers": layers,
        "weight_bytes": manifest["weight_bytes"],
        "streamed_bytes": sum(layer["streamed_bytes"] for layer in layers),
        **_state_bytes(states, manifest),
        "run_by_torch": manifest.get("run_by_torch", {}),
        "decode_limit": _decode_limit(manifest["target"], {weight.format for weight in graph.weights}),
    }


def _decode_limit(target: str, formats: set[str]) -> str | None:
    """What makes a decode step of this artifact slower than it could be, in another format or on the other target."""
    for prefix, limit in _LIMITS.get(target, {}).items():
        if any(text.startswith(prefix) for text in formats):
            return limit
    return None


def _layer(
    number: int | None,
    weights: Sequence[Weight],
    states: Sequence[dict[str, Any]],
    policies: _Policies,
    manifest: dict[str, Any],
) -> dict[str, Any]:
    listed = [
        {
            "name": weight.name,
            "format": weight.format,
            "shape": list(weight.shape),
            "bytes": weight.bytes,
            "tier": weight.tier,
        }
        for weight in weights
    ]
    return {
        "layer": number,
        "weights": listed,
        "weight_bytes": sum(weight["bytes"] for weight in listed),
        "streamed_bytes": sum(weight["bytes"] for weight in listed if weight["tier"] is not None),
        "kv_policy": policies.of(number) if states else None,
        **_state_bytes(states, manifest),
    }


def _state_bytes(states: Sequence[dict[str, Any]], manifest: dict[str, Any]) -> dict[str, int]:
    """What every generated token adds on average, and what a sequence has whatever its length."""
    storages = manifest.get("storages", [])
    # Behind full-precision slots that are all taken; compressed slots hold several tokens.
    start = max((storage["residual"] for storage in storages), default=0)
    steps = math.lcm(*(storage["tokens"] for storage in storages))
    before, after = (state_bytes(states, slot_counts(manifest, tokens, tokens)) for tokens in (start, start + steps))
    per_token = (after - before) / steps
    return {"state_bytes_per_token": round(per_token), "state_bytes_fixed": round(before - start * per_token)}


class _Policies:
    """The KV-cache policy of each layer: that of the pipeline, except where it did not apply."""

    def __init__(self, pipeline: str, records: Sequence[dict[str, Any]]) -> None:
        from jettison.passes.grammar import RangeMap, format_value, parse_pipeline

        options = [option for spec in parse_pipeline(pipeline) if spec.name == "cache-kv" for option in spec.options]
        named = [format_value(option.value) for option in options if option.key == "policy"]
        self._named = named[0] if named else "full"
        exceptions = [option.value for option in options if option.key == "layers"]
        self._by_layer = [entry for each in exceptions if isinstance(each, RangeMap) for entry in each.entries]
        misses = [miss for record in records if record["name"] == "cache-kv" for miss in record["misses"]]
        self._kept_full = {layer_of(miss["node"].replace(" ", ".")) for miss in misses}

    def of(self, layer: int | None) -> str:
        from jettison.passes.grammar import format_value

        if layer in self._kept_full:
            return "full"
        own = [e for e in self._by_layer if layer is not None and e.range.first <= layer <= e.range.last]
        return format_value(own[0].value) if own else self._named
