"""`genai_config.json`: how ONNX Runtime GenAI runs an artifact whose one graph serves prompt and decoding."""

from __future__ import annotations

from typing import Any

from jettison.ir.program import Program


def genai_config(config: dict[str, Any], generation: dict[str, Any], program: Program) -> dict[str, Any] | None:
    """The file's contents, or None if the model's config does not say what GenAI needs.

    Args:
        config: Contents of config.json.
        generation: Contents of generation_config.json.
        program: A program with key and value states per layer.

    Returns:
        A JSON-ready dict.
    """
    keys = [state for name, state in program.states.items() if name.endswith(".key")]
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not keys or heads is None or hidden is None:
        return None
    kv_heads, head_size = keys[0].shape[1], keys[0].shape[3]
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    bos = generation.get("bos_token_id", config.get("bos_token_id"))
    pad = generation.get("pad_token_id", config.get("pad_token_id"))
    first_eos = eos[0] if isinstance(eos, list) and eos else eos
    return {
        "model": {
            "type": config.get("model_type", "llama"),
            "bos_token_id": bos if bos is not None else first_eos,
            "eos_token_id": eos,
            "pad_token_id": pad if pad is not None else first_eos,
            "vocab_size": program.info.vocab_size,
            "context_length": program.info.context,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": head_size,
                "hidden_size": hidden,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
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
            },
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "max_length": program.info.context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "temperature": generation.get("temperature", 1.0),
            "top_k": generation.get("top_k", 50),
            "top_p": generation.get("top_p", 1.0),
        },
    }
