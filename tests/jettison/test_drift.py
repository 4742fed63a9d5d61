"""The check after every pass: what it measures, and when it stops the pipeline."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettison.api import optimize, parse_passes
from jettison.drift import (
    FEWEST_ROW_TOKENS,
    MOST_ROW_TOKENS,
    TOKENS,
    BudgetExceeded,
    DriftCheck,
    dense_value,
    row_tokens,
    sample_input_ids,
)
from jettison.ir.capture import capture_module
from jettison.ir.compare import example_input_ids, run_program
from jettison.ir.constants import Constant
from jettison.ir.errors import JettisonError, OptionError, PassError
from jettison.ir.program import MissRecord, PassRecord, Program
from jettison.ir.text import program_text
from jettison.passes.base import Pass
from jettison.passes.cache_kv import CacheKV
from jettison.passes.formats import IntGroups, Lut, Nf4
from jettison.passes.pipeline import apply, prepare
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.source import open_source
from tests.helpers import StoreIn

INT4 = "quantize-weights{bits=4,group=32}"
VOCAB, CONTEXT = 64, 48


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for a busy core cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class ScaleWeight(Pass):
    """Multiplies one weight: what a wrong pass does."""

    name: ClassVar[str] = "scale-weight"
    weight: str = ""
    factor: float = 1.0

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        constant = program.constants[self.weight]
        program.constants[self.weight] = Constant(self.weight, constant.value() * self.factor)
        return 1, []


@dataclass(frozen=True)
class ScaleWeightAndSayIt(ScaleWeight):
    is_exact: ClassVar[bool] = False


@dataclass(frozen=True)
class DoNothing(Pass):
    name: ClassVar[str] = "do-nothing"

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        return 0, []


@pytest.fixture(scope="module")
def trained(two_layers: Path) -> Program:
    """Two layers of the bundled model, prepared."""
    program = open_source(two_layers).program
    prepare(program)
    return program


def small_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def small() -> Program:
    """A random model, prepared; not to be changed."""
    program = open_source(small_llama()).program
    prepare(program)
    return program


@pytest.fixture(scope="module")
def encoder() -> Program:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.project = nn.Embedding(VOCAB, 32), nn.Linear(32, 32)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            return self.project(F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0])

    torch.manual_seed(0)
    program = capture_module(Encoder(), context=CONTEXT, kind="encoder")
    prepare(program)
    return program


def checked(program: Program, passes: str | list[Pass], **settings: object) -> tuple[Program, list[PassRecord]]:
    """Run a pipeline on a copy with the check after every pass."""
    program = program.copy()
    check = DriftCheck(program, **settings)
    return program, apply(program, parse_passes(passes) if isinstance(passes, str) else passes, after_each=check)


def kl_between(reference: Program, program: Program, ids: Tensor) -> tuple[float, float, float]:
    """KL, largest error and agreement, computed another way."""
    p, q = (run_program(each, ids)[0].double() for each in (reference, program))
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True) / ids.numel()
    return kl.item(), (p - q).abs().max().item(), (p.argmax(-1) == q.argmax(-1)).double().mean().item()


def test_drift_of_every_pass_is_recorded(trained):
    program, (quantized, cached) = checked(trained, f"{INT4},cache-kv{{policy=full}}")
    kl, error, agreement = kl_between(trained, program, sample_input_ids(trained, 0))
    assert 1e-3 < quantized.kl < 0.05
    assert quantized.top1_agreement < 1
    for record in (quantized, cached):
        assert record.kl == pytest.approx(kl, rel=1e-3)
        assert record.max_error == pytest.approx(error, rel=1e-3)
        assert record.top1_agreement == pytest.approx(agreement, abs=0.01)
    assert set(program.entries) == {"prefill", "decode"}


def test_checking_does_not_change_what_the_passes_make(small):
    passes = f"merge-qkv-projections,{INT4},cache-kv{{policy=full}}"
    program, records = checked(small, passes)
    alone = small.copy()
    unchecked = apply(alone, parse_passes(passes))
    assert program_text(program) == program_text(alone)
    assert [record.rewrites for record in records] == [record.rewrites for record in unchecked]
    assert [record.kl for record in unchecked] == [None] * 3
    assert records[0].kl < 1e-9 < 1e-4 < records[1].kl


def test_both_entries_of_a_cached_program_are_run(small, monkeypatch):
    """A fault in one entry alone is found: here, a state that `decode` reads at the wrong positions."""
    calls: list[tuple[str, int]] = []
    from jettison.ir import compare

    original = compare.run_entry

    def counting(program, entry, inputs):
        calls.append((entry, inputs["input_ids"].shape[1]))
        if entry == "decode":
            inputs = {**inputs, "position_ids": inputs["position_ids"] - 1}
        return original(program, entry, inputs)

    monkeypatch.setattr(compare, "run_entry", counting)
    with pytest.raises(PassError, match=r"\[cache-kv\] claims to compute the same"):
        checked(small, "cache-kv{policy=full}")
    assert calls == [("forward", CONTEXT), ("prefill", CONTEXT // 2), *[("decode", 1)] * (CONTEXT // 2)]


def test_tokens_are_what_the_program_would_write(trained):
    """The trained model finds its own tokens likely, and random ones not."""
    ids = sample_input_ids(trained, 0)
    assert ids.shape == (TOKENS // MOST_ROW_TOKENS, MOST_ROW_TOKENS)

    def nats(tokens: Tensor) -> float:
        logits = run_program(trained, tokens)[0]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()

    own = nats(ids)
    assert own < 6 < nats(example_input_ids(trained, *ids.shape)) - 2
    # Sampled, so each token costs what the model expects to be surprised by.
    logits = run_program(trained, ids)[0][:, :-1].double()
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean().item()
    assert own == pytest.approx(entropy, rel=0.15)


def test_tokens_depend_on_the_seed_alone(small):
    ids = sample_input_ids(small, 3)
    assert torch.equal(ids, sample_input_ids(small, 3))
    assert not torch.equal(ids, sample_input_ids(small, 4))
    assert ids.shape == (TOKENS // CONTEXT, CONTEXT)
    assert 0 <= int(ids.min()) <= int(ids.max()) < VOCAB


def test_large_models_get_shorter_and_fewer_rows(small, monkeypatch):
    total = sum(constant.nbytes for constant in small.used_constants().values())
    monkeypatch.setattr("jettison.drift.SAMPLING_BYTES", 20 * total)
    assert row_tokens(small) == 20
    monkeypatch.setattr("jettison.drift.SAMPLING_BYTES", 0)
    assert row_tokens(small) == FEWEST_ROW_TOKENS
    monkeypatch.setattr("jettison.drift.LOGITS_BYTES", 4 * VOCAB * 2 * FEWEST_ROW_TOKENS)
    assert sample_input_ids(small, 0).shape == (2, FEWEST_ROW_TOKENS)


def test_given_windows_are_used_instead(small):
    windows = torch.randint(VOCAB, (30, 24), generator=torch.Generator().manual_seed(1)).tolist()
    check = DriftCheck(small, windows=windows)
    assert check.input_ids.tolist() == windows[: TOKENS // 24]


@pytest.mark.parametrize("before", [[], [QuantizeWeights(bits=4, group=32)]])
def test_a_pass_that_claims_to_be_exact_and_is_not_is_our_bug(small, before):
    wrong = ScaleWeight("model.norm.weight", 1.001)
    with pytest.raises(PassError, match=r"\[scale-weight\] claims to compute the same, but moves the outputs by"):
        checked(small, [*before, wrong])


def test_rounding_is_not_a_fault(small):
    """Exact passes behind a lossy one are compared with what they were given."""
    slight = ScaleWeight("model.norm.weight", 1 + 1e-6)
    _, records = checked(small, [QuantizeWeights(bits=4, group=32), slight, CacheKV()])
    assert records[0].kl > 1e-4
    assert records[2].kl == pytest.approx(records[0].kl, rel=1e-2)


def test_a_lossy_pass_may_move_the_outputs(small):
    _, (record,) = checked(small, [ScaleWeightAndSayIt("model.norm.weight", 1.5)])
    assert record.kl > 1e-3


def test_a_pass_that_does_nothing_keeps_the_drift_of_those_before(small):
    _, (lossy, idle) = checked(small, [QuantizeWeights(bits=4, group=32), DoNothing()])
    assert idle.kl == lossy.kl > 0
    assert idle.max_error == lossy.max_error


def test_nan_is_infinitely_far(small):
    with pytest.raises(BudgetExceeded) as raised:
        checked(small, [ScaleWeightAndSayIt("model.norm.weight", math.nan)], max_kl=1e6)
    assert raised.value.kl == math.inf
    with pytest.raises(PassError, match="claims to compute the same"):
        checked(small, [ScaleWeight("model.norm.weight", math.nan)])


def test_a_budget_that_is_missed_names_the_pass_and_the_weight_that_drifts_most(small):
    ids = sample_input_ids(small, 0)[:, :FEWEST_ROW_TOKENS]
    weights = [name for name, constant in small.constants.items() if len(constant.shape) == 2]
    alone = {}
    for name in weights:
        program = small.copy()
        assert QuantizeWeights(bits=4, group=32, skip=f"^(?!{name}$)").run(program).rewrites == 1
        alone[name] = kl_between(small, program, ids)[0]
    worst = max(alone, key=lambda name: alone[name])
    with pytest.raises(BudgetExceeded) as raised:
        checked(small, f"{INT4},cache-kv{{policy=full}}", max_kl=1e-5)
    error = raised.value
    assert isinstance(error, JettisonError)
    assert (error.pass_name, error.max_kl, error.layer) == ("quantize-weights", 1e-5, worst)
    assert error.kl > 1e-5
    for part in ("[quantize-weights]", f"{error.kl:.3g} nats", "1e-05", f"{worst} ({alone[worst]:.3g} nats"):
        assert part in str(error)


def test_a_budget_counts_what_earlier_passes_lost(small):
    _, records = checked(small, [QuantizeWeights(bits=8, group=32, skip="down_proj"), QuantizeWeights(bits=4)])
    first, both = (record.kl for record in records)
    assert 0 < first < both
    with pytest.raises(BudgetExceeded) as raised:
        checked(
            small,
            [QuantizeWeights(bits=8, group=32, skip="down_proj"), QuantizeWeights(bits=4)],
            max_kl=(first + both) / 2,
        )
    assert "down_proj" in raised.value.layer, "only what this pass packed is tried"


def test_no_weight_is_blamed_where_none_was_packed_or_trying_takes_too_long(small, monkeypatch):
    with pytest.raises(BudgetExceeded) as raised:
        checked(small, [ScaleWeightAndSayIt("model.norm.weight", 2.0)], max_kl=0.0)
    assert raised.value.layer is None
    monkeypatch.setattr("jettison.drift.ATTRIBUTION_SECONDS", 0.0)
    with pytest.raises(BudgetExceeded) as raised:
        checked(small, INT4, max_kl=0.0)
    assert raised.value.layer is None
    assert "Choose gentler options" in str(raised.value)


def test_a_budget_that_is_kept_lets_the_pipeline_end(small):
    program, _ = checked(small, f"{INT4},cache-kv{{policy=full}}", max_kl=10.0)
    assert set(program.entries) == {"prefill", "decode"}


@pytest.mark.parametrize("options", [{"bits": 8, "group": 32}, {"bits": 4, "group": 64, "symmetric": True}])
def test_a_packed_weight_is_read_back(small, options):
    program = small.copy()
    QuantizeWeights(**options).run(program)
    name = "model.layers.0.self_attn.q_proj.weight"
    original = small.constants[name].value()
    value = dense_value(program, name)
    step = 2 * original.abs().max() / (2 ** options["bits"] - 1)
    assert 0 < (value - original).abs().max() <= step


@pytest.mark.parametrize("weight_format", [Nf4(32), Lut(8, per_row=True), IntGroups(3, 32, float_zeros=True)], ids=str)
def test_a_weight_of_any_format_is_read_back(small, weight_format):
    program = small.copy()
    StoreIn(weight_format).run(program)
    name = "model.layers.0.self_attn.q_proj.weight"
    original = small.constants[name].value()
    value = dense_value(program, name)
    assert float((value - original).norm()) < 0.2 * float(original.norm())
    assert torch.equal(value, original) == isinstance(weight_format, Lut)
    program.packed[name] = replace(program.packed[name], format="of-another-tool{bits=1}")
    assert dense_value(program, name) is None


def test_an_encoder_is_compared_by_its_outputs(encoder):
    program, (record,) = checked(encoder, INT4)
    ids = example_input_ids(encoder, TOKENS // CONTEXT, CONTEXT)
    expected = (run_program(program, ids)[0] - run_program(encoder, ids)[0]).abs().max().item()
    assert record.kl is None
    assert record.top1_agreement is None
    assert record.max_error == pytest.approx(expected)
    assert expected > 0
    with pytest.raises(PassError, match="scale-weight"):
        checked(encoder, [ScaleWeight("project.weight", 1.1)])


def test_an_encoder_has_no_budget(encoder):
    with pytest.raises(OptionError, match="is an encoder"):
        DriftCheck(encoder, max_kl=0.1)


@pytest.mark.parametrize("max_kl", [-1.0, math.nan, math.inf])
def test_a_budget_is_a_number_of_nats(small, max_kl):
    with pytest.raises(OptionError, match="max_kl"):
        DriftCheck(small, max_kl)


def test_optimize_checks_when_asked(small):
    model = optimize(small_llama(), INT4, target="torch", check=True)
    assert [record.name for record in model.report.passes] == ["quantize-weights", "cache-kv"]
    assert all(record.kl is not None and record.kl > 0 for record in model.report.passes)
    with pytest.raises(BudgetExceeded):
        optimize(small_llama(), INT4, target="torch", max_kl=1e-9)
