"""jettison: a pass compiler that fits language models into the memory you have.

import jettison

model = jettison.optimize("path/to/model", passes="quantize-weights{bits=4,group=32}")
print(model.generate("Once upon a time", max_new_tokens=64))
model.save_pretrained("out")
"""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Official builds of ONNX Runtime report to their maker unless this is set before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# A checkout runs without being installed: its folders are packages of this one.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "ir" / "program.py").is_file():
    __path__.append(str(_CHECKOUT))

if TYPE_CHECKING:
    from jettison.api import load, optimize
    from jettison.optimized_model import OptimizedModel
    from jettison.passes.approximate_lm_head import ApproximateLmHead
    from jettison.passes.cache_kv import CacheKV
    from jettison.passes.cluster_neurons import ClusterNeurons
    from jettison.passes.factorize_linear import FactorizeLinear
    from jettison.passes.merge_qkv_projections import MergeQkvProjections
    from jettison.passes.place_weights import PlaceWeights
    from jettison.passes.policies import Full, Window
    from jettison.passes.predict_mlp_sparsity import PredictMlpSparsity
    from jettison.passes.quantize_weights import QuantizeWeights
    from jettison.passes.sparsify_inputs import SparsifyInputs
    from jettison.placing import place
    from jettison.report import Report

__all__ = [
    "ApproximateLmHead",
    "CacheKV",
    "ClusterNeurons",
    "FactorizeLinear",
    "Full",
    "MergeQkvProjections",
    "OptimizedModel",
    "PlaceWeights",
    "PredictMlpSparsity",
    "QuantizeWeights",
    "Report",
    "SparsifyInputs",
    "Window",
    "load",
    "optimize",
    "place",
]

_HOMES = {
    "ApproximateLmHead": "jettison.passes.approximate_lm_head",
    "CacheKV": "jettison.passes.cache_kv",
    "ClusterNeurons": "jettison.passes.cluster_neurons",
    "FactorizeLinear": "jettison.passes.factorize_linear",
    "Full": "jettison.passes.policies",
    "MergeQkvProjections": "jettison.passes.merge_qkv_projections",
    "OptimizedModel": "jettison.optimized_model",
    "PlaceWeights": "jettison.passes.place_weights",
    "PredictMlpSparsity": "jettison.passes.predict_mlp_sparsity",
    "QuantizeWeights": "jettison.passes.quantize_weights",
    "Report": "jettison.report",
    "SparsifyInputs": "jettison.passes.sparsify_inputs",
    "Window": "jettison.passes.policies",
    "load": "jettison.api",
    "optimize": "jettison.api",
    "place": "jettison.placing",
}


def __getattr__(name: str) -> Any:
    # Resolved on first use: `import jettison.runtime.artifact` must not load torch, and the packages below this one
    # must not pull in the front door.
    if name not in _HOMES:
        raise AttributeError(f"module 'jettison' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
