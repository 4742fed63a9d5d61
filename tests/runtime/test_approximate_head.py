"""Decode steps of an approximate head: bounds that hold on every target, and the tokens of the whole head."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jettison
from jettison.ir.capture import capture_module
from jettison.ir.errors import OptionError
from jettison.ir.program import copy_graph
from jettison.passes.approximate_lm_head import ApproximateLmHead
from jettison.passes.cache_kv import CacheKV
from jettison.passes.decode_only import specialize_entries
from jettison.passes.pipeline import apply, prepare
from jettison.runtime.approximate_head import Candidates
from jettison.runtime.generation import generate
from jettison.runtime.generation_options import GenerationOptions
from jettison.runtime.session import Session
from jettison.runtime.torch_executor import TorchExecutor
from jettison.runtime.triton_executor import TritonExecutor
from jettison.source import open_source
from tests.codegen.running import emit
from tests.runtime.test_recorded_step import Recorder

VOCAB, FEW = 270, 30  # so that the reserve is all the rest: 8 times as many
STATES = 400
PROMPTS = ["The captain said that", "Once upon a time"]
SAMPLED = [{}, {"do_sample": True, "top_k": 5, "seed": 3}, {"do_sample": True, "top_p": 0.9, "top_k": 0, "seed": 3}]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for a busy core cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class HeadAlone(nn.Module):
    """A table of hidden states, and a head with rows of many kinds."""

    def __init__(self, width, vocab=VOCAB):
        super().__init__()
        torch.manual_seed(width)
        self.embed, self.head = nn.Embedding(STATES, width), nn.Linear(width, vocab, bias=False)
        with torch.no_grad():
            weight, x = self.head.weight.normal_(std=0.1), self.embed.weight.normal_()
            weight[3:6], weight[7], weight[8], weight[9] = 0, weight[6], 100 * weight[8], 1e-6 * weight[9]
            weight[10, ::2], weight[11, 1:] = 0, 0
            weight[12] += 1  # far from symmetric
            x[:8, 5], x[8], x[9], x[10] = 1e3, 0, 1e-4 * x[10], 1e4 * x[10]
            x[11, 1:], x[12:16] = 0, 20 * weight[20:24]
            x[16:24] *= torch.logspace(-3, 3, width)
            x[24:30] += 10
            rows = weight[20 + torch.arange(STATES - 40) % (vocab - 20)]
            x[40:] = 0.5 * x[40:] + torch.linspace(0, 10, STATES - 40)[:, None] * F.normalize(rows)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


def head_alone(width, *passes, dtype=torch.float32):
    """Entries as `cache-kv` makes them, of a program that has nothing to cache; and its matrices."""
    module = HeadAlone(width).eval()
    program = capture_module(module, context=64, kind="decoder", dtype=dtype)
    prepare(program)
    for each in passes:
        each.run(program)
    entry = program.entries.pop("forward")
    program.entries = {"prefill": entry, "decode": copy_graph(entry)}
    specialize_entries(program, "test")
    return program, module.head.weight.detach().to(dtype), module.embed.weight.detach().to(dtype)


def run_decode(executor, ids):
    """One step of rows that hold one token."""
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_positions": torch.zeros_like(ids)}
    return executor.run("decode", {name: given[name] for name in executor.entries["decode"].inputs}, {})


def opened(target, program, folder):
    if target == "onnx":
        return emit(program, folder, accuracy_level=4).executor
    return TritonExecutor(program) if target == "triton" else TorchExecutor(program, kernels=target)


KERNELS = [("packed", torch.float32), ("packed", torch.bfloat16), ("reference", torch.float32), ("onnx", torch.float32)]


@pytest.mark.parametrize(
    ("target", "dtype", "width"),
    [*((*kernel, width) for kernel in KERNELS for width in (40, 128, 300)), ("triton", torch.bfloat16, 128)],
)
def test_no_logit_is_above_its_bound(target, dtype, width, tmp_path):
    program, weight, hidden = head_alone(width, ApproximateLmHead(candidates=FEW), dtype=dtype)
    executor = opened(target, program, tmp_path)
    dense = F.linear(hidden.double(), weight.double())
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    for batch in (1, 3, 40, 80):  # kernels differ by the number of rows
        ids = torch.arange(40).repeat(2)[:batch, None] if batch > 3 else torch.arange(12, 12 + batch)[:, None]
        expected = dense[ids[:, 0]]
        outputs = {name: value[:, 0] for name, value in run_decode(executor, ids).items()}
        assert outputs["reserve"].shape == (batch, VOCAB - FEW)
        both = torch.cat([outputs["candidates"], outputs["reserve"]], -1).sort(-1).values
        assert torch.equal(both, torch.arange(VOCAB).expand(batch, -1))
        slack = rounding * expected.abs().amax(-1, keepdim=True)
        of_reserve = expected.gather(-1, outputs["reserve"])
        # What is returned in bf16 is rounded, and so are the logits of the whole head.
        assert (outputs["bounds"][:, :-1] >= of_reserve - (slack if dtype == torch.bfloat16 else 0)).all()
        computed = expected.gather(-1, outputs["candidates"])
        assert ((outputs["candidate_logits"] - computed).abs() <= slack).all()


@pytest.mark.parametrize("target", ["packed", "onnx"])
def test_what_is_certified_is_the_best(target, tmp_path):
    program, weight, _ = head_alone(128, ApproximateLmHead(candidates=4))
    executor = opened(target, program, tmp_path)
    found = Candidates.of(run_decode(executor, torch.arange(STATES)[:, None]))
    dense = F.linear(found.head_input[:, 0].double(), weight.double())
    tolerance = 1e-5 * dense.abs().amax(-1, keepdim=True)
    logits = found.whole(executor).double()
    assert ((logits - dense).abs() <= tolerance).all()
    for count in (1, 2, 4, 20):  # 20 is more than there are candidates
        best = dense.topk(count).values
        proven = found.certified(count)
        if proven.any():
            own = dense.gather(-1, found.tokens[:, :count])
            assert ((own - best).abs() <= tolerance)[proven].all()
        values, tokens = found.best(count, executor)
        assert ((values - best).abs() <= tolerance).all()
        assert ((dense.gather(-1, tokens) - best).abs() <= tolerance).all()
    assert 0.2 < found.certified(1).float().mean() < 0.95
    assert found.certified(2).any()
    assert not found.certified(20).any()


class Counting:
    """An executor that counts its calls; what `decode` proves can be taken away."""

    def __init__(self, executor, *, proves=True):
        self._executor, self._proves, self.calls = executor, proves, Counter()

    def __getattr__(self, name):
        return getattr(self._executor, name)

    def run(self, entry, inputs, states):
        self.calls[entry] += 1
        outputs = self._executor.run(entry, inputs, states)
        if "bounds" in outputs and not self._proves:
            outputs["bounds"] = torch.full_like(outputs["bounds"], torch.inf)
        return outputs


@pytest.fixture(scope="module")
def artifact(once, two_layers):
    """Of the bundled model, for ONNX Runtime."""
    model = "approximate-lm-head"
    return once("onnx-approximate", lambda out: jettison.optimize(two_layers, model).save_pretrained(out))


def encoded(model):
    return [model.tokenizer.encode(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def on_torch(two_layers):
    return [jettison.optimize(two_layers, passes, target="torch") for passes in ("", "approximate-lm-head")]


@pytest.mark.parametrize("settings", SAMPLED, ids=str)
def test_torch_generates_what_the_whole_head_does(on_torch, settings):
    dense, approximate = on_torch
    for rows in (encoded(dense), encoded(dense)[:1]):
        expected = dense.generate(rows, max_new_tokens=12, **settings)
        assert approximate.generate(rows, max_new_tokens=12, **settings) == expected


def test_onnx_generates_what_the_whole_head_does(artifact, onnx_fp32_artifact):
    dense, approximate = (jettison.load(folder, threads=1) for folder in (onnx_fp32_artifact, artifact))
    for settings in SAMPLED:
        expected = dense.generate(PROMPTS, max_new_tokens=12, **settings)
        assert approximate.generate(PROMPTS, max_new_tokens=12, **settings) == expected


def test_weights_of_the_head_are_stored_once(artifact, onnx_fp32_artifact):
    manifests = [json.loads((folder / "jettison.json").read_text()) for folder in (artifact, onnx_fp32_artifact)]
    files = [(folder / "model.onnx.data").stat().st_size for folder in (artifact, onnx_fp32_artifact)]
    vocab, width = 4096, 256
    estimator = vocab * (width // 2 + 2 * 4 + 1 + 2 * 4)
    assert manifests[0]["weight_bytes"] - manifests[1]["weight_bytes"] == estimator
    assert files[0] - files[1] < 1.05 * estimator
    mapped = {graph["file"]: graph["is_mapped"] for graph in manifests[0]["graphs"]}
    assert mapped == {"prefill.onnx": False, "decode.onnx": False, "head.onnx": True, "head_rows.onnx": False}


def test_a_loaded_torch_artifact_decodes_with_candidates(on_torch, tmp_path):
    _, approximate = on_torch
    loaded = jettison.load(approximate.save_pretrained(tmp_path / "out"))
    assert loaded.session().has_approximate_head
    assert loaded.generate(PROMPTS, max_new_tokens=8) == approximate.generate(PROMPTS, max_new_tokens=8)


@pytest.mark.parametrize(("proves", "expected"), [(True, {"decode"}), (False, {"decode", "head"})])
def test_what_is_not_proven_is_computed(on_torch, proves, expected):
    dense, approximate = on_torch
    executor = Counting(approximate.executor, proves=proves)
    options = GenerationOptions(max_new_tokens=8)
    result = generate(lambda batch, capacity: Session(executor, batch, capacity), encoded(dense), options)
    wanted = generate(lambda batch, capacity: dense.session(batch, capacity), encoded(dense), options)
    assert result.token_ids == wanted.token_ids
    assert executor.calls["decode"] == 7
    assert set(executor.calls) - {"prefill", "head_rows"} == expected
    assert executor.calls["head"] == (0 if proves else 7)


def test_without_a_proof_candidates_are_taken_as_they_are(small_model):
    model = jettison.optimize(small_model, "approximate-lm-head{candidates=16,certify=false}", target="torch")
    executor = Counting(model.executor)
    rows = encoded(model)
    open_session = lambda batch, capacity: Session(executor, batch, capacity)  # noqa: E731
    generate(open_session, rows, GenerationOptions(max_new_tokens=8, do_sample=True, top_k=15, seed=1))
    assert set(executor.calls) == {"prefill", "decode"}
    generate(open_session, rows, GenerationOptions(max_new_tokens=4, do_sample=True, top_k=16, seed=1))
    assert executor.calls["head"] == 3  # the 17th best, which shows a tie, is no candidate


def test_steps_can_be_asked_for_all_logits(on_torch):
    sessions = [model.session(2, 64) for model in on_torch]
    for session in sessions:
        session.prefill([[5, 9, 11], [7, 3, 2]])
    expected, found = (session.decode([8, 6]) for session in sessions)
    assert torch.equal(found, expected)
    with pytest.raises(OptionError, match="computes all logits at each step"):
        sessions[0].decode_candidates([8, 6])


def test_equal_logits_are_in_the_order_of_tokens():
    outputs = {
        "candidates": torch.tensor([[[7, 2, 9, 4]]]), "candidate_logits": torch.tensor([[[1.0, 3.0, 3.0, 1.0]]]),
        "reserve": torch.tensor([[[1]]]), "bounds": torch.tensor([[[1.0, 0.5]]]), "head_input": torch.zeros(1, 1, 2),
    }  # fmt: skip
    found = Candidates.of(outputs)
    assert found.tokens.tolist() == [[2, 9, 4, 7]]
    # What is as good as the bound may be tied with a token that is not computed.
    assert [bool(found.certified(count)) for count in (1, 2, 3, 5)] == [True, True, False, False]
    assert bool(found.certified(3, with_reserve=True))


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, 3.0, -torch.inf, 3.0, 2.0], [1, 3, 4]),
        ([-torch.inf, 3.0, -torch.inf, -torch.inf, 2.0], [1, 4, 0]),
        ([0.0, 3.0, torch.nan, 3.0, 2.0], [2, 2, 2]),
    ],
)
def test_the_whole_head_may_rule_tokens_out(logits, expected):
    class Whole:
        def run(self, entry, inputs, states):
            assert entry == "head"
            return {"logits": torch.tensor([[logits]])}

    nothing = torch.full((1, 4), torch.nan)
    found = Candidates(torch.arange(4)[None], nothing, torch.tensor([[4]]), nothing[:, :2], torch.zeros(1, 1, 2))
    values, tokens = found.best(3, Whole())
    assert tokens.tolist() == [expected]
    assert torch.equal(values, torch.tensor([logits])[:, expected]) or values.isnan().all()


def test_triton_takes_candidates_from_recorded_steps():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.5,
    )  # fmt: skip
    program = open_source(LlamaForCausalLM(config).eval()).program
    prepare(program)
    apply(program, [ApproximateLmHead(candidates=8), CacheKV()])
    recorder = Recorder()
    actual = TritonExecutor(program, record=recorder)
    expected = TorchExecutor(program)
    results = [
        generate(
            lambda batch, capacity, executor=executor: Session(executor, batch, capacity),
            [[5, 9], [7, 8]],
            GenerationOptions(max_new_tokens=5),
        )
        for executor in (actual, expected)
    ]
    assert results[0].token_ids == results[1].token_ids
    assert actual.recorded is not None
    assert (actual.recorded.refusal, recorder.recorded) == (None, 1)


def test_commands_read_an_artifact_with_more_entries(artifact, capsys):
    from jettison.cli import main

    def document(*arguments):
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert {entry["name"] for entry in document("inspect", artifact)["entries"]} == {
        "prefill", "decode", "head", "head_rows",
    }  # fmt: skip
    weights = [weight["name"] for layer in document("explain", artifact)["layers"] for weight in layer["weights"]]
    assert "model.embed_tokens.weight.estimate" in weights


def test_eval_reports_what_candidates_find(artifact, two_layers):
    from jettison.evaluate import evaluate

    text = Path(__file__).parents[2].joinpath("README.md").read_text()[:3000]
    model = jettison.load(artifact, threads=1)
    found = evaluate(model, text=text, context=64, prefill=16, reference=two_layers)
    assert found.top1_agreement == 1.0
    assert found.certified_fraction is not None
    assert 0.5 < found.certified_fraction <= 1.0
    assert found.kl is not None
    assert found.kl < 1e-6
    assert evaluate(model, text=text, context=64).certified_fraction is None
