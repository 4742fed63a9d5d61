"""Option dataclasses to and from specs: types, canonical text, flat options, and every error word for word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jettison.ir.errors import OptionError, PassError
from jettison.passes.grammar import Option, Range, RangeEntry, RangeMap, Scalar, Spec, format_pipeline, parse_pipeline
from jettison.passes.options import ByRange, build, describe, lookup, option, parse_bytes, to_spec
from tests.passes.option_classes import (
    PASSES,
    REGISTRIES,
    CacheKV,
    EveryType,
    Full,
    Kivi,
    Policy,
    QuantizeWeights,
    SnapKV,
    Unprintable,
    build_all,
    build_one,
    canonical,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flag=true", EveryType(flag=True)),
        ("count=-3", EveryType(count=-3)),
        ("ratio=0.25", EveryType(ratio=0.25)),
        ("ratio=2", EveryType(ratio=2.0)),
        ("keep=0.3", EveryType(keep=0.3)),
        ("keep=auto", EveryType(keep="auto")),
        ("keep='auto'", EveryType(keep="auto")),
        ("rank=auto", EveryType(rank="auto")),
        ("rank=4", EveryType(rank=4)),
        ("rank=none", EveryType(rank=None)),
        ("text=word", EveryType(text="word")),
        ("text='two words'", EveryType(text="two words")),
        ("text='none'", EveryType(text="none")),
        ("label=none", EveryType(label=None)),
        ("label='none'", EveryType(label="none")),
        ("residual=none", EveryType(residual="none")),
        ("residual='true'", EveryType(residual="true")),
        ("residual=true", EveryType(residual="true")),
        ("optional=none", EveryType(optional=None)),
        ("optional='none'", EveryType(optional="none")),
        ("pattern=2:4", EveryType(pattern="2:4")),
        ("memory=1.5KiB", EveryType(memory=1536)),
        ("memory=10", EveryType(memory=10)),
        ("stages=full", EveryType(stages=(Full(),))),
        ("stages=snapkv{budget=4}+kivi", EveryType(stages=(SnapKV(4), Kivi()))),
        ("stages=none", EveryType()),
        ("layers={0: kivi, 2-3: 7}", EveryType(layers=ByRange({0: Kivi(), (2, 3): 7}))),
        ("layers=none", EveryType()),
    ],
)
def test_build_coerces_by_annotation(text, expected):
    built = build_one(f"every-type{{{text}}}")
    assert built == expected
    assert repr(built) == repr(expected)  # tells 1 from 1.0 and True


def test_build_prefers_int_in_a_union_of_numbers():
    assert [type(build_one(f"every-type{{number={text}}}").number) for text in ("3", "3.0")] == [int, float]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quantize-weights", "quantize-weights{bits=4,symmetric=false}"),
        ("quantize-weights{bits=4,symmetric=false,skip=none}", "quantize-weights{bits=4,symmetric=false}"),
        ("quantize-weights{skip=lm_head, bits=8}", "quantize-weights{bits=8,symmetric=false,skip='lm_head'}"),
        (r"quantize-weights{skip='layers\.\d+'}", r"quantize-weights{bits=4,symmetric=false,skip='layers\.\d+'}"),
        ("cache-kv{policy=snapkv,budget=512}", "cache-kv{policy=snapkv{budget=512,window=32},chunk=512}"),
        (
            "cache-kv{policy=snapkv{budget=512,window=32}}",
            "cache-kv{policy=snapkv{budget=512,window=32},chunk=512}",
        ),
        (
            "cache-kv{policy=snapkv{budget=512}+kivi{bits=4}}",
            "cache-kv{policy=snapkv{budget=512,window=32}+kivi{bits=4},chunk=512}",
        ),
        ("cache-kv{layers={2: full, 0-1: kivi}}", "cache-kv{policy=full,layers={0-1:kivi{bits=4},2:full},chunk=512}"),
        (
            "cache-kv{policy=kivi},quantize-weights{bits=8}",
            "cache-kv{policy=kivi{bits=4},chunk=512},quantize-weights{bits=8,symmetric=false}",
        ),
    ],
)
def test_canonical_text_is_a_fixed_point(text, expected):
    assert canonical(text) == expected
    assert canonical(expected) == expected
    assert build_all(expected) == build_all(text)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("every-type{residual=true,optional='none'}", "residual=true,optional='none'"),
        ("every-type{memory=1024MiB}", "memory=1GiB"),
        ("every-type{memory=1500MiB}", "memory=1500MiB"),
        ("every-type{memory=2000000000}", "memory=2GB"),
        ("every-type{memory=1023}", "memory=1023"),
        ("every-type{memory=0B}", "memory=0"),
        ("every-type{stages=full}", "stages=full"),
    ],
)
def test_canonical_text_holds_the_option(text, printed):
    assert printed in canonical(text)
    assert canonical(canonical(text)) == canonical(text)
    assert build_all(canonical(text)) == build_all(text)


def test_to_spec_prints_a_default_that_was_changed_to_none_or_empty():
    @dataclass(frozen=True)
    class Filled:
        name = "filled"
        limit: int | None = 4

    assert to_spec(Filled(None)) == Spec("filled", (Option("limit", Scalar(None)),))


def test_to_spec_takes_a_name_or_the_class_attribute():
    assert to_spec(QuantizeWeights(bits=8), "other").name == "other"
    assert to_spec(QuantizeWeights(bits=8)).name == "quantize-weights"


def test_to_spec_normalises_python_numbers():
    assert to_spec(EveryType(ratio=2)) == to_spec(EveryType(ratio=2.0))
    assert "ratio=0.25" in format_pipeline([to_spec(EveryType(ratio=np.float64(0.25)))])


@pytest.mark.parametrize(
    ("flat", "nested"),
    [
        ("cache-kv{policy=snapkv,budget=5}", "cache-kv{policy=snapkv{budget=5}}"),
        ("cache-kv{budget=5,policy=snapkv}", "cache-kv{policy=snapkv{budget=5}}"),
        ("cache-kv{budget=5,policy=snapkv,window=7}", "cache-kv{policy=snapkv{budget=5,window=7}}"),
        ("cache-kv{budget=5,policy=snapkv{window=7},chunk=1}", "cache-kv{policy=snapkv{budget=5,window=7},chunk=1}"),
        ("cache-kv{policy=kivi,bits=2}", "cache-kv{policy=kivi{bits=2}}"),
        (
            "two-policies{first=snapkv,second=kivi,budget=3,bits=2}",
            "two-policies{first=snapkv{budget=3},second=kivi{bits=2}}",
        ),
    ],
)
def test_flat_options_equal_nested_ones(flat, nested):
    assert build_all(flat) == build_all(nested)
    assert canonical(flat) == canonical(nested)


def test_flat_option_goes_to_the_pass_when_the_pass_has_it_too():
    @dataclass(frozen=True)
    class Windowed(CacheKV):
        window: int = option(1, doc="the pass's own")

    (spec,) = parse_pipeline("cache-kv{policy=snapkv{budget=5},window=9}")
    built = build(Windowed, spec, where="", registries=REGISTRIES)
    assert (built.window, built.policy) == (9, SnapKV(5))


def test_lookup_returns_the_registered_class():
    assert lookup("kivi", REGISTRIES[Policy], "policy", "") is Kivi
    with pytest.raises(OptionError) as caught:
        lookup("kivi", {}, "policy", "")
    assert str(caught.value) == "pipeline: unknown policy 'kivi'.\nKnown: none."


@pytest.mark.parametrize(
    "wrong",
    [
        QuantizeWeights(bits=3),  # type: ignore[arg-type]
        QuantizeWeights(bits=4.0),  # type: ignore[arg-type]
        QuantizeWeights(symmetric=1),  # type: ignore[arg-type]
        QuantizeWeights(skip=4),  # type: ignore[arg-type]
        EveryType(count=True),
        EveryType(count=None),  # type: ignore[arg-type]
        EveryType(count=[1]),  # type: ignore[arg-type]
        EveryType(memory=True),
        EveryType(stages=Full()),  # type: ignore[arg-type]
        EveryType(stages=(Full(), 3)),  # type: ignore[arg-type]
        EveryType(layers=ByRange({0: "full"})),  # type: ignore[dict-item]
        EveryType(layers=3),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_to_spec_refuses_a_value_that_would_not_parse_back(wrong):
    with pytest.raises(OptionError, match=rf"^{type(wrong).__name__}\.\w+ needs .*, found .*\.$"):
        to_spec(wrong)


def test_to_spec_refuses_a_number_without_text():
    with pytest.raises(OptionError, match="not finite"):
        to_spec(EveryType(ratio=float("inf")))


def test_to_spec_blames_a_class_without_a_name():
    @dataclass(frozen=True)
    class Nameless:
        pass

    with pytest.raises(PassError, match="Nameless has no class attribute `name`"):
        to_spec(Nameless())


def test_describe_and_to_spec_blame_a_default_of_the_wrong_type():
    with pytest.raises(PassError, match=r"Unprintable.values needs list, found \(\)"):
        describe(Unprintable)
    with pytest.raises(PassError, match=r"Unprintable.values needs list, found \(\)"):
        to_spec(Unprintable())


def test_build_blames_an_annotation_without_a_text_form():
    with pytest.raises(PassError, match=r"cannot express an option of type list\[int\]"):
        build_one("unprintable{values=3}")
    (spec,) = parse_pipeline("cache-kv{policy=full}")
    with pytest.raises(PassError, match="cannot express an option of type"):
        build(CacheKV, spec, where="", registries={})


def test_describe_lists_type_default_and_doc():
    assert describe(QuantizeWeights) == [
        ("bits", "8|4", "4", "bits per weight"),
        ("symmetric", "true|false", "false", "no zero points"),
        ("skip", "str|none (regular expression)", "none", "layers left alone"),
    ]
    assert describe(SnapKV)[0] == ("budget", "int (at least 1)", "required", "tokens kept")
    assert [row[:3] for row in describe(CacheKV)] == [
        ("policy", "policy|policy+...", "full"),
        ("layers", "{range: policy}", "none"),
        ("chunk", "int", "512"),
    ]
    assert ("memory", "bytes|none", "none", "memory") in describe(EveryType)
    assert ("layers", "{range: policy|int}", "none", "by layer") in describe(EveryType)
    assert describe(Full) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("1024", 1024), ("3B", 3), ("1KiB", 1024), ("1KB", 1000), ("1.5GiB", 3 * 2**29), ("0.001KB", 1)],
)
def test_parse_bytes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "2G", "2gib", "-1", "1e3", "2 GiB", "2:4"])
def test_parse_bytes_refuses_what_is_no_size(text):
    with pytest.raises(OptionError, match="is no size"):
        parse_bytes(text)


def test_by_range_is_an_ordered_hashable_mapping():
    layers = ByRange({(4, 6): "b", 0: "a", Range(8, 8): "c"})
    assert list(layers.items()) == [(Range(0, 0), "a"), (Range(4, 6), "b"), (Range(8, 8), "c")]
    assert [layers.at(index) for index in (0, 1, 4, 6, 7, 8)] == ["a", None, "b", "b", None, "c"]
    assert layers[Range(4, 6)] == "b"
    assert len(layers) == 3
    same = ByRange({8: "c", (0, 0): "a", (4, 6): "b"})
    assert layers == same
    assert hash(layers) == hash(same)
    assert layers != ByRange({0: "a"})
    assert repr(layers) == "ByRange({(0, 0): 'a', (4, 6): 'b', (8, 8): 'c'})"


def test_by_range_refuses_overlaps_and_empty_ranges():
    with pytest.raises(OptionError, match="range 3 overlaps 2-5"):
        ByRange({(2, 5): "a", 3: "b"})
    with pytest.raises(OptionError, match="range 2-1: the smaller index goes first"):
        ByRange({(2, 1): "a"})


policies = st.one_of(
    st.just(Full()),
    st.builds(SnapKV, budget=st.integers(1, 4096), window=st.sampled_from([0, 8, 32])),
    st.builds(Kivi, bits=st.sampled_from([2, 4])),
)


def by_range(values):
    starts = st.sets(st.integers(0, 9), max_size=4).map(sorted)
    return starts.flatmap(
        lambda tens: st.lists(st.tuples(st.integers(0, 9), values), min_size=len(tens), max_size=len(tens)).map(
            lambda items: ByRange({(10 * t, 10 * t + n): v for t, (n, v) in zip(tens, items, strict=True)})
        )
    )


sixty_four_bits = st.integers(-(2**63), 2**63 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
instances = st.one_of(
    st.builds(
        EveryType,
        flag=st.booleans(),
        count=sixty_four_bits,
        ratio=finite,
        keep=finite | st.just("auto"),
        rank=st.none() | st.just("auto") | sixty_four_bits,
        number=finite | sixty_four_bits,
        text=st.text(max_size=8) | st.sampled_from(["none", "true", "4", "2GiB", "a\\'"]),
        label=st.none() | st.text(max_size=4) | st.just("none"),
        residual=st.sampled_from(["none", "int4", "true"]),
        optional=st.sampled_from([None, "none", "int4"]),
        pattern=st.sampled_from(["unstructured", "2:4"]),
        memory=st.none() | sixty_four_bits | st.integers(0, 4096).map(lambda n: n << 20),
        stages=st.lists(policies, max_size=3).map(tuple),
        layers=by_range(policies | sixty_four_bits),
    ),
    st.builds(
        CacheKV,
        policy=policies | st.lists(policies, min_size=2, max_size=3).map(tuple),
        layers=by_range(policies),
        chunk=st.integers(1, 4096),
    ),
)


@settings(deadline=None, max_examples=200)
@given(instances)
def test_build_undoes_to_spec(instance):
    text = format_pipeline([to_spec(instance)])
    rebuilt = build_one(text)
    assert rebuilt == instance
    assert repr(rebuilt) == repr(instance)
    assert canonical(text) == text


VALUES = ["1", "-2", "0.5", "true", "none", "auto", "int4", "'none'", "2:4", "2GiB", "0.3B", "'q'"]
VALUES += ["full", "kivi{bits=2}", "kivi{bits=3}", "snapkv", "snapkv{budget=1}", "full+kivi", "fool+kivi", "full{a=1}"]
VALUES += ["{0: full}", "{1-3: 4, 5: kivi}", "{0: true}", "{0: full+full}", "{0: {1: 2}}"]
KEYS = [*EveryType.__dataclass_fields__, *CacheKV.__dataclass_fields__, "first", "second", "budget", "bits", "x"]


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(sorted(PASSES.keys() - {Unprintable.name})),
    st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), max_size=4, unique_by=lambda pair: pair[0]),
)
def test_any_options_build_canonically_or_fail_under_a_caret(name, pairs):
    text = name + ("{" + ",".join(f"{key}={value}" for key, value in pairs) + "}" if pairs else "")
    try:
        result = canonical(text)
    except OptionError as error:
        message = str(error)
        assert message.startswith("pipeline, column ")
    else:
        assert canonical(result) == result


@pytest.mark.parametrize("key", EveryType.__dataclass_fields__)
@pytest.mark.parametrize("value", VALUES)
def test_every_value_in_every_option_is_read_or_refused(key, value):
    text = f"every-type{{{key}={value}}}"
    try:
        result = canonical(text)
    except OptionError as error:
        shown, caret = str(error).splitlines()[1:3]
        assert shown == f"    {text}"
        assert caret.index("^") >= shown.index("=")
    else:
        assert canonical(result) == result


def test_hand_made_range_map_builds():
    spec = Spec("cache-kv", (Option("layers", RangeMap((RangeEntry(Range(1, 2), Scalar("full")),))),))
    assert build(CacheKV, spec, where="", registries=REGISTRIES) == CacheKV(layers=ByRange({(1, 2): Full()}))
