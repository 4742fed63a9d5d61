"""What is wrong with an option is said where it stands, with what would do."""

from __future__ import annotations

import textwrap

import pytest

from jettison.ir.errors import OptionError
from jettison.passes.grammar import Option, Scalar, Spec
from jettison.passes.options import build
from tests.passes.option_classes import (
    QuantizeWeights,
    build_all,
)

ERRORS = {
    "unknown_pass": (
        "quantise-weights{bits=4}",
        """\
        pipeline, column 1: unknown pass 'quantise-weights'.
            quantise-weights{bits=4}
            ^
        Did you mean quantize-weights? Known: cache-kv, every-type, quantize-weights, two-policies, unprintable.""",
    ),
    "class_name_for_pass": (
        "cache-kv,QuantizeWeights",
        """\
        pipeline, column 10: unknown pass 'QuantizeWeights'.
            cache-kv,QuantizeWeights
                     ^
        Did you mean quantize-weights? Known: cache-kv, every-type, quantize-weights, two-policies, unprintable.""",
    ),
    "unknown_policy": (
        "cache-kv{policy=snap-kv}",
        """\
        pipeline, column 17: unknown policy 'snap-kv'.
            cache-kv{policy=snap-kv}
                            ^
        Did you mean snapkv? Known: full, kivi, snapkv.""",
    ),
    "unknown_option": (
        "quantize-weights{bits=4,symetric=true}",
        """\
        pipeline, column 25: quantize-weights has no option 'symetric'.
            quantize-weights{bits=4,symetric=true}
                                    ^
        Did you mean symmetric? Options of quantize-weights: bits (4), symmetric (false), skip (none).""",
    ),
    "unknown_option_of_a_policy": (
        "cache-kv{policy=full{budget=4}}",
        """\
        pipeline, column 22: full has no option 'budget'.
            cache-kv{policy=full{budget=4}}
                                 ^
        Options of full: none.""",
    ),
    "unknown_flat_option": (
        "cache-kv{policy=snapkv,budgt=4}",
        """\
        pipeline, column 24: cache-kv has no option 'budgt'.
            cache-kv{policy=snapkv,budgt=4}
                                   ^
        Did you mean budget? Options of cache-kv: policy (full), layers (none), chunk (512). \
Options of snapkv: budget (required), window (32).""",
    ),
    "flat_option_without_a_policy": (
        "cache-kv{budget=4}",
        """\
        pipeline, column 10: cache-kv has no option 'budget'.
            cache-kv{budget=4}
                     ^
        Options of cache-kv: policy (full), layers (none), chunk (512). Name the policy whose option it is.""",
    ),
    "flat_option_beside_an_unknown_policy": (
        "cache-kv{budget=4,policy=snap}",
        """\
        pipeline, column 26: unknown policy 'snap'.
            cache-kv{budget=4,policy=snap}
                                     ^
        Did you mean snapkv? Known: full, kivi, snapkv.""",
    ),
    "flat_option_given_twice": (
        "cache-kv{policy=snapkv{budget=4},budget=4}",
        """\
        pipeline, column 34: option 'budget' is given twice, beside snapkv and inside its braces.
            cache-kv{policy=snapkv{budget=4},budget=4}
                                             ^
        Keep one of them.""",
    ),
    "flat_option_of_a_composition": (
        "cache-kv{policy=snapkv+kivi,budget=4}",
        """\
        pipeline, column 29: option 'budget' stands beside several policies.
            cache-kv{policy=snapkv+kivi,budget=4}
                                        ^
        Write it inside the braces of its own: snapkv{budget=4}.""",
    ),
    "flat_option_of_two_policies": (
        "two-policies{first=snapkv,second=snapkv{budget=1},budget=4}",
        """\
        pipeline, column 51: option 'budget' stands beside several policies.
            two-policies{first=snapkv,second=snapkv{budget=1},budget=4}
                                                              ^
        Write it inside the braces of its own: snapkv{budget=4}.""",
    ),
    "flat_option_of_a_policy_that_is_not_flat": (
        "two-policies{nested=kivi,bits=2}",
        """\
        pipeline, column 26: two-policies has no option 'bits'.
            two-policies{nested=kivi,bits=2}
                                     ^
        Options of two-policies: first (full), second (none), nested (none). Name the policy whose option it is.""",
    ),
    "missing_option": (
        "cache-kv{policy=snapkv}",
        """\
        pipeline, column 17: snapkv needs the option 'budget'.
            cache-kv{policy=snapkv}
                            ^
        Write snapkv{budget=...} with int (at least 1).""",
    ),
    "value_not_listed": (
        "quantize-weights{bits=3}",
        """\
        pipeline, column 23: option 'bits' needs 8|4, found 3.
            quantize-weights{bits=3}
                                  ^
        For example bits=4.""",
    ),
    "misspelt_choice": (
        "every-type{residual=int-4}",
        """\
        pipeline, column 21: option 'residual' needs none|int4|true, found int-4.
            every-type{residual=int-4}
                                ^
        Did you mean int4? For example residual=none.""",
    ),
    "python_spelling_of_true": (
        "quantize-weights{symmetric=True}",
        """\
        pipeline, column 28: option 'symmetric' needs true|false, found True.
            quantize-weights{symmetric=True}
                                       ^
        Did you mean true? For example symmetric=false.""",
    ),
    "number_for_true": (
        "quantize-weights{symmetric=1}",
        """\
        pipeline, column 28: option 'symmetric' needs true|false, found 1.
            quantize-weights{symmetric=1}
                                       ^
        For example symmetric=false.""",
    ),
    "float_for_int": (
        "every-type{count=4.0}",
        """\
        pipeline, column 18: option 'count' needs int, found 4.0.
            every-type{count=4.0}
                             ^
        For example count=1.""",
    ),
    "true_for_int": (
        "every-type{count=true}",
        """\
        pipeline, column 18: option 'count' needs int, found true.
            every-type{count=true}
                             ^
        For example count=1.""",
    ),
    "size_for_int": (
        "every-type{count=2GiB}",
        """\
        pipeline, column 18: option 'count' needs int, found 2GiB.
            every-type{count=2GiB}
                             ^
        For example count=1.""",
    ),
    "number_for_text": (
        "quantize-weights{skip=4}",
        """\
        pipeline, column 23: option 'skip' needs str|none (regular expression), found 4.
            quantize-weights{skip=4}
                                  ^
        `jettison passes` lists the options.""",
    ),
    "composition_for_int": (
        "cache-kv{chunk=a+b}",
        """\
        pipeline, column 16: option 'chunk' needs int, found a+b.
            cache-kv{chunk=a+b}
                           ^
        For example chunk=512.""",
    ),
    "mapping_for_int": (
        "cache-kv{chunk={0: 1}}",
        """\
        pipeline, column 16: option 'chunk' needs int, found {0:1}.
            cache-kv{chunk={0: 1}}
                           ^
        For example chunk=512.""",
    ),
    "composition_for_one_policy": (
        "two-policies{first=full+kivi}",
        """\
        pipeline, column 20: option 'first' needs policy, found full+kivi.
            two-policies{first=full+kivi}
                               ^
        For example first=full.""",
    ),
    "number_for_policy": (
        "cache-kv{policy=2GiB}",
        """\
        pipeline, column 17: option 'policy' needs policy|policy+..., found 2GiB.
            cache-kv{policy=2GiB}
                            ^
        For example policy=full.""",
    ),
    "policy_for_mapping": (
        "cache-kv{layers=full}",
        """\
        pipeline, column 17: option 'layers' needs {range: policy}, found full.
            cache-kv{layers=full}
                            ^
        For example layers=none.""",
    ),
    "wrong_type_inside_a_mapping": (
        "cache-kv{layers={0: full, 1: 7}}",
        """\
        pipeline, column 30: option 'layers' needs {range: policy}, found 7.
            cache-kv{layers={0: full, 1: 7}}
                                         ^
        For example layers=none.""",
    ),
    "unknown_policy_inside_a_mapping": (
        "cache-kv{layers={0: full, 1: ful}}",
        """\
        pipeline, column 30: unknown policy 'ful'.
            cache-kv{layers={0: full, 1: ful}}
                                         ^
        Did you mean full? Known: full, kivi, snapkv.""",
    ),
    "fraction_of_a_byte": (
        "every-type{memory=1.3KiB}",
        """\
        pipeline, column 19: '1.3KiB' is not a whole number of bytes. Use a smaller unit.
            every-type{memory=1.3KiB}
                              ^""",
    ),
    "ratio_for_size": (
        "every-type{memory=2:4}",
        """\
        pipeline, column 19: '2:4' is no size. \
Write a number and one of B, KiB, MiB, GiB, TiB, KB, MB, GB, TB.
            every-type{memory=2:4}
                              ^""",
    ),
    "word_for_size": (
        "every-type{memory=lots}",
        """\
        pipeline, column 19: option 'memory' needs bytes|none, found lots.
            every-type{memory=lots}
                              ^
        `jettison passes` lists the options.""",
    ),
    "refused_by_the_class": (
        "cache-kv{policy=snapkv{budget=0}+kivi}",
        """\
        pipeline, column 17: [snapkv] budget is 0, needs at least 1. Write budget=1 or more.
            cache-kv{policy=snapkv{budget=0}+kivi}
                            ^""",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_option_error_message(case):
    text, message = ERRORS[case]
    with pytest.raises(OptionError) as caught:
        build_all(text)
    assert str(caught.value) == textwrap.dedent(message)


def test_errors_of_a_spec_made_by_hand_have_no_caret():
    spec = Spec("quantize-weights", (Option("bits", Scalar(3)),))
    with pytest.raises(OptionError) as caught:
        build(QuantizeWeights, spec, where="", registries={})
    assert str(caught.value) == "pipeline: option 'bits' needs 8|4, found 3.\nFor example bits=4."


def test_long_input_is_cut_in_messages():
    for text in (
        f"every-type{{count='{'x' * 5000}'}}",
        f"{'x' * 5000}",
        f"every-type{{{'x' * 5000}=1}}",
        f"cache-kv{{policy=snapkv+kivi,budget='{'x' * 5000}'}}",
    ):
        with pytest.raises(OptionError) as caught:
            build_all(text)
        assert len(str(caught.value)) < 800
