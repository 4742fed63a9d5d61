"""Perplexity and KL divergence, against independent computations with transformers."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettison.api import load, optimize
from jettison.evaluate import SAMPLED_WINDOWS, EagerReference, EvalResult, evaluate
from jettison.ir.compare import logits_drift
from jettison.ir.errors import ArtifactError, CaptureError, OptionError, UnsupportedError
from jettison.optimized_model import OptimizedModel
from jettison.runtime.session import Session
from jettison.sample_text import cut_windows, load_text, sample_windows, text_tokens

ROOT = Path(__file__).parents[2]
TINY_LLAMA = ROOT / "examples" / "models" / "tiny-llama"
TREASURE_ISLAND = ROOT.parent / "shared" / "data" / "treasure-island.txt"
VOCAB, CONTEXT = 64, 96
KEYS = [
    "perplexity", "bits_per_byte", "kl", "top1_agreement", "tokens", "weight_bytes", "state_bytes",
    "certified_fraction",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for a busy core cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_llama(seed: int = 0, vocab_size: int = VOCAB) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def perturbed(module: nn.Module) -> nn.Module:
    """A copy with noise on its weights, as a lossy pass would leave it."""
    changed = copy.deepcopy(module)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return changed


def random_windows(count: int, length: int) -> list[list[int]]:
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(3)).tolist()


@torch.no_grad()
def log_probabilities(module: nn.Module, windows: list[list[int]]) -> Tensor:
    """`[N, W, V] f64`, by a plain call."""
    logits = [module(input_ids=torch.tensor([window]), use_cache=False).logits[0] for window in windows]
    return torch.stack(logits).double().log_softmax(-1)


def expected_perplexity(log_p: Tensor, windows: list[list[int]], first: int) -> float:
    scored = torch.tensor(windows)[:, first:]
    return math.exp(F.nll_loss(log_p[:, first - 1 : -1].flatten(0, 1), scored.flatten()).item())


@pytest.fixture(scope="module")
def artifact(onnx_fp32_artifact: Path) -> OptimizedModel:
    """Two layers of the bundled model, unquantised, as an ONNX artifact."""
    return load(onnx_fp32_artifact, threads=1)


@pytest.fixture(scope="module")
def text(artifact: OptimizedModel) -> str:
    """Real text where it is there, else text that the model writes."""
    if TREASURE_ISLAND.is_file():
        return load_text(TREASURE_ISLAND)[20_000:45_000]
    sampled = sample_windows(artifact.executor, 0, count=12, length=512, seed=1)
    return "\n\n".join(artifact.tokenizer.decode(window) for window in sampled)


@pytest.fixture(scope="module")
def stock(two_layers: Path) -> nn.Module:
    """The same as transformers loads it, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return small_llama()


@pytest.fixture(scope="module")
def small(source: nn.Module) -> OptimizedModel:
    """A random model, perturbed, so that it is not its source."""
    return optimize(perturbed(source), target="torch")


@pytest.mark.parametrize(("context", "prefill", "count"), [(None, None, 2), (512, 256, 5)])
def test_unquantised_artifact_is_its_source_to_rounding(artifact, two_layers, text, stock, context, prefill, count):
    length, first = context or 1024, prefill or 1
    windows = cut_windows(text_tokens(artifact.tokenizer, text), length)[:count]
    shown = artifact.tokenizer.decode([token for window in windows for token in window])
    result = evaluate(artifact, text=shown, reference=two_layers, context=context, prefill=prefill)
    assert result.tokens == len(windows) * (length - first) >= 1000
    assert result.kl is not None
    assert result.kl < 1e-6
    assert result.top1_agreement is not None
    assert result.top1_agreement > 0.999
    expected = expected_perplexity(log_probabilities(stock, windows), windows, first)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.perplexity < 500, "two trained layers on real text: thousands would mean shifted targets"
    assert result.weight_bytes == artifact.executor.weight_bytes > 10_000_000
    assert result.state_bytes == 2 * 2 * 4 * length * 32 * 4  # layers, key and value, heads, slots, channels, f32


def test_bits_per_byte_counts_the_bytes_that_the_scored_tokens_cover(artifact, text):
    from transformers import AutoTokenizer

    length = 64
    plain = text.encode("ascii", "ignore").decode()[:2000]
    encoded = AutoTokenizer.from_pretrained(TINY_LLAMA)(plain, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    for prefill in (None, 40):
        first = prefill or 1
        scored = [
            at for start in range(0, len(ids) - length + 1, length) for at in range(start + first, start + length)
        ]
        covered = sum(offsets[at][1] - offsets[at][0] for at in scored)
        result = evaluate(artifact, text=plain, context=length, prefill=prefill)
        assert result.tokens == len(scored)
        nats = math.log(result.perplexity) * result.tokens
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / covered, rel=1e-12)


@pytest.mark.parametrize("prefill", [None, 1, 20, 46])
def test_kl_and_perplexity_of_a_perturbed_model(source, small, prefill):
    windows = random_windows(5, 47)
    first = prefill or 1
    log_p, log_q = log_probabilities(source, windows), log_probabilities(perturbed(source), windows)
    p, q = log_p[:, first - 1 : -1].flatten(0, 1), log_q[:, first - 1 : -1].flatten(0, 1)
    result = evaluate(small, windows=windows, reference=source, prefill=prefill)
    assert result.tokens == 5 * (47 - first) == len(p)
    expected = F.kl_div(q, p, reduction="sum", log_target=True).item() / len(p)
    assert expected > 1e-3
    assert result.kl == pytest.approx(expected, rel=1e-4)
    assert result.kl == pytest.approx(logits_drift(p, q).kl, rel=1e-4)
    assert result.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=1e-12)
    assert result.perplexity == pytest.approx(expected_perplexity(log_q, windows, first), rel=1e-5)
    assert result.state_bytes == 2 * 2 * 2 * 64 * 8 * 4  # capacity is rounded up to 64


def test_what_is_held_at_a_time_does_not_change_the_result(source, small, monkeypatch):
    windows = random_windows(7, 30)
    settings = [{"prefill": 11}, {}]
    expected = [evaluate(small, windows=windows, reference=source, **each) for each in settings]
    window_bytes = (30 - 11) * VOCAB * 4
    monkeypatch.setattr("jettison.evaluate.MOST_REFERENCE_BYTES", 3 * window_bytes)
    monkeypatch.setattr("jettison.evaluate.CHUNK_BYTES", 5 * 8 * VOCAB)
    monkeypatch.setattr(small, "session", lambda rows, slots: Session(small.executor, rows, slots, prefill_chunk=8))
    for each, before in zip(settings, expected, strict=True):
        result = evaluate(small, windows=windows, reference=source, **each)
        assert result.tokens == before.tokens
        assert result.kl == pytest.approx(before.kl, rel=1e-5)
        assert result.perplexity == pytest.approx(before.perplexity, rel=1e-6)
        assert result.state_bytes == before.state_bytes


def test_a_reference_is_computed_in_fp32_from_narrow_weights(small, source, tmp_path):
    """bf16 weights from a folder, against the same values widened as transformers loads them."""
    from transformers import AutoModelForCausalLM

    copy.deepcopy(source).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    widened = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32).eval()
    tokens = random_windows(1, 40)[0]
    from_folder = EagerReference(tmp_path / "bf16").logits(tokens)
    expected = log_probabilities(widened, [tokens])[0]
    assert from_folder.dtype == torch.float32
    assert (from_folder.double().log_softmax(-1) - expected).abs().max() < 1e-5
    assert evaluate(small, windows=[tokens], reference=tmp_path / "bf16").kl == pytest.approx(
        evaluate(small, windows=[tokens], reference=widened).kl, rel=1e-4
    )


def test_a_module_in_training_mode_is_evaluated_without_dropout_and_left_as_it_was():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head, self.drop = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB), nn.Dropout(0.9)

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.head(self.drop(self.embed(input_ids) + position_ids[..., None]))

    module = Dropping().train()
    module.head.eval()
    first = EagerReference(module).logits([1, 2, 3])
    assert torch.equal(first, EagerReference(module).logits([1, 2, 3]))
    assert [module.training, module.drop.training, module.head.training] == [True, True, False]


def test_text_is_cut_into_whole_windows_of_at_most_1024_tokens(artifact, text, monkeypatch):
    monkeypatch.setattr("jettison.evaluate.LONGEST_WINDOW", 100)  # as 1024 for a longer context
    tokens = text_tokens(artifact.tokenizer, text)[:350]
    result = evaluate(artifact, text=artifact.tokenizer.decode(tokens))
    assert result.tokens == 3 * 99
    assert evaluate(artifact, text=artifact.tokenizer.decode(tokens), context=70, prefill=60).tokens == 5 * 10


def test_without_data_the_model_writes_its_own(small, source):
    settings = {"context": 12, "reference": source}
    result = evaluate(small, **settings)
    assert result.tokens == SAMPLED_WINDOWS * 11
    assert evaluate(small, **settings) == result
    assert evaluate(small, **settings, seed=1).perplexity != result.perplexity
    # A model finds its own text likelier than a uniform guess would.
    assert result.perplexity < VOCAB


def test_result_has_the_stable_keys(small, source):
    result = evaluate(small, windows=random_windows(1, 8))
    assert list(result.as_dict()) == KEYS
    assert result.as_dict()["kl"] < 1e-6, "the module it was made from is the reference"
    assert result.as_dict()["top1_agreement"] == 1.0
    assert result.as_dict()["bits_per_byte"] is None, "a module has no tokenizer"
    assert list(EvalResult(1.0, 1.0, 0.0, 1.0, 1, 1, 1).as_dict()) == KEYS


def test_recorded_source_is_the_reference_only_while_it_is_the_same(small, source, tmp_path, monkeypatch):
    from jettison.ir.checkpoint import Checkpoint

    windows, folder = random_windows(2, 20), tmp_path / "model"
    source.save_pretrained(folder)
    given = evaluate(small, windows=windows, reference=folder)
    monkeypatch.setattr(small, "source", folder, raising=False)
    monkeypatch.setattr(small, "source_sha256", Checkpoint.open(folder).content_hash(), raising=False)
    assert evaluate(small, windows=windows) == given
    perturbed(source).save_pretrained(folder)
    assert evaluate(small, windows=windows).kl is None
    for file in folder.iterdir():
        file.unlink()
    assert evaluate(small, windows=windows).kl is None
    monkeypatch.setattr(small, "source", source)
    assert evaluate(small, windows=windows).kl == pytest.approx(given.kl, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"text": "a", "windows": [[1, 2]]}, "found both"),
        ({"windows": []}, "found 0 of length none"),
        ({"windows": [[1, 2, 3], [1, 2]]}, "found 2 of length 2, 3"),
        ({"windows": [[1]]}, "length 1,"),
        ({"windows": [[1] * (CONTEXT + 1)]}, f"length {CONTEXT + 1},"),
        ({"windows": [[1, VOCAB]]}, f"found token {VOCAB}, needs 0 to {VOCAB - 1}"),
        ({"windows": [[1, -1]]}, "found token -1"),
        ({"context": 1}, f"context=1: needs 2 to {CONTEXT}"),
        ({"context": CONTEXT + 1}, f"needs 2 to {CONTEXT}"),
        ({"context": 16, "prefill": 16}, "prefill=16: needs 1 to 15"),
        ({"prefill": 0}, "prefill=0"),
        ({"windows": [[1, 2, 3]], "prefill": 3}, "prefill=3: needs 1 to 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(small, settings, words):
    with pytest.raises(OptionError, match=words):
        evaluate(small, **settings)


def test_text_that_is_too_short_says_what_it_has_and_needs(artifact):
    with pytest.raises(OptionError, match=r"found \d tokens, needs at least 1024"):
        evaluate(artifact, text="Fifteen men on the dead man's chest"[:20])
    with pytest.raises(OptionError, match="found 0 tokens, needs at least 32"):
        evaluate(artifact, text="", context=32)


def test_text_needs_a_tokenizer(small):
    with pytest.raises(UnsupportedError, match="without a tokenizer"):
        evaluate(small, text="Fifteen men")


def test_an_encoder_has_no_next_token(small, monkeypatch):
    monkeypatch.setattr(small, "info", dataclasses.replace(small.info, kind="encoder"))
    with pytest.raises(OptionError, match="is an encoder"):
        evaluate(small)


def test_a_reference_of_another_vocabulary_is_refused(small):
    with pytest.raises(OptionError, match="has a vocabulary of 48 tokens"):
        evaluate(small, windows=random_windows(1, 8), reference=small_llama(vocab_size=48))


def test_a_reference_that_is_no_model_is_refused(small, tmp_path):
    with pytest.raises(CaptureError):
        evaluate(small, windows=random_windows(1, 8), reference=tmp_path)


def test_a_damaged_reference_is_named(small, source):
    damaged = copy.deepcopy(source)
    with torch.no_grad():
        damaged.model.norm.weight[3] = float("nan")
    with pytest.raises(OptionError, match="gives NaN or infinite logits"):
        evaluate(small, windows=random_windows(1, 8), reference=damaged)


@pytest.mark.parametrize("prefill", [None, 3])
def test_logits_that_are_no_numbers_are_not_scored(small, monkeypatch, prefill):
    run = small.executor.run

    def damaged(entry, inputs, states):
        logits = run(entry, inputs, states)["logits"].clone()
        logits[..., -1, 7] = float("nan")
        return {"logits": logits}

    monkeypatch.setattr(small.executor, "run", damaged)
    with pytest.raises(ArtifactError, match="not finite numbers"):
        evaluate(small, windows=random_windows(2, 8), prefill=prefill)
