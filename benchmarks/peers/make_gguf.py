"""A Hugging Face Llama folder as a GGUF file of Q4_0 weights without a vocabulary: `python make_gguf.py FOLDER OUT`.

Needs `gguf` and `safetensors` with torch. Every matrix is Q4_0, the tied embedding too, as in jettison's int4 artifact.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
from safetensors import safe_open

folder, out = Path(sys.argv[1]), sys.argv[2]
config = json.loads((folder / "config.json").read_text())
kind = gguf.GGMLQuantizationType.Q4_0
writer = gguf.GGUFWriter(out, "llama")
writer.add_block_count(config["num_hidden_layers"])
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_rope_dimension_count(config["head_dim"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_vocab_size(config["vocab_size"])
writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
writer.add_tokenizer_model("no_vocab")
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
with safe_open(folder / "model.safetensors", "pt") as tensors:
    for name in tensors.keys():  # noqa: SIM118
        array = tensors.get_tensor(name).float().numpy()
        target = names.get_name(name, try_suffixes=(".weight",))
        if array.ndim == 1:
            writer.add_tensor(target, array)
        else:
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
