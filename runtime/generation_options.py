"""The options of one generation, by the names of `generate` in transformers 5.

What jettison does not do and would change the output is refused, never dropped silently.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jettison.ir.errors import OptionError, UnsupportedError

DEFAULT_NEW_TOKENS = 20
"""New tokens when neither max_new_tokens nor max_length is given, as in transformers."""

# Names of transformers that would change the tokens, and the values at which they do not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["assistant_model", "custom_generate", "dola_layers", "exponential_decay_length_penalty"], ()),
    **dict.fromkeys(["forced_bos_token_id", "forced_eos_token_id", "prefix_allowed_tokens_fn"], ()),
    "watermarking_config": (),
    **dict.fromkeys(["bad_words_ids", "begin_suppress_tokens", "constraints", "force_words_ids"], ([],)),
    **dict.fromkeys(["logits_processor", "stopping_criteria", "suppress_tokens"], ([],)),
    "sequence_bias": ({}, []),
    **dict.fromkeys(["diversity_penalty", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"], (0,)),
    **dict.fromkeys(["no_repeat_ngram_size", "penalty_alpha"], (0,)),
    **dict.fromkeys(["encoder_repetition_penalty", "guidance_scale", "num_beam_groups", "num_beams"], (1,)),
    **dict.fromkeys(["remove_invalid_values", "token_healing"], (False,)),
}
# The same for names that transformers reads only when do_sample is set.
_UNSUPPORTED_WHEN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "typical_p": (1,),
}
# Names that change what is returned, when it stops or how the cache is kept, but not which tokens are likely: refused
# when asked for in a call, ignored in a generation_config.json written for another library.
_UNSUPPORTED_IN_CALLS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["cache_config", "cache_implementation", "max_time"], ()),
    **dict.fromkeys(["output_attentions", "output_hidden_states", "output_logits", "output_scores"], (False,)),
    "return_dict_in_generate": (False,),
}
# Names without effect on one plain decoder: of beam search, speculation, encoder-decoders, compilation and bookkeeping.
_IGNORED = (
    "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind bos_token_id "
    "compile_config continuous_batching_config decoder_start_token_id disable_compile early_stopping is_assistant "
    "length_penalty low_memory max_cache_len max_matching_ngram_size num_assistant_tokens "
    "num_assistant_tokens_schedule prefill_chunk_size prompt_lookup_num_tokens renormalize_logits speculation_type "
    "target_lookbehind transformers_version use_cache use_mtp"
)
_NEAREST = {
    "cache_implementation": "Choose the cache when optimising, with the pass cache-kv{policy=...}",
    "num_beams": "Use do_sample=True for varied text",
    "typical_p": "Use top_p",
    "stopping_criteria": "Use stop_strings or eos_token_id",
    "max_time": "Use max_new_tokens, or stop reading from a stream",
}


@dataclass(frozen=True)
class GenerationOptions:
    """How to continue a prompt, in the names of transformers.

    Attributes:
        max_new_tokens: most new tokens per row, at least 1. Wins over max_length; None with no max_length means 20.
        max_length: most tokens of the longest row, prompt included, at least 1.
        do_sample: draw tokens at random; False takes the most likely one and ignores temperature, top_k, top_p and
            min_p.
        temperature: divides the logits; 0 to 1e6, at least 1e-6 when sampling.
        top_k: sample among the k best tokens; 0 means all. transformers samples with 50 unless told otherwise.
        top_p: sample among the best tokens that hold this much probability, 0 to 1; 1 means all.
        min_p: sample among the tokens at least this many times as likely as the best one, 0 to 1; 0 means all.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that the row already
            holds, prompt included, also without sampling; 1e-6 to 1e6, 1 means none, below 1 rewards repetition.
        num_return_sequences: continuations of each prompt, at least 1; more than 1 need do_sample. Those of one prompt
            follow each other in the result.
        seed: of the draws, 0 to 2**63 - 1; None follows torch's default generator.
        stop_strings: end a row when its new text contains one of them; the text is cut before it. Needs a tokenizer.
            (transformers also counts one that begins in the prompt; that would leave nothing to cut.)
        eos_token_id: token id or ids that end a row; the empty list means none. Kept as a tuple.
        pad_token_id: what finished rows are fed while the others go on; it has no effect on the result.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    seed: int | None = None
    stop_strings: str | Sequence[str] | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Check every value and bring it to one form."""
        _set_integer(self, "max_new_tokens", 1, f"Set max_new_tokens={DEFAULT_NEW_TOKENS}", optional=True)
        _set_integer(self, "max_length", 1, "Set max_new_tokens instead", optional=True)
        _set_integer(self, "top_k", 0, "Set top_k=0 to keep all tokens")
        _set_integer(self, "num_return_sequences", 1, "Set num_return_sequences=1")
        _set_integer(self, "seed", 0, "Set seed=0", optional=True)
        _set_integer(self, "pad_token_id", 0, "Leave pad_token_id out", optional=True)
        if self.seed is not None and self.seed >= 2**63:
            raise _wrong("seed", self.seed, "an integer below 2**63", "Set seed=0")
        if not isinstance(self.do_sample, bool):
            raise _wrong("do_sample", self.do_sample, "True or False", "Set do_sample=True to sample")
        _set_number(self, "temperature", 0.0, 1e6, "a number from 0 to 1e6", "Set temperature=1.0")
        # Below this, logits / temperature overflows f32.
        if self.do_sample and self.temperature < 1e-6:
            needed = "at least 1e-6 to sample, because logits are divided by it"
            raise _wrong("temperature", self.temperature, needed, "Set do_sample=False for the most likely token")
        _set_number(self, "top_p", 0.0, 1.0, "a number from 0 to 1", "Set top_p=1.0 to keep all tokens")
        _set_number(self, "min_p", 0.0, 1.0, "a number from 0 to 1", "Set min_p=0.0 to keep all tokens")
        # Beyond these, a penalised logit may leave f32.
        needed = "a number from 1e-6 to 1e6"
        _set_number(self, "repetition_penalty", 1e-6, 1e6, needed, "Set repetition_penalty=1.0 to go without")
        if self.num_return_sequences > 1 and not self.do_sample:
            needed = "1 with do_sample=False, because the most likely tokens are the same every time"
            fix = "Set do_sample=True, or num_return_sequences=1"
            raise _wrong("num_return_sequences", self.num_return_sequences, needed, fix)
        object.__setattr__(self, "stop_strings", as_strings(self.stop_strings))
        object.__setattr__(self, "eos_token_id", as_token_ids(self.eos_token_id))

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None, **overrides: Any) -> GenerationOptions:
        """Options of one call: what the caller asks for, else what the model's authors chose, else the defaults.

        An override of None means "not given", as in transformers; switch a value of the file off with its neutral value
        (`top_k=0`, `eos_token_id=[]`, `repetition_penalty=1.0`). Names in the file that neither jettison nor
        transformers knows are ignored, as transformers does.

        Args:
            config: content of generation_config.json, None where the model has none.
            overrides: by the names of transformers.

        Raises:
            OptionError: an unknown override, or a value out of range.
            UnsupportedError: a setting that jettison does not have and that would change the output.
        """
        known = {f.name for f in fields(cls)}
        given = {name: value for name, value in overrides.items() if value is not None}
        for name in overrides:
            _refuse_unknown(name, known)
        stored = {name: value for name, value in (config or {}).items() if value is not None}
        if stored.get("pad_token_id") == -1:
            del stored["pad_token_id"]  # older files write "none" so
        if "max_length" in given and "max_new_tokens" not in given:
            stored.pop("max_new_tokens", None)
        values = stored | given
        options = cls(**{name: value for name, value in values.items() if name in known})
        for name, neutral in (_UNSUPPORTED | (_UNSUPPORTED_WHEN_SAMPLING if options.do_sample else {})).items():
            _refuse_unsupported(name, values, neutral, "" if name in given else " (in generation_config.json)")
        for name, neutral in _UNSUPPORTED_IN_CALLS.items():
            _refuse_unsupported(name, given, neutral, "")
        return options


def _wrong(name: str, found: object, needed: str, fix: str) -> OptionError:
    return OptionError(f"[generate] {name}: found {found!r}, needs {needed}. {fix}.")


def _set_integer(options: GenerationOptions, name: str, least: int, fix: str, optional: bool = False) -> None:
    value = getattr(options, name)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise _wrong(name, value, f"an integer of at least {least}", fix)
    object.__setattr__(options, name, int(value))


def _set_number(options: GenerationOptions, name: str, least: float, most: float, needed: str, fix: str) -> None:
    value = getattr(options, name)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= value <= most:
        raise _wrong(name, value, needed, fix)
    object.__setattr__(options, name, float(value))


def as_strings(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """The one form of stop_strings.

    Raises:
        OptionError: not strings, or an empty one.
    """
    strings = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) and string for string in strings):
        needed = "one or more strings that are not empty"
        raise _wrong("stop_strings", value, needed, "Leave stop_strings out to stop at none")
    return tuple(strings)


def as_token_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """The one form of eos_token_id.

    Raises:
        OptionError: not token ids.
    """
    ids = () if value is None else tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise _wrong("eos_token_id", value, "a token id or a list of them", "Set eos_token_id=[] to never stop at one")
    return tuple(int(i) for i in ids)


def _refuse_unknown(name: str, known: set[str]) -> None:
    other = (
        known
        | set(_IGNORED.split())
        | _UNSUPPORTED.keys()
        | _UNSUPPORTED_WHEN_SAMPLING.keys()
        | _UNSUPPORTED_IN_CALLS.keys()
    )
    if name in other:
        return
    close = difflib.get_close_matches(name, known, cutoff=0.7) or difflib.get_close_matches(name, other, cutoff=0.7)
    hint = f"Did you mean {', '.join(close)}?" if close else f"The options are {', '.join(sorted(known))}."
    raise OptionError(f"[generate] {name}: unknown option, needs a name of transformers' generate. {hint}")


def _refuse_unsupported(name: str, values: Mapping[str, Any], neutral: tuple[Any, ...], source: str) -> None:
    value = values.get(name)
    if value is None or any(value == allowed for allowed in neutral):
        return
    off = f"set {name}={neutral[0]!r} to go without" if neutral else f"leave {name} out"
    nearest = f"{_NEAREST[name]}, or {off}" if name in _NEAREST else off[0].upper() + off[1:]
    raise UnsupportedError(
        f"[generate] {name}: found {value!r}{source}, which jettison does not do (yet) and which would change the "
        f"output. {nearest}."
    )
