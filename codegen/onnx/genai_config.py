"""`genai_config.json`: how ONNX Runtime GenAI runs an artifact whose one graph serves prompt and decoding.

GenAI allocates the logits itself, of one token per row, because the graph declares that size (see `emit`). Checked by
hand with onnxruntime-genai 0.18: the same tokens as jettison's own runtime for `full`, `window` and mixed caches.
"""

from __future__ import annotations

from typing import Any

from jettison.ir import ops
from jettison.ir.match import arguments, is_call
from jettison.ir.program import Program, State

# Families that GenAI knows by the name of transformers and treats as plain decoders. All others run as `decoder`; it
# has code of its own for some (gpt2, phi3) that does not fit these graphs.
PLAIN_FAMILIES = (
    "ernie4_5", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "nemotron", "olmo", "phi", "qwen2",
    "qwen3", "smollm3",
)  # fmt: skip


def genai_config(config: dict[str, Any], generation: dict[str, Any], program: Program) -> dict[str, Any] | None:
    """The file's contents, or None if GenAI cannot run the graph or the model's config is missing.

    Args:
        config: Contents of config.json.
        generation: Contents of generation_config.json.
        program: A program with key and value states per layer.

    Returns:
        A JSON-ready dict.
    """
    keys = [state for name, state in program.states.items() if name.endswith(".key")]
    values = [state for name, state in program.states.items() if name.endswith(".value")]
    windows = _windows(program)
    # One size of the keys and values of a layer, and one window, is all that the format can say.
    is_plain = [state.shape for state in keys] == [state.shape for state in values]
    if not config or not keys or not is_plain or len(set(windows.values())) > 1:
        return None
    return {"model": _model(config, generation, program, keys, windows), "search": _search(generation, program)}


def _windows(program: Program) -> dict[int, tuple[int, int]]:
    """Window and slots of each layer whose cache holds the window only."""
    found = {}
    for node in program.entries["prefill"].graph.nodes:
        if is_call(node, ops.windowed_attention):
            operands = arguments(node)
            state = operands["past_key"].meta["state"]
            found[int(state.split(".")[1])] = (operands["window"], int(program.states[state].shape[2]))
    return found


def _model(
    config: dict[str, Any],
    generation: dict[str, Any],
    program: Program,
    keys: list[State],
    windows: dict[int, tuple[int, int]],
) -> dict[str, Any]:
    eos, bos, pad = (
        generation.get(name, config.get(name)) for name in ("eos_token_id", "bos_token_id", "pad_token_id")
    )
    first_eos = eos[0] if isinstance(eos, list) and eos else eos
    tokens = {
        "bos_token_id": bos if bos is not None else first_eos,
        "eos_token_id": eos,
        "pad_token_id": pad if pad is not None else first_eos,
    }
    family = config.get("model_type")
    return {
        "type": family if family in PLAIN_FAMILIES else "decoder",
        **{name: token for name, token in tokens.items() if token is not None},
        "vocab_size": program.info.vocab_size,
        "context_length": program.info.context,
        "decoder": _decoder(program, keys, windows),
    }


def _decoder(program: Program, keys: list[State], windows: dict[int, tuple[int, int]]) -> dict[str, Any]:
    attentions = [
        arguments(node)["query"].meta["val"]
        for node in program.entries["prefill"].graph.nodes
        if is_call(node, ops.attention, ops.windowed_attention)
    ]
    heads, head_size = attentions[0].shape[1], keys[0].shape[3]
    decoder = {
        "filename": "model.onnx",
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": head_size,
        "hidden_size": heads * head_size,
        "num_attention_heads": heads,
        "num_key_value_heads": keys[0].shape[1],
        "num_hidden_layers": len(keys),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    # Where every layer has a window GenAI reads the size of the caches from the graph.
    if windows and len(windows) < len(keys):
        window, slots = next(iter(windows.values()))
        decoder["sliding_window"] = {
            "window_size": window,
            "cache_slack": slots - window,
            "layers": sorted(windows),
            "slide_inputs": False,
            "slide_key_value_cache": False,
        }
    return decoder


def _search(generation: dict[str, Any], program: Program) -> dict[str, Any]:
    return {
        "do_sample": bool(generation.get("do_sample", False)),
        "max_length": program.info.context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        **{name: generation.get(name, usual) for name, usual in (("temperature", 1.0), ("top_k", 50), ("top_p", 1.0))},
    }
