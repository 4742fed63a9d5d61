from __future__ import annotations

import functools
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jettison.api import parse_passes, pipeline_text
from jettison.ir.errors import OptionError
from jettison.passes.allocate_bits import AllocateBits, names_pattern
from jettison.passes.formats import IntGroups
from jettison.passes.knapsack import cheapest
from jettison.passes.methods import GPTQ
from jettison.passes.methods.sensitivity import Choice, Probe
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import assert_golden, export_tiny, run_pass
from tests.passes.test_methods import calibrated

WIDTH = 32
MENU = (IntGroups(8, 32), IntGroups(4, 32), IntGroups(2, 32))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Decoder(nn.Module):
    """Two layers, positions in a table of their own, embedding and head in one."""

    def __init__(self):
        super().__init__()
        self.embed, self.places = nn.Embedding(61, WIDTH), nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids, position_ids):
        x = self.embed(input_ids) + self.places(position_ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(8 * x, self.embed.weight)


@functools.cache
def decoder():
    return calibrated(export_tiny(Decoder(), kind="decoder"))


def uniform_bytes(bits):
    return run_pass(QuantizeWeights(bits, 32), decoder())[1].bytes_after


def planned(program=None, **options):
    """A copy after the pass, and its record."""
    program = (program or decoder()).copy()
    return program, AllocateBits(**{"formats": MENU, **options}).run(program)


# ------------------------------------------------------------------------------------------------------------ knapsack


def table(seed, count, options=3):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 60, (count, options), generator=generator).tolist()
    losses = torch.rand(count, options, generator=generator).tolist()
    return {
        f"w{row}": [Choice(MENU[0], size, loss) for size, loss in zip(sizes[row], losses[row], strict=True)]
        for row in range(count)
    }


def costs(choices, taken):
    chosen = [each[index] for each, index in zip(choices.values(), taken, strict=True)]
    return sum(choice.bytes for choice in chosen), sum(choice.loss for choice in chosen)


@pytest.mark.parametrize("seed", range(60))
def test_the_solution_is_the_one_of_brute_force(seed):
    choices = table(seed, 3 + seed % 5)
    budget = int(sum(min(choice.bytes for choice in each) for each in choices.values()) * (1 + seed % 7 / 5))
    found = cheapest(choices, budget)
    size, loss = costs(choices, [found[name] for name in choices])
    every = (costs(choices, taken) for taken in itertools.product(range(3), repeat=len(choices)))
    assert size <= budget
    assert loss == pytest.approx(min(loss for size, loss in every if size <= budget), rel=1e-9)


def test_tiny_losses_and_huge_sizes_are_told_apart():
    choices = {
        name: [Choice(MENU[0], 10**7, 1e-9), Choice(MENU[1], 10**7 - 32, 2e-9), Choice(MENU[2], 10**6, 3e-9)]
        for name in ("a", "b")
    }
    assert set(cheapest(choices, 2 * 10**7 - 32).values()) == {0, 1}
    assert cheapest(choices, 2 * 10**7) == {"a": 0, "b": 0}


def test_one_format_leaves_nothing_to_decide():
    choices = {name: each[:1] for name, each in table(0, 4).items()}
    assert cheapest(choices, 10**6) == dict.fromkeys(choices, 0)


def test_a_budget_that_cannot_be_met_has_no_solution():
    assert cheapest({"w": [Choice(MENU[0], 40, 0.0)]}, 30) is None


# ------------------------------------------------------------------------------------------------------------ patterns


def test_patterns_find_their_names_and_no_others():
    names = [f"model.layers.{layer}.mlp.{part}.weight" for layer in range(12) for part in ("up", "down")] + ["head"]
    for chosen in (names[:1], names[3:9], [names[2], names[-1]], names[-1:], names):
        pattern = names_pattern(chosen)
        assert [name for name in names if re.search(pattern, name)] == chosen
        assert not re.search(pattern, f"{chosen[0]}_")
        assert not re.search(pattern, f"x{chosen[0]}")


# ------------------------------------------------------------------------------------------------------------ the pass


def test_golden_between(snapshot):
    budget = (uniform_bytes(4) + uniform_bytes(2)) // 2
    after, record = assert_golden(snapshot, AllocateBits(budget=budget, formats=MENU), decoder(), "between")
    assert record.rewrites == 7
    assert after.weight_bytes() <= budget


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("metric", ["kl", "hessian"])
def test_is_better_than_the_same_bytes_all_alike(metric, method):
    (options,) = parse_passes(f"quantize-weights{{method={method}}}")
    budget = uniform_bytes(4)
    after, record = planned(budget=budget, metric=metric, method=options.method)
    uniform, _ = run_pass(QuantizeWeights(4, 32, method=options.method), decoder())
    probe = Probe(decoder(), decoder().calibration())
    assert after.weight_bytes() <= budget
    assert record.measured_kl == pytest.approx(probe.loss_of(after))
    assert record.measured_kl <= 1.02 * probe.loss_of(uniform)
    assert 0.5 < record.predicted_kl / record.measured_kl < 2


def test_the_plan_is_a_pipeline_that_does_the_same():
    budget = (uniform_bytes(8) + uniform_bytes(4)) // 2
    after, record = planned(budget=budget)
    passes = parse_passes(record.plan)
    assert all(isinstance(pass_, QuantizeWeights) for pass_ in passes)
    assert pipeline_text(passes) == record.plan
    again, _ = run_pass(passes[0], decoder(), *passes[1:])
    assert str(again) == str(after)


def test_more_bytes_are_never_worse():
    budgets = [uniform_bytes(2), uniform_bytes(4), uniform_bytes(8)]
    predicted = [planned(budget=budget)[1].predicted_kl for budget in budgets]
    assert predicted[0] > predicted[1] > predicted[2]


def test_without_a_budget_it_takes_the_bytes_of_int4():
    _, record = planned(formats=(IntGroups(8, 128), IntGroups(4, 128), IntGroups(2, 128)))
    most = run_pass(QuantizeWeights(4, 128), decoder())[1].bytes_after
    assert 0.9 * most < record.bytes_after <= most


def test_the_layer_of_a_planted_weight_gets_more_bits():
    """The first layer's `down` is made to matter most."""
    program = decoder().copy()
    name = "layers.0.down.weight"
    constant = program.constants[name]
    program.constants[name] = type(constant)(name, constant.value() * 20)
    skip = "embed|places"
    sizes = [run_pass(QuantizeWeights(bits, 32, skip=skip), program)[1].bytes_after for bits in (4, 8)]
    for metric in ("kl", "hessian"):
        after, _ = planned(program, budget=(3 * sizes[0] + sizes[1]) // 4, metric=metric, skip=skip)
        bits = {each: int(packed.format[3]) for each, packed in after.packed.items()}
        most = [max(count for each, count in bits.items() if each.startswith(f"layers.{layer}.")) for layer in (0, 1)]
        assert most == [8, 4]


def test_what_is_skipped_counts_as_it_is():
    budget = uniform_bytes(4) + decoder().constants["embed.weight"].stored_bytes
    after, record = planned(budget=budget, skip="embed")
    assert "embed.weight" not in after.packed
    assert record.bytes_after <= budget


def test_needs_text_and_a_decoder():
    program = decoder().copy()
    program.calibration = None
    with pytest.raises(OptionError, match=r"needs a decoder and text to calibrate on"):
        AllocateBits().run(program)
    program.entries["prefill"] = program.entries.pop("forward")
    with pytest.raises(OptionError, match=r"behind cache-kv(?s:.)*Put cache-kv last"):
        AllocateBits().run(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"budget=0: needs bytes above 0"),
        ({"formats": ()}, r"formats=none: needs at least one"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(OptionError, match=r"\[allocate-bits\] " + message):
        AllocateBits(**options)


def test_formats_that_a_target_cannot_run_are_refused_first():
    assert AllocateBits().unsupported_on("onnx") is None
    assert "3" in (AllocateBits(formats=(IntGroups(3, 32),)).unsupported_on("onnx") or "")


def test_text():
    text = "allocate-bits{budget=3MiB,formats=int{bits=8,group=128}+int{bits=2},metric=hessian,method=gptq}"
    expected = AllocateBits(3 << 20, (IntGroups(8, 128), IntGroups(2, 32)), "hessian", GPTQ())
    (built,) = parse_passes(text)
    assert built == expected
    assert parse_passes(pipeline_text([built])) == [expected]
