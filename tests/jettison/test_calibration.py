from __future__ import annotations

import hashlib

import pytest
import torch

import jettison
from jettison.calibration import Calibration
from jettison.ir.errors import ArtifactError, OptionError
from jettison.ir.program import input_placeholders
from jettison.passes.methods import AWQ, GPTQ
from jettison.passes.methods.finished_layers import FinishedLayers
from jettison.passes.pipeline import prepare
from jettison.source import open_source
from tests.models.tiny_models import tiny_model

SIZE = (3, 24)
GPTQ_TEXT = "quantize-weights{bits=4,group=32,method=gptq}"


pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def source(small_model):
    opened = open_source(small_model)
    prepare(opened.program)
    return opened


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The captain looked out over the sea, and the sea looked back. " * 60)
    return path


def optimize(model, passes=GPTQ_TEXT, **options):
    return jettison.optimize(model, passes, target="torch", calibration_size=SIZE, **options)


def parts(model, tmp_path):
    """Every constant of the saved model, by its bytes."""
    folder = tmp_path / f"saved-{len(list(tmp_path.iterdir()))}"
    model.save_pretrained(folder)
    return (folder / "weights.safetensors").read_bytes()


def test_a_text_gives_windows_spread_over_it(source, text):
    calibration = Calibration(source, text, *SIZE)
    tokens = calibration.tokens()
    assert tuple(tokens.shape) == SIZE
    assert calibration.sha256 == hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    alone = Calibration(source, text, 100, 24).tokens()
    assert torch.equal(tokens, alone[:: len(alone) // 3][:3])
    batches = calibration()
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), tokens)
    assert set(batches[0]) == {"input_ids", "position_ids", "attention_mask", "logits_positions"} & set(batches[0])


def test_a_text_shorter_than_a_window_is_one_window(source, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("The captain looked out.")
    calibration = Calibration(source, path)
    windows, length = calibration.tokens().shape
    assert windows == 1
    assert 2 <= length < 24
    assert calibration.as_dict() == {
        "text": str(path), "windows": 1, "length": length, "sha256": calibration.sha256,
    }  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small BERT with a tokenizer that puts a token in front of every text and one behind it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("encoder")
    tiny_model("bert").save_pretrained(folder)
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "captain", "looked", "out", "over", "sea", "and", "back", ",", "."]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def test_an_encoder_reads_texts_with_their_first_and_last_token(encoder, text):
    opened = open_source(encoder)
    prepare(opened.program)
    calibration = Calibration(opened, text, *SIZE)
    tokens = calibration.tokens()
    assert tuple(tokens.shape) == SIZE
    assert (set(tokens[:, 0].tolist()), set(tokens[:, -1].tolist())) == ({1}, {2})
    assert not bool(((tokens[:, 1:-1] == 1) | (tokens[:, 1:-1] == 2)).any())
    assert set(calibration()[0]) == set(input_placeholders(opened.program.entries["forward"]))
    short = Calibration(opened, text, 2, 3).tokens()
    assert short.shape == (2, 3)
    assert not bool(((short == 1) | (short == 2)).any())


def test_an_encoder_is_factored_for_its_text(encoder, text):
    model = optimize(encoder, "factorize-linear{rank=4}", calibration=text)
    (record,) = [each for each in model.report.passes if each.name == "factorize-linear"]
    assert record.rewrites >= 12
    assert record.bytes_after < record.bytes_before
    assert model.report.calibration["windows"] == 3


def test_a_model_writes_its_own(source):
    first, again = (Calibration(source, None, 2, 12, seed=3) for _ in range(2))
    assert torch.equal(first.tokens(), again.tokens())
    assert tuple(first.tokens().shape) == (2, 12)
    assert not torch.equal(first.tokens(), Calibration(source, None, 2, 12, seed=4).tokens())
    assert first.as_dict() == {"seed": 3, "windows": 2, "length": 12, "sha256": first.sha256}


def test_nothing_is_made_before_it_is_asked_for(small_model):
    model = jettison.optimize(small_model, "quantize-weights{bits=4}", target="torch")
    assert model.report.calibration is None


@pytest.mark.parametrize(("windows", "length", "field"), [(0, 8, "windows=0"), (2, 1, "length=1"), (2, 2.5, "length")])
def test_refuses_sizes(source, windows, length, field):
    with pytest.raises(OptionError, match=rf"\[calibration\] {field}.*needs a whole number, at least"):
        Calibration(source, None, windows, length)


def test_the_tokens_are_in_the_report_and_the_manifest(small_model, text, tmp_path):
    model = optimize(small_model, calibration=text)
    assert model.report.calibration["windows"] == 3
    assert "calibrated on 3 windows of 24 tokens" in " ".join(str(model.report).split())
    model.save_pretrained(tmp_path / "out")
    manifest = (tmp_path / "out" / "jettison.json").read_text()
    assert model.report.calibration["sha256"] in manifest


@pytest.mark.parametrize("method", [GPTQ, AWQ])
def test_an_interrupted_run_goes_on(small_model, text, tmp_path, monkeypatch, method):
    passes = GPTQ_TEXT.replace("gptq", method.name)
    whole = parts(optimize(small_model, passes, calibration=text), tmp_path)
    calls, encoder = [], method.row_encoder

    def interrupted(self, weight_format, statistics):
        calls.append(statistics)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return encoder(self, weight_format, statistics)

    monkeypatch.setattr(method, "row_encoder", interrupted)
    stop = 4
    with pytest.raises(KeyboardInterrupt):
        optimize(small_model, passes, calibration=text, resume=tmp_path / "unfinished")
    assert len(list((tmp_path / "unfinished").glob("*.safetensors"))) == 3
    calls.clear()
    stop = 0
    resumed = optimize(small_model, passes, calibration=text, resume=tmp_path / "unfinished")
    assert parts(resumed, tmp_path) == whole
    inputs = len([each for each in calls if each is not None])
    calls.clear()
    optimize(small_model, passes, calibration=text, resume=tmp_path / "unfinished")
    # The tied head is read by an embedding, too, but by one linear: it is finished as well.
    assert (inputs, len([each for each in calls if each is not None])) == (2, 0)


def test_what_does_not_fit_is_done_again(small_model, text, tmp_path):
    folder = tmp_path / "unfinished"
    whole = parts(optimize(small_model, calibration=text, resume=folder), tmp_path)

    def other_options():
        optimize(small_model, GPTQ_TEXT.replace("32", "64"), calibration=text, resume=folder)

    def cut_files():
        for path in folder.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:100])

    def no_identity():
        (folder / "identity").write_bytes(b"\xff")

    for damage in (other_options, cut_files, no_identity):
        damage()
        assert parts(optimize(small_model, calibration=text, resume=folder), tmp_path) == whole, damage


def test_a_folder_with_something_else_is_left_alone(small_model, text, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(OptionError, match="holds something other than finished layers"):
        optimize(small_model, calibration=text, resume=tmp_path / "mine")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"\[resume\](?s:.)*cannot be kept there"):
        FinishedLayers(tmp_path / "file" / "below", "identity").store("step", {}, None)
