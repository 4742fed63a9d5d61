"""Rewrites of a program, one file each: what there is, and what a pipeline text may name."""

from jettison.passes.allocate_bits import AllocateBits
from jettison.passes.approximate_lm_head import ApproximateLmHead
from jettison.passes.base import Pass
from jettison.passes.cache_kv import CacheKV
from jettison.passes.canonicalize_linear import CanonicalizeLinear
from jettison.passes.cluster_neurons import ClusterNeurons
from jettison.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from jettison.passes.eliminate_no_ops import EliminateNoOps
from jettison.passes.factorize_linear import FactorizeLinear
from jettison.passes.fold_constants import FoldConstants
from jettison.passes.fuse_low_rank import FuseLowRank
from jettison.passes.merge_qkv_projections import MergeQkvProjections
from jettison.passes.place_weights import PlaceWeights
from jettison.passes.predict_mlp_sparsity import PredictMlpSparsity
from jettison.passes.prune_weights import PruneWeights
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.passes.raise_attention import RaiseAttention
from jettison.passes.raise_gated_mlp import RaiseGatedMlp
from jettison.passes.raise_rms_norm import RaiseRmsNorm
from jettison.passes.raise_rotary_embedding import RaiseRotaryEmbedding
from jettison.passes.raise_written_attention import RaiseWrittenAttention
from jettison.passes.select_logits import SelectLogits
from jettison.passes.sparsify_inputs import SparsifyInputs
from jettison.passes.strip_export_asserts import StripExportAsserts

# Every pass, in alphabetical order of the files.
PASSES: tuple[type[Pass], ...] = (
    AllocateBits,
    ApproximateLmHead,
    CacheKV,
    CanonicalizeLinear,
    ClusterNeurons,
    EliminateCommonSubexpressions,
    EliminateNoOps,
    FactorizeLinear,
    FoldConstants,
    FuseLowRank,
    MergeQkvProjections,
    PlaceWeights,
    PredictMlpSparsity,
    PruneWeights,
    QuantizeWeights,
    RaiseAttention,
    RaiseGatedMlp,
    RaiseRmsNorm,
    RaiseRotaryEmbedding,
    RaiseWrittenAttention,
    SelectLogits,
    SparsifyInputs,
    StripExportAsserts,
)
# Canonicalisation and raising always run and stay out of the text.
USER_PASSES: tuple[type[Pass], ...] = (
    AllocateBits,
    ApproximateLmHead,
    CacheKV,
    ClusterNeurons,
    FactorizeLinear,
    FuseLowRank,
    MergeQkvProjections,
    PlaceWeights,
    PredictMlpSparsity,
    PruneWeights,
    QuantizeWeights,
    SparsifyInputs,
)

__all__ = ["PASSES", "USER_PASSES"]
