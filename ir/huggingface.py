"""Hugging Face models for capture: attention through the library's own extension point, weights mapped from the files.

`transformers` is optional and imported only here and in the tokenizer.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jettison.ir.capture_source import DEFAULT_CONTEXT, CaptureSource, module_inputs
from jettison.ir.checkpoint import Checkpoint
from jettison.ir.constants import Packed
from jettison.ir.errors import CaptureError, UnsupportedError
from jettison.ir.huggingface_experts import experts_forward
from jettison.ir.ops.attention import visible_keys
from jettison.ir.packed_linears import replace_packed_linears

# Under this name transformers finds our attention, mask builder and experts.
IMPLEMENTATION = "jettison"
OLDEST_TRANSFORMERS = "5.2"
# Arguments of an attention function that do not change what it computes without a cache and in eval mode.
_NEUTRAL_ATTENTION_ARGUMENTS = frozenset(
    [
        "dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
        "past_key_values", "past_key_value", "return_dict", "layer_idx", "is_causal", "training", "logits_to_keep",
        "labels", "position_embeddings", "output_router_logits", "deterministic",
    ]
)  # fmt: skip
_CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length",
    "context_length",
)  # fmt: skip
_LAYER_TYPES = frozenset(["full_attention", "sliding_attention", "attention"])
_LAYER_TYPE_NAMES = ("layer_types", "layers_block_type", "block_types")
_VISIBLE = "_jettison_visible"


class _Visible(NamedTuple):
    """Which keys a mask of the library shows: those of `visible_keys`."""

    is_causal: bool
    window: int


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
        raise UnsupportedError(
            f"its attention takes {', '.join(sorted(strange))}, which jettison's does not have. Use a model with "
            "plain, sliding-window, soft-capped or sink attention."
        )
    visible, key_valid = getattr(attention_mask, _VISIBLE, None), None
    if visible is not None:
        # The window of the mask decides, as in eager mode; `sliding_window` is a hint for kernels that build no mask.
        key_valid = attention_mask if attention_mask.dim() == 2 else None  # type: ignore[union-attr]
    elif attention_mask is None and not sliding_window:
        is_causal = others.get("is_causal")
        visible = _Visible(bool(getattr(module, "is_causal", True) if is_causal is None else is_causal), 0)
    else:
        raise UnsupportedError(
            "its attention mask is neither causal, nor a causal sliding window, nor padding, or is not made by "
            "transformers.masking_utils. Use a model with such a mask."
        )
    out = torch.ops.jettison.attention(
        query, key, value, None, None, key_valid, s_aux,
        float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        visible.is_causal, visible.window, float(softcap or 0.0),
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _attention_mask(
    *_: Any,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **__: Any,
) -> Tensor:
    """What a captured model calls instead of building a mask: only which keys are real is data.

    Returns:
        The validity of the keys, or an empty tensor; marked with what the mask shows, for `_attention_forward`.
    """
    # A fresh tensor: layers with and without a window share the attention mask they start from.
    mask = torch.empty(1, 1, 1, 0, dtype=torch.bool) if attention_mask is None else attention_mask.clone()
    setattr(mask, _VISIBLE, _visible_by(mask_function, _context_of(config)))
    return mask


def _visible_by(mask_function: Callable[..., Tensor] | None, context: int) -> _Visible | None:
    """Find out what a mask function of (batch, head, query, key) indices shows; None if it is none of ours.

    Some models build masks that no layer reads, so this is no error yet.
    """
    if mask_function is None:
        return _Visible(True, 0)
    # A new thread is outside the trace: what is computed there is computed now.
    with ThreadPoolExecutor(1) as executor:
        probed = executor.submit(_probe, mask_function, context)
        # A failure means that the mask function reads tensors of the trace: it depends on the input.
        return None if probed.exception() is not None else probed.result()


def _probe(mask_function: Callable[..., Tensor], context: int) -> _Visible | None:
    """What a mask function shows within the context, or None if `jettison::attention` cannot show the same."""
    zero, keys, last = torch.zeros((), dtype=torch.int64), torch.arange(context), context - 1

    def row(query: int) -> Tensor:
        return torch.broadcast_to(mask_function(zero, zero, torch.tensor(query), keys), (context,))

    is_causal = context > 1 and not bool(row(0)[-1])
    window = 0 if bool(row(last).all()) else int(row(last).sum())
    for query in {0, min(1, last), min(window, last), context // 2, last}:
        shown = visible_keys(torch.tensor([[query]]), keys[None], None, is_causal, window)[0, 0]
        if not row(query).equal(shown):
            return None
    return _Visible(is_causal, window)


def register_implementations() -> None:
    """Register our attention, mask builder and experts in transformers.

    Raises:
        CaptureError: transformers is missing or too old.
    """
    transformers = _transformers()
    try:
        transformers.AttentionInterface.register(IMPLEMENTATION, _attention_forward)
        transformers.AttentionMaskInterface.register(IMPLEMENTATION, _attention_mask)
        from transformers.integrations.moe import ExpertsInterface

        ExpertsInterface.register(IMPLEMENTATION, experts_forward)
    except (AttributeError, ImportError) as error:
        raise CaptureError(
            f"[capture] transformers {transformers.__version__} is too old: needed {OLDEST_TRANSFORMERS} or newer, "
            "where a model's attention and experts can be replaced. Upgrade it with: pip install -U transformers"
        ) from error


@contextmanager
def _one_sequence_per_row() -> Iterator[None]:
    """Without an attention mask, transformers looks for several sequences packed in a row; a trace would keep that."""
    from transformers import masking_utils

    original = getattr(masking_utils, "find_packed_sequence_indices", None)
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        if original is None:
            del masking_utils.find_packed_sequence_indices
        else:
            masking_utils.find_packed_sequence_indices = original


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside allocate no parameter; their buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _refuse_encoder_decoder(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"[capture] {config.model_type} is an encoder-decoder model: needed a decoder or an encoder, which read "
            "one sequence. Load one half by itself (for instance its ...EncoderModel class) and pass that."
        )


def model_class(config: Any) -> type[nn.Module]:
    """The class a config names, or the library's causal or base class for its model type.

    Raises:
        CaptureError: The installed transformers does not know the model type.
        UnsupportedError: An encoder-decoder model.
    """
    transformers = _transformers()
    _refuse_encoder_decoder(config)
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
    """Whether a class, or one it derives from, is a causal language model of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    known = {name for entry in names for name in ((entry,) if isinstance(entry, str) else entry)}
    return any(base.__name__ in known or base.__name__ == "GenerationMixin" for base in cls.__mro__)


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    """Settings of the rotary embeddings: one dictionary, or one per layer type."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]


def _context_of(config: Any) -> int:
    found = (getattr(config, name, None) for name in _CONTEXT_NAMES)
    context = next((value for value in found if isinstance(value, int) and value > 0), DEFAULT_CONTEXT)
    for settings in _rope_settings(config):
        # Beyond this length, longrope turns all positions by other angles, also those of keys that are cached.
        if settings.get("rope_type") == "longrope":
            context = min(context, settings.get("original_max_position_embeddings") or context)
    return context


def _attention_implementation(cls: type) -> str:
    if getattr(cls, "_supports_attention_backend", False):
        return IMPLEMENTATION
    # Models that write their attention out are exported as they are; a pass raises what it recognises.
    return "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"


def _refuse_unsupported(config: Any, cls: type) -> None:
    """Refuse what could be traced, but not run token by token, and what is no language model."""
    if config.get_text_config() is not config:
        raise UnsupportedError(
            f"[capture] {cls.__name__} is a model of several modalities: needed one that reads token ids alone. Load "
            "its language model by itself (often a ...ForCausalLM class that reads the same folder) and pass that."
        )
    if not is_decoder(cls):
        return
    for name in _LAYER_TYPE_NAMES:
        for layer, kind in enumerate(getattr(config, name, None) or ()):
            if isinstance(kind, str) and kind not in _LAYER_TYPES:
                raise UnsupportedError(
                    f"[capture] layer {layer} of {cls.__name__} is of type {kind!r}: needed full or sliding-window "
                    "attention in every layer, because keys and values are all that a program keeps between tokens. "
                    "Use a model of another family."
                )


def _refuse_convolutions(module: nn.Module) -> None:
    for path, each in module.named_modules():
        if isinstance(each, nn.Conv1d):
            raise UnsupportedError(
                f"[capture] {path} ({type(each).__name__}) in {type(module).__name__} mixes neighbouring tokens: "
                "needed attention for that, because keys and values are all that a program keeps between tokens. Use "
                "a model of another family."
            )


def _keep_rotary_angles(module: nn.Module) -> None:
    """Take dynamic rotary embeddings as they are up to the context: they look at the longest position to rescale."""
    for each in module.modules():
        kinds = getattr(each, "rope_type", None)
        if isinstance(kinds, str) and "dynamic" in kinds:
            each.rope_type = "default"
        elif isinstance(kinds, dict):
            each.rope_type = {layer: "default" if "dynamic" in kind else kind for layer, kind in kinds.items()}


def _source(cls: type, config: Any, module: nn.Module, weights: dict[str, Tensor], eager: Any) -> CaptureSource:
    decoder = is_decoder(cls)
    accepted = module_inputs(module)
    if decoder:
        _refuse_convolutions(module)
        inputs = tuple(name for name in accepted if name in ("input_ids", "position_ids"))
    else:
        has_types = getattr(config, "type_vocab_size", 1) > 1
        wanted = ("input_ids", "attention_mask", *(("token_type_ids",) if has_types else ()))
        inputs = tuple(name for name in accepted if name in wanted)
    _keep_rotary_angles(module)
    parameters = inspect.signature(module.forward).parameters
    passes_on = decoder and any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    call = {"use_cache": False} if passes_on or "use_cache" in parameters else {}
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
        tracing=_one_sequence_per_row,
    )


def source_from_model(model: nn.Module) -> CaptureSource:
    """Capture source of a live transformers model; its tensors are shared, not copied, and it is not changed.

    Args:
        model: A `PreTrainedModel` in memory.

    Raises:
        CaptureError: transformers is too old.
        UnsupportedError: A kind of model that is not handled.
    """
    register_implementations()
    cls, config = type(model), model.config
    _refuse_encoder_decoder(config)
    _refuse_unsupported(config, cls)
    shadow = copy.deepcopy(model, {id(t): nn.Parameter(t.to("meta"), requires_grad=False) for t in model.parameters()})
    implementation = _attention_implementation(cls)
    if implementation != config._attn_implementation:
        shadow.set_attn_implementation(implementation)
    if cls._can_set_experts_implementation():
        shadow.set_experts_implementation(IMPLEMENTATION)
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return _source(cls, config, shadow, weights, lambda: model)


def source_from_checkpoint(checkpoint: Checkpoint) -> CaptureSource:
    """Capture source of a model folder; weights stay mapped.

    Args:
        checkpoint: An open checkpoint.

    Raises:
        CaptureError: transformers does not know the model, or the weights do not fit it.
        UnsupportedError: A kind of model that is not handled.
    """
    register_implementations()
    config = _config_of(checkpoint)
    cls = model_class(config)
    _refuse_unsupported(config, cls)
    module = _empty_model(cls, config, checkpoint)
    packed: dict[str, Packed] = {}
    in_packed: set[str] = set()
    if checkpoint.packing is not None:
        packed, in_packed = replace_packed_linears(module, checkpoint, _base_prefix(module))
    weights = _match_weights(checkpoint, module, in_packed)
    if weights is None and checkpoint.packing is not None:
        raise UnsupportedError(
            f"[capture] {checkpoint.folder}: the tensors of {cls.__name__} are stored under other names than the model "
            f"has, beside weights packed by {checkpoint.packing.method}; needed the model's own names. Use the "
            "unquantised checkpoint that this one was made from."
        )
    if weights is None:
        # Stored under other names or in other shapes (experts merged at load): only transformers knows how.
        return source_from_model(_load_by_transformers(cls, checkpoint))
    source = _source(cls, config, module, weights, lambda: _load_eager(module, weights))
    source.packed = packed
    return source


def _config_of(checkpoint: Checkpoint) -> Any:
    transformers = _transformers()
    checkpoint.refuse_remote_code(transformers.CONFIG_MAPPING.keys())
    file, kind = checkpoint.folder / "config.json", checkpoint.config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        written_by = checkpoint.config.get("transformers_version")
        raise CaptureError(
            f"[capture] {file}: model_type {kind!r} is unknown to transformers {transformers.__version__}"
            + (f"; the model was saved with {written_by}" if written_by else "")
            + ". Upgrade transformers, or load the model yourself and pass the module."
        )
    try:
        return transformers.AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
    except Exception as error:  # each configuration class checks its fields in its own way
        raise CaptureError(
            f"[capture] {file}: transformers {transformers.__version__} refuses it: {_first_line(error)}. Correct the "
            "file, download it again, or upgrade transformers."
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _empty_model(cls: Any, config: Any, checkpoint: Checkpoint) -> Any:
    """The model a config describes, its parameters on the meta device."""
    options: dict[str, Any] = {"attn_implementation": _attention_implementation(cls)}
    if cls._can_set_experts_implementation():
        options["experts_implementation"] = IMPLEMENTATION
    try:
        with _parameters_on_meta():
            module = cls._from_config(copy.deepcopy(config), dtype=torch.float32, **options)
        module.eval()
        module.tie_weights()
    except Exception as error:  # whatever the constructor of a model raises
        raise CaptureError(
            f"[capture] {checkpoint.folder / 'config.json'}: {cls.__name__} cannot be built from it: "
            f"{type(error).__name__}: {_first_line(error)}. Correct the file, or install what that model needs."
        ) from error
    return module


def _load_by_transformers(cls: Any, checkpoint: Checkpoint) -> nn.Module:
    try:
        model, info = cls.from_pretrained(
            str(checkpoint.folder), dtype="auto", local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # whatever loading raises
        raise CaptureError(
            f"[capture] {checkpoint.folder}: transformers cannot load {cls.__name__} from it: "
            f"{type(error).__name__}: {_first_line(error)}. The weights and config.json belong to different models, or "
            "a shard is missing."
        ) from error
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(name) for name in info.get(what) or ())
        if names:
            _refuse_weights(checkpoint, cls, what.removesuffix("_keys"), names)
    return model


def _load_eager(module: Any, weights: dict[str, Tensor]) -> nn.Module:
    """Put the mapped weights into `module` and give it its stock attention and experts."""
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
    if module.config._attn_implementation == IMPLEMENTATION:
        module.set_attn_implementation("eager")
    if module._can_set_experts_implementation():
        module.set_experts_implementation("eager")
    return module


def _base_prefix(module: Any) -> str:
    return f"{getattr(module, 'base_model_prefix', '')}."


def _match_weights(checkpoint: Checkpoint, module: Any, taken: set[str]) -> dict[str, Tensor] | None:
    """Stored tensor of every parameter and persistent buffer, or None if only transformers can convert them.

    Args:
        checkpoint: Where they are stored.
        module: The model.
        taken: Stored tensors that are in the module already.

    Raises:
        CaptureError: A tensor is missing, has another shape, or belongs to a part that the model does not have.
    """
    prefix = _base_prefix(module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    buffers = [[name] for name in module.state_dict() if name not in parameters]
    weights: dict[str, Tensor] = {}
    missing, misshaped, used = [], [], set(taken)
    for names in (*aliases.values(), *buffers):
        # Several stored copies of a tied tensor are all accounted for; the first is read.
        stored = [spelling for name in names for spelling in _spellings(name, prefix) if spelling in checkpoint]
        used.update(stored)
        if not stored:
            missing += names[:1] if names[0] in parameters else []
        elif names[0] in parameters and tuple(checkpoint.shape(stored[0])) != tuple(parameters[names[0]].shape):
            misshaped.append(
                f"{stored[0]} {list(checkpoint.shape(stored[0]))} (config.json says {list(parameters[names[0]].shape)})"
            )
        else:
            weights.update({name: checkpoint.tensor(stored[0]) for name in names})
    if (missing or misshaped) and _has_conversion(module, checkpoint):
        return None
    extra = [name for name in checkpoint.names if name not in used and not _is_harmless(name, module, prefix)]
    for what, found in (("missing", missing), ("mismatched", misshaped), ("unexpected", extra)):
        if found:
            _refuse_weights(checkpoint, type(module), what, found)
    return weights


def _spellings(name: str, prefix: str) -> tuple[str, ...]:
    """Names under which a tensor may be stored: saved from the base model, or from the model with a head."""
    return name, name.removeprefix(prefix), prefix + name


def _is_harmless(name: str, module: Any, prefix: str) -> bool:
    """Whether a stored tensor that the model does not take may be left out, as transformers does without a word."""
    ignored = [*(module._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    if any(re.search(pattern, name) for pattern in ignored):
        return True
    # The head of the model that a base model was saved with (`cls.predictions.*` beside `bert.*`).
    is_base_model = not hasattr(module, prefix.removesuffix("."))
    first = name.removeprefix(prefix).split(".")[0]
    return is_base_model and not hasattr(module, first)


def _refuse_weights(checkpoint: Checkpoint, cls: type, what: str, names: list[str]) -> None:
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    needed = {
        "missing": "every parameter of the model that config.json describes",
        "mismatched": "the shapes that config.json describes",
        "unexpected": "no tensors beyond the model that config.json describes",
    }[what]
    raise CaptureError(
        f"[capture] {checkpoint.folder}: {what} tensors for {cls.__name__}: {listed}; needed {needed}. The weights and "
        "config.json belong to different models, or the folder is incomplete: download it again."
    )


def _has_conversion(module: Any, checkpoint: Checkpoint) -> bool:
    """Whether transformers renames or merges this model's tensors while it loads them."""
    if any(name.endswith(("LayerNorm.gamma", "LayerNorm.beta", "weight_g", "weight_v")) for name in checkpoint.names):
        return True  # spellings of the first releases
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
