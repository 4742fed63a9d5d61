"""What `quantization_config` may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jettison.ir.errors import CaptureError, UnsupportedError
from jettison.ir.packing_config import Packing, read_packing

FILE = Path("m/config.json")
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}


def read(**settings: Any) -> Packing | None:
    return read_packing(FILE, {"model_type": "llama", "quantization_config": settings})


def compressed(weights: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**WEIGHTS, **(weights or {})}, "input_activations": None}
    settings = {"format": "pack-quantized", "config_groups": {"group_0": group}}
    return {"quant_method": "compressed-tensors", **settings, **others}


def test_what_is_read():
    assert read_packing(FILE, {"model_type": "llama"}) is None
    assert read(quant_method="gptq", bits=4, group_size=128) == Packing("gptq", FILE, ((4, 128, True),), True)
    second = read(quant_method="gptq", bits=3, group_size=-1, checkpoint_format="gptq_v2")
    assert second == Packing("gptq", FILE, ((3, -1, True),), False)
    named = read(quant_method="gptq", bits=4, group_size=128, meta={"quantizer": ["gptqmodel:4.0.0"]})
    assert named == Packing("gptq", FILE, ((4, 128, True),), True, True)
    assert read(quant_method="awq", bits=4, group_size=64, version="GEMM") == Packing("awq", FILE, ((4, 64, True),))
    assert read(quant_method="awq", w_bit=4, q_group_size=64) == Packing("awq", FILE, ((4, 64, True),))
    assert read(**compressed()) == Packing("compressed-tensors", FILE, ((4, 128, False),))
    uneven = compressed({"symmetric": False})
    assert read(**uneven) == Packing("compressed-tensors", FILE, ((4, 128, True),))
    by_row = compressed({"strategy": "channel", "group_size": None, "num_bits": 8})
    assert read(**by_row) == Packing("compressed-tensors", FILE, ((8, -1, False),))


@pytest.mark.parametrize(
    ("settings", "evidence"),
    [
        ({"quant_method": "fp8"}, "quant_method 'fp8'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "AWQ with version 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": False}, "zero_point false"),
        (compressed(format="int-quantized"), "format 'int-quantized'"),
        (compressed({"type": "float"}), "no integers"),
        (compressed({"strategy": "tensor"}), "strategy 'tensor'"),
        (compressed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (compressed(transform_config={"config_groups": {}}), "transform_config"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (compressed(config_groups={"g": {"weights": WEIGHTS, "input_activations": {"num_bits": 8}}}), "activations"),
    ],
)
def test_other_kinds_are_refused_by_name(settings: dict[str, Any], evidence: str):
    with pytest.raises(UnsupportedError, match=r"config\.json: found an already quantised checkpoint") as caught:
        read(**settings)
    assert evidence in str(caught.value)
    assert "GPTQ, AWQ (gemm) and compressed-tensors" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"quant_method": "gptq", "group_size": 128}, "bits=None"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 128}, "bits=5"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size=0"),
        ({"quant_method": "awq", "bits": 3, "group_size": 128}, "bits=3"),
        (compressed({"num_bits": "4"}), "num_bits='4'"),
        (compressed(config_groups={}), "config_groups={}"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], found: str):
    with pytest.raises(CaptureError) as caught:
        read(**settings)
    assert f"config.json: found {found} in quantization_config; needed" in str(caught.value)
