"""`jettison.optimize` and what it returns, from Python: pipelines, targets, kinds of models and of prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import jettison
from jettison import CacheKV, Full, QuantizeWeights, Window
from jettison.ir.compare import assert_close, logits_drift
from jettison.ir.errors import ArtifactError, JettisonError, OptionError, UnsupportedError
from jettison.optimized_model import OptimizedModel
from tests.models.tiny_models import CONTEXT, VOCAB_SIZE, random_ids, tiny_model

ROOT = Path(__file__).parents[2]
TINY_LLAMA = ROOT / "examples" / "models" / "tiny-llama"
PROMPT = "The captain said that"
# Of the largest output: fp32 on both sides.
TOLERANCE, REASON = 1e-4, "fp32 in another order of operations"


pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for a busy core cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def on_torch(two_layers: Path) -> OptimizedModel:
    pytest.importorskip("transformers")
    return jettison.optimize(two_layers, target="torch")


@pytest.fixture(scope="module")
def on_onnx(onnx_fp32_artifact: Path) -> OptimizedModel:
    pytest.importorskip("transformers")
    return jettison.load(onnx_fp32_artifact, allow_spinning=False)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """A random Llama of two layers."""
    pytest.importorskip("transformers")
    return tiny_model("llama")


@pytest.fixture(scope="module")
def small(captured_once: None, llama: nn.Module) -> OptimizedModel:
    """The same, optimised as a live model."""
    return jettison.optimize(llama, target="torch")


# --- targets --------------------------------------------------------------------------------------------------------


def test_targets_give_the_same_tokens(on_torch: OptimizedModel, on_onnx: OptimizedModel) -> None:
    prompts = [on_torch.tokenizer.encode(text) for text in (PROMPT, "“Ah,” he")]
    ours, theirs = (model.generate(prompts, max_new_tokens=60, eos_token_id=[]) for model in (on_torch, on_onnx))
    assert [len(row) for row in ours] == [60, 60]
    assert ours == theirs
    assert on_onnx.report.target == "onnx"
    assert on_torch.report.target == "torch"


def test_quantised_activations_cost_little(on_torch: OptimizedModel, onnx_artifact: Path, tmp_path: Path) -> None:
    """Accuracy level 4, which is emitted, against level 0 of the same weights, on what the model itself writes."""
    folder = onnx_artifact
    text = on_torch.generate(on_torch.tokenizer.encode(PROMPT), max_new_tokens=300, do_sample=True, seed=1)
    fast = jettison.load(folder, threads=1, allow_spinning=False).session(1, 320).score([text])
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    levels = [
        attribute for node in model.graph.node for attribute in node.attribute if attribute.name == "accuracy_level"
    ]
    assert {attribute.i for attribute in levels} == {4}
    assert len(levels) == 2 * 5 + 1
    for attribute in levels:
        attribute.i = 0
    exact_folder = tmp_path / "exact"
    exact_folder.mkdir()
    onnx.save(model, exact_folder / "model.onnx")
    (exact_folder / "model.onnx.data").hardlink_to(folder / "model.onnx.data")
    exact = _executor_like(folder, exact_folder)
    drift = logits_drift(exact.session(1, 320).score([text]), fast)
    assert drift.tokens == 300
    assert drift.kl is not None
    assert 0 < drift.kl < 2e-3, "nats per token"


def _executor_like(folder: Path, other: Path) -> OptimizedModel:
    """A loaded artifact whose graph lies in another folder."""
    from jettison.runtime.onnx_executor import OnnxExecutor, OnnxGraph

    model = jettison.load(folder, threads=1, allow_spinning=False)
    signature = model.executor.entries["prefill"]
    states = {name: (name, name.replace("past_key_values.", "present.")) for name in signature.states}
    graph = OnnxGraph(other / "model.onnx", ("prefill", "decode"), signature.inputs, signature.outputs, states)
    model._executor = OnnxExecutor([graph], model.info, model.executor.states, 0, threads=1, allow_spinning=False)
    return model


# --- pipelines ------------------------------------------------------------------------------------------------------


def test_text_and_objects_are_the_same_pipeline(llama: nn.Module) -> None:
    text = "quantize-weights{bits=8,group=64},cache-kv{policy=window{size=16}}"
    objects = [QuantizeWeights(bits=8, group=64), CacheKV(Window(size=16))]
    first, second = (jettison.optimize(llama, passes, target="torch") for passes in (text, objects))
    assert first.report.pipeline == second.report.pipeline
    assert first.graph == second.graph
    assert [record.name for record in first.report.passes] == ["quantize-weights", "cache-kv"]
    assert first.generate([5, 6, 7], max_new_tokens=8) == second.generate([5, 6, 7], max_new_tokens=8)


def test_decoder_without_a_cache_gets_one_and_says_so(small: OptimizedModel, llama: nn.Module) -> None:
    assert small.report.pipeline == "cache-kv{policy=full}"
    explicit = jettison.optimize(llama, [CacheKV(Full())], target="torch")
    assert explicit.report.pipeline == small.report.pipeline
    assert explicit.graph == small.graph


def test_graphs_before_and_after_and_their_difference(small: OptimizedModel) -> None:
    assert "entry forward(" in small.graph_before
    assert "entry forward(" not in small.graph
    assert "entry prefill(" in small.graph
    assert "jettison.write_slots" not in small.graph_before
    assert "jettison.write_slots" in small.graph
    assert "write_slots" in small.diff()


def test_strict_makes_a_miss_an_error(llama: nn.Module) -> None:
    passes = "cache-kv{policy=window}"  # this model has no window of its own
    lenient = jettison.optimize(llama, passes, target="torch")
    (record,) = lenient.report.passes
    assert len(record.misses) == 2
    with pytest.raises(
        UnsupportedError, match=r"strict mode: 2 place\(s\) could not be rewritten(.|\n)*no sliding window"
    ):
        jettison.optimize(llama, passes, target="torch", strict=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "cuda"}, "target='cuda': needed one of onnx, torch"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' with target='onnx'"),
        ({"dtype": "int4", "target": "torch"}, "dtype='int4': needed one of float32"),
        ({"passes": "quantise-weights"}, "quantise-weights.*\n?(.|\n)*quantize-weights"),
    ],
)
def test_bad_settings(llama: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        jettison.optimize(llama, **settings)


def test_a_format_that_the_target_cannot_run_is_refused_before_the_model_is_opened() -> None:
    with pytest.raises(UnsupportedError, match=r"quantize-weights\{.*\} with target='onnx': .* takes 2, 4 or 8 bits"):
        jettison.optimize("no-such-folder", "quantize-weights{bits=3}", target="onnx")
    with pytest.raises(JettisonError, match="no-such-folder"):
        jettison.optimize("no-such-folder", "quantize-weights{bits=3}", target="torch")


# --- kinds of models ------------------------------------------------------------------------------------------------


def test_live_model_has_no_tokenizer_but_takes_ids(small: OptimizedModel) -> None:
    with pytest.raises(UnsupportedError, match=r"without a tokenizer\. Pass token ids"):
        small.generate("text")
    assert len(small.generate([5, 6, 7], max_new_tokens=4, eos_token_id=[])) == 4


WITHOUT_TRANSFORMERS = """
import sys
for name in ("transformers", "tokenizers", "huggingface_hub"):
    sys.modules[name] = None
import torch, torch.nn.functional as F
from torch import nn
import jettison

class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.places = nn.Embedding(64, 16)
        self.projections = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 50)

    def forward(self, input_ids, position_ids):
        x = self.embed(input_ids) + self.places(position_ids)
        heads = [layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in self.projections]
        return self.head(x + F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))

torch.manual_seed(0)
model = Decoder().eval()
found = []
for target in ("torch", "onnx"):
    optimized = jettison.optimize(model, target=target, context=64)
    optimized.save_pretrained(f"{sys.argv[1]}/{target}")
    loaded = jettison.load(f"{sys.argv[1]}/{target}")
    tokens = loaded.generate([[3, 4, 5], [6]], max_new_tokens=10)
    assert tokens == optimized.generate([[3, 4, 5], [6]], max_new_tokens=10)
    found.append(tokens)
ids, expected = [3, 4, 5], []
for _ in range(10):
    with torch.no_grad():
        expected.append(int(model(torch.tensor([ids]), torch.arange(len(ids))[None])[0, -1].argmax()))
    ids.append(expected[-1])
assert found[0] == found[1] and found[0][0] == expected, (found, expected)
print("done")
"""


def test_plain_module_without_transformers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_TRANSFORMERS)
    command = [sys.executable, "-W", "error", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"
    manifest = json.loads((tmp_path / "onnx" / "jettison.json").read_text())
    assert manifest["model"] == {"kind": "decoder", "name": "Decoder", "context": 64, "vocab_size": 50}
    assert not (tmp_path / "onnx" / "genai_config.json").exists(), "nothing says what its tokens mean"


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    pytest.importorskip("transformers")
    return tiny_model("bert")


@pytest.fixture(scope="module", params=["torch", "onnx"])
def encoder(request: pytest.FixtureRequest, captured_once: None, bert: nn.Module) -> OptimizedModel:
    return jettison.optimize(bert, target=request.param, allow_spinning=False)


def test_encoder_is_called_like_the_model(encoder: OptimizedModel, bert: nn.Module) -> None:
    ids = random_ids(3, 19)
    mask = (torch.arange(19)[None] < torch.tensor([19, 4, 11])[:, None]).long()
    kinds = (torch.arange(19) > 9).long().repeat(3, 1)
    for inputs in ({"attention_mask": mask, "token_type_ids": kinds}, {"attention_mask": mask}, {}):
        with torch.no_grad():
            expected = bert(input_ids=ids, **inputs)
        actual = encoder(input_ids=ids, **inputs)
        for name in ("last_hidden_state", "pooler_output"):
            assert_close(actual[name], expected[name], tolerance=TOLERANCE, reason=REASON, what=name)
    assert encoder.report.pipeline == ""
    given = {"input_ids": ids, "attention_mask": mask}
    expected = encoder(**given)
    for types in ({"input_ids": torch.int32}, {"attention_mask": torch.bool}, {"attention_mask": torch.float32}):
        actual = encoder(**{name: value.to(types.get(name, value.dtype)) for name, value in given.items()})
        assert torch.equal(actual["last_hidden_state"], expected["last_hidden_state"]), types


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input_ids is missing"),
        ({"input_ids": [[1, 2]]}, "input_ids: needed a tensor"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1)}, "no input 'inputs_embeds'"),
        ({"input_ids": torch.ones(2, CONTEXT + 1, dtype=torch.long)}, f"{CONTEXT + 1} tokens: .* {CONTEXT}"),
        ({"input_ids": torch.tensor([[1, VOCAB_SIZE]])}, f"token {VOCAB_SIZE}"),
        ({"input_ids": torch.tensor([1, 2])}, r"shape \[2\]: needed \[batch, tokens\]"),
        ({"input_ids": torch.ones(1, 2)}, "input_ids of torch.float32: needed integers"),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 2, dtype=torch.long)},
            r"attention_mask of shape \[1, 2\]: needed \[1, 3\]",
        ),
    ],
)
def test_encoder_refuses_bad_inputs(encoder: OptimizedModel, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        encoder(**inputs)


def test_encoder_generates_nothing_and_decoder_is_not_called(encoder: OptimizedModel, small: OptimizedModel) -> None:
    with pytest.raises(OptionError, match="BertModel is an encoder: it has no next token"):
        encoder.generate([1, 2, 3])
    with pytest.raises(OptionError, match="is a decoder: use generate"):
        small(input_ids=torch.ones(1, 3, dtype=torch.long))


# --- kinds of prompts -----------------------------------------------------------------------------------------------


def left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def test_prompts_of_every_kind_give_the_same_tokens(on_torch: OptimizedModel) -> None:
    texts = [PROMPT, "Then"]
    rows = [on_torch.tokenizer.encode(text) for text in texts]
    expected = on_torch.generate_rows(rows, max_new_tokens=12).token_ids
    assert [len(new) for new in expected] == [12, 12]
    assert on_torch.generate(rows, max_new_tokens=12) == expected
    assert on_torch.generate([torch.tensor(row) for row in rows], max_new_tokens=12) == expected
    assert on_torch.generate(texts, max_new_tokens=12) == [on_torch.tokenizer.decode(new) for new in expected]
    padded, mask = left_padded(rows, 0)
    assert (mask == 0).any()
    tensor = on_torch.generate(padded, attention_mask=mask, max_new_tokens=12)
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == [row + new for row, new in zip(padded.tolist(), expected, strict=True)]
    for text, ids, new in zip(texts, rows, expected, strict=True):
        assert on_torch.generate(text, max_new_tokens=12) == on_torch.tokenizer.decode(new)
        assert on_torch.generate(ids, max_new_tokens=12) == new
        assert on_torch.generate(torch.tensor([ids]), max_new_tokens=12).tolist() == [ids + new]


def test_generate_takes_what_a_tokenizer_of_transformers_returns(on_torch: OptimizedModel) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_LLAMA)
    actual = on_torch.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=12)
    ids = on_torch.tokenizer.encode(PROMPT)
    assert actual.tolist() == [ids + on_torch.generate(ids, max_new_tokens=12)]


def test_left_padded_tensor_gives_what_transformers_gives(on_torch: OptimizedModel, two_layers: Path) -> None:
    transformers = pytest.importorskip("transformers")
    eager = transformers.LlamaForCausalLM.from_pretrained(two_layers, dtype=torch.float32).eval()
    prompts = [on_torch.tokenizer.encode(text) for text in ("It was", PROMPT + " the old man", "Ah")]
    ids, mask = left_padded(prompts, 0)
    settings = {"max_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        plain = eager.generate(ids, attention_mask=mask, pad_token_id=0, **settings)
    # End the first row early, at its fifth token: the others go on, and it is padded.
    end = int(plain[0, ids.shape[1] + 4])
    for more in ({}, {"eos_token_id": end}):
        with torch.no_grad():
            expected = eager.generate(ids, attention_mask=mask, pad_token_id=3, **settings, **more)
        actual = on_torch.generate(ids, attention_mask=mask, pad_token_id=3, **settings, **more)
        assert torch.equal(actual, expected)
    assert (actual[0] == end).any()
    assert actual[0, -1] == 3


def test_streaming_yields_the_text_piece_by_piece(on_torch: OptimizedModel) -> None:
    whole = on_torch.generate(PROMPT, max_new_tokens=20)
    pieces = list(on_torch.stream(PROMPT, max_new_tokens=20))
    assert len(pieces) > 5
    assert "".join(pieces) == whole
    assert "".join(on_torch.stream(on_torch.tokenizer.encode(PROMPT), max_new_tokens=20)) == whole

    class Streamer:
        def __init__(self) -> None:
            self.put_tokens: list[list[int]] = []
            self.is_ended = False

        def put(self, value: Tensor) -> None:
            self.put_tokens.append(value.flatten().tolist())

        def end(self) -> None:
            self.is_ended = True

    streamer = Streamer()
    ids = on_torch.generate(on_torch.tokenizer.encode(PROMPT), max_new_tokens=5, streamer=streamer)
    assert streamer.put_tokens == [on_torch.tokenizer.encode(PROMPT), *([token] for token in ids)]
    assert streamer.is_ended


def test_sampling_is_seeded(on_torch: OptimizedModel) -> None:
    settings = {"max_new_tokens": 16, "do_sample": True, "temperature": 1.0, "top_k": 0}
    first, again, other = (on_torch.generate(PROMPT, seed=seed, **settings) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("target", ["on_torch", "on_onnx"])
def test_several_sequences_equal_the_prompts_repeated(target: str, request: pytest.FixtureRequest) -> None:
    """The rows are prefilled once and their states copied; the seed gives each its own draws."""
    model: OptimizedModel = request.getfixturevalue(target)
    rows = [model.tokenizer.encode(text) for text in (PROMPT, "Then")]
    settings = {"max_new_tokens": 12, "do_sample": True, "seed": 3, "min_p": 0.02, "repetition_penalty": 1.1}
    expected = model.generate_rows([row for row in rows for _ in range(3)], **settings).token_ids
    assert len({tuple(new) for new in expected}) == 6
    assert model.generate_rows(rows, num_return_sequences=3, **settings).token_ids == expected


def test_several_sequences_of_every_kind_of_prompt(on_torch: OptimizedModel) -> None:
    texts = [PROMPT, "Then"]
    rows = [on_torch.tokenizer.encode(text) for text in texts]
    settings = {"max_new_tokens": 10, "do_sample": True, "seed": 3, "num_return_sequences": 2, "eos_token_id": []}
    expected = on_torch.generate(rows, **settings)
    assert [len(new) for new in expected] == [10] * 4
    assert on_torch.generate(texts, **settings) == [on_torch.tokenizer.decode(new) for new in expected]
    alone = on_torch.generate(rows[0], **settings)
    assert alone == expected[:2]
    assert on_torch.generate(PROMPT, **settings) == [on_torch.tokenizer.decode(new) for new in alone]
    padded, mask = left_padded(rows, 0)
    tensor = on_torch.generate(padded, attention_mask=mask, **settings)
    prompts = [row for row in padded.tolist() for _ in range(2)]
    assert tensor.tolist() == [row + new for row, new in zip(prompts, expected, strict=True)]
    with pytest.raises(OptionError, match="needs 1 with do_sample=False"):
        on_torch.generate(PROMPT, num_return_sequences=2)


def test_generation_config_may_hold_a_penalty_min_p_and_sequences(small: OptimizedModel) -> None:
    model = tiny_model("llama")
    model.generation_config.update(do_sample=True, repetition_penalty=1.5, min_p=0.1, num_return_sequences=2)
    configured = jettison.optimize(model, target="torch")
    asked = {"do_sample": True, "repetition_penalty": 1.5, "min_p": 0.1, "num_return_sequences": 2}
    first = configured.generate([5, 6, 7], max_new_tokens=20, seed=1)
    assert first == small.generate([5, 6, 7], max_new_tokens=20, seed=1, **asked)
    assert len(first) == 2


IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        ([], {}, "prompt"),
        ([[]], {}, "found no tokens"),
        ([[1, VOCAB_SIZE]], {}, f"{VOCAB_SIZE}"),
        ([[1] * (CONTEXT + 1)], {}, "context"),
        ([1.5, 2.5], {}, "prompt"),
        (torch.tensor([1, 2]), {}, r"shape \[2\]: needed \[batch, tokens\]"),
        (torch.ones(1, 3), {}, "float32: needed integers"),
        (IDS, {"attention_mask": torch.ones(2, 2)}, r"attention_mask of shape \[2, 2\]: needed \[2, 3\]"),
        (IDS, {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "found no tokens"),
        ([[1, 2]], {"attention_mask": torch.ones(1, 2)}, "attention_mask goes with a tensor"),
        (None, {}, "nothing to continue in NoneType"),
        (b"text", {}, "nothing to continue in bytes"),
        ([[1]], {"input_ids": IDS}, "both inputs and input_ids"),
        ([[1]], {"max_new_token": 3}, "max_new_token"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"min_p": 1.5}, "min_p"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([[1]], {"num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_bad_prompts(small: OptimizedModel, inputs: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        small.generate(inputs, **settings)


def test_session_of_a_model(small: OptimizedModel) -> None:
    session = small.session(2)
    assert (session.batch, session.capacity, session.context) == (2, CONTEXT, CONTEXT)
    assert small.session(1, 10).capacity == 64
    assert session.prefill([[3, 4], [5]]).shape == (2, VOCAB_SIZE)


def test_loading_what_is_no_artifact(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing", TINY_LLAMA):
        with pytest.raises(ArtifactError, match=f"{folder.name}.*(jettison.json|does not exist)"):
            jettison.load(folder)
