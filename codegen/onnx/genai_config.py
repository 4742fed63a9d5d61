"""`genai_config.json`: how ONNX Runtime GenAI runs an artifact whose one graph serves prompt and decoding.

GenAI allocates the logits itself, of one token per row, because the graph declares that size (see `emit`).
`tests/codegen/test_genai.py` holds it to the tokens of jettison's own runtime, for full and windowed caches.

What GenAI 0.18 cannot do with such a folder, and says so: rows of different length over a windowed cache (its operator
refuses padding), and a `max_length` below window and slack where only some layers have a window (it then allocates
`max_length` slots for those, and the graph wants all). A model without an end token ends at its padding token, or 0.
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

# Settings of generation_config.json that both know by one name and meaning, and what they are where it is silent.
USUAL_SETTINGS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


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
        _token_ids(name, generation, config, program.info.vocab_size)
        for name in ("eos_token_id", "bos_token_id", "pad_token_id")
    )
    tokens = {"bos_token_id": (bos or eos)[:1], "eos_token_id": eos, "pad_token_id": (pad or eos)[:1]}
    family = config.get("model_type")
    return {
        "type": family if family in PLAIN_FAMILIES else "decoder",
        **{name: ids[0] if len(ids) == 1 else ids for name, ids in tokens.items() if ids},
        "vocab_size": program.info.vocab_size,
        "context_length": program.info.context,
        "decoder": _decoder(program, keys, windows),
    }


def _token_ids(name: str, generation: dict[str, Any], config: dict[str, Any], vocab_size: int) -> list[int]:
    """Ids of a special token; null says nothing, and GenAI feeds or refuses ids that have no embedding."""
    found = config.get(name) if generation.get(name) is None else generation[name]
    ids = found if isinstance(found, list) else [found]
    return [token for token in ids if token is not None and 0 <= token < vocab_size]


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
        **{name: usual if generation.get(name) is None else generation[name] for name, usual in USUAL_SETTINGS.items()},
    }
