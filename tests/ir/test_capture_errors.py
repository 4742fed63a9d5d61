"""What cannot be captured is refused with the submodule, the reason and what to do."""

from __future__ import annotations

import builtins
import json
import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettison.ir import eager_check
from jettison.ir.capture import capture, capture_module
from jettison.ir.checkpoint import Checkpoint
from jettison.ir.errors import CaptureError, UnsupportedError
from jettison.ir.huggingface import source_from_checkpoint, source_from_model
from tests.models.tiny_models import tiny_config, tiny_model


class Decoder(nn.Module):
    """Embedding, one layer given by the test, head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.context = 64
        self.embed = nn.Embedding(31, 8)
        self.layers = nn.ModuleList([layer])
        self.head = nn.Linear(8, 31)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + position_ids.unsqueeze(-1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _refusal(module: nn.Module, family: type[Exception] = CaptureError) -> str:
    with pytest.raises(family) as caught:
        capture_module(module)
    message = str(caught.value)
    assert message.startswith("[capture] ")
    return message


# Plain modules.


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Nested(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


def test_a_branch_on_values_names_the_submodule(capfd: pytest.CaptureFixture[str]):
    message = _refusal(Decoder(Nested(Branches())))
    assert "layers.0.inner (Branches) in Decoder" in message
    assert "data-dependent" in message
    assert "torch.where" in message
    assert message.count("\n") == 1
    # torch.export prints the graph it stopped at; a user gets one clear error.
    assert capfd.readouterr() == ("", "")


class Loops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state, out = torch.zeros_like(x[:, 0]), []
        for position in range(x.shape[1]):
            state = torch.tanh(self.cell(state) + x[:, position])
            out.append(state)
        return torch.stack(out, 1)


def test_a_loop_over_tokens_names_the_submodule():
    message = _refusal(Decoder(Nested(Loops())))
    assert "layers.0.inner (Loops) in Decoder: its forward works for one length only" in message
    assert "recurrent" in message


class Chunks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] > 32 else x * 3


def test_lengths_treated_apart_name_the_submodule():
    assert "layers.0 (Chunks) in Decoder" in _refusal(Decoder(Chunks()))


def test_an_exception_of_the_model_is_told():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no such expert")

    message = _refusal(Decoder(Broken()))
    assert "layers.0 (Broken) in Decoder" in message
    assert "no such expert" in message


def test_forward_without_input_ids():
    class Vision(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return pixels

    message = _refusal(Vision())
    assert "Vision.forward takes (pixels)" in message
    assert "forward(input_ids, position_ids)" in message


def test_a_vocabulary_that_nobody_knows():
    class Bare(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids.float().unsqueeze(-1)

    assert "vocab_size" in _refusal(Bare())


def test_returns_without_a_tensor():
    class Silent(Decoder):
        def forward(self, input_ids: Tensor) -> None:
            self.embed(input_ids)

    assert "Silent.forward returns NoneType" in _refusal(Silent(nn.Identity()))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Dropping(nn.Module):
    """Forgets to pass `training`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


@pytest.mark.parametrize("layer", [Noisy(), Dropping()])
def test_random_numbers_in_eval_mode_name_the_submodule(layer: nn.Module):
    message = _refusal(Decoder(layer))
    assert "layers.0" in message
    assert "draws random numbers" in message


class Ragged(nn.Module):
    """Gives each expert the rows it was chosen for."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        counts = (flat.sum(-1) > 0).long().bincount(minlength=2).tolist()
        for count in counts:
            torch._check(count >= 0)
        return torch.cat([part * 2 for part in flat.split(counts)]).reshape(x.shape)


def test_sizes_that_depend_on_values_name_the_submodule():
    message = _refusal(Decoder(Nested(Ragged())))
    assert "layers.0.inner" in message
    assert "torch.where" in message


class Moody(nn.Module):
    """Python's generator leaves no trace in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + random.random())


def test_two_eager_calls_that_differ_are_told_apart_from_a_wrong_graph():
    assert "two calls of the eager model with the same tokens differ" in _refusal(Decoder(Moody()))


class Constant(nn.Module):
    """Looks at the input behind the trace's back, so that the graph holds one answer."""

    def __init__(self) -> None:
        super().__init__()
        self.traced = False

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 if torch.compiler.is_exporting() else 3.0)


def test_a_graph_that_computes_something_else_is_refused():
    message = _refusal(Decoder(Constant()))
    assert "differs from the eager model: an error of" in message


class Shaky(nn.Module):
    """Small differences become large ones, as in a deep model."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(8 * x)


@pytest.mark.parametrize(("factor", "is_refused"), [(1.06, False), (1.5, True)])
def test_a_graph_whose_rounding_differs_is_no_other_graph(monkeypatch, factor, is_refused):
    """In bf16, a graph that is as far from fp32 as the eager model is computes the same."""
    torch.manual_seed(0)
    run_entry = eager_check.run_entry
    monkeypatch.setattr(eager_check, "run_entry", lambda *given: [factor * out for out in run_entry(*given)])
    if is_refused:
        with pytest.raises(CaptureError, match="differs from the eager model"):
            capture_module(Decoder(Shaky()), dtype=torch.bfloat16)
    else:
        assert capture_module(Decoder(Shaky()), dtype=torch.bfloat16).info.kind == "decoder"


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


def test_a_buffer_that_carries_over_between_calls():
    message = _refusal(Decoder(Counting()))
    assert "layers.0" in message
    assert "writes to its buffer layers.0.calls and reads it" in message


def test_weights_without_values():
    with torch.device("meta"):
        module = Decoder(nn.Linear(8, 8))
    message = _refusal(module)
    assert "has no values" in message
    assert "Load the weights" in message


def test_values_that_are_not_finite():
    module = Decoder(nn.Linear(8, 8))
    with torch.no_grad():
        module.head.weight[0, 0] = float("nan")
    assert "NaN or infinite" in _refusal(module)


def test_a_module_that_cannot_be_copied():
    module = Decoder(nn.Linear(8, 8))
    module.log = (line for line in ())
    assert "cannot be copied" in _refusal(module)


def test_a_decoder_that_sees_later_tokens():
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.mean(1, keepdim=True)

    with pytest.raises(CaptureError, match="depend on later tokens") as caught:
        capture_module(Decoder(Mean()), kind="decoder")
    assert "encoder" in str(caught.value)


# Models of transformers.

# Which submodule or layer is named, and why.
REFUSED = {
    "llama4": "layer 0 of Llama4ForCausalLM is of type 'chunked_attention'",
    "mamba": "layer 0 of MambaForCausalLM is of type 'linear_attention'",
    "qwen3_next": "layer 0 of Qwen3NextForCausalLM is of type 'linear_attention'",
    "lfm2": "layer 0 of Lfm2ForCausalLM is of type 'conv'",
    "bamba": r"layer 0 of BambaForCausalLM|mamba.*mixes neighbouring tokens",
    "recurrent_gemma": r"layer 0 of RecurrentGemmaForCausalLM|mixes neighbouring tokens",
    "rwkv": r"rwkv.blocks.0.attention .* works for one length only",
    "jetmoe": r"model.layers.0.(mlp|self_attention).* in JetMoeForCausalLM: \w+ has a size that depends on the values",
    "doge": r"model.layers.0.self_attn \(DogeAttention\) in DogeForCausalLM",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_families_are_refused_by_submodule(name: str, capfd: pytest.CaptureFixture[str]):
    model = tiny_model(name)
    capfd.readouterr()
    with pytest.raises((CaptureError, UnsupportedError), match=REFUSED[name]) as caught:
        capture(source_from_model(model))
    to_do = ("Use a model", "use a model", "Rewrite that forward", "use masks and torch.where")
    assert any(text in str(caught.value) for text in to_do)
    assert capfd.readouterr().err == ""


def test_encoder_decoder():
    import transformers

    config = transformers.T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedError, match="t5 is an encoder-decoder model") as caught:
        source_from_model(transformers.T5ForConditionalGeneration(config))
    assert "EncoderModel" in str(caught.value)


def test_several_modalities():
    import transformers

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision}, text_config=tiny_config("llama").to_dict()
    )
    with pytest.raises(UnsupportedError, match="several modalities") as caught:
        source_from_model(transformers.LlavaForConditionalGeneration(config))
    assert "ForCausalLM" in str(caught.value)


def test_a_bidirectional_window_is_refused():
    import transformers

    config = transformers.ModernBertConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        local_attention=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"layers.1.attn .* its attention mask is neither causal"):
        capture(source_from_model(transformers.ModernBertModel(config)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose config.json the tests spoil."""
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def _rewrite_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _folder_refusal(folder: Path, family: type[Exception] = CaptureError) -> str:
    with pytest.raises(family) as caught:
        capture(source_from_checkpoint(Checkpoint.open(folder)))
    return str(caught.value)


def test_an_unknown_model_type_or_a_transformers_too_old_for_it(folder: Path):
    _rewrite_config(folder, model_type="llama_9", transformers_version="99.0")
    message = _folder_refusal(folder)
    assert "config.json: model_type 'llama_9' is unknown to transformers" in message
    assert "saved with 99.0" in message
    assert "Upgrade transformers" in message


def test_remote_code_for_a_type_that_is_not_native(folder: Path):
    _rewrite_config(folder, model_type="custom", auto_map={"AutoModelForCausalLM": "modeling.Custom"})
    assert "does not run downloaded code" in _folder_refusal(folder)


def test_remote_code_for_a_native_type_is_not_needed(folder: Path):
    _rewrite_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Custom"})
    source = source_from_checkpoint(Checkpoint.open(folder))
    assert source.name == "LlamaForCausalLM"


def test_a_config_that_transformers_refuses(folder: Path):
    _rewrite_config(folder, hidden_size="wide")
    message = _folder_refusal(folder)
    assert "config.json: transformers" in message
    assert "Correct the file" in message


def test_a_config_that_builds_no_model(folder: Path):
    _rewrite_config(folder, hidden_act="swoosh")
    message = _folder_refusal(folder)
    assert "LlamaForCausalLM cannot be built" in message
    assert "swoosh" in message


def test_an_encoder_decoder_folder(folder: Path):
    _rewrite_config(folder, model_type="t5", is_encoder_decoder=True, architectures=["T5ForConditionalGeneration"])
    assert "encoder-decoder" in _folder_refusal(folder, UnsupportedError)


def test_transformers_missing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "transformers":
            raise ImportError(f"No module named {name!r}")
        return original(name, *rest, **more)

    checkpoint, model = Checkpoint.open(folder), tiny_model("llama")
    monkeypatch.setattr(builtins, "__import__", without)
    for source_from, given in ((source_from_checkpoint, checkpoint), (source_from_model, model)):
        with pytest.raises(CaptureError, match=r"pip install 'jettison\[hf\]'"):
            source_from(given)


def test_transformers_too_old(monkeypatch: pytest.MonkeyPatch):
    import transformers

    monkeypatch.setattr(transformers, "AttentionMaskInterface", object())
    with pytest.raises(CaptureError, match=r"is too old: needed 5\.2") as caught:
        source_from_model(tiny_model("llama"))
    assert "Upgrade" in str(caught.value)


def test_attention_arguments_that_nobody_knows():
    """A new argument of the library's attention interface is refused, not ignored."""
    model = tiny_model("llama")
    layer_type = type(model.model.layers[0].self_attn)
    original = layer_type.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs, temperature=torch.ones(()))

    try:
        layer_type.forward = forward
        with pytest.raises(UnsupportedError, match=r"model.layers.0.self_attn \(LlamaAttention\) .*takes temperature"):
            capture(source_from_model(model))
    finally:
        layer_type.forward = original


def test_importing_ir_imports_no_transformers():
    code = (
        "import sys; import jettison.ir.capture, jettison.ir.huggingface, jettison.ir.checkpoint; "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_capture_leaves_the_loggers_of_torch_as_they_were():
    names = ("torch.fx.experimental.symbolic_shapes", "torch.export._trace")
    before = [(logging.getLogger(name).level, list(logging.getLogger(name).filters)) for name in names]
    _refusal(Decoder(Branches()))
    assert before == [(logging.getLogger(name).level, list(logging.getLogger(name).filters)) for name in names]
