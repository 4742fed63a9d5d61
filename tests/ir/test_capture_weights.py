"""Weights are mapped from the files or shared with the live model; what does not fit is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jettison.ir.capture import capture, capture_module
from jettison.ir.checkpoint import Checkpoint
from jettison.ir.compare import run_program
from jettison.ir.errors import CaptureError
from jettison.ir.huggingface import open_checkpoint, source_from_checkpoint, source_from_model
from jettison.ir.program import Program
from tests.models.tiny_models import LAYERS, TINY_MODELS, random_ids, randomize, tiny_config, tiny_model

TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small lose to the hand-over between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def _capture_folder(folder: Path) -> Program:
    return capture(source_from_checkpoint(Checkpoint.open(folder)))


def _refusal(folder: Path) -> str:
    with pytest.raises(CaptureError) as caught:
        source_from_checkpoint(Checkpoint.open(folder))
    return str(caught.value)


def _assert_computes(program: Program, eager: nn.Module) -> None:
    """The program computes in fp32 what the eager model computes with its weights converted to fp32."""
    ids = random_ids(2, 9)
    with torch.no_grad():
        expected = eager.float()(ids, use_cache=False).logits
    error = (run_program(program, ids)[0] - expected).abs().max().item()
    assert error <= TOLERANCE * expected.abs().max().item()


def _rewrite_weights(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _rewrite_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _mapped_ranges(folder: Path) -> list[range]:
    """Addresses at which files of the folder are mapped into this process."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path.startswith(str(folder)):
            first, last = (int(address, 16) for address in addresses.split("-"))
            ranges.append(range(first, last))
    return ranges


# Folders.


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory map, which only Linux shows as a file")
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_weights_of_a_bf16_folder_stay_mapped(tmp_path: Path, shard_size: str):
    model = tiny_model("llama", dtype=torch.bfloat16)
    _save(model, tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard_size == "5GB" else 3)
    program = _capture_folder(tmp_path)
    ranges, weights = _mapped_ranges(tmp_path), program.constants
    assert len(weights) >= len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        constant = weights[name]
        assert (constant.stored_dtype, constant.dtype) == (torch.bfloat16, torch.float32)
        assert constant.blocks[0].equal(parameter)
        assert any(block.data_ptr() in mapped for block in constant.blocks for mapped in ranges), name
    _assert_computes(program, model)


# A folder of about 200 MB, in a process of its own, whose memory is sampled while it is captured.
_MEASURE = """
import sys, threading, time
from pathlib import Path
from jettison.ir.capture import capture
from jettison.ir.checkpoint import Checkpoint
from jettison.ir.huggingface import source_from_checkpoint

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def captured(folder):
    return capture(source_from_checkpoint(Checkpoint.open(folder)))

captured(sys.argv[1])  # loads code, which is not what is measured
before, samples, done = anonymous_bytes(), [], threading.Event()

def sample():
    while not done.is_set():
        samples.append(anonymous_bytes())
        time.sleep(0.005)

thread = threading.Thread(target=sample)
thread.start()
program = captured(sys.argv[2])
done.set()
thread.join()
print(max(samples) - before, sum(c.stored_bytes for c in program.constants.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_capture_holds_no_copy_of_the_weights(tmp_path: Path):
    from transformers import LlamaForCausalLM

    small = _save(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "small")
    config = tiny_config("llama")
    config.vocab_size, config.hidden_size, config.head_dim = 200_000, 256, 64
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # The values do not matter, and drawing 100 million takes longer than the capture.
    filled = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in filled.parameters():
        nn.init.constant_(parameter, 0.01)
    large = _save(filled, tmp_path / "large")
    command = [sys.executable, "-c", _MEASURE, str(small), str(large)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak_bytes, stored_bytes = (int(number) for number in printed.split())
    assert stored_bytes > 200_000_000
    # Two matrices make up the folder; one of them may be held for a moment, beside what tracing leaves to the garbage
    # collector.
    assert peak_bytes < 0.7 * stored_bytes


def test_tied_embeddings_are_one_constant(tmp_path: Path):
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    model = randomize(type(tiny_model("llama"))(config)).eval()
    program = _capture_folder(_save(model, tmp_path))
    assert "model.embed_tokens.weight" in program.constants
    assert "lm_head.weight" not in program.constants
    _assert_computes(program, model)


def test_a_tied_tensor_stored_twice_is_no_surplus(tmp_path: Path):
    model = randomize(type(tiny_model("gpt2"))(tiny_config("gpt2"))).eval()
    folder = _save(model, tmp_path)
    _rewrite_weights(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    _assert_computes(_capture_folder(folder), model)


def test_experts_merged_at_load(tmp_path: Path):
    """Stored one by one, merged by transformers while loading: read through it."""
    model = tiny_model("mixtral")
    folder = _save(model, tmp_path)
    assert any("experts.0.w1" in name for name in Checkpoint.open(folder).names)
    program = _capture_folder(folder)
    stacks = [name for name in program.constants if name.endswith("experts.down_proj")]
    assert len(stacks) == LAYERS
    assert program.constants[stacks[0]].shape[0] == TINY_MODELS["mixtral"].options["num_local_experts"]
    _assert_computes(program, model)


def test_saved_from_the_base_model(tmp_path: Path):
    """GPT-2 as its authors published it: names without the prefix of the model with a head."""
    model = tiny_model("gpt2")
    folder = _save(model.transformer, tmp_path)
    assert "h.0.attn.c_attn.weight" in Checkpoint.open(folder)
    _rewrite_config(folder, architectures=["GPT2LMHeadModel"])
    _assert_computes(_capture_folder(folder), model)


def test_base_model_of_a_folder_with_a_head(tmp_path: Path):
    """BERT from a classifier: the head is left out, as transformers does."""
    import transformers

    model = randomize(transformers.BertForSequenceClassification(tiny_config("bert"))).eval()
    folder = _save(model, tmp_path)
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= set(Checkpoint.open(folder).names)
    _rewrite_config(folder, architectures=["BertModel"])
    program = _capture_folder(folder)
    assert (program.info.kind, program.info.name) == ("encoder", "BertModel")
    assert not any("classifier" in name for name in program.constants)


def test_missing_tensors_are_named(tmp_path: Path):
    folder = _save(tiny_model("llama"), tmp_path)
    _rewrite_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    message = _refusal(folder)
    assert "missing tensors for LlamaForCausalLM: model.layers.1.mlp.up_proj.weight;" in message
    assert "download it again" in message


def test_surplus_tensors_are_named(tmp_path: Path):
    """A config with fewer layers than the weights would quietly give another model."""
    folder = _save(tiny_model("llama"), tmp_path)
    _rewrite_config(folder, num_hidden_layers=1)
    message = _refusal(folder)
    assert "unexpected tensors for LlamaForCausalLM: model.layers.1." in message
    assert "and 6 more" in message


def test_tensors_of_another_shape_are_named(tmp_path: Path):
    folder = _save(tiny_model("llama"), tmp_path)
    _rewrite_config(folder, intermediate_size=40)
    message = _refusal(folder)
    assert "mismatched tensors for LlamaForCausalLM: model.layers.0.mlp" in message
    assert "[48, 32] (config.json says [40, 32])" in message


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_damage_is_named_through_the_fallback_too(tmp_path: Path, damage: str):
    """transformers itself would draw missing weights at random and go on."""
    folder = _save(tiny_model("mixtral"), tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        if damage == "missing":
            del tensors["model.layers.1.self_attn.q_proj.weight"]
        else:
            tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)

    _rewrite_weights(folder, spoil)
    assert f"{damage} tensors for MixtralForCausalLM: model.layers.1.self_attn.q_proj" in _refusal(folder)


def test_buffers_that_old_checkpoints_carry_are_ignored(tmp_path: Path):
    model = tiny_model("llama")
    folder = _save(model, tmp_path)
    _rewrite_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    _assert_computes(_capture_folder(folder), model)


def test_open_checkpoint_gives_both(tmp_path: Path):
    checkpoint, source = open_checkpoint(_save(tiny_model("opt"), tmp_path))
    assert checkpoint.folder == tmp_path
    assert (source.name, source.kind, source.inputs) == ("OPTForCausalLM", "decoder", ("input_ids", "position_ids"))


# Live models.


def test_a_live_model_shares_its_storage():
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    program = capture(source_from_model(model))
    for name, parameter in model.named_parameters():
        constant = program.constants[name]
        assert constant.blocks[0].data_ptr() == parameter.data_ptr(), name
        assert constant.stored_dtype == torch.bfloat16
    _assert_computes(program, model)


def _description(model: nn.Module) -> dict[str, Any]:
    """Everything about a module that capture could disturb."""
    described: dict[str, Any] = {
        "modes": {name: each.training for name, each in model.named_modules()},
        "tensors": {name: (id(t), t.data_ptr(), t.dtype, t.requires_grad) for name, t in model.named_parameters()},
        "buffers": {name: (id(t), t.data_ptr(), t.dtype) for name, t in model.named_buffers()},
        "values": {name: t.detach().double().sum().item() for name, t in model.named_parameters()},
        "hooks": sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()),
    }
    if hasattr(model, "config"):
        config = model.config
        described["config"] = (config.to_json_string(), config._attn_implementation, config._experts_implementation)
    return described


def _capture_in_training(name: str) -> tuple[Any, Program]:
    """Capture a model in training, part of it in eval mode; it must stay as it is."""
    model = tiny_model(name).train()
    model.model.layers[0].eval()
    before = _description(model)
    program = capture(source_from_model(model))
    assert _description(model) == before
    return model, program


def test_a_live_model_is_left_as_it_was():
    _capture_in_training("gemma2")


def test_a_live_model_with_experts_is_left_as_it_was_and_shares_their_stacks():
    model, program = _capture_in_training("mixtral")
    stack = model.model.layers[1].mlp.experts.down_proj
    block = program.constants["model.layers.1.mlp.experts.down_proj"].blocks[0]
    assert (block.data_ptr(), block.shape) == (stack.data_ptr(), stack.shape)


def test_experts_that_become_linears_share_their_stacks_too():
    """Experts of another kind than `jettison::experts`: each is a constant of its own, and a view."""
    model, program = _capture_in_training("gpt_oss")
    stack = model.model.layers[1].mlp.experts.down_proj
    for expert in range(stack.shape[0]):
        block = program.constants[f"model.layers.1.mlp.experts.down_proj.{expert}"].blocks[0]
        assert block.data_ptr() == stack[expert].data_ptr()
    assert "model.layers.1.mlp.experts.down_proj" not in program.constants


def test_a_plain_module_is_left_as_it_was():
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.drop, self.head = nn.Embedding(31, 8), nn.Dropout(0.5), nn.Linear(8, 31)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.drop(self.embed(input_ids)))

    model = Decoder().train()
    before = _description(model)
    program = capture_module(model)
    assert _description(model) == before
    assert program.constants["head.weight"].blocks[0].data_ptr() == model.head.weight.data_ptr()


def test_a_failed_capture_leaves_the_model_as_it_was():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(31, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.embed(input_ids) if input_ids.sum() > 3 else input_ids

    model = Broken().train()
    before = _description(model)
    with pytest.raises(CaptureError):
        capture_module(model)
    assert _description(model) == before


def test_the_library_is_left_as_it_was():
    from transformers import masking_utils

    before = masking_utils.find_packed_sequence_indices, nn.Module.register_parameter
    capture(source_from_model(tiny_model("llama")))
    assert (masking_utils.find_packed_sequence_indices, nn.Module.register_parameter) == before
