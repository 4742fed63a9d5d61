"""Small models of transformers with random weights, built from configurations: nothing is downloaded.

Weights are drawn so that every part matters: norms are not one, biases are not zero, attention is far from uniform, and
windows are shorter than the longest test sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCAB_SIZE = 97
CONTEXT = 128
LAYERS = 2
WINDOW = 16

# Names of sizes as Llama and most families after it spell them; a family gives None for those it does not know.
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_NAMES = {
    "vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class TinyModel:
    """How to build one small model: class names in transformers, and fields of the configuration."""

    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)


def _like_llama(prefix: str, **options: Any) -> TinyModel:
    merged = {name: value for name, value in {**_COMMON, **options}.items() if value is not None}
    return TinyModel(f"{prefix}Config", f"{prefix}ForCausalLM", merged)


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10_000.0, **settings}


TINY_MODELS: dict[str, TinyModel] = {
    "llama": _like_llama("Llama"),
    "llama_rope_dynamic": _like_llama("Llama", rope_parameters=_rope("dynamic", factor=4.0)),
    "mistral": _like_llama("Mistral", sliding_window=WINDOW, head_dim=8),
    "qwen2": _like_llama("Qwen2"),
    "qwen3": _like_llama("Qwen3", head_dim=8),
    "opt": TinyModel(
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB_SIZE, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 32,
        },
    ),
    "gpt2": TinyModel("GPT2Config", "GPT2LMHeadModel", _GPT2_NAMES),
    "gpt_neox": _like_llama("GPTNeoX", num_key_value_heads=None, rotary_pct=0.5, use_parallel_residual=True),
    "phi3": _like_llama("Phi3"),
    "phi3_longrope": _like_llama(
        "Phi3",
        original_max_position_embeddings=64,
        rope_parameters=_rope(
            "longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0],
            original_max_position_embeddings=64,
        ),
    ),
    "gemma2": _like_llama(
        "Gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "mixtral": _like_llama("Mixtral", num_local_experts=3, num_experts_per_tok=2),
    # Models that write their attention out.
    "falcon": TinyModel(
        "FalconConfig",
        "FalconForCausalLM",
        {
            "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
            "alibi": False, "bias": True, "parallel_attn": True, "bos_token_id": 1, "eos_token_id": 2,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "gptj": TinyModel("GPTJConfig", "GPTJForCausalLM", {**_GPT2_NAMES, "rotary_dim": 4}),
    # Further families.
    "gemma3": _like_llama(
        "Gemma3Text", head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen3_moe": _like_llama("Qwen3Moe", **_EXPERTS, head_dim=8),
    "qwen2_moe": _like_llama("Qwen2Moe", **_EXPERTS, shared_expert_intermediate_size=24),
    "olmo2": _like_llama("Olmo2"),
    "stablelm": _like_llama("StableLm", partial_rotary_factor=0.5),
    "cohere": _like_llama("Cohere"),
    "granite": _like_llama(
        "Granite", attention_multiplier=0.3, residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=3.0
    ),
    "starcoder2": _like_llama("Starcoder2", sliding_window=WINDOW),
    "gpt_bigcode": TinyModel("GPTBigCodeConfig", "GPTBigCodeForCausalLM", _GPT2_NAMES),
    "gpt_neo": TinyModel(
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, "window_size": WINDOW,
            "max_position_embeddings": CONTEXT, "attention_types": [[["global", "local"], 1]], "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_oss": _like_llama(
        "GptOss", head_dim=8, sliding_window=WINDOW, num_local_experts=3, num_experts_per_tok=2,
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=32, truncate=False),
    ),
    "smollm3": _like_llama("SmolLM3", no_rope_layers=[1, 0]),
    "glm": _like_llama("Glm", head_dim=8),
    "deepseek_v3": _like_llama(
        "DeepseekV3", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "bloom": TinyModel(
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4, "seq_length": CONTEXT},
    ),
    "mpt": TinyModel(
        "MptConfig",
        "MptForCausalLM",
        {"vocab_size": VOCAB_SIZE, "d_model": 32, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": CONTEXT},
    ),
    # Refused: something other than keys and values persists, or attention is of another kind.
    "llama4": _like_llama(
        "Llama4Text", head_dim=8, attention_chunk_size=16, num_local_experts=2, intermediate_size_mlp=48
    ),
    "mamba": TinyModel(
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 4},
    ),
    "rwkv": TinyModel(
        "RwkvConfig",
        "RwkvForCausalLM",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": LAYERS, "context_length": CONTEXT},
    ),
    "qwen3_next": _like_llama(
        "Qwen3Next", **_EXPERTS, head_dim=8, shared_expert_intermediate_size=16, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "bamba": _like_llama(
        "Bamba", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=8,
        mamba_n_groups=2,
    ),
    "lfm2": _like_llama("Lfm2", layer_types=["conv", "full_attention"]),
    "recurrent_gemma": _like_llama("RecurrentGemma", lru_width=32, head_dim=8, attention_window_size=WINDOW),
    "doge": _like_llama("Doge"),
    "jetmoe": _like_llama("JetMoe", kv_channels=8, num_local_experts=2, num_experts_per_tok=1),
    # Encoders.
    "bert": TinyModel("BertConfig", "BertModel", {**_COMMON, "num_key_value_heads": 4, "type_vocab_size": 2}),
}  # fmt: skip


def tiny_config(name: str) -> Any:
    """The configuration of a small model."""
    import transformers

    tiny = TINY_MODELS[name]
    options = {key: value for key, value in tiny.options.items() if (name, key) != ("bert", "num_key_value_heads")}
    return getattr(transformers, tiny.config)(**options)


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32, layers: int | None = None) -> Any:
    """A small model in eval mode with seeded random weights, equal in every process.

    Buffers keep their dtype, as `from_pretrained` leaves them: angles of rotary embeddings in bf16 are of no use.
    """
    import transformers

    tiny = TINY_MODELS[name]
    # The text model of some families goes by another name than its configuration.
    class_name = {"Gemma3TextForCausalLM": "Gemma3ForCausalLM", "Llama4TextForCausalLM": "Llama4ForCausalLM"}.get(
        tiny.model, tiny.model
    )
    config = tiny_config(name)
    if layers is not None:
        config.num_hidden_layers = layers
    model = getattr(transformers, class_name)(config)
    randomize(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def randomize(module: nn.Module, seed: int = 1) -> nn.Module:
    """Draw every parameter: matrices keep the scale of what they multiply, norms lie near one, biases are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.2 * noise)
    return module


def random_ids(rows: int, length: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Tensor:
    """`[rows, length] i64`, no special token among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (rows, length), generator=generator)
