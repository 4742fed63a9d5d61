"""Hugging Face models for capture: attention through the library's own extension point, weights mapped from the files.

`transformers` is optional and imported only here and in the tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jettison.ir.capture import CaptureSource, module_inputs
from jettison.ir.checkpoint import Checkpoint
from jettison.ir.errors import CaptureError, UnsupportedError

ATTENTION_NAME = "jettison"
# Arguments of an attention function that do not change what it computes without a cache and in eval mode.
_NEUTRAL_ATTENTION_ARGUMENTS = frozenset(
    [
        "dropout",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "past_key_values",
        "past_key_value",
        "return_dict",
        "layer_idx",
        "is_causal",
        "training",
        "logits_to_keep",
        "labels",
        "position_embeddings",
        "output_router_logits",
    ]
)
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CaptureError(
            "[capture] this is a Hugging Face model and the package `transformers` is not installed. "
            "Install it with: pip install 'jettison[hf]'"
        ) from error
    return transformers


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a captured model calls instead of its attention kernel; leaves one `jettison::attention` in the graph."""
    strange = [name for name, value in others.items() if value is not None and name not in _NEUTRAL_ATTENTION_ARGUMENTS]
    if strange:
        raise UnsupportedError(f"attention with the argument(s) {', '.join(sorted(strange))}")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UnsupportedError("attention with a mask of its own, beyond causal, sliding-window and padding masks")
    is_causal = others.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    out = torch.ops.jettison.attention(
        query,
        key,
        value,
        None,
        None,
        attention_mask,
        s_aux,
        float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        bool(is_causal),
        int(sliding_window or 0),
        float(softcap or 0.0),
    )
    return out.transpose(1, 2), None


def _attention_mask(*_: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **__: Any) -> Tensor | None:
    """What a captured model calls instead of building a mask: only which keys are real is data."""
    if use_vmap:
        raise UnsupportedError("attention with a custom mask function")
    return attention_mask


def register_attention() -> None:
    """Register the attention function and mask builder under the name `jettison` in transformers."""
    transformers = _transformers()
    transformers.AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    transformers.AttentionMaskInterface.register(ATTENTION_NAME, _attention_mask)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside allocate no parameter; their buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def model_class(config: Any) -> type[nn.Module]:
    """The class a config names, or the library's causal or base class for its model type.

    Raises:
        CaptureError: The installed transformers does not know the model type.
        UnsupportedError: An encoder-decoder model.
    """
    transformers = _transformers()
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"[capture] {config.model_type} is an encoder-decoder model: decoders and encoders are handled. "
            "Pass its encoder as a module instead."
        )
    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise CaptureError(
        f"[capture] transformers {transformers.__version__} has no class for model type {config.model_type!r}. "
        "Upgrade transformers, or load the model yourself and pass the module."
    )


def is_decoder(cls: type) -> bool:
    """Whether a transformers class is a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    known = {name for entry in names for name in ((entry,) if isinstance(entry, str) else entry)}
    return cls.__name__ in known


def _context_of(config: Any) -> int:
    for name in _CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048


def _attention_implementation(cls: type) -> str:
    if getattr(cls, "_supports_attention_backend", False):
        return ATTENTION_NAME
    # Models that write their attention out are exported as they are; a pass raises what it recognises.
    return "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"


def _refuse_unsupported(config: Any, cls: type) -> None:
    if "chunked_attention" in (getattr(config, "layer_types", None) or []):
        raise UnsupportedError(
            f"[capture] {cls.__name__}: chunked attention is not supported; causal and sliding-window are."
        )


def _source(cls: type, config: Any, module: nn.Module, weights: dict[str, Tensor], eager: Any) -> CaptureSource:
    decoder = is_decoder(cls)
    accepted = module_inputs(module)
    if decoder:
        inputs = tuple(name for name in accepted if name in ("input_ids", "position_ids"))
    else:
        has_types = getattr(config, "type_vocab_size", 1) > 1
        wanted = ("input_ids", "attention_mask", *(("token_type_ids",) if has_types else ()))
        inputs = tuple(name for name in accepted if name in wanted)
    call = {"use_cache": False} if decoder else {}
    return CaptureSource(
        module=module,
        eager=eager,
        weights=weights,
        inputs=inputs,
        name=cls.__name__,
        context=_context_of(config),
        kind="decoder" if decoder else "encoder",
        vocab_size=config.vocab_size,
        call=call,
    )


def source_from_model(model: nn.Module) -> CaptureSource:
    """Capture source of a live transformers model; its tensors are shared, not copied.

    Args:
        model: A `PreTrainedModel` in memory.
    """
    register_attention()
    cls, config = type(model), model.config
    _refuse_unsupported(config, cls)
    shadow = copy.deepcopy(model, {id(t): nn.Parameter(t.to("meta"), requires_grad=False) for t in model.parameters()})
    implementation = _attention_implementation(cls)
    if implementation != config._attn_implementation:
        shadow.set_attn_implementation(implementation)
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return _source(cls, config, shadow.eval(), weights, lambda: model.eval())


def source_from_checkpoint(checkpoint: Checkpoint) -> CaptureSource:
    """Capture source of a model folder; weights stay mapped.

    Args:
        checkpoint: An open checkpoint.

    Raises:
        CaptureError: transformers does not know the model, or the weights do not fit it.
    """
    transformers = _transformers()
    register_attention()
    checkpoint.refuse_remote_code(transformers.CONFIG_MAPPING.keys())
    try:
        config = transformers.AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise CaptureError(
            f"[capture] {checkpoint.folder / 'config.json'}: transformers {transformers.__version__} cannot read it: "
            f"{str(error).splitlines()[0]}"
        ) from error
    cls = model_class(config)
    _refuse_unsupported(config, cls)
    with _parameters_on_meta():
        module = cls._from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation=_attention_implementation(cls)
        )
    module.eval()
    module.tie_weights()
    weights = _match_weights(checkpoint, module)
    if weights is None:
        # Stored under other names or in other shapes (experts merged at load): only transformers knows how.
        loaded = cls.from_pretrained(str(checkpoint.folder), dtype="auto", local_files_only=True)
        return source_from_model(loaded)
    return _source(cls, config, module, weights, lambda: _load_eager(module, weights))


def _load_eager(module: Any, weights: dict[str, Tensor]) -> nn.Module:
    """Put the mapped weights into `module` and give it its stock attention."""
    shared: dict[int, nn.Parameter] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                full = f"{path}.{name}" if path else name
                real = shared.setdefault(id(parameter), nn.Parameter(weights[full], requires_grad=False))
                owner._parameters[name] = real
        for name, buffer in list(owner._buffers.items()):
            full = f"{path}.{name}" if path else name
            if buffer is not None and full in weights:
                owner._buffers[name] = weights[full].to(buffer.dtype)
    if module.config._attn_implementation == ATTENTION_NAME:
        module.set_attn_implementation("eager")
    return module


def _match_weights(checkpoint: Checkpoint, module: Any) -> dict[str, Tensor] | None:
    """Stored tensor of every parameter and persistent buffer, or None if names do not correspond one to one."""
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    stored = set(checkpoint.names)
    aliases: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    weights: dict[str, Tensor] = {}
    missing: list[str] = []
    for names in aliases.values():
        candidates = [c for name in names for c in (name, name.removeprefix(prefix), prefix + name)]
        found = next((candidate for candidate in candidates if candidate in stored), None)
        if found is None:
            missing.append(names[0])
            continue
        if tuple(checkpoint.shape(found)) != shapes[names[0]]:
            if len(missing) == 0 and not _has_conversion(module):
                raise CaptureError(
                    f"[capture] {checkpoint.folder}: tensor {found} has shape {list(checkpoint.shape(found))}, but "
                    f"{type(module).__name__} built from config.json needs {list(shapes[names[0]])}. "
                    "The weights and config.json belong to different models."
                )
            return None
        for name in names:
            weights[name] = checkpoint.tensor(found)
    if missing:
        if _has_conversion(module):
            return None
        raise CaptureError(
            f"[capture] {checkpoint.folder}: {len(missing)} of {len(aliases)} parameters of {type(module).__name__} are "
            f"not in the weight files, first: {', '.join(missing[:3])}. The weights and config.json belong to "
            "different models, or a shard is missing."
        )
    persistent = {name for name in module.state_dict() if name not in shapes}
    for name in persistent:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in stored:
                weights[name] = checkpoint.tensor(candidate)
    return weights


def _has_conversion(module: Any) -> bool:
    """Whether transformers renames or merges this model's tensors while it loads them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return False
    return bool(get_model_conversion_mapping(module, add_legacy=False))


def open_checkpoint(folder: str | Path) -> tuple[Checkpoint, CaptureSource]:
    """Open a Hugging Face folder for capture.

    Args:
        folder: A folder with `config.json` and safetensors weights.

    Returns:
        The checkpoint and its capture source.
    """
    checkpoint = Checkpoint.open(folder)
    return checkpoint, source_from_checkpoint(checkpoint)
