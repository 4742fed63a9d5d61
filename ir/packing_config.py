"""What `config.json` says about weights that a checkpoint holds packed: which tool's layout, bits and groups.

GPTQ, AWQ (gemm) and compressed-tensors (pack-quantized) are read; every other kind is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jettison.ir.errors import CaptureError, UnsupportedError

# Ends of tensor names under which GPTQ and AWQ, and compressed-tensors, store packed integers.
PACKED_SUFFIXES = (".qweight", ".weight_packed")
# Under which keys of config.json tools say how they quantised; the last one is that of MLX.
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
_READABLE = "GPTQ, AWQ (gemm) and compressed-tensors (pack-quantized)"
_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,), "compressed-tensors": (2, 3, 4, 8)}


class Scheme(NamedTuple):
    """Bits per weight, columns of a group or -1 for whole rows, and whether zero points must be stored."""

    bits: int
    group: int
    has_zeros: bool = True


@dataclass(frozen=True)
class Packing:
    """How the packed linears of a checkpoint are laid out.

    Attributes:
        method: `gptq`, `awq` or `compressed-tensors`.
        file: The `config.json` that says so, for messages.
        schemes: Of each kind of linear there is. A linear's tensors say which is its own.
        zeros_less_one: Whether stored zero points are one less than what they stand for (GPTQ's first format).
        by_gptqmodel: Whether GPTQModel wrote it, which subtracts otherwise than AutoGPTQ where there are 3 bits.
    """

    method: str
    file: Path
    schemes: tuple[Scheme, ...]
    zeros_less_one: bool = False
    by_gptqmodel: bool = False

    @property
    def suffix(self) -> str:
        """End of the name of the tensor that holds the codes of a linear."""
        return PACKED_SUFFIXES[self.method == "compressed-tensors"]


def read_packing(file: Path, config: dict[str, Any]) -> Packing | None:
    """How weights are packed according to a configuration; None where it says nothing.

    Args:
        file: `config.json`.
        config: What is in it.

    Raises:
        UnsupportedError: They are packed in a way that is not read.
        CaptureError: A setting is missing or out of range.
    """
    sections = {"": config} | {f"{key}.": value for key, value in config.items() if isinstance(value, dict)}
    for prefix, section in sections.items():
        for key in QUANTIZATION_KEYS:
            settings = section.get(key)
            if not settings or (key == "quantization" and not (isinstance(settings, dict) and "bits" in settings)):
                continue
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            reader = _READERS.get(str(method))
            if reader is None or key == "quantization" or prefix:
                refuse_quantized(file, f"{prefix}{key}" + (f" with quant_method {method!r}" if method else ""))
            return reader(file, settings)
    return None


def refuse_quantized(file: Path, evidence: str) -> NoReturn:
    """Refuse a quantised checkpoint that cannot be read."""
    raise UnsupportedError(
        f"[checkpoint] {file}: found an already quantised checkpoint ({evidence}); needed the original weights or one "
        f"of the packings that jettison reads ({_READABLE}), because quantising twice adds up both errors. Use the "
        "unquantised checkpoint (bf16, fp16 or fp32) that this one was made from."
    )


def _read_gptq(file: Path, settings: dict[str, Any]) -> Packing:
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or settings.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        refuse_quantized(file, f"quantization_config of GPTQ with checkpoint_format {layout!r}")
    meta = settings.get("meta")
    by_gptqmodel = isinstance(meta, dict) and "gptqmodel" in str(meta.get("quantizer")).lower()
    scheme = _scheme(file, "gptq", settings, "bits", "group_size")
    return Packing("gptq", file, (scheme,), layout == "gptq", by_gptqmodel)


def _read_awq(file: Path, settings: dict[str, Any]) -> Packing:
    layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if layout != "gemm":
        refuse_quantized(file, f"quantization_config of AWQ with version {layout!r}")
    if settings.get("zero_point") is False:
        refuse_quantized(file, "quantization_config of AWQ with zero_point false")
    names = [old if old in settings and new not in settings else new for new, old in _AWQ_NAMES]
    return Packing("awq", file, (_scheme(file, "awq", settings, *names),))


def _read_compressed_tensors(file: Path, settings: dict[str, Any]) -> Packing:
    what = "quantization_config of compressed-tensors with"
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        _refuse_setting(file, "config_groups", groups, "a mapping of names to settings")
    for key in ("kv_cache_scheme", "transform_config"):
        if settings.get(key):
            refuse_quantized(file, f"{what} a {key}")
    sparsity = settings.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") in (None, "dense")):
        refuse_quantized(file, f"{what} a sparsity_config")
    schemes = []
    for name, group in groups.items():
        layout = group.get("format") or settings.get("format")
        if layout != "pack-quantized":
            refuse_quantized(file, f"{what} format {layout!r}")
        if group.get("input_activations") or group.get("output_activations"):
            refuse_quantized(file, f"{what} quantised activations in {name}")
        weights = group.get("weights")
        if not isinstance(weights, dict) or weights.get("type", "int") != "int":
            refuse_quantized(file, f"{what} weights in {name} that are no integers")
        strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
        if strategy not in ("group", "channel"):
            refuse_quantized(file, f"{what} strategy {strategy!r} in {name}")
        chosen = {**weights, "group_size": -1} if strategy == "channel" else weights
        scheme = _scheme(file, "compressed-tensors", chosen, "num_bits", "group_size")
        schemes.append(scheme._replace(has_zeros=weights.get("symmetric") is False))
    return Packing("compressed-tensors", file, tuple(dict.fromkeys(schemes)))


_AWQ_NAMES = (("bits", "w_bit"), ("group_size", "q_group_size"))
_READERS = {"gptq": _read_gptq, "awq": _read_awq, "compressed-tensors": _read_compressed_tensors}


def _scheme(file: Path, method: str, settings: dict[str, Any], bits_name: str, group_name: str) -> Scheme:
    """Bits and columns of a group, in range."""
    bits, group = settings.get(bits_name), settings.get(group_name)
    if type(bits) is not int or bits not in _BITS[method]:
        _refuse_setting(file, bits_name, bits, f"one of {', '.join(map(str, _BITS[method]))} for {method}")
    if type(group) is not int or (group < 1 and group != -1):
        _refuse_setting(file, group_name, group, "a number of columns, or -1 for whole rows")
    return Scheme(bits, group)


def _refuse_setting(file: Path, name: str, found: Any, needed: str) -> NoReturn:
    raise CaptureError(
        f"[checkpoint] {file}: found {name}={found!r} in quantization_config; needed {needed}. Correct the file, or "
        "use the unquantised checkpoint that this one was made from."
    )
