"""The grammar of textual pipelines: trees, canonical text, columns, and every syntax error word for word."""

from __future__ import annotations

import math
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jettison.ir.errors import OptionError
from jettison.passes.grammar import (
    BYTE_UNITS,
    MAX_DEPTH,
    Option,
    Range,
    RangeEntry,
    RangeMap,
    Scalar,
    Spec,
    first_overlap,
    format_pipeline,
    format_value,
    located_error,
    parse_pipeline,
)

DESIGN_EXAMPLE = "quantize-weights{bits=4,group=128},cache-kv{policy=snapkv{budget=512}+kivi{bits=4}}"


def parsed_value(text: str):
    (spec,) = parse_pipeline(f"p{{key={text}}}")
    return spec.options[0].value


def test_parse_gives_the_tree_of_the_design_example():
    assert parse_pipeline(DESIGN_EXAMPLE) == (
        Spec("quantize-weights", (Option("bits", Scalar(4)), Option("group", Scalar(128)))),
        Spec(
            "cache-kv",
            (
                Option(
                    "policy",
                    (
                        Spec("snapkv", (Option("budget", Scalar(512)),)),
                        Spec("kivi", (Option("bits", Scalar(4)),)),
                    ),
                ),
            ),
        ),
    )
    assert format_pipeline(parse_pipeline(DESIGN_EXAMPLE)) == DESIGN_EXAMPLE


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_parse_empty_text_is_no_passes(text):
    assert parse_pipeline(text) == ()
    assert format_pipeline(()) == ""


@pytest.mark.parametrize(
    ("text", "value", "kind"),
    [
        ("4", 4, "int"),
        ("-4", -4, "int"),
        ("+4", 4, "int"),
        ("007", 7, "int"),
        ("9223372036854775807", 2**63 - 1, "int"),
        ("0.5", 0.5, "float"),
        (".5", 0.5, "float"),
        ("4.", 4.0, "float"),
        ("1e-3", 1e-3, "float"),
        ("1E+16", 1e16, "float"),
        ("true", True, "bool"),
        ("false", False, "bool"),
        ("none", None, "none"),
        ("True", "True", "word"),
        ("svd-llm", "svd-llm", "word"),
        ("_x9", "_x9", "word"),
        ("2GiB", "2GiB", "word"),
        ("1.5MiB", "1.5MiB", "word"),
        ("512B", "512B", "word"),
        ("2:4", "2:4", "word"),
        ("'lm_head'", "lm_head", "quoted"),
        ("''", "", "quoted"),
    ],
)
def test_scalar_value_and_kind(text, value, kind):
    scalar = parsed_value(text)
    assert (scalar.value, scalar.kind) == (value, kind)
    assert type(scalar.value) is type(value)
    assert scalar.quoted == (kind == "quoted")


def test_scalars_of_different_kind_are_different():
    scalars = [Scalar(1), Scalar(1.0), Scalar(True), Scalar("one"), Scalar("one", quoted=True), Scalar(None)]
    for index, left in enumerate(scalars):
        assert [left == right for right in scalars] == [index == other for other in range(len(scalars))]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (r"layers\.[0-9]+\.(q|k)_proj", r"'layers\.[0-9]+\.(q|k)_proj'"),
        ("it's", r"'it\'s'"),
        ("a\\", r"'a\\'"),
        ("a\\\\b", r"'a\\\b'"),
        ("\\'", r"'\\\''"),
        ("{a=1,b},+:", "'{a=1,b},+:'"),
        ("two\nlines", "'two\nlines'"),
        ("é 漢", "'é 漢'"),
        ("none", "'none'"),
    ],
)
def test_quoted_text_escapes_only_what_it_must(value, text):
    assert format_value(Scalar(value, quoted=True)) == text
    assert parsed_value(text) == Scalar(value, quoted=True)


def test_quoted_text_reads_escapes_that_were_not_needed():
    assert parsed_value(r"'a\\b'").value == "a\\b"
    assert format_value(parsed_value(r"'a\\b'")) == r"'a\b'"


@pytest.mark.parametrize(
    ("spaced", "canonical"),
    [
        (" a { b = 1 , c = x { d = 2 } + y } , e ", "a{b=1,c=x{d=2}+y},e"),
        ("a{l={ 0 - 1 : full , 2 : snapkv{budget=64} }}", "a{l={0-1:full,2:snapkv{budget=64}}}"),
        ("a{l={3-3: 1}}", "a{l={3:1}}"),
        ("a{l={0:2:4,1:{2:none}}}", "a{l={0:2:4,1:{2:none}}}"),
        ("a\n{b='x  y'}", "a{b='x  y'}"),
        ("a{x=1.50,y=+2,z=1e5}", "a{x=1.5,y=2,z=100000.0}"),
        ("a{z=1,b=2}", "a{z=1,b=2}"),
    ],
)
def test_format_is_canonical(spaced, canonical):
    assert format_pipeline(parse_pipeline(spaced)) == canonical
    assert parse_pipeline(canonical) == parse_pipeline(spaced)


def test_every_element_carries_its_column():
    text = "one, two{a=1, b=x{c='s'}+y, d={0-1: none, 2: 3}}"
    one, two = parse_pipeline(text)
    a, b, d = two.options
    first, second = b.value
    ranges = d.value
    columns = {
        "one": one.column,
        "two": two.column,
        "a=1": a.column,
        "1, b": a.value.column,
        "b=": b.column,
        "x{": first.column,
        "c=": first.options[0].column,
        "'s'": first.options[0].value.column,
        "y,": second.column,
        "d=": d.column,
        "{0-1": ranges.column,
        "0-1": ranges.entries[0].column,
        "none": ranges.entries[0].value.column,
        "2: 3": ranges.entries[1].column,
        "3}": ranges.entries[1].value.column,
    }
    assert columns == {fragment: text.index(fragment) + 1 for fragment in columns}


def test_columns_are_not_part_of_equality_or_hash():
    assert parse_pipeline("  a{b=c{d=1}}") == parse_pipeline("a{b=c{d=1}}")
    assert hash(parse_pipeline("  a{b=c{d=1}}")) == hash(parse_pipeline("a{b=c{d=1}}"))


def test_trees_with_one_text_are_equal():
    assert Option("policy", Spec("full")) == Option("policy", Scalar("full")) == Option("policy", (Spec("full"),))
    assert RangeEntry(Range(0, 0), Spec("full")) == RangeEntry(Range(0, 0), Scalar("full"))


ERRORS = {
    "missing_value": (
        "quantize-weights{bits=}",
        """\
        pipeline, column 23: expected a value, found '}'.
            quantize-weights{bits=}
                                  ^
        Write a number, true, false, none, a name, 'quoted text', name{key=value} or {0-1: value}.""",
    ),
    "double_quotes": (
        'p{skip="lm_head"}',
        """\
        pipeline, column 8: expected a value, found '"'.
            p{skip="lm_head"}
                   ^
        Write a number, true, false, none, a name, 'quoted text', name{key=value} or {0-1: value}.""",
    ),
    "bad_number": (
        "p{bits=4x}",
        """\
        pipeline, column 8: '4x' is not a number.
            p{bits=4x}
                   ^
        Write a number such as 4, 0.5 or 1e-3, a size in B, KiB, MiB, GiB, TiB, KB, MB, GB, TB, or quote the text.""",
    ),
    "unended_quote": (
        r"p{a=1,skip='lm\'}",
        r"""
        pipeline, column 12: the quoted text that starts here never ends.
            p{a=1,skip='lm\'}
                       ^
        End it with '; inside, a quote is \'.""",
    ),
    "missing_comma": (
        "p{a=1 b=2}",
        """\
        pipeline, column 7: expected ',' or the '}' that closes column 2, found 'b'.
            p{a=1 b=2}
                  ^
        Separate items with ','; text that is not a plain word stands in single quotes.""",
    ),
    "unquoted_regex": (
        "p{skip=lm_head.*}",
        """\
        pipeline, column 15: expected ',' or the '}' that closes column 2, found '.'.
            p{skip=lm_head.*}
                          ^
        Separate items with ','; text that is not a plain word stands in single quotes.""",
    ),
    "unclosed_brace": (
        "p{a=1",
        """\
        pipeline, column 6: expected ',' or the '}' that closes column 2, found the end of the text.
            p{a=1
                 ^
        Separate items with ','; text that is not a plain word stands in single quotes.""",
    ),
    "trailing_comma": (
        "p,",
        """\
        pipeline, column 3: expected a pass name, found the end of the text.
            p,
              ^
        A pass is written name{key=value,key=value}, one without options just name.""",
    ),
    "value_as_pass": (
        "none",
        """\
        pipeline, column 1: expected a pass name, found 'none'.
            none
            ^
        A pass is written name{key=value,key=value}, one without options just name.""",
    ),
    "composition_of_passes": (
        "a+b",
        """\
        pipeline, column 2: expected ',' or the end of the text, found '+'.
            a+b
             ^
        Separate passes with ','; options stand in {...}.""",
    ),
    "empty_braces": (
        "full{}",
        """\
        pipeline, column 6: expected an option name, found '}'.
            full{}
                 ^
        A pass is written name{key=value,key=value}, one without options just name.""",
    ),
    "missing_equals": (
        "p{bits:4}",
        """\
        pipeline, column 7: expected '=', found ':'.
            p{bits:4}
                  ^
        Options are written key=value: bits=VALUE.""",
    ),
    "composition_with_a_value": (
        "p{policy=snapkv+true}",
        """\
        pipeline, column 17: expected a name after '+', found 'true'.
            p{policy=snapkv+true}
                            ^
        A pass is written name{key=value,key=value}, one without options just name.""",
    ),
    "duplicate_option": (
        "p{bits=4,group=32,bits=8}",
        """\
        pipeline, column 19: option 'bits' is given twice, first at column 3.
            p{bits=4,group=32,bits=8}
                              ^
        Keep one of them.""",
    ),
    "range_without_index": (
        "p{layers={}}",
        """\
        pipeline, column 11: expected an index or a range such as 0-3, found '}'.
            p{layers={}}
                      ^
        A mapping is written {0-1: value, 2: value}.""",
    ),
    "range_without_value": (
        "p{layers={0-1=full}}",
        """\
        pipeline, column 14: expected ':', found '='.
            p{layers={0-1=full}}
                         ^
        A mapping is written {0-1: value, 2: value}.""",
    ),
    "empty_range": (
        "p{layers={3-1: full}}",
        """\
        pipeline, column 11: range 3-1: the smaller index goes first, and none is below 0.
            p{layers={3-1: full}}
                      ^""",
    ),
    "overlapping_ranges": (
        "p{layers={5: a, 0-3: b, 2: c}}",
        """\
        pipeline, column 25: range 2 overlaps 0-3.
            p{layers={5: a, 0-3: b, 2: c}}
                                    ^
        Give every index one value.""",
    ),
    "infinite_number": (
        "p{a=1e999}",
        """\
        pipeline, column 5: a pipeline cannot hold a number that is not finite, or an integer past 64 bits.
            p{a=1e999}
                ^""",
    ),
    "integer_past_64_bits": (
        "p{a=9223372036854775808}",
        """\
        pipeline, column 5: a pipeline cannot hold a number that is not finite, or an integer past 64 bits.
            p{a=9223372036854775808}
                ^""",
    ),
    "white_space_shown_as_blanks": (
        "one,\n\ttwo{\x1b}",
        """\
        pipeline, column 11: expected an option name, found '\\x1b'.
            one,  two{ }
                      ^
        A pass is written name{key=value,key=value}, one without options just name.""",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_syntax_error_message(case):
    text, message = ERRORS[case]
    with pytest.raises(OptionError) as caught:
        parse_pipeline(text)
    assert str(caught.value) == textwrap.dedent(message).lstrip("\n")


def test_error_in_a_long_text_shows_the_part_around_the_caret():
    text = f"{'a' * 300}{{b=}},{'c' * 300}"
    with pytest.raises(OptionError) as caught:
        parse_pipeline(text)
    head, shown, caret, _ = str(caught.value).splitlines()
    assert head == "pipeline, column 304: expected a value, found '}'."
    assert shown == f"    ...{'a' * 47}{{b=}},{'c' * 48}..."
    assert shown[caret.index("^")] == "}"


def test_number_of_thousands_of_digits_is_refused():
    with pytest.raises(OptionError, match="column 5: a pipeline cannot hold"):
        parse_pipeline("p{a=" + "9" * 5000 + "}")


def test_nesting_is_limited():
    deepest = "a{b=" * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    assert format_pipeline(parse_pipeline(deepest)) == deepest
    with pytest.raises(OptionError, match=rf"column {4 * MAX_DEPTH + 2}: options nest deeper than {MAX_DEPTH} levels"):
        parse_pipeline("a{b=" * 100_000)
    with pytest.raises(OptionError, match="options nest deeper"):
        parse_pipeline("a{b=" + "{0:" * 100_000)


def test_nesting_counts_depth_not_braces():
    text = ",".join(["a{b=c{d=1}}"] * (2 * MAX_DEPTH))
    assert format_pipeline(parse_pipeline(text)) == text


@pytest.mark.parametrize("name", ["", "4bit", "two words", "none", "-x", "é"])
def test_tree_refuses_a_name_that_has_no_text(name):
    with pytest.raises(OptionError, match="is not a name"):
        Spec(name)
    with pytest.raises(OptionError, match="is not a name"):
        Option(name, Scalar(1))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 2**63, -(2**63) - 1])
def test_scalar_refuses_a_number_that_has_no_text(value):
    with pytest.raises(OptionError, match="cannot hold a number"):
        Scalar(value)


@pytest.mark.parametrize(("first", "last"), [(3, 1), (-1, 2)])
def test_range_refuses_an_empty_or_negative_one(first, last):
    with pytest.raises(OptionError, match=f"range {first}-{last}: the smaller index goes first"):
        Range(first, last)


def test_scalar_quotes_a_string_that_is_no_word():
    assert Scalar("two words") == Scalar("two words", quoted=True)
    assert format_value(Scalar("true")) == "'true'"


def test_located_error_without_a_place_has_no_caret():
    assert str(located_error("", 3, "this.", "Do that.")) == "pipeline: this.\nDo that."
    assert str(located_error("text", 0, "this.")) == "pipeline: this."


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,7}", fullmatch=True).filter(
    lambda name: name not in ("true", "false", "none")
)
sizes = st.builds(
    "{}{}".format, st.integers(0, 4096) | st.sampled_from(["1.5", "0.25"]), st.sampled_from([*BYTE_UNITS])
)
ratios = st.builds("{}:{}".format, st.integers(0, 99), st.integers(0, 99))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    names,
    sizes,
    ratios,
    st.text(max_size=12),
).map(Scalar) | st.text(alphabet="ab\\'{}\n", max_size=8).map(lambda text: Scalar(text, quoted=True))


@st.composite
def range_maps(draw, values):
    bounds = sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=6)))
    pairs = list(zip(bounds[::2], bounds[1::2] or bounds, strict=False))
    entries = [RangeEntry(Range(*pair), draw(values)) for pair in pairs]
    return RangeMap(tuple(draw(st.permutations(entries))))


def specs(values):
    options = st.lists(st.tuples(names, values), max_size=3, unique_by=lambda pair: pair[0])
    return st.builds(Spec, names, options.map(lambda pairs: tuple(Option(*pair) for pair in pairs)))


values = st.recursive(
    scalars,
    lambda inner: st.one_of(specs(inner), st.lists(specs(inner), min_size=1, max_size=3).map(tuple), range_maps(inner)),
    max_leaves=8,
)
pipelines = st.lists(specs(values), max_size=3).map(tuple)


@settings(deadline=None)
@given(pipelines)
def test_parse_undoes_format(pipeline):
    text = format_pipeline(pipeline)
    assert parse_pipeline(text) == pipeline
    assert format_pipeline(parse_pipeline(text)) == text


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="ab1 {}=,+-:'\\.e\n", max_size=24) | st.text(max_size=24))
def test_any_text_parses_canonically_or_fails_under_a_caret(text):
    try:
        pipeline = parse_pipeline(text)
    except OptionError as error:
        head, shown, caret, *_ = str(error).split("\n")
        column = int(head.split(":")[0].removeprefix("pipeline, column "))
        assert 1 <= column <= len(text) + 1
        assert len(shown) == 4 + len(text)
        assert caret == " " * (4 + column - 1) + "^"
    else:
        assert parse_pipeline(format_pipeline(pipeline)) == pipeline


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4)), max_size=6))
def test_first_overlap_agrees_with_sets(pairs):
    ranges = [Range(first, first + length) for first, length in pairs]
    covered = [set(range(item.first, item.last + 1)) for item in ranges]
    has_overlap = any(covered[i] & covered[j] for j in range(len(ranges)) for i in range(j))
    clash = first_overlap(ranges)
    assert (clash is not None) == has_overlap
    if clash:
        assert clash[0].first <= clash[1].last
        assert clash[1].first <= clash[0].last
