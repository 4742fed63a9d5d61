"""Options of generation: their forms, defaults and files, and which are refused."""

from __future__ import annotations

import numpy as np
import pytest

from jettison.ir.errors import OptionError, UnsupportedError
from jettison.runtime.generation import generate
from jettison.runtime.generation_options import GenerationOptions
from tests.runtime.scripted_sessions import (
    seeded,
)

# --- options ---------------------------------------------------------------------------------------------------------


def test_options_are_brought_to_one_form():
    options = GenerationOptions(
        max_new_tokens=np.int64(4), temperature=2, top_p=1, eos_token_id=7, stop_strings="x", do_sample=True
    )
    assert options == GenerationOptions(
        max_new_tokens=4, temperature=2.0, top_p=1.0, eos_token_id=[7], stop_strings=["x"], do_sample=True
    )
    assert (options.eos_token_id, options.stop_strings, type(options.max_new_tokens)) == ((7,), ("x",), int)
    assert {options: 1}[options] == 1  # hashable


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, needs an integer of at least 1. Set max_new_tokens=20."),
        (
            {"max_new_tokens": True},
            "max_new_tokens: found True, needs an integer of at least 1. Set max_new_tokens=20.",
        ),
        ({"max_new_tokens": 2.0}, "max_new_tokens: found 2.0, needs an integer of at least 1. Set max_new_tokens=20."),
        ({"max_length": -1}, "max_length: found -1, needs an integer of at least 1. Set max_new_tokens instead."),
        ({"top_k": -1}, "top_k: found -1, needs an integer of at least 0. Set top_k=0 to keep all tokens."),
        ({"top_k": None}, "top_k: found None, needs an integer of at least 0. Set top_k=0 to keep all tokens."),
        ({"seed": -1}, "seed: found -1, needs an integer of at least 0. Set seed=0."),
        ({"seed": 2**63}, "seed: found 9223372036854775808, needs an integer below 2**63. Set seed=0."),
        ({"seed": "x"}, "seed: found 'x', needs an integer of at least 0. Set seed=0."),
        ({"pad_token_id": -1}, "pad_token_id: found -1, needs an integer of at least 0. Leave pad_token_id out."),
        ({"do_sample": 1}, "do_sample: found 1, needs True or False. Set do_sample=True to sample."),
        ({"temperature": -0.5}, "temperature: found -0.5, needs a number from 0 to 1e6. Set temperature=1.0."),
        ({"temperature": float("nan")}, "temperature: found nan, needs a number from 0 to 1e6. Set temperature=1.0."),
        ({"temperature": float("inf")}, "temperature: found inf, needs a number from 0 to 1e6. Set temperature=1.0."),
        (
            {"temperature": 0, "do_sample": True},
            "temperature: found 0.0, needs at least 1e-6 to sample, because logits are divided by it. Set "
            "do_sample=False for the most likely token.",
        ),
        ({"top_p": 1.5}, "top_p: found 1.5, needs a number from 0 to 1. Set top_p=1.0 to keep all tokens."),
        ({"min_p": -0.1}, "min_p: found -0.1, needs a number from 0 to 1. Set min_p=0.0 to keep all tokens."),
        ({"min_p": True}, "min_p: found True, needs a number from 0 to 1. Set min_p=0.0 to keep all tokens."),
        (
            {"repetition_penalty": 0},
            "repetition_penalty: found 0, needs a number from 1e-6 to 1e6. Set repetition_penalty=1.0 to go without.",
        ),
        (
            {"repetition_penalty": "1.1"},
            "repetition_penalty: found '1.1', needs a number from 1e-6 to 1e6. Set repetition_penalty=1.0 to go "
            "without.",
        ),
        (
            {"num_return_sequences": 0},
            "num_return_sequences: found 0, needs an integer of at least 1. Set num_return_sequences=1.",
        ),
        (
            {"num_return_sequences": 2},
            "num_return_sequences: found 2, needs 1 with do_sample=False, because the most likely tokens are the same "
            "every time. Set do_sample=True, or num_return_sequences=1.",
        ),
        ({"top_p": "a"}, "top_p: found 'a', needs a number from 0 to 1. Set top_p=1.0 to keep all tokens."),
        (
            {"stop_strings": ["a", ""]},
            "stop_strings: found ['a', ''], needs one or more strings that are not empty. Leave stop_strings out to "
            "stop at none.",
        ),
        (
            {"stop_strings": [3]},
            "stop_strings: found [3], needs one or more strings that are not empty. Leave stop_strings out to "
            "stop at none.",
        ),
        (
            {"stop_strings": 3},
            "stop_strings: found 3, needs one or more strings that are not empty. Leave stop_strings out to "
            "stop at none.",
        ),
        (
            {"eos_token_id": [1, -1]},
            "eos_token_id: found [1, -1], needs a token id or a list of them. Set eos_token_id=[] to never stop at "
            "one.",
        ),
        (
            {"eos_token_id": "x"},
            "eos_token_id: found 'x', needs a token id or a list of them. Set eos_token_id=[] to never stop at one.",
        ),
    ],
    ids=str,
)
def test_option_values_out_of_range_are_refused(values, message):
    with pytest.raises(OptionError) as caught:
        GenerationOptions(**values)
    assert str(caught.value) == f"[generate] {message}"


def test_overrides_win_over_the_file_and_the_file_over_the_defaults():
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2], "pad_token_id": -1}
    options = GenerationOptions.from_config(config, temperature=0.3, max_new_tokens=5, top_p=None)
    assert options == GenerationOptions(
        max_new_tokens=5, do_sample=True, temperature=0.3, top_p=0.9, top_k=50, eos_token_id=[1, 2]
    )
    assert GenerationOptions.from_config(config, eos_token_id=[], top_k=0).eos_token_id == ()
    assert GenerationOptions.from_config() == GenerationOptions.from_config({}) == GenerationOptions()


def test_penalty_min_p_and_sequences_of_the_file_are_honoured():
    config = {"do_sample": True, "repetition_penalty": 1.1, "min_p": 0.05, "num_return_sequences": 2, "top_k": 0}
    options = GenerationOptions.from_config(config, max_new_tokens=4)
    assert (options.repetition_penalty, options.min_p, options.num_return_sequences) == (1.1, 0.05, 2)
    assert len(generate(seeded(), [[1]], options).rows) == 2
    off = {"repetition_penalty": 1.0, "min_p": 0.0, "num_return_sequences": 1}
    assert GenerationOptions.from_config(config, **off) == GenerationOptions(do_sample=True, top_k=0)
    assert GenerationOptions.from_config({**config, **dict.fromkeys(off)}) == GenerationOptions(do_sample=True, top_k=0)


def test_lengths_of_the_call_win_over_lengths_of_the_file():
    assert GenerationOptions.from_config({"max_length": 4096}).max_length == 4096
    opener = seeded()
    options = GenerationOptions.from_config({"max_length": 4096}, max_new_tokens=3)
    assert len(generate(opener, [[1]], options).rows[0].token_ids) == 3
    options = GenerationOptions.from_config({"max_new_tokens": 30}, max_length=5)
    assert len(generate(opener, [[1]], options).rows[0].token_ids) == 4


def test_every_name_of_transformers_is_known_and_its_defaults_are_neutral():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig()
    names = {name for name in vars(theirs) if not name.startswith("_")}
    defaults = theirs._get_default_generation_params() | {"max_length": 40}
    known = {"user_set_attributes"}  # bookkeeping of newer versions, if any
    options = GenerationOptions.from_config(theirs.to_dict() | defaults, **dict.fromkeys(names - known))
    assert options == GenerationOptions(max_length=40)
    GenerationOptions.from_config(theirs.to_dict(), **{**defaults, "do_sample": True})


def test_foreign_names_in_the_file_are_ignored():
    config = {"_from_model_config": True, "user_token_id": 195, "cache_implementation": "hybrid", "use_cache": False}
    config |= {"output_scores": True, "num_assistant_tokens": 4, "transformers_version": "4.40.0"}
    assert GenerationOptions.from_config(config) == GenerationOptions()


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (
            {"no_repeat_ngram_size": 3},
            {},
            "no_repeat_ngram_size: found 3 (in generation_config.json), which jettison does not do (yet) and which "
            "would change the output. Set no_repeat_ngram_size=0 to go without.",
        ),
        (
            {},
            {"num_beams": 4},
            "num_beams: found 4, which jettison does not do (yet) and which would change the output. Use "
            "do_sample=True for varied text, or set num_beams=1 to go without.",
        ),
        (
            {"do_sample": True},
            {"typical_p": 0.9},
            "typical_p: found 0.9, which jettison does not do (yet) and which would change the output. Use top_p, or "
            "set typical_p=1 to go without.",
        ),
        (
            {},
            {"forced_bos_token_id": 0},
            "forced_bos_token_id: found 0, which jettison does not do (yet) and which would change the output. Leave "
            "forced_bos_token_id out.",
        ),
        (
            {},
            {"cache_implementation": "quantized"},
            "cache_implementation: found 'quantized', which jettison does not do (yet) and which would change the "
            "output. Choose the cache when optimising, with the pass cache-kv{policy=...}, or leave "
            "cache_implementation out.",
        ),
        (
            {},
            {"suppress_tokens": [4]},
            "suppress_tokens: found [4], which jettison does not do (yet) and which would change the output. Set "
            "suppress_tokens=[] to go without.",
        ),
    ],
    ids=str,
)
def test_settings_that_would_change_the_output_are_refused(config, overrides, message):
    with pytest.raises(UnsupportedError) as caught:
        GenerationOptions.from_config(config, **overrides)
    assert str(caught.value) == f"[generate] {message}"


def test_neutral_values_are_accepted():
    neutral = {"no_repeat_ngram_size": 0, "num_beams": 1, "eta_cutoff": 0.0, "typical_p": 1.0, "suppress_tokens": []}
    config = {"no_repeat_ngram_size": 3, "num_beams": 4, "eta_cutoff": 0.1}
    assert GenerationOptions.from_config(config, do_sample=True, **neutral) == GenerationOptions(do_sample=True)
    # Greedy decoding never reads the sampling filters, here as in transformers.
    assert GenerationOptions.from_config({"typical_p": 0.1, "temperature": 0.0}).temperature == 0.0


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokens", "Did you mean max_new_tokens?"),
        ("temprature", "Did you mean temperature?"),
        ("eos_token", "Did you mean eos_token_id?"),
        ("repetition_penalti", "Did you mean repetition_penalty?"),
        ("guidance_scal", "Did you mean guidance_scale?"),
        (
            "zzz",
            "The options are do_sample, eos_token_id, max_length, max_new_tokens, min_p, num_return_sequences, "
            "pad_token_id, repetition_penalty, seed, stop_strings, temperature, top_k, top_p.",
        ),
    ],
)
def test_unknown_options_list_close_matches(name, hint):
    for value in (3, None):
        with pytest.raises(OptionError) as caught:
            GenerationOptions.from_config({}, **{name: value})
        assert str(caught.value) == f"[generate] {name}: unknown option, needs a name of transformers' generate. {hint}"
