"""Operators of namespace `jettison`; importing this package registers them all."""

from jettison.ir.ops.attention import attention
from jettison.ir.ops.bitmap_linear import bitmap_linear
from jettison.ir.ops.complete_logits import complete_logits
from jettison.ir.ops.dequantize_slots import dequantize_slots
from jettison.ir.ops.experts import experts
from jettison.ir.ops.gated_activation import gated_activation
from jettison.ir.ops.head_candidates import head_candidates
from jettison.ir.ops.joint_attention import joint_attention
from jettison.ir.ops.low_rank_attention import low_rank_attention
from jettison.ir.ops.low_rank_mlp import low_rank_mlp
from jettison.ir.ops.lut_embedding import lut_embedding
from jettison.ir.ops.lut_linear import lut_linear
from jettison.ir.ops.next_slots import next_slots
from jettison.ir.ops.quantize_slots import quantize_slots
from jettison.ir.ops.quantized_embedding import quantized_embedding
from jettison.ir.ops.quantized_experts import quantized_experts
from jettison.ir.ops.quantized_linear import quantized_linear
from jettison.ir.ops.quantized_sparse_mlp import quantized_sparse_mlp
from jettison.ir.ops.rotary_embedding import rotary_embedding
from jettison.ir.ops.scored_attention import scored_attention
from jettison.ir.ops.scored_joint_attention import scored_joint_attention
from jettison.ir.ops.selected_linear import selected_linear
from jettison.ir.ops.sparse_linear import sparse_linear
from jettison.ir.ops.sparse_mlp import sparse_mlp
from jettison.ir.ops.windowed_attention import windowed_attention
from jettison.ir.ops.write_slots import write_slots

__all__ = [
    "attention",
    "bitmap_linear",
    "complete_logits",
    "dequantize_slots",
    "experts",
    "gated_activation",
    "head_candidates",
    "joint_attention",
    "low_rank_attention",
    "low_rank_mlp",
    "lut_embedding",
    "lut_linear",
    "next_slots",
    "quantize_slots",
    "quantized_embedding",
    "quantized_experts",
    "quantized_linear",
    "quantized_sparse_mlp",
    "rotary_embedding",
    "scored_attention",
    "scored_joint_attention",
    "selected_linear",
    "sparse_linear",
    "sparse_mlp",
    "windowed_attention",
    "write_slots",
]
